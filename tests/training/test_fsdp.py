"""train.py --fsdp against DDP: losses, weights and moments of the same steps on the same ranks;
what it saves, taken up sharded or whole; first weights and files by rows."""

import json
import random
import shutil
import socket
import subprocess
import sys
import types

import pytest
import small_models
import torch
from builders import (
    CONFIGS,
    PATIENCE,
    ROOT,
    error_of,
    run_ranks,
    save_model,
    started,
    token_shard,
    torchrun,
)
from doomed_train import after_step, doomed

import checkpoint
from costs.memory import estimate_memory
from costs.symbols import Setup, solve_all
from distributed import Dist
from formats import merging
from formats.row_shards import rows_of_rank
from model import GPTModel
from training import fsdp, shards
from training.options import RunOptions
from training.state import find_latest

# Run in one process group: command lines of train.py, and copies of folders between them.
COMMANDS = """
import contextlib, json, pathlib, shutil
import train
train.distributed.setup = lambda *args: contextlib.nullcontext(dist)
for words in json.loads(pathlib.Path({cases!r}).read_text()):
    if words[0] == "copy":
        dist.is_main and shutil.copytree(*words[1:])
        dist.barrier()
    else:
        train.main(words)
"""
ROUTED = small_models.tiny("mixtral").replace(router_loss=0.3, dropout=0.1)
KINDS = {
    "llama": CONFIGS["llama"],
    "mixture": ROUTED.replace(vocab_size=257, max_position_embeddings=256),
    "gpt2": CONFIGS["gpt"].replace(dropout=0.1),  # tied, and its matrices turned on disk
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp")
    token_shard(root / "train.npy", 20_000)
    token_shard(root / "val.npy", 700, seed=1)  # eleven batches, of which one rank has five
    for name, config in KINDS.items():
        (root / f"{name}.yaml").write_text(json.dumps(config.to_dict()))
    return root


def words(root, kind, out, *more):
    flags = ["--config", root / f"{kind}.yaml", "--data-mode", "fineweb_npy", "--device", "cpu"]
    flags += ["--tokenizer-name", "byte", "--seq-len", 32, "--train-npy", root / "train.npy"]
    flags += ["--val-npy", root / "val.npy", "--batch-size", 2, "--warmup-steps", 2]
    flags += ["--lr", "1e-2", "--log-steps", 1, "--num-steps", 4, "--eval-steps", 2]
    return [str(word) for word in (*flags, "--checkpoint-path", root / out, *more)]


def run_all(root, tmp_path, n, commands, cold=False):
    (tmp_path / "cases.json").write_text(json.dumps(commands))
    return run_ranks(n, tmp_path, COMMANDS.format(cases=str(tmp_path / "cases.json")), cold=cold)


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in lines]


def state_of(path):
    """(weights by name, moments and steps, what else the optimizer says)"""
    model = checkpoint.load_model(path, "float32")
    optimizer = checkpoint.load_training_state(path)["optimizer"]
    return dict(model.named_parameters()), optimizer["state"], optimizer["param_groups"]


def assert_same(one, two, atol=0.0):
    """Of two checkpoints: all that training goes on from."""
    (weights, moments, groups), (others, other_moments, other_groups) = map(state_of, (one, two))
    assert weights.keys() == others.keys() and moments.keys() == other_moments.keys()
    assert groups == other_groups
    for name, p in weights.items():
        torch.testing.assert_close(p, others[name], rtol=0, atol=atol, msg=name)
    for i, own in moments.items():
        for key, value in own.items():
            torch.testing.assert_close(value, other_moments[i][key], rtol=0, atol=atol)


# On two ranks the order of a sum is no question, but that of squares in the gradients' norm, and of
# passes that add up, is: Adam makes steps of --lr of gradients that are nearly 0 whatever they are.
CASES = {
    "llama": (["--grad-accum-steps", 2, "--lr", "1e-4"], 1e-6),
    "mixture": (["--use-activation-checkpoint", "--grad-clip-norm", 0], 0.0),
    "gpt2": (["--grad-clip-norm", 0], 0.0),
}


def test_the_same_steps_as_ddp_and_taken_up_by_either(root, tmp_path):
    commands = []
    for kind, (more, _) in CASES.items():
        commands.append(words(root, kind, f"ddp-{kind}", *more))
        commands.append(words(root, kind, f"fsdp-{kind}", *more, "--fsdp"))
    resumed = {"fsdp-fsdp": "mixture", "fsdp-ddp": "gpt2", "ddp-fsdp": "gpt2"}
    for names, kind in resumed.items():
        before, after = names.split("-")
        half = root / f"{before}-{kind}/checkpoint-2"
        commands.append(["copy", str(half), str(root / names / "checkpoint-2")])
        more = [*CASES[kind][0], "--resume", *(["--fsdp"] if after == "fsdp" else [])]
        commands.append(words(root, kind, names, *more))
    begun = ["--init-from", root / "ddp-mixture/checkpoint-4", "--lr", 0, "--num-steps", 1]
    commands.append(words(root, "mixture", "begun", "--fsdp", *begun))
    out = run_all(root, tmp_path, 2, commands)
    assert out.stdout.count("checkpoint-2, step 2") == 3
    one, two = (
        state_of(root / name)[0] for name in ("ddp-mixture/checkpoint-4", "begun/checkpoint-1")
    )
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    for kind, (_, atol) in CASES.items():
        one, two = (root / f"{how}-{kind}" for how in ("ddp", "fsdp"))
        for entry, other in zip(log_of(one), log_of(two), strict=True):
            assert other == pytest.approx(entry, rel=1e-6)
        assert len(log_of(one)) == 6
        for step in (2, 4):
            assert_same(one / f"checkpoint-{step}", two / f"checkpoint-{step}", atol)
    for names, kind in resumed.items():
        assert_same(root / f"fsdp-{kind}/checkpoint-4", root / names / "checkpoint-4")
        for entry, other in zip(log_of(root / names), log_of(root / f"fsdp-{kind}")[3:]):
            assert entry == (other if names == "fsdp-fsdp" else pytest.approx(other, rel=1e-6))
    check_directory(root / "fsdp-gpt2/checkpoint-4", 2)


def check_directory(path, ranks):
    """That of any other run, which transformers opens; each rank's moments beside it."""
    transformers = pytest.importorskip("transformers")
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {p.name for p in path.iterdir()} == {*files, "manifest.json"}
    assert sum(name.endswith(".moments") for name in files) == ranks
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = checkpoint.load_model(path, "float32")(ids)[0]
        assert (ours - theirs(ids).logits).abs().max() < 1e-5
    checkpoint.main(["inspect", str(path), "--verify"])


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_first_weights_are_those_of_a_model_that_is_not_sharded(kind):
    world_size, config = 3, small_models.tiny(kind)
    torch.manual_seed(3)
    model, parts = GPTModel(config), []
    for rank in range(world_size):
        torch.manual_seed(3)
        on_meta, rows = fsdp.drawn(config, Dist(rank, world_size, rank, torch.device("cpu")))
        assert all(p.is_meta for p in on_meta.parameters())
        parts.append(rows)
    for name, p in model.named_parameters():
        dim = 1 if p.dim() == 3 and len(p) % 3 and p.shape[1] % 3 == 0 else 0
        assert torch.equal(torch.cat([rows.pop(name) for rows in parts], dim), p), name
    assert not any(parts)


def test_rows_are_dealt_as_torch_does():
    for n in range(1, 12):
        for world_size in range(1, 6):
            chunks = list(torch.arange(n).chunk(world_size))
            chunks += [torch.arange(0)] * (world_size - len(chunks))
            for rank, chunk in enumerate(chunks):
                assert list(rows_of_rank(n, rank, world_size)) == chunk.tolist()


def test_what_does_not_go_with_it(root, tmp_path):
    line = error_of("train.py", *words(root, "llama", "no", "--fsdp"), "--lora-rank", 4,
                    "--init-from", "x")  # fmt: skip
    assert "--fsdp shards models that train in full" in line
    adapter = types.SimpleNamespace(file=tmp_path / "lora/adapter_model.safetensors")
    part = types.SimpleNamespace(to_local=None)  # a DTensor, as far as can be told
    model = types.SimpleNamespace(parameters=lambda: [part])
    with pytest.raises(ValueError, match="lora is an adapter, which --fsdp does not merge"):
        merging.merge(adapter, model, tmp_path)


def test_hosts_that_do_not_see_the_same_files(tmp_path):
    """Rank 1 is told of a checkpoint that is not there for it, and of a folder to write into."""
    run = RunOptions(checkpoint_path=str(tmp_path), resume=True)
    far = tmp_path / "elsewhere/checkpoint-2"
    dist = types.SimpleNamespace(
        is_main=False, broadcast=lambda mine: far, gather=lambda x: [True, x]
    )
    with pytest.raises(ValueError, match="checkpoint-2 is there for rank 0 and not here: --check"):
        find_latest(run, dist)
    with pytest.raises(ValueError, match="elsewhere of rank 0 is not there for rank 1: --check"):
        shards.write(None, None, dist)


# ---------------------------------------------------------------------------------------------
# Real launches, each of which takes its seconds

LOADS = """
import pathlib
import checkpoint, train
from model import GPTModel
from training import fsdp
for path in sorted(pathlib.Path({folder!r}).glob("*/checkpoint-1")):
    whole = checkpoint.load_model(path, "float32")
    loss_fn = fsdp.shard(train.Loss(GPTModel.on_meta(whole.config)), "float32", dist)
    checkpoint.load_weights(path, loss_fn.model)
    for (name, p), (_, q) in zip(fsdp.named_shards(loss_fn.model), whole.named_parameters()):
        assert torch.equal(p.full_tensor(), q), (path, name)
        share = q.numel() / dist.world_size
        dealt = share if q.dim() == 3 and q.shape[1] % 3 == 0 else -(-len(q) // 3) * q[0].numel()
        assert p.to_local().numel() <= dealt, name
    if dist.is_main:
        say("loaded", path.parent.name)
"""


@pytest.mark.slow
def test_each_family_is_read_by_rows(tmp_path):
    """On three ranks, which cut heads, pairs of rotary channels and experts."""
    for kind in small_models.KINDS:
        torch.manual_seed(1)
        model = GPTModel(small_models.tiny(kind))
        for p in model.parameters():
            torch.nn.init.normal_(p)
        save_model(model, tmp_path / kind, 1, tokenizer=None)
    out = run_ranks(3, tmp_path, LOADS.format(folder=str(tmp_path)))
    assert out.stdout.count("loaded") == len(small_models.KINDS)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted run on two ranks, with a save at each step."""
    run_all(root, tmp_path_factory.mktemp("whole"), 2, [words(root, *WHOLE)])
    return root / "whole"


EACH = ["--save-steps", 1, "--keep", 2, "--fsdp"]
WHOLE = ["gpt2", "whole", *EACH]


@pytest.mark.slow
def test_killed_inside_of_saves_the_run_ends_in_the_same_bits(root, whole, tmp_path):
    """Rank 0 or 1 is killed at a file operation on what it saves: making, writing, renaming and
    removing. What is there then is whole, and the next one goes on from it."""
    dice, found, killed = random.Random(0), 0, 0
    for n in range(8):
        doom = f"builders.die_at_file_operation({dice.randint(1, 25)})"
        script = doomed(tmp_path, doom, rank=n % 2)
        done = torchrun(2, script, *words(root, "gpt2", "cut", *EACH, "--resume"), code=None)
        assert done.returncode in (0, 1), done.stderr
        killed += done.returncode
        for path in (root / "cut").glob("checkpoint-*"):
            checkpoint.main(["inspect", str(path), "--verify"])
            found += 1
    assert killed >= 5 and found
    torchrun(2, "train.py", *words(root, "gpt2", "cut", *EACH, "--resume"))
    for step in (3, 4):
        assert_same(whole / f"checkpoint-{step}", root / f"cut/checkpoint-{step}")
    assert log_of(whole) == log_of(root / "cut")
    assert not list((root / "cut").glob(".*"))


@pytest.mark.slow
def test_killed_between_saves_and_taken_up_by_other_ranks(root, tmp_path):
    """By two ranks with the same bits; by four or a process alone up to the order of sums."""
    more = ["--fsdp", "--lr", "1e-4", "--dropout", "0"]
    run_all(root, tmp_path, 2, [words(root, "mixture", "straight", *more)])
    script = doomed(tmp_path, after_step(3), rank=1)
    torchrun(2, script, *words(root, "mixture", "broken", *more), code=1)
    assert [p.name for p in (root / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    for n, batch in ((2, 2), (4, 1), (0, 4)):
        shutil.copytree(root / "broken", root / f"on-{n}")
        again = words(root, "mixture", f"on-{n}", *more, "--resume", "--batch-size", batch)
        torchrun(n, "train.py", *again, cold=n == 4)
        pair = root / "straight/checkpoint-4", root / f"on-{n}/checkpoint-4"
        assert_same(*pair, 0.0 if n == 2 else 1e-5)
        check_directory(pair[1], n)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(root, tmp_path, rank):
    script = doomed(tmp_path, after_step(3, "SIGSTOP"), rank)
    flags = words(root, "llama", f"stopped-{rank}", "--fsdp", "--timeout", 8)
    done = torchrun(2, script, *flags, code=1, cold=True)
    assert f"error: rank {rank} made no progress for 8 s; the run ends here" in done.stderr


@pytest.mark.slow
def test_two_agents_of_one_rank_each(root, whole):
    """As on two hosts, which share a file system: by torchrun's rendezvous on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=fsdp"]
    launch += [str(ROOT / "train.py"), *words(root, "gpt2", "agents", *EACH)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(launch, **pipes) as one, started(launch, **pipes) as two:
        outs = [agent.communicate(timeout=PATIENCE) for agent in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outs
    assert sorted(out.count("step 4: saved") for out, _ in outs) == [0, 1]
    assert_same(whole / "checkpoint-4", root / "agents/checkpoint-4")
    assert log_of(whole) == log_of(root / "agents")


HELD = """
import json, pathlib
import train
from config import GPTConfig
from model import GPTModel
from training import fsdp
for words in json.loads(pathlib.Path({cases!r}).read_text()):
    model, rows = fsdp.drawn(GPTConfig(**words), dist)
    loss_fn = fsdp.shard(train.Loss(model), "bfloat16", dist)
    fsdp.put(model, rows)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    seen = []

    def gathered(block, *args):
        plain = [p for p in loss_fn.parameters() if not hasattr(p, "to_local")]
        own = [id(p) for p in block.parameters()]
        sizes = [p.numel() * p.itemsize for p in plain]
        seen.append((sum(sizes), sum(n for p, n in zip(plain, sizes) if id(p) in own)))

    for block in model.blocks:
        block.register_forward_pre_hook(gathered)
    ids = torch.arange(64).view(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn(ids, ids)[0].backward()
    optimizer.step()

    def held(tensors):
        return sum(t.to_local().numel() * t.itemsize for t in tensors if hasattr(t, "to_local"))

    states = optimizer.state.values()
    parts = [held(parameters), held(p.grad for p in parameters if p.grad is not None)]
    parts.append(held(t for own in states for t in own.values()))
    if dist.is_main:
        say("held", json.dumps({{"parts": parts, "gathered": seen}}))
"""


@pytest.mark.slow
def test_what_a_rank_holds_is_what_compute_py_says(tmp_path):
    """Rows of weights, gradients and moments; and at each block the ends and that block, gathered
    in 16 bits."""
    kinds = ("llama", "gpt2", "mixtral", "qwen2_moe", "youtu", "gemma2")
    configs = [small_models.tiny(kind) for kind in kinds]
    (tmp_path / "cases.json").write_text(json.dumps([config.to_dict() for config in configs]))
    out = run_ranks(2, tmp_path, HELD.format(cases=str(tmp_path / "cases.json")))
    found = [json.loads(line[5:]) for line in out.stdout.splitlines() if line.startswith("held ")]
    for config, held in zip(configs, found, strict=True):
        setup = Setup(dtype="bf16", dp=2, zero=3)
        states = estimate_memory(config, 2, 32, dtype="bf16", dp=2, zero=3)["states"]
        wanted = [states[name] for name in ("weights", "gradients", "optimizer")]
        assert held["parts"] == pytest.approx(wanted, rel=0.01)
        values = solve_all(config, 2, 32, setup)
        most = max(own for _, own in held["gathered"])
        assert most == 2 * values["n_largest"]
        ends = {everything - own for everything, own in held["gathered"]}
        assert ends == {values["M_gathered_ends"] + 2 * values["n_ends"]}

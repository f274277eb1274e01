"""backends/parallel.py, pipe.py and stages.py: models whose layers lie on several ranks have the
bits of a model on one, whatever fails meanwhile. Real ranks over gloo, many models in each run."""

import types

import numpy as np
import pytest
import torch
from builders import Rank, run_ranks, save_model
from small_models import KINDS, tiny

import checkpoint
from backends import parallel
from backends.engine import default_batch_size
from backends.pipe import Pipe
from config import load_config
from costs.gpus import find_gpu
from costs.memory import estimate_memory, usable_memory
from costs.shards import shares, weight_bytes
from formats import conversion
from model import GPTModel
from quantisation.names import Quantisation

QUICK = ("gpt2", "gemma2", "deepseek_v3")  # tied and padded; windows and caps; latents and experts


def saved(folder, kind):
    """A checkpoint of five layers, whose weights tell tokens apart."""
    torch.manual_seed(1)
    model = GPTModel(tiny(kind, n_layers=5, vocab_size=160)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else torch.nn.init.normal_(p, std=0.5)
    return save_model(model, folder / kind, 1, tokenizer=None)


def shard_of(folder):
    ids = np.random.default_rng(0).integers(0, 131, 211).astype(np.uint16)
    np.save(folder / "x.npy", ids)
    return folder / "x.npy"


BITS = """
from quantisation.names import Quantisation
from sharded import check, check_rounded, open_shard
stream = open_shard({shard!r})
for path in {paths!r}:
    rules = [r for r in {rules} if "a8" not in r.rule or not any(x in path for x in {whole})]
    for size in {sizes}:
        n = check(path, dist, size, stream)
        check_rounded(path, dist, size, stream, rules)
        if dist.is_main:
            say("same", n, size, path)
"""
FEW = (Quantisation("rtn-w4-g16", embeddings=True, skip=("blocks.4.*",)),)
EVERY = (*FEW, *map(Quantisation, ("bf16", "rtn-w8", "fp8-b16", "rtn-w8a8", "fp8-a8")))
# whose activations are not rounded: mixtures and latent attention
WHOLE = [kind for kind in KINDS if tiny(kind).n_experts or tiny(kind).kv_lora_rank is not None]


def compare(folder, kinds, n, sizes, rules=FEW):
    paths = [str(saved(folder, kind)) for kind in kinds]
    places = {"shard": str(shard_of(folder)), "paths": paths}
    body = BITS.format(**places, sizes=sizes, rules=rules, whole=WHOLE)
    out = run_ranks(n, folder, body)
    lines = [line for line in out.stdout.splitlines() if line.startswith("same")]
    assert len(lines) == len(paths) * len(sizes), out.stdout


def test_two_ranks_to_a_model_have_the_bits_of_one(tmp_path):
    compare(tmp_path, QUICK, 2, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [KINDS[part::3] for part in range(3)], ids="abc")
@pytest.mark.parametrize("n, sizes", [(2, (2,)), (4, (1, 2, 4))])
def test_every_family_in_groups_of_every_size(tmp_path, n, sizes, kinds):
    compare(tmp_path, kinds, n, sizes, EVERY if n == 2 else FEW)


# ---------------------------------------------------------------------------------------------
# What fails

# Whichever rank of a group, whichever stage of the work: its memory holds no more than 2 rows.
SHORT_OF_MEMORY = """
import checkpoint
from backends import continuations
from backends.local import facts_of
from backends.parallel import in_groups, load
from sharded import ALONE, numbers, open_shard
ckpt, stream = checkpoint.open({path!r}), open_shard({shard!r})
facts, dist = facts_of(ckpt, None, "float32", "cpu"), in_groups(dist, 2, None, "float32")
cache, wanted = continuations.PrefixCache, None
for short, where in [(0, "through_blocks"), (1, "through_blocks"), (1, "nll"), (0, "prefix")]:
    model, calls = load(ckpt, "float32", dist), []
    def fails(real, n):
        def function(x, *args, **more):
            calls.append(len(x))
            if dist.rank == short and len(x) > n and len(calls) > {spared}:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(x, *args, **more)
        return function
    if where == "through_blocks":
        model.through_blocks = fails(model.through_blocks, 2)
    if where == "nll" and model.is_last:
        model.nll = fails(model.nll, 2 * 32)
    def alloc(model, *args):
        calls.append(0)
        if where == "prefix" and dist.rank == short and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return cache(model, *args)
    continuations.PrefixCache = alloc
    found = numbers(model, facts, dist, stream, batch=4)
    continuations.PrefixCache = cache
    batches = [v for name, v in found.items() if "batch" in name]
    say("found", dist.rank, short, where, *batches)
    same = numbers(ckpt.load("float32"), facts, ALONE, stream, batch=found["batch"])
    for name in ("nll", "token_nll", "seen"):
        assert found[name] == same[name], (short, where, name)
    again = numbers(load(ckpt, "float32", dist), facts, dist, stream, batch=4)
    wanted = wanted or again
    assert again == wanted, "whoever failed before is whole again"
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_memory_that_runs_out_on_one_rank_of_a_group(tmp_path, n):
    """All ranks agree on half the batch, those of another group too, and what comes out is what
    half the batch gives."""
    path = saved(tmp_path, "llama")
    body = SHORT_OF_MEMORY.format(path=str(path), shard=str(shard_of(tmp_path)), spared=6 // n)
    out = run_ranks(n, tmp_path, body)
    lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("found")]
    rows = {2: ("30", "60"), 4: ("60", "30")}  # where a rank's second prefix is among them
    wanted = [  # batches of windows; of two kinds of rows; of three kinds of samples
        ["0", "through_blocks", "2", "15", "15", "2", "2", "2"],
        ["1", "through_blocks", "2", "15", "15", "2", "2", "2"],
        ["1", "nll", "2", "60", "60", "4", "4", "4"],
        ["0", "prefix", "4", *rows[n], "4", "4", "4"],
    ]
    for rank in range(n):
        assert [line[1:] for line in lines if line[0] == str(rank)] == wanted, (rank, lines)


FAILS = """
import itertools
import checkpoint
from backends.local import facts_of
from backends.parallel import in_groups, load
from sharded import numbers, open_shard
ticks = itertools.count(int(time.monotonic()) + 1)
dist._watch.clock = (lambda: 0.0) if dist.rank == {failing} else (lambda: float(next(ticks)))
ckpt, stream = checkpoint.open({path!r}), open_shard({shard!r})
dist = in_groups(dist, 2, None, "float32")
model, calls = load(ckpt, "float32", dist), []
real = model.through_blocks
def through_blocks(x, *args):
    calls.append(x)
    if dist.rank == {failing} and len(calls) > 3:
        {how}
    return real(x, *args)
model.through_blocks = through_blocks
numbers(model, facts_of(ckpt, None, "float32", "cpu"), dist, stream, batch=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n, failing", [(2, 0), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("how", ["hangs", "is stopped", "is killed", "raises"])
def test_a_rank_of_a_group_that_fails_ends_the_run_and_is_named(tmp_path, n, failing, how):
    """Whoever it is, also where another group has nothing to do with it."""
    ways = {"hangs": "time.sleep(10**6)", "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)"}
    ways |= {"is killed": "os.kill(os.getpid(), signal.SIGKILL)"}
    ways |= {"raises": "raise RuntimeError('the bus is down')"}
    path, shard = saved(tmp_path, "llama"), shard_of(tmp_path)
    body = FAILS.format(path=str(path), shard=str(shard), how=ways[how], failing=failing)
    err = run_ranks(n, tmp_path, body, code=1, timeout=4, cold=how == "is killed").stderr
    silent = f"error: rank {failing} made no progress for 4 s; the run ends here"
    said = {
        **{"hangs": silent, "is stopped": silent},
        "is killed": f"rank      : {failing} (local_rank: {failing})",
        "raises": f"rank {failing}: RuntimeError: the bus is down",
    }
    assert said[how] in err and "Connection closed by peer" not in err, err


# ---------------------------------------------------------------------------------------------
# What a rank reads and holds


@pytest.mark.parametrize(
    "shape, how, wanted",
    [
        *[("7b", None, 1), ("llama3-70b", None, 2), ("mixtral-8x7b", None, 2)],
        *[("deepseek-v3", None, None), ("llama3-70b", "rtn-w4-g128", 1), ("llama3-70b", "bf16", 2)],
        *[("llama3-70b", 0.53, 1), ("llama3-70b", 1.25, 2)],
    ],
)
def test_auto_is_the_least_that_compute_says_fits(monkeypatch, shape, how, wanted):
    """On GPUs of 80 GB, of the divisors of four. how: a rule, or bytes of a weight in a file."""
    rule, packed = (how, None) if isinstance(how, str) else (None, how)
    card = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(parallel, "sharded", lambda dist, size: size)
    dist, config = Rank(0, 4, 0, torch.device("cuda", 0)), load_config(shape)
    if wanted is None:
        with pytest.raises(ValueError, match="the model fits none of 1 to 4 GPUs: start more"):
            parallel.in_groups(dist, "auto", config, "bfloat16")
        return
    rounded = Quantisation(rule) if rule else None
    assert parallel.in_groups(dist, "auto", config, "bfloat16", rounded, lambda: packed) == wanted
    setup = {"training": False, "dtype": "bf16", "quantise": rule, "block_bytes": packed}
    peaks = [estimate_memory(config, 1, 4096, shard=n, **setup)["peak_bytes"] for n in (1, 2)]
    fits = [peak <= usable_memory(find_gpu("h100")) for peak in peaks]
    assert fits == [wanted == 1, True]


def test_rows_of_a_batch_leave_room_for_those_that_take_turns(monkeypatch):
    """A 70B on two GPUs of 80 GB, of which its weights leave 13 each."""
    card = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    config, gpu = load_config("llama3-70b"), torch.device("cuda", 0)
    stage = parallel.Stage.of(config, Pipe(Rank(0, 2, 0, gpu), 2), "bfloat16")
    stage._dtype = torch.bfloat16
    held = max(weight_bytes(*share) for share in shares(config, stage._setup))
    for prompt, new, least in ((600, 424, 8), (4000, 96, 2)):
        rows = default_batch_size(stage, prompt, new)
        kept = 2 * rows * (prompt + new) * 40 * 2 * config.n_kv_heads * config.head_dim * 2
        assert rows >= least and held + kept < 0.93 * card.total_memory, rows


READS = r"""
import re
from pathlib import Path
import checkpoint
from backends.parallel import in_groups, load
from config import load_config
def now(file, name):
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self", file).read_text())[1])
config = checkpoint.open({paths!r}[0]).config
dist = in_groups(dist, {n}, config, "float32")
for path in {paths!r}:
    ckpt = checkpoint.open(path, config)
    ckpt.config
    Path("/proc/self/clear_refs").write_text("5")  # the highest point begins anew
    before, held = now("io", "rchar"), now("status", "RssAnon")
    model = load(ckpt, "float32", dist)
    read = now("io", "rchar") - before
    peak = 1024 * (now("status", "VmHWM") - held - now("status", "RssFile"))
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    say("read", dist.rank, read, max(peak, 0), own, path)
    del model
"""
DCP = """
import torch.distributed.checkpoint as dcp, checkpoint
model = checkpoint.load_model({path!r}, "float32")
dcp.save({{"model": model.state_dict()}}, checkpoint_id={to!r})
"""


@pytest.mark.slow
def test_a_rank_reads_and_holds_its_own_part_alone(tmp_path):
    """Of safetensors in several files, of a .pt file, and of DCP: by the kernel's count of bytes
    read, and the highest memory of the process while it loads."""
    n, wide = 4, tiny("llama", n_layers=8, d_model=1024, n_heads=8, head_dim=128, d_ff=2048)
    torch.manual_seed(1)
    model = GPTModel(wide.replace(n_kv_heads=8, tie_embeddings=False)).eval()
    one = save_model(model, tmp_path / "one", 1, tokenizer=None)
    paths = [conversion.to_hf(checkpoint.open(one), tmp_path / "hf", None, 40 << 20)]
    paths += [tmp_path / "step-7.pt", tmp_path / "step-9"]
    torch.save({"model": model.state_dict()}, paths[1])
    run_ranks(1, tmp_path, DCP.format(path=str(one), to=str(paths[2])))
    assert len(list(paths[0].glob("*.safetensors"))) > n
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    out = run_ranks(n, tmp_path, READS.format(paths=[*map(str, paths)], n=n))
    lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("read")]
    assert len(lines) == n * len(paths)
    for line in lines:
        read, peak, own = map(int, line[1:4])
        assert own < 0.3 * whole, line
        passes = 1 if line[4].endswith("hf") else 2  # checksums come first, of what is read then
        assert own <= read < passes * own + (4 << 20), line
        assert peak < own + (64 << 20) < 0.6 * whole, line  # eight readers' staging at most

"""train.py in real processes: exact resume, also after kill -9, and what it optimises."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import save_model, saved_checkpoint, tiny_model, token_shard, torchrun
from doomed_train import after_step, doomed

import checkpoint
import results
import train
from config import GPTConfig
from dataset import build_tokenizer, open_stream
from distributed import Dist
from eval import evaluate_perplexity
from model import GPTModel
from training.batches import Chopped, TrainBatches
from training.options import DataOptions, parse

SHAPE = ["--n-layers", "2", "--n-heads", "2", "--d-model", "32", "--d-ff", "64", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    token_shard(root / "train.npy", 20_000)
    token_shard(root / "val.npy", 2000, seed=1)
    return root


def flags_of(shards, out, *more, shape=SHAPE):
    """Of a tiny run with validation on the CPU, a log line each step."""
    data = ["--data-mode", "fineweb_npy", "--tokenizer-name", "byte", "--seq-len", 32]
    data += ["--train-npy", shards / "train.npy", "--val-npy", shards / "val.npy"]
    rest = ["--device", "cpu", "--batch-size", 2, "--warmup-steps", 3, "--lr", "1e-2"]
    return [*shape, *data, *rest, "--log-steps", 1, "--checkpoint-path", out, *more]


def run(shards, out, *more, n=0, cold=False):
    return torchrun(n, "train.py", *flags_of(shards, out, *more), cold=cold).stdout


def state_of(path):
    """Everything a checkpoint holds, as bytes."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    state = torch.load(path / "trainer_state.pt", weights_only=True)
    flat = torch.utils._pytree.tree_flatten(state)[0]
    tensors = [t.numpy().tobytes() if isinstance(t, torch.Tensor) else t for t in flat]
    return files["model.safetensors"]["sha256"], tensors


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("tokens_per_second", "mfu")} for e in lines]


def run_doomed(tmp_path, shards, out, doom, *more, n=0):
    done = torchrun(n, doomed(tmp_path, doom), *flags_of(shards, out, *more), code=None)
    assert done.returncode == (1 if n else -signal.SIGKILL), done.stderr


@pytest.mark.parametrize("n", [0, 2])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(shards, tmp_path, n):
    """Dropout, accumulation, the schedule, the data order and the optimizer's state included."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--num-steps", 8, "--eval-steps", 4, "--grad-accum-steps", 2]
    run(shards, whole, *flags, n=n)
    run_doomed(tmp_path, shards, cut, after_step(6), *flags, n=n)
    assert [e["step"] for e in log_of(cut) if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in sorted(cut.glob("checkpoint-*"))] == ["checkpoint-4"]
    assert "step 4" in run(shards, cut, *flags, "--resume", n=n)  # two steps are done again
    for step in (4, 8):
        assert state_of(whole / f"checkpoint-{step}") == state_of(cut / f"checkpoint-{step}")
    assert log_of(whole) == log_of(cut)


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_inside_saves_too(shards, tmp_path, kills):
    """A save after every step, and kills at its file operations: those of listing, writing,
    renaming and removing checkpoints."""
    flags = ["--num-steps", 30, "--eval-steps", 1000, "--save-steps", 1, "--keep", 2]
    run(shards, tmp_path / "whole", *flags)
    dice = random.Random(kills)
    for _ in range(kills):
        doom = f"builders.die_at_file_operation({dice.randint(1, 60)})"
        run_doomed(tmp_path, shards, tmp_path / "cut", doom, *flags, "--resume")
    run(shards, tmp_path / "cut", *flags, "--resume")
    whole, cut = (state_of(tmp_path / d / "checkpoint-30") for d in ("whole", "cut"))
    assert whole == cut
    assert [e["step"] for e in log_of(tmp_path / "cut") if "loss" in e] == list(range(1, 31))


def test_steps_equal_a_plain_training_loop(shards, tmp_path):
    """Five steps of two accumulated batches against torch.optim.AdamW and autograd by hand."""
    flags = ["--num-steps", 5, "--eval-steps", 5, "--grad-accum-steps", 2, "--dropout", "0"]
    run(shards, tmp_path, *flags)
    model = tiny_model(seed=42, std=None, max_position_embeddings=32)
    stream = open_stream("fineweb_npy", [shards / "train.npy"], None)
    batches = TrainBatches([Chopped(stream, 32)], 4, 42)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    done = [np.cos(np.pi * k / 2) * 0.45 + 0.55 for k in (0, 1)]  # after 3 of 5 steps of warm-up
    for step, factor in enumerate([1 / 3, 2 / 3, 1.0, *done]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        inputs, targets = (torch.from_numpy(x) for x in batches.batch(step)[:2])
        logits, _ = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        entry = next(e for e in log_of(tmp_path) if e["step"] == step + 1)
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert entry["lr"] == pytest.approx(1e-2 * ([2 / 3, 1.0, *done, 0.1][step]), rel=1e-6)
    trained = checkpoint.load_model(tmp_path / "checkpoint-5", "float32")
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-3, atol=2e-5, msg=name)


def test_world_size_does_not_change_what_is_learned(shards, tmp_path):
    """The same windows a step on 1 and 2 ranks: equal but for rounding."""
    common = ["--num-steps", 4, "--eval-steps", 4, "--dropout", "0"]
    run(shards, tmp_path / "one", *common, "--batch-size", 4)
    run(shards, tmp_path / "two", *common, n=2, cold=True)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_a_mixture_of_experts_on_two_ranks_learns_what_transformers_does(shards, tmp_path):
    """Losses of three steps of all windows at once, the routers' with them: the share of tokens
    that chose an expert is that of both ranks."""
    import transformers

    config = GPTConfig(
        vocab_size=257, max_position_embeddings=32, n_layers=2, n_heads=2, d_model=32, d_ff=48,
        dropout=0.0, activation="silu", norm="rmsnorm", position="rope", gated_mlp=True, bias=False,
        n_experts=4, n_experts_per_token=2, router_norm=True,
    )  # fmt: skip
    (tmp_path / "moe.yaml").write_text(json.dumps(config.to_dict()))
    more = ["--config", tmp_path / "moe.yaml", "--router-loss", "0.3", "--num-steps", 3]
    torchrun(2, "train.py", *flags_of(shards, tmp_path / "run", *more, shape=[]))
    config = config.replace(router_loss=0.3)
    torch.manual_seed(42)
    checkpoint.write_weights(GPTModel(config), config, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").train()
    stream = open_stream("fineweb_npy", [shards / "train.npy"], None)
    batches = TrainBatches([Chopped(stream, 32)], 4, 42)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    log = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    for step, entry in enumerate(log):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 3
        inputs, targets = (torch.from_numpy(x) for x in batches.batch(step)[:2])
        out = model(inputs, output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + 0.3 * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert entry["router_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert len(log) == 3


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """new.npy and old.npy: documents of 0 to 60 bytes, each with its end of text; val.npy."""
    root = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("new", "old", "val")):
        dice = np.random.RandomState(seed)
        documents = [[*dice.randint(0, 256, dice.randint(61)), 256] for _ in range(150)]
        np.save(root / f"{name}.npy", np.concatenate(documents).astype(np.uint16))
    return root


def mixed_flags(root, out, *more):
    flags = ["--mix", f"{root}/new.npy:0.75", f"{root}/old.npy:0.25", "--packing", "best-fit"]
    flags += ["--document-mask", "--data-mode", "fineweb_npy", "--tokenizer-name", "byte"]
    flags += ["--val-npy", root / "val.npy", "--seq-len", 32, "--device", "cpu", "--lr", "1e-2"]
    flags += ["--warmup-steps", 3, "--log-steps", 1, "--num-steps", 6, "--eval-steps", 3]
    return [*SHAPE, *flags, "--dropout", "0", "--checkpoint-path", out, *more]


def test_packed_and_mixed_steps_equal_documents_run_one_by_one(two_sources, tmp_path):
    """A plain loop that finds the documents of each batch, and shows the model one at a time."""
    flags = mixed_flags(two_sources, tmp_path / "one", "--batch-size", 4)
    out = torchrun(0, "train.py", *flags).stdout
    assert "best-fit packing: 150 documents" in out and "new.npy:0.75: 75.0000%" in out
    log = log_of(tmp_path / "one")
    assert [entry["packing"] for entry in log[:2]] == ["best-fit"] * 2 and log[0]["padding"] > 0
    byte, data = build_tokenizer("byte"), parse([str(word) for word in flags], "")
    batches, _ = train.make_batches(
        data, train.open_data(data.data, byte, 32), byte, Dist(0, 1, 0, torch.device("cpu"))
    )
    model = tiny_model(seed=42, std=None, max_position_embeddings=32)
    for step, entry in enumerate(e for e in log if "loss" in e):
        inputs, targets, starts = (torch.from_numpy(x) for x in batches.batch(step))
        loss, count = 0.0, int((targets != -100).sum())
        for row, begins in enumerate(starts):
            for begin in begins.unique().tolist():
                mine = begins == begin
                logits = model(inputs[row, mine][None])[0][0]
                loss = loss + F.cross_entropy(logits, targets[row, mine], reduction="sum")
        assert entry["loss"] == pytest.approx(loss.item() / count, rel=1e-5)
        model.zero_grad()
        (loss / targets.numel()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        if step == 0:  # later ones want the optimizer, which other tests have
            break
    saved = checkpoint.load_model(tmp_path / "one/checkpoint-6", "float32")
    (entry,) = [e for e in log if "val_loss" in e and e["step"] == 6]
    shard = (str(two_sources / "val.npy"),)
    record = evaluate_perplexity(
        saved, byte, data_mode="fineweb_npy", val_npy=shard, seq_len=32, documents=True
    )
    assert record["metrics"]["loss"]["value"] == pytest.approx(entry["val_loss"], rel=1e-6)
    state = checkpoint.load_training_state(tmp_path / "one/checkpoint-6")
    padding = sum(int((batches.batch(step)[1] == -100).sum()) for step in range(6))
    assert 0 < 6 * 4 * 32 - state["extra"]["tokens"] < padding


def test_packed_and_mixed_runs_resume_and_split_over_ranks(two_sources, tmp_path):
    whole, cut, two = (tmp_path / name for name in ("whole", "cut", "two"))
    torchrun(0, "train.py", *mixed_flags(two_sources, whole, "--batch-size", 4))
    script = doomed(tmp_path, after_step(5))
    flags = mixed_flags(two_sources, cut, "--batch-size", 4)
    assert torchrun(0, script, *flags, code=None).returncode == -signal.SIGKILL
    torchrun(0, "train.py", *flags, "--resume")
    for step in (3, 6):
        assert state_of(whole / f"checkpoint-{step}") == state_of(cut / f"checkpoint-{step}")
    assert log_of(whole) == log_of(cut)
    torchrun(2, "train.py", *mixed_flags(two_sources, two, "--batch-size", 2))
    for one, other in zip(log_of(whole), log_of(two), strict=True):
        assert other.pop("packing", None) == one.pop("packing", None)
        assert other == pytest.approx(one, rel=1e-3)


def test_the_validation_loss_is_what_eval_py_gives(shards, tmp_path):
    run(shards, tmp_path / "run", "--num-steps", 3, "--eval-steps", 3)
    flags = ["--checkpoint-path", tmp_path / "run", "--data-mode", "fineweb_npy", "--val-npy"]
    flags += [shards / "val.npy", "--seq-len", 32, "--batch-size", 2, "--device", "cpu"]
    torchrun(0, "eval.py", *flags, "--results-dir", tmp_path / "results")
    (path,) = tmp_path.glob("results/*/*/*.json")
    record = json.loads(path.read_text())
    (entry,) = [e for e in log_of(tmp_path / "run") if "val_loss" in e]
    assert record["metrics"]["loss"]["value"] == pytest.approx(entry["val_loss"], rel=1e-7)
    assert record["checkpoint"]["tokens"] == 3 * 2 * 32
    assert record["protocol"]["tokenizer"] == "byte"


def test_init_from_takes_weights_alone(shards, tmp_path):
    run(shards, tmp_path / "first", "--num-steps", 2, "--eval-steps", 2)
    more = ["--num-steps", 1, "--lr", "0", "--init-from", tmp_path / "first/checkpoint-2"]
    # the shape comes from the checkpoint
    torchrun(0, "train.py", *flags_of(shards, tmp_path / "second", *more, shape=[]))
    first = checkpoint.load_model(tmp_path / "first/checkpoint-2", "float32")
    second = checkpoint.load_model(tmp_path / "second/checkpoint-1", "float32")
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert checkpoint.load_training_state(tmp_path / "second/checkpoint-1")["step"] == 1


def test_errors_are_plain(shards, tmp_path):
    def error(*more):
        done = torchrun(0, "train.py", *flags_of(shards, tmp_path, *more), code=2)
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "max_position_embeddings 16" in error("--max-position-embeddings", 16)
    assert "vocabulary" in error("--vocab-size", 100)
    assert "no loss scaling for float16" in error("--dtype", "fp16")
    run(shards, tmp_path, "--num-steps", 1)
    assert "--resume goes on from checkpoint-1" in error("--num-steps", 2)
    flags = flags_of(shards, tmp_path, "--num-steps", 1, "--resume")
    done = "note: step 1 is there: nothing is left of --num-steps 1\n"
    assert torchrun(0, "train.py", *flags).stderr == done


def test_toy_data_and_held_out_tail(tmp_path):
    options = parse(["--use-toy-data", "--checkpoint-path", str(tmp_path)], "")
    tokenizer = train.choose_tokenizer(options)
    data = train.open_data(options.data, tokenizer, 64)
    (head,), tail = data.streams, data.validation[0]
    text = b"".join(path.read_bytes() + b"\xff" for path in results.source_files())
    assert len(head) + len(tail) == len(text)
    assert len(tail) == pytest.approx(0.1 * len(text), abs=1)
    joined = [*head.read(0, len(head)), *tail.read(0, len(tail))]
    wanted = [b if b != 255 else tokenizer.eos_token_id for b in text]
    assert joined == wanted
    assert tokenizer.name == build_tokenizer("byte").name


def test_data_of_the_other_mode_is_no_data(shards):
    byte, files = build_tokenizer("byte"), (str(shards / "train.npy"),)
    with pytest.raises(ValueError, match="--data-mode text needs --train-data"):
        train.open_data(DataOptions(), byte, 64)
    data = DataOptions(data_mode="fineweb_npy", train_npy=files)
    data = train.open_data(data, byte, 64)
    assert len(data.streams[0]) == 20_000 and data.validation is None


def test_which_tokenizer(tmp_path, monkeypatch):
    """The one named, else that of the weights it starts from, else GPT-2's for its vocabulary."""
    saved = saved_checkpoint(tmp_path / "run", 1)
    bare = save_model(tiny_model(vocab_size=300), tmp_path / "bare", 1, tokenizer=None)
    monkeypatch.setattr(train, "build_tokenizer", lambda name: f"built {name}")

    def chosen(*words):
        return train.choose_tokenizer(parse(["--checkpoint-path", "out", *words], ""))

    assert chosen("--tokenizer-name", "byte", "--init-from", str(bare)) == "built byte"
    assert chosen("--init-from", str(saved)).name == "byte"  # GPT-2's would mean other tokens
    for words in ([], ["--config", "gpt2"], ["--vocab-size", "50304"]):
        assert chosen(*words) == "built gpt2"
    for words, size in (
        (["--init-from", str(bare)], "300"),
        (["--config", "nano"], "257"),
        (["--config", "llama3-8b"], "128,256"),
        (["--config", "gpt2", "--vocab-size", "65536"], "65,536"),
    ):
        with pytest.raises(ValueError, match=f"vocabulary of {size} is not GPT-2's: name the"):
            chosen(*words)


def test_where_no_checkpoint_can_be_saved_nothing_is_trained(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train, "build_model", lambda *args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"/file/run: .*/file is no directory"):
        train.main([str(word) for word in flags_of(shards, tmp_path / "file/run")])


def test_a_folder_whose_name_is_no_text(shards, tmp_path):
    """Bytes of another encoding: it is trained there."""
    folder = tmp_path / os.fsdecode(b"l\xf6c")
    train.main([str(word) for word in flags_of(shards, folder, "--num-steps", 1)])
    assert (folder / "checkpoint-1/model.safetensors").is_file() and log_of(folder)


def test_features_train_and_open_in_transformers(shards, tmp_path):
    """A small Gemma 2 from a YAML of its features, windows and soft caps included."""
    transformers = pytest.importorskip("transformers")
    features = ["post_norm", "norm_offset", "gated_mlp"]
    lines = ["vocab_size: 257", "max_position_embeddings: 64", "norm: rmsnorm", "position: rope"]
    lines += [*(f"{name}: true" for name in features), "bias: false", "activation: gelu_new"]
    lines += ["attention_softcap: 20", "logit_softcap: 10", "sliding_window: 8"]
    lines += ["full_attention_layers: [1]", f"embedding_scale: {32**0.5}"]
    (tmp_path / "small.yaml").write_text("\n".join(lines) + "\n")
    shape = ["--config", tmp_path / "small.yaml", *SHAPE]
    flags = flags_of(shards, tmp_path / "a", "--num-steps", 6, shape=shape)
    torchrun(0, "train.py", *flags)
    saved = tmp_path / "a/checkpoint-6"
    losses = [line["loss"] for line in log_of(tmp_path / "a") if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert theirs.config.model_type == "gemma2"
    with torch.no_grad():
        ours = checkpoint.load_model(saved, "float32")(ids)[0]
        assert (ours - theirs.eval()(ids).logits).abs().max() < 1e-5

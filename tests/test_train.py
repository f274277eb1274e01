"""train.py in real processes: exact resume, also after kill -9, and what it optimises."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import results
import train
from config import GPTConfig
from dataset import build_tokenizer, open_stream
from model import GPTModel
from training.batches import TrainBatches

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ["--n-layers", "2", "--n-heads", "2", "--d-model", "32", "--d-ff", "64", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Bytes of real text, with an end-of-text before each document."""
    root = tmp_path_factory.mktemp("shard")
    ids = [i for name in ("config.py", "cli.py") for i in [256, *(ROOT / name).read_bytes()]]
    np.save(root / "train.npy", np.array(ids, dtype=np.uint16))
    np.save(root / "val.npy", np.array(ids[:2000], dtype=np.uint16))
    return root


def command(shard, out, *flags, n=0):
    launcher = [sys.executable]
    if n:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return [
        *launcher, str(ROOT / "train.py"), *SHAPE, "--device", "cpu", "--tokenizer-name", "byte",
        "--data-mode", "fineweb_npy", "--train-npy", str(shard / "train.npy"),
        "--val-npy", str(shard / "val.npy"), "--seq-len", "32", "--batch-size", "2",
        "--warmup-steps", "3", "--lr", "1e-2", "--log-steps", "1", "--checkpoint-path", str(out),
        *map(str, flags),
    ]  # fmt: skip


def run(shard, out, *flags, n=0):
    done = subprocess.run(
        command(shard, out, *flags, n=n), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.parametrize("n", [0, 2])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(shard, tmp_path, n):
    """Dropout, accumulation, the schedule, the data order and the optimizer's state included."""
    flags = ["--num-steps", 8, "--eval-steps", 4, "--grad-accum-steps", 2]
    run(shard, tmp_path / "whole", *flags, n=n)
    process = subprocess.Popen(
        command(shard, tmp_path / "cut", *flags, "--resume", n=n),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 6/"):  # two steps after the checkpoint, which are done again
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "cut/checkpoint-8").exists()
    out = run(shard, tmp_path / "cut", *flags, "--resume", n=n)
    assert "resuming from" in out
    for step in (4, 8):
        whole, cut = (state_of(tmp_path / d / f"checkpoint-{step}") for d in ("whole", "cut"))
        assert whole == cut
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_inside_saves_too(shard, tmp_path, kills):
    """A save after every step: many of the kills land in one."""
    flags = ["--num-steps", 30, "--eval-steps", 1000, "--save-steps", 1, "--keep", 2]
    run(shard, tmp_path / "whole", *flags)
    dice = random.Random(kills)
    killed = 0
    for _ in range(20 * kills):
        process = subprocess.Popen(
            command(shard, tmp_path / "cut", *flags, "--resume"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        process.stdout.readline()  # training has begun
        time.sleep(dice.uniform(0, 0.3))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.wait()
        process.stdout.close()
        if killed == kills:
            break
    run(shard, tmp_path / "cut", *flags, "--resume")
    whole, cut = (state_of(tmp_path / d / "checkpoint-30") for d in ("whole", "cut"))
    assert whole == cut
    assert [e["step"] for e in log_of(tmp_path / "cut") if "loss" in e] == list(range(1, 31))


def test_steps_equal_a_plain_training_loop(shard, tmp_path):
    """Five steps of two accumulated batches against torch.optim.AdamW and autograd by hand."""
    flags = ["--num-steps", 5, "--eval-steps", 5, "--grad-accum-steps", 2, "--dropout", "0"]
    run(shard, tmp_path, *flags)
    torch.manual_seed(42)
    config = GPTConfig(257, 32, 2, 2, 32, 64, dropout=0.0)
    model = GPTModel(config)
    stream = open_stream("fineweb_npy", [shard / "train.npy"], None)
    batches = TrainBatches(len(stream), 32, 4, 42)
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
        inputs, targets = (torch.from_numpy(x) for x in batches.batch(stream, step))
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


def test_world_size_does_not_change_what_is_learned(shard, tmp_path):
    """The same windows a step on 1 and 2 ranks: equal but for rounding."""
    common = ["--num-steps", 4, "--eval-steps", 4, "--dropout", "0"]
    run(shard, tmp_path / "one", *common, "--batch-size", 4)
    run(shard, tmp_path / "two", *common, n=2)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_the_validation_loss_is_what_eval_py_gives(shard, tmp_path):
    run(shard, tmp_path / "run", "--num-steps", 3, "--eval-steps", 3)
    flags = ["--checkpoint-path", tmp_path / "run", "--data-mode", "fineweb_npy", "--val-npy"]
    flags += [shard / "val.npy", "--seq-len", 32, "--batch-size", 2, "--device", "cpu"]
    flags += ["--results-dir", tmp_path / "results"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *map(str, flags)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/*/*/*.json")
    record = json.loads(path.read_text())
    (entry,) = [e for e in log_of(tmp_path / "run") if "val_loss" in e]
    assert record["metrics"]["loss"]["value"] == pytest.approx(entry["val_loss"], rel=1e-7)
    assert record["checkpoint"]["tokens"] == 3 * 2 * 32
    assert record["protocol"]["tokenizer"] == "byte"


def test_init_from_takes_weights_alone(shard, tmp_path):
    run(shard, tmp_path / "first", "--num-steps", 2, "--eval-steps", 2)
    command_line = command(shard, tmp_path / "second", "--num-steps", 1, "--lr", "0")
    start = command_line.index("--n-layers")
    del command_line[start : start + len(SHAPE)]  # the shape comes from the checkpoint
    command_line += ["--init-from", str(tmp_path / "first/checkpoint-2")]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first = checkpoint.load_model(tmp_path / "first/checkpoint-2", "float32")
    second = checkpoint.load_model(tmp_path / "second/checkpoint-1", "float32")
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert checkpoint.load_training_state(tmp_path / "second/checkpoint-1")["step"] == 1


def test_yaml_sets_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num_steps: 7\nlr: 0.5\nbatch_size: 3\n")
    flags = ["--checkpoint-path", "x", "--train-config", str(path), "--lr", "0.25"]
    args = train.parse(flags)
    assert (args.num_steps, args.lr, args.batch_size) == (7, 0.25, 3)
    path.write_text("num_stepz: 7\n")
    with pytest.raises(ValueError, match="num_stepz"):
        train.parse(flags)


def test_errors_are_plain(shard, tmp_path):
    def error(*flags):
        done = subprocess.run(command(shard, tmp_path, *flags), capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "max_position_embeddings 16" in error("--max-position-embeddings", 16)
    assert "vocabulary" in error("--vocab-size", 100)
    run(shard, tmp_path, "--num-steps", 1)
    assert "--resume goes on from checkpoint-1" in error("--num-steps", 2)


def test_toy_data_and_held_out_tail(tmp_path):
    args = train.parse(["--use-toy-data", "--checkpoint-path", str(tmp_path)])
    tokenizer, head, tail = train.open_data(args)
    text = b"".join(path.read_bytes() + b"\xff" for path in results.source_files())
    assert len(head) + len(tail) == len(text)
    assert len(tail) == pytest.approx(0.1 * len(text), abs=1)
    joined = [*head.read(0, len(head)), *tail.read(0, len(tail))]
    wanted = [b if b != 255 else tokenizer.eos_token_id for b in text]
    assert joined == wanted
    assert tokenizer.name == build_tokenizer("byte").name


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(99, 16, 3, 2, 32, 64, dropout=0.0))
    ids = torch.randint(99, (2, 16))
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(ids, labels=ids)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)

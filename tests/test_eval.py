"""eval.py as users start it, against brute force with transformers' own model."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import command
from transformers import AutoModelForCausalLM

import checkpoint
import distributed
import eval as eval_script
from backends import scoring
from config import GPTConfig
from dataset import (
    FineWebNPYDataset,
    Windows,
    build_tokenizer,
    compute_perplexity,
    open_stream,
)
from model import GPTModel

ROOT = Path(__file__).resolve().parent.parent
T = 32
CONFIG = GPTConfig(vocab_size=257, max_position_embeddings=64, n_layers=2, n_heads=2, d_model=32,
                   d_ff=64, dropout=0.0)  # fmt: skip
TEXTS = {
    "a.txt": "def f(x):\n    return x + 1\n" * 9,
    "b.txt": "naïve café — 数据 🙂\n" * 7,
    "c.txt": "z",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """checkpoints/{checkpoint-10,checkpoint-20}, text/{a,b,c}.txt and shards/x.npy"""
    root = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        torch.manual_seed(step)
        model = GPTModel(CONFIG)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.3)
        byte = build_tokenizer("byte")
        checkpoint.save_checkpoint(
            model, None, None, 0, step, 5.0, root / "checkpoints", tokenizer=byte
        )
    (root / "text").mkdir()
    for name, text in TEXTS.items():
        (root / "text" / name).write_text(text)
    ids = np.random.RandomState(0).randint(0, 256, 1003).astype(np.uint16)
    ids[[0, 200, 777]] = 256
    np.save(root / "x.npy", ids)
    return root


def evaluate(run_dir, *flags, n=0, name="run", path="checkpoint-10", text=True):
    """Run eval.py (n: ranks under torchrun, 0: plain) and return its records and arrays."""
    launcher = [sys.executable]
    if n:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [
        *launcher,
        str(ROOT / "eval.py"),
        "--checkpoint-path",
        str(run_dir / "checkpoints" / path),
    ]
    if text:
        command += ["--val-data", *(str(run_dir / "text" / name) for name in TEXTS)]
    else:
        command += ["--data-mode", "fineweb_npy", "--val-npy", str(run_dir / "x.npy")]
    command += ["--seq-len", str(T), "--batch-size", "4", "--device", "cpu"]
    command += ["--results-dir", str(run_dir / "results"), "--run-name", name, *flags]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    paths = [x.removeprefix("record: ") for x in out.stdout.splitlines() if x.startswith("record")]
    return out.stdout, [
        (json.loads(Path(p).read_text()), dict(np.load(Path(p).with_suffix(".npz")))) for p in paths
    ]


def brute_force(run_dir, ids, stride=T, bos=None, step=10):
    """Nats of every target of `ids`, one at a time, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(run_dir / f"checkpoints/checkpoint-{step}")
    model = model.float().eval()
    ids = ([bos] if bos is not None else []) + list(ids)
    nats, scored, start = {}, 0, 0
    while scored < len(ids) - 1:
        window = torch.tensor([ids[start : start + T]])
        with torch.no_grad():
            logits = model(window).logits[0].double()
        for j in range(window.shape[1]):
            target = start + j + 1
            if target < len(ids) and target > scored:
                nats[target] = -F.log_softmax(logits[j], -1)[ids[target]].item()
        scored = max(scored, min(start + T, len(ids) - 1))
        start += stride
    return [nats[t] for t in range(1, len(ids))]


def stream_ids():
    """What text mode makes of TEXTS: bytes, end-of-text after each file."""
    return [i for text in TEXTS.values() for i in [*text.encode(), 256]]


@pytest.mark.parametrize("stride, bos", [(T, False), (T, True), (7, False), (1, True)])
def test_loss_equals_brute_force(run_dir, stride, bos):
    flags = ["--stride", str(stride)] + (["--bos"] if bos else [])
    _, [(record, _)] = evaluate(run_dir, *flags)
    nats = brute_force(run_dir, stream_ids(), stride, 256 if bos else None)
    n = len(stream_ids()) - 1 + bos
    assert record["data"]["tokens_scored"] == len(nats) == n
    loss = math.fsum(nats) / n
    assert record["metrics"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
    assert record["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_per_file_figures_and_bits_per_byte(run_dir):
    """Windows of 32 straddle the files; the last file has one byte and its end-of-text."""
    stdout, [(record, _)] = evaluate(run_dir)
    ids, nats = stream_ids(), brute_force(run_dir, stream_ids())
    end, plain_nats = 0, 0.0
    for name, text in TEXTS.items():
        start, end = end, end + len(text.encode()) + 1
        targets = range(max(start, 1), end)
        part = record["breakdown"]["file"][str(run_dir / "text" / name)]
        wanted = math.fsum(nats[t - 1] for t in targets) / len(targets)
        assert part["loss"] == pytest.approx(wanted, rel=1e-6)
        assert part["tokens"] == len(targets)
        plain_nats += math.fsum(nats[t - 1] for t in targets if ids[t] != 256)
        assert f"{name}  loss {wanted:.4f}"[:-2] in stdout.replace("  ppl", "")
    n_bytes = (
        sum(len(text.encode()) for text in TEXTS.values()) - 1
    )  # the first byte has no context
    assert record["data"]["bytes"] == n_bytes
    assert record["data"]["special_tokens_scored"] == len(TEXTS)
    bits = plain_nats / math.log(2) / n_bytes
    assert record["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)


def test_standard_error_by_jackknife(run_dir):
    """The delta method's cluster error against leaving out one window at a time."""
    _, [(record, arrays)] = evaluate(run_dir, text=False)
    nll, count = arrays["nll"], arrays["count"]
    W = len(nll)
    left_out = [(nll.sum() - nll[i]) / (count.sum() - count[i]) for i in range(W)]
    jackknife = math.sqrt((W - 1) / W * np.sum((left_out - np.mean(left_out)) ** 2))
    assert record["metrics"]["loss"]["stderr"] == pytest.approx(jackknife, rel=0.05)


def test_any_number_of_ranks_gives_the_same_bits(run_dir):
    """32 windows in 8 batches over 3 ranks; two checkpoints; a plain directory of them."""
    runs = {n: evaluate(run_dir, n=n, name=f"n{n}", path="", text=False)[1] for n in (1, 2, 3)}
    assert [record["checkpoint"]["step"] for record, _ in runs[1]] == [10, 20]
    for n in (2, 3):
        for (one, arrays_one), (many, arrays_many) in zip(runs[1], runs[n], strict=True):
            assert many["cost"]["world_size"] == n
            assert one["metrics"] == many["metrics"]
            assert one["data"] == many["data"]
            assert one["resume_key"] == many["resume_key"]
            for key, value in arrays_one.items():
                assert value.tobytes() == arrays_many[key].tobytes(), key
    ids = np.load(run_dir / "x.npy").tolist()
    for record, arrays in runs[1]:
        nats = brute_force(run_dir, ids, step=record["checkpoint"]["step"])
        assert arrays["nll"].sum() == pytest.approx(math.fsum(nats), rel=1e-6)
        assert arrays["count"].sum() == len(ids) - 1


def test_random_windows_are_rosetrainers_arithmetic(run_dir):
    """Its loop: sampled windows, labels shifted inside, each batch's mean weighted by numel."""
    _, [(record, _)] = evaluate(run_dir, "--windows", "random", "--seed", "7", text=False)
    ids = np.load(run_dir / "x.npy").astype(np.int64)
    starts = random.Random(7).sample(range(len(ids) - T + 1), len(ids) // T)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints/checkpoint-10").eval()
    total, weight = 0.0, 0
    with torch.no_grad():
        for b in range(0, len(starts), 4):
            labels = torch.tensor(np.stack([ids[s : s + T] for s in starts[b : b + 4]]))
            logits = model(labels).logits[:, :-1].flatten(0, 1)
            mean = F.cross_entropy(logits, labels[:, 1:].flatten()).item()
            total, weight = total + mean * labels.numel(), weight + labels.numel()
    assert record["metrics"]["loss"]["value"] == pytest.approx(total / weight, rel=1e-6)
    assert record["data"]["tokens_scored"] == len(starts) * (T - 1)


def test_compute_perplexity_takes_rosetrainers_dataloader(run_dir):
    model = checkpoint.load_model(run_dir / "checkpoints/checkpoint-10", "float32")
    dataset = FineWebNPYDataset([run_dir / "x.npy"], T, seed=7)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    got = compute_perplexity(model, loader, "cpu")
    _, [(record, _)] = evaluate(run_dir, "--windows", "random", "--seed", "7", text=False)
    assert got["avg_loss"] == pytest.approx(record["metrics"]["loss"]["value"], rel=1e-6)
    assert got["tokens"] == record["data"]["tokens_scored"]


def test_memory_running_out_is_agreed_and_halves_the_batch(run_dir):
    """Rank 1 of 2 has no memory for more than 2 windows: both go on with 2, with the same sums."""
    script = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, cli, distributed
from backends import scoring
from dataset import Windows, open_stream
def main():
    with distributed.setup("cpu") as dist:
        model = checkpoint.load_model({str(run_dir / "checkpoints/checkpoint-10")!r}, "float32")
        stream = open_stream("fineweb_npy", [{str(run_dir / "x.npy")!r}], None)
        real = scoring.nll_function(model, False)
        def nll_fn(ids, targets):
            if dist.rank == 1 and len(ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(ids, targets)
        zeros = torch.zeros(257, dtype=torch.int64)
        def score(b):
            return scoring.score_windows(
                nll_fn, stream, Windows(len(stream), {T}), b, dist, zeros, zeros.bool())
        totals, b = scoring.halve_until_it_fits(score, 8)
        sys.stdout.write(f"{{b}} {{totals.loss.hex()}}\\n")  # one write: ranks share the pipe
cli.run(main)
"""
    path = run_dir / "oom.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines() if "0x" in line]
    ids = np.load(run_dir / "x.npy").tolist()
    wanted = math.fsum(brute_force(run_dir, ids)) / (len(ids) - 1)
    for b, loss in lines:
        assert b == "2"
        assert float.fromhex(loss) == pytest.approx(wanted, rel=1e-6)
    assert len(lines) == 2


def error_of(*flags) -> str:
    """The single line that eval.py leaves with exit code 2."""
    command = [sys.executable, str(ROOT / "eval.py"), "--device", "cpu", *map(str, flags)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 2, (out.returncode, out.stderr)
    lines = out.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), out.stderr
    return lines[0]


def test_bad_input_is_one_line_and_nothing_is_written(run_dir, tmp_path):
    model = run_dir / "checkpoints/checkpoint-10"
    text = run_dir / "text/a.txt"
    common = ["--results-dir", tmp_path / "results", "--checkpoint-path"]
    assert "nowhere" in error_of(*common, tmp_path / "nowhere", "--val-data", text)
    assert "gone.txt" in error_of(*common, model, "--val-data", tmp_path / "gone.txt")
    assert "--val-npy" in error_of(*common, model, "--data-mode", "fineweb_npy")
    assert "contradict" in error_of(*common, model, "--val-data", text, "--bf16", "--no-amp")
    too_long = error_of(*common, model, "--val-data", text, "--seq-len", 65)
    assert "65" in too_long and "64 positions" in too_long
    np.save(tmp_path / "big.npy", np.array([1, 2, 300, 4], dtype=np.uint16))
    flags = ["--data-mode", "fineweb_npy", "--val-npy", tmp_path / "big.npy"]
    vocabulary = error_of(*common, model, *flags)
    assert "big.npy" in vocabulary and "300" in vocabulary and "257" in vocabulary
    (tmp_path / "one.txt").write_text("")
    assert "one.txt" in error_of(*common, model, "--val-data", tmp_path / "one.txt")
    assert not (tmp_path / "results").exists()


def test_a_model_that_computes_nan_gets_no_score(run_dir, tmp_path):
    """Finite weights whose product is not: large enough to overflow float32."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)
        model.lm_head.weight.mul_(1e4)
    path = checkpoint.save_checkpoint(model, None, None, 0, 1, 5.0, tmp_path)
    flags = ["--checkpoint-path", path, "--val-data", run_dir / "text/a.txt", "--seq-len", "32"]
    line = error_of(*flags, "--tokenizer-name", "byte", "--results-dir", tmp_path / "results")
    assert "NaN" in line and "window" in line
    assert not (tmp_path / "results").exists()


# eval.py, every rank of which says that it scores and then goes on for ever
ENDLESS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import cli, distributed, eval
bump = distributed.Dist.bump
def endless(dist):
    os.write(1, f"pid {{os.getpid()}}\\n".encode())  # one write: the ranks share the pipe
    while True:
        bump(dist)
        time.sleep(0.05)
distributed.Dist.bump = endless
cli.run(eval.main)
"""


def test_sigterm_leaves_no_partial_result_and_no_process(run_dir, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    flags = ["--data-mode", "fineweb_npy", "--val-npy", run_dir / "x.npy", "--seq-len", T]
    flags += ["--checkpoint-path", run_dir / "checkpoints/checkpoint-10", "--device", "cpu"]
    words = command(2, tmp_path / "endless.py", *flags, "--results-dir", tmp_path / "results")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = []
    while len(pids) < 2 and (line := process.stdout.readline()):
        pids += [int(line.split()[1])] if line.startswith("pid ") else []
    process.send_signal(signal.SIGTERM)
    try:
        _, said = process.communicate(timeout=600)
    finally:
        for pid in [process.pid, *pids] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0 and len(pids) == 2, said
    assert not (tmp_path / "results").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_layout_of_windows_over_many_files():
    """Slots by brute force: 5 files of odd sizes, windows of 8, sliding by 3."""

    class Stream:
        file_starts = np.array([0, 1, 12, 13, 14, 40])

        def __len__(self):
            return 40

        def rows(self, starts, length):
            positions = starts[:, None] + np.arange(length)
            return np.where(positions < 40, positions % 7, 0)

    windows = Windows(40, 8, stride=3)
    special = np.zeros(7, dtype=bool)
    special[5] = True
    n_bytes = np.arange(7)
    dist = distributed.Dist(0, 1, 0, torch.device("cpu"))
    totals = scoring.score_windows(
        lambda ids, targets: targets.clamp(min=0).float() + 1,
        Stream(),
        windows,
        4,
        dist,
        n_bytes,
        special,
    )
    assert totals.tokens.sum() == 39
    for f, (start, end) in enumerate(zip(Stream.file_starts, Stream.file_starts[1:])):
        for is_special in (False, True):
            wanted = [p % 7 for p in range(max(start, 1), end) if (p % 7 == 5) == is_special]
            mine = (totals.file == f) & (totals.special == is_special)
            assert totals.nll[mine].sum() == sum(v + 1 for v in wanted)
            assert totals.tokens[mine].sum() == len(wanted)
            assert totals.bytes[mine].sum() == sum(wanted)


def test_chunked_nll_equals_cross_entropy(monkeypatch):
    """Any chunk size, a vocabulary of odd size, ignored targets."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG).eval()
    hidden, targets = torch.randn(37, 32), torch.randint(257, (37,))
    targets[[0, 9, 36]] = -100
    wanted = F.cross_entropy(
        hidden @ model.lm_head.weight.T, targets, reduction="none", ignore_index=-100
    )
    for chunk in (1, 8, 37, 8192):
        monkeypatch.setattr(scoring, "CHUNK_TOKENS", chunk)
        with torch.no_grad():
            got = scoring.token_nll(model, hidden, targets)
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-5)


def test_compiled_scoring_equals_eager(run_dir):
    """Sixteen layers share one compilation, and its numbers are eager's."""
    torch.manual_seed(0)
    model = GPTModel(CONFIG.replace(n_layers=16)).for_inference(torch.float32)
    ids = torch.randint(257, (2, T))
    with torch.no_grad():
        eager = scoring.nll_function(model, False)(ids, ids)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = scoring.nll_function(model, True)(ids, ids)
        again = scoring.nll_function(model, False)(ids, ids)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(again, eager)  # what was compiled for one call is not for the next


def test_eager_is_chosen_for_small_jobs_and_on_cpu():
    from config import load_config

    cuda, gpt2 = torch.device("cuda"), load_config("gpt2")
    assert not scoring.should_compile("auto", cuda, gpt2, 1_000_000)
    assert scoring.should_compile("auto", cuda, gpt2, 100_000_000)
    assert not scoring.should_compile("auto", torch.device("cpu"), gpt2, 10**12)
    assert not scoring.should_compile("off", cuda, gpt2, 10**12)
    assert scoring.should_compile("on", torch.device("cpu"), gpt2, 1)


def test_default_tokenizer_and_window(run_dir, tmp_path):
    """The checkpoint's own tokenizer, and a window no longer than its context."""
    out, [(record, _)] = evaluate(run_dir, "--max-tokens", "100")
    assert record["protocol"]["tokenizer"] == "byte"
    assert record["data"]["tokens"] == 100
    assert "avg_loss: " in out and "ppl: " in out
    args = eval_script.parse(["--checkpoint-path", "x", "--val-data", "y"])
    model = GPTModel(CONFIG)
    assert eval_script.pick_window(args.seq_len, model) == 64
    stream = open_stream("text", [run_dir / "text/a.txt"], build_tokenizer("byte"))
    assert len(Windows(len(stream), 64)) == 4

"""eval.py as users start it, against brute force with transformers' own model."""

import itertools
import json
import math
import random
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import (
    PATIENCE,
    PlainModel,
    command,
    descendants,
    error_of,
    is_there,
    save_model,
    saved_checkpoint,
    started,
    tiny_model,
    token_shard,
    torchrun,
    wait_for,
)
from transformers import AutoModelForCausalLM

import checkpoint
import eval as eval_script
from backends.local import facts_in_memory
from dataset import FineWebNPYDataset, build_tokenizer, compute_perplexity
from eval import Options, evaluate_perplexity

T, CONTEXT = 32, 64
TEXTS = {
    "a.txt": "def f(x):\n    return x + 1\n" * 9,
    "b.txt": "naïve café — 数据 🙂\n" * 7,
    "c.txt": "z",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """checkpoints/{checkpoint-10,checkpoint-20}, text/{a,b,c}.txt and x.npy"""
    root = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        saved_checkpoint(root / "checkpoints", step, max_position_embeddings=CONTEXT)
    (root / "text").mkdir()
    for name, text in TEXTS.items():
        (root / "text" / name).write_text(text)
    token_shard(root / "x.npy")
    return root


def evaluate(run_dir, *flags, n=0, name="run", path="checkpoint-10", text=True, cold=False):
    """Run eval.py (n: ranks under torchrun, 0: plain) and return its records and arrays."""
    words = ["--checkpoint-path", run_dir / "checkpoints" / path]
    if text:
        words += ["--val-data", *(run_dir / "text" / name for name in TEXTS)]
    else:
        words += ["--data-mode", "fineweb_npy", "--val-npy", run_dir / "x.npy"]
    words += ["--seq-len", T, "--batch-size", "4", "--device", "cpu"]
    words += ["--results-dir", run_dir / "results", "--run-name", name, *flags]
    out = torchrun(n, "eval.py", *words, cold=cold)
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


def test_documents_are_scored_each_by_itself(run_dir):
    """Against transformers on each stretch of a document that lies in a window, with documents that
    are empty, span windows, and end with one; the standard error is by document."""
    texts = ["", "abc", "x" * (2 * T - 6), "", "naïve café — 数据", "end"]
    path = run_dir / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = build_tokenizer("byte")
    model = checkpoint.load_model(run_dir / "checkpoints/checkpoint-10", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints/checkpoint-10").float()
    parts = [[*text.encode(), 256] for text in texts]
    ids = [i for part in parts for i in part]
    begins = np.cumsum([0, *map(len, parts)]).tolist()
    for stride in (T, 9):
        record = evaluate_perplexity(
            model, tokenizer, val_data=(str(path),), seq_len=T, stride=stride, documents=True
        )
        nats = {}
        for start in range(0, len(ids) - 1, stride):
            window = ids[start : start + T]
            edges = sorted({0, *(b - start for b in begins if 0 < b - start < len(window))})
            for a, b in zip(edges, [*edges[1:], len(window)]):
                with torch.no_grad():
                    logits = theirs(torch.tensor([window[a:b]])).logits[0].double()
                for j, row in enumerate(logits, start + a + 1):
                    if j < len(ids) and j not in nats:
                        nats[j] = -F.log_softmax(row, -1)[ids[j]].item()
        assert len(nats) == record["data"]["tokens_scored"] == len(ids) - 1
        loss = math.fsum(nats.values()) / len(nats)
        assert record["metrics"]["loss"]["value"] == pytest.approx(loss, rel=1e-6)
        wanted = [
            (a, math.fsum(nats[j] for j in range(max(a, 1), b)), b - max(a, 1))
            for a, b in itertools.pairwise(begins)
            if b > 1
        ]
        found = [record.arrays[f"document_{name}"].tolist() for name in ("start", "nll", "count")]
        assert found[0] == [w[0] for w in wanted] and found[2] == [w[2] for w in wanted]
        assert found[1] == pytest.approx([w[1] for w in wanted], rel=1e-6)
        assert record["metrics"]["loss"]["n"] == len(wanted) == 5
        assert record["examples"]["unit"] == "documents"
        residual = [nll - loss * count for _, nll, count in wanted]
        stderr = math.sqrt(5 / 4 * math.fsum(r * r for r in residual)) / (len(ids) - 1)
        assert record["metrics"]["loss"]["stderr"] == pytest.approx(stderr, rel=1e-5)
    assert record["protocol"]["documents"] == "after token 256"
    assert "within documents" in record["words"]
    plain = evaluate_perplexity(model, tokenizer, val_data=(str(path),), seq_len=T)
    assert "documents" not in plain["protocol"]
    assert plain["metrics"]["loss"]["value"] != pytest.approx(loss, rel=1e-4)


def test_documents_say_what_they_cannot(run_dir):
    for options, words in (
        ({"windows": "random"}, "--documents does not go with --windows random"),
        ({"bos": "on"}, "it has no --bos"),
    ):
        with pytest.raises(ValueError, match=words):
            Options(val_data=("x",), documents=True, **options)
    shard = str(run_dir / "x.npy")
    with pytest.raises(ValueError, match="end-of-text token: name a tokenizer"):
        evaluate_perplexity(
            tiny_model(), None, data_mode="fineweb_npy", val_npy=(shard,), documents=True
        )
    with pytest.raises(ValueError, match="--documents: this architecture runs through transform"):
        evaluate_perplexity(
            PlainModel(), build_tokenizer("byte"), data_mode="fineweb_npy", val_npy=(shard,),
            documents=True,
        )  # fmt: skip


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


@pytest.mark.parametrize("documents, unit", [(False, "window"), (True, "document")])
def test_one_example_has_no_standard_error(documents, unit, run_dir, capsys):
    model, byte = tiny_model(), build_tokenizer("byte")
    options = {"val_data": [str(run_dir / "text" / next(iter(TEXTS)))], "max_tokens": 9}
    eval_script.show([evaluate_perplexity(model, byte, **options, documents=documents)])
    said = capsys.readouterr().out
    assert f"\nstderr: undefined (there is one {unit})\n" in said and "nan" not in said


def test_any_number_of_ranks_gives_the_same_bits(run_dir):
    """32 windows in 8 batches over 3 ranks; two checkpoints; a plain directory of them."""
    common = {"path": "", "text": False}
    runs = {n: evaluate(run_dir, n=n, name=f"n{n}", cold=n == 2, **common)[1] for n in (1, 2, 3)}
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


def test_compute_perplexity_is_the_score_of_random_windows(run_dir):
    model = checkpoint.load_model(run_dir / "checkpoints/checkpoint-10", "float32")
    dataset = FineWebNPYDataset([run_dir / "x.npy"], T, seed=7)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    got = compute_perplexity(model, loader, "cpu")
    shard = {"data_mode": "fineweb_npy", "val_npy": (run_dir / "x.npy",), "seq_len": T}
    record = evaluate_perplexity(model, None, windows="random", seed=7, batch_size=4, **shard)
    assert got["avg_loss"] == pytest.approx(record["metrics"]["loss"]["value"], rel=1e-6)
    assert got["tokens"] == record["data"]["tokens_scored"]


def test_the_seed_counts_for_random_windows_alone(run_dir):
    model = tiny_model()
    shard = {"data_mode": "fineweb_npy", "val_npy": [run_dir / "x.npy"], "seq_len": T}
    for windows, keys in (("exact", 1), ("random", 2)):
        records = [
            evaluate_perplexity(model, None, **shard, windows=windows, seed=s) for s in (1, 2)
        ]
        assert len({r["config_hash"] for r in records}) == keys
        assert len({r["resume_key"] for r in records}) == keys
        assert len({r["metrics"]["loss"]["value"] for r in records}) == keys


@pytest.mark.parametrize("more", [{"stride": 3}, {"bos": "on"}, {"bos": "auto"}])
def test_sampled_windows_ignore_no_option(more):
    with pytest.raises(ValueError, match="--windows random has no --stride and no --bos"):
        Options(val_data=("a.txt",), windows="random", **more)


def test_bad_input_is_one_line_and_nothing_is_written(run_dir, tmp_path):
    model = run_dir / "checkpoints/checkpoint-10"
    text = run_dir / "text/a.txt"
    common = ["eval.py", "--device", "cpu", "--results-dir", tmp_path / "results"]
    common += ["--checkpoint-path"]
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
    model = tiny_model(std=None)
    with torch.no_grad():
        model.ln_f.weight.fill_(3e38)
        model.lm_head.weight.mul_(1e4)
    path = save_model(model, tmp_path, tokenizer=None)
    flags = ["--checkpoint-path", path, "--val-data", run_dir / "text/a.txt", "--seq-len", "32"]
    flags += ["--tokenizer-name", "byte", "--results-dir", tmp_path / "results"]
    line = error_of("eval.py", "--device", "cpu", *flags)
    assert "NaN" in line and "window" in line
    assert not (tmp_path / "results").exists()


def test_sigterm_leaves_no_partial_result_and_no_process(run_dir, tmp_path):
    shard = tmp_path / "long.npy"  # minutes of work, on idle cores too
    np.save(shard, np.zeros(60_000_000, dtype=np.uint16))
    words = ["--data-mode", "fineweb_npy", "--val-npy", shard, "--seq-len", T, "--device", "cpu"]
    words += ["--checkpoint-path", run_dir / "checkpoints/checkpoint-10"]
    words += ["--results-dir", tmp_path / "results"]

    def both_read_it():
        maps = (Path(f"/proc/{pid}/maps") for pid in descendants(process.pid))
        return sum(str(shard) in read_if_there(path) for path in maps) == 2

    with started(command(2, "eval.py", *words), stderr=subprocess.PIPE) as process:
        wait_for(both_read_it)
        workers = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and not any(map(is_there, workers))
    assert not (tmp_path / "results").exists()


def read_if_there(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_bos_of_shards_that_need_no_tokenizer(run_dir):
    """auto: none, as nobody says what it would be."""
    model, options = tiny_model(), {"data_mode": "fineweb_npy", "val_npy": (run_dir / "x.npy",)}
    plain, auto = (evaluate_perplexity(model, None, **options, bos=bos) for bos in ("off", "auto"))
    assert auto["config_hash"] == plain["config_hash"] and not auto["protocol"]["bos"]
    with pytest.raises(ValueError, match="--bos needs a tokenizer with a BOS"):
        evaluate_perplexity(model, None, **options, bos="on")
    byte = evaluate_perplexity(model, build_tokenizer("byte"), **options, bos="on")
    assert byte["data"]["tokens_scored"] == plain["data"]["tokens_scored"] + 1


def test_default_tokenizer_and_window(run_dir):
    """The checkpoint's own tokenizer, and a window no longer than its context."""
    out, [(record, _)] = evaluate(run_dir, "--max-tokens", "100")
    assert record["protocol"]["tokenizer"] == "byte"
    assert record["data"]["tokens"] == 100
    assert "avg_loss: " in out and "ppl: " in out
    model, byte = tiny_model(max_position_embeddings=CONTEXT), build_tokenizer("byte")
    options = Options(val_data=(run_dir / "text/a.txt",))
    plan = eval_script.plan(options, facts_in_memory(model, byte))
    assert plan.protocol["window"] == CONTEXT and len(plan.work.windows) == 4

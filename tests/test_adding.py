"""What CONTRIBUTING.md says of adding an evaluation and a backend, done as it says."""

import json
from pathlib import Path

import last_word_eval
import numpy as np
import pytest
import torch
from builders import (
    run_ranks,
    saved_checkpoint,
    small_humaneval,
    small_mmlu,
    tiny_model,
    token_shard,
    torchrun,
)

import report
import results
import sweep
from backends.local import Local
from eval import PERPLEXITY
from evaluation import measure
from humaneval_eval import HUMANEVAL
from mmlu_eval import MMLU
from tokenizer import build_tokenizer

LINES = "the cat sat on the mat\na b c\nnaïve café 数据\n\none\nx y\n"


@pytest.fixture
def lines(tmp_path) -> Path:
    (tmp_path / "lines.txt").write_text(LINES)
    return tmp_path / "lines.txt"


def by_hand(model) -> tuple[list[bool], list[float]]:
    """For each line of two words: is its last word greedy, and its nats; one plain pass a line."""
    right, nats = [], []
    for line in filter(lambda text: " " in text, LINES.splitlines()):
        ids, before = line.encode(), len(line.rpartition(" ")[0].encode())
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([list(ids)])))[0].float()
        logprobs = logits.log_softmax(-1)
        targets = range(before, len(ids))
        right.append(all(int(logits[t - 1].argmax()) == ids[t] for t in targets))
        nats.append(-sum(float(logprobs[t - 1, ids[t]]) for t in targets))
    return right, nats


def test_an_evaluation_of_a_hundred_lines_is_whole(tmp_path, lines, monkeypatch, capsys):
    """Command, any number of ranks, keyword call, sweep, table and comparison."""
    for step in (10, 20):
        saved_checkpoint(tmp_path / "run", step)
    words = ["--checkpoint-path", tmp_path / "run", "--data-path", lines, "--device", "cpu"]
    for n in (0, 3):
        torchrun(n, "tests/last_word_eval.py", *words, "--results-dir", tmp_path / f"results-{n}")
    one, three = (results.load_records(tmp_path / f"results-{n}") for n in (0, 3))
    right, nats = by_hand(tiny_model(seed=10))
    assert one[0]["metrics"]["accuracy"]["value"] == np.mean(right)
    arrays = results.load_arrays(one[0])
    assert arrays["nll"] == pytest.approx(nats, rel=1e-5) and arrays["correct"].tolist() == right
    for a, b in zip(one, three, strict=True):
        assert a["metrics"] == b["metrics"] and a["resume_key"] == b["resume_key"]
        assert results.load_arrays(a)["nll"].tobytes() == results.load_arrays(b)["nll"].tobytes()
    byte = build_tokenizer("byte")
    called = last_word_eval.LAST_WORD(tiny_model(seed=10), byte, data_path=str(lines))
    assert called["metrics"] == one[0]["metrics"]
    # its one entry in the sweep, which then finds the command's records done
    monkeypatch.setattr(sweep, "EVALUATIONS", (*sweep.EVALUATIONS, last_word_eval.LAST_WORD))
    (tmp_path / "e.yaml").write_text(f"last_word: {{data-path: {lines}}}\n")
    argv = ["--checkpoint-path", tmp_path / "run", "--evaluations", tmp_path / "e.yaml"]
    argv += ["--results-dir", tmp_path / "results-0", "--device", "cpu"]
    sweep.main([str(word) for word in argv])
    assert "0 made, 2 done before" in capsys.readouterr().out
    report.main([str(tmp_path / "results-0"), "--no-html"])
    table = capsys.readouterr().out
    assert "last_word · float32 · lines.txt" in table and "checkpoint-20" in table
    report.main(["--compare", *(str(Path(r["_path"])) for r in one)])
    assert "bootstrap over 4 lines" in capsys.readouterr().out


class Elsewhere:
    """A model that answers from elsewhere: the verbs and nothing else, all of it through JSON."""

    def __init__(self, local: Local):
        self.facts, self.dist = local.facts, local.dist
        self._local, self._done = local, {}

    def score_windows(self, stream, windows, batch_size=8, **options):
        return self._note(self._local.score_windows(stream, windows, batch_size, **options))

    def score_rows(self, rows, max_tokens, max_rows=None, **options):
        return self._note(self._local.score_rows(rows, max_tokens, max_rows, **options))

    def generate(self, prompts, sampling, n_samples=1, **options):
        prompts = json.loads(json.dumps(prompts))
        yield from self._local.generate(prompts, sampling, n_samples, **options)
        self._note(None)

    def _note(self, answer):
        self._done = {"seconds": 1.0, "tokens": 1, "tokens_per_second": 1.0}
        return answer

    def cost(self) -> dict:
        return json.loads(json.dumps(self._done))

    def ran(self) -> dict:
        return {"server": "elsewhere"}


def test_evaluations_ask_a_backend_for_nothing_but_its_verbs(tmp_path):
    byte = build_tokenizer("byte")
    local = Local(tiny_model("llama"), byte)
    shard = str(token_shard(tmp_path / "x.npy"))
    for evaluation, options in (
        (PERPLEXITY, {"data_mode": "fineweb_npy", "val_npy": (shard,), "seq_len": 32}),
        (MMLU, {"data_path": small_mmlu(tmp_path / "mmlu"), "scoring": ("generate",)}),
        (MMLU, {"data_path": tmp_path / "mmlu", "num_few_shot": 1}),
        (
            HUMANEVAL,
            {"data_path": small_humaneval(tmp_path / "p.jsonl"), "workers": 1}
            | {"max_new_tokens": 8},
        ),
    ):
        wanted = evaluation(local.model, byte, **options)
        plan = evaluation.plan(evaluation.Options(**flat(evaluation, options)), local.facts)
        got = measure(evaluation, Elsewhere(local), plan)
        assert got["metrics"] == wanted["metrics"]
        assert got["protocol"]["server"] == "elsewhere"
        for name, array in wanted.arrays.items():
            assert np.array_equal(got.arrays[name], array), name


def flat(evaluation, options) -> dict:
    """Options as the dataclass has them, Sampling's inside."""
    import cli

    return vars(cli.read_options(evaluation.Options, options))


def test_ranks_of_a_backend_agree(tmp_path, lines):
    """The verbs' greedy answers are the same on every rank."""
    saved = saved_checkpoint(tmp_path / "run", 10)
    body = f"""
import checkpoint, last_word_eval
from backends.local import Local
from tokenizer import build_tokenizer
model = checkpoint.load_model({str(saved)!r}, "float32")
result = last_word_eval.LAST_WORD(
    model, build_tokenizer("byte"), dist=dist, data_path={str(lines)!r}
)
say("loss", result["metrics"]["loss"]["value"].hex())
"""
    out = run_ranks(2, tmp_path, body)
    said = [line for line in out.stdout.splitlines() if line.startswith("loss")]
    assert len(said) == 2 and len(set(said)) == 1

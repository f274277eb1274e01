"""reporting/compare.py: its statistics against scipy, and what does not pair."""

import numpy as np
import pytest
import scipy.stats
from made_up_records import answers_record, loss_record, run_report, save

import durable
import results
import stats
from reporting.compare import compare, compare_text, pairs_of


def test_compare_questions(tmp_path):
    rng = np.random.default_rng(0)
    n = 400
    gold = rng.integers(0, 4, n)
    a, b = rng.random(n) < 0.5, rng.random(n) < 0.6
    logprobs = [np.log(rng.dirichlet(np.ones(4), n)) for _ in range(2)]
    samples = [{"id": i, "question": f"question {i}?"} for i in range(n)]
    paths = [
        answers_record(
            tmp_path,
            right,
            {"gold_logprob": p[np.arange(n), gold], "subject": np.full(n, "law")},
            "gold_logprob",
            step=step,
            samples=samples,
        )
        for step, right, p in ((1, a, logprobs[0]), (2, b, logprobs[1]))
    ]
    with pytest.raises(ValueError, match=r"--compare checkpoint-1: no such .* results/RUN/CHECKP"):
        pairs_of("checkpoint-1", paths[1])
    (pair,) = pairs_of(*paths)
    out = compare(*pair, examples=5)
    only_b, only_a = int((b & ~a).sum()), int((a & ~b).sum())
    assert (out["better"], out["worse"]) == (only_b, only_a)
    assert out["flips"]["both_right"] == int((a & b).sum())
    assert out["p"] == pytest.approx(scipy.stats.binomtest(only_b, only_a + only_b).pvalue)
    expected = scipy.stats.ttest_rel(b.astype(float), a.astype(float)).confidence_interval()
    assert (out["low"], out["high"]) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert out["verdict"] == ("B is better" if out["p"] < 0.05 else "not resolved")
    flipped = np.flatnonzero(a != b)
    moved = np.abs(logprobs[1][np.arange(n), gold] - logprobs[0][np.arange(n), gold])
    expected = flipped[np.argsort(-moved[flipped])][:5]
    assert [row["example"] for row in out["changed"]] == expected.tolist()
    text = compare_text(*pair, out)
    assert f"law: question {expected[0]}?" in text and "McNemar" in text


def test_flips_and_changed_answers_of_two_records(tmp_path):
    """From the records alone, in both directions; answers only where both kept them."""
    rng = np.random.default_rng(3)
    gold, a = rng.integers(0, 4, (2, 200))
    b = np.where(rng.random(200) < 0.3, rng.integers(0, 4, 200), a)
    paths = [
        answers_record(tmp_path, answer == gold, kept, step=step)
        for step, (answer, kept) in enumerate(
            [(a, {"predicted": a}), (b, {"predicted": b}), (b, {})]
        )
    ]
    pair = pairs_of(*paths[:2])[0]
    out = compare(*pair)
    lost, won = int(((a == gold) & (b != gold)).sum()), int(((a != gold) & (b == gold)).sum())
    others = int(((a != b) & (a != gold) & (b != gold)).sum())
    assert lost and won and others
    text = compare_text(*pair, out)
    assert f"flips            {lost} right to wrong, {won} wrong to right" in text
    changed = f"{lost + won + others} changed, of them {others} from one wrong one to another"
    assert f"answers          {changed}" in text
    p = scipy.stats.binomtest(lost, lost + won).pvalue
    assert f"McNemar, exact   p = {p:.4g}" in text
    pair = pairs_of(paths[0], paths[2])[0]
    text = compare_text(*pair, compare(*pair))
    assert f"{lost} right to wrong" in text and "answers  " not in text


def test_compare_windows_and_folders(tmp_path):
    rng = np.random.default_rng(1)
    count = rng.integers(1, 9, 60)
    a = rng.normal(3, 0.3, 60) * count
    b = a - rng.normal(0.1, 0.05, 60) * count
    b[7] -= 0.8 * count[7]
    paths = [loss_record(tmp_path, x, count, step=i) for i, x in enumerate((a, b))]
    out = compare(*pairs_of(*[p.parent for p in paths])[0])
    assert out["difference"] == pytest.approx((b.sum() - a.sum()) / count.sum())
    assert out["verdict"] == "B is better" and out["changed"][0]["example"] == 7
    assert out["changed"][0]["what"] == "from token 56"
    low, high = out["bootstrap"]
    assert low < out["difference"] < high
    again = compare(*pairs_of(*paths)[0])
    assert again["bootstrap"] == out["bootstrap"]
    same = compare(*pairs_of(paths[0], paths[0])[0])
    assert same["verdict"] == "not resolved" and same["changed"] == []
    assert "to resolve" not in compare_text(*pairs_of(paths[0], paths[0])[0], same)


def test_compare_tasks(tmp_path):
    n = np.full(30, 10)
    c = np.array([3] * 30), np.array([5] * 15 + [3] * 14 + [10])
    paths = []
    for step, passed in enumerate(c):
        names = {f"pass@{k}": k for k in (1, 10)}
        summary = stats.pass_at_k_summary
        metrics = {name: results.metric(**summary(n, passed, k)) for name, k in names.items()}
        arrays = {name: stats.pass_at_k(n, passed, k) for name, k in names.items()}
        examples = {"unit": "tasks", "scores": {name: name for name in names}}
        paths.append(save(tmp_path, "humaneval", metrics, arrays, step=step, examples=examples))
    out = compare(*pairs_of(*paths)[0])
    assert out["difference"] == pytest.approx((c[1] - c[0]).mean() / 10)
    assert out["changed"][0]["example"] == 29 and out["better"] == 16
    assert "pass@10 " in compare_text(*pairs_of(*paths)[0], out)
    at_10 = stats.pass_at_k(n, c[1], 10) - stats.pass_at_k(n, c[0], 10)
    assert out["others"]["pass@10"]["difference"] == pytest.approx(at_10.mean())
    for path in paths:  # only pass@10 was asked for: then that is compared
        record = results.load_record(path)
        del record["metrics"]["pass@1"]
        durable.write_json(path, record)
    out = compare(*pairs_of(*paths)[0])
    assert out["metric"] == "pass@10" and out["difference"] == pytest.approx(at_10.mean())


def test_compare_refuses_what_does_not_pair(tmp_path):
    count = np.full(5, 4)
    a = loss_record(tmp_path, count * 3.0, count)
    cases = {
        "different data": loss_record(tmp_path, count * 3.0, count, step=2, data={"hash": "x"}),
        "the weights of their windows differ (count)": loss_record(
            tmp_path, count * 3.0, count + 1, step=3
        ),
        "the same tokenizer": loss_record(tmp_path, np.ones(6), np.ones(6), step=4),
        "cannot compare": answers_record(tmp_path, np.array([True, False]), step=5),
        "no per-example": save(tmp_path, "perplexity", {"loss": 1.0}, step=6),
        "evaluation failed": save(tmp_path, "perplexity", {}, step=7, status="failed", reason="x"),
        "no such file": tmp_path / "nowhere",
        "not one of each": a.parent,
    }
    cases["no metric in common"] = save(
        tmp_path, "perplexity", {"loss": 1.0}, {"x": count}, step=8,
        examples={"unit": "windows", "scores": {"bits": "x"}, "weight": "x"},
    )  # fmt: skip
    cases["no 'nll' with a number"] = save(
        tmp_path, "perplexity", {"loss": 1.0}, {"x": count}, step=9,
        examples={"unit": "windows", "scores": {"loss": "nll"}},
    )  # fmt: skip
    for reason, other in cases.items():
        out = run_report("--compare", a, other)
        assert out.returncode == 2 and reason in out.stderr, (reason, out.stderr)
        assert out.stderr.count("\n") == 1 and "Traceback" not in out.stderr
    out = run_report("--compare", a.parent, cases["different data"].parent)
    assert out.returncode == 2 and "share no evaluation" in out.stderr

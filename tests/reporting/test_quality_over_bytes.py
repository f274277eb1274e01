"""reporting/quantised.py: what belongs together, bytes, differences, flips, the line of the best;
and the report's table, page and pictures of it."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
from builders import CONFIGS
from made_up_records import QUESTIONS, WINDOWS, page_parts, run_report

import results
import stats
from model import GPTModel
from recording.identity import config_hash
from reporting.groups import read
from reporting.quantised import families_of, pareto, table_of_family, weights_of
from reporting.tables import terminal

CONFIG = CONFIGS["llama"]
N_ALL = sum(p.numel() for p in GPTModel(CONFIG).parameters())
COUNT = np.random.default_rng(0).integers(20, 33, 40)
SIZES = {"w8-sym": (8.5, 0.001), "w4-sym": (4.5, 0.06), "w4-asym": (4.6, 0.04), "w3": (3.6, 0.3)}


def save(folder, evaluation, metrics, arrays, examples, *, rule=None, file=None, model="m", **more):
    """A record of a model under a rule (its name and bits), or of a file that holds quantised
    matrices, or of neither."""
    words = ["window 32", "bfloat16", *([rule[0]] if rule else [])]
    protocol = {"window": 32, "dtype": "bfloat16", "batch_size": 8} | more.pop("protocol", {})
    if rule:
        held = {"rule": rule[0], "weight_bytes": N_ALL * rule[1] / 8, "bits_per_weight": rule[1]}
        protocol["quantisation"] = held
    name = f"{model}-file" if file else model
    checkpoint = {"name": name, "step": 1, "path": name, "config": CONFIG.to_dict()}
    checkpoint["fingerprint"] = config_hash({"of": name, "file": file and file["rule"]})
    checkpoint |= {"quantisation": file} if file else {}
    fields = {"run": "r", "checkpoint": checkpoint, "examples": examples, "words": words}
    fields |= {"data": {"hash": "d" * 64}} | more
    record = results.new_record(evaluation, metrics, protocol, **fields)
    return results.save_record(folder, record, arrays)


def loss_of(folder, worse, noise=0.0, **more):
    """A model whose loss is higher by so much, in every window a little differently."""
    rng = np.random.default_rng(7)
    nll = (rng.normal(3, 0.4, 40) + worse * rng.uniform(0.5, 1.5, 40)) * COUNT
    loss = nll.sum() / COUNT.sum()
    metrics = {
        "loss": results.metric(loss, stats.ratio_stderr(nll, COUNT), 40, "lower"),
        "kl": results.metric(worse / 2, worse / 20, 40, "lower", "nats per token"),
    }
    return save(folder, "perplexity", metrics, {"nll": nll, "count": COUNT}, WINDOWS, **more), loss


def answers_of(folder, correct, **more):
    metrics = {"accuracy": results.share(int(correct.sum()), len(correct))}
    save(folder, "mmlu", metrics, {"correct": correct}, QUESTIONS, **more)


def families(folder):
    return families_of(read(folder)["ok"])


@pytest.fixture
def five(tmp_path):
    loss_of(tmp_path, 0.0)
    for rule, (bits, worse) in SIZES.items():
        loss_of(tmp_path, worse, rule=(rule, bits))
    return tmp_path


def test_a_model_under_its_rules(five):
    [family] = families(five)
    assert [w.rule for w in family.weights] == ["bfloat16", "w8-sym", "w4-asym", "w4-sym", "w3"]
    assert family.weights[0].bytes == 2 * N_ALL and family.weights[0].full
    assert [w.bits for w in family.weights] == [16, 8.5, 4.6, 4.5, 3.6]
    table = table_of_family(family)
    _, base = loss_of(five, 0.0)
    for row, (_, worse) in zip(table["rows"][1:], [SIZES[w.rule] for w in family.weights[1:]]):
        _, loss = loss_of(five, worse)
        assert row[5].startswith(f"{loss - base:+.4f} [") and row[4].startswith(f"{loss:.4f} ±")
    assert table["rows"][0][5] == "" and table["rows"][1][6] == "5.00e-04"
    text = terminal(table)
    assert "Quality over bytes: r/m · perplexity · window 32 · bfloat16" in text
    assert "w8-sym" not in table["title"]


def test_the_line_of_the_best(five):
    """Against asking of each pair whether the other is smaller and better."""
    loss_of(five, 0.5, rule=("w6 of old", 6.0))  # larger and worse than both w4
    loss_of(five, 0.02, rule=("w5", 5.5))
    [family] = families(five)
    points = [
        (w.bytes, r["metrics"]["loss"]["value"]) for r, w in zip(family.records, family.weights)
    ]
    wanted = set(range(len(points)))
    for (i, a), (j, b) in itertools.permutations(enumerate(points), 2):
        if b[0] <= a[0] and b[1] <= a[1] and i != j:
            wanted.discard(i)
    assert set(pareto(family, "loss")) == wanted and len(wanted) == 6
    best = table_of_family(family)["best"]
    assert {row for row, _ in best} == wanted


def test_files_that_others_quantised(five):
    """Bytes of the file's matrices, and of the rest in 16 bits; beside every model of their shape,
    whatever tokenizer and batch they had, and never beside another's."""
    matrices = 2 * 32 * 48 * 3
    held = {"rule": "gptq-w4-g128", "matrices": 6, "method": "gptq"}
    held |= {"weight_bytes": matrices * 4.25 / 8, "bits_per_weight": 4.25}
    other = {"protocol": {"tokenizer_fingerprint": "other", "batch_size": 2}}
    loss_of(five, 0.05, file=held, **other)
    loss_of(five, 0.0, model="another")
    found = families(five)
    assert [f.base["checkpoint"]["name"] for f in found] == ["another", "m"]
    assert [len(f.records) for f in found] == [2, 6]
    size = found[0].weights[1].bytes
    assert size == pytest.approx(matrices * 4.25 / 8 + 2 * (N_ALL - matrices))
    assert not found[0].weights[1].full
    loss_of(five, 0.05, file=held | {"rule": "x"}, data={"hash": "e" * 64})
    loss_of(five, 0.05, file=held | {"rule": "y"}, protocol={"window": 64})
    against = {"reference": {"fingerprint": "1" * 64, "dtype": "float32", "path": "p"}}
    loss_of(five, 0.05, rule=("w7", 7.0), protocol=against)
    assert [len(f.records) for f in families(five)] == [2, 6]
    against["reference"]["path"] = "q"
    loss_of(five, 0.0, protocol=against)  # the same reference, wherever it lies
    assert sorted(len(f.records) for f in families(five)) == [2, 2, 6]


def test_flips_against_the_first(tmp_path):
    rng = np.random.default_rng(5)
    base = rng.random(400) < 0.6
    answers_of(tmp_path, base)
    for bits, share in ((8, 0.02), (4, 0.2)):
        answers_of(
            tmp_path,
            np.where(rng.random(400) < share, rng.random(400) < 0.3, base),
            rule=(f"w{bits}", bits),
        )
    [family] = families(tmp_path)
    table = table_of_family(family)
    assert table["header"][-2:] == ["flips − +", "p"]
    for row, record in zip(table["rows"][1:], family.records[1:]):
        after = results.load_arrays(record)["correct"]
        lost, won = int((base & ~after).sum()), int((~base & after).sum())
        p = scipy.stats.binomtest(lost, lost + won).pvalue
        assert row[-2:] == [f"{lost} {won}", f"{p:.2g}"]


def test_without_quantised_records_there_is_nothing(tmp_path):
    loss_of(tmp_path, 0.0)
    loss_of(tmp_path, 0.1, model="n")
    assert families(tmp_path) == []
    odd = {"rule": None, "weight_bytes": "many"}
    for quantisation in (odd, "w4", None, {"rule": "w4", "weight_bytes": 5, "bits_per_weight": 0}):
        loss_of(tmp_path, 0.1, model="odd", protocol={"quantisation": quantisation})
    path, _ = loss_of(tmp_path, 0.1, model="older")
    record = json.loads(path.read_text())
    record["checkpoint"]["config"] = {"n_layers": "two", "colour": "red"}
    path.write_text(json.dumps(record))
    for record in read(tmp_path)["ok"]:
        weights_of(record)
    assert run_report(tmp_path, "--no-html").returncode == 0


def test_the_report_shows_it(five):
    """Table, Markdown, the page's data, pictures."""
    out = run_report(five, "--charts")
    assert out.returncode == 0, out.stderr
    assert "Quality over bytes: r/m" in out.stdout and "w4-asym" in out.stdout
    assert "## Quality over bytes: r/m" in (five / "report.md").read_text()
    _, data = page_parts(five / "report.html")
    [family] = data["quantised"]
    assert family["rule"][1] == "w8-sym" and family["lower"] == ["loss", "kl"]
    assert family["metrics"]["kl"]["v"] == [0, 0.0005, 0.02, 0.03, 0.15]
    assert list(five.glob("bytes-perplexity-0.png"))


def test_it_is_drawn(five, browser):
    from test_page import open_page

    assert run_report(five).returncode == 0
    page, troubles = open_page(browser, five / "report.html")
    assert troubles == []
    page.wait_for_selector("#bytes figure")
    assert page.locator("#bytes figure").count() == 2
    assert "w4-asym" in page.locator("#bytes").first.text_content()

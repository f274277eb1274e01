"""reporting/tables.py: its differences against scipy, and what it writes."""

import csv
import io
import json

import numpy as np
import pytest
import scipy.stats
from made_up_records import loss_record, odd_records, run_report, save

import results
from cli import printable
from reporting.groups import read
from reporting.tables import csv_cell, marked_down, table_of


def test_table_ranks_marks_and_pairs(tmp_path):
    rng = np.random.default_rng(0)
    count = np.full(50, 16)
    base = rng.normal(3, 0.4, 50) * 16
    nll = {
        step: base + shift * 16 + rng.normal(0, 0.3, 50)
        for step, shift in ((1, 0.5), (2, 0.0), (3, 0.2))
    }
    for step, values in nll.items():
        loss_record(tmp_path, values, count, step=step)
    table = table_of(read(tmp_path)["ok"])
    assert [row[2] for row in table["rows"]] == ["2", "3", "1"]
    assert table["best"] == {(0, 3)} and table["rows"][0][4] == "best"
    expected = scipy.stats.ttest_rel(nll[3] / 16, nll[2] / 16).confidence_interval(0.95)
    difference = np.mean(nll[3] - nll[2]) / 16
    text = f"{difference:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]"
    assert table["rows"][1][4] == text
    by_step = table_of(read(tmp_path)["ok"], sort="step")
    assert [row[2] for row in by_step["rows"]] == ["1", "2", "3"]
    assert by_step["best"] == {(1, 3)}
    cut = table_of(read(tmp_path)["ok"], rows=1)
    assert len(cut["rows"]) == 1 and "2 more checkpoints" in cut["notes"][-1]


def test_differences_without_arrays_say_so(tmp_path):
    for step, value in ((1, 0.5), (2, 0.7)):
        save(tmp_path, "mmlu", {"accuracy": results.metric(value, 0.03, 100)}, step=step)
    table = table_of(read(tmp_path)["ok"])
    margin = 1.96 * 0.03 * 2**0.5
    assert table["rows"][1][4] == f"~-0.2000 [{-0.2 - margin:+.4f}, {-0.2 + margin:+.4f}]"
    assert "~" in table["notes"][0]


def test_partial_and_odd_records_are_shown(tmp_path):
    odd_records(tmp_path)
    out = run_report(tmp_path)
    assert out.returncode == 0, out.stderr
    assert "\x1b" not in out.stdout
    assert "0.5000 *" in out.stdout and "no metrics" not in out.stdout.split("gsm8k")[1]


def test_csv_holds_every_record_at_full_precision(tmp_path):
    value = 1 / 3
    save(tmp_path, "mmlu", {"accuracy": results.metric(value, 0.1, 3)}, run='a,"b"')
    save(tmp_path, "mmlu", {}, step=2, status="failed", reason="torn,\nfile")
    assert run_report(tmp_path, "--no-html").returncode == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert float(rows[0]["mmlu/accuracy"]) == value and rows[0]["run"] == 'a,"b"'
    assert rows[1]["status"] == "failed" and rows[1]["reason"] == "torn,\nfile"
    text = (tmp_path / "report.md").read_text()
    assert "**0.3333 ±0.1000**" in text and "torn, file" in text
    assert not (tmp_path / "report.html").exists()


EVIL = "<img src=x onerror=1>&amp; [a](http://evil.example) ![i](x) `c` **b** _e_ ~~s~~ | # $x$ \\"
ADDRESSES = "https://evil.example www.evil.example <http://a.example> a@b.example\n\n# title"


def test_text_of_others_stays_text_in_markdown():
    """By another program's reading: what comes out is the text, and nothing else."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for text in (EVIL, ADDRESSES, "a|b", "x_y_z", "\x1b[2J", "`" * 3, "checkpoint-300", "<!--"):
        row = f"| {marked_down(text)} | b |\n| --- | --- |\n| {marked_down(text)} | d |\n"
        tokens = [t for t in parser.parse(row) if t.type == "inline"]
        assert len(tokens) == 4
        for token in (tokens[0], tokens[2]):
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special", "html_inline"}
            tags = [c.content for c in token.children if c.type == "html_inline"]
            assert set(tags) <= {"<!-- -->"}
            shown = "".join(c.content for c in token.children if c.type != "html_inline")
            assert shown == printable(text)
    assert marked_down("stdlib_val_000000.npy · 5-shot") == "stdlib_val_000000.npy · 5-shot"
    assert "https\\://" in marked_down(ADDRESSES) and "www\\.evil" in marked_down(ADDRESSES)


FORMULAS = ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "＝1")


def test_text_of_others_is_no_formula_in_csv():
    assert all(csv_cell(text)[0] in "'\\" for text in FORMULAS)
    assert [csv_cell(value) for value in (-1.5, 3, None, "a=b", "a\nb")] == [
        -1.5,
        3,
        None,
        "a=b",
        "a\nb",
    ]


def test_hostile_names_through_the_command(tmp_path):
    """In every place of a record that others choose; nothing steers, and no row is torn."""
    steer = "=\x1b]0;t\x07\x9b2J\u202e\n|<b>`\0"
    breakdown = {steer: {steer: {"accuracy": 0.5}}}
    words = [steer, "a"]
    for step in (1, 2):
        metrics = {"accuracy": results.metric(0.5, 0.1, 3, unit=steer), steer: 1.0}
        examples = {"unit": steer, "scores": {"accuracy": "x"}, "labels": {"name": "{}"}}
        arrays = {"x": np.arange(3.0) * step, "name": np.array([steer + "x"] * 3)}
        save(tmp_path, "mmlu", metrics, arrays, run=steer, step=step, words=words,
             breakdown=breakdown, examples=examples, protocol={steer: step})  # fmt: skip
    save(tmp_path, "mmlu", {}, run=steer, step=3, status="failed", reason=steer)
    paths = sorted(tmp_path.glob("*/*/*.json"))[:2]
    (paths[0].parent / "torn\x1b.json").write_text("{")
    lines = "".join(json.dumps({"id": i, steer: steer, f"{steer}/x": steer}) + "\n" for i in (1, 2))
    (paths[0].parent / "mmlu-differences-0.jsonl").write_text(lines)
    out, compared = run_report(tmp_path), run_report("--compare", *paths)
    wrong = run_report(tmp_path, "--sort", "\x1b[2J")
    assert (out.returncode, compared.returncode, wrong.returncode) == (0, 0, 2), compared.stderr
    assert wrong.stderr.count("\n") == 1
    written = [(tmp_path / name).read_text() for name in ("report.md", "report.csv")]
    for text in (out.stdout, compared.stdout, wrong.stderr, *written):
        assert all(c.isprintable() or c == "\n" for c in text), text
    rows = list(csv.DictReader(io.StringIO(written[1])))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and None not in rows[0]
    assert all(row["run"].startswith("'=") for row in rows)
    for table in written[0].split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1

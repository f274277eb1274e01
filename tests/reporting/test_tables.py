"""reporting/tables.py: its differences against scipy, and what it writes."""

import csv
import io

import numpy as np
import scipy.stats
from made_up_records import loss_record, odd_records, run_report, save

import results
from reporting.groups import read
from reporting.tables import table_of


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

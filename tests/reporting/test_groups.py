"""reporting/groups.py: which records belong together, and what was left out."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from made_up_records import make_record, run_report, save

import report
import results
from reporting import tables
from reporting.groups import groups_of, read
from reporting.page import page_data


def test_other_protocols_and_data_are_other_tables(tmp_path):
    metrics = {"loss": 1.0}
    save(tmp_path, "perplexity", metrics)
    save(tmp_path, "perplexity", metrics, protocol={"window": 16})
    save(tmp_path, "perplexity", metrics, step=2, data={"hash": "e" * 64})
    save(tmp_path, "perplexity", metrics, step=3)
    groups = groups_of(read(tmp_path)["ok"])
    assert sorted(len(group) for group in groups) == [1, 1, 2]


def test_replaced_failed_and_unreadable_are_named(tmp_path):
    old = save(tmp_path, "mmlu", {"accuracy": 0.1})
    record = json.loads(old.read_text())
    record["environment"]["time"] = "2020-01-01T00:00:00Z"
    copy = tmp_path / "merged/base" / old.parent.name / old.name
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(record))
    record["metrics"]["accuracy"]["value"] = 0.2  # the same work, done again later
    record["environment"]["time"] = "2021-01-01T00:00:00Z"
    old.write_text(json.dumps(record))
    save(tmp_path, "mmlu", {}, step=9, status="failed", reason="weights hold NaN")
    (old.parent / "torn.json").write_text("{")
    out = run_report(tmp_path, "--no-html").stdout
    assert "0.2000 *" in out and "0.1000" not in out and "replace them: 1 records" in out
    assert "checkpoint-9 mmlu: weights hold NaN" in out and "torn.json: not JSON" in out
    written = (tmp_path / "report.md").read_text()
    assert "replace them: 1 records" in written and "torn.json" in written


def test_two_experiments_of_one_name_are_both_there(tmp_path, capsys):
    """Everywhere: on the terminal, in the files, on the page, in a comparison."""
    about = {"name": "ckpt", "step": 500}
    paths = []
    for i, where in enumerate(("expA", "expB")):
        checkpoint = about | {"path": f"{where}/run/ckpt.pt", "fingerprint": f"{i}" * 64}
        metrics = {"loss": results.metric(2.0 + i, 0.1, 3, "lower")}
        examples = {"unit": "windows", "scores": {"loss": "nll"}}
        record = make_record(metrics=metrics, run="run", checkpoint=checkpoint, examples=examples)
        paths.append(results.save_record(tmp_path / "r", record, {"nll": np.ones(3) * (2.0 + i)}))
    report.main([str(tmp_path / "r"), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    written = (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(r["run"], r["mmlu/loss"]) for r in rows] == [("expA/run", "2.0"), ("expB/run", "3.0")]
    assert [row["path"] for row in rows] == ["expA/run/ckpt.pt", "expB/run/ckpt.pt"]
    (group,) = page_data(read(tmp_path / "r"), "")["groups"]
    assert [(s["run"], s["metrics"]["loss"]["v"]) for s in group["series"]] == [
        ("expA/run", [2.0]),
        ("expB/run", [3.0]),
    ]
    for text in (said, written):
        assert "expA/run" in text and "expB/run" in text
    report.main(["--compare", *map(str, paths)])
    said = capsys.readouterr().out
    assert "A  expA/run/ckpt: loss 2.0000" in said and "B  expB/run/ckpt: loss 3.0000" in said
    with pytest.raises(ValueError, match="holds 2 checkpoints"):
        report.main(["--compare", str(tmp_path / "r/run"), str(paths[0].parent)])


def test_a_run_behind_a_link_is_there(tmp_path):
    save(tmp_path / "disk", "mmlu", {"accuracy": 0.5})
    (tmp_path / "r").mkdir()
    (tmp_path / "r/base").symlink_to(tmp_path / "disk/base")
    (tmp_path / "disk/base/up").symlink_to(tmp_path / "r")
    before = report.signature(tmp_path / "r")
    assert [r["metrics"]["accuracy"]["value"] for r in read(tmp_path / "r")["ok"]] == [0.5]
    save(tmp_path / "disk", "mmlu", {"accuracy": 0.25}, step=2)
    assert report.signature(tmp_path / "r") > before  # so that --watch sees it


def test_a_run_called_like_the_exports_is_there(tmp_path):
    save(tmp_path, "mmlu", {"accuracy": 0.5}, run="lm_eval")
    (tmp_path / "lm_eval/x").mkdir()
    (tmp_path / "lm_eval/x/results_mmlu-0.json").write_text("{}")
    found = read(tmp_path)
    assert [r["run"] for r in found["ok"]] == ["lm_eval"] and found["skipped"] == []


def test_a_record_that_nobody_foresaw_is_left_out_alone(tmp_path, monkeypatch):
    """Whatever it breaks: said, and the others are shown."""
    for step, value in ((1, 0.1), (2, 0.2), (3, 0.7)):
        save(tmp_path, "mmlu", {"accuracy": value}, step=step)
    real = tables.number
    broken = lambda value: real(value) if value != 0.2 else [][0]  # noqa: E731
    monkeypatch.setattr(tables, "number", broken)
    text = report.write_report(tmp_path, tmp_path)
    assert "0.1000" in text and "0.7000" in text and "0.2000" not in text
    assert "not readable: " in text and "IndexError: list index out of range" in text


def test_examples_answered_differently_are_listed(tmp_path):
    """By three scorings of one checkpoint: a line in the file for each pair that differs."""
    path = Path(save(tmp_path, "mmlu", {"accuracy": 0.5})).parent / "mmlu-differences-0a.jsonl"
    names = ("lm_eval/letter", "zh/letter", "lm_eval/generate")
    answers = {3: ("A", "B", "B"), 1: ("C", "C", None)}
    lines = []
    for i, given in answers.items():
        for a, b in itertools.combinations(range(3), 2):
            if given[a] != given[b]:
                line = {"id": i, "subject": "law", "where": f"law.csv:{i}", "gold": "A"}
                lines.append(json.dumps(line | {names[a]: given[a], names[b]: given[b]}) + "\n")
    path.write_text("".join(lines))
    text = report.write_report(tmp_path, tmp_path, html=False)
    assert "2 examples of mmlu answered differently by" in text
    written = (tmp_path / "report.md").read_text()
    table = [line for line in written.splitlines() if "law.csv" in line]
    (found,) = read(tmp_path)["differences"]
    assert found["columns"][:3] == ["subject", "where", "gold"] and found["answers"] == 3
    assert sorted(found["columns"][3:]) == sorted(names)
    order = [names.index(name) for name in found["columns"][3:]]
    for row, i, line in zip(found["rows"], (1, 3), table, strict=True):
        assert row == ["law", f"law.csv:{i}", "A", *(answers[i][k] for k in order)]
        assert line.split(" | ")[1] == f"law.csv:{i}"
    path.write_text(lines[0] + '{"id": 4')
    text = report.write_report(tmp_path, tmp_path, html=False)
    assert "answered differently" not in text and "no list of differences" in text
    path.write_text("")  # they all agree
    text = report.write_report(tmp_path, tmp_path, html=False)
    assert "answered differently" not in text and "not readable" not in text

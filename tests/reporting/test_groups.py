"""reporting/groups.py: which records belong together, and what was left out."""

import itertools
import json
from pathlib import Path

from made_up_records import run_report, save

import report
from reporting.groups import groups_of, read


def test_other_protocols_and_data_are_other_tables(tmp_path):
    metrics = {"loss": 1.0}
    save(tmp_path, "perplexity", metrics)
    save(tmp_path, "perplexity", metrics, protocol={"window": 16})
    save(tmp_path, "perplexity", metrics, step=2, data={"hash": "e" * 64})
    save(tmp_path, "perplexity", metrics, step=3)
    groups = groups_of(read(tmp_path)["ok"])
    assert sorted(len(group) for group in groups) == [1, 1, 2]


def test_replaced_failed_and_unreadable_are_named(tmp_path):
    old = save(tmp_path, "mmlu", {"accuracy": 0.1}, n=1)
    record = json.loads(old.read_text())
    record["environment"]["time"] = "2020-01-01T00:00:00Z"
    old.write_text(json.dumps(record))
    save(tmp_path, "mmlu", {"accuracy": 0.2}, n=2)  # the same name, other content
    save(tmp_path, "mmlu", {}, step=9, status="failed", reason="weights hold NaN")
    (old.parent / "torn.json").write_text("{")
    out = run_report(tmp_path, "--no-html").stdout
    assert "0.2000 *" in out and "0.1000" not in out and "replace them: 1 records" in out
    assert "checkpoint-9 mmlu: weights hold NaN" in out and "torn.json: not JSON" in out


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

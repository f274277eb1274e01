"""sweeping/export.py against lm-eval's own table."""

import json

import pytest
from made_up_records import make_record

import durable
from sweeping.export import to_lm_eval


def test_lm_eval_shape(tmp_path):
    shaped = to_lm_eval(json.loads(durable.dumps(make_record())))
    assert shaped["results"]["mmlu"]["acc,none"] == 0.5
    assert shaped["results"]["mmlu"]["acc_stderr,none"] == 0.1
    assert shaped["results"]["mmlu_stem"]["acc_stderr,none"] == "N/A"
    assert shaped["n-shot"] == {"mmlu": 5, "mmlu_stem": 5}
    assert shaped["n-samples"]["mmlu_stem"] == {"original": 9, "effective": 9}
    assert shaped["higher_is_better"]["mmlu"] == {"acc": True, "ece": False}
    make_table = pytest.importorskip("lm_eval.utils", exc_type=ImportError).make_table
    table = make_table(shaped)
    assert "mmlu_stem" in table and "0.5" in table


def test_parts_are_those_that_hold_metrics_of_the_record():
    groups = {
        "letter": {"A": {"predicted": 0.5}},
        "failure": {"timeout": 3},
        "calibration": [{"low": 0.0}],
        "task": {f"task{i}": {"accuracy": {"value": 1.0}} for i in range(26)},  # single examples
        "made up": {"part": {"accuracy": {"value": 0.1, "n": 3}}},
    }
    assert to_lm_eval(make_record(breakdown=groups))["group_subtasks"] == {"mmlu": ["mmlu_part"]}

"""sweeping/ledger.py: records are the only memory of what is done, and of what failed and why."""

import json
from dataclasses import dataclass, replace

import pytest

import cli
import results
from evaluation import Evaluation, Result
from sweep import SweepOptions
from sweeping.ledger import Ledger
from sweeping.planner import Entry

FILES = (("model.safetensors", 10, 1, 1),)
INFO = {"name": "checkpoint-1", "path": "run/checkpoint-1", "step": 1}


@dataclass(frozen=True)
class Options:
    shots: int = cli.option(0, "examples", type=int)


TASK = Evaluation("mmlu", __file__, Options, None, None, None)
ENTRIES = [Entry(TASK, Options(n), None, label=f"mmlu shots={n}") for n in (0, 5)]


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """The version of the code, to be changed."""
    current = ["one"]
    monkeypatch.setattr(Evaluation, "code_version", lambda self, *rooms: current[0])
    return current


def open_ledger(folder, dtype="float32", **options):
    return Ledger(folder, ENTRIES, dtype, replace(SweepOptions(), **options))


def result(shots, fingerprint="a" * 64):
    record = results.new_record(
        "mmlu",
        {"accuracy": results.metric(0.5, 0.1, 9)},
        {"shots": shots},
        run="run",
        checkpoint=INFO | {"fingerprint": fingerprint},
    )
    return Result(record, {"correct": [True]}, lambda: [{"id": 0}], None)


def test_what_is_done_is_known_by_its_resume_key(tmp_path):
    ledger, made = open_ledger(tmp_path), result(0)
    assert not ledger.is_done(made["resume_key"])
    ledger.save(made, True, "run/checkpoint-1", "mmlu shots=0")
    assert ledger.is_done(made["resume_key"]) and not ledger.is_done(result(5)["resume_key"])
    (record,) = results.load_records(tmp_path)
    assert len(results.load_samples(record)) == 1
    again = open_ledger(tmp_path)
    assert again.is_done(made["resume_key"]) and not again.made
    forced = open_ledger(tmp_path, force=True)
    assert not forced.is_done(made["resume_key"])
    forced.save(made, False, "run/checkpoint-1", "mmlu shots=0")
    assert forced.is_done(made["resume_key"])  # once a sweep
    (record,) = results.load_records(tmp_path)
    assert results.load_samples(record) == []


def test_a_record_of_another_sweep_is_read(tmp_path):
    ours, theirs = open_ledger(tmp_path), open_ledger(tmp_path)
    made = result(0)
    theirs.save(made, False, "run/checkpoint-1", "mmlu shots=0")
    assert not ours.is_done(made["resume_key"])
    ours.read(tmp_path / "nowhere.json")
    ours.read(made.path)
    assert ours.is_done(made["resume_key"])


def test_a_failure_holds_for_these_files_this_code_and_this_entry(tmp_path, code):
    def knows(files=FILES, path="run/checkpoint-1", label="mmlu shots=0", **options):
        return open_ledger(tmp_path, **options).has_failed(path, files, label)

    ledger = open_ledger(tmp_path)
    assert not knows()
    ledger.fail("run/checkpoint-1", FILES, INFO, "run", "mmlu shots=0", "torn")
    assert ledger.has_failed("run/checkpoint-1", FILES, "mmlu shots=0")
    assert ledger.known_failure("run/checkpoint-1", "mmlu shots=0")["reason"] == "torn"
    assert knows()
    assert not knows(label="mmlu shots=5") and not knows(path="run/checkpoint-2")
    assert not knows(files=(("model.safetensors", 11, 1, 1),)) and not knows(dtype="bfloat16")
    assert not knows(retry_failed=True) and not knows(force=True)
    code[0] = "two"
    assert not knows()
    (record,) = results.load_records(tmp_path)
    assert (record["status"], record["metrics"]) == ("failed", {})


def test_what_failed_in_this_sweep_is_not_tried_again_in_it(tmp_path):
    ledger = open_ledger(tmp_path, retry_failed=True)
    ledger.fail("run/checkpoint-1", FILES, INFO, "run", "mmlu shots=0", "torn")
    assert ledger.has_failed("run/checkpoint-1", FILES, "mmlu shots=0")


def test_a_success_and_a_newer_failure_replace_an_old_failure(tmp_path):
    path, label = "run/checkpoint-1", "mmlu shots=0"
    open_ledger(tmp_path).fail(path, FILES, INFO, "run", label, "torn")
    ledger = open_ledger(tmp_path)
    other = (("model.safetensors", 12, 1, 1),)  # another content, and so another place
    ledger.fail(path, other, INFO, "run", label, "still torn")
    (record,) = results.load_records(tmp_path)
    assert record["reason"] == "still torn"
    ledger.save(result(0), False, path, label)
    (record,) = results.load_records(tmp_path)
    assert record["status"] == "ok" and ledger.known_failure(path, label) is None


def test_a_record_that_cannot_be_exported_is_said(tmp_path, capsys):
    ledger = open_ledger(tmp_path)
    for shots in (0, 5):
        ledger.save(result(shots), False, "run/checkpoint-1", f"mmlu shots={shots}")
    path = next(tmp_path.glob("run/*/*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": {"packages": [1]}}))
    again = open_ledger(tmp_path, lm_eval_json=True)
    assert len(again.done) == 2 and len(list((tmp_path / "lm_eval").rglob("*.json"))) == 1
    assert f"{path}: not exported: AttributeError" in capsys.readouterr().out


def test_other_tools_get_what_is_there_and_what_comes(tmp_path, monkeypatch):
    open_ledger(tmp_path).save(result(0), False, "run/checkpoint-1", "mmlu shots=0")
    logged = []
    monkeypatch.setattr("sweeping.ledger.open_trackers", lambda *asked: {"log": logged.append})
    ledger = open_ledger(tmp_path, lm_eval_json=True)
    ledger.save(result(5), False, "run/checkpoint-1", "mmlu shots=5")
    exported = sorted((tmp_path / "lm_eval/run").rglob("results_mmlu-*.json"))
    assert len(exported) == 2
    assert all(json.loads(p.read_text())["results"]["mmlu"]["acc,none"] == 0.5 for p in exported)
    assert [record["evaluation"] for record in logged] == ["mmlu_shots=5"]  # a curve of its own
    assert len(results.load_records(tmp_path)) == 2  # lm_eval/ holds no records

"""A sweep asked later for more of what is done: given from what is there, or evaluated again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import small_mmlu
from small_sweeps import numbers, run_sweep

import results
from sweeping import ledger
from tasks import drawing as drawing_room


@pytest.fixture
def ask(run_dir, data, tmp_path, capsys):
    """ask(evaluations, *flags): (what was said, the records) of a sweep of one checkpoint."""
    shutil.rmtree(run_dir / "checkpoint-20"), shutil.rmtree(run_dir / "checkpoint-30")

    def sweep(evaluations, *more):
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(evaluations))
        code, records = run_sweep(run_dir, data, "--evaluations", str(tmp_path / "e.yaml"), *more)
        assert code == 0
        return capsys.readouterr().out, records

    return sweep


def drawing(data, **more):
    flags = {"data-path": str(data / "problems.jsonl"), "num-samples": 6, "temperature": 0.9}
    return {"humaneval": flags | {"max-new-tokens": 3, "workers": 1} | more}


def test_more_k_are_counted_from_what_was_drawn(ask, data, monkeypatch):
    _, [before] = ask(drawing(data))
    assert list(before["metrics"]) == ["pass@1"]
    # as if two of the first task's six samples had passed, and all of the second's
    arrays, samples = results.load_arrays(before), results.load_samples(before)
    arrays["c"][:2] = 2, 6
    results.save_record(Path(before["_path"]).parents[2], before, arrays, samples)
    monkeypatch.setattr(drawing_room, "draw", lambda *_: pytest.fail("drew again"))
    said, [after] = ask(drawing(data, k=[5, 2]))
    assert "humaneval: pass@2, pass@5 added" in said and "1 of those done before" in said
    assert list(after["metrics"]) == ["pass@1", "pass@2", "pass@5"]
    for k in (2, 5):  # Chen et al. (2021), by counting: no draw of k without a passing one
        misses = [np.prod([(6 - c - i) / (6 - i) for i in range(k)]) for c in (2, 6, 0)]
        assert after["metrics"][f"pass@{k}"]["value"] == pytest.approx(1 - np.mean(misses))
        assert results.load_arrays(after)[f"pass@{k}"] == pytest.approx(1 - np.array(misses))
        assert after["examples"]["scores"][f"pass@{k}"] == f"pass@{k}"
    for name in ("resume_key", "config_hash", "protocol", "cost", "checkpoint"):
        assert after[name] == before[name]
    assert results.load_samples(after) == samples
    for k in ({"k": [5]}, {"k": [2, 5]}, {}):
        assert "nothing was left to do" in ask(drawing(data, **k))[0]


def test_counts_that_are_lost_are_made_again(ask, data):
    _, [before] = ask(drawing(data))
    Path(before["_path"]).with_suffix(".npz").unlink()
    said, [after] = ask(drawing(data, k=[2]))
    assert "done again: " in said and "1 made, 0 done before" in said
    assert list(after["metrics"]) == ["pass@1", "pass@2"] and results.load_arrays(after)


def test_samples_that_were_not_kept_are_made_again(ask, data, tmp_path):
    small_mmlu(tmp_path / "mmlu", ["anatomy"])
    both = {
        "mmlu": {"data-path": str(tmp_path / "mmlu"), "num-few-shot": 1},
        "perplexity": {"data-mode": "fineweb_npy", "val-npy": str(data / "x.npy"), "seq-len": 32},
    }
    _, before = ask(both)
    assert [results.load_samples(r) for r in before] == [[], []]
    said, after = ask(both, "--log-samples")  # perplexity has none to keep
    assert "1 made, 1 done before" in said and "mmlu: done again" in said
    assert numbers(after) == numbers(before)
    (mmlu,) = (r for r in after if r["evaluation"] == "mmlu")
    assert len(results.load_samples(mmlu)) == 9
    for more in (["--log-samples"], []):
        assert "nothing was left to do" in ask(both, *more)[0]


def test_another_run_name_gets_a_copy(ask, data):
    said, [first] = ask(drawing(data))
    said, [copy, again] = ask(drawing(data), "--run-name", "named")
    assert "humaneval: copied from run run" in said and "0 made, 1 done before" in said
    assert again == first and copy["run"] == "named"
    for name in set(first) - {"run", "_path"}:
        assert copy[name] == first[name], name
    assert results.load_samples(copy) == results.load_samples(first)
    assert "nothing was left to do" in ask(drawing(data), "--run-name", "named")[0]
    said, records = ask(drawing(data, k=[3]), "--run-name", "third")
    assert "copied from run " in said and "pass@3 added" in said
    assert [len(r["metrics"]) for r in records] == [1, 1, 2]


def test_a_tracker_asked_for_later_gets_what_is_there_once(ask, data, monkeypatch):
    sent = []
    trackers = {"here": lambda record: sent.append((record["run"], record["evaluation"]))}
    ask(drawing(data))
    monkeypatch.setattr(ledger, "open_trackers", lambda *asked: dict(trackers))
    said, _ = ask(drawing(data))
    assert sent == [("run", "humaneval")] and "humaneval: sent to the trackers" in said
    assert "nothing was left to do" in ask(drawing(data))[0] and len(sent) == 1
    ask(drawing(data), "--force")
    assert len(sent) == 2  # made anew
    trackers["there"] = trackers["here"]
    ask(drawing(data))
    assert len(sent) == 3  # to the one that does not have it

    def fails(record):
        raise ConnectionError("the network is\x1b[2J away")

    trackers["far"] = fails
    said, _ = ask(drawing(data))
    assert "far: not sent: [Errno" in said or "far: not sent: the network" in said
    assert "\x1b" not in said
    trackers["far"] = trackers["here"]
    ask(drawing(data))
    assert len(sent) == 4


def test_exports_asked_for_later_are_written(ask, data, run_dir):
    ask(drawing(data))
    ask(drawing(data), "--lm-eval-json", "--run-name", "named")
    found = (run_dir.parent / "results/lm_eval").rglob("results_humaneval-*.json")
    told = [json.loads(path.read_text())["results"]["humaneval"] for path in found]
    assert len(told) == 2 and told[0] == told[1]

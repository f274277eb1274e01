"""sweeping/trackers.py: every number of a record goes out under its stable name, by step."""

import sys
import types
from pathlib import Path

import pytest

import results
from sweeping.trackers import Trackers, open_trackers


def record(run, step):
    return results.new_record(
        "mmlu",
        {"accuracy": results.metric(step / 100, 0.1, 7)},
        {},
        run=run,
        checkpoint={"name": f"c-{step}", "fingerprint": "f" * 64, "step": step, "tokens": 5 * step},
        breakdown={"subject": {"anatomy": {"accuracy": results.metric(0.5, 0.2, 3)}}},
        cost={"seconds": 1.5},
    )


RECORDS = [record("a", 20), record("b", 10), record("a", 10)]


def test_tensorboard_gets_the_numbers_by_run_and_step(monkeypatch, tmp_path):
    logged, opened, flushed = [], [], []

    class Writer:
        def __init__(self, folder):
            self.run = Path(folder).name
            opened.append(folder)

        def add_scalar(self, name, value, step):
            logged.append((self.run, name, value, step))

        def flush(self):
            flushed.append(self.run)

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    [log] = open_trackers(str(tmp_path), None).values()
    for each in RECORDS:
        log(each)
    assert opened == [str(tmp_path / "a"), str(tmp_path / "b")] and flushed == ["a", "b", "a"]
    wanted = [
        (each["run"], name, value, each["checkpoint"]["step"])
        for each in RECORDS
        for name, value in results.scalars(each).items()
    ]
    assert logged == wanted and ("a", "mmlu/subject/anatomy/accuracy", 0.5, 20) in logged


def test_wandb_gets_the_step_as_a_number_among_the_others(monkeypatch):
    """Checkpoints may come in any order, which its own step would not allow."""
    logged, opened = [], []

    class Run:
        def __init__(self, **about):
            self.name = about["name"]
            opened.append((about["project"], about["id"], about["resume"]))

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            logged.append((self.name, values))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    [log] = open_trackers(None, "project").values()
    for each in RECORDS:
        log(each)
    assert opened == [("project", "eval-a", "allow"), ("project", "eval-b", "allow")]
    assert logged == [
        (
            f"eval-{each['run']}",
            results.scalars(each) | {"step": step, "tokens": 5 * step},
        )
        for each in RECORDS
        for step in [each["checkpoint"]["step"]]
    ]


def test_none_is_asked_for():
    assert open_trackers(None, None) == {}


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(monkeypatch, flag):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    board, project = ("x", None) if flag == "tensorboard" else (None, "x")
    with pytest.raises(ValueError, match=f"--{flag} needs the package: pip install {flag}"):
        open_trackers(board, project)


def of(path, step, key):
    """A record of a checkpoint at `path`, whose run is called like its directory."""
    info = {"path": path, "name": "c", "fingerprint": key * 64, "step": step}
    run = Path(path).parent.name
    made = results.new_record("mmlu", {}, {}, run=run, checkpoint=info, data={"hash": key})
    return made


def test_what_was_sent_is_remembered_and_experiments_of_one_name_are_two_runs(tmp_path):
    """And no run changes its name when another one comes."""
    sent = []

    def trackers():
        log = lambda record: sent.append((record["run"], record["checkpoint"]["step"]))  # noqa: E731
        return Trackers(tmp_path / "sent.jsonl", {"here": log})

    one, two = (of(f"{d}/run/c", 1, d[-1]) for d in ("expA", "expB"))
    first = trackers()
    assert [first.send(r, "mmlu") for r in (one, two, one)] == [1, 1, 0]
    assert sent == [("run", 1), ("expB/run", 1)]
    with open(tmp_path / "sent.jsonl", "ab") as memory:
        memory.write(b'\n["here", "torn')
    later = trackers()
    more = [of(f"/x/{d}/run/c", 2, d[-1].lower()) for d in ("expB", "expA", "expC")]
    assert [later.send(r, "mmlu") for r in (one, two, *more)] == [0, 0, 1, 1, 1]
    assert sent[2:] == [("expB/run", 2), ("run", 2), ("expC/run", 2)]
    assert later.send(one, "mmlu shots=5") == later.send(one, "mmlu", again=True) == 1
    assert trackers().send(more[0], "mmlu") == 0

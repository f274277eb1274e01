"""The log: which steps are written, what a resumed run keeps, and whose time counts."""

import json
import math

import pytest
import torch
from builders import set_clock

from distributed import Dist
from training import log as module
from training.log import Log

ALONE = Dist(0, 1, 0, torch.device("cpu"))


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when the test says so: clock[0] seconds."""
    now = [100.0]
    set_clock(monkeypatch, module, perf_counter=lambda: now[0])
    return now


def take_steps(log, clock, steps, seconds=2.0):
    for step in steps:
        clock[0] += seconds
        log.step(step, torch.tensor(1.0 / step), torch.tensor(0.5), 0.1)


def test_every_third_step_and_the_last(tmp_path, clock, capsys):
    log = Log(tmp_path / "log.jsonl", range(7), 3, 100, ALONE)
    take_steps(log, clock, range(1, 8))
    log.validation(7, 2.0)
    *steps, validation = entries(tmp_path / "log.jsonl")
    assert [e["step"] for e in steps] == [3, 6, 7] and validation == {"step": 7, "val_loss": 2.0}
    assert steps[0] == {
        "step": 3,
        "loss": pytest.approx(1 / 3),
        "lr": 0.1,
        "grad_norm": 0.5,
        "tokens_per_second": 50.0,
    }
    said = capsys.readouterr().out
    assert "step 3/7  loss 0.3333" in said and f"val_ppl {math.exp(2):.4f}" in said


def test_time_that_is_no_training_does_not_count(tmp_path, clock):
    """Also where validation falls between two lines."""
    log = Log(tmp_path / "log.jsonl", range(6), 3, 100, ALONE, mfu=lambda seconds: 1 / seconds)
    take_steps(log, clock, range(1, 6))
    clock[0] += 1000
    log.restart_clock(5)
    take_steps(log, clock, [6])
    assert [e["tokens_per_second"] for e in entries(tmp_path / "log.jsonl")] == [50.0, 50.0]
    assert [e["mfu"] for e in entries(tmp_path / "log.jsonl")] == [0.5, 0.5]


def test_a_resumed_run_writes_its_steps_again(tmp_path, clock):
    path = tmp_path / "log.jsonl"
    take_steps(Log(path, range(5), 1, 100, ALONE), clock, range(1, 6))
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')  # what a kill tears
    tracked = []
    sent_to = {"here": lambda numbers, step: tracked.append((step, numbers["train/lr"]))}
    log = Log(path, range(4, 6), 1, 100, ALONE, sent_to=sent_to)
    assert [e["step"] for e in entries(path)] == [1, 2, 3, 4]
    take_steps(log, clock, range(5, 7))
    assert [e["step"] for e in entries(path)] == [1, 2, 3, 4, 5, 6] and tracked == [
        (5, 0.1),
        (6, 0.1),
    ]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, clock):
    log = Log(tmp_path / "log.jsonl", range(2), 1, 100, ALONE)
    clock[0] += 1
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        log.step(1, torch.tensor(float("nan")), torch.tensor(1.0), 0.1)


def test_a_tracker_that_fails_costs_no_step(tmp_path, clock, capsys):
    def fails(numbers, step):
        raise ConnectionError("no route")

    log = Log(tmp_path / "log.jsonl", range(2), 1, 100, ALONE, sent_to={"wandb x": fails})
    take_steps(log, clock, [1, 2])
    assert len(entries(tmp_path / "log.jsonl")) == 2
    assert capsys.readouterr().out.count("wandb x: not sent: no route") == 2

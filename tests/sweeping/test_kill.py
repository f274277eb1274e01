"""sweep.py on several ranks: an error of one of them, and kill -9 at any moment."""

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from builders import (
    CONFIGS,
    PATIENCE,
    command,
    descendants,
    is_there,
    run_ranks,
    started,
    torchrun,
    wait_for,
)
from small_sweeps import expected, flags, numbers, start_words

import results

LONELY = """
for error, patience in (("all", builders.PATIENCE), ("alone", 1.0)):
    dist.barrier()  # a slow machine: neither patience starts before both ranks are here
    try:
        if error == "all" or dist.rank == 1:
            raise RuntimeError(error)
        dist.sum([1.0])
    except RuntimeError as e:
        dist.agree_on_error(e, patience)
        say("agreed", e)
"""


def test_an_error_of_one_rank_ends_the_run_and_an_error_of_all_does_not(tmp_path):
    out = run_ranks(2, tmp_path, LONELY, code=1)
    assert out.stdout.count("agreed all") == 2 and "agreed alone" not in out.stdout


def reach_a_moment(rng, results_dir, sweeper, everything: int) -> None:
    """Wait until a sweep that has just been started is somewhere in its work: workers started, a
    lease taken, a record or two written. What it wrote tells, not the time."""

    def leases():
        files = (results_dir / ".leases").glob("*")
        return {file: read_if_there(file) for file in files}

    def records():
        return len(list(results_dir.glob("*/*/*.json")))

    beats, before = leases(), records()
    reached = {
        "started": lambda: descendants(sweeper.pid),
        "working": lambda: leases().items() - beats.items(),  # a dead sweep's do not change
        "a record": lambda: records() > before,
        "two records": lambda: records() > before + 1,
    }
    moment = reached[rng.choice(sorted(reached))]
    wait_for(lambda: moment() or records() == everything or sweeper.poll() is not None)


def read_if_there(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def kill(process, rng) -> list[int]:
    """kill -9 of everything, of torchrun alone or of one worker alone. Returns who was there."""
    workers = descendants(process.pid)
    victims = rng.choice([[process.pid, *workers], [process.pid], workers[:1], workers[-1:]])
    for pid in victims or [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(PATIENCE)
    return workers


def battery(tmp_path, data, n_kills, n_steps, seed):
    """A training run, and beside it a sweep of two ranks that is killed again and again."""
    rng, run_dir = random.Random(seed), tmp_path / "run"
    train = command(0, "train.py", "--device", "cpu", "--tokenizer-name", "byte")
    train += ["--data-mode", "fineweb_npy", "--train-npy", str(data / "x.npy"), "--log-steps", "5"]
    for name in ("max_position_embeddings", "n_layers", "n_heads", "d_model", "d_ff"):
        train += [f"--{name.replace('_', '-')}", str(getattr(CONFIGS["gpt"], name))]
    train += ["--seq-len", "256", "--batch-size", "1", "--checkpoint-path", str(run_dir)]
    train += ["--num-steps", str(n_steps), "--save-steps", "2", "--warmup-steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    watch = ["--watch", "--newest-first"]
    watching = start_words(run_dir, data, *watch, ranks=2)
    left, steps = set(), range(2, n_steps + 1, 2)
    with started(train, **quiet) as trainer:
        for _ in range(n_kills):
            with started(watching, **quiet) as sweeper:
                reach_a_moment(rng, tmp_path / "results", sweeper, 2 * len(steps))
                left.update(kill(sweeper, rng))
        assert trainer.wait(PATIENCE) == 0
    last = flags(run_dir, data, "results", *watch, "--until-step", n_steps, "--lease-seconds", 20)
    torchrun(2, "sweep.py", *last, cold=True)
    # whose torchrun died before they had found it give up after distributed.CONNECT_TIMEOUT, two
    # minutes; torch's pauses between its tries grow, and the last one may end after twice that
    wait_for(lambda: not any(map(is_there, left)))
    skipped = []
    survived = results.load_records(tmp_path / "results", skipped)
    assert not skipped and numbers(survived).keys() == expected(steps)
    torchrun(0, "sweep.py", *flags(run_dir, data, "clean"))
    assert numbers(survived) == numbers(results.load_records(tmp_path / "clean"))
    assert not any((tmp_path / "results/.leases").iterdir())


def test_a_watching_sweep_killed_beside_a_training_run_equals_a_clean_one(tmp_path, data):
    """Two ranks, thrice killed, against one rank never killed: the same bits."""
    battery(tmp_path, data, n_kills=3, n_steps=12, seed=0)


@pytest.mark.slow
def test_a_sweep_killed_fifty_times(tmp_path, data):
    battery(tmp_path, data, n_kills=50, n_steps=60, seed=1)

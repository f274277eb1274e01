"""A program and its tests, the tiers that this machine gives, and sandboxes in a hurry."""

from pathlib import Path

import pytest
from builders import PATIENCE

from sandbox import judge

HONEST = "def solve(x):\n    return x + 1\n"
ENDLESS = "def solve(x):\n    while True: pass\n"
TEST = "def check(candidate):\n    assert candidate(1) == 2\n"
# Tests may write their folder: they say there that they run, and wait for a word.
WAITING = """
import os, time
def check(candidate):
    assert candidate(1) == 2
    open("here", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
"""


def folders(sandbox) -> list[Path]:
    """Where the tests of each worker may write."""
    return [Path(worker.config["folder"]) for worker in sandbox._workers]


def available(tier: str) -> bool:
    try:
        with judge.Sandbox(workers=1, tier=tier, timeout=PATIENCE):
            return True
    except ValueError:
        return False


TIERS = [tier for tier in judge.TIERS if available(tier)]
# for what takes seconds: the best one, and the others with --slow
BEST_TIER = [*TIERS[:1], *(pytest.param(tier, marks=pytest.mark.slow) for tier in TIERS[1:])]


def in_a_hurry(timeout: float, workers: int = 1) -> judge.Sandbox:
    """A sandbox with little time, for programs that are to run out of it."""
    return judge.Sandbox(workers, timeout, tier=TIERS[0])


def verdict_in_a_hurry(sandbox, program: str, test: str = TEST, unlike=("sandbox",)):
    """The first verdict of another kind: an honest one may run out of it on a busy machine."""
    for attempt in range(20):
        verdict = sandbox.judge("", f"{program}# {attempt}\n", test, "solve")
        if verdict.kind not in unlike:
            break
    return verdict

"""canary.py: it tries in earnest, sees what a cage lets through, and is content with each tier."""

import contextlib
import signal

import pytest
from builders import PATIENCE
from small_programs import TIERS

from sandbox import canary, judge, linux, worker

CONFIG = {"timeout": PATIENCE, "grace": 5.0, "memory_mb": 1024, "packages": {}}


@contextlib.contextmanager
def judging(**config):
    """A worker.Judge in this process."""
    old = signal.getsignal(signal.SIGALRM)
    tests = worker.Judge(CONFIG | config)
    try:
        yield tests
    finally:
        tests.close()
        signal.signal(signal.SIGALRM, old)


def test_without_a_cage_almost_every_attempt_succeeds():
    """So each is a real one, and fails elsewhere for no other reason than the cage."""
    with judging(tier="none") as tests:
        seen = canary.try_all(tests, CONFIG | {"tier": "none"})
        failing = {name for name, how in seen["forbidden"].items() if how != "succeeded"}
        # A limit that holds there too; what only root may; what a file system may not have.
        assert failing - {
            "read the judge's memory",
            "read the judge's environment",
            "change a file's attributes",
            "write an unnamed file",
        } == {"exceed its memory"}
        for tier in judge.TIERS:
            with pytest.raises(OSError, match=r"canary: could (read a file|be root)"):
                canary.run_canary(tests, CONFIG | {"tier": tier})
        assert canary.run_canary(tests, CONFIG | {"tier": "none"}) == []


def test_each_thing_that_succeeds_is_named(monkeypatch):
    tests = type("Tests", (), {"active": []})
    seen = {"import": "succeeded", "scratch": "succeeded", "packages": {"a": "succeeded"}}
    seen |= {"packages": {"a": "succeeded", "b": "ImportError"}, "uid": 1}
    actions = ["read a file", "fork", "empty a file by name"]
    closed = dict.fromkeys(actions, "PermissionError")

    def run(tier="C", **changes):
        monkeypatch.setattr(canary, "try_all", lambda *_: seen | {"forbidden": closed} | changes)
        return canary.run_canary(tests, CONFIG | {"tier": tier})

    assert run() == ["a"]
    for action in actions:
        with pytest.raises(OSError, match=f"canary: could {action}"):
            run(forbidden=closed | {action: "succeeded"})
    assert run("A", forbidden=closed | {"fork": "succeeded"}) == ["a"]
    with pytest.raises(OSError, match="could not import from the standard library"):
        run(**{"import": "PermissionError"})
    with pytest.raises(OSError, match="could not write to its scratch"):
        run(scratch="FileNotFoundError")
    tests.active = ["no scratch"]
    assert run(scratch="FileNotFoundError") == ["a"]


@pytest.mark.skipif("C" not in TIERS, reason="tier C is not available here")
@pytest.mark.parametrize("abi", [1, 2, 3])
def test_tier_c_holds_under_older_landlocks(abi):
    if linux.landlock_abi() < abi:
        pytest.skip("this kernel is older still")
    _, spare = linux.spare_ids() or (None, None)
    config = {"tier": "C", "landlock": abi, "spare": spare}
    with judging(**config) as tests:
        assert f"Landlock {abi}" in tests.active
        canary.run_canary(tests, CONFIG | config)

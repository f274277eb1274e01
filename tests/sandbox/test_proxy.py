"""proxy.py: tests that swallow whatever ends a judgement make no pass of it."""

import pytest
from small_programs import in_a_hurry

# Tests that hold every exception, or let it end in another thread.
SWALLOWING = {
    "a bare except": """
def check(candidate):
    try:
        assert candidate(1) == 2
    except:
        pass
""",
    "suppress": """
import contextlib
def check(candidate):
    with contextlib.suppress(BaseException):
        candidate(1)
""",
    "finally and return": """
def check(candidate):
    try:
        candidate(1)
    finally:
        return
""",
    "assertRaises": """
import unittest
def check(candidate):
    with unittest.TestCase().assertRaises(BaseException):
        candidate(1)
""",
    "a manager's exit": """
class Holding:
    def __enter__(self):
        return self
    def __exit__(self, *error):
        return True
def check(candidate):
    with Holding():
        candidate(1)
""",
    "a finaliser": """
def check(candidate):
    class Last:
        def __del__(self):
            candidate(1)
    Last()
""",
    "a generator": """
def check(candidate):
    def answers():
        try:
            yield candidate(1)
        except BaseException:
            yield 2
    assert 2 in list(answers())
""",
    "a thread": """
import threading
def check(candidate):
    thread = threading.Thread(target=candidate, args=(1,))
    thread.start()
    thread.join()
""",
    "a thread that is left": """
import threading
def check(candidate):
    threading.Thread(target=candidate, args=(1,), daemon=True).start()
""",
    "a pool": """
from concurrent.futures import ThreadPoolExecutor
def check(candidate):
    with ThreadPoolExecutor(2) as pool:
        pool.submit(candidate, 1).exception()
""",
    "trying on for ever": """
def check(candidate):
    while True:
        try:
            candidate(1)
            return
        except BaseException:
            continue
""",
    "never calling": """
def check(candidate):
    assert callable(candidate)
""",
}
# What ends a judgement, and the verdict that it must be.
ENDING = {
    "exit": ("crash", "import os\ndef solve(x):\n    os._exit(0)\n"),
    "exit while loading": ("crash", "import os\ndef solve(x):\n    return 2\nos._exit(0)\n"),
    "a segmentation fault": ("crash", "import ctypes\ndef solve(x):\n    ctypes.string_at(0)\n"),
    "an endless loop": ("timeout", "def solve(x):\n    while True: pass\n"),
    "an endless start": ("timeout", "while True: pass\n"),
    "a huge answer": ("sandbox", "def solve(x):\n    return bytes(65 << 20)\n"),
    "a malformed answer": (
        "sandbox",
        "import os\ndef solve(x):\n    os.write(4, b'\\2\\0\\0\\0zz')\n    while True: pass\n",
    ),
    "an answer out of form": (
        "sandbox",
        "import os\ndef solve(x):\n    os.write(4, b'\\1\\0\\0\\0N')\n    while True: pass\n",
    ),
    "too much memory": ("memory", "def solve(x):\n    return bytearray(1 << 40)\n"),
    "a program that fails": ("exception", "def solve(x):\n    return 2\nraise ValueError\n"),
    "a program without it": ("exception", "def other(x):\n    return 2\n"),
    "no program": ("syntax error", "def solve(x: return 2\n"),
}
WHEN_CALLED = {"exit", "a segmentation fault", "an endless loop", "a huge answer"}
WHEN_CALLED |= {"a malformed answer", "an answer out of form", "too much memory"}


def not_as_wanted(cases):
    """Those whose verdict is another kind, and not for a machine too busy to give them a second or
    to start a worker in time."""
    with in_a_hurry(1.0, workers=2) as sandbox:
        programs = [("", ENDING[end][1], SWALLOWING[hold], "solve") for end, hold in cases]
        verdicts = dict(sandbox.judge_many(programs))
    wrong = []
    for i, (end, hold) in enumerate(cases):
        wanted = ENDING[end][0]
        if hold == "never calling" and end in WHEN_CALLED:
            wanted = "passed"
        lost = verdicts[i].detail.startswith(("canary: timeout", "the judge process ended"))
        if verdicts[i].kind not in (wanted, "timeout") and not lost:
            wrong.append(f"{end} under {hold}: {verdicts[i]}")
    return wrong


def test_a_stop_that_tests_swallow_is_the_verdict_all_the_same():
    cases = [("a malformed answer", hold) for hold in SWALLOWING]
    cases += [(end, "a bare except") for end in ENDING] + [(end, "a thread") for end in ENDING]
    cases += [(end, "never calling") for end in ENDING]
    cases += [("an endless loop", "trying on for ever"), ("exit", "a thread that is left")]
    assert not_as_wanted(cases) == []


@pytest.mark.slow
def test_every_stop_under_all_that_swallows():
    assert not_as_wanted([(end, hold) for end in ENDING for hold in SWALLOWING]) == []


def test_what_a_candidate_raises_is_no_stop(sandbox):
    """A test that wants it may catch even what ends a program; the next call is answered."""
    program = "def solve(x):\n    if x:\n        raise eval(x)\n    return 2\n"
    test = """
def check(candidate):
    for name in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "TypeError", "StopIteration"):
        try:
            candidate(name)
        except BaseException as error:
            assert type(error).__name__ == name
            assert candidate("") == 2
"""
    assert sandbox.judge("", program, test, "solve").passed
    for name in ("SystemExit", "GeneratorExit"):
        uncaught = f"def check(candidate):\n    candidate({name!r})\n"
        verdict = sandbox.judge("", program, uncaught, "solve")
        assert (verdict.kind, verdict.detail) == ("exception", name)


def test_a_stop_iteration_ends_no_loop_of_tests_that_do_not_name_it(sandbox):
    program = "def solve(x):\n    return next(iter(x))\n"
    test = "def check(candidate):\n    assert all(map(candidate, [[1], [], [0]]))\n"
    verdict = sandbox.judge("", program, test, "solve")
    assert (verdict.kind, verdict.detail) == ("exception", "StopIteration")


def test_a_worker_whose_tests_leave_a_thread_is_replaced(sandbox):
    """Else the thread would go on beside the next program's tests."""
    test = """
import threading, time
def check(candidate):
    assert candidate(1) == 2
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
"""
    program = "def solve(x):\n    return x + 1\n"
    threads = "import _thread\ndef check(candidate):\n    assert candidate(_thread._count()) == 1\n"
    for i in range(4):
        assert sandbox.judge("", f"{program}# {i}", test, "solve").passed
        assert sandbox.judge("", f"{program}# {i}", threads, "solve").passed


def test_threads_of_the_tests_take_turns(sandbox):
    test = """
from concurrent.futures import ThreadPoolExecutor
def check(candidate):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(candidate, range(200))) == list(range(1, 201))
"""
    assert sandbox.judge("", "def solve(x):\n    return x + 1\n", test, "solve").passed

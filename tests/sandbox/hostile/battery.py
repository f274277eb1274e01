"""Runs the programs of programs.txt through a Sandbox and checks the world after each.

    python battery.py FOLDER '{"tier": "C", "timeout": 0.6, "only": ""}'

FOLDER holds sandbox/. Standard library only, so that any user's interpreter can run it. Prints a
JSON object: tier, uid, ran, seconds and a list of failures.
"""

import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELUDE = """import ctypes, gc, os, signal, sys, time
OUTSIDE, EVALUATOR, PORT, ABSTRACT = {outside!r}, {pid}, {port}, {abstract!r}
libc = ctypes.CDLL(None)
def breach(what):
    raise RuntimeError("BREACH: " + what)
"""
HONEST = "def solve(x):\n    return x + 1\n"
HONEST_TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n"
WAITING_TEST = """
import os, time
def check(candidate):
    assert candidate(1) == 2
    open("here", "w").close()
    while os.path.exists("here"):
        time.sleep(0.01)
"""
PATIENCE = 600  # seconds that nothing honest takes, on a busy machine either


def programs():
    """Yield (name, allowed verdict kinds, source)."""
    text = (Path(__file__).parent / "programs.txt").read_text()
    for section in text.split("\n### ")[1:]:
        head, _, source = section.partition("\n")
        name, _, kinds = head.rpartition(": ")
        for mark, value in {
            "<NUL>": "\0",
            "<NEST>": "(" * 10000 + "1" + ")" * 10000,
            "<CHAIN>": "+".join(["1"] * 500000),
            "<INDENT>": "".join(" " * i + "if 1:\n" for i in range(200)),
            "<SURROGATE>": "\ud800",
        }.items():
            source = source.replace(mark, value)
        yield name, [kind.strip() for kind in kinds.split(",")], source


def descendants():
    """Every process below this one; orphans too, since this one adopts them."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as f:
                    state, parent = f.read().rpartition(")")[2].split()[:2]
                if state != "Z":  # dead; nobody here waits for those adopted
                    parents[int(entry)] = int(parent)
            except OSError:
                continue  # it ended meanwhile
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def wait_until(condition):
    """Until condition() holds, for as long as PATIENCE; whether it does."""
    end = time.monotonic() + PATIENCE
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return holds


def snapshot(folder):
    """Names, contents and attributes of a folder."""
    seen = [(str(folder), os.lstat(folder).st_mtime_ns)]
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        seen.append((str(path), about.st_mode, about.st_uid, about.st_mtime_ns, content))
    return seen


class World:
    """What candidates must not touch, and whether they did."""

    def __init__(self):
        self.number, self.token = secrets.randbelow(10**12) + 10**6, secrets.token_hex(16)
        os.environ["HF_TOKEN"] = self.token  # before any Sandbox starts
        self.folder = Path(tempfile.mkdtemp(prefix="roseval-hostile-"))
        self.folder.chmod(0o777)
        for name in ("secret", "victim"):
            (self.folder / name).write_text(self.token)
            (self.folder / name).chmod(0o666)
        abstract = "roseval-" + secrets.token_hex(4)
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        self.listeners += [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        self.listeners.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        port = self.listeners[0].getsockname()[1]
        self.listeners[1].bind(str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        self.listeners[2].bind("\0" + abstract)
        self.listeners[3].bind(("127.0.0.1", port))
        for listener in self.listeners:
            listener.setblocking(False)
        self.bystander = subprocess.Popen(["sleep", "3600"])
        self.files, self.processes = snapshot(self.folder), None
        self.prompt = PRELUDE.format(
            outside=str(self.folder), pid=os.getpid(), port=port, abstract=abstract
        )
        self.test = (
            f'METADATA = {{"METADATA_OF_TESTS": "{self.token}"}}\nWANTED = {self.number}\n'
            "def check(candidate):\n"
            "    assert candidate(1) == 1 + WANTED\n    assert candidate(2) == 2 + WANTED\n"
        )

    def complaints(self):
        """What is not as it was: a list of texts."""
        found = []
        if not wait_until(lambda: len(descendants()) == self.processes):
            now = len(descendants())
            found.append(f"{now} processes instead of {self.processes}")
            self.processes = now  # said once
        if snapshot(self.folder) != self.files:
            found.append("files outside were touched")
        if self.bystander.poll() is not None:
            found.append("a bystander was killed")
        for path in ("/tmp/roseval-breach", "/dev/shm/x", "/var/tmp/x"):
            if os.path.exists(path):
                found.append(f"{path} was written")
        for listener in self.listeners:
            try:
                (listener.accept if listener is self.listeners[0] else listener.recvfrom)(
                    *([] if listener is self.listeners[0] else [1])
                )
            except BlockingIOError:
                continue
            found.append("something arrived at a socket")
        return found

    def close(self):
        self.bystander.kill()
        self.bystander.wait()
        for listener in self.listeners:
            listener.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def count_processes(sandbox):
    """How many processes a sandbox of one worker has: seen while its tests wait for us."""
    here = Path(sandbox._workers[0].config["folder"]) / "here"
    future = sandbox.submit("", HONEST, WAITING_TEST, "solve")
    assert wait_until(here.exists), "the first honest program does not run"
    count = len(descendants())
    here.unlink()
    assert future.result().passed
    return count


def is_of_a_busy_machine(verdict):
    """Whether it may be one of a program that was not given its time."""
    lost = "the judge process ended"
    return verdict.kind == "timeout" or (
        verdict.kind == "sandbox" and verdict.detail.startswith(lost)
    )


def judge_honest(sandbox, name):
    """An honest program's verdict."""
    for attempt in range(20):
        verdict = sandbox.judge("", f"{HONEST}# {name}, {attempt}", HONEST_TEST, "solve")
        if not is_of_a_busy_machine(verdict):
            break
    return verdict


def complaints_of(world, name, kinds, source, hostile, patient):
    """Run one program and check the world after it: what is wrong, and the verdict."""
    passes = kinds == ["passed"]
    sandbox, test = (patient, HONEST_TEST) if passes else (hostile, world.test)
    verdict = sandbox.judge(world.prompt, source, test, "solve")
    busy = is_of_a_busy_machine(verdict)
    if busy and verdict.kind == "sandbox":
        judge_honest(hostile, f"before {name}")  # so that it has a worker again
    if busy and kinds != ["*"] and verdict.kind not in kinds:
        verdict = patient.judge(world.prompt, source, test, "solve")
    wrong = world.complaints()
    if verdict.passed != passes or not (verdict.kind in kinds or kinds == ["*"]):
        wrong.append(f"{verdict.kind} ({verdict.detail}) instead of {', '.join(kinds)}")
    if "BREACH" in verdict.detail:
        wrong.append(verdict.detail)
    if world.token in verdict.detail or str(world.number) in verdict.detail:
        wrong.append("a secret came out")
    after = judge_honest(hostile, name)
    if not after.passed:
        wrong.append(f"the next honest program: {after.kind} ({after.detail})")
    return wrong, verdict


def judge_all(world, config):
    """Run every program and check the world after it; (tier, count, failures)."""
    from sandbox.judge import Sandbox

    ran, failures = 0, []
    options = {"workers": 1, "tier": config["tier"]}
    with Sandbox(timeout=PATIENCE, **options) as patient:
        in_one = count_processes(patient) - 1  # less the bystander
        with Sandbox(timeout=config["timeout"], **options) as hostile:
            world.processes = 1 + 2 * in_one  # each has its next candidate waiting
            assert judge_honest(hostile, "first").passed
            for name, kinds, source in programs():
                if config.get("only", "") not in name:
                    continue
                ran += 1
                wrong, verdict = complaints_of(world, name, kinds, source, hostile, patient)
                if config.get("verbose"):
                    print(f"{name}: {verdict.kind}, {verdict.detail}", file=sys.stderr)
                failures += [f"{name}: {text}" for text in wrong]
            tier = hostile.tier
    if not wait_until(lambda: not descendants() - {world.bystander.pid}):
        left = descendants() - {world.bystander.pid}
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]
        failures.append(f"{len(left)} processes outlive the sandbox: {commands}")
    return tier, ran, failures


def main():
    sys.path.insert(0, sys.argv[1])
    config = json.loads(sys.argv[2])
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # adopt orphans, so that none escapes the count
    started, world = time.monotonic(), World()
    try:
        tier, ran, failures = judge_all(world, config)
    finally:
        world.close()
    report = {"tier": tier, "uid": os.getuid(), "ran": ran, "failures": failures}
    print(json.dumps({**report, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()

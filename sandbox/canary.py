"""The canary: a tier counts only if what it should stop is seen to fail.

A program that tries what a candidate must not do, and what it must be able to do, is judged in the
cage like any other; what it says of each attempt decides. worker.py runs it before all others.
"""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox import linux

SECONDS = 60.0  # that nothing here takes, on a busy machine either

_CANARY = """
import os, socket, tempfile

def attempt(action):
    try:
        action()
    except (OSError, MemoryError, ImportError, AttributeError) as e:
        return type(e).__name__
    return "succeeded"

def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def create(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT))

def open_once(path, flags):
    os.close(os.open(path, flags))

def use_scratch():
    with tempfile.TemporaryFile() as f:
        f.write(b"x" * 1000)

def canary(folder, pid, port, memory, abstract, packages):
    victim = folder + "/victim"
    forbidden = {
        "read a file": lambda: open_once(folder + "/secret", os.O_RDONLY),
        "list a folder": lambda: os.listdir(folder),
        "write a file": lambda: create(folder + "/written"),
        "write to a file": lambda: open_once(victim, os.O_WRONLY),
        "append to a file": lambda: open_once(victim, os.O_WRONLY | os.O_APPEND),
        "empty a file by opening it": lambda: open_once(victim, os.O_RDONLY | os.O_TRUNC),
        "empty a file without a right": lambda: open_once(victim, 3 | os.O_TRUNC),
        "empty a file by name": lambda: os.truncate(victim, 0),
        "change a file's times": lambda: os.utime(victim, (1, 1)),
        "change a file's mode": lambda: os.chmod(victim, 0o666),
        "change a file's owner": lambda: os.chown(victim, os.getuid(), os.getgid()),
        "change a file's attributes": lambda: os.setxattr(victim, "user.canary", b"x"),
        "rename a file": lambda: os.rename(folder + "/renamed", folder + "/anew"),
        "replace a file": lambda: os.rename(folder + "/written", folder + "/replaced"),
        "link to a file": lambda: os.link(victim, folder + "/linked"),
        "link symbolically": lambda: os.symlink("x", folder + "/symbolic"),
        "remove a file": lambda: os.unlink(folder + "/removed"),
        "make a folder": lambda: os.mkdir(folder + "/made"),
        "remove a folder": lambda: os.rmdir(folder + "/empty"),
        "make a pipe": lambda: os.mkfifo(folder + "/pipe"),
        "write an unnamed file": lambda: open_once(folder, os.O_TMPFILE | os.O_WRONLY),
        "write to shared memory": lambda: create("/dev/shm/" + os.path.basename(folder)),
        "signal the judge": lambda: os.kill(pid, 0),
        "signal everybody": lambda: os.kill(-1, 0),
        "read the judge's memory": lambda: open_once(f"/proc/{pid}/mem", os.O_RDONLY),
        "read the judge's environment": lambda: open_once(f"/proc/{pid}/environ", os.O_RDONLY),
        "connect": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
        "connect to a socket by name": lambda: connect(socket.AF_UNIX, abstract),
        "connect to a socket in a folder": lambda: connect(socket.AF_UNIX, folder + "/socket"),
        "fork": fork,
        "execute": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "exceed its memory": lambda: bytearray(memory),
    }
    seen = {action: attempt(what) for action, what in forbidden.items()}
    return {
        "forbidden": seen,
        "import": attempt(lambda: __import__("wave")),
        "scratch": attempt(use_scratch),
        "packages": {name: attempt(lambda: __import__(name)) for name in packages},
        "uid": os.getuid(),
    }
"""


def run_canary(judge: Any, config: dict) -> list[str]:
    """Raise OSError naming the first thing that a candidate could do and should not; return the
    packages, of those that it should be able to import, that it can.

    judge: a worker.Judge. config: what it was made of.
    """
    seen = try_all(judge, config)
    if seen["import"] != "succeeded":
        raise OSError("canary: could not import from the standard library")
    found = [name for name, outcome in seen["packages"].items() if outcome == "succeeded"]
    if config["tier"] == "none":
        return found
    if seen["uid"] == 0 and linux.spare_ids():
        raise OSError("canary: could be root")
    for action, outcome in seen["forbidden"].items():
        # A fork is harmless in A: the PID namespace ends with its first process.
        if outcome == "succeeded" and (action, config["tier"]) != ("fork", "A"):
            raise OSError(f"canary: could {action}")
    if seen["scratch"] != "succeeded" and "no scratch" not in judge.active:
        raise OSError("canary: could not write to its scratch")
    return found


def try_all(judge: Any, config: dict) -> dict:
    """What became of each attempt: "succeeded", or the exception's name. OSError if the program
    that makes them did not come to its end."""
    seen: dict[str, Any] = {}
    memory, packages = 2 * config["memory_mb"] << 20, list(config["packages"])
    with _surroundings() as (folder, port, abstract):
        arguments = folder, os.getpid(), port, memory, abstract, packages
        seconds, judge.timeout = judge.timeout, max(SECONDS, judge.timeout)
        try:
            verdict = judge.run(_CANARY, "canary", lambda f: seen.update(f(*arguments)))
        finally:
            judge.timeout = seconds
    if not verdict["passed"]:
        raise OSError(f"canary: {verdict['kind']}, {verdict['detail']}")
    return seen


@contextlib.contextmanager
def _surroundings() -> Iterator[tuple[str, int, str]]:
    """What the canary tries to reach: a folder that is open to everybody, with files, and sockets.
    (folder, port, name of a socket)."""
    folder = Path(tempfile.mkdtemp(prefix="roseval-canary-"))
    abstract = f"\0roseval-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        folder.chmod(0o777)
        for name in ("secret", "victim", "renamed", "replaced", "removed"):
            (folder / name).write_text("canary")
            (folder / name).chmod(0o666)
        (folder / "empty").mkdir()
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        for address in (abstract, str(folder / "socket")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        (folder / "socket").chmod(0o777)
        shared = Path("/dev/shm") / folder.name
        stack.callback(shared.unlink, missing_ok=True)
        yield str(folder), port, abstract

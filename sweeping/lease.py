"""Leases: files in a shared directory that say who works on what, so that nobody does it twice.

    leases = Leases("results/.leases")
    lease = leases.take("3f2a91")  # None: somebody else has it
    lease.release()

A lease is a file NAME.N, whose owner changes its content several times within `seconds`. Dead is
one whose content an observer has seen unchanged for `seconds` of its own monotonic clock; or, at
once, one whose owner ran on this machine and is gone. No time stamp is read and no clock compared
with another, so a clock that jumps changes nothing. A dead lease is taken over by creating
NAME.(N+1), and of all who try to create a file with O_EXCL exactly one can, on NFS too; the highest
N holds.

A process stopped for longer than `seconds` may come back and find that its lease was taken. So a
lease saves work; it does not guard data: what is written under it must bear being written twice.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path


class Leases:
    """The leases of one directory, as one process sees them. OSError when it cannot be written."""

    def __init__(self, directory, seconds: float = 60.0, clock=time.monotonic):
        self.directory, self.seconds, self.clock = Path(directory), seconds, clock
        self.seen = {}  # path: (content, when this content was first seen)
        self.directory.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> "Lease | None":
        """The lease of `name`, or None while somebody alive has it."""
        held = self._held(name)
        if held and not self._is_dead(held[max(held)]):
            return None
        number = max(held, default=-1) + 1
        try:
            lease = Lease(self.directory / f"{name}.{number}", self.seconds / 12)
        except FileExistsError:  # somebody was faster
            return None
        if max(self._held(name), default=number) > number:  # we looked, slept, and woke up late
            lease.release()
            return None
        for path in held.values():
            path.unlink(missing_ok=True)
        return lease

    def clear(self) -> None:
        """Remove the leases whose owners died when their work was done."""
        for name in {path.name.rpartition(".")[0] for path in self.directory.glob("*.*")}:
            if lease := self.take(name):
                lease.release()

    def _held(self, name) -> dict[int, Path]:
        paths = self.directory.glob(f"{name}.*")
        return {int(p.suffix[1:]): p for p in paths if p.suffix[1:].isdecimal()}

    def _is_dead(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # released since
            return True
        now = self.clock()
        if self.seen.get(path, (None, 0))[0] != content:
            self.seen[path] = content, now
        return _is_gone(content) or now - self.seen[path][1] > self.seconds


class Lease:
    """A lease that is held: a thread keeps its file changing until `release`."""

    def __init__(self, path: Path, interval: float):
        self.path, self.interval, self.released = path, interval, threading.Event()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        owner, count = _this_process(), 0
        while True:
            content = json.dumps({"beat": f"{count:012}", "owner": owner}).encode()
            with contextlib.suppress(OSError):  # a full disk: the next beat may find room
                os.pwrite(self.file, content, 0)
                os.fsync(self.file)
            if self.released.wait(self.interval):
                return
            count += 1

    def release(self) -> None:
        self.released.set()
        self.thread.join()
        os.close(self.file)
        self.path.unlink(missing_ok=True)


def _this_process() -> list | None:
    """[machine since its start, process namespace, process, its start]; None where Linux's /proc is
    not there to tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return [boot, os.readlink("/proc/self/ns/pid"), os.getpid(), _start_of(os.getpid())]
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks; None once it has ended, reaped or not."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _is_gone(content: bytes) -> bool:
    """Whether the owner is a process of this machine that runs no more."""
    here = _this_process()
    try:
        boot, namespace, pid, start = json.loads(content)["owner"]
    except (ValueError, TypeError, KeyError):  # not written yet, or from elsewhere
        return False
    if here is None or here[:2] != [boot, namespace]:
        return False
    try:
        return _start_of(pid) != start
    except (FileNotFoundError, ProcessLookupError):
        return True

"""A worker as the evaluator holds it: a process of worker.py, what it was given, what it answers.

It may be given a program while it is at another (`AHEAD`), so that it need not wait for the next
one. The evaluator keeps the worker's end of the socket (packets.py) and can take back what the
worker has not read: to have another one judge it that has nothing to do, or because this one is
gone. So the packets that are left tell which programs a dead worker had not begun.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import packets

AHEAD = 1  # programs that wait at a worker which is at another
MAX_ANSWER = 1 << 24  # bytes; what a worker answers is a line of a few hundred, and what tests say
PATIENCE = 60.0  # seconds for a worker to build its cage and try it
WORKER = Path(__file__).with_name("worker.py").absolute()


class WorkerLost(Exception):
    """A worker that died or could not start; the text says why."""


@dataclass(eq=False)
class Job:
    """A program and, some day, its verdict. key: its hash."""

    key: bytes
    program: bytes
    verdict: Future = field(default_factory=Future)


class Worker:
    """A process of worker.py, the sockets to it, and the folder that its tests may write.

    jobs: what it was given and has not answered, in that order. Whoever looks at them, gives or
    takes back holds `lock`.
    """

    def __init__(self, config: dict, folder: str, lock: threading.Lock):
        self.config, self.parent, self.lock = {**config, "folder": None}, folder, lock
        self.process: subprocess.Popen | None = None
        self.is_up = False
        self.jobs: deque[Job] = deque()
        self.began = 0.0  # when it could begin the first of its jobs
        self.starts = 0  # since it last was at one

    def start(self) -> None:
        """Start the process, anew if need be. Raises WorkerLost if it cannot build its cage."""
        self.kill()
        self.config["folder"] = tempfile.mkdtemp(dir=self.parent)
        # Nothing of the user's environment: the candidates' side cannot read it, nor can tests.
        names = ("PATH", "LD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in names if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
        env |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.programs, self.unread = packets.pair()
        self.answers, theirs = socket.socketpair()
        self.part = b""  # of an answer
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-B", str(WORKER)],
                stdin=self.unread.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=env,
                start_new_session=True,
            )
        except OSError as e:
            raise WorkerLost(f"its process: {e.strerror}") from None
        finally:
            theirs.close()
        packets.send(self.programs, bytes(packets.KEY), json.dumps(self.config).encode())
        self.answers.settimeout(PATIENCE)
        while not (lines := self.hear()):
            pass
        answer = json.loads(lines[0])
        if "error" in answer:
            raise WorkerLost(answer["error"])
        self.active, self.tests = answer["active"], answer["tests"]
        self.packages = answer["packages"]
        self.answers.setblocking(False)
        with self.lock:
            self.is_up, self.began = True, time.monotonic()
            for job in self.jobs:
                packets.send(self.programs, job.key, job.program)

    # -- with the lock

    def has_room(self) -> bool:
        """One that is yet to be started is given a single job."""
        return len(self.jobs) < 1 + AHEAD * self.is_up

    def give(self, job: Job) -> None:
        """Have a program judged, after those that were given before it."""
        if self.is_up:
            packets.send(self.programs, job.key, job.program)
        if not self.jobs:
            self.began = time.monotonic()
        self.jobs.append(job)

    def take_back(self) -> list[Job]:
        """The jobs that it has not begun, and now never will."""
        taken = []
        with contextlib.suppress(BlockingIOError):
            while self.is_up and (packet := packets.receive(self.unread, socket.MSG_DONTWAIT)):
                (job,) = [job for job in self.jobs if job.key == packet[0]]
                if job is self.jobs[0]:  # the next one is begun at once
                    self.began = time.monotonic()
                self.jobs.remove(job)
                taken.append(job)
        return taken

    def give_up(self) -> list[Job]:
        """Expect no more of it: the jobs that it has not begun. It keeps one that it has."""
        unread = self.take_back()
        others = [self.jobs.pop() for _ in range(len(self.jobs) - 1)]
        self.is_up = False
        return [*others, *unread]

    def finish(self) -> Job:
        """The first of its jobs is done: it, no longer among them."""
        self.began, self.starts = time.monotonic(), 0
        return self.jobs.popleft()

    def is_late(self, seconds: float) -> bool:
        """Whether it has been at a job for so long."""
        return self.is_up and bool(self.jobs) and time.monotonic() >= self.began + seconds

    # -- without it

    def hear(self) -> list[bytes]:
        """The lines that have come. Raises WorkerLost where the process is gone or hangs up."""
        assert self.process, "start starts it"
        try:
            more = self.answers.recv(1 << 16)
        except BlockingIOError:
            return []
        except TimeoutError:
            raise WorkerLost(f"the worker did not start within {PATIENCE:.0f} s") from None
        except OSError:  # closed under us
            more = b""
        if not more or len(self.part) > MAX_ANSWER:
            self.process.kill()
            raise WorkerLost(f"the judge process ended with status {self.process.wait()}")
        *lines, self.part = (self.part + more).split(b"\n")
        return lines

    def end(self) -> None:
        """Have it take its cage down, if it is idle, or end what it is at."""
        if self.process and self.is_up and not self.jobs:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.programs.shutdown(socket.SHUT_WR)
                self.process.wait(2)
        elif self.process:
            self.process.kill()

    def kill(self) -> None:
        """End the process, whatever it is at."""
        self.is_up = False
        if self.process:
            self.process.kill()
            self.process.wait()
            for end in (self.programs, self.unread, self.answers):
                end.close()
            shutil.rmtree(self.config["folder"], ignore_errors=True)

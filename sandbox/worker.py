"""A worker: the process that holds the tests. Linux only.

handle.py starts this file by its path, with cwd `/` and almost no environment. The first packet on
its standard input (packets.py) is a configuration in JSON, each one after it a program as JSON,
[prompt, completion, test, entry_point]; each is answered by a line of JSON: what the cage is made
of, then the fields of a Verdict, "key", the program's, and "spoilt", whether it was perhaps the
machine that decided it. A packet that is there while another is judged waits unread.

The configuration: tier, timeout, call_timeout (or null) and grace in seconds, memory_mb, packages
(where each lies that candidates may import, by name), paths (whence tests import, besides the
interpreter's own) and folder, where alone tests may write.

The tests run here and call a proxy; the candidate's function runs in a process of its own, which
jail.py's zygote forks and confines. The verdict exists in this process alone.
"""

import _thread
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

if __name__ == "__main__":  # started by path: the house's root takes the place of this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from sandbox import canary, confined, frames, linux, packets
from sandbox.clock import TICK, Clock
from sandbox.proxy import Conversation, names_of

CALL = 60e-6  # seconds
LAST_ALARM = 5  # of those that follow the timeout, 0.2 s apart; then the worker ends with its tests


class Judge:
    """A zygote and, one after the other, the candidates that it forks and the tests of them.

    config: tier, timeout, grace and perhaps call_timeout in seconds, memory_mb and packages. Raises
    OSError if the cage cannot be built.
    """

    def __init__(self, config: dict):
        self.timeout, self.grace, self.armed = config["timeout"], config["grace"], False
        self.clock = Clock(self._ask_times, config.get("call_timeout"))
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
        self.ends: tuple[int, ...] = ()  # of the pipes to the present candidate
        self.ending: tuple[int, ...] | None = None  # of those to one whose end is to be told
        self.status = 0  # of the candidate that ended last
        self.last_word: Callable[[dict], None] = lambda verdict: None
        self.threads_left = False
        self._next_candidate()

    def close(self) -> None:
        """End zygote and candidate."""
        self.control.close()
        self.zygote.wait(1)

    def _next_candidate(self) -> None:
        """Have the present candidate ended and another one forked; run() waits for the former."""
        self._hear_of_the_last()
        theirs_in, requests = os.pipe()
        replies, theirs_out = os.pipe()
        with contextlib.suppress(BrokenPipeError):  # it is gone, and may have said why
            socket.send_fds(self.control, [b"next"], [theirs_in, theirs_out])
        os.close(theirs_in)
        os.close(theirs_out)
        self.ending, self.ends = self.ends, (requests, replies)
        pipe = TimedPipe(replies, requests, self.clock)
        self.used, self.conversation = False, Conversation(pipe)

    def _hear_of_the_last(self) -> None:
        """Read what the zygote says of a candidate that it was to end, if it has not been read."""
        if self.ending is None:
            return
        for end in self.ending:  # not sooner: it would wake up for that
            os.close(end)
        self.ending = None
        status = self.control.recv(1 << 10)
        if not status or status.startswith(b"!"):
            raise OSError(f"no candidate: {status[1:].decode() or 'the zygote died'}")
        self.status = int(status)

    def prepare(self) -> None:
        """Have a fresh candidate waiting, confined, before the next program comes."""
        if self.used:
            self._next_candidate()

    def _on_alarm(self, *_):
        """Is time up? Tests that swallow the stop, again and again, end with this process."""
        if not self.armed:
            return
        if not self.alarms and (wait := self.clock.tick(self._seconds())):
            signal.setitimer(signal.ITIMER_REAL, wait, TICK)
            return
        self.alarms += 1
        stop = self.conversation.stop("timeout", "timed out")
        if self.alarms > LAST_ALARM:
            self.last_word(self._verdict(stop.kind, stop.detail or "ended before the tests did"))
        raise stop

    def _ask_times(self):
        try:
            self.control.send(b"times")
            return json.loads(self.control.recv(1 << 10))
        except (OSError, ValueError):  # the zygote died: nobody knows
            return None, None

    def _seconds(self):
        """What the program has, and what its calls cost here that in one process cost nothing."""
        return self.timeout + min(self.conversation.calls * CALL, self.grace - 1)

    def judge(self, prompt: str, completion: str, test: str, entry_point: str) -> dict:
        """Run one program against its tests; a dict of Verdict's fields."""

        def check(candidate):
            scope = {}
            exec(_beginning(prompt), scope)  # the tests may use the prompt's helpers
            candidate.end.share(scope)
            scope[entry_point] = candidate
            code, names = _compiled(test)
            candidate.end.lend(names)
            exec(code, scope)
            said = scope["check"](candidate)
            found.extend([said] if isinstance(said, str) else [])

        found: list[str] = []
        verdict = self.run(f"{prompt}{completion}\n", entry_point, check)
        return verdict | ({"said": found[0]} if found and verdict["passed"] else {})

    def run(self, program: str, entry_point: str, check: Callable) -> dict:
        """Run check(proxy of the program's entry point); a dict of Verdict's fields.

        How the tests end says that they failed, or that they did not; a stop says so above them.
        """
        self.started = time.monotonic()
        random.seed(0)  # tests that draw their cases draw the same ones for every completion
        self.prepare()
        self._hear_of_the_last()  # before the clock starts: its end is not of this one's time
        conversation = self.conversation
        self.used, self.alarms, threads = True, 0, _thread._count()
        signal.signal(signal.SIGALRM, self._on_alarm)  # whatever the last tests made of it
        try:
            try:
                self.clock.start()
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, min(TICK, self.timeout), TICK)
                # Stuck in C on a hostile answer, where no tick helps: this ends the process.
                signal.setitimer(signal.ITIMER_PROF, self.timeout + self.grace)
                conversation.send(frames.encode((program, entry_point)))
                check(conversation.candidate(entry_point))
                conversation.finish()
                kind, detail = "passed", ""
            finally:
                self.armed = False
        except BaseException as e:  # an edge: SystemExit too may be the candidate's, or the tests'
            kind, detail = conversation.blame(e)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if conversation.stopped:
            kind, detail = conversation.stopped.kind, conversation.stopped.detail
        conversation.stop("sandbox", "the tests are over")  # for a thread that they left behind
        self.threads_left = _thread._count() > threads
        if kind == "crash":
            self._next_candidate()
            self._hear_of_the_last()
            kind, detail = _death(self.status)
        return self._verdict(kind, detail)

    def _verdict(self, kind, detail):
        no_thread = self.threads_shared and _NO_THREAD in detail
        return {
            "passed": kind == "passed",
            "kind": kind,
            "detail": detail[:300].encode("utf-8", "replace").decode(),
            "seconds": time.monotonic() - self.started,
            "said": "",
            # By the machine, perhaps: by somebody else's use of it.
            "spoilt": self.clock.spoilt or no_thread or detail == _KILLED,
        }


class TimedPipe(frames.Pipe):
    """A pipe to a candidate whose turn it is while we wait."""

    def __init__(self, reads: int, writes: int, clock: Clock):
        super().__init__(reads, writes)
        self.clock = clock

    def receive(self) -> bytes:
        """Read one frame."""
        with self.clock.candidates_turn():
            return super().receive()


_KILLED, _NO_THREAD = "ended by SIGKILL", "can't start new thread"


def _death(status):
    """(kind, detail) for a candidate that ended, or hung up, before its tests did."""
    if not os.WIFSIGNALED(status):
        return "crash", f"exited with status {os.WEXITSTATUS(status)} before the tests were done"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "timed out"
    return "crash", f"ended by {signal.Signals(number).name}"


@functools.lru_cache(512)
def _compiled(source):
    code = compile(source, "<tests>", "exec", dont_inherit=True)
    return code, names_of(code)


@functools.lru_cache(512)
def _beginning(prompt):
    """The longest beginning of a prompt that is a program by itself: all of it in HumanEval."""
    lines = prompt.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        with contextlib.suppress(SyntaxError, ValueError):
            return compile("".join(lines[:end]), "<prompt>", "exec", dont_inherit=True)
    return compile("", "<prompt>", "exec")


def main() -> None:
    """A worker's life: a packet with its configuration, then its programs."""
    programs, answers = socket.socket(fileno=os.dup(0)), os.fdopen(os.dup(1), "w")
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

    def last_word(key, value):
        answer({"key": key.hex()} | value)
        os._exit(0)  # the evaluator starts another worker

    try:
        judge = None
        while packet := packets.receive(programs):
            key, text = packet
            if judge is None:
                judge, about = start(json.loads(text))
                answer(about)
            else:
                judge.last_word = functools.partial(last_word, key)
                answer({"key": key.hex()} | judge.judge(*json.loads(text)))
                if judge.threads_left:  # they end with this process
                    os._exit(0)
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

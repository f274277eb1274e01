"""A worker: the process that holds the tests. Linux only.

judge.py starts this file by its path, with cwd `/` and almost no environment. The first line of its
standard input is a configuration in JSON (tier, timeout, grace, memory_mb, packages), each one
after it a program as JSON, [prompt, completion, test, entry_point]; each is answered by a line of
JSON: what the cage is made of, then the fields of a Verdict.

The tests run here and call a proxy; the candidate's function runs in a process of its own, which
jail.py's zygote forks and confines. The verdict exists in this process alone.
"""

import _thread
import contextlib
import functools
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # started by path: the house's root takes the place of this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from sandbox import frames, jail
from sandbox.proxy import Conversation, names_of

CALL = 60e-6  # seconds
LAST_ALARM = 5  # of those that follow the timeout, 0.2 s apart; then the worker ends with its tests


class Judge:
    """A zygote and, one after the other, the candidates that it forks and the tests of them.

    config: tier, timeout and grace in seconds, memory_mb and packages. Raises OSError if the cage
    cannot be built.
    """

    def __init__(self, config: dict):
        self.timeout, self.grace, self.armed = config["timeout"], config["grace"], False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = _start_zygote(config, theirs)
        theirs.close()
        answer = json.loads(self.control.recv(1 << 16) or b"{}")
        if "active" not in answer:
            assert self.zygote.stderr, "a pipe"
            errors = self.zygote.stderr.read(2000).decode(errors="replace").strip()
            last_line = errors.rpartition("\n")[2]
            raise OSError(answer.get("error") or last_line or "the zygote died")
        self.active = answer["active"]
        self.requests: int | None = None
        self.replies: int | None = None
        self.last_word: Callable[[dict], None] = lambda verdict: None
        self.spoiled = False
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
        socket.send_fds(self.control, [b"next"], [theirs_in, theirs_out])
        os.close(theirs_in)
        os.close(theirs_out)
        status = self.control.recv(16)
        if not status:
            raise OSError("the zygote died")
        self.used, self.conversation = False, Conversation(frames.Pipe(self.replies, self.requests))
        return int(status)

    def prepare(self) -> None:
        """Have a fresh candidate waiting, confined, before the next program comes."""
        if self.used:
            self._next_candidate()

    def _on_alarm(self, *_):
        """Time is up. Tests that swallow the stop, again and again, end with this process."""
        if not self.armed:
            return
        if (left := self._seconds() - (time.monotonic() - self.started)) > 0:
            signal.setitimer(signal.ITIMER_REAL, left, 0.2)
            return
        self.alarms += 1
        stop = self.conversation.stop("timeout", "timed out")
        if self.alarms > LAST_ALARM:
            self.last_word(self._verdict(stop.kind, stop.detail or "ended before the tests did"))
        raise stop

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
            scope["check"](candidate)

        verdict = self.run(f"{prompt}{completion}\n", entry_point, check)
        if verdict["detail"] == _KILLED:  # perhaps for somebody else's use of memory: look again
            verdict = self.run(f"{prompt}{completion}\n", entry_point, check)
        return verdict

    def run(self, program: str, entry_point: str, check: Callable) -> dict:
        """Run check(proxy of the program's entry point); a dict of Verdict's fields.

        How the tests end says that they failed, or that they did not; a stop says so above them.
        """
        self.started = time.monotonic()
        random.seed(0)  # tests that draw their cases draw the same ones for every completion
        self.prepare()
        conversation = self.conversation
        self.used, self.alarms, threads = True, 0, _thread._count()
        signal.signal(signal.SIGALRM, self._on_alarm)  # whatever the last tests made of it
        try:
            try:
                self.armed = True
                signal.setitimer(signal.ITIMER_REAL, self.timeout, 0.2)
                # Stuck in C on a hostile answer, the evaluator gone, this process must still end.
                signal.setitimer(signal.ITIMER_PROF, self.timeout + 2 * self.grace)
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
        self.spoiled = _thread._count() > threads
        if kind == "crash":
            kind, detail = _death(self._next_candidate())
        return self._verdict(kind, detail)

    def _verdict(self, kind, detail):
        return {
            "passed": kind == "passed",
            "kind": kind,
            "detail": detail[:300].encode("utf-8", "replace").decode(),
            "seconds": time.monotonic() - self.started,
        }


_KILLED = "ended by SIGKILL"


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


def _start_zygote(config, stdin) -> subprocess.Popen:
    """Start jail.py by itself; its standard input is a socket to us."""
    python = os.path.realpath(sys.executable)  # past a virtual environment, to what is mounted
    found = [spec for name in config["packages"] if (spec := importlib.util.find_spec(name))]
    paths = [
        spec.submodule_search_locations[0] if spec.submodule_search_locations else str(spec.origin)
        for spec in found
    ]
    paths += [libs for path in paths if os.path.isdir(libs := path + ".libs")]
    config = {**config, "packages": paths}
    options = ["-X", "no_debug_ranges", "-s", "-S", "-P", "-B"]
    command = [python, *options, os.path.abspath(jail.__file__), json.dumps(config)]
    account: dict[str, Any] = {}
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


def _bubblewrap(packages, command) -> list[str]:
    """Tier B's command: as tier A's tree, made by the one program that may create namespaces."""
    if not (bwrap := shutil.which("bwrap")):
        raise OSError("bwrap: not installed")
    tree = jail.interpreter_tree(packages)
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    programs = [command[0], os.path.dirname(os.path.abspath(jail.__file__))]
    for path in sorted({*tree.bound, *programs}):
        arguments += ["--ro-bind", path, path]
    for path in tree.hidden:
        arguments += ["--tmpfs", path]
    for path in tree.packages:
        arguments += ["--ro-bind", path, path]
    for path in jail.DEVICES:
        arguments += ["--dev-bind", path, path]
    return [bwrap, *arguments, "--remount-ro", "/", "--chdir", "/", *command]


# ---------------------------------------------------------------------------------------------
# The canary: a tier counts only if what it should stop is seen to fail

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


def run_canary(judge: Judge, config: dict) -> None:
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


def main() -> None:
    """A worker's life: a line with its configuration, then a program a line, answered in JSON."""
    requests, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)  # what tests print is not for the evaluator
    warnings.simplefilter("ignore")
    # Not dumpable: no process of this user can read the tests here.
    jail.libc.prctl(jail.PR_SET_DUMPABLE, 0, 0, 0, 0)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def last_word(value):
        answer(value)
        os._exit(0)  # the evaluator starts another worker

    try:
        judge = None
        for line in os.fdopen(requests):
            if judge is None:
                config = json.loads(line)
                judge = Judge(config)
                judge.last_word = last_word
                run_canary(judge, config)
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (_at_most(4 << 30, hard), hard))
                answer({"active": judge.active})
            else:
                answer(judge.judge(*json.loads(line)))
                if judge.spoiled:  # a thread of the tests goes on: let it end with this process
                    os._exit(0)
                judge.prepare()
        if judge:
            judge.close()
    except Exception as e:  # an edge: the evaluator reports it, or starts another worker
        answer({"error": str(e) or repr(e)})


def _at_most(value, limit) -> int:
    return value if limit == resource.RLIM_INFINITY else min(value, limit)


if __name__ == "__main__":
    main()

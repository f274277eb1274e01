"""What Linux has to confine a process: ids that own nothing, seccomp, Landlock.

A candidate's cage (jail.py) and the process that holds the tests (confined.py) are both made of
these. Standard library only, imports nothing else of the house: jail.py runs by itself.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import sys
from collections.abc import Iterable

libc = ctypes.CDLL(None, use_errno=True)
_SET_PDEATHSIG, SET_DUMPABLE, _GET_SECCOMP, _SET_SECCOMP, _NO_NEW_PRIVS = 1, 4, 21, 22, 38


class SetupError(OSError):
    """A step of building the cage that this system refused."""


def check(step: str, status: int) -> int:
    """Return a libc call's status, or raise SetupError naming the step that it was."""
    if status < 0:
        raise SetupError(f"{step}: {os.strerror(ctypes.get_errno())}")
    return status


def park(fd: int) -> int:
    """Move a descriptor out of the way of a candidate's own, which are 0 to 4."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 40)
    os.close(fd)
    return high


# ---------------------------------------------------------------------------------------------
# Ids

SPARE = 1 << 30  # above it nobody has an account; a process's own are SPARE + 2 pid and the next
SPARE_IN_A_SMALL_MAP = 64320  # in a user namespace that knows 65,536 ids


def spare_ids() -> tuple[int, int] | None:
    """Two ids, uid and gid alike, that own nothing and that this process may become: it must be
    root with the capabilities for it. Nobody else has them where all ids are known here, so that
    what the kernel counts by uid (threads) counts for one alone."""
    with open("/proc/self/uid_map") as f:
        spans = [[int(n) for n in line.split()] for line in f]
    with open("/proc/self/status") as f:
        capabilities = next(int(line.split()[1], 16) for line in f if line.startswith("CapEff"))
    if os.geteuid() != 0 or capabilities & 0xC0 != 0xC0:
        return None
    for first in (SPARE + 2 * os.getpid(), SPARE_IN_A_SMALL_MAP):
        if any(low <= first and first + 1 < low + n for low, _, n in spans):
            return first, first + 1
    return None


def become(spare: int) -> None:
    """Take this uid and gid for good. Clears every capability of root."""
    os.setgroups([])
    os.setresgid(spare, spare, spare)
    os.setresuid(spare, spare, spare)


def give_up_privileges() -> None:
    """No capability is left, whatever the user namespace and the uid, and none comes back."""
    check("capset", libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)))
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)  # not dumpable: /proc/PID belongs to root
    check("no_new_privs", libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def die_with_parent() -> None:
    """Be killed when the parent is; only now, since changes of credentials clear it."""
    check("prctl PDEATHSIG", libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def die_first(score: int) -> None:
    """Out of memory, the kernel shall end this process before those of a lower score: 300 are
    candidates, 200 what holds the tests, 0 an evaluator."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write(str(score))


# ---------------------------------------------------------------------------------------------
# seccomp

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
# What only the process that holds the tests needs: to pass descriptors to its zygote.
PASS_DESCRIPTORS = "sendmsg:46:211 recvmsg:47:212"
# The flags' argument of what opens files, for kernels on which nothing else refuses to empty them.
_OPEN = {"open:2:": 1, "openat:257:56": 2}
_O_TRUNC = 0x200
_CLONE, _CLONE3, _LAST_KNOWN = (56, 220), 435, 460
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

# Instructions of BPF: load, jumps of three kinds, return
_LOAD, _EQUAL, _AT_LEAST, _BITS, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06
_PID = -1  # in an instruction, for the caller's own
# (operation, operand, how far to jump if it holds, if not): a number, or one of these ends
_ENDS = {"allow": _ALLOW, "refuse": _EPERM, "absent": _ENOSYS}
Code = list[tuple[int, int, int | str, int | str]]


def seccomp_filter(also: str = "", truncate: bool = True) -> tuple[bytearray, list[int]]:
    """The filter as (bytearray of BPF instructions, offsets at which the caller's pid belongs).

    also: further calls to allow, as in the table. truncate: whether a file may be opened so that it
    is emptied, or without a right to it (access mode 3), which Landlock sees only from ABI 3 on.
    """
    machine = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(os.uname().machine)
    if machine is None or sys.maxsize < 1 << 32:
        raise SetupError(f"seccomp: no filter for {os.uname().machine}")
    column, arch = machine
    begin: Code = [(_LOAD, 4, 0, 0), (_EQUAL, arch, 1, 0), (_GIVE, _KILL, 0, 0), (_LOAD, 0, 0, 0)]
    answers = sorted(_answers(column, also, truncate).items())
    changes = [each for i, each in enumerate(answers) if i == 0 or each[1] != answers[i - 1][1]]
    found = _searched(changes)
    assert not isinstance(found, str), found
    code = [*begin, *found, *((_GIVE, k, 0, 0) for k in _ENDS.values())]
    ends = {name: len(code) - len(_ENDS) + i for i, name in enumerate(_ENDS)}
    packed = bytearray()
    for i, (operation, operand, *jumps) in enumerate(code):
        yes, no = (to if isinstance(to, int) else ends[to] - i - 1 for to in jumps)
        packed += struct.pack("<HBBI", operation, yes, no, max(operand, 0))
    return packed, [8 * i + 4 for i, (_, operand, *_) in enumerate(code) if operand == _PID]


def _answers(column: int, also: str, truncate: bool) -> dict[int, Code | str]:
    """What answers a call's number and all that follow, as far as the next one here."""
    answers: dict[int, Code | str] = {
        int(number): "allow"
        for entry in [*_ALLOWED.split(), *also.split()]
        if (number := entry.split(":")[1 + column])
    }
    for entry, argument in {} if truncate else _OPEN.items():
        if number := entry.split(":")[1 + column]:
            answers[int(number)] = [
                (_LOAD, 16 + 8 * argument, 0, 0),
                (_BITS, _O_TRUNC, "refuse", 0),
                (_BITS, 1, 0, "allow"),
                (_BITS, 2, "refuse", "allow"),
            ]
    answers[_CLONE[column]] = [(_LOAD, 16, 0, 0), (_BITS, 0x10000, "allow", "refuse")]  # threads
    for name, (argument, values) in _CONDITIONAL.items():
        answers[int(name.split(":")[1 + column])] = _one_of(argument, values)
    # glibc falls back only if clone3 and calls newer than it are "not there", not if "forbidden".
    answers[_CLONE3] = answers[_LAST_KNOWN + 1] = "absent"
    for last in (-1, *answers):
        answers.setdefault(last + 1, "refuse" if last < _LAST_KNOWN else "absent")
    return answers


def _one_of(argument: int, values: list) -> Code:
    """Allow a call whose argument has one of these values."""
    code: Code = []
    if values == [0]:  # in the upper half too
        code += [(_LOAD, 20 + 8 * argument, 0, 0), (_EQUAL, 0, 0, "refuse")]
    code.append((_LOAD, 16 + 8 * argument, 0, 0))
    code += [(_EQUAL, _PID if value == "pid" else value, "allow", 0) for value in values]
    return [*code[:-1], (*code[-1][:3], "refuse")]


def _searched(answers: list[tuple[int, Code | str]]) -> Code | str:
    """Halves, until one answers: whenever a filter is installed the kernel compiles it, and runs it
    for every number that there is. Through a list, that was two fifths of confining a candidate."""
    if len(answers) == 1:
        return answers[0][1]
    half = len(answers) // 2
    below, above = _searched(answers[:half]), _searched(answers[half:])
    parts = [[] if isinstance(part, str) else part for part in (below, above)]
    yes = above if isinstance(above, str) else len(parts[0])
    no = below if isinstance(below, str) else 0
    return [(_AT_LEAST, answers[half][0], yes, no), *parts[0], *parts[1]]


class SeccompFilter:
    """A filter that is made once and installed by each process that inherits it."""

    def __init__(self, also: str = "", truncate: bool = True):
        self.code, self.pids = seccomp_filter(also, truncate)
        self.program = (ctypes.c_char * len(self.code)).from_buffer(self.code)
        header = struct.pack("<HxxxxxxQ", len(self.code) // 8, ctypes.addressof(self.program))
        self.header = ctypes.create_string_buffer(header, len(header))

    def install(self) -> None:
        """For this process, for good. It needs no_new_privs."""
        for at in self.pids:
            struct.pack_into("<I", self.code, at, os.getpid())
        check("seccomp", libc.prctl(_SET_SECCOMP, 2, self.header, 0, 0))


def has_seccomp() -> bool:
    """Whether this kernel has it at all."""
    return libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) >= 0


# ---------------------------------------------------------------------------------------------
# Landlock

TRUNCATION = 3  # the ABI from which on Landlock refuses to empty files


def landlock_abi() -> int:
    """The ABI of this kernel's Landlock, 0 where it has none."""
    return max(0, libc.syscall(444, None, 0, 1))


def landlock_ruleset(
    abi: int, readable: Iterable[str], listable: Iterable[str], writable: Iterable[str]
) -> int:
    """The descriptor of a Landlock ruleset of that ABI, which may be older than the kernel's.

    Paths in `readable` may be read with all below them, `listable` listed, `writable` written.
    """
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
    return ruleset


def landlock_restrict(ruleset: int) -> None:
    """Put this process under a ruleset, for good. It needs no_new_privs."""
    check("landlock_restrict_self", libc.syscall(446, ruleset, 0))

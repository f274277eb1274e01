"""linux.py: the system-call table, and what Landlock lacks before its ABI 3."""

import itertools
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from builders import PATIENCE, ROOT

from sandbox import linux

# ---------------------------------------------------------------------------------------------
# System calls


def test_system_call_numbers_are_the_kernel_headers():
    """Both columns of the table against the C headers, where they are installed."""
    headers = {
        1: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        2: Path("/usr/include/asm-generic/unistd.h"),
    }
    checked = 0
    for column, header in headers.items():
        if not header.exists():
            continue
        found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s", header.read_text())
        numbers = {name: int(number) for name, number in found}
        numbers.setdefault("newfstatat", numbers.get("fstatat"))
        tables = (linux._ALLOWED.split(), linux.PASS_DESCRIPTORS.split(), linux._CONDITIONAL)
        for entry in [*itertools.chain(*tables), *linux._OPEN]:
            fields = entry.split(":")
            if fields[column]:
                assert numbers[fields[0]] == int(fields[column]), fields[0]
                checked += 1
    if not checked:
        pytest.skip("no kernel headers here")


def simulate(code, number, arguments, arch, steps=None):
    """The kernel's answer, by an interpreter of the BPF operations that the filter uses. steps: a
    list that every operation joins."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    at = accumulator = 0
    while True:
        op, yes, no, k = struct.unpack_from("<HBBI", code, at * 8)
        at += 1
        if steps is not None:
            steps.append(op)
        if op == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif op == 0x06:
            return k
        else:
            holds = {
                0x15: accumulator == k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[op]
            at += yes if holds else no


@pytest.mark.parametrize("machine, arch", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_allows_exactly_the_table(monkeypatch, machine, arch):
    column = 1 if machine == "x86_64" else 2
    monkeypatch.setattr(linux.os, "uname", lambda: type("U", (), {"machine": machine}))
    code, pids = linux.seccomp_filter()
    for at in pids:
        code[at : at + 4] = (4321).to_bytes(4, "little")
    allowed = {int(n) for e in linux._ALLOWED.split() if (n := e.split(":")[column])}
    special = {e.split(":")[0]: int(e.split(":")[column]) for e in linux._CONDITIONAL}
    special |= {"clone": linux._CLONE[column - 1], "clone3": linux._CLONE3}
    for number in [*range(600), 0x40000000, 0x40000027, 0xFFFFFFFF]:
        if number not in special.values():
            assert (simulate(code, number, [0] * 6, arch) == linux._ALLOW) == (number in allowed)
    rng = random.Random(0)
    for name, arguments, allow in [
        ("kill", [4321, 9], True),
        ("kill", [4320, 9], False),
        ("kill", [(1 << 64) - 1, 9], False),
        ("tgkill", [4321, 4321], True),
        ("tgkill", [1, 4321], False),
        ("clone", [0x3D0F00], True),
        ("clone", [17], False),
        ("clone", [0x10000000 | 17], False),
        ("clone3", [0], False),
        ("prctl", [15, 1], True),
        ("prctl", [1, 0], False),
        ("prctl", [22, 2], False),
        ("prlimit64", [0, 9, 0, 1], True),
        ("prlimit64", [0, 9, 1 << 32, 1], False),
        ("prlimit64", [0, 9, 8, 1], False),
        ("sendto", [3, 1, 1, 0, 0, 0], True),
        ("sendto", [3, 1, 1, 0, 1 << 40, 16], False),
        ("socketpair", [1, 1], True),
        ("socketpair", [2, 1], False),
        ("fcntl", [3, 4], True),
        ("fcntl", [3, 8], False),
        ("fcntl", [3, 10], False),
        ("ioctl", [0, 0x5401], True),
        ("ioctl", [0, 0x5412], False),
        ("ioctl", [0, 0x8901], False),
    ]:
        rest = [rng.randrange(1 << 32) for _ in range(6 - len(arguments))]
        answer = simulate(code, special[name], arguments + rest, arch)
        assert (answer == linux._ALLOW) == allow, (name, arguments)
    assert simulate(code, special["clone3"], [0] * 6, arch) == linux._ENOSYS
    assert simulate(code, 0, [0] * 6, 0x40000003) == linux._KILL  # i386


def test_no_number_is_far_into_the_filter():
    """The kernel runs it for each of them whenever a candidate is confined."""
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(os.uname().machine)
    for truncate in (True, False):
        code, _ = linux.seccomp_filter(linux.PASS_DESCRIPTORS, truncate)
        for number in range(600):
            steps = []
            simulate(code, number, [0] * 6, arch, steps)
            assert len(steps) <= 25, number


@pytest.mark.parametrize("machine, arch", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_without_landlocks_truncation_no_open_may_empty_a_file(monkeypatch, machine, arch):
    monkeypatch.setattr(linux.os, "uname", lambda: type("U", (), {"machine": machine}))
    code, _ = linux.seccomp_filter(truncate=False)
    column, places = (1, {2: 1, 257: 2}) if machine == "x86_64" else (2, {56: 2})
    assert {int(e.split(":")[column]) for e in linux._OPEN if e.split(":")[column]} == {*places}
    truncate, create, close = os.O_TRUNC, os.O_CREAT, os.O_CLOEXEC
    for number, place in places.items():
        for access, more in itertools.product(range(4), (0, truncate, create, close)):
            arguments = [7] * 6
            arguments[place] = access | more | close
            answer = simulate(code, number, arguments, arch)
            refused = access == 3 or bool(more & truncate)
            assert answer == (linux._EPERM if refused else linux._ALLOW), (access, more)
    refused = {"creat": 85, "truncate": 76, "openat2": 437, "open_by_handle_at": 304}
    refused |= {"truncate": 45, "open_by_handle_at": 265} if machine != "x86_64" else {}
    for name, number in refused.items():
        if machine == "x86_64" or name != "creat":
            assert simulate(code, number, [0] * 6, arch) != linux._ALLOW, name


# ---------------------------------------------------------------------------------------------
# Landlock of every ABI

CONFINED = """
import os, sys
sys.path.insert(0, {root!r})
from sandbox import linux
abi, filtered, folder = int(sys.argv[1]), sys.argv[2] == "filtered", sys.argv[3]
ruleset = linux.landlock_ruleset(abi, ["/usr", "/lib"], [], ["/dev/null"])
truncate = abi >= linux.TRUNCATION if filtered else True
seccomp = linux.SeccompFilter(truncate=truncate)
linux.give_up_privileges()
linux.landlock_restrict(ruleset)
seccomp.install()
for access in range(4):
    try:
        os.close(os.open(f"{{folder}}/{{access}}", access | os.O_TRUNC))
    except OSError:
        pass
os.open("/dev/null", os.O_WRONLY)
"""


def emptied_files(folder, abi, how) -> list[int]:
    """Which of four files, opened with each access mode to be emptied, are empty after it."""
    for access in range(4):
        (folder / str(access)).write_text("full")
        (folder / str(access)).chmod(0o666)
    command = [sys.executable, "-c", CONFINED.format(root=str(ROOT)), str(abi), how, str(folder)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    return [access for access in range(4) if not (folder / str(access)).read_text()]


def test_no_file_is_emptied_whatever_landlocks_abi(tmp_path):
    """The same kernel, asked for the rules of an older one; the control shows what those lack."""
    if not (newest := linux.landlock_abi()):
        pytest.skip("no Landlock here")
    tmp_path.chmod(0o755)
    for abi in range(1, newest + 1):
        assert emptied_files(tmp_path, abi, "filtered") == []
        lacks = abi < linux.TRUNCATION
        assert emptied_files(tmp_path, abi, "bare") == ([3] if lacks else []), abi


def test_spare_ids_are_a_processes_own():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from sandbox import linux\nprint(*linux.spare_ids() or ())\n"
    seen = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    ids = [word for out in seen for word in out.stdout.split()]
    if os.geteuid() != 0:
        assert not ids
    elif linux.spare_ids() and linux.spare_ids()[0] >= linux.SPARE:
        assert len(set(ids)) == 6

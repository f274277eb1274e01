"""jail.py: the system-call table, and programs that try to break out or to forge a pass."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from builders import ROOT
from small_programs import TIERS

from sandbox import jail, judge

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
        for entry in [*jail._ALLOWED.split(), *jail._CONDITIONAL]:
            fields = entry.split(":")
            if fields[column]:
                assert numbers[fields[0]] == int(fields[column]), fields[0]
                checked += 1
    if not checked:
        pytest.skip("no kernel headers here")


def simulate(code, number, arguments, arch):
    """The kernel's answer, by an interpreter of the BPF operations that the filter uses."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    at = accumulator = 0
    while True:
        op, yes, no, k = struct.unpack_from("<HBBI", code, at * 8)
        at += 1
        if op == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif op == 0x06:
            return k
        else:
            holds = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[op]
            at += yes if holds else no


@pytest.mark.parametrize("machine, arch", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_allows_exactly_the_table(monkeypatch, machine, arch):
    column = 1 if machine == "x86_64" else 2
    monkeypatch.setattr(jail.os, "uname", lambda: type("U", (), {"machine": machine}))
    code, pids = jail.seccomp_filter()
    for at in pids:
        code[at : at + 4] = (4321).to_bytes(4, "little")
    allowed = {int(n) for e in jail._ALLOWED.split() if (n := e.split(":")[column])}
    special = {e.split(":")[0]: int(e.split(":")[column]) for e in jail._CONDITIONAL}
    special |= {"clone": jail._CLONE[column - 1], "clone3": jail._CLONE3}
    for number in [*range(600), 0x40000000, 0x40000027, 0xFFFFFFFF]:
        if number not in special.values():
            assert (simulate(code, number, [0] * 6, arch) == jail._ALLOW) == (number in allowed)
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
        assert (answer == jail._ALLOW) == allow, (name, arguments)
    assert simulate(code, special["clone3"], [0] * 6, arch) == jail._ENOSYS
    assert simulate(code, 0, [0] * 6, 0x40000003) == jail._KILL  # i386


# ---------------------------------------------------------------------------------------------
# Programs that try to forge a pass


def interpreter_for_everybody():
    """A Python that an unprivileged user can run, or None."""
    for python in (os.path.realpath(sys.executable), "/usr/local/bin/python3", "/usr/bin/python3"):
        command = [python, "-c", "import sys; assert sys.version_info >= (3, 11)"]
        try:
            subprocess.run(command, check=True, user=65534, stderr=subprocess.DEVNULL, cwd="/")
            return python
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def start_battery(folder, tier, nobody):
    """Start tests/sandbox/hostile/battery.py as this user or, from root, as nobody."""
    python, options = sys.executable, {}
    if nobody:
        if os.geteuid() != 0 or not (python := interpreter_for_everybody()):
            return None
        options = {"user": 65534, "group": 65534, "extra_groups": []}
    shutil.copytree(ROOT / "sandbox", folder / "sandbox", ignore=shutil.ignore_patterns("*.pyc"))
    for path in (ROOT / "tests/sandbox/hostile").glob("*.*"):
        shutil.copy(path, folder)
    folder.chmod(0o755)
    config = json.dumps({"tier": tier, "timeout": 0.5})
    command = [python, str(folder / "battery.py"), str(folder), config]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/", **options)


@pytest.fixture
def open_folder():
    """A folder that every user can reach (pytest's own are private)."""
    with tempfile.TemporaryDirectory(prefix="roseval-battery-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def run_batteries(folder, combinations):
    running = {}
    for tier, nobody in combinations:
        place = folder / f"{tier}-{nobody}"
        place.mkdir()
        if process := start_battery(place, tier, nobody):
            running[tier, nobody] = process
    for (tier, nobody), process in running.items():
        out, _ = process.communicate(timeout=3600)  # two hundred programs
        assert process.returncode == 0, out
        report = json.loads(out)
        assert report["tier"].startswith(tier)
        assert report["uid"] == (65534 if nobody else os.getuid())
        assert report["ran"] >= 180
        assert report["failures"] == []
    return len(running)


def test_hostile_programs(open_folder):
    """The battery at the best tier as this user and, from root, at tier C as nobody."""
    assert run_batteries(open_folder, [(TIERS[0], False), ("C", True)])


@pytest.mark.slow
@pytest.mark.parametrize("nobody", [False, True])
@pytest.mark.parametrize("tier", judge.TIERS)
def test_hostile_programs_in_every_tier_and_as_every_user(open_folder, tier, nobody):
    if tier not in TIERS and not nobody:
        pytest.skip(f"tier {tier} is not available to this user")
    if tier == "B" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    if not run_batteries(open_folder, [(tier, nobody)]):
        pytest.skip("needs root and an interpreter that nobody can run")

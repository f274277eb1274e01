"""jail.py: programs that try to break out or to forge a pass."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from builders import ROOT
from small_programs import TIERS

from sandbox import judge

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


def start_battery(folder, tier, nobody, timeout):
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
    config = json.dumps({"tier": tier, "timeout": timeout})
    command = [python, str(folder / "battery.py"), str(folder), config]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/", **options)


@pytest.fixture
def open_folder():
    """A folder that every user can reach (pytest's own are private)."""
    with tempfile.TemporaryDirectory(prefix="roseval-battery-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def run_batteries(folder, combinations, timeout=0.5):
    running = {}
    for tier, nobody in combinations:
        place = folder / f"{tier}-{nobody}"
        place.mkdir()
        if process := start_battery(place, tier, nobody, timeout):
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
    assert run_batteries(open_folder, [(TIERS[0], False), ("C", True)], timeout=0.3)


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

"""No damaged checkpoint ends in anything but a result or one line: malformed.py's battery, in a
process of its own, whose memory and time are limited."""

import json
import os
import sys

import pytest
from builders import ROOT, run_to_end


def faults_of(folder, everything):
    """(what went wrong, how many checkpoints were damaged)"""
    code = f"import pathlib, malformed; malformed.run(pathlib.Path({str(folder)!r}), {everything})"
    places = os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/formats"))
    environment = os.environ | {"PYTHONPATH": places, "XDG_CACHE_HOME": str(folder / "cache")}
    out = run_to_end([sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=ROOT)
    *faults, last = map(json.loads, out.stdout.splitlines())
    return faults, last["count"]


def test_malformed_checkpoints(tmp_path):
    faults, count = faults_of(tmp_path, False)
    assert not faults, faults[:5]
    assert count > 350


@pytest.mark.slow
def test_malformed_checkpoints_all(tmp_path):
    faults, count = faults_of(tmp_path, True)
    assert not faults, faults[:5]
    assert count > 3500

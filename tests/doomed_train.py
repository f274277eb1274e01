"""train.py whose ranks die, or stop, at a moment that is chosen: no clock, and nobody who watches
and might come late."""

import textwrap
from pathlib import Path

from builders import ROOT

SCRIPT = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import builders, cli, train
if {who}:
{doom}
cli.run(train.main)
"""
AFTER_A_STEP = """
class DoomedLog(train.Log):
    def step(self, step, *args):
        super().step(step, *args)
        if step == {step}:
            os.kill(os.getpid(), signal.{name})
train.Log = DoomedLog
"""


def after_step(step: int, name: str = "SIGKILL") -> str:
    """The signal comes once a step is in the log."""
    return AFTER_A_STEP.format(step=step, name=name)


def doomed(folder: Path, doom: str, rank: int | None = None) -> Path:
    """The script in which `doom` is run first, by a rank, or by all."""
    who = "True" if rank is None else f"cli.rank() == {rank}"
    script = folder / "doomed.py"
    script.write_text(
        SCRIPT.format(root=str(ROOT), who=who, doom=textwrap.indent(doom.strip(), "    "))
    )
    return script

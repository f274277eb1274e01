"""How weights and tokens lie in files: one file a format.

A format of checkpoints is a module with two functions, and one place in readers.READERS:

    recognises(path) -> bool                 # by names and a first look; True for a damaged one too
    open(path, config=None) -> Opened        # headers only; ValueError in one line

`config` is the GPTConfig that the caller gives, and is believed. Three more are for formats that
can answer: `glance(path) -> (kind, step)`, without opening the weights, for listings;
`finished(path) -> bool | None`, whether the sign is there with which a save ends, for those who
watch a run; `tries(path)`, whether to open what no format recognises.
"""

import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from config import GPTConfig


@dataclass(frozen=True)
class Opened:
    """What a format answers with: plain values, and where the bytes lie. It holds no tensor and no
    open file, so that a program can keep thousands of them, and of deleted ones too."""

    path: Path
    kind: str  # roseval, huggingface, adapter, rosetrainer, nanogpt, training, weights, …
    format: str  # the file that opened it, "formats/pt_files.py"
    tensors: dict[str, Any]  # name: tensorfiles.Stored, in the layout's full names
    layout: str | None  # of naming.LAYOUTS; None: its names are not known
    files: tuple[Path, ...]  # all that decides the numbers: the fingerprint covers them
    config: GPTConfig | None = None
    problem: str = ""  # why there is no config, in one line
    native: bool = True  # False: transformers runs it, from the directory
    step: int | None = None  # as the files state it
    facts: dict[str, Any] = field(default_factory=dict)  # epoch, loss, tokens, token ids, …
    manifest: Path | None = None  # states the sha256 of all files, so that its own stands for them
    hint: str = ""  # said if the tensors do not fit the config
    adapter: Any = None  # merging.Adapter: what is merged into the weights once they are loaded
    tokenizer: Path | None = None  # a file that it lies in, where that is no directory's
    rearranged: bool = False  # by the heads of `config`: without one, the rows are not in our order


def named(path: str | Path) -> Path:
    """The path under a name of its own: `.` and `..` have none, and no parent that can be asked."""
    path = Path(path)
    return path if path.name not in ("", "..") else path.resolve()


def name_of(path: Path) -> str:
    """What a checkpoint is called."""
    return (path.name if os.path.isdir(path) else path.stem) or "root"


# 1000, 1,431,000, 1_431_000, 1.5e5, 1431k, 2M: a number and not a part of another one
NUMBER = (
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:_[0-9]{3})+|[0-9]{1,18}(?:\.[0-9]{1,6})?)"
    r"(?P<exponent>e\+?[0-9]{1,2})?(?P<unit>[km])?(?![0-9a-z]|[.,][0-9])"
)
COUNTED_STEPS = (
    r"(?<![0-9.,a-z])(?P<digits>[0-9]{1,18})(?P<exponent>)(?P<unit>[km])?"
    r"[-_ ]?(?:steps?|iters?)(?![a-z])"
)
DATE = r"(?:19|20)[0-9]{2}([-_.])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])"
COMPACT_DATE = r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
TIME = r"(?:[-_t ]?[0-9]{2}[-_:.]?[0-9]{2}(?:[-_:.]?[0-9]{2})?)?"
# what a number at the end of a name counts where it is no step
OTHER_COUNTS = {"epoch", "epochs", "ep", "token", "tokens", "of", "rank", "shard", "part", "seed"}
OTHER_COUNTS |= {"version", "v", "layer", "fold", "stage"}


def step_in_name(name: str) -> int | None:
    """1000 of checkpoint-1000, global_step1000, iter_0001000, epoch=3-step=1000, 1000steps and
    model-1000; 1431000 of step-1431k-3T, step_1,431,000 and step1.431e6. None where a name says
    epochs, tokens, dates or nothing."""
    name = re.sub(rf"(?<![0-9]){DATE}{TIME}(?![0-9])", "", name.lower())
    said = re.search(rf"(?<![a-z])(?:global[-_]?)?(?:steps?|iter(?:ation)?s?)[-_= ]?{NUMBER}", name)
    said = said or re.search(COUNTED_STEPS, name)
    if not said:
        name = re.sub(rf"(?<![0-9]){COMPACT_DATE}{TIME}(?![0-9])", "", name)
        said = re.search(rf"(?:checkpoint|chkpn?t|ckpt)[-_= ]?{NUMBER}", name)
    said = said or re.fullmatch(NUMBER.replace("[km]", "(?!)"), name)  # 410m is a model's size
    if said:
        digits = re.sub("[,_]", "", said["digits"])
        power = {"k": "e3", "m": "e6"}.get(said["unit"], "")
        step = Fraction(digits + (said["exponent"] or "")) * Fraction("1" + power)
        return int(step) if step.denominator == 1 and step < 2**63 else None
    last = re.search(r"(?:^|([a-z]*)[-_=])([0-9]{1,18})$", name)
    return int(last[2]) if last and last[1] not in OTHER_COUNTS else None


def shown(names: Any, limit: int = 5) -> str:
    """Names that others chose, for a message: the first few, none with control characters or of a
    length that hides the rest."""
    names = [names] if isinstance(names, str) or not isinstance(names, list) else names
    texts = [name if isinstance(name, str) else f"{name!r:.100}" for name in names[:limit]]
    texts = [text if text.isprintable() else ascii(text) for text in texts]
    texts = [text if len(text) <= 200 else f"{text[:200]}…" for text in texts]
    return ", ".join(texts) + (", …" if len(names) > limit else "")

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
from pathlib import Path
from typing import Any

from config import GPTConfig


@dataclass(frozen=True)
class Opened:
    """What a format answers with: plain values, and where the bytes lie. It holds no tensor and no
    open file, so that a program can keep thousands of them, and of deleted ones too."""

    path: Path
    kind: str  # roseval, huggingface, rosetrainer, nanogpt, training, weights, …
    format: str  # the file that opened it, "formats/pt_files.py"
    tensors: dict[str, Any]  # name: tensorfiles.Stored, in the layout's full names
    layout: str | None  # of layouts.LAYOUTS; None: its names are not known
    files: tuple[Path, ...]  # all that decides the numbers: the fingerprint covers them
    config: GPTConfig | None = None
    problem: str = ""  # why there is no config, in one line
    native: bool = True  # False: transformers runs it, from the directory
    step: int | None = None  # as the files state it
    facts: dict[str, Any] = field(default_factory=dict)  # epoch, loss, tokens, token ids, …
    manifest: Path | None = None  # states the sha256 of all files, so that its own stands for them
    hint: str = ""  # said if the tensors do not fit the config
    rearranged: bool = False  # by the heads of `config`: without one, the rows are not in our order


def name_of(path: Path) -> str:
    """What a checkpoint is called."""
    return path.name if os.path.isdir(path) else path.stem


def step_in_name(name: str) -> int | None:
    """1000 of checkpoint-1000, iter_1000, model-1000."""
    word = re.search(r"(?:checkpoint|ckpt|step|iter)[-_=]?(\d+)", name)
    word = word or re.search(r"(?:^|[-_])(\d+)$", name)
    return int(word[1]) if word else None


def shown(names: Any, limit: int = 5) -> str:
    """Names that others chose, for a message: the first few, none with control characters or of a
    length that hides the rest."""
    names = [names] if isinstance(names, str) or not isinstance(names, list) else names
    texts = [name if isinstance(name, str) else f"{name!r:.100}" for name in names[:limit]]
    texts = [text if text.isprintable() else ascii(text) for text in texts]
    texts = [text if len(text) <= 200 else f"{text[:200]}…" for text in texts]
    return ", ".join(texts) + (", …" if len(names) > limit else "")

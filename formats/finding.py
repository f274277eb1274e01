"""Which checkpoints a path, a directory or a glob stands for; none is passed over in silence.

    expand(["runs/a", "runs/b/checkpoint-*"], look)      # paths, in step order
    listed(Path("runs/a"), look)                         # CheckpointInfo of each

`look(path)` says what a path is, None for no checkpoint: checkpoint.py's, which knows the formats.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cli import note
from formats import named, shown, step_in_name
from tokenizer import TOKENIZER_FILES

INSIDE = re.compile(r"(checkpoint|ckpt|step|epoch|iter|global_step)[-_=]?\d+")
DEPTH = 3  # how deep checkpoints are looked for, to say where they are


class CheckpointInfo(NamedTuple):
    path: Path
    step: int | None
    name: str
    kind: str  # as Checkpoint.kind, or "unreadable"
    problem: str = ""  # why


class Look(NamedTuple):
    """The questions to the formats."""

    is_checkpoint: Callable[[Path], bool]
    info_of: Callable[[Path], CheckpointInfo]
    place_of: Callable[[Path], Path]  # where the files of one lie: itself, or a folder in it


def listed(directory: Path, look: Look) -> list[CheckpointInfo]:
    """The checkpoints in a directory, in step order, those without a step last; with itself, where
    it is one."""
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is not a directory")
    if look.is_checkpoint(directory):
        return _in_order([directory, *_inside(directory, look)], look)
    found = _in_order(filter(look.is_checkpoint, _entries(directory)), look)
    if found:
        _say_of_folders(_entries(directory), look)
    return found


def expand(paths: Iterable[str | Path], look: Look) -> list[Path]:
    """Checkpoint paths from files, checkpoint directories, directories of checkpoints and globs,
    each once, in the order given and in step order within a directory or glob."""
    found: list[Path] = []
    for given in paths:
        path = named(given)
        if look.is_checkpoint(path) or os.path.isfile(path):
            matches = [path]
            if inside := _inside(path, look):
                pattern = path / re.sub(r"\d+$", "*", inside[0].name)
                note(
                    f"{path} is a checkpoint and holds others inside, such as {inside[0].name}, "
                    f"which are left out: give {str(pattern)!r} for them"
                )
        elif os.path.isdir(path):
            matches = [info.path for info in listed(path, look)]
        else:
            globbed = _globbed(given)
            matches = [i.path for i in _in_order(filter(look.is_checkpoint, globbed), look)]
            if matches:
                _say_of_folders(globbed, look)
        if not matches:
            raise ValueError(_what_is_there(given, look))
        found += matches
    return list(dict.fromkeys(found))


def find_tokenizer(path: str | Path) -> Path | None:
    """The directory with tokenizer files that goes with a checkpoint: itself, or the run's."""
    path = named(path)
    places = [path, path.parent] if os.path.isdir(path) else [path.parent]
    for directory in places:
        if any(os.path.isfile(directory / name) for name in TOKENIZER_FILES):
            return directory
    return None


def closed_to_us(path: Path) -> bool:
    """A directory that may not be looked into."""
    return os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK)


def _in_order(paths: Iterable[Path], look: Look) -> list[CheckpointInfo]:
    found = [look.info_of(path) for path in paths]
    return sorted(found, key=lambda c: (c.step is None, c.step or 0, _natural(c.name)))


def _natural(name: str) -> list:
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]


def _entries(directory: Path) -> list[Path]:
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {error.strerror}") from None
    return [directory / name for name in sorted(names, key=_natural) if not name.startswith(".")]


def _globbed(given: str | Path) -> list[Path]:
    return [Path(name) for name in sorted(glob.glob(str(given)), key=_natural)]


def _inside(path: Path, look: Look) -> list[Path]:
    """Checkpoints in the directory of another: a Trainer's steps beside its final model. Not what
    is a part of it: DeepSpeed's only tag, and the one of its own step beside gathered weights."""
    if not os.path.isdir(path) or closed_to_us(path):
        return []
    inside = [p for p in _entries(path) if INSIDE.fullmatch(p.name) and os.path.isdir(p)]
    inside = [p for p in inside if look.is_checkpoint(p)]
    step, own = step_in_name(path.name), look.place_of(path) if inside else path
    return [p for p in inside if p != own and (step is None or step_in_name(p.name) != step)]


# ---------------------------------------------------------------------------------------------
# What is said


def _below(folder: Path, look: Look, depth: int = DEPTH) -> Iterator[Path]:
    """Checkpoints somewhere in a folder that is none."""
    if closed_to_us(folder):
        return
    entries = _entries(folder)[:200]
    for path in entries:
        if look.is_checkpoint(path):
            yield path
        elif depth > 1 and os.path.isdir(path) and not os.path.islink(path):
            yield from _below(path, look, depth - 1)


def _say_of_folders(paths: Iterable[Path], look: Look) -> None:
    """That folders beside checkpoints hold some too, which are not taken."""
    for path in paths:
        if os.path.isdir(path) and not look.is_checkpoint(path):
            if closed_to_us(path):
                note(f"{path} may not be looked into, and is left out")
            inner = next(_below(path, look, 1), None)
            if inner is not None:
                note(f"{path} holds checkpoints too, such as {inner.name}, which are left out")


def inside(path: Path, look: Look) -> str | None:
    """Which checkpoint could be meant where one was asked for and a directory of them was named."""
    inner = next(_below(path, look), None)
    return f"checkpoints lie in it, name one, such as {inner}" if inner else None


def _what_is_there(given: str | Path, look: Look) -> str:
    """Why nothing was found at a path or glob."""
    path = Path(given)
    folders = [path] if os.path.isdir(path) else _globbed(given)
    for folder in filter(os.path.isdir, folders):
        inner = next(_below(folder, look), None)
        if inner is not None:
            place = inner.parent if inner.parent != path else path
            return (
                f"{given} holds no checkpoint itself, but {place} has {inner.name}: "
                f"give {str(place)!r}, or a pattern that leads there"
            )
    if os.path.isdir(path):  # its files tell whether the weights are missing or it is another
        names = [entry.name for entry in _entries(path)]
        return f"{given} holds no checkpoint, only {shown(names) or 'nothing'}"
    if folders:
        return f"{given} matches {shown([str(f) for f in folders], 3)}, but no checkpoint"
    return f"{given} does not exist"

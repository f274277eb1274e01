"""What training goes on from: optimizer, scheduler, epoch, step, loss, and what the caller added.

Ours is trainer_state.pt in a checkpoint's directory; others keep theirs in the file of the weights.
Where ranks had rows of each moment, rank k of n wrote its own to trainer_state-{k}-of-{n}.moments:
safetensors, under a name that nobody takes for weights.
"""

import os
from pathlib import Path
from typing import Any

import torch

from formats import huggingface, inert, stored, tensorfiles
from formats.stored import Stored

STATE_NAMES = {  # ours: theirs
    "optimizer": ("optimizer", "optimizer_state_dict"),
    "scheduler": ("scheduler", "scheduler_state_dict"),
    "epoch": ("epoch",),
    "step": ("step", "iter_num"),
    "loss": ("loss", "best_val_loss"),
    "extra": ("extra",),
}


def read(path: Path, whole: bool = True) -> dict[str, Any]:
    """optimizer, scheduler, epoch, step, loss and extra of a directory or a torch file; None what
    it has not. whole: else tensors are mapped, or where ranks wrote rows of them a Stored, so that
    parts can be read."""
    file = path
    if path.is_dir():
        file = path / "trainer_state.pt"
        file = file if os.path.lexists(file) else huggingface.weight_file(path) or path
    if file.suffix not in tensorfiles.TORCH_SUFFIXES:
        raise ValueError(f"{path} has no training state: it holds weights only (--init-from)")
    source = tensorfiles.open_torch(file)  # its checks; the state itself is then read by torch
    if not isinstance(source.contents, dict):
        raise ValueError(f"{file} holds a {type(source.contents).__name__}, not a training state")
    if source.checked:
        tensorfiles.check_crc(file, [record.name for record in source.records.values()])
    contents = tensorfiles.load_torch(source, mapped=not whole)
    state: dict[str, Any] = {
        ours: next((contents[name] for name in theirs if name in contents), None)
        for ours, theirs in STATE_NAMES.items()
    }
    for name, moment in _moments(path, contents.get("moments")).items():
        index, _, key = name.partition(".")
        own = state["optimizer"]["state"].setdefault(int(index), {})
        own[key] = stored.read_whole(moment) if whole else moment
    return state


def moments_file(directory: Path, rank: int, world_size: int) -> Path:
    """Where a rank's rows lie."""
    return directory / f"trainer_state-{rank + 1:05d}-of-{world_size:05d}.moments"


def _moments(path: Path, about: dict[str, Any] | None) -> dict[str, Stored]:
    """By "{number of the parameter}.{name of the moment}". about: how many "files", and the "dims"
    along which those are cut that are not by rows."""
    if about is None:
        return {}
    n, dims = about["files"], about["dims"]
    tables = [tensorfiles.open_safetensors(moments_file(path, rank, n)) for rank in range(n)]
    names = dict.fromkeys(name for table in tables for name in table)
    return {
        name: stored.beside(name, [t[name] for t in tables if name in t], dims.get(name, 0))
        for name in names
    }


def write(state: dict[str, Any], directory: Path) -> None:
    """trainer_state.pt. ValueError if it could not be loaded again. "moments" in it: what
    lies beside it (_moments)."""
    file = directory / "trainer_state.pt"
    torch.save(state, file)
    foreign = [n for n in tensorfiles.open_torch(file).names if not inert.is_plain(n)]
    if foreign:
        raise ValueError(
            f"the training state holds {', '.join(sorted(foreign))}, which could not be loaded "
            "again: `extra` and the optimizer's state take tensors and plain values only"
        )


def require(state: dict[str, Any], optimizer: Any, scheduler: Any, where: str | Path) -> None:
    """ValueError where a state lacks what is to be restored; None: not asked for."""
    for name, wanted in (("optimizer", optimizer), ("scheduler", scheduler)):
        if wanted is not None and state[name] is None:
            raise ValueError(f"{where} holds no {name} state")


def restore(state: dict[str, Any], optimizer: Any, scheduler: Any, where: str | Path) -> None:
    """Into an optimizer and a scheduler; None: not asked for."""
    try:
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: its training state does not fit: {error}") from None

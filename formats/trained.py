"""What the formats of trainers share: a config from beside the weights, names put under ours.

return trained.opened(path, "dcp", FORMAT, tensors, config, files)
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, dialects, huggingface, naming
from formats.stored import Stored, whole
from inputs import read_object

# what all of Llama's kind have in common
LLAMA = {
    "norm": "rmsnorm", "position": "rope", "gated_mlp": True, "activation": "silu", "bias": False,
    "dropout": 0.0,
}  # fmt: skip


def opened(
    path: Path,
    kind: str,
    format: str,
    tensors: dict[str, Stored],
    config: GPTConfig | None,
    files: Iterable[Path] = (),
    problem: str = "",
    **facts: Any,
) -> Opened:
    """What a format answers of a model's tensors under its trainer's names. config: as given, or as
    the checkpoint itself has it; without one, `problem` says why, else a Hugging Face config.json
    in the directory or the one above it is looked for. facts: what else the files state; `step`
    is taken if it is an integer."""
    step = facts.pop("step", None)
    pieces = {piece.file for stored in tensors.values() for piece in stored.pieces}
    beside = path.parent if _only_above(path) else path
    token_ids: dict[str, Any] = {}
    model_types: tuple[object, ...] = ()
    inside: tuple[Path, ...] = ()
    if not problem:
        said = huggingface.config_beside(beside, config, tensors)
        config, problem, token_ids = said.config, said.problem, said.token_ids
        model_types = said.model_types
        inside = said.files if beside == path else ()
    dialect, rearranged = dialects.dialect_of(tensors), False
    if dialect is None:
        tensors, layout = naming.identify(tensors, model_types)
    else:
        if config is None and problem.startswith(f"{path} has no config"):
            problem = dialects.no_config(path, dialects.facts(tensors, dialect))
        spec, layout = dialects.DIALECTS[dialect], "native"
        rearranged = spec.paired or spec.grouped
        tensors = dialects.translated(tensors, dialect, config)
    return Opened(
        path=path,
        kind=kind,
        format=format,
        tensors=tensors,
        layout=layout,
        files=tuple(sorted({*files, *pieces, *inside})),
        config=config,
        problem=problem,
        step=step if type(step) is int else step_beside(path),
        facts={**token_ids, **facts},
        rearranged=rearranged,
    )


def weights(values: Any, where: Path) -> dict[str, Stored]:
    """A state dict of archives.py as a table."""
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where} holds no dictionary of weights")
    for name, value in values.items():
        if type(name) is not str or not isinstance(value, Stored):
            kind = getattr(value, "name", type(value).__name__)
            raise ValueError(f"{where}: {name!r} is of type {kind}, not a tensor")
    return values


def laid_out(
    file: Path, offset: int, dtype: torch.dtype, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, Stored]:
    """The tensors that fill a file from `offset` to its end, one after the other. No further than
    it reaches: a header can promise billions."""
    tensors, size = {}, file.stat().st_size
    for name, shape in shapes:
        tensors[name] = whole(file, offset, dtype, shape)
        offset += math.prod(shape) * dtype.itemsize
        if offset > size:
            break
    if offset != size:
        raise ValueError(
            f"{file} is {'truncated' if offset > size else 'damaged'}: its header promises "
            f"{'at least ' if offset > size else ''}{offset:,} bytes, the file has {size:,}"
        )
    return tensors


def _only_above(path: Path) -> bool:
    here, above = (folder / "config.json" for folder in (path, path.parent))
    return path.is_dir() and not here.is_file() and above.is_file()


def step_beside(path: Path) -> int | None:
    """The step that transformers' Trainer notes in trainer_state.json, in a checkpoint's directory
    or the one above."""
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        try:
            step = read_object(folder / "trainer_state.json").get("global_step")
        except ValueError:  # it is not there, or no Trainer's
            continue
        if type(step) is int:
            return step
    return None

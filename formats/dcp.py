"""torch.distributed.checkpoint (DCP): a directory of .distcp files, one or more a rank.

    step-1000/.metadata  __0_0.distcp  __1_0.distcp …     torchtitan, Lightning, own scripts
    checkpoint-300/config.json  pytorch_model_fsdp_0/…     accelerate and transformers' Trainer

.metadata, which is renamed into place when all else is written, is a pickle that says which box of
which tensor lies where. It is read by pickles.py, from a list of names that is closed. A box is a
small archive of torch.save inside a .distcp file; its bytes are read where they lie.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from config import GPTConfig
from formats import Opened, archives, dialects, pickles, trained
from formats.stored import FLOATS, Piece, Stored, joined
from inputs import refuse_impostor

FORMAT = "formats/dcp.py"
MAX_METADATA = 1 << 30
# where accelerate puts the weights, below the directory of a step
INSIDE = ("pytorch_model_fsdp_0",)

_TORCH = "torch.distributed.checkpoint"
_RECORDS = (
    *(f"{_TORCH}.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(f"{_TORCH}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{_TORCH}.planner.{name}" for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
    )),
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # torch <= 2.2
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "olmo_core.distributed.checkpoint.filesystem._StorageInfo",
    "olmo_core.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    *(f"torch.{dtype}" for dtype in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
        "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    )),
)  # fmt: skip
NAMES: pickles.Names = {name: None for name in _RECORDS} | {
    "torch.Size": lambda sizes=(): tuple(sizes),
    "collections.OrderedDict": lambda: {},
}


def place(path: Path) -> Path | None:
    """The directory of the .distcp files of a checkpoint: itself, or one that a trainer puts in."""
    for folder in (path, *(path / name for name in INSIDE)):
        if os.path.isdir(folder) and (metadata_files(folder) or any(folder.glob("__*.distcp"))):
            return folder
    return None


def metadata_files(folder: Path) -> list[Path]:
    """.metadata, or what each rank wrote where they did not speak to each other."""
    whole = folder / ".metadata"
    return [whole] if os.path.isfile(whole) else sorted(folder.glob("__[0-9]*.metadata"))


def recognises(path: Path) -> bool:
    """By .metadata or .distcp files; a save that is not finished, or never was, too."""
    return place(path) is not None


def finished(path: Path) -> bool | None:
    """Whether the save is complete: .metadata comes last. None where each rank writes its own."""
    folder = place(path)
    sources = [] if folder is None else metadata_files(folder)
    return None if sources and sources[0].name != ".metadata" else bool(sources)


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the names of files."""
    return "dcp", trained.step_beside(path)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """Where every box of every tensor of the model lies; config.json from beside it."""
    folder = place(path) or path
    tensors = tensors_in(folder)
    return trained.opened(path, "dcp", FORMAT, tensors, config, files=metadata_files(folder))


def tensors_in(folder: Path) -> dict[str, Stored]:
    """The model's tensors, under its module's names. Optimizers, and objects such as the state of
    a dataloader, are passed over: they are not opened."""
    sources = metadata_files(folder)
    if not sources:
        raise ValueError(
            f"{folder} has .distcp files but no .metadata: the save is going on or was broken off"
        )
    tensors = _tensors(folder, sources)
    if not tensors:
        raise ValueError(f"{folder} holds no tensors of a model")
    return tensors


# ---------------------------------------------------------------------------------------------
# .metadata


class _Stated(NamedTuple):
    """What .metadata says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]  # (start, shape)


def _tensors(folder: Path, sources: list[Path]) -> dict[str, Stored]:
    stated: dict[str, _Stated] = {}
    places: dict[tuple, dict] = {}
    for source in sources:
        tensors, where = _read_metadata(source)
        places |= where
        for name, said in tensors.items():
            known = stated.get(name, said)
            if known[:2] != said[:2]:
                raise ValueError(f"{source}: {name} is {said[:2]}, elsewhere {known[:2]}")
            more = [box for box in said.boxes if known is said or box not in known.boxes]
            stated[name] = said if known is said else known._replace(boxes=known.boxes + more)
    shapes = {name: Stored(said.dtype, said.shape, ()) for name, said in stated.items()}
    names = {id(t): name for name, t in shapes.items()}
    part = {ours: names[id(t)] for ours, t in dialects.model_part(shapes).items()}
    return {ours: _tensor(name, stated[name], places, folder) for ours, name in part.items()}


def _read_metadata(source: Path) -> tuple[dict[str, _Stated], dict[tuple, dict]]:
    """(tensors by name, where boxes lie by name and start)."""
    if source.stat().st_size > MAX_METADATA:
        raise ValueError(f"{source} has {source.stat().st_size:,} bytes: it is no table of tensors")
    refuse_impostor(source)
    root = pickles.read(source.read_bytes(), str(source), NAMES, most=MAX_METADATA)
    try:
        entries = root.state["state_dict_metadata"].items()
        tensors = {
            name: _stated(entry)
            for name, entry in entries
            if not entry.name.endswith("BytesStorageMetadata")
        }
        places = {}
        for index, info in root.state["storage_data"].items():
            start = index.state.get("offset")
            places[index.state["fqn"], start and tuple(start)] = info.state
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{source} is no metadata of torch.distributed.checkpoint") from None
    return tensors, places


def _stated(entry: pickles.Record) -> _Stated:
    said = entry.state
    properties = said["properties"].state
    dtype = properties[0] if type(properties) is tuple else properties["dtype"]
    shape = tuple(said["size"])
    boxes = [(tuple(c.state["offsets"]), tuple(c.state["sizes"])) for c in said["chunks"]]
    numbers = [*shape, *(n for box in boxes for side in box for n in side)]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a size that is none")
    return _Stated(dtype.name.removeprefix("torch."), shape, boxes)


# ---------------------------------------------------------------------------------------------
# Boxes


def _tensor(name: str, said: _Stated, places: dict[tuple, dict], folder: Path) -> Stored:
    """A tensor of boxes, each found in its .distcp file and of the size that .metadata states."""
    dtype = getattr(torch, said.dtype)
    if dtype not in FLOATS:  # check_fits says that no model has such weights
        return Stored(said.dtype, said.shape, ())
    pieces = []
    for start, shape in said.boxes:
        where = places.get((name, start)) or (places.get((name, None)) if not any(start) else None)
        if where is None:
            raise ValueError(f"{folder}/.metadata does not say where {name} {list(start)} lies")
        pieces.append(_piece(name, start, shape, dtype, where, folder))
    if not pieces:
        raise ValueError(f"{folder}/.metadata knows of no part of {name} {list(said.shape)}")
    return joined(name, dtype, said.shape, pieces)


def _piece(name, start, shape, dtype, where: dict, folder: Path) -> Piece:
    relative, offset, length = (where.get(k) for k in ("relative_path", "offset", "length"))
    if where.get("transform_descriptors"):
        raise ValueError(
            f"{folder}: {name} was written through {where['transform_descriptors']}, an extension "
            "that is not read: save it without"
        )
    if type(relative) is not str or Path(relative).name != relative or relative in ("", ".."):
        raise ValueError(f"{folder}/.metadata names {relative!r}: its files lie beside it")
    if type(offset) is not int or type(length) is not int:
        raise ValueError(f"{folder}/.metadata does not say at which byte {name} lies")
    file = folder / relative
    if not file.is_file():
        raise ValueError(f"{folder} lacks {relative}, which holds a part of {name}")
    held = archives.open_archive(file, offset, length)
    if not isinstance(held, Stored) or (held.dtype, held.shape) != (dtype, shape):
        what = f"{held.dtype} {list(held.shape)}" if isinstance(held, Stored) else "no tensor"
        raise ValueError(
            f"{file} holds {what} at byte {offset:,}, where .metadata has {name} as "
            f"{dtype} {list(shape)}: they are not of one save"
        )
    return held.pieces[0]._replace(start=start)

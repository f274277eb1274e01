"""safetensors as torch.distributed.checkpoint's HuggingFaceStorageWriter leaves them.

    shard-00001-model-00001-of-00001.safetensors …     a rank's parts of tensors, under their names

DCP_SHARDING_INFO in each file's metadata says where in the whole a part begins. What it has
consolidated, or written from one rank, is a Hugging Face directory: huggingface.py opens it.
"""

import json
import os
import re
from pathlib import Path

import cli
from config import GPTConfig
from formats import Opened, dialects, tensorfiles, trained
from formats.stored import Piece, Stored, joined

FORMAT = "formats/dcp_safetensors.py"
PART = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")


def parts(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("shard-*.safetensors") if PART.fullmatch(file.name))


def recognises(path: Path) -> bool:
    """By the names of the files."""
    return os.path.isdir(path) and bool(parts(path))


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the names of files."""
    return "dcp-safetensors", trained.step_beside(path)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The headers of all files, their parts joined; config.json from beside them."""
    tensors = dialects.model_part(_joined(path))
    return trained.opened(path, "dcp-safetensors", FORMAT, tensors, config)


def _joined(path: Path) -> dict[str, Stored]:
    boxes: dict[str, list[Stored]] = {}
    for file in parts(path):
        table, starts = tensorfiles.open_safetensors(file), _starts(file)
        for name, stored in table.items():
            start = starts.get(name, {}).get("saved_offsets")
            start = (0,) * len(stored.shape) if start is None else tuple(start)
            if len(start) != len(stored.shape) or any(type(n) is not int for n in start):
                raise ValueError(f"{file}: {name} {list(stored.shape)} begins at {start}")
            piece: Piece = stored.pieces[0]._replace(start=start)
            boxes.setdefault(name, []).append(Stored(stored.dtype, stored.shape, (piece,)))
    return {name: _tile(name, found) for name, found in boxes.items()}


def _starts(file: Path) -> dict[str, dict]:
    """name: {"saved_offsets": [...]}. After open_safetensors, so the header is sound."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    try:
        said = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        return {name: dict(entry) for name, entry in said.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        why = cli.first_line(error)
        raise ValueError(f"{file} does not say where its parts begin: {why}") from None


def _tile(name: str, found: list[Stored]) -> Stored:
    """The tensor whose parts these are: as large as they reach, for no file says more."""
    if len({(part.dtype, len(part.shape)) for part in found}) != 1:
        raise ValueError(f"{found[0].pieces[0].file}: parts of {name} differ in their type")
    pieces = [part.pieces[0] for part in found]
    ends = [[a + n for a, n in zip(piece.start, piece.shape)] for piece in pieces]
    shape = [max(end) for end in zip(*ends)]
    return joined(name, found[0].dtype, shape, pieces)

"""Files of tensors that somebody else made: read without running, trusting or copying anything.

    table = open_safetensors(path)                   # tensor name -> where its bytes lie
    source = open_torch(path)                        # .pt, .pth, .bin: structure only
    table = stored_tensors(source, source.contents["model"])

The tables are stored.py's. Whatever is wrong with a file is a ValueError of one line that names the
file. Nothing that a pickle names is imported or called (pickles.py), and nothing is allocated by a
size that a file merely claims. torch and safetensors only.
"""

import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import cli
from formats import inert, pickles, shown
from formats.stored import FLOATS, Stored, read_whole, whole
from inputs import refuse_impostor

SAFETENSORS_DTYPES = {"F32": FLOATS[0], "BF16": FLOATS[1], "F16": FLOATS[2], "F64": FLOATS[3]}
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
MAX_HEADER = 10 << 20  # of a safetensors file; 20 MB take seconds to parse, honest ones have < 1 MB
MAX_PICKLE = 64 << 20  # of a torch file's structure, without its tensors
MAX_DIRECTORY = 32 << 20  # of a torch file's table of contents, which has 80 bytes a tensor
# What no honest file names, but for this: some Pythons pickle a member of an enum as a call of it
HARMLESS_HERE = "builtins.getattr"


# ---------------------------------------------------------------------------------------------
# safetensors


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The table of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    refuse_impostor(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        header_bytes = int.from_bytes(f.read(8), "little")
        if size < 8 or header_bytes > MAX_HEADER:
            raise ValueError(
                f"{path} is no safetensors file: its header would have {header_bytes:,} bytes, "
                f"the file has {size:,} (the header's limit is {MAX_HEADER:,})"
            )
        header = f.read(header_bytes)
    try:
        os.fsencode(path).decode()  # its bytes: Python's text of them goes by the locale
    except UnicodeDecodeError:
        why = "safetensors opens no path that is not UTF-8: rename what is not"
        raise ValueError(f"{path}: {why}") from None
    try:
        with safe_open(path, "pt"):  # the library's own checks: bounds, overlaps, holes
            header = json.loads(header)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated, still being written, or no safetensors file: "
            f"{cli.first_line(error)}"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: whole(
            path,
            8 + header_bytes + entry["data_offsets"][0],
            SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]),
            entry["shape"],
        )
        for name, entry in header.items()
    }


# ---------------------------------------------------------------------------------------------
# torch.save


class Record(NamedTuple):
    """An entry of a torch file, which is an uncompressed zip archive."""

    name: str
    offset: int
    size: int
    crc: int


def zip_records(path: Path) -> list[Record]:
    """Where each entry lies. Anything that torch.save would not have written is refused."""
    refuse_impostor(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            raise ValueError(
                f"{path} is not a torch file. If it is one from before torch 1.6, save it anew: "
                "torch.save(torch.load(path, weights_only=True), path)"
            )
        if _directory_size(f, size) > MAX_DIRECTORY:
            raise ValueError(f"{path} is no file of torch.save: it has too many entries")
        try:
            entries = zipfile.ZipFile(f).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error):
            raise ValueError(
                f"{path} ({size:,} bytes) is truncated or still being written: "
                "the table of contents that ends it is missing"
            ) from None
        records = [_record(f, entry, size, path) for entry in entries]
    names = {record.name for record in records}
    if len(names) < len(records):
        raise ValueError(f"{path} is no file of torch.save: it has two entries of one name")
    return records


def _directory_size(f, size: int) -> int:
    """Bytes of the table of contents, each of which costs ten of memory; 0 where there is none."""
    f.seek(max(0, size - (1 << 16) - 100))
    tail = f.read()
    large, small = tail.rfind(b"PK\x06\x06"), tail.rfind(b"PK\x05\x06")
    if 0 <= large <= len(tail) - 48:
        return struct.unpack_from("<Q", tail, large + 40)[0]
    return struct.unpack_from("<I", tail, small + 12)[0] if 0 <= small <= len(tail) - 16 else 0


def _record(f, entry: zipfile.ZipInfo, size: int, path: Path) -> Record:
    local, name = b"", shown(entry.filename)
    if 0 <= entry.header_offset < size:
        f.seek(entry.header_offset)
        local = f.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {name} is not where its table says")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"{path} is no file of torch.save: {name} is compressed")
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    end = offset + entry.file_size
    if end > size:
        raise ValueError(f"{path} ends at byte {size:,}, its {name} at {end:,}")
    return Record(entry.filename, offset, entry.file_size, entry.CRC)


def check_crc(path: Path, names: Iterable[str]) -> None:
    """torch.load does not: a flipped bit would be a slightly different model."""
    records = {record.name: record for record in zip_records(path)}
    with open(path, "rb") as f:
        for name in sorted(names):
            left, crc = records[name].size, 0
            f.seek(records[name].offset)
            while left and (block := f.read(min(left, 1 << 20))):
                left, crc = left - len(block), zlib.crc32(block, crc)
            if left or crc != records[name].crc:
                raise ValueError(f"{path} is damaged: the checksum of {shown(name)} is wrong")


class TorchFile(NamedTuple):
    path: Path
    contents: Any  # with inert.Tensor for tensors: nothing of them is read
    names: set[str]  # what the pickle names
    records: dict[str, Record]  # by their names within the archive
    checked: bool  # whether the file has checksums: torch can be told to write none


def open_torch(path: Path) -> TorchFile:
    """The structure of a file of torch.save."""
    records = {r.name.partition("/")[2]: r for r in zip_records(path)}
    pickled = records.get("data.pkl")
    if pickled is None or pickled.size > MAX_PICKLE:
        raise ValueError(
            f"{path} is no file of torch.save: "
            + (f"data.pkl has {pickled.size:,} bytes" if pickled else "it has no data.pkl")
        )
    checked = pickled.crc != 0  # all are 0 where torch wrote none
    if checked:
        check_crc(path, [pickled.name])
    order = records.get("byteorder")
    if order is not None and order.size != len("little"):
        raise ValueError(f"{path} was written on a big-endian machine")
    with open(path, "rb") as f:
        f.seek(pickled.offset)
        data = f.read(pickled.size)
    try:
        contents, names = inert.read_pickle(data)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {cli.first_line(error)}") from None
    hostile = sorted(n for n in names if pickles.runs_code(n) and n != HARMLESS_HERE)
    if hostile:
        raise ValueError(
            f"{path} holds {shown(hostile)}: it was made to run code where others load it. Nothing "
            "of it ran here; do not use it"
        )
    return TorchFile(path, contents, names, records, checked)


def mapping(source: TorchFile) -> dict:
    """A torch file's contents, which must be a dictionary."""
    found = source.contents
    if isinstance(found, pickles.Record):
        raise ValueError(
            f"{source.path} holds a whole {shown(found.name)}, which only its own code can load: "
            "save its state_dict() instead, where the file was made"
        )
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{source.path} holds a {kind}, not a dictionary of weights")
    return found


def stored_tensors(source: TorchFile, state_dict: dict) -> dict[str, Stored]:
    """The table of a dictionary of tensors in a file. What a tensor claims must be what the archive
    holds: torch itself would read on into whatever follows, and repeat a number 2^40 times."""
    table = {}
    for name, t in state_dict.items():
        if type(name) is not str or not isinstance(t, inert.Tensor):
            kind = t.name if isinstance(t, pickles.Record) else type(t).__name__
            what = "not plain numbers" if "tensor" in kind else "not a tensor"
            raise ValueError(f"{source.path}: {name!r:.200} is of type {shown(kind)}, {what}")
        table[name] = stored_tensor(source, name, t)
    return table


def stored_tensor(source: TorchFile, name: str, t: inert.Tensor) -> Stored:
    """Where a tensor of a torch file lies. ValueError for one that claims more than is there."""
    record, size = source.records.get(f"data/{t.storage.key}"), t.storage.dtype.itemsize
    held = record.size if record else 0
    if t.storage.numel * size != held:
        raise ValueError(
            f"{source.path} is damaged: {shown(name)} claims {t.storage.numel * size:,} bytes in "
            f"data/{shown(t.storage.key)}, the file holds {held:,}"
        )
    numel = math.prod(t.shape)
    last = t.offset + sum((n - 1) * stride for n, stride in zip(t.shape, t.strides))
    claimed = max(numel, last + 1 if numel else 0) * t.dtype.itemsize
    if claimed > held:
        raise ValueError(
            f"{source.path}: tensor {shown(name)} {list(t.shape)} claims {numel:,} elements, "
            f"the file holds {held:,} bytes of it"
        )
    offset = (record.offset if record else 0) + t.offset * t.dtype.itemsize
    in_order = all(
        n == 1 or stride == math.prod(t.shape[d + 1 :])
        for d, (n, stride) in enumerate(zip(t.shape, t.strides))
    )
    as_it_lies = None if in_order or not numel else t.strides
    covered = record.name if record and source.checked else ""
    return whole(source.path, offset, t.dtype, t.shape, covered, as_it_lies)


def number(source: TorchFile, value: Any) -> int | float | None:
    """A plain number of what a training file holds, tensors of one element included."""
    if isinstance(value, inert.Tensor) and math.prod(value.shape) == 1:
        value = read_whole(stored_tensor(source, "a number", value)).item()
    return value if type(value) in (int, float) and -1e300 < value < 1e300 else None


def load_torch(source: TorchFile, mapped: bool = False) -> Any:
    """torch.load of tensors and plain values; anything else in the file is named and refused.
    mapped: a tensor's numbers are read when they are used."""
    require_safe_torch()
    path, foreign = source.path, sorted(n for n in source.names if not inert.is_plain(n))
    if foreign:
        raise ValueError(
            f"{path} holds {shown(foreign)}: loading that could run code, so it is refused. Save "
            "state_dict() and plain values instead, where the file was made"
        )
    with torch.serialization.safe_globals(_numpys_own()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # an edge: a hostile pickle can raise anything
            raise ValueError(f"{path} cannot be read: {cli.first_line(error)}") from None


def _numpys_own() -> list:
    """What honest training files hold beyond tensors: numpy numbers and arrays (RNG states)."""
    core: Any = np._core if hasattr(np, "_core") else np.core
    named = [
        (getattr(core.multiarray, function), f"numpy.{name}.multiarray.{function}")
        for name in ("core", "_core")
        for function in ("scalar", "_reconstruct")
    ]
    kinds = ["Float64", "Float32", "Int64", "Int32", "UInt64", "UInt32", "UInt8", "Bool"]
    return [*named, np.ndarray, np.dtype, *(getattr(np.dtypes, f"{k}DType") for k in kinds)]


def require_safe_torch() -> None:
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise ValueError(
            f"torch {torch.__version__} is refused: below 2.10 its weights_only loading can be "
            "made to run code (CVE-2025-32434, CVE-2026-24747)"
        )


# ---------------------------------------------------------------------------------------------
# Numbers in bulk


def extremes(t: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value [2], both NaN if there is one; makes no temporary."""
    return torch.stack(torch.aminmax(t if t.is_contiguous() else t.t())).float()


def nonfinite(extremes: dict[str, torch.Tensor]) -> list[str]:
    """The tensors whose `extremes` are not finite."""
    if not extremes:  # an adapter of layers that another rank holds, say
        return []
    good = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist()
    return [name for name, ok in zip(extremes, good) if not ok]


def refuse_nonfinite(extremes: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError that names the tensors whose `extremes` are not finite."""
    bad = nonfinite(extremes)
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} of {len(extremes)} tensors hold NaN or Inf: {shown(bad)}"
        )


def write_safetensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    others: dict[str, torch.dtype] | None = None,
    made: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """One tensor at a time: the library's save_file wants all of them contiguous on the host.
    others: the dtypes of those that are not written as `dtype`. made: gives each tensor when its
    turn comes (in order, where all have one dtype), and `tensors` only say their shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, codes = 0, {d: code for code, d in SAFETENSORS_DTYPES.items()}
    dtypes = {name: (others or {}).get(name, dtype) for name in tensors}
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)  # so that all are aligned
    for name in names:
        t, own = tensors[name], dtypes[name]
        end = offset + t.numel() * own.itemsize
        header[name] = {"dtype": codes[own], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            t = made(name) if made else tensors[name]
            host = t.detach().to("cpu", dtypes[name]).contiguous()
            f.write(host.view(-1).view(torch.uint8).numpy().data)

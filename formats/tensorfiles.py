"""Files of tensors that somebody else made: read without running, trusting or copying anything.

    table = open_safetensors(path)                   # tensor name -> where its bytes lie
    source = open_torch(path)                        # .pt, .pth, .bin: structure only, mapped
    table = stored_tensors(source, source.contents["model"])

The tables are stored.py's. Whatever is wrong with a file is a ValueError of one line that names the
file. Nothing is unpickled beyond tensors and plain values (`weights_only=True`, no fallback), and
nothing is allocated by a size that the file merely claims. torch and safetensors only.
"""

import json
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import cli
from durable import refuse_impostor
from formats.stored import FLOATS, Stored, whole

SAFETENSORS_DTYPES = {"F32": FLOATS[0], "BF16": FLOATS[1], "F16": FLOATS[2], "F64": FLOATS[3]}
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
MAX_HEADER = 10 << 20  # of a safetensors file; 20 MB take seconds to parse, honest ones have < 1 MB
MAX_PICKLE = 64 << 20  # of a torch file's structure, without its tensors


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
        try:
            entries = zipfile.ZipFile(f).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error):
            raise ValueError(
                f"{path} ({size:,} bytes) is truncated or still being written: "
                "the table of contents that ends it is missing"
            ) from None
        return [_record(f, entry, size, path) for entry in entries]


def _record(f, entry: zipfile.ZipInfo, size: int, path: Path) -> Record:
    f.seek(max(entry.header_offset, 0))
    local = f.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: {entry.filename} is not where its table says")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"{path} is no file of torch.save: {entry.filename} is compressed")
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    end = offset + entry.file_size
    if end > size:
        raise ValueError(f"{path} ends at byte {size:,}, its {entry.filename} at {end:,}")
    return Record(entry.filename, offset, entry.file_size, entry.CRC)


def check_crc(path: Path, names: Iterable[str]) -> None:
    """torch.load does not: a flipped bit would be a slightly different model."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(names):
            try:
                with archive.open(name) as f:
                    while f.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, EOFError, RuntimeError):
                raise ValueError(f"{path} is damaged: the checksum of {name} is wrong") from None


def allowed_globals() -> list:
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


def load_torch(path: Path, mapped: bool, place: Any = "cpu") -> Any:
    """torch.load of tensors and plain values; anything else in the file is named and refused."""
    require_safe_torch()
    with torch.serialization.safe_globals(allowed_globals()):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not unsafe:
                return torch.load(path, map_location=place, mmap=mapped, weights_only=True)
        except Exception as error:  # an edge: a hostile pickle can raise anything
            raise ValueError(f"{path} cannot be read: {cli.first_line(error)}") from None
    raise ValueError(
        f"{path} holds {', '.join(sorted(unsafe)[:5])}: loading that could run code, so it is "
        "refused. Save state_dict() and plain values instead, where the file was made"
    )


class TorchFile(NamedTuple):
    path: Path
    contents: object  # tensors in it are memory-mapped: nothing is read yet
    base: int  # the address of byte 0
    records: list[Record]  # of tensors; nameless where the file has no checksums


def open_torch(path: Path) -> TorchFile:
    """Map a file of torch.save. What its pickle claims of each storage must be what the archive
    holds: torch itself would read on into whatever follows."""
    records = {r.name.partition("/")[2]: r for r in zip_records(path)}
    pickled = records.get("data.pkl")
    if pickled is None or pickled.size > MAX_PICKLE:
        raise ValueError(
            f"{path} is no file of torch.save: "
            + (f"data.pkl has {pickled.size:,} bytes" if pickled else "it has no data.pkl")
        )
    checked = pickled.crc != 0  # torch can be told to write no checksums: all are 0 then
    if checked:
        check_crc(path, [pickled.name])
    order = records.get("byteorder")
    if order is not None and order.size != len("little"):
        raise ValueError(f"{path} was written on a big-endian machine")
    claimed = set()

    def place(storage, location):
        claimed.add((storage.data_ptr(), storage.nbytes()))
        return storage

    contents = load_torch(path, True, place)
    spans = sorted(span for span in claimed if span[1])
    held = [r for leaf, r in records.items() if leaf.startswith("data/") and r.size]
    held.sort(key=lambda r: r.offset)
    base = spans[0][0] - held[0].offset if spans and held else 0
    if [(address - base, n) for address, n in spans] != [(r.offset, r.size) for r in held]:
        raise ValueError(
            f"{path} is damaged: its tensors claim {sum(n for _, n in spans):,} bytes in "
            f"{len(spans)} pieces, the file holds {sum(r.size for r in held):,} in {len(held)}"
        )
    return TorchFile(path, contents, base, held if checked else [r._replace(name="") for r in held])


def mapping(source: TorchFile) -> dict:
    """A torch file's contents, which must be a dictionary."""
    if not isinstance(source.contents, dict):
        kind = type(source.contents).__name__
        raise ValueError(f"{source.path} holds a {kind}, not a dictionary of weights")
    return source.contents


def stored_tensors(source: TorchFile, state_dict: dict) -> dict[str, Stored]:
    """The table of a dictionary of tensors in a file, which keeps none of them mapped. Strides that
    claim more than is there, such as a stride of 0, are refused."""
    path, table = source.path, {}
    records = {record.offset: record.name for record in source.records}
    for name, t in state_dict.items():
        if type(name) is not str or not isinstance(t, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is of type {type(t).__name__}, not a tensor")
        if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized or t.is_neg():
            raise ValueError(f"{path}: tensor {name} ({t.layout}, {t.device}) is not plain numbers")
        storage, shape, strides = t.untyped_storage(), tuple(map(int, t.shape)), t.stride()
        start = storage.data_ptr() - source.base
        span = t.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        claimed = max(t.numel(), span if t.numel() else 0) * t.element_size()
        if claimed > storage.nbytes() or (t.numel() and start not in records):
            raise ValueError(
                f"{path}: tensor {name} {list(shape)} claims {t.numel():,} elements, "
                f"the file holds {storage.nbytes():,} bytes of it"
            )
        offset = int(start + t.storage_offset() * t.element_size())
        as_it_lies = None if t.is_contiguous() else strides
        table[name] = whole(path, offset, t.dtype, shape, records.get(start, ""), as_it_lies)
    return table


def extremes(t: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value [2], both NaN if there is one; makes no temporary."""
    return torch.stack(torch.aminmax(t if t.is_contiguous() else t.t())).float()


def refuse_nonfinite(extremes: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError that names the tensors whose `extremes` are not finite."""
    good = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist()
    bad = [name for name, ok in zip(extremes, good) if not ok]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} of {len(good)} tensors hold NaN or Inf: {', '.join(bad[:5])}"
        )


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """One tensor at a time: the library's save_file wants all of them contiguous on the host."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    code = next(c for c, d in SAFETENSORS_DTYPES.items() if d == dtype)
    for name, t in tensors.items():
        end = offset + t.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            host = t.detach().to("cpu", dtype).contiguous()
            f.write(host.view(-1).view(torch.uint8).numpy().data)

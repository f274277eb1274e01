"""Files of torch.save that hold more than tensors and plain values, read without torch.load.

    contents = open_archive(path)                      # a file
    contents = open_archive(path, 4096, 1_000_000)     # one that lies inside another file

Tensors are answered as stored.Stored, where their bytes lie; objects of classes as inert records
(formats/pickles.py), so that files of trainers that pickle their own settings beside the weights
open without those trainers, and without running a byte of them.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from formats.pickles import Anything, Record, read
from formats.stored import Checksum, Piece, Stored
from inputs import refuse_impostor

STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_PICKLE = 256 << 20


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, n: int | None = -1) -> bytes:
        left = max(0, self.length - self.at)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if n is None or n < 0 else min(n, left))
        self.at += len(data)
        return data


class Entry(NamedTuple):
    """An entry of the archive, in bytes of the file that it lies in."""

    offset: int
    size: int
    crc: int


def entries(f: BinaryIO, where: str, start: int, length: int) -> dict[str, Entry]:
    """name: where it lies. Names lack the folder that torch.save gives them all."""
    window = _Window(f, start, length)
    if window.read(4) != b"PK\x03\x04":
        raise ValueError(
            f"{where} is no archive of torch.save; if it was written before torch 1.6, or without "
            "its zip format, save it anew with torch.save"
        )
    try:
        infos = zipfile.ZipFile(window).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error):
        raise ValueError(
            f"{where} ({length:,} bytes) is truncated or still being written: the table of "
            "contents that ends it is missing"
        ) from None
    found = {}
    for info in infos:
        window.seek(max(info.header_offset, 0))
        local = window.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError(f"{where} is damaged: {info.filename} is not where its table says")
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        whole = info.compress_size == info.file_size and info.compress_type == zipfile.ZIP_STORED
        if not whole or offset + info.file_size > length:
            raise ValueError(f"{where} is damaged: {info.filename} is compressed or cut short")
        name = info.filename.partition("/")[2]
        found[name] = Entry(start + offset, info.file_size, info.CRC)
    return found


def open_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What was saved, in a file or in a part of one. ValueError in one line."""
    if not start:
        refuse_impostor(path)
    size = path.stat().st_size
    length = size - start if length is None else length
    where = f"{path}" if length == size else f"{path}: what lies at byte {start:,}"
    if not 0 <= start <= start + length <= size:
        raise ValueError(f"{path} ends at byte {size:,}, a part of it at {start + length:,}")
    with open(path, "rb") as f:
        found = entries(f, where, start, length)
        pickled, order = found.get("data.pkl"), found.get("byteorder")
        if pickled is None or pickled.size > MAX_PICKLE:
            raise ValueError(f"{where} is no file of torch.save: its data.pkl is missing or huge")
        if order is not None and order.size != len("little"):
            raise ValueError(f"{where} was written on a big-endian machine")
        f.seek(pickled.offset)
        data = f.read(pickled.size)
    if pickled.crc and zlib.crc32(data) != pickled.crc:  # it holds settings, which no shape checks
        raise ValueError(f"{where} is damaged: the checksum of its data.pkl is wrong")
    return read(data, where, _Names(_Tensors(path, where, found)), _Storage)


def mentions(path: Path, words: Iterable[bytes]) -> bool:
    """Whether the pickle of a file of torch.save holds all of these; it is not interpreted. False
    for what is no such file, or may not be read."""
    try:
        with open(path, "rb") as f:
            entry = entries(f, str(path), 0, path.stat().st_size).get("data.pkl")
            if entry is None or entry.size > MAX_PICKLE:
                return False
            f.seek(entry.offset)
            data = f.read(entry.size)
    except (OSError, ValueError):
        return False
    return all(word in data for word in words)


def head(path: Path, n: int) -> bytes:
    """The first bytes of a file; none of one that may not be read."""
    try:
        with open(path, "rb") as f:
            return f.read(n)
    except OSError:
        return b""


class _Storage(NamedTuple):
    """What a pickle says of a storage: ("storage", its class, its key, its device, its length)."""

    said: tuple


class _Tensors:
    """Makes Stored of what pickles say of tensors, checked against what the archive holds."""

    def __init__(self, path: Path, where: str, found: dict[str, Entry]):
        self.path, self.where, self.found = path, where, found

    def rebuilt(self, storage, offset, shape, strides, *_) -> Stored:
        _, kind, key, _, numel = storage.said
        entry = self.found.get(f"data/{key}")
        dtype = STORAGES.get(kind.name.rpartition(".")[2], kind.name)
        itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
        if not isinstance(dtype, torch.dtype):
            return Stored(dtype, tuple(shape), ())
        if entry is None or entry.size != numel * itemsize:
            held = 0 if entry is None else entry.size
            raise ValueError(
                f"{self.where} is damaged: a tensor of it claims {numel * itemsize:,} bytes, "
                f"the file holds {held:,}"
            )
        return self.checked(entry, dtype, offset, tuple(shape), tuple(strides))

    def checked(self, entry, dtype, offset, shape, strides) -> Stored:
        numbers = (offset, *shape, *strides)
        plain = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
        numel = math.prod(shape) if plain else 0
        span = (
            offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if numel else 0
        )
        if not plain or max(span, numel) * dtype.itemsize > entry.size:
            raise ValueError(
                f"{self.where} is damaged: a tensor {list(shape)} claims more than the "
                f"{entry.size:,} bytes of its storage"
            )
        packed = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        in_order = all(s == p for n, s, p in zip(shape, strides, packed) if n > 1)
        check = Checksum(*entry) if entry.crc else None
        at = entry.offset + offset * dtype.itemsize
        start = (0,) * len(shape)
        piece = Piece(self.path, at, start, shape, "", None if in_order else strides, check)
        return Stored(dtype, shape, (piece,))

    def parameter(self, data, *_):
        return data

    def with_attributes(self, function, kind, args, state) -> Any:
        """A tensor that attributes were put on; inert if it is of a class of its own."""
        plain = ("torch.Tensor", "torch.nn.parameter.Parameter")
        makers = {
            "torch._utils._rebuild_tensor_v2": self.rebuilt,
            "torch._utils._rebuild_parameter": self.parameter,
        }
        if function.name in makers and kind.name in plain:
            return makers[function.name](*args)
        return Record(f"{kind.name} (a subclass of torch.Tensor)", args)


class _Names(Anything):
    def __init__(self, tensors: _Tensors):
        super().__init__()
        self["torch._utils._rebuild_tensor"] = tensors.rebuilt
        self["torch._utils._rebuild_tensor_v2"] = tensors.rebuilt
        self["torch._utils._rebuild_parameter"] = tensors.parameter
        self["torch._utils._rebuild_parameter_with_state"] = tensors.parameter
        self["torch._tensor._rebuild_from_type_v2"] = tensors.with_attributes
        self["collections.OrderedDict"] = lambda *items: {}
        self["collections.defaultdict"] = lambda *factory: {}
        self["torch.Size"] = lambda sizes=(): tuple(sizes)

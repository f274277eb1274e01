"""A GGUF file's metadata and table of tensors: the container of llama.cpp's models.

    held = read(path)        # Container: metadata {key: value}, tensors {name: Entry}

    "GGUF" version tensors entries · key, type, value … · name, shape, type, offset … · bytes

Nothing is allocated by a count or a length before the file is known to have that many bytes. Of the
standard library only: tokenizers come out of it too (formats/vocabularies.py).
"""

import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from inputs import refuse_impostor

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_ITEMS = 4_000_000  # of all lists of a file; a vocabulary of 262,000 has a million
MAX_TENSORS, MAX_KEYS, MAX_NAME, MAX_DIMS = 1_000_000, 100_000, 1 << 16, 4
ALIGNMENT = 32  # of the tensors' offsets, where general.alignment says no other
TYPES = {  # ggml's numbers of the types of tensors
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
NUMBERS = {  # a value's type: how struct reads it
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, LIST = 8, 9
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # of a model in several files


class Entry(NamedTuple):
    """A tensor as the table has it; nothing of it is checked but that its numbers are small."""

    type: str
    shape: tuple[int, ...]  # rows first, as torch has it
    offset: int  # of its bytes in the file


class Container(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]
    start: int  # of the tensors' bytes
    alignment: int


def read(path: Path) -> Container:
    """The head of a file. ValueError, one line, for whatever is wrong with it."""
    refuse_impostor(path)
    with open(path, "rb") as file:
        return _Reader(path, file).container()


def parts(path: Path) -> list[Path]:
    """All files of a model, of which `path` is one: several where its name counts them. ValueError
    names those that are missing."""
    counted = PART.fullmatch(path.name)
    if counted is None:
        return [path]
    stem, count = counted[1], int(counted[3])
    if not 1 <= int(counted[2]) <= count:
        raise ValueError(f"{path} says that it is part {int(counted[2])} of {count}")
    there = {name for name in os.listdir(path.parent) if name.startswith(stem)}
    names = [f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    missing = [name for name in names if name not in there]
    if missing:
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise ValueError(f"{path.parent} lacks {missing[0]!r:.200}{more}, of {count:,} parts")
    return [path.parent / name for name in names]


class _Reader:
    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.items = path, file, 0
        self.left = os.fstat(file.fileno()).st_size

    def container(self) -> Container:
        if self.taken(4) != MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "of a big-endian machine" if swapped in VERSIONS else f"of version {version}"
            raise ValueError(f"{self.path} is a GGUF file {what}, which is not read")
        n_tensors = self.count("Q", MAX_TENSORS, 24, "tensors")
        n_keys = self.count("Q", MAX_KEYS, 13, "entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text(MAX_NAME)
            if key in metadata:
                raise ValueError(f"{self.path} holds the key {key!r:.100} twice")
            metadata[key] = self.value(self.number("I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise ValueError(f"{self.path}: general.alignment {alignment!r:.50} is none")
        tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name = self.text(MAX_NAME)
            if name in tensors:
                raise ValueError(f"{self.path} holds the tensor {name!r:.100} twice")
            tensors[name] = self.entry(name)
        start = -(-self.file.tell() // alignment) * alignment
        placed = {n: Entry(kind, shape, start + at) for n, (kind, shape, at) in tensors.items()}
        return Container(self.path, metadata, placed, start, alignment)

    def entry(self, name: str) -> tuple[str, tuple[int, ...], int]:
        n_dims = self.number("I")
        if n_dims > MAX_DIMS:
            raise ValueError(f"{self.path}: tensor {name!r:.100} has {n_dims:,} dimensions")
        dims = [self.number("Q") for _ in range(n_dims)]
        if any(not 0 < n < 1 << 40 for n in dims):
            raise ValueError(f"{self.path}: tensor {name!r:.100} has sides {dims}")
        kind, offset = self.number("I"), self.number("Q")
        return TYPES.get(kind, f"type {kind}"), tuple(reversed(dims)), offset

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise ValueError(f"{self.path} is damaged: its metadata holds a value of type {kind}")
        inner = self.number("I")
        if inner not in NUMBERS and inner != TEXT:
            raise ValueError(f"{self.path}: its metadata holds a list of type {inner}")
        size = 8 if inner == TEXT else struct.calcsize(NUMBERS[inner])
        n = self.count("Q", MAX_ITEMS - self.items, size, "items of lists")
        self.items += n
        if inner == TEXT:
            return [self.text() for _ in range(n)]
        return list(struct.unpack(f"<{n}{NUMBERS[inner]}", self.taken(n * size)))

    def count(self, form: str, most: int, size: int, what: str) -> int:
        """A number of things that have so many bytes each, at least."""
        n = self.number(form)
        if n > most or n * size > self.left:
            raise ValueError(
                f"{self.path} is truncated or damaged: it would have {n:,} {what}, and has "
                f"{self.left:,} bytes left"
            )
        return n

    def number(self, form: str) -> Any:
        (value,) = struct.unpack("<" + form, self.taken(struct.calcsize(form)))
        return value

    def text(self, most: int = 64 << 20) -> str:
        n = self.count("Q", most, 1, "bytes of a text")
        try:
            return str(self.taken(n), "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: a text of its metadata is not UTF-8") from None

    def taken(self, n: int) -> bytes:
        data = self.file.read(n) if n <= self.left else b""
        if len(data) < n:
            raise ValueError(
                f"{self.path} is truncated or still being written: its head ends early"
            )
        self.left -= n
        return data

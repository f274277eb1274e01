"""Files of others as they arrive: packed or not, of a size that ends, JSON lines or parquet.

    with open_packed("val.jsonl.gz") as file:          # gzip or not, by its content
        for line in file: ...
    suffix_of("Val.JSONL.gz")                          # ".jsonl"
    for where, row in parquet_rows("a.parquet"): ...   # where: "a.parquet: row 3"

A device or a pipe, which may never end, is refused, and so is a file that unpacks to far more than
it could have been made from.
"""

import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GZIP, SUFFIXES = b"\x1f\x8b", (".gz", ".gzip")
OTHERS = {  # how a packed file begins, and what unpacks it
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\xfd7zXZ\x00": "xz -d",
    b"BZh": "bzip2 -d",
    b"PK\x03\x04": "unzip",
}
# Text packs to a fifth, repeated lines to a hundredth; a bomb to a thousandth or less
RATIO, ALWAYS_ALLOWED = 200, 2**24


def suffix_of(path: str | Path) -> str:
    """What a file is by its name: the suffix in small letters, not that of its packing."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in SUFFIXES else path.name).suffix.lower()


def require_file(path: str | Path) -> None:
    """ValueError for what is no file: reading a FIFO waits for ever, a device never ends."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        what = "is a link to nothing" if os.path.islink(path) else "does not exist"
        raise ValueError(f"{path} {what}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


@contextlib.contextmanager
def open_packed(path: str | Path) -> "Iterator[io.BufferedReader[Any]]":
    """The content of a file, unpacked, as a stream of bytes. What is read inside of the block is
    refused in one line where it is damaged or has no measure."""
    path = Path(path)
    require_file(path)
    with path.open("rb") as raw:
        head = raw.peek(8)
        for magic, command in OTHERS.items():
            if head.startswith(magic):
                raise ValueError(
                    f"{path}: is packed in a way not read here: `{command}` unpacks it"
                )
        if not head.startswith(GZIP):
            yield raw
            return
        most = max(ALWAYS_ALLOWED, RATIO * path.stat().st_size)
        with gzip.open(raw) as unpacked, io.BufferedReader(_Bounded(unpacked, most, path)) as file:
            try:
                yield file
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: damaged gzip data: {error}") from None


class _Bounded(io.RawIOBase):
    """A stream that ends, or is refused, after so many bytes."""

    def __init__(self, stream: Any, most: int, path: Path):
        self.stream, self.left, self.path = stream, most, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(
                f"{self.path} unpacks to more than {RATIO} times its size, which no text does: it "
                "is damaged or made to fill memory (unpack it yourself if it is meant)"
            )
        buffer[: len(data)] = data
        return len(data)


def parquet_rows(path: str | Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """(file: row, its values by column) of a parquet file; columns: only these, which must be
    there."""
    require_file(path)
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs a package: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or () if name not in names]
            if missing:
                raise ValueError(f"{path}: has no column {missing[0]!r}, only {', '.join(names)}")
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except ArrowException as error:  # some of them are ValueErrors of many lines
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a parquet file that can be read: {reason}") from None

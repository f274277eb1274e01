"""Files that survive a crash: written whole or not at all, and journals that lose nothing.

    write_atomic("results/record.json", text)       # the old file or the new one, never a part
    with Journal("results/journal") as journal:     # one line a record, framed by length and crc32
        journal.append({"task": 3, "passed": True})
    records, bad = read_journal("results/journal")

Standard library and numpy only.
"""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import secrets
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# ---------------------------------------------------------------------------------------------
# Writing


def plain(value: Any) -> Any:
    """numpy, tuples and paths as JSON has them; NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def dumps(obj: Any, **options: Any) -> str:
    """Strict JSON text. NaN and infinities become null: one undefined standard error must not cost
    the hours that the rest of a record took."""
    return json.dumps(plain(obj), ensure_ascii=False, allow_nan=False, **options)


def cache_folder(name: str, make: bool = False) -> Path | None:
    """Where what can be made again is kept between runs: ~/.cache/roseval/NAME. None without a
    home, as some users of containers are; make: also where it cannot be made and written."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.startswith("~"):
        return None
    folder = Path(home, "roseval", name)
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return folder if os.access(folder, os.W_OK) else None
    return folder


def fsync(path: Path) -> None:
    """A file or a directory to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems' directories cannot be synced
            raise
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def encode(text: str) -> bytes:
    # A lone surrogate (a model's broken output) becomes \\udxxx, JSON's own escape for it.
    return text.encode(errors="backslashreplace")


def _make_directories(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        fsync(directory.parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old one or the whole new
    one: temporary in the same directory, fsync, rename, fsync of the directory. Parents are made.
    OSError, in one line that names `path`, when it cannot; then no partial file is left."""
    path = Path(path)
    data = encode(data) if isinstance(data, str) else data
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _make_directories(path.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(error, path) from None
        raise


def _write_error(error: OSError, path: Path) -> OSError:
    number = error.errno or errno.EIO
    return OSError(number, f"{os.strerror(number)}; nothing was written", str(path))


def check_writable(directory: str | Path, flag: str) -> None:
    """ValueError, naming the flag that gave it, for a directory that is there or still to be made
    and in which no file can be written; before work whose result is to go there. Leaves nothing."""
    directory = Path(directory)
    whole = directory.absolute()
    # a dangling link is there too, and in the way
    place = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    if not place.is_dir():
        raise ValueError(f"{flag} {directory}: {place} is no directory")
    probe = place / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, bytes(4096))
        finally:
            os.close(fd)
            probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {directory} cannot be written: {error.strerror}") from None


def write_json(path: str | Path, obj: Any) -> None:
    """`write_atomic` of strict, indented JSON (see `dumps`)."""
    write_atomic(path, dumps(obj, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# Journals


def _frame(record: Any) -> bytes:
    payload = encode(dumps(record, separators=(",", ":")))  # holds no newline
    return b"%08x %08x %s\n" % (len(payload), zlib.crc32(payload), payload)


def _unframe(line: bytes) -> Any:
    payload = line[18:]
    if line[:18] != b"%08x %08x " % (len(payload), zlib.crc32(payload)):
        raise ValueError("length or checksum differ")
    return json.loads(payload)


def _scan(data: bytes) -> tuple[list, int, int]:
    """(records, bad, end): the whole records, how many lines are not one, and where the last
    whole record ends."""
    *lines, torn = data.split(b"\n")
    records, bad, end, position = [], int(bool(torn)), 0, 0
    for line in lines:
        position += len(line) + 1
        try:
            records.append(_unframe(line))
            end = position
        except ValueError:
            bad += 1
    return records, bad, end


def read_journal(path: str | Path) -> tuple[list, int]:
    """(records, bad): what `Journal` wrote, and how many lines were torn or damaged and skipped.
    A journal that does not exist is empty. Safe while a writer appends."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    return _scan(data)[:2]


def sync_and_close(fd: int) -> None:
    """All that was written to a file, to disk; closed whatever the disk says."""
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Journal:
    """Append-only file of JSON records that survives kill -9: one line a record, framed by length
    and crc32, one writer.

    Opening reads what is there into `records` (damaged lines counted in `bad`) and cuts the file
    after the last whole record, so that a torn line never swallows the next one. `append` hands
    the record to the kernel before it returns: a killed process loses nothing. It is on disk after
    at most `sync_seconds` of appending and at `close`: a power cut loses no more than that.
    ValueError when another process writes the same journal; OSError when the disk is full, and
    then the file ends with the last whole record.
    """

    def __init__(self, path: str | Path, sync_seconds: float = 1.0):
        self.path, self.sync_seconds = Path(path), sync_seconds
        _make_directories(self.path.parent)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self.records, self.bad, self._end = _scan(self.path.read_bytes())
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            fsync(self.path.parent)
        except BaseException:
            os.close(self._fd)
            raise
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is writing this journal; wait for it or end it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a mount without locks
                raise

    def append(self, record: Any) -> None:
        frame = _frame(record)
        try:
            os.lseek(self._fd, self._end, os.SEEK_SET)
            _write_all(self._fd, frame)
            if time.monotonic() - self._synced >= self.sync_seconds:
                self.sync()
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise _write_error(error, self.path) from None
        self._end += len(frame)

    def sync(self) -> None:
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            sync_and_close(fd)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------
# Where interrupted work goes on


class Folder:
    """What an evaluation has made so far, beside its record to be: a journal for each rank, alone
    in writing it, under the key of the work, so that other code or data never goes on from it.

    Without a results directory nothing is kept. The place is known once the checkpoint's
    fingerprint is: `place` is called when the folder is first used, on every rank. Work goes on
    when a disk fills up meanwhile: its numbers are worth more than its journal. `root`: the results
    directory itself, for what serves many records.
    """

    def __init__(
        self,
        dist,
        place: Callable[[], tuple[Path, str]] | None,
        root: str | Path | None = None,
    ):
        self.dist, self._place = dist, place
        self.root = None if root is None else Path(root)
        self._journal: Journal | None = None

    @functools.cached_property
    def path(self) -> Path | None:
        return self._place()[0] if self._place else None

    @functools.cached_property
    def _stem(self) -> str:
        assert self._place is not None, "without a path there are no names"
        return f"journal-{self._place()[1][:16]}-rank"

    def known(self) -> list[dict]:
        """The entries of all ranks that worked on this before, however many they were; to be called
        by every rank before any of them adds to its own."""
        if self.path is None:
            return []
        self._journal = Journal(self.path / f"{self._stem}{self.dist.rank}")
        entries = []
        for path in sorted(self.path.glob(f"{self._stem}*")):
            entries += read_journal(path)[0]
        self.dist.barrier()
        return entries

    def append(self, entry: dict) -> None:
        """To the journal, until it cannot be written."""
        if self._journal:
            try:
                self._journal.append(entry)
            except OSError as error:
                self._give_up(error)

    def write(self, name: str, text: str) -> None:
        """A file that others read, whole, by rank 0."""
        if self.path and self.dist.is_main:
            try:
                write_atomic(self.path / name, text)
            except OSError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._journal:
            try:
                self._journal.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        assert self._journal is not None, "nothing to give up"
        journal, self._journal = self._journal, None
        with contextlib.suppress(OSError):
            journal.close()
        if self.dist.is_main:
            print(
                f"warning: {error}; the work goes on, but could not be resumed from here",
                file=sys.stderr,
                flush=True,
            )

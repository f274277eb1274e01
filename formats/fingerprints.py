"""The sha256 of files, and the one that stands for a checkpoint.

One core hashes some 250 MB a second, a minute for a 7B, which is longer than many an evaluation: so
what stands for a large file is the sha256 of those of its pieces, hashed side by side. Digests are
remembered under ~/.cache/roseval by inode, size and mtime.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from durable import cache_folder
from formats import Opened

PIECE = 64 << 20  # bytes
BLOCK = 1 << 20  # bytes read at a time
MOST_THREADS = 16


def fingerprint(opened: Opened) -> str:
    """sha256 that identifies a checkpoint: of its manifest, else of the names of its files and
    their digests (`sha256_of_pieces`)."""
    if opened.manifest is not None:
        _refuse_changed(opened.manifest)
        return sha256(opened.manifest)
    root = opened.path if opened.path.is_dir() else opened.path.parent
    digests = [f"{f.relative_to(root)} {remembered(sha256_of_pieces, f)}" for f in opened.files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def of_both(base: str, adapter: str) -> str:
    """The fingerprint of a base with an adapter, from those of the two."""
    return hashlib.sha256(f"{base} {adapter}".encode()).hexdigest()


def _refuse_changed(manifest: Path) -> None:
    """A manifest was written last: what is newer than it is a copy, or was changed since."""
    for name, entry in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        file = manifest.parent / name
        newer = file.stat().st_mtime_ns > manifest.stat().st_mtime_ns
        if newer and remembered(sha256, file) != entry["sha256"]:
            raise ValueError(
                f"{file} was changed after {manifest.name} was written: delete {manifest.name} to "
                "evaluate the directory as it is now"
            )


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_pieces(path: Path) -> str:
    """The sha256 of the digests of a file's pieces, end to end; of a file of one piece its own."""
    begins = range(0, path.stat().st_size, PIECE)
    if len(begins) <= 1:
        return sha256(path)

    def of_piece(begin: int) -> bytes:
        digest, left = hashlib.sha256(), PIECE
        with path.open("rb") as f:
            f.seek(begin)
            while left and (block := f.read(min(BLOCK, left))):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(of_piece, begins))).hexdigest()


def remembered(digest_of: Callable[[Path], str], path: Path) -> str:
    """What `digest_of` makes of a file, from the cache if it is still the one that was hashed."""
    s = path.stat()
    key = f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
    cache = cache_folder(digest_of.__name__)
    if cache is None:
        return digest_of(path)
    memo = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memo.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    digest = digest_of(path)
    with contextlib.suppress(OSError):  # a read-only home only costs the next start some time
        cache.mkdir(parents=True, exist_ok=True)
        memo.write_text(digest, encoding="ascii")
    return digest

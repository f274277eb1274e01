"""The sha256 of files, and the one that stands for a checkpoint.

Digests of large files are remembered under ~/.cache/roseval by inode, size and mtime.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from formats import Opened


def fingerprint(opened: Opened) -> str:
    """sha256 that identifies a checkpoint: of its manifest, else of the names and digests of its
    files."""
    if opened.manifest is not None:
        _refuse_changed(opened.manifest)
        return sha256(opened.manifest)
    root = opened.path if opened.path.is_dir() else opened.path.parent
    digests = [f"{file.relative_to(root)} {remembered_sha256(file)}" for file in opened.files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def of_both(base: str, adapter: str) -> str:
    """The fingerprint of a base with an adapter, from those of the two."""
    return hashlib.sha256(f"{base} {adapter}".encode()).hexdigest()


def _refuse_changed(manifest: Path) -> None:
    """A manifest was written last: what is newer than it is a copy, or was changed since."""
    for name, entry in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        file = manifest.parent / name
        newer = file.stat().st_mtime_ns > manifest.stat().st_mtime_ns
        if newer and remembered_sha256(file) != entry["sha256"]:
            raise ValueError(
                f"{file} was changed after {manifest.name} was written: delete {manifest.name} to "
                "evaluate the directory as it is now"
            )


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """`sha256`, from the cache if the file is still the one that was hashed."""
    s = path.stat()
    key = f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
    # without a home, as some users of containers are, it stays "~" and is not there
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache = Path(home) / "roseval/sha256"
    memo = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memo.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    digest = sha256(path)
    with contextlib.suppress(OSError):  # a read-only home only costs the next start some time
        if not home.startswith("~"):
            cache.mkdir(parents=True, exist_ok=True)
            memo.write_text(digest, encoding="ascii")
    return digest

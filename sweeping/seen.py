"""The checkpoints of a sweep as they lie there: which have come, changed, gone, and are whole."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import checkpoint
from tokenizer import TOKENIZER_COPIES


@dataclass
class Seen:
    """A checkpoint as it lies there now; with other `files` it is another one."""

    path: Path
    files: tuple  # signature()
    info: checkpoint.CheckpointInfo
    since: float  # monotonic, when these files were first seen
    settled: bool = False  # nothing is left to do
    about: dict = field(default_factory=dict, repr=False)  # what records say of it, once planned
    keys: dict[str, tuple] = field(default_factory=dict, repr=False)  # label: (record, resume_key)
    block_bytes: float | None = None  # see filling.block_bytes
    again: set[str] = field(default_factory=set, repr=False)  # labels: done, but more is asked for


def signature(path: Path) -> tuple | None:
    """(name, size, mtime, inode) of a checkpoint's files, in folders too, and of those beside it
    that are read with it (the run's tokenizer, a file's config), or why they cannot be looked at;
    None once it is gone."""
    beside = TOKENIZER_COPIES if path.is_dir() else ("config.json", *TOKENIZER_COPIES)
    try:
        if path.is_dir():
            next(path.iterdir(), None)  # rglob is silent about what it may not look into
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if files:
            files += [p for name in beside if (p := path.parent / name).is_file() and p != path]
        stats = [(str(p.relative_to(path.parent)), p.stat()) for p in files]
    except FileNotFoundError:
        return None
    except OSError as error:
        return ((error.strerror, 0, 0, 0),)
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats) or None


class Shelf:
    """Every checkpoint below the paths given, looked at again and again."""

    def __init__(self, paths, watch: bool, poll_seconds: float):
        self.paths, self.watch, self.poll_seconds = paths, watch, poll_seconds
        self.seen: dict[Path, Seen] = {}
        self.names: Counter[str] = Counter()  # how many are called so
        self.looked = self.news = time.monotonic()  # when something last happened

    def look(self) -> list[Seen]:
        """Look anew; returns those that are gone without having been settled."""
        before, self.looked = self.seen, time.monotonic()
        paths = self._expand()
        self.seen = {}
        for path in paths:
            files, known = signature(path), before.get(path)
            if known and known.files == files:
                self.seen[path] = known
            elif files:
                self.seen[path] = Seen(path, files, checkpoint.info_of(path), time.monotonic())
                self.news = time.monotonic()
        self.names = Counter(seen.info.name for seen in self.seen.values())
        return [
            before[path] for path in before.keys() - self.seen.keys() if not before[path].settled
        ]

    def _expand(self) -> list[Path]:
        paths = []
        for given in self.paths:
            try:
                paths += checkpoint.expand_paths([given])
            except ValueError:  # --watch: there may be nothing yet
                continue
            except OSError:  # a file system that is away for a moment: as it was
                paths += [path for path in self.seen if path.is_relative_to(given)]
        return list(dict.fromkeys(paths))

    def is_due(self) -> bool:
        return time.monotonic() - self.looked >= self.poll_seconds

    def waiting(self, until_step: int | None, newest_first: bool) -> list[Seen]:
        """Those that are not settled, in the order in which they are to be evaluated."""
        until = until_step or float("inf")
        left = [s for s in self.seen.values() if not s.settled and (s.info.step or 0) <= until]
        sign = -1 if newest_first else 1

        def key(s):  # one content is evaluated once, and not under the name of a link to it
            return s.info.step is None, sign * (s.info.step or 0), s.path.is_symlink()

        return sorted(left, key=key)

    def is_ready(self, seen: Seen) -> bool:
        """Whole, or unchanged for so long that it will not become so: then it is tried, and fails.
        What other programs save grows under its final name, so a watcher waits for the sign with
        which its format ends a save, or, where there is none, lets it rest first."""
        finished = checkpoint.is_finished(seen.path) if self.watch else True
        if finished is False:
            return False
        if self.looked - seen.since >= self.poll_seconds:
            return True
        return finished is True and checkpoint.is_complete(seen.path)

    @property
    def last_step(self) -> int:
        return max((seen.info.step or 0 for seen in self.seen.values()), default=0)

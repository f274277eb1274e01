"""Standard output and error that never cost what was computed, whatever becomes of what is printed.

    streams.guard()              # closed, full, of another encoding: printing goes on, or seems to
    streams.lost_output()        # "No space left on device", if so

Standard library only.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any


class _Stream(io.FileIO):
    """Where it cannot be written (a full disk, a terminal that hung up) the text is dropped, and
    `problem` says why. That a reader of standard output has gone, its writer is told, as usual."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # others made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self is _streams["stdout"]:
                raise
            self.problem = error
            return memoryview(data).nbytes


_streams: dict[str, _Stream] = {}


def guard() -> None:
    """Put such streams in the place of sys.stdout and sys.stderr. Closed descriptors become
    /dev/null, so that no file of ours gets their numbers; what is printed goes there. Characters
    that an encoding lacks are replaced."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(null, fd)
        if fd == 0:
            continue
        before = getattr(sys, name)  # None if it was closed: its number may be another file's since
        with contextlib.suppress(AttributeError, OSError, ValueError):
            before.flush()
        raw = _streams[name] = _Stream(null if before is None else fd, "w", closefd=False)
        unbuffered = fd == 2 or raw.isatty() or getattr(before, "write_through", False)
        text = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="replace" if fd == 1 else "backslashreplace",
            line_buffering=unbuffered,
        )
        setattr(sys, name, text)


def lost_output() -> str | None:
    """Why a part of what was printed has gone, if it has."""
    problem = _streams["stdout"].problem
    return None if problem is None else problem.strerror or str(problem)

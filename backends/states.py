"""A model's final hidden states, kept in a file, so that it runs once however many are compared.

    states = States(folder, windows, dist)
    if missing := states.missing(batch_size): ...           # windows that no rank has kept yet
    local.score_windows(stream, missing, ..., keep_states=states.keep)
    hidden = states.rows(places)                             # [N, C], as they were

A model's head makes the distribution over the whole vocabulary of a hidden state, the same bits
whenever it is asked. So C numbers stand for V probabilities, without loss, where a file of the
probabilities would be V / C times as large or leave most of them out.

One file for all windows, each at its place; of a window only what is scored is written. Beside it
a journal for each rank says which windows are whole, with a checksum: work that was interrupted
goes on from them, on any number of ranks.
"""

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from durable import Journal, read_journal, sync_and_close
from gpu_kernels.cross_entropy import IGNORE

if TYPE_CHECKING:
    from dataset import RandomWindows, TokenStream, Windows
    from distributed import Dist

AS_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}  # numpy has no bfloat16


class States:
    """See the file's docstring. folder: of this model, these windows and this precision alone, and
    the same for all ranks. windows: dataset.py's."""

    def __init__(self, folder: Path, windows: "Windows | RandomWindows", dist: "Dist"):
        self.folder, self.windows, self.dist = folder, windows, dist
        self.file = folder / "states"
        self._entries: dict[int, list[dict]] = {}  # by window: what the journals say of it
        self._rows: np.ndarray | None = None  # [windows * T, C], mapped
        self._journal: Journal | None = None
        self._part: Part | None = None
        self._fd = -1

    # -- What is there ------------------------------------------------------------------------

    def missing(self, batch_size: int) -> "Part | None":
        """The windows that have to be run, in whole batches of all windows, so that what is run
        again is run as before; None if all are there. Every rank asks alike, and looks at those
        that it will be dealt."""
        self._entries, self._rows = {}, None
        for path in sorted(self.folder.glob("journal-*")):
            for entry in read_journal(path)[0]:
                self._entries.setdefault(entry["window"], []).append(entry)
        if self._entries and not self._has_whole_length():
            self._entries = {}
        n = len(self.windows)
        batches = np.array_split(np.arange(n), range(batch_size, n, batch_size))
        mine = self.dist.shard(len(batches))
        lacking = [b for b in mine if not all(map(self._is_whole, batches[b].tolist()))]
        every = sorted(set().union(*self.dist.gather(lacking)))
        ids = [window for b in every for window in batches[b]]
        return Part(self.windows, ids) if ids else None

    def _is_whole(self, window: int) -> bool:
        """Whether a window lies in the file as a journal says: two do, if memory ran out between,
        and the later one holds."""
        if window not in self._entries:
            return False
        rows = self._mapped()[window * self.windows.seq_len :]
        return any(
            zlib.crc32(rows[slice(*entry["rows"])].tobytes()) == entry["crc"]
            for entry in self._entries[window]
        )

    @property
    def _form(self) -> tuple[torch.dtype, int]:
        """(dtype, width) of all that is there."""
        entry = next(iter(self._entries.values()))[0]
        return getattr(torch, entry["dtype"]), entry["width"]

    def _has_whole_length(self) -> bool:
        dtype, width = self._form
        there = self.file.stat().st_size if self.file.exists() else 0
        return there == self._length(width * dtype.itemsize)

    def _length(self, row_bytes: int) -> int:
        return len(self.windows) * self.windows.seq_len * row_bytes

    def _mapped(self) -> np.ndarray:
        if self._rows is None:
            dtype, width = self._form
            kind = AS_INTEGERS[dtype.itemsize]
            self._rows = np.memmap(self.file, dtype=kind, mode="r").reshape(-1, width)
        return self._rows

    def rows(self, places: torch.Tensor) -> torch.Tensor:
        """The states [N, C] at places [N], window * T + column, on the device of `places`."""
        found = torch.from_numpy(self._mapped()[places.cpu().numpy()])
        return found.view(self._form[0]).to(places.device)

    # -- Writing ------------------------------------------------------------------------------

    def open(self, part: "Part") -> None:
        """Before `keep`, on every rank; part: the windows that it will be called with. ValueError
        where another process is at it."""
        self._part = part
        self._journal = Journal(self.folder / f"journal-{self.dist.rank}")
        self._fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def keep(self, hidden: torch.Tensor, targets: torch.Tensor, window_ids: torch.Tensor) -> None:
        """Of a batch [B, T, C]: a backends.scoring.StatesConsumer."""
        assert self._journal is not None and self._part is not None, "open comes first"
        _, T, C = hidden.shape
        values = hidden.cpu().contiguous().view(getattr(torch, f"int{8 * hidden.itemsize}"))
        form = {"dtype": str(hidden.dtype).removeprefix("torch."), "width": C}
        self._make_room(C * hidden.itemsize)
        for i, row, target in zip(window_ids.tolist(), values.numpy(), targets.cpu().numpy()):
            if i < 0:
                continue
            window = int(self._part.ids[i])
            scored = np.flatnonzero(target != IGNORE)
            start, stop = int(scored[0]), int(scored[-1]) + 1
            data = row[start:stop].tobytes()
            self._write(data, (window * T + start) * C * hidden.itemsize)
            entry = {"window": window, "rows": [start, stop], "crc": zlib.crc32(data)}
            self._journal.append(entry | form)

    def _make_room(self, row_bytes: int) -> None:
        """The file's whole length, of which only what is written takes room. ValueError where that
        is not there."""
        whole = self._length(row_bytes)
        if os.fstat(self._fd).st_size == whole:
            return
        first, last = self.windows.target_span(np.arange(len(self.windows)))
        needed, disk = int((last - first + 1).sum()) * row_bytes, os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if free < needed:
            raise ValueError(
                f"{self.folder}: the reference's states take {needed / 2**30:.2f} GiB, and "
                f"{free / 2**30:.2f} are free: fewer --max-tokens, or another --results-dir"
            )
        os.ftruncate(self._fd, whole)

    def _write(self, data: bytes, place: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, place)
            view, place = view[written:], place + written

    def close(self) -> None:
        """All that was kept, to disk."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            sync_and_close(fd)
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class Part:
    """Some of the windows, by their ids: windows themselves, for backends/scoring.py."""

    mark = None  # documents are not told apart

    def __init__(self, windows: "Windows | RandomWindows", ids: Iterable[int]):
        self.windows, self.ids = windows, np.asarray(ids, dtype=np.int64)
        self.seq_len = windows.seq_len

    def __len__(self) -> int:
        return len(self.ids)

    def _of_all(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        return np.where(ids < 0, -1, self.ids[ids])

    def target_span(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As dataset.Windows.target_span."""
        return self.windows.target_span(self._of_all(ids))

    def batch(self, stream: "TokenStream", ids: Sequence[int] | np.ndarray) -> dict:
        """As dataset.Windows.batch."""
        return self.windows.batch(stream, self._of_all(ids))

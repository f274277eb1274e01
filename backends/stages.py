"""Rows of a batch whose model lies on several ranks: each rank has their state, and its own layers'
part of their cache.

    rows = StageRows(model, capacity, features, compiled, logprobs)     # as CachedRows

A step goes from rank to rank; the last one draws, and its tokens are added up with the zeros of the
others, so that all ranks of a group see the same tokens, and decide alike what comes next. Whoever
runs out of memory says so there. While a step is with other ranks, this one begins those of other
batches of rows (engine.generate), and waits for a step's tokens when it needs them.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from backends.parallel import Buffers, Stage
from backends.pipe import GroupOutOfMemory
from backends.rows import CachedRows, Capacity
from distributed import Dist

if TYPE_CHECKING:
    from backends import Sample
    from backends.engine import Engine

FAILED = -1  # for a token: no memory


class StageRows(CachedRows):
    """The same rows, the same bits: see the file's docstring."""

    model: Stage

    def __init__(
        self,
        model: Stage,
        capacity: Capacity,
        features: frozenset[str],
        compiled: bool,
        logprobs: int | None,
    ):
        self.pipe, self.buffers = model.pipe, Buffers(model, capacity.rows)
        # what the last rank drew for each row; below, how many ranks have failed
        size = capacity.rows + 1, 1 if logprobs is None else 1 + 2 * (1 + logprobs)
        self.drawn = torch.zeros(size, dtype=torch.int64, device=model.device)
        # a step whose tokens are awaited
        self.pending: tuple[int, Callable[[], None]] | None = None
        super().__init__(model, capacity, features, compiled, logprobs)

    @contextlib.contextmanager
    def between_buffers(self) -> Iterator[None]:
        """Within it the model reads and writes its ends in place, as a captured step must."""
        self.model.wire = self.buffers
        try:
            yield
        finally:
            self.model.wire = self.pipe

    def _capture(self) -> None:
        with self.between_buffers():
            super()._capture()

    def launch(self, i: int) -> None:
        model, buffers = self.model, self.buffers
        self.await_tokens()
        if not model.is_first:
            self.pipe.receive_into(buffers.came)
        with self.between_buffers():
            self.pipe.attempt(self._advance)
        if not model.is_last:
            self.pipe.hand_on(buffers.goes)
        self.drawn.zero_()
        if model.is_last:
            self.drawn[:-1] = self._told()
        self.drawn[-1, 0].fill_(int(self.pipe.failed))
        self.pending = i, self.pipe.sum(self.drawn)

    def _told(self) -> torch.Tensor:
        """What this rank drew [B, 1 + 2 (1 + k)], floats by their bits: adding zeros is exact."""
        told = [self.state["token"][:, None]]
        if "logprobs" in self.state:
            told += [self.state["likeliest"], self.state["logprobs"].view(torch.int32)]
        return torch.cat(told, dim=1)

    def await_tokens(self) -> None:
        """Of the step that was launched last, on all ranks."""
        if self.pending is None:
            return
        (i, wait), self.pending = self.pending, None
        wait()
        drawn = self.drawn[:-1]
        self.state["token"].copy_(drawn[:, 0])
        if "logprobs" in self.state:
            ids, bits = drawn[:, 1:].chunk(2, dim=1)
            self.state["likeliest"].copy_(ids)
            self.state["logprobs"].copy_(bits.int().view(torch.float32))
        self.fetch(i)

    def fetch(self, i: int) -> None:
        tokens, failed = self.drawn[:-1, 0], self.drawn[-1, 0] > 0
        told = self.state | {"token": torch.where(failed, FAILED, tokens)}
        for name, buffer in self.read_ring[i].items():
            buffer.copy_(told[name], non_blocking=True)
        if self.cuda:
            self.done[i].record()

    def look(self, ticket: int) -> dict[str, list]:
        """GroupOutOfMemory, on all ranks of the group at the same step, where one of them had no
        memory for it."""
        if self.pending is not None and self.pending[0] == ticket:
            self.await_tokens()
        with self.pipe.dist.waiting():
            seen = super().look(ticket)
        if FAILED in seen["token"]:
            self.await_tokens()
            raise GroupOutOfMemory("on a rank of this group")
        return seen


def draw_by_turns(
    engine: Callable[[], "Engine"],
    submit: Callable[["Engine", Collection[int]], None],
    units: Sequence[Collection[int]],
    dist: Dist | None,
) -> "Iterator[Sample]":
    """This rank's samples, of units (places of prompts) that are dealt to ranks. submit: takes one.

    Where a group of ranks holds the model, each of them goes through the units of all, in as many
    engines: while a step of one engine is with other ranks, this rank has work of the next.
    """
    if dist is None or dist.pipe is None:
        alone = engine()
        for unit in units if dist is None else dist.mine(units):
            submit(alone, unit)
            while alone.busy:
                yield from alone.step().finished
        return
    shares = {rank: deque(units[rank :: dist.world_size]) for rank in dist.members}
    shares = {rank: share for rank, share in shares.items() if share}
    engines = dist.attempt(lambda: [engine() for _ in shares])
    if not all(dist.gather(engines is not None)):
        raise torch.OutOfMemoryError("on a rank that shares the work")
    assert engines is not None, "gathered"
    while any(own.busy for own in engines) or any(shares.values()):
        for own, (rank, share) in zip(engines, shares.items()):
            if share and not own.busy:
                submit(own, share.popleft())
            finished = own.step().finished if own.busy else []
            if rank == dist.rank:
                yield from finished

"""Which windows each training step sees, and what they hold.

    rows = Chopped(stream, seq_len=1024)                    # the next T tokens, and so on
    rows = Packed(stream, plan, filler=50256, within_documents=True)    # a packing.Plan's
    batches = TrainBatches([rows], batch_size=512, seed=42)
    inputs, targets, starts = batches.batch(step=7, rank=0, world_size=8)      # int64 [64, T] each

A function of the step alone: a run needs to remember nothing else of its data.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from dataset import TokenStream
from formats.documents import Mark, starts_in_rows
from gpu_kernels.cross_entropy import IGNORE
from training.mixing import Schedule
from training.packing import NOTHING, Plan, too_short

# inputs and targets [B, T], and, where no token is to see another document than its own, the column
# in which each token's document begins
Batch = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class Rows(Protocol):
    """The windows of one stream."""

    seq_len: int

    def __len__(self) -> int: ...

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of the stream in each of the windows `ids`."""

    def read(self, ids: np.ndarray) -> Batch:
        """The windows `ids` [B]."""


class Chopped:
    """The (N-1)//T disjoint windows of a stream of N tokens: window w has the inputs
    x[wT : wT + T] and the targets one further on.

    mark: what parts documents, where tokens see their own alone. joint: (mark, n): in a document
    that begins inside of a window, the first n tokens are no targets. ValueError for data shorter
    than one window.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        mark: Mark | None = None,
        joint: tuple[Mark, int] | None = None,
    ):
        self.stream, self.seq_len, self.mark, self.joint = stream, seq_len, mark, joint
        if len(self) < 1:
            raise ValueError(too_short(len(stream), seq_len))

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.seq_len

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        return np.full(len(ids), self.seq_len)

    def read(self, ids: np.ndarray) -> Batch:
        rows = self.stream.rows(ids * self.seq_len, self.seq_len + 1)
        inputs, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        if self.joint is not None:
            mark, n = self.joint
            begins = starts_in_rows(rows, mark)
            near = (begins > 0) & (np.arange(rows.shape[1]) - begins < n)
            targets = np.where(near[:, 1:], IGNORE, targets)  # they may share memory with inputs
        return inputs, targets, None if self.mark is None else starts_in_rows(inputs, self.mark)


class Packed:
    """The windows of a plan. The target of a token is what follows it in its window; fillers are no
    targets. filler: the id that stands for them. within_documents: tokens see their own piece
    alone."""

    def __init__(self, stream: TokenStream, plan: Plan, filler: int, within_documents: bool):
        self.stream, self.plan, self.seq_len = stream, plan, plan.seq_len
        self.filler, self.within_documents = filler, within_documents
        self._sizes = plan.sizes()

    def __len__(self) -> int:
        return len(self.plan)

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        return self._sizes[ids]

    def read(self, ids: np.ndarray) -> Batch:
        plan, T = self.plan, self.seq_len
        rows = np.full((len(ids), T + 1), self.filler, dtype=np.int64)
        real = np.zeros((len(ids), T + 1), dtype=bool)
        starts = np.zeros((len(ids), T), dtype=np.int64)
        for row, w in enumerate(ids.tolist()):
            column = 0
            for piece in range(int(plan.first[w]), int(plan.first[w + 1])):
                start, end = int(plan.starts[piece]), column + int(plan.lengths[piece])
                starts[row, column:end] = column
                if start >= 0:
                    rows[row, column:end] = self.stream.read(start, start + end - column)
                    real[row, column:end] = True
                column = end
            after = int(plan.after[w])
            if after != NOTHING:
                rows[row, T], real[row, T] = self.stream.read(after, after + 1)[0], True
        targets = np.where(real, rows, IGNORE)[:, 1:]
        inputs = np.ascontiguousarray(rows[:, :T])
        return inputs, targets, starts if self.within_documents else None


class TrainBatches:
    """The windows of one or several sources, again and again.

    An epoch of a source visits each of its windows once, in an order drawn from (seed, epoch); of
    several sources a mixing.Schedule of their `weights` says which one comes next. Step `i` takes
    the next `batch_size` windows of that endless sequence: the same ones at any world size and any
    accumulation; only who computes which differs.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        batch_size: int,
        seed: int,
        grad_accum_steps: int = 1,
        weights: Sequence[Fraction] = (Fraction(1),),
    ):
        """batch_size: windows per optimizer step, over all ranks and accumulation steps."""
        assert len(sources) == len(weights), (len(sources), len(weights))
        assert 0 <= seed < 2**32, seed
        self.sources, self.seq_len, self.seed = sources, sources[0].seq_len, seed
        self.batch_size, self.grad_accum_steps = batch_size, grad_accum_steps
        self.schedule = Schedule(weights)
        self._order = functools.lru_cache(maxsize=2 * len(sources))(self._draw_order)

    def epochs(self, step: int) -> list[float]:
        """Of each source the epoch, as a fraction, that `step` begins in."""
        dealt = self.schedule.dealt(step * self.batch_size).tolist()
        return [n / len(rows) for n, rows in zip(dealt, self.sources)]

    def tokens(self, step: int) -> int:
        """How many tokens the steps before `step` have shown; padding is none."""
        total = 0
        dealt = self.schedule.dealt(step * self.batch_size).tolist()
        for source, (n, rows) in enumerate(zip(dealt, self.sources)):
            epochs, rest = divmod(n, len(rows))
            total += epochs * int(rows.sizes(np.arange(len(rows))).sum()) if epochs else 0
            total += int(rows.sizes(self._order(source, epochs)[:rest]).sum())
        return total

    def batch(self, step: int, rank: int = 0, world_size: int = 1, micro_step: int = 0) -> Batch:
        """One rank's micro-batch, each array int64 [B, T] with B = batch_size / (world_size *
        grad_accum_steps). ValueError if that is no whole number."""
        assert 0 <= rank < world_size and 0 <= micro_step < self.grad_accum_steps, (
            (rank, world_size),
            (micro_step, self.grad_accum_steps),
        )
        B, rest = divmod(self.batch_size, world_size * self.grad_accum_steps)
        if rest or B < 1:
            raise ValueError(
                f"the global batch of {self.batch_size} windows does not divide by {world_size} "
                f"ranks x {self.grad_accum_steps} accumulation steps"
            )
        first = step * self.batch_size + (micro_step * world_size + rank) * B
        source_of, number = self.schedule.deal(first, B)
        read = {}
        for source in np.unique(source_of).tolist():
            windows = self._windows(source, number[source_of == source])
            read[source] = self.sources[source].read(windows)
        if len(read) == 1:
            return next(iter(read.values()))
        back = np.argsort(np.concatenate([np.flatnonzero(source_of == s) for s in read]))
        sides = (
            None if side[0] is None else np.concatenate(side)[back] for side in zip(*read.values())
        )
        inputs, targets, starts = sides
        assert inputs is not None and targets is not None, "only starts may be None"
        return inputs, targets, starts

    def _windows(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """The windows that come at these places of a source's endless sequence of epochs."""
        epochs, positions = np.divmod(numbers, len(self.sources[source]))
        windows = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = self._order(source, epoch)[positions[here]]
        return windows

    def _draw_order(self, source: int, epoch: int) -> np.ndarray:
        # RandomState, whose numbers NumPy has frozen (NEP 19): a run resumed on a newer NumPy sees
        # the same order. A million windows take about 10 ms, once an epoch.
        key = [self.seed, epoch, source] if source else [self.seed, epoch]
        return np.random.RandomState(key).permutation(len(self.sources[source]))

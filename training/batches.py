"""Which windows each training step sees.

    batches = TrainBatches(len(stream), seq_len=1024, batch_size=512, seed=42)
    inputs, targets = batches.batch(stream, step=7, rank=0, world_size=8)     # numpy, int64 [64, T]

A function of the step alone: a run needs to remember nothing else of its data.
"""

import functools

import numpy as np

from dataset import TokenStream


class TrainBatches:
    """The (N-1)//T disjoint windows of a stream of N tokens, again and again.

    An epoch visits each once, in an order drawn from (seed, epoch). Step `i` takes the next
    `batch_size` windows of that endless sequence of epochs: the same ones at any world size and any
    accumulation; only who computes which differs.
    """

    def __init__(
        self, n_tokens: int, seq_len: int, batch_size: int, seed: int, grad_accum_steps: int = 1
    ):
        """batch_size: windows per optimizer step, over all ranks and accumulation steps. ValueError
        for data shorter than one window and for a seed out of range."""
        self.n_tokens, self.seq_len = n_tokens, seq_len
        self.batch_size, self.seed, self.grad_accum_steps = batch_size, seed, grad_accum_steps
        self.n_windows = (n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ValueError(
                f"the training data has {n_tokens} tokens, but one window needs seq_len + 1 = "
                f"{seq_len + 1}; lower --seq-len or give more data"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed must lie in 0…2^32 - 1, not {seed}")
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def epoch(self, step: int) -> float:
        """The epoch, as a fraction, that `step` begins in."""
        return step * self.batch_size / self.n_windows

    def batch(
        self,
        stream: TokenStream,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        micro_step: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of one rank's micro-batch, each int64 [B, T] with
        B = batch_size / (world_size * grad_accum_steps). ValueError if that is no whole number."""
        assert len(stream) == self.n_tokens, (len(stream), self.n_tokens)
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
        starts = self._windows(first, B) * self.seq_len
        rows = stream.rows(starts, self.seq_len + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def _windows(self, first: int, count: int) -> np.ndarray:
        """Windows number first … first + count - 1 of the endless sequence of epochs."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.n_windows)
        windows = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            windows[here] = self._order(epoch)[positions[here]]
        return windows

    def _draw_order(self, epoch: int) -> np.ndarray:
        # RandomState, whose numbers NumPy has frozen (NEP 19): a run resumed on a newer NumPy sees
        # the same order. A million windows take about 10 ms, once an epoch.
        return np.random.RandomState([self.seed, epoch]).permutation(self.n_windows)

"""Several sources in exact proportions: which source each window of training comes from.

    schedule = Schedule([Fraction(3), Fraction(1)])
    schedule.deal(first=0, count=8)          # sources [8], and which of its own windows [8]: 0, 1 …

Each window is of the source that is furthest behind its share, the first of equals. No source is
ever a whole window ahead, and after each period, the shares' common denominator, all are even: so
the schedule repeats, and a window's source is a function of its number alone.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 1_000_000


class Schedule:
    """weights: positive, of any sum. ValueError for others, and for those whose period is longer
    than LONGEST_PERIOD."""

    def __init__(self, weights: Sequence[Fraction]):
        if not weights or min(weights) <= 0:
            raise ValueError("--mix needs weights above 0")
        total = sum(weights, Fraction(0))
        self.shares = [weight / total for weight in weights]
        self.period = int(np.lcm.reduce([share.denominator for share in self.shares], dtype=object))
        if self.period > LONGEST_PERIOD:
            raise ValueError(
                f"--mix: these weights come out even after {self.period:,} windows only; round them"
            )
        parts = [int(share * self.period) for share in self.shares]  # windows of a period
        self.per_period = np.array(parts, dtype=np.int64)
        behind = [0] * len(parts)  # in windows, times the period
        order = np.empty(self.period, dtype=np.int64)
        for i in range(self.period):
            behind = [lag + part for lag, part in zip(behind, parts)]
            order[i] = source = behind.index(max(behind))
            behind[source] -= self.period
        self._order = order
        # how many windows of each source come before each place of the period, [period + 1, S]
        taken = order[:, None] == np.arange(len(parts))
        self._before = np.vstack((np.zeros_like(parts), np.cumsum(taken, axis=0)))

    def deal(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, their own windows' numbers), each int64 [count], of windows first … first +
        count - 1."""
        rounds, place = np.divmod(np.arange(first, first + count), self.period)
        source = self._order[place]
        return source, rounds * self.per_period[source] + self._before[place, source]

    def dealt(self, count: int) -> np.ndarray:
        """How many windows of each source [S] are among the first `count`."""
        rounds, place = divmod(count, self.period)
        return rounds * self.per_period + self._before[place]


def read_mix(words: Sequence[str]) -> list[tuple[str, Fraction]]:
    """(FILE, weight) of each `FILE:weight`. ValueError naming what is none."""
    found = []
    for word in words:
        file, colon, number = word.rpartition(":")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not (colon and file and weight > 0):
            raise ValueError(f"--mix {word}: give FILE:weight, a weight above 0: new.npy:0.75")
        found.append((file, weight))
    return found

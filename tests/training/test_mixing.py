"""The schedule of sources against the rule said in plain words, one window at a time."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.mixing import LONGEST_PERIOD, Schedule, read_mix


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 12), min_size=1, max_size=5), first=st.integers(0, 200))
def test_the_source_furthest_behind_comes_next(weights, first):
    schedule = Schedule([Fraction(w, 7) for w in weights])
    shares = [Fraction(w, sum(weights)) for w in weights]
    done, order, numbers = [0] * len(weights), [], []
    for i in range(first + 60):
        behind = [share * (i + 1) - n for share, n in zip(shares, done)]
        source = behind.index(max(behind))
        order.append(source)
        numbers.append(done[source])
        done[source] += 1
        # never a whole window ahead, and even after each period
        assert all(n < share * (i + 1) + 1 for share, n in zip(shares, done))
        if (i + 1) % schedule.period == 0:
            assert done == [share * (i + 1) for share in shares]
    got = schedule.deal(first, 60)
    assert got[0].tolist() == order[first:] and got[1].tolist() == numbers[first:]
    assert schedule.dealt(first + 60).tolist() == done


def test_any_piece_of_the_schedule_is_the_same():
    schedule = Schedule([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")])
    whole = np.stack(schedule.deal(0, 1000))
    parts = [np.stack(schedule.deal(first, 50)) for first in range(0, 1000, 50)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    assert np.bincount(whole[0]).tolist() == [700, 200, 100]


def test_what_is_no_mix_is_refused():
    assert read_mix(["a.npy:0.75", "C:/b*.npy:1/4"]) == [
        ("a.npy", Fraction(3, 4)),
        ("C:/b*.npy", Fraction(1, 4)),
    ]
    for word in ("a.npy", ":1", "a.npy:", "a.npy:0", "a.npy:-1", "a.npy:nan", "a.npy:1/0", "a:x"):
        with pytest.raises(ValueError, match=f"--mix {word}: give FILE:weight"):
            read_mix([word])
    with pytest.raises(ValueError, match="come out even after"):
        Schedule([Fraction(1), Fraction(LONGEST_PERIOD)])

"""Plans against plain Python lists: chopping, best fit against a naive packer, counts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.best_fit import best_fit, best_fit_bins
from training.packing import NOTHING, PADDING, SEPARATOR, chop, count

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def documents_of(lengths):
    """(starts, tokens in all) of documents of these lengths."""
    return np.append(0, np.cumsum(lengths)[:-1]).astype(np.int64), sum(lengths)


def windows_of(plan):
    """Each window as a list of stream positions, fillers by their own numbers."""
    windows = []
    for w in range(len(plan)):
        pieces = range(plan.first[w], plan.first[w + 1])
        stretches = [(int(plan.starts[p]), int(plan.lengths[p])) for p in pieces]
        windows.append(
            [at if at < 0 else at + i for at, length in stretches for i in range(length)]
        )
    return windows


def used_once(plan, n_tokens, left_out):
    """No position of the stream twice, and as many left out as promised."""
    used = [at for window in windows_of(plan) for at in window if at >= 0]
    assert len(used) == len(set(used)) == n_tokens - left_out
    assert set(used) <= set(range(n_tokens))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 12), separator=st.integers(0, 3), seed=st.integers(0, 99))
def test_chopping_equals_cutting_a_list(lengths, T, separator, seed):
    starts, n = documents_of(lengths)
    order = np.random.RandomState(seed).permutation(len(lengths)) if seed else None
    row = []
    for d in order if seed else range(len(lengths)):
        row += ([SEPARATOR] * separator if row else []) + list(
            range(starts[d], starts[d] + lengths[d])
        )
    if len(row) <= T:
        with pytest.raises(ValueError, match=f"{n} tokens, but one window needs"):
            chop(starts, n, T, order, separator)
        return
    plan = chop(starts, n, T, order, separator)
    wanted = [row[i : i + T] for i in range(0, len(row) - T, T)]
    assert windows_of(plan) == wanted
    assert plan.after.tolist() == [row[i + T] for i in range(0, len(row) - T, T)]
    assert plan.sizes().tolist() == [sum(at >= 0 for at in window) for window in wanted]
    counts = count(plan, starts, n)
    used_once(plan, n, counts.tokens_left_out)
    compare_counts(counts, wanted, starts, lengths)


def compare_counts(counts, windows, starts, lengths):
    """Counts against a look at every document and window."""
    places = [
        [[at for at in window if start <= at < start + length] for window in windows]
        for start, length in zip(starts.tolist(), lengths)
    ]
    held = [[part for part in document if part] for document in places]
    whole = [parts[:1] == [list(range(s, s + n))] for parts, s, n in zip(held, starts, lengths)]
    assert counts.documents == len(lengths) and counts.windows == len(windows)
    assert counts.cut == whole.count(False)
    off = sum(len(part) for parts, s in zip(held, starts) for part in parts if part[0] != s)
    assert counts.tokens_cut_off == off
    assert counts.tokens == sum(at >= 0 for window in windows for at in window)
    assert counts.padding == sum(window.count(PADDING) for window in windows)
    assert counts.separators == sum(window.count(SEPARATOR) for window in windows)
    assert counts.documents_per_window * len(windows) == pytest.approx(sum(map(len, held)))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, T=st.integers(1, 12), seed=st.integers(0, 99))
def test_best_fit_cuts_only_what_is_longer_than_a_window(lengths, T, seed):
    starts, n = documents_of(lengths)
    plan = best_fit(starts, n, T, seed)
    windows = windows_of(plan)
    assert all(len(window) == T for window in windows)
    used_once(plan, n, 0)
    counts = count(plan, starts, n)
    compare_counts(counts, windows, starts, lengths)
    assert counts.cut == sum(length > T for length in lengths)
    ends = set((starts + lengths).tolist())
    for window, after in zip(windows, plan.after.tolist()):
        last = window[-1]
        assert after == (NOTHING if last < 0 or last + 1 in ends else last + 1)
        assert PADDING not in window[: len(window) - window.count(PADDING)]
    again = best_fit(starts, n, T, seed)
    assert windows == windows_of(again)


def naive_best_fit(sizes, capacity):
    """Each in decreasing order into the bin with least room that has enough."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in bins if sum(b) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


def fewest_bins(sizes, capacity):
    """Of all ways to put sizes into bins, by trying every one."""
    best = len(sizes)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best and i < len(sizes):
            return
        if i == len(sizes):
            best = min(best, len(rooms))
            return
        for r, room in enumerate(rooms):
            if room >= sizes[i]:
                place(i + 1, [*rooms[:r], room - sizes[i], *rooms[r + 1 :]])
        place(i + 1, [*rooms, capacity - sizes[i]])

    place(0, [])
    return best


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10), max_size=8))
def test_bins_are_those_of_a_naive_packer_and_near_the_fewest(sizes):
    bins = best_fit_bins(np.array(sizes, dtype=np.int64), 10)
    filled = [[sizes[i] for i in members] for members in bins]
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert sorted(map(sum, filled)) == sorted(map(sum, naive_best_fit(sizes, 10)))
    assert len(bins) <= 11 / 9 * fewest_bins(sizes, 10) + 6 / 9  # the known bound of the rule


def test_equal_documents_are_drawn_from_the_seed():
    starts, n = documents_of([3] * 40)
    one, two = (windows_of(best_fit(starts, n, 6, seed)) for seed in (1, 2))
    assert one != two and sorted(map(sorted, one)) != sorted(map(sorted, two))

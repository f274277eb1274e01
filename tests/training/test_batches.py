"""Training batches against plain Python over a stream that counts upwards."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import Source, TokenStream
from formats.documents import Mark
from training.batches import Chopped, Packed, TrainBatches
from training.best_fit import best_fit
from training.packing import chop


def counting_stream(n):
    """Token ids 0 … n - 1, each at the position of its number."""
    return TokenStream([Source("counting", np.arange(n, dtype=np.uint16))])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_global_batch_is_the_same_at_any_world_size(data):
    T, batch_size = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 4, 6, 12]))
    n = data.draw(st.integers(T + 1, 200))
    seed, step = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 50))
    stream = counting_stream(n)
    whole = TrainBatches([Chopped(stream, T)], batch_size, seed).batch(step)
    assert whole[0].shape == whole[1].shape == (batch_size, T)
    for world, accum in ((1, 2), (2, 1), (2, 2), (3, 2), (1, 12)):
        if batch_size % (world * accum):
            continue
        batches = TrainBatches([Chopped(stream, T)], batch_size, seed, grad_accum_steps=accum)
        dealt = [
            batches.batch(step, rank, world, micro)
            for micro in range(accum)
            for rank in range(world)
        ]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([d[side] for d in dealt]), whole[side])


def test_each_epoch_is_a_new_permutation_of_disjoint_windows():
    T, n = 4, 4 * 25 + 3  # 25 windows, and 2 tokens that never fill one
    stream = counting_stream(n)
    batches = TrainBatches([Chopped(stream, T)], 10, seed=1)
    steps = [batches.batch(step) for step in range(5)]  # two epochs, one straddling batch
    inputs = np.concatenate([s[0] for s in steps])
    targets = np.concatenate([s[1] for s in steps])
    assert np.array_equal(targets, inputs + 1)  # the stream counts upwards
    epochs = inputs[:, 0].reshape(2, 25) // T
    assert [sorted(e) for e in epochs.tolist()] == [list(range(25))] * 2
    assert epochs[0].tolist() != epochs[1].tolist() != list(range(25))
    other = TrainBatches([Chopped(stream, T)], 10, seed=2).batch(0)
    assert not np.array_equal(other[0], steps[0][0])
    again = TrainBatches([Chopped(stream, T)], 10, seed=1).batch(3)  # a step needs no history
    assert np.array_equal(again[0], steps[3][0])
    assert batches.epochs(5) == [2.0] and batches.tokens(5) == 5 * 10 * T
    # a batch may hold several epochs of a tiny data set
    tiny = TrainBatches([Chopped(counting_stream(9), 4)], 7, seed=0).batch(0)[0]
    assert sorted(tiny[:, 0].tolist()) in ([0] * 3 + [4] * 4, [0] * 4 + [4] * 3)


def test_training_order_is_frozen():
    # resume must find the same data under every version of NumPy
    batches = TrainBatches([Chopped(counting_stream(1001), 10)], 8, seed=1234)
    starts = batches.batch(0)[0][:, 0] // 10
    assert starts.tolist() == np.random.RandomState([1234, 0]).permutation(100)[:8].tolist()
    assert starts.tolist() == [37, 14, 85, 73, 80, 47, 53, 54]


def test_training_refuses_what_cannot_be_dealt():
    with pytest.raises(ValueError, match="5 tokens, but one window needs seq_len \\+ 1 = 6"):
        Chopped(counting_stream(5), 5)
    with pytest.raises(ValueError, match="does not divide by 2 ranks x 2"):
        rows = [Chopped(counting_stream(100), 5)]
        TrainBatches(rows, 6, 0, grad_accum_steps=2).batch(0, 0, 2)


# ---------------------------------------------------------------------------------------------
# Packed windows, and several sources

EOT, FILLER, IGNORE = 256, 256, -100
DOCUMENTS = [
    "ab",
    "",
    "naïve 数据",
    "x",
    "a longer one",
    "12345678",
]  # of 3, 1, 13, 2, 13, 9 tokens


def stream_of(documents, end=True):
    """(stream, starts) of texts in bytes, each but perhaps the last with its end of text."""
    ids = [[*text.encode(), EOT] for text in documents]
    starts = np.append(0, np.cumsum([len(part) for part in ids])[:-1])
    flat = np.array([i for part in ids for i in part], dtype=np.uint16)
    return TokenStream([Source("texts", flat if end else flat[:-1])]), starts


def test_windows_written_out():
    """Chopped with separators: fillers are no targets, and what follows them is one."""
    stream, starts = stream_of(["ab", "c", "def"])  # 97 98 E | 99 E | 100 101 102 E
    plan = chop(starts, len(stream), 4, separator=1)
    inputs, targets, nothing = Packed(stream, plan, FILLER, False).read(np.arange(2))
    assert inputs.tolist() == [[97, 98, EOT, FILLER], [99, EOT, FILLER, 100]]
    assert targets.tolist() == [[98, EOT, IGNORE, 99], [EOT, IGNORE, 100, 101]]
    assert nothing is None


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(len(DOCUMENTS))), T=st.integers(1, 16), end=st.booleans())
def test_best_fit_windows_hold_whole_documents(order, T, end):
    """Each document's tokens once, in order; targets are next tokens of the window; documents begin
    where they do; padding is no target."""
    stream, starts = stream_of([DOCUMENTS[d] for d in order], end)
    rows = Packed(stream, best_fit(starts, len(stream), T, 5), FILLER, True)
    windows = np.arange(len(rows))
    inputs, targets, begins = rows.read(windows)
    assert rows.sizes(windows).sum() == len(stream)
    flat = stream.read(0, len(stream)).tolist()
    wanted = [flat[a:b] for a, b in zip(starts, [*starts[1:], len(stream)])]
    found = []
    for x, y, begin, size in zip(inputs, targets, begins, rows.sizes(windows).tolist()):
        assert y[:-1][: size - 1].tolist() == x[1:size].tolist()
        assert (y[max(size, 1) :] == IGNORE).all() and (x[size:] == FILLER).all()
        if size < T:
            assert y[size - 1] == IGNORE
        assert all(begin[j] in (j, begin[j - 1]) for j in range(1, T)) and begin[0] == 0
        found += [
            x[b : b + n].tolist() for b, n in zip(*np.unique(begin[:size], return_counts=True))
        ]
    chunks = [part[i : i + T] for part in wanted for i in range(0, len(part), T)]
    assert sorted(found) == sorted(chunks)


@pytest.mark.parametrize("opens", [False, True])
def test_documents_in_windows_of_the_stream(opens):
    texts = [EOT, 97, 98, EOT, EOT, 99, 100, 101, EOT, 102, 103, 104, 105]
    stream = TokenStream([Source("x", np.array(texts, dtype=np.uint16))])
    _, _, starts = Chopped(stream, 6, Mark(EOT, opens)).read(np.arange(2))
    if opens:
        assert starts.tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 2, 2, 2, 2]]
    else:
        assert starts.tolist() == [[0, 1, 1, 1, 4, 5], [0, 0, 0, 3, 3, 3]]


def test_noise_takes_the_first_tokens_of_later_documents_from_the_targets():
    stream, _ = stream_of(["abcd", "e", "fghij"])  # 97 98 99 100 E | 101 E | 102 103 104 105 106 E
    rows = Chopped(stream, 6, joint=(Mark(EOT, False), 2))
    inputs, targets, _ = rows.read(np.arange(2))
    assert inputs.tolist() == [[97, 98, 99, 100, EOT, 101], [EOT, 102, 103, 104, 105, 106]]
    _ = IGNORE
    # of 101 E both; the second window begins with an end of text, after which 102 103 begin
    assert targets.tolist() == [[98, 99, 100, EOT, _, _], [_, _, 104, 105, 106, EOT]]


@pytest.mark.parametrize("within", [False, True])
def test_sources_are_mixed_alike_on_any_number_of_ranks(within):
    rows = []
    for texts in (["one", "two two", "three three three"] * 9, ["A", "BCDE FG"] * 10):
        stream, starts = stream_of(texts)
        rows.append(Packed(stream, best_fit(starts, len(stream), 20, 1), FILLER, within))
    weights = [Fraction(3), Fraction(1)]
    whole = [TrainBatches(rows, 12, 7, weights=weights).batch(step) for step in range(6)]
    for world, accum in ((1, 3), (2, 1), (3, 2)):
        batches = TrainBatches(rows, 12, 7, accum, weights)
        for step in (5, 2):  # a resumed run needs no history
            dealt = [
                batches.batch(step, rank, world, micro)
                for micro in range(accum)
                for rank in range(world)
            ]
            for side in range(2 + within):
                parts = np.concatenate([part[side] for part in dealt])
                assert np.array_equal(parts, whole[step][side])
    every = np.concatenate([inputs for inputs, *_ in whole])
    second = (every >= ord("A")) & (every <= ord("Z"))
    assert second.any(axis=1).tolist() == [i % 4 == 2 for i in range(72)]
    alone = [TrainBatches(rows[:1], 9, 7).batch(step)[0] for step in range(6)]
    assert np.array_equal(every[~second.any(axis=1)], np.concatenate(alone))
    batches = TrainBatches(rows, 12, 7, weights=weights)
    assert batches.epochs(6) == [54 / len(rows[0]), 18 / len(rows[1])]
    padding = sum(len(row) - len(np.trim_zeros(row - FILLER, "b")) - 1 for row in every)
    assert batches.tokens(6) == every.size - padding  # each window's last text keeps its end

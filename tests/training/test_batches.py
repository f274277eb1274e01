"""Training batches against plain Python over a stream that counts upwards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import Source, TokenStream
from training.batches import TrainBatches


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
    whole = TrainBatches(n, T, batch_size, seed).batch(stream, step)
    assert whole[0].shape == whole[1].shape == (batch_size, T)
    for world, accum in ((1, 2), (2, 1), (2, 2), (3, 2), (1, 12)):
        if batch_size % (world * accum):
            continue
        batches = TrainBatches(n, T, batch_size, seed, grad_accum_steps=accum)
        dealt = [
            batches.batch(stream, step, rank, world, micro)
            for micro in range(accum)
            for rank in range(world)
        ]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([d[side] for d in dealt]), whole[side])


def test_each_epoch_is_a_new_permutation_of_disjoint_windows():
    T, n = 4, 4 * 25 + 3  # 25 windows, and 2 tokens that never fill one
    stream = counting_stream(n)
    batches = TrainBatches(n, T, 10, seed=1)
    steps = [batches.batch(stream, step) for step in range(5)]  # two epochs, one straddling batch
    inputs = np.concatenate([s[0] for s in steps])
    targets = np.concatenate([s[1] for s in steps])
    assert np.array_equal(targets, inputs + 1)  # the stream counts upwards
    epochs = inputs[:, 0].reshape(2, 25) // T
    assert [sorted(e) for e in epochs.tolist()] == [list(range(25))] * 2
    assert epochs[0].tolist() != epochs[1].tolist() != list(range(25))
    other = TrainBatches(n, T, 10, seed=2).batch(stream, 0)
    assert not np.array_equal(other[0], steps[0][0])
    again = TrainBatches(n, T, 10, seed=1).batch(stream, 3)  # a step needs no history
    assert np.array_equal(again[0], steps[3][0])
    assert batches.epoch(5) == 2.0
    # a batch may hold several epochs of a tiny data set
    tiny = TrainBatches(9, 4, 7, seed=0).batch(counting_stream(9), 0)[0]
    assert sorted(tiny[:, 0].tolist()) in ([0] * 3 + [4] * 4, [0] * 4 + [4] * 3)


def test_training_order_is_frozen():
    # resume must find the same data under every version of NumPy
    batches = TrainBatches(1001, 10, 8, seed=1234)
    starts = batches.batch(counting_stream(1001), 0)[0][:, 0] // 10
    assert starts.tolist() == np.random.RandomState([1234, 0]).permutation(100)[:8].tolist()
    assert starts.tolist() == [37, 14, 85, 73, 80, 47, 53, 54]


def test_training_refuses_what_cannot_be_dealt():
    with pytest.raises(ValueError, match="5 tokens, but one window needs seq_len \\+ 1 = 6"):
        TrainBatches(5, 5, 1, 0)
    with pytest.raises(ValueError, match="does not divide by 2 ranks x 2"):
        TrainBatches(100, 5, 6, 0, grad_accum_steps=2).batch(counting_stream(100), 0, 0, 2)
    with pytest.raises(ValueError, match="seed"):
        TrainBatches(100, 5, 6, -1)

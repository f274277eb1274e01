"""backends/pairs.py: any pairs of context and continuation, beside one forward each."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from builders import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.local import Local
from backends.pairs import score_pairs, share_prefixes


def alone(model, before, after, context):
    """(log-probability, whether greedy) from one forward without a cache."""
    ids = [*before, *after][:-1][-context:]
    logits = model.logits(model.hidden(torch.tensor([ids]))).log_softmax(-1)[0, -len(after) :]
    picked = logits.gather(1, torch.tensor(after)[:, None])[:, 0]
    return float(picked.double().sum()), bool((logits.argmax(-1) == torch.tensor(after)).all())


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_one_forward_each(seed):
    """Questions with common examples, choices of one token and of several, lone pairs, a pair
    twice, and what is longer than the context."""
    g = np.random.default_rng(seed)
    model = tiny_model(max_position_embeddings=96)
    V = model.config.vocab_size
    head = g.integers(0, V, 60).tolist()
    pairs = []
    for _ in range(12):
        question = head + g.integers(0, V, g.integers(1, 20)).tolist()
        pairs += [(question, [int(token)]) for token in g.integers(0, V, 4)]
        pairs += [(question, g.integers(0, V, g.integers(1, 5)).tolist()) for _ in range(3)]
    pairs += [(g.integers(0, V, 3).tolist(), g.integers(0, V, 2).tolist()) for _ in range(5)]
    pairs += [(g.integers(0, V, 130).tolist(), g.integers(0, V, n).tolist()) for n in (1, 96)]
    with torch.no_grad():  # the likeliest continuation of one of them
        logits = model.logits(model.hidden(torch.tensor([pairs[0][0]])))
    pairs += [(pairs[0][0], [int(logits[0, -1].argmax())]), pairs[3]]
    found = score_pairs(Local(model), pairs, 512)
    with torch.no_grad():
        wanted = [alone(model, before, after, 96) for before, after in pairs]
    np.testing.assert_allclose(found.logprobs, [value for value, _ in wanted], atol=1e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in wanted]
    assert found.greedy.any() and not found.greedy.all()
    assert found.tokens < 0.6 * sum(len(before) + len(after) for before, after in pairs)


def test_longer_than_the_context_is_refused():
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens is longer than the context"):
        score_pairs(Local(model), [([1], [2] * 17)], 64)
    assert len(score_pairs(Local(model), [], 64).logprobs) == 0


texts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(0, 4))
def test_prefixes_save_the_most(rows, cost):
    """Against every set of prefixes, each row taking the longest that it can."""
    import backends.pairs as pairs

    rows = [np.array(row) for row in {tuple(row) for row in rows}]
    before, pairs.MIN_PREFIX = pairs.MIN_PREFIX, 1
    try:
        prefixes, prefix = share_prefixes(rows, [1] * len(rows), cost)
    finally:
        pairs.MIN_PREFIX = before
    for row, g in zip(rows, prefix):
        assert row[: len(prefixes[g])].tolist() == prefixes[g].tolist()
        assert len(row) > len(prefixes[g])
    used = sorted(set(prefix.tolist()) - {0})
    assert used == list(range(1, len(prefixes)))
    spent = sum(len(prefixes[g]) + cost for g in used)
    saved = sum(len(prefixes[g]) for g in prefix) - spent
    assert saved == most_saved([tuple(row.tolist()) for row in rows], cost)


def most_saved(rows, cost):
    """Of all sets of what two rows or more begin with."""
    begun = Counter(row[:n] for row in rows for n in range(1, len(row)))
    shared = [text for text, count in begun.items() if count > 1]
    best = 0
    for size in range(min(len(shared), 3) + 1):
        for chosen in itertools.combinations(shared, size):
            taken = [
                max((len(t) for t in chosen if len(t) < len(row) and row[: len(t)] == t), default=0)
                for row in rows
            ]
            best = max(best, sum(taken) - sum(len(text) + cost for text in chosen))
    return best

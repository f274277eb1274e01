"""backends/continuations.py: batches against brute force, and the same bits on any number of ranks.
The scores' oracle is tests/test_mmlu_oracle.py; greedy, tokens and consumer: test_local.py."""

import numpy as np
import pytest
from builders import CPU, Rank, mmlu_prompts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.continuations import (
    Continuations,
    deal_batches,
    plan_batches,
    score_continuations,
    unique_flops,
)
from config import GPTConfig
from tasks.questions import read_data

# ---------------------------------------------------------------------------------------------
# Batches and ranks


@st.composite
def random_rows(draw):
    n_prefixes = draw(st.integers(1, 4))
    prefixes = [[7] * draw(st.integers(0, 300)) for _ in range(n_prefixes)]
    size = draw(st.integers(1, 60))
    group = sorted(draw(st.lists(st.integers(0, n_prefixes - 1), min_size=size, max_size=size)))
    lengths = draw(st.lists(st.integers(1, 400), min_size=size, max_size=size))
    ids = [np.full(n, 1) for n in lengths]
    return Continuations(prefixes, np.array(group), ids, [[]] * size, [1, 2])


@settings(max_examples=60, deadline=None)
@given(random_rows(), st.integers(64, 3000), st.sampled_from([None, 1, 5]), st.integers(1, 9))
def test_batches_hold_every_row_once_and_are_dealt_once(rows, max_tokens, max_rows, world_size):
    batches = plan_batches(rows, max_tokens, max_rows)
    assert sorted(r for b in batches for r in b.rows) == list(range(len(rows.ids)))
    for b in batches:
        assert all(rows.prefix[r] == b.prefix and len(rows.ids[r]) <= b.length for r in b.rows)
        assert b.tokens <= max_tokens or len(b.rows) == 1
        assert max_rows is None or len(b.rows) <= max_rows
        longest = rows.lengths[rows.prefix == b.prefix].max()
        assert b.length <= longest
    dealt = deal_batches(rows, batches, world_size)
    assert [i for share in dealt for i in share] == list(range(len(batches)))
    assert len(dealt) == world_size


def load_of(rows, batches, run):
    cost, previous = 0, None
    for i in run:
        cost += batches[i].tokens + batches[i].overhead
        if batches[i].prefix != previous:
            cost += len(rows.prefixes[batches[i].prefix]) + batches[i].overhead
        previous = batches[i].prefix
    return cost


@settings(max_examples=30, deadline=None)
@given(random_rows())
def test_no_contiguous_deal_has_a_smaller_largest_share(rows):
    batches = plan_batches(rows, 1000)[:9]
    n = len(batches)
    worst = [load_of(rows, batches, run) for run in deal_batches(rows, batches, 3)]
    brute = min(
        max(load_of(rows, batches, run) for run in (range(a), range(a, b), range(b, n)))
        for a in range(n + 1)
        for b in range(a, n + 1)
    )
    assert max(worst) == brute


@pytest.mark.parametrize("template", ["lm_eval", "continuation"])
def test_any_number_of_ranks_gives_the_same_bits(template, gpt2, data_dir):
    model = tiny_model("llama", vocab_size=50257, max_position_embeddings=4096, std=0.15)
    data = read_data(data_dir / "mmlu", 2, subjects=["anatomy", "sociology", "virology"], limit=9)
    _, prompts = mmlu_prompts(gpt2, data, template)
    batches = plan_batches(prompts.rows, 300)
    assert len(batches) > 6
    sums = []
    for world_size in (1, 2, 3):
        parts = [
            score_continuations(model, prompts.rows, batches, Rank(rank, world_size, 0, CPU))
            for rank in range(world_size)
        ]
        choices, targets = [p.choices for p in parts], [p.targets for p in parts]
        assert world_size == 1 or all(not p.any(axis=-1).all() for p in choices if p.size)
        sums.append((sum(choices), sum(targets), sum(p.tokens for p in parts)))
    for found in sums[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found, sums[0], strict=True))


def test_unique_flops_against_a_count_of_every_token():
    """Linear layers for each token once, attention for each pair, the head for each scored one."""
    shape = {"n_layers": 3, "n_heads": 2, "d_model": 8, "d_ff": 16}
    config = GPTConfig(vocab_size=11, max_position_embeddings=64, **shape)
    rows = Continuations(
        [[1] * 5, [], [1] * 9],
        np.array([0, 0, 1]),
        [np.ones(2), np.ones(3), np.ones(4)],
        [[], [3], []],
        [1, 2],
    )
    tokens, pairs, scored = 5 + 2 + 3 + 4, 0, 3 + 1
    pairs += sum(range(1, 6)) + (6 + 7) + (6 + 7 + 8) + (1 + 2 + 3 + 4)
    linear = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 16)  # products of a token
    wanted = 2 * tokens * linear + 4 * 8 * 3 * pairs + 2 * 8 * 11 * scored
    assert unique_flops(config, rows) == wanted

"""backends/strips.py: rows laid end to end, against each row read whole by the model alone, and the
same bits on any number of ranks. On a GPU: tests/gpu/test_mmlu_gpu.py."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import CPU, Rank, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny

from backends import strips
from backends.continuations import Continuations, deal_batches, plan_batches, score_continuations
from backends.local import Local
from distributed import Dist
from model import GPTModel
from modeling.attention import Segments, attend, attend_segments

CUDA = torch.device("cuda")


def some_rows(seed=0, n=40, vocabulary=97) -> Continuations:
    """Rows after prefixes of which some are empty and one nobody goes on from, with targets of any
    number, the last of which may share a place."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, vocabulary, size) for size in (30, 0, 50, 7, 0, 64, 1)]
    prefix = np.sort(rng.choice([0, 1, 2, 4, 5, 6], n))
    ids = [rng.integers(0, vocabulary, rng.integers(1, 40)) for _ in range(n)]
    targets = [rng.integers(0, vocabulary, rng.integers(0, len(own) + 1)) for own in ids]
    alternatives = np.array([rng.integers(1, max(len(own), 1) + 1) for own in targets])
    return Continuations(prefixes, prefix, ids, targets, [1, 2, 3], alternatives)


# ---------------------------------------------------------------------------------------------
# Which rows lie in which strip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(20, 3000), st.sampled_from([None, 1, 5]))
def test_strips_hold_every_row_once_after_its_own_prefix(seed, max_tokens, max_rows):
    rows = some_rows(seed)
    portions = strips.plan_strips(rows, max_tokens, max_rows)
    assert sorted(r for s in portions for r in s.rows) == list(range(len(rows.ids)))
    for strip in portions:
        assert strip.tokens <= max_tokens or len(strip.rows) == 1
        assert max_rows is None or len(strip.rows) <= max_rows
        sizes = np.diff(strip.section.starts)
        assert [len(rows.prefixes[g]) for g in strip.section.which] == sizes.tolist()
        assert (sizes > 0).all() or not sizes.any()
        assert strip.section.tokens <= max_tokens // strips.SECTION or len(sizes) == 1
        for r, start, stop in zip(strip.rows, strip.own, strip.own[1:]):
            assert stop - start == len(rows.ids[r])
            group = np.searchsorted(strip.groups, start, side="right") - 1
            at = strip.section.which.tolist().index(rows.prefix[r])
            assert strip.section.starts[at] == strip.keys[group]
            assert strip.section.starts[at + 1] == strip.keys[group + 1]
        assert strip.own[-1] == strip.groups[-1] == strip.tokens


def test_most_strips_have_one_length():
    rows = some_rows(n=4000)
    lengths = [strip.tokens for strip in strips.plan_strips(rows, 4096)]
    n_sections = len({strip.prefix for strip in strips.plan_strips(rows, 4096)})
    assert sum(length != 4096 for length in lengths) <= n_sections < len(lengths) / 4
    assert sum(lengths) < 1.05 * rows.lengths.sum()


def test_what_can_be_laid_so():
    rows = some_rows()
    longest = max(len(rows.prefixes[g]) + len(own) for g, own in zip(rows.prefix, rows.ids))
    reach = {"full_attention_layers": (), "sliding_window": longest}
    for changes, wanted in (
        ({}, True),
        (reach, True),
        (reach | {"sliding_window": longest - 1}, False),
        ({"attention_softcap": 20.0}, False),
        ({"head_dim": 12}, False),
    ):
        model = GPTModel.on_meta(tiny("qwen3", max_position_embeddings=256, **changes))
        assert strips.attention_is_plain(model, rows) == wanted, changes
    assert not strips.attention_is_plain(GPTModel.on_meta(tiny("youtu")), rows)


@pytest.mark.parametrize(
    ("dtype", "device", "pipe", "wanted"),
    [
        (torch.bfloat16, CUDA, None, True),
        (torch.float32, CUDA, None, False),  # the reference, which the kernel does not know
        (torch.bfloat16, CPU, None, False),
        (torch.bfloat16, CUDA, object(), False),
    ],
)
def test_where_they_are_laid_so(dtype, device, pipe, wanted):
    model = GPTModel.on_meta(tiny("qwen3", max_position_embeddings=256)).to(dtype)
    dist = dataclasses.replace(Dist(0, 1, 0, device), pipe=pipe)
    assert strips.apply(model, some_rows(), dist) == wanted


# ---------------------------------------------------------------------------------------------
# Scores


def alone(model, rows):
    """(log-probabilities of the choices [R, K], of each target, whether each is the likeliest), of
    every row read whole."""
    choices, tokens, likeliest = [], [], []
    for r, own in enumerate(rows.ids):
        read = [*map(int, rows.prefixes[rows.prefix[r]]), *map(int, own)]
        logp = model.logits(model.hidden(torch.tensor([read])))[0].float().log_softmax(-1)
        choices.append(logp[-1, rows.choice_ids].tolist())
        targets, spare = rows.targets[r], int(rows.alternatives[r]) - 1
        for j, token in enumerate(map(int, targets)):
            place = min(len(read) - len(targets) + j + spare, len(read) - 1)
            tokens.append(float(logp[place, token]))
            likeliest.append(int(logp[place].argmax()) == token)
    return np.array(choices), np.array(tokens), np.array(likeliest)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "phi", "mixtral", "olmo2"])
@pytest.mark.parametrize("max_tokens", [100, 700])
@torch.no_grad()
def test_scores_are_those_of_each_row_alone(kind, max_tokens):
    torch.manual_seed(3)
    model = GPTModel(tiny(kind, vocab_size=97, max_position_embeddings=128)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.15)
    rows = some_rows()
    choices, tokens, likeliest = alone(model, rows)
    portions = strips.plan_strips(rows, max_tokens)
    found = score_continuations(model, rows, portions, Dist(0, 1, 0, CPU), greedy=True)
    assert np.abs(found.choices - choices).max() < 2e-5
    assert np.abs(found.tokens - tokens).max() < 2e-5
    assert np.array_equal(found.likeliest, likeliest)


@torch.no_grad()
def test_any_number_of_ranks_gives_the_same_bits():
    model, rows = tiny_model("llama", vocab_size=97), some_rows(n=90)
    portions = strips.plan_strips(rows, 300)
    assert len({strip.prefix for strip in portions}) > 2
    one = score_continuations(model, rows, portions, Rank(0, 1, 0, CPU))
    for world_size in (2, 3):
        dealt = deal_batches(rows, portions, world_size)
        assert [i for share in dealt for i in share] == list(range(len(portions)))
        parts = [
            score_continuations(model, rows, portions, Rank(rank, world_size, 0, CPU))
            for rank in range(world_size)
        ]
        assert not any(p.choices.any(axis=-1).all() for p in parts), "each its own share"
        assert np.array_equal(sum(p.choices for p in parts), one.choices)
        assert np.array_equal(sum(p.tokens for p in parts), one.tokens)


@torch.no_grad()
def test_a_rows_bits_are_its_own():
    """Other tokens in its neighbours, and other neighbours' answers, change none of them."""
    model, rows = tiny_model("gpt", vocab_size=97), some_rows(n=60)
    kept = 17
    others = [own if r == kept else (own + 1 + r) % 97 for r, own in enumerate(rows.ids)]
    changed = dataclasses.replace(rows, ids=others)
    dist = Dist(0, 1, 0, CPU)
    a, b = (
        score_continuations(model, x, strips.plan_strips(x, 400), dist) for x in (rows, changed)
    )
    assert np.array_equal(a.choices[kept], b.choices[kept])
    assert not (a.choices == b.choices).all(axis=-1)[np.arange(60) != kept].any()


def test_a_local_model_takes_half_where_memory_runs_out(monkeypatch):
    """And its record says how much was run."""
    model, rows = tiny_model("gpt", vocab_size=97), some_rows(n=60)
    monkeypatch.setattr(strips, "apply", lambda *asked: True)
    hidden, sizes = model.hidden, []

    def short_of_memory(ids, **terms):
        sizes.append(ids.shape[1])
        if ids.shape[1] > 260:
            raise torch.OutOfMemoryError
        return hidden(ids, **terms)

    monkeypatch.setattr(model, "hidden", short_of_memory)
    backend = Local(model)
    found = backend.score_rows(rows, 512, greedy=True)
    assert max(sizes) > 260 and backend.ran()["batch_tokens"] == 256
    portions = strips.plan_strips(rows, 256)
    assert backend.cost()["tokens_padded"] == sum(strip.tokens for strip in portions)
    dist = Dist(0, 1, 0, CPU)
    padded = score_continuations(model, rows, plan_batches(rows, 256), dist, greedy=True)
    assert np.abs(found.choices - padded.choices).max() < 1e-4
    assert np.array_equal(found.greedy, padded.greedy)


# ---------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("causal", [True, False])
def test_segments_see_their_own_keys_alone(causal):
    """Against one attention over all of them under a mask."""
    torch.manual_seed(0)
    queries = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    keys = queries if causal else torch.tensor([2, 7, 8, 20], dtype=torch.int32)
    N, M = 11, int(keys[-1])
    q, k, v = torch.randn(1, 4, N, 8), torch.randn(1, 2, M, 8), torch.randn(1, 2, M, 8)
    seen = torch.zeros(N, M, dtype=torch.bool)
    for s in range(3):
        seen[queries[s] : queries[s + 1], keys[s] : keys[s + 1]] = True
    if causal:
        seen &= torch.arange(N)[:, None] >= torch.arange(N)
    wanted = attend(q, k, v, causal=False, mask=seen, scale=0.3, lse=True)
    segments = Segments(queries, 7), Segments(keys, 12)
    found = attend_segments(q, k, v, *segments, causal=causal, scale=0.3)
    for ours, theirs in zip(found, wanted):
        assert torch.allclose(ours, theirs, atol=1e-6)

"""sampling.py: random bits against published answers, what top-k and top-p keep against sorting,
log-probabilities against float64. test_engine.py holds whole samples against exact distributions.
"""

import numpy as np
import pytest
import torch

from backends import Sampling
from backends.sampling import (
    COLUMNS,
    features_of,
    gumbel_noise,
    sample_tokens,
    stream_key,
    threefry,
    top_logprobs,
)

# ---------------------------------------------------------------------------------------------
# Random streams


def int32(*words):
    return [torch.tensor([w], dtype=torch.int64).to(torch.int32) for w in words]


# Random123's kat_vectors: rounds, counter, key, result
KNOWN = """
13 00000000 00000000 00000000 00000000 9d1c5ec6 8bd50731
13 ffffffff ffffffff ffffffff ffffffff fd36d048 2d17272c
13 243f6a88 85a308d3 13198a2e 03707344 ba3e4725 f27d669e
20 00000000 00000000 00000000 00000000 6b200159 99ba4efe
20 ffffffff ffffffff ffffffff ffffffff 1cb996fc bb002be7
20 243f6a88 85a308d3 13198a2e 03707344 c4923a9c 483df7a0
"""


@pytest.mark.parametrize("line", KNOWN.strip().splitlines())
def test_threefry_known_answers(line):
    rounds, *words = line.split()
    c0, c1, k0, k1, *wanted = [int(w, 16) for w in words]
    got = threefry(int32(k0, k1), int32(c0, c1), int(rounds))
    assert [int(x) & 0xFFFFFFFF for x in got] == wanted


def test_streams_differ_by_seed_task_sample_and_position():
    cases = [(0, "HumanEval/1", 0), (1, "HumanEval/1", 0), (0, "HumanEval/10", 0)]
    cases += [(0, "HumanEval/1", 1), (0, "HumanEval/1", 10)]
    keys = torch.tensor([stream_key(*case) for case in cases], dtype=torch.int32)
    noise = [gumbel_noise(keys, torch.full((5,), t, dtype=torch.int32), 2001) for t in (0, 1)]
    noise = torch.cat(noise)
    assert torch.isfinite(noise).all()
    correlation = torch.corrcoef(noise) - torch.eye(10)
    assert correlation.abs().max() < 5 / 2001**0.5
    euler = 0.5772156649
    assert abs(noise.mean() - euler) < 5 * 1.2825 / 20010**0.5
    assert abs(noise.std() - np.pi / 6**0.5) < 0.04


# ---------------------------------------------------------------------------------------------
# What is kept


def exact_distribution(logits, temperature, top_p, top_k):
    """By sorting: the k likeliest, then the fewest likeliest whose share reaches top_p."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    if top_p < 1:
        p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_kept_by_top_k_and_top_p(dtype):
    """With the noise spread over many draws, exactly the kept tokens appear; ties stay in."""
    g = torch.Generator().manual_seed(2)
    logits = (torch.randn(40, 11, generator=g) * 1.5).to(dtype)
    logits[0] = 0.0  # all equal: all kept
    top_p, top_k = torch.rand(40, generator=g) * 0.9 + 0.05, torch.randint(0, 7, (40,), generator=g)
    seen = torch.zeros(40, 11)
    keys = torch.tensor([stream_key(0, "x", i) for i in range(40)], dtype=torch.int32)
    columns = {"temperature": torch.full((40,), 3.0), "top_p": top_p, "top_k": top_k.int()}
    for position in range(600):
        at = torch.full((40,), position, dtype=torch.int32)
        tokens = sample_tokens(logits, keys, at, columns)
        seen[torch.arange(40), tokens] += 1
    assert (seen[0] > 0).all()
    for i in range(1, 40):
        values = logits[i].double().numpy()
        p = exact_distribution(values, 3.0, float(top_p[i]), int(top_k[i]))
        kept = values >= values[p > 0].min()  # with those equal to the last one kept
        rare = kept & (np.exp(values / 3) / np.exp(values[kept] / 3).sum() < 0.02)
        assert ((seen[i].numpy() > 0)[~kept] == 0).all(), i
        assert ((seen[i].numpy() > 0)[kept & ~rare]).all(), i


def test_greedy_rows_take_the_first_of_equals_beside_sampled_ones():
    logits = torch.zeros(2, 9)
    logits[0, [4, 7]] = 2.0
    keys, zero = torch.ones(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    columns = {"temperature": torch.tensor([0.0, 1.0]), "top_p": torch.ones(2), "top_k": zero}
    tokens = sample_tokens(logits, keys, zero, columns)
    assert tokens[0] == 4


def test_features_are_what_any_sampled_row_needs():
    assert features_of([Sampling(), Sampling(top_p=0.5, top_k=3)]) == set(), "greedy rows need none"
    drawn = Sampling(temperature=0.5)
    assert features_of([Sampling(top_p=0.5), drawn]) == {"temperature"}
    assert features_of([drawn, Sampling(temperature=1.0, top_k=3)]) == {"temperature", "top_k"}
    assert features_of([Sampling(temperature=1.0, top_p=0.9, top_k=1)]) == set(COLUMNS)


@pytest.mark.parametrize("features", [{"temperature"}, {"temperature", "top_p"}, set(COLUMNS)])
def test_columns_at_their_idle_value_change_nothing(features):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([stream_key(0, "x", i) for i in range(64)], dtype=torch.int32)
    columns = {n: torch.full((64,), idle, dtype=dtype) for n, (dtype, idle) in COLUMNS.items()}
    columns["temperature"] += 0.7
    at = torch.zeros(64, dtype=torch.int32)
    wanted = (logits / 0.7 + gumbel_noise(keys, at, 50)).argmax(-1)
    assert (sample_tokens(logits, keys, at, columns, frozenset(features)) == wanted).all()


def test_logprobs_are_of_the_unmodified_logits():
    logits = (torch.randn(6, 30, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    tokens = torch.arange(6)
    wanted = logits.double().log_softmax(-1)
    for k in (0, 4):
        ids, values = top_logprobs(logits, tokens, k)
        assert ids.shape == values.shape == (6, 1 + k) and values.dtype == torch.float32
        assert (ids[:, 0] == tokens).all()
        torch.testing.assert_close(values.double(), wanted.gather(1, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            values[:, 1:].double(), wanted.sort(descending=True).values[:, :k], rtol=1e-5, atol=1e-5
        )

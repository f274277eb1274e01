"""modeling/attention.py: every form of attention against a loop over queries in float64."""

import itertools

import pytest
import torch

from modeling import attention
from modeling.attention import attend


def by_hand(q, k, v, seen, softcap, scale):
    """Query by query in float64: (out [B, H, T, E], lse [B, H, T])."""
    B, H, T, D = q.shape
    out, lse = torch.zeros(B, H, T, v.shape[-1]).double(), torch.zeros(B, H, T).double()
    q, k, v = q.double(), k.double(), v.double()
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        keys, values = (x[b, h * k.shape[1] // H][seen[t]] for x in (k, v))
        scores = keys @ q[b, h, t] * (D**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lse[b, h, t] = scores.exp().sum().log()
        out[b, h, t] = (scores - lse[b, h, t]).exp() @ values
    return out, lse


ATTENTIONS = list(
    itertools.product([None, 4, 40], [None, 2.0], [None, 0.3], [False, True], ["causal", "mask"])
)


@pytest.mark.parametrize("width", [8, 5])  # of values
@pytest.mark.parametrize("window, softcap, scale, lse, kind", ATTENTIONS)
def test_attention_by_hand(window, softcap, scale, lse, kind, width):
    g = torch.Generator().manual_seed(0)
    sides = (4, 8), (2, 8), (2, width)
    q, k, v = (torch.randn(2, heads, 11, side, generator=g) * 2 for heads, side in sides)
    i = torch.arange(11)
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or 99))
    options = {"window": window, "softcap": softcap, "scale": scale, "lse": lse}
    if kind == "mask":
        seen = torch.rand(11, 11, generator=g) < 0.6
        seen[i, i] = True
        options["mask"] = seen
    got = attend(q, k, v, causal=True, **options)
    out, sums = by_hand(q, k, v, seen, softcap, scale)
    if lse:
        torch.testing.assert_close(got[1], sums.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0] if lse else got, out.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap, lse", [(None, False), (None, True), (2.0, False), (2.0, True)])
def test_attention_over_other_keys(softcap, lse):
    """Not causal, and more keys than queries: a prefix, say."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((4, 5), (2, 9), (2, 9)))
    got = attend(q, k, v, causal=False, softcap=softcap, lse=lse)
    out, sums = by_hand(q, k, v, torch.ones(5, 9, dtype=torch.bool), softcap, None)
    torch.testing.assert_close(got[0] if lse else got, out.float(), atol=1e-5, rtol=1e-5)
    if lse:
        torch.testing.assert_close(got[1], sums.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap, scale", [(None, None), (2.0, 0.3)])
def test_attention_by_blocks(window, softcap, scale, monkeypatch):
    """The form that CUDA takes, as plain operations."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setitem(attention._COMPILED, "flex", flex_attention)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 11, 8, generator=g) for heads in (4, 2, 2))
    blocks = attention._window_blocks(11, window, q.device)
    got = attention._flex_attention(q, k, v, blocks, softcap, scale)
    wanted = attend(q, k, v, causal=True, window=window, softcap=softcap, scale=scale)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_scores_some_queries_at_a_time(causal, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 11, 8, generator=g) for heads in (4, 2, 2))
    whole = attend(q, k, v, causal=causal, softcap=2.0, lse=True)
    monkeypatch.setattr(attention, "DENSE_BYTES", 3 * 4 * 2 * 4 * 11)  # three queries
    with torch.no_grad():
        parts = attend(q, k, v, causal=causal, softcap=2.0, lse=True)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_dropout_and_gradients_with_a_soft_cap():
    """Training takes the dense form: a mean over many draws is the attention without dropout."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=g, requires_grad=True) for _ in range(3))
    torch.manual_seed(0)
    many = [x.expand(4000, 1, -1, -1) for x in (q, k, v)]
    mean = attend(*many, causal=True, softcap=1.0, dropout=0.2).mean(0, keepdim=True)
    torch.testing.assert_close(
        mean, attend(q, k, v, causal=True, softcap=1.0), atol=0.05, rtol=0.05
    )
    attend(q, k, v, causal=True, softcap=1.0).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))

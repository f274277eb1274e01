"""The plain form of a decode step's attention against a loop over rows and heads in float64, the
grouping of rows for the kernel, and merging. tests/gpu/test_engine_gpu.py compares the kernel on
CUDA, the last test here in Triton's interpreter."""

import numpy as np
import pytest
import torch
from eight_bits import dequantised
from interpreted import expose, interpreted

from gpu_kernels import decode_attention as kernels
from gpu_kernels import decode_kernels, low_bit_matmul
from gpu_kernels.decode_attention import decode_attention, merge_parts, plan_tiles
from gpu_kernels.kv_codes import DTYPES, Codes, read


def softmax_attention(q, keys, values, softcap=None, scale=None):
    scores = keys @ q * (len(q) ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


@pytest.mark.parametrize("N,P,window", [(1, 9, 0), (3, 9, 0), (3, 9, 4), (1, 9, 12), (2, 0, 0)])
@pytest.mark.parametrize("G,R", [(2, 1), (2, 3)])
@pytest.mark.parametrize(
    "softcap,scale,kind",
    [
        *((None, None, None), (1.5, None, None), (None, 0.6, None), (1.5, 0.6, None)),
        *((None, None, "fp8"), (1.5, 0.6, "int8")),
    ],
)
def test_every_row_sees_its_prompt_and_its_own_tokens(N, P, window, G, R, softcap, scale, kind):
    """kind: of the codes that keys and values are stored as, and seen."""
    g, B, S, D = np.random.default_rng(N + window), 5, 7, 8
    q, new_k, new_v = (g.normal(size=(B, n, D)) for n in (G * R, G, G))
    k, v = (g.normal(size=(B, G, S, D)) for _ in range(2))
    prefix_k, prefix_v = (g.normal(size=(N, G, P, D)) for _ in range(2))
    lengths, prefix = np.array([0, 3, 6, 1, 5]), g.integers(0, N, B)
    prefix_lengths = np.array([P, P // 2, 0][:N])
    as_torch = [torch.tensor(x) for x in (q, new_k, new_v)]
    own, prompts = (
        [torch.tensor(x) for x in (k, v)],
        [torch.tensor(prefix_k), torch.tensor(prefix_v)],
    )
    if kind:
        own, prompts = ([Codes.of(x, DTYPES[kind]) for x in rooms] for rooms in (own, prompts))
        new_k, new_v, k, v, prefix_k, prefix_v = (
            dequantised(x, kind) for x in (new_k, new_v, k, v, prefix_k, prefix_v)
        )
    own, prompts = [*own, torch.tensor(lengths)], [*prompts, torch.tensor(prefix_lengths)]
    where = torch.tensor(prefix), plan_tiles(prefix, N, R, torch.float64), int(lengths.max()) + 1
    terms = {"window": window or None, "softcap": softcap, "scale": scale}
    got = decode_attention(*as_torch, own, prompts, *where, **terms)
    for b in range(B):
        n, p = lengths[b], prefix[b]
        for h in range(G * R):
            i = h // R
            keys = [prefix_k[p, i, : prefix_lengths[p]], k[b, i, :n], new_k[b, i][None]]
            values = [prefix_v[p, i, : prefix_lengths[p]], v[b, i, :n], new_v[b, i][None]]
            keys, values = (np.concatenate(x)[-window:] for x in (keys, values))
            wanted = softmax_attention(q[b, h], keys, values, softcap, scale)
            np.testing.assert_allclose(got[b, h], wanted, rtol=1e-5, atol=1e-6)
        kept_k, kept_v = (read(x[b], torch.float64).numpy() for x in own[:2])
        assert (kept_k[:, n] == new_k[b]).all(), "the new key is stored"
        assert (kept_v[:, n] == new_v[b]).all()
        others = np.arange(S) != n
        assert (kept_k[:, others] == k[b][:, others]).all(), "and no other touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B,N,R", [(1, 1, 1), (200, 8, 1), (64, 64, 4), (37, 5, 7), (3, 9, 24)])
def test_tiles_hold_every_row_once_with_its_prompt(B, N, R, dtype):
    shapes = set()
    for seed in range(20):
        g = np.random.default_rng(seed)
        alive = g.integers(1, N + 1)  # few prompts alive or many: the graph needs one shape
        prefix = g.integers(0, alive, B)
        tiles = plan_tiles(prefix, N, R, dtype).numpy()
        shapes.add(tiles.shape)
        seen = [(row, tile[0]) for tile in tiles for row in tile[1:] if row >= 0]
        assert sorted(seen) == list(enumerate(prefix))
    assert len(shapes) == 1
    tiles, rows = shapes.pop()
    assert tiles <= B and (rows - 1) * R <= max(64, R)


def test_merging_parts_is_attention_over_all_keys():
    g = np.random.default_rng(0)
    q, keys, values = g.normal(size=8), g.normal(size=(12, 8)) * 4, g.normal(size=(12, 8))
    out, lse = [], []
    for part in (slice(0, 5), slice(5, 5), slice(5, 12)):
        scores = keys[part] @ q / 8**0.5
        empty = len(scores) == 0
        out.append(np.zeros(8) if empty else softmax_attention(q, keys[part], values[part]))
        lse.append(-np.inf if empty else np.log2(np.exp(scores).sum()))
    out, lse = torch.tensor(np.array(out))[:, None, None], torch.tensor(lse)[:, None, None]
    merged = merge_parts(out.float(), lse.float())[0, 0]
    np.testing.assert_allclose(merged, softmax_attention(q, keys, values), rtol=1e-5, atol=1e-6)


def interpret(monkeypatch, programs):
    expose(monkeypatch, decode_kernels, decode_kernels.attend(), decode_kernels.merge())
    expose(monkeypatch, low_bit_matmul, low_bit_matmul.raw_of_words())
    monkeypatch.setattr(kernels, "PROGRAMS", programs)


@interpreted
@pytest.mark.parametrize("programs", [1, 264])  # the second splits each row's keys
@pytest.mark.parametrize("P, window, softcap", [(30, 0, None), (90, 17, 2.0), (0, 0, None)])
@pytest.mark.parametrize("kind", [None, "int8"])  # it rounds to 8-bit floats otherwise than CUDA
def test_the_kernel_in_the_interpreter(monkeypatch, programs, P, window, softcap, kind):
    """TRITON_INTERPRET=1 python -m pytest tests/gpu_kernels/test_decode_attention.py"""
    interpret(monkeypatch, programs)
    B, N, G, R, D, S = 3, 2, 2, 3, 24, 140
    g = torch.Generator().manual_seed(P)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def room(*shape):
        return normal(*shape) if kind is None else Codes.of(normal(*shape), DTYPES[kind])

    q, k_new, v_new = normal(B, G * R, D), normal(B, G, D), normal(B, G, D)
    own, prompts = [room(B, G, S, D) for _ in range(2)], [room(N, G, P, D) for _ in range(2)]
    own, prompts = [*own, torch.tensor([0, 5, S - 1])], [*prompts, torch.tensor([P, P // 3])]
    of_row = torch.tensor([0, 1, 0])
    tiles = plan_tiles(of_row, N, R, torch.float32)
    parts = *kernels._parts_of(own), *kernels._parts_of(prompts)
    terms = window or None, softcap, None
    wanted = kernels._decode_torch(q, k_new, v_new, own, prompts, of_row, S, *terms)
    how = window, softcap or 0.0, D**-0.5
    found = kernels._decode_triton(q, k_new, v_new, *parts, of_row, tiles, *how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("programs", [1, 264])
def test_the_kernel_over_latents_in_the_interpreter(monkeypatch, programs):
    interpret(monkeypatch, programs)
    B, H, R, L, S, P = 3, 5, 10, 36, 130, 40
    g = torch.Generator().manual_seed(0)
    q, new = (torch.randn(B, n, R + L, generator=g) for n in (H, 1))
    k, prompt_k = (torch.randn(n, 1, s, R + L, generator=g) for n, s in ((B, S), (1, P)))
    own, prompts = (k, None, torch.tensor([0, 5, S - 1])), (prompt_k, None, torch.tensor([P - 3]))
    of_row = torch.zeros(B, dtype=torch.int64)
    tiles = plan_tiles(of_row, 1, H, torch.float32, L)
    wanted = kernels._decode_torch(q, new, new[..., R:], own, prompts, of_row, S)
    parts = *kernels._parts_of(own), *kernels._parts_of(prompts)
    how = 0, 0.0, (R + L) ** -0.5
    found = kernels._decode_triton(q, new, new[..., R:], *parts, of_row, tiles, *how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

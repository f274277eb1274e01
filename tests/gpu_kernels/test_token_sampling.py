"""Kernels of a decode step in Triton's interpreter, against their plain twins: what draws a token,
what merges attention's parts.

TRITON_INTERPRET=1 python -m pytest -q tests/gpu_kernels/test_token_sampling.py

On CUDA: tests/gpu/test_engine_gpu.py."""

import pytest
import torch
from interpreted import expose, interpreted

from backends import sampling
from gpu_kernels import decode_attention, decode_kernels, token_sampling

FEATURES = [{"temperature"}, {"temperature", "top_p"}, {"temperature", "top_k"}]
FEATURES += [set(sampling.COLUMNS)]


@interpreted
@pytest.mark.parametrize("V", [77, 128, 601])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_those_of_the_plain_operations(monkeypatch, dtype, V):
    """Greedy rows, rows without cuts and rows with them beside each other; equal logits too."""
    expose(monkeypatch, token_sampling, token_sampling._kernel())
    monkeypatch.setattr(token_sampling, "BLOCK", 128)
    B, g = 9, torch.Generator().manual_seed(V)
    logits = (torch.randn(B, V + 5, generator=g) * 2).to(dtype)[:, :V]  # as of a padded head
    logits[0, [3, 70]] = 50.0
    keys = torch.tensor([sampling.stream_key(5, "t", i) for i in range(B)], dtype=torch.int32)
    position = torch.arange(B, dtype=torch.int32)
    columns = {"temperature": torch.full((B,), 0.8), "top_p": torch.rand(B, generator=g)}
    columns |= {"top_k": (position % 4 * 5).int()}
    columns["temperature"][[0, 4]], columns["top_p"][5] = 0.0, 1.0
    for features in FEATURES:
        wanted = sampling.sample_plainly(logits, keys, position, columns, frozenset(features))
        which = "top_p" in features, "top_k" in features
        names = ("temperature", "top_p", "top_k")
        found = token_sampling._sample_triton(
            logits, keys, position, *(columns[name] for name in names), *which
        )
        assert torch.equal(found, wanted), features
        assert found[0] == 3, "the first of equals"


class OnGPU(torch.Tensor):
    """Says that it is there."""

    is_cuda = True


@interpreted
@pytest.mark.parametrize("X, B, H, E", [(3, 5, 7, 16), (2, 3, 4, 40), (5, 1, 3, 128)])
def test_parts_are_merged_as_by_plain_operations(monkeypatch, X, B, H, E):
    expose(monkeypatch, decode_kernels, decode_kernels.merge())
    g = torch.Generator().manual_seed(E)
    out, lse = torch.randn(X, B, H, E, generator=g), torch.randn(X, B, H, generator=g) * 3
    out[1, 0, 0], lse[1, 0, 0] = 0.0, -torch.inf  # a part without keys
    wanted = decode_attention.merge_parts(out, lse)
    found = decode_attention.merge_parts(out.as_subclass(OnGPU), lse)
    torch.testing.assert_close(torch.Tensor(found), wanted, rtol=1e-5, atol=1e-6)

"""Kernels between a block's products in Triton's interpreter, against plain operations: norms of
heads that are turned, norms of what a branch adds.

TRITON_INTERPRET=1 python -m pytest -q tests/gpu_kernels/test_elementwise.py

On CUDA: tests/gpu/test_elementwise_gpu.py."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import expose, interpreted

from gpu_kernels import elementwise
from gpu_kernels.elementwise import Terms
from modeling.rotary import rotate


@interpreted
@pytest.mark.parametrize("D, H, G", [(16, 3, 1), (64, 5, 5), (6, 4, 2)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normed_and_turned(monkeypatch, D, H, G, offset):
    """In float16: the interpreter cuts bfloat16 off instead of rounding it."""
    dtype = torch.float16
    expose(monkeypatch, elementwise, elementwise._rotate_kernel())
    g = torch.Generator().manual_seed(D)
    fused = torch.randn(2, 7, H + 2 * G, D, generator=g).to(dtype) * 3
    kept, (q, k, v) = fused.clone(), fused.split([H, G, G], dim=2)
    angle = torch.randn(2, 7, 1, D // 2, generator=g) * 9
    weights = torch.randn(D, generator=g), torch.randn(D, generator=g)

    def wanted(x, weight):
        normed = F.rms_norm(x.float(), (D,), weight + offset, 1e-6).to(dtype)
        return rotate(normed, angle.cos(), angle.sin())

    parts = kept.split([H, G, G], dim=2)
    elementwise.rotate_(q, angle.cos(), angle.sin(), k, (*weights, 1e-6, offset))
    for found, part, weight in zip((q, k), parts, weights):
        plain = wanted(part, weight)
        step = 3 * torch.finfo(dtype).eps * plain.abs().max().item()  # both halves, and the sum
        torch.testing.assert_close(found, plain, rtol=0, atol=step)
        same = (found == plain).float().mean()
        assert same > 0.98, "but where a sum in another order rounds the other way"
    assert torch.equal(v, parts[2]), "values stay"


@interpreted
@pytest.mark.parametrize("rms", [True, False])
def test_a_norm_of_16_bits_in_float32(monkeypatch, rms):
    """Of what attention and the MLP add, where a family norms that."""
    expose(monkeypatch, elementwise, elementwise._norm_kernel())
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 100, generator=g).bfloat16(), torch.randn(100, generator=g)
    found = elementwise.norm(x, Terms(weight, None, 1e-5, rms), torch.float32)
    wanted = F.rms_norm(x.float(), (100,), weight, 1e-5)
    if not rms:
        wanted = F.layer_norm(x.float(), (100,), weight, None, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_norm_of_rows_that_lie_apart(monkeypatch):
    """Of the width of all queries, which are a part of a wider product."""
    expose(monkeypatch, elementwise, elementwise._norm_kernel())
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 5, 3 * 48, generator=g).half()
    part, weight = wide[..., 24 : 24 + 72], torch.randn(72, generator=g)
    found = elementwise.norm(part, Terms(weight, None, 1e-5, True), torch.float16)
    wanted = F.rms_norm(part.float(), (72,), weight, 1e-5).half()
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-5)


@interpreted
@pytest.mark.parametrize("C", [64, 100, 1000])
@pytest.mark.parametrize("rms", [True, False])
def test_a_branch_is_added_and_the_sum_normed(monkeypatch, C, rms):
    expose(monkeypatch, elementwise, elementwise._norm_kernel())
    g = torch.Generator().manual_seed(C)
    x, branch = torch.randn(5, C, generator=g), torch.randn(5, C, generator=g).bfloat16()

    def plain(x, terms):
        if rms:
            return F.rms_norm(x.float(), (C,), terms.weight + 1, 1e-5)
        return F.layer_norm(x.float(), (C,), terms.weight + 1, terms.bias, 1e-5)

    def terms():
        bias = None if rms else torch.randn(C, generator=g)
        return Terms(torch.randn(C, generator=g), bias, 1e-5, rms, 1.0)

    last, first = terms(), terms()
    total, y = elementwise.add_and_norm(x, branch, last, torch.bfloat16)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, elementwise.norm(x + branch, last, torch.bfloat16))
    torch.testing.assert_close(y.float(), plain(total, last), rtol=1e-2, atol=1e-5)
    total, y = elementwise.add_and_norm(x, branch, last, torch.bfloat16, first)
    torch.testing.assert_close(total, x + plain(branch, first), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, elementwise.norm(total, last, torch.bfloat16))
    assert torch.equal(elementwise.add_and_norm(x, branch, None, x.dtype, first)[0], total)

"""Rows rounded to 8-bit floats, and products of what both sides became, in plain operations.
tests/gpu/test_low_bit_gpu.py has the kernel and the tensor cores."""

import torch

from gpu_kernels.float8_matmul import aligned, float8_matmul, float8_rows, padded


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_in_e4m3_keep_their_largest_number_and_round_the_others():
    x = drawn(5, 100) * torch.tensor([[1e-6], [1.0], [3e4], [0.0], [465.0]])
    codes, scales = float8_rows(x.bfloat16())
    found, x = codes.float() * scales, x.bfloat16().float()
    assert found.isfinite().all() and (found[3] == 0).all()
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(found.gather(1, largest), x.gather(1, largest), rtol=1e-6)
    step = 2.0 ** (x.abs().clamp(min=1e-30) / scales).log2().floor().clamp(min=-6) / 8
    assert ((found - x).abs() <= step * scales * 0.5001).all(), "half a step of e4m3 at most"


def test_what_is_filled_up_adds_nothing():
    x, weight, scales = drawn(5, 37), drawn(21, 37, seed=1), drawn(21, 1, seed=2).abs()
    codes = (weight * 100).to(torch.float8_e4m3fn)
    full = padded(codes, aligned(21), aligned(37))
    assert full.shape == (32, 48)
    own = torch.nn.functional.pad(scales, (0, 0, 0, 11)).t()
    found, wanted = float8_matmul(x, full, own), float8_matmul(x, codes, scales.t())
    assert (found[:, :21] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not found[:, 21:].any()

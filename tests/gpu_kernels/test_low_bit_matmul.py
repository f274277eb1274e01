"""Where codes lie in words, how a product is cut, and the kernels in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest -q tests/gpu_kernels/test_low_bit_matmul.py

tests/quantisation/test_linear.py holds the plain twins against Codes."""

import os

import pytest
import torch

from gpu_kernels import low_bit_matmul as low_bit
from gpu_kernels.packed_weights import BITS, OFFSET, ROWS, SPAN, Packed, pack, raw_values

CODES = {
    "int4": (torch.int8, -8, 8),
    "uint4": (torch.uint8, 0, 16),
    "int8": (torch.int8, -128, 128),
    "uint8": (torch.uint8, 0, 256),
}


def drawn(kind, N, K):
    g = torch.Generator().manual_seed(N + K)
    if kind == "e4m3":
        return (torch.randn(N, K, generator=g) * 60).to(torch.float8_e4m3fn)
    dtype, low, high = CODES[kind]
    return torch.randint(low, high, (N, K), generator=g, dtype=torch.int16).to(dtype)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("N", [3, ROWS, ROWS + 1])
@pytest.mark.parametrize("K", [1, 31, 64, 128, 300])
def test_each_code_lies_a_span_from_the_next_of_its_word(kind, N, K):
    codes = drawn(kind, N, K)
    words, bits = pack(codes, kind), BITS[kind]
    tile = 16 // bits * SPAN
    assert words.dtype == torch.int16 and words.is_contiguous()
    assert words.shape == (-(-N // ROWS), -(-K // tile), ROWS, SPAN)
    for n, k in ((0, 0), (N - 1, K - 1), (N // 2, K // 2)):
        t, place = divmod(k, tile)
        i, j = divmod(place, SPAN)
        found = int(words[n // ROWS, t, n % ROWS, j]) >> (bits * i) & (1 << bits) - 1
        byte = int(codes[n, k].view(torch.uint8))
        raw = {"int4": byte + 8 & 15, "uint8": byte ^ 128}.get(kind, byte)
        assert found == raw
    assert torch.equal(raw_values(words, kind, N, K), codes.float() + OFFSET[kind])


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_programs_share_all_of_a_row_and_nothing_twice(kind):
    for N in (1, 100, 4096, 12288, 57344):
        for K in (1, 100, 4096, 11008, 28672):
            splits, each = low_bit.parts_of(N, K, kind)
            tiles = -(-K // (16 // BITS[kind] * SPAN))
            assert (splits - 1) * each < tiles <= splits * each, (N, K)


@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 192, 256, 384])
def test_spans_that_share_a_scale_never_lie_in_two_groups(group):
    for kind in ("int4", "int8"):
        each, share = 16 // BITS[kind], low_bit._share(group, kind)
        for tile in range(24):
            for start in range(0, each, share):
                spans = range(tile * each + start, tile * each + start + share)
                assert len({span * SPAN // group for span in spans}) == 1, (kind, tile)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton and TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("zeros", [None, torch.bfloat16, torch.float32, "added"], ids=str)
@pytest.mark.parametrize(
    "kind, N, K, group, M",
    [
        ("int4", 70, 300, 32, 3),
        ("uint4", 130, 512, 128, 1),
        ("int4", 64, 256, 64, 17),
        ("uint4", 50, 256, 96, 2),
        ("int8", 70, 100, 100, 2),
        ("uint8", 70, 192, 64, 2),
        ("e4m3", 50, 160, 160, 2),
        ("int4", 70, 312, 16, 2),
        ("int8", 70, 100, 16, 1),
        ("uint4", 50, 256, 48, 2),
        ("int8", 130, 208, 80, 3),
    ],
)
def test_kernels_interpreted(monkeypatch, kind, N, K, group, M, zeros):
    monkeypatch.setattr(low_bit, "PROGRAMS", {4: 4, 8: 4})
    monkeypatch.setattr(low_bit, "LEAST_TILES", 2)
    g, G = torch.Generator().manual_seed(0), -(-K // group)
    scales = (torch.rand(G, N, generator=g) + 0.5).half()
    added = zeros == "added"
    if added:
        zeros = torch.randn(G, N, generator=g).half()
    elif zeros is not None:
        whole = zeros == torch.bfloat16
        zeros = torch.randint(0, 16, (G, N), generator=g).to(zeros) + (OFFSET[kind] if whole else 0)
    packed = Packed(pack(drawn(kind, N, K), kind), scales, zeros, kind, group, K, added)
    x, bias = (torch.randn(n, generator=g) for n in ((M, K), (N,)))
    arrivals = low_bit.arrivals_of(packed)
    y = low_bit._multiply(x, *packed[:3], bias, arrivals, kind, group, added)
    wanted = low_bit.matmul_plain(x, packed, bias)
    assert (y - wanted).norm() < 1e-5 * wanted.norm() and not arrivals.any()
    dense = low_bit._unpack(*packed, torch.float32)
    assert torch.equal(dense, low_bit.dequantise_plain(packed, torch.float32))

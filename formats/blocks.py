"""Numbers that lie packed in blocks, and what they stand for: GGUF's types of quantised tensors.

    blocks = TYPES["Q4_K"]                      # 256 numbers in 144 bytes
    values = blocks.decode(raw)                 # uint8 [n, 144] -> float32 [n, 256]
    codes, scales, minima = blocks.codes(raw)   # [n, 256], [n, 8], [n, 8]: code * scale + minimum

A block has a scale, and often a minimum, in float16, and small integers; one of 256 numbers has a
scale of 4, 6 or 8 bits for each 16 or 32 of them besides. The values are those of the reference,
bit for bit: every product and sum is rounded to float32 in its order.

Source: ggml-quants.c of llama.cpp. Of torch only.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

# int8 or uint8 [n, numbers], scales [n, groups], minima alike or None
Coded = tuple[Tensor, Tensor, Tensor | None]


class Blocks(NamedTuple):
    """How numbers lie packed: so many in so many bytes. bits: of a code."""

    name: str
    numbers: int
    bytes: int
    decode: Callable[[Tensor], Tensor]  # uint8 [n, bytes] -> float32 [n, numbers]
    bits: int = 32
    codes: Callable[[Tensor], Coded] | None = None  # of the same bytes; None: it has none

    def size_of(self, numbers: int) -> int:
        """Bytes of so many numbers, of whole blocks."""
        assert numbers % self.numbers == 0, (numbers, self.name)
        return numbers // self.numbers * self.bytes


def _decoded(codes: Callable[[Tensor], Coded], raw: Tensor) -> Tensor:
    numbers, scales, minima = codes(raw)
    found = scales.float()[..., None] * numbers.float().view(*scales.shape, -1)
    return (found if minima is None else found + minima.float()[..., None]).flatten(1)


def _halves(raw: Tensor, at: int, n: int = 1) -> Tensor:
    """n float16 numbers from byte `at` of each block, [blocks, n]."""
    return raw[:, at : at + 2 * n].contiguous().view(torch.float16)


def _digits(raw: Tensor, run: int, bits: int) -> Tensor:
    """Numbers of 4, 2 or 1 bits: those of the lowest bits of `run` bytes, then those of the next
    ones, then on to the following `run` bytes; uint8 [blocks, numbers]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    parts = raw.reshape(len(raw), -1, 1, run) >> shifts[:, None]
    return (parts & ((1 << bits) - 1)).flatten(1)


def _signed(raw: Tensor) -> Tensor:
    """Bytes as int8."""
    return raw.contiguous().view(torch.int8)


# ---------------------------------------------------------------------------------------------
# Blocks of 32


def _q4_0(raw: Tensor) -> Coded:
    return _digits(raw[:, 2:], 16, 4).to(torch.int8) - 8, _halves(raw, 0), None


def _q4_1(raw: Tensor) -> Coded:
    return _digits(raw[:, 4:], 16, 4), _halves(raw, 0), _halves(raw, 2)


def _five_bits(raw: Tensor) -> Tensor:
    """4 bytes of fifth bits, those of number i in bit i, then the low bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    fifth = ((raw[:, :4, None] >> shifts) & 1).flatten(1)
    return _digits(raw[:, 4:], 16, 4) | (fifth << 4)


def _q5_0(raw: Tensor) -> Coded:
    return _five_bits(raw[:, 2:]).to(torch.int8) - 16, _halves(raw, 0), None


def _q5_1(raw: Tensor) -> Coded:
    return _five_bits(raw[:, 4:]), _halves(raw, 0), _halves(raw, 2)


def _q8_0(raw: Tensor) -> Coded:
    return _signed(raw[:, 2:]), _halves(raw, 0), None


# ---------------------------------------------------------------------------------------------
# Blocks of 256


def _q2_k(raw: Tensor) -> Coded:
    scales, d = raw[:, :16], _halves(raw, 80, 2).float()
    numbers = _digits(raw[:, 16:80], 32, 2)
    return numbers, d[:, :1] * (scales & 15).float(), -(d[:, 1:] * (scales >> 4).float())


def _q3_k(raw: Tensor) -> Coded:
    high, low = _digits(raw[:, :32], 32, 1), _digits(raw[:, 32:96], 32, 2)
    numbers = (low | (high << 2)).to(torch.int8) - 4  # a bit that is set takes nothing off
    scales = _digits(raw[:, 96:104], 8, 4) | (_digits(raw[:, 104:108], 4, 2) << 4)
    return numbers, _halves(raw, 108).float() * (scales.float() - 32), None


def _scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """8 of each, from two float16 and, of 6 bits, 12 bytes: the first 4 lie whole, of the others
    the low 4 bits in the last bytes and the high 2 above the first 4."""
    d, a, b, low = _halves(raw, 0, 2).float(), raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat((a & 63, (low & 15) | ((a >> 2) & 48)), dim=1)
    minima = torch.cat((b & 63, (low >> 4) | ((b >> 2) & 48)), dim=1)
    return d[:, :1] * scales.float(), -(d[:, 1:] * minima.float())


def _q4_k(raw: Tensor) -> Coded:
    return _digits(raw[:, 16:], 32, 4), *_scales_and_minima(raw)


def _q5_k(raw: Tensor) -> Coded:
    numbers = _digits(raw[:, 48:], 32, 4) | (_digits(raw[:, 16:48], 32, 1) << 4)
    return numbers, *_scales_and_minima(raw)


def _q6_k(raw: Tensor) -> Coded:
    numbers = _digits(raw[:, :128], 64, 4) | (_digits(raw[:, 128:192], 32, 2) << 4)
    scales = _halves(raw, 208).float() * _signed(raw[:, 192:208]).float()
    return numbers.to(torch.int8) - 32, scales, None


def _plain_less_one(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float32) - 1


TYPES = {
    name: Blocks(name, numbers, size, partial(_decoded, codes), int(name[1]), codes)
    for name, numbers, size, codes in (
        ("Q4_0", 32, 18, _q4_0),
        ("Q4_1", 32, 20, _q4_1),
        ("Q5_0", 32, 22, _q5_0),
        ("Q5_1", 32, 24, _q5_1),
        ("Q8_0", 32, 34, _q8_0),
        ("Q2_K", 256, 84, _q2_k),
        ("Q3_K", 256, 110, _q3_k),
        ("Q4_K", 256, 144, _q4_k),
        ("Q5_K", 256, 176, _q5_k),
        ("Q6_K", 256, 210, _q6_k),
    )
}
LESS_ONE = Blocks("F32", 1, 4, _plain_less_one)  # weights of norms, where a file keeps 1 + weight

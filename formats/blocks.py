"""Numbers that lie packed in blocks, and what they stand for: GGUF's types of quantised tensors.

    blocks = TYPES["Q4_K"]                      # 256 numbers in 144 bytes
    values = blocks.decode(raw)                 # uint8 [n, 144] -> float32 [n, 256]

A block has a scale, and often a minimum, in float16, and small integers; one of 256 numbers has a
scale of 4, 6 or 8 bits for each 16 or 32 of them besides. The values are those of the reference,
bit for bit: every product and difference is rounded to float32 in its order.

Source: ggml-quants.c of llama.cpp. Of torch only.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """How numbers lie packed: so many in so many bytes."""

    name: str
    numbers: int
    bytes: int
    decode: Callable[[Tensor], Tensor]  # uint8 [n, bytes] -> float32 [n, numbers]
    # where a number is code * scale: int8 codes [n, numbers], float16 scales [n, 1], bits of a code
    coded: tuple[Callable[[Tensor], tuple[Tensor, Tensor]], int] | None = None

    def size_of(self, numbers: int) -> int:
        """Bytes of so many numbers, of whole blocks."""
        assert numbers % self.numbers == 0, (numbers, self.name)
        return numbers // self.numbers * self.bytes


def _halves(raw: Tensor, at: int, n: int = 1) -> Tensor:
    """n float16 numbers from byte `at` of each block, as float32 [blocks, n]."""
    return raw[:, at : at + 2 * n].contiguous().view(torch.float16).float()


def _digits(raw: Tensor, run: int, bits: int) -> Tensor:
    """Numbers of 4, 2 or 1 bits: those of the lowest bits of `run` bytes, then those of the next
    ones, then on to the following `run` bytes; uint8 [blocks, numbers]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)
    parts = raw.reshape(len(raw), -1, 1, run) >> shifts[:, None]
    return (parts & ((1 << bits) - 1)).flatten(1)


def _signed(raw: Tensor) -> Tensor:
    """Bytes as int8, in float32."""
    return raw.contiguous().view(torch.int8).float()


def _scaled(scales: Tensor, numbers: Tensor, minima: Tensor | None = None) -> Tensor:
    """Each group of numbers times its scale, less its minimum; [blocks, groups], [blocks, all]."""
    grouped = scales[..., None] * numbers.float().view(*scales.shape, -1)
    return (grouped if minima is None else grouped - minima[..., None]).flatten(1)


# ---------------------------------------------------------------------------------------------
# Blocks of 32


def _q4_0(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * (_digits(raw[:, 2:], 16, 4).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * _digits(raw[:, 4:], 16, 4).float() + _halves(raw, 2)


def _five_bits(raw: Tensor) -> Tensor:
    """4 bytes of fifth bits, those of number i in bit i, then the low bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    fifth = ((raw[:, :4, None] >> shifts) & 1).flatten(1)
    return (_digits(raw[:, 4:], 16, 4) | (fifth << 4)).float()


def _q5_0(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * (_five_bits(raw[:, 2:]) - 16)


def _q5_1(raw: Tensor) -> Tensor:
    return _halves(raw, 0) * _five_bits(raw[:, 4:]) + _halves(raw, 2)


def _q8_0(raw: Tensor) -> Tensor:
    return _signed(raw[:, 2:]) * _halves(raw, 0)


def _scale(raw: Tensor) -> Tensor:
    return raw[:, :2].contiguous().view(torch.float16)


def _q4_0_codes(raw: Tensor) -> tuple[Tensor, Tensor]:
    return _digits(raw[:, 2:], 16, 4).to(torch.int8) - 8, _scale(raw)


def _q5_0_codes(raw: Tensor) -> tuple[Tensor, Tensor]:
    return _five_bits(raw[:, 2:]).to(torch.int8) - 16, _scale(raw)


def _q8_0_codes(raw: Tensor) -> tuple[Tensor, Tensor]:
    return raw[:, 2:].contiguous().view(torch.int8), _scale(raw)


# ---------------------------------------------------------------------------------------------
# Blocks of 256


def _q2_k(raw: Tensor) -> Tensor:
    scales, d = raw[:, :16], _halves(raw, 80, 2)
    numbers = _digits(raw[:, 16:80], 32, 2)
    return _scaled(d[:, :1] * (scales & 15).float(), numbers, d[:, 1:] * (scales >> 4).float())


def _q3_k(raw: Tensor) -> Tensor:
    high, low = _digits(raw[:, :32], 32, 1), _digits(raw[:, 32:96], 32, 2)
    numbers = low.float() - 4 * (1 - high.float())  # a bit that is set takes nothing off
    scales = _digits(raw[:, 96:104], 8, 4) | (_digits(raw[:, 104:108], 4, 2) << 4)
    return _scaled(_halves(raw, 108) * (scales.float() - 32), numbers)


def _scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """8 of each, of 6 bits, in 12 bytes: the first 4 lie whole, of the others the low 4 bits in the
    last bytes and the high 2 above the first 4."""
    a, b, low = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat((a & 63, (low & 15) | ((a >> 2) & 48)), dim=1)
    return scales.float(), torch.cat((b & 63, (low >> 4) | ((b >> 2) & 48)), dim=1).float()


def _q4_k(raw: Tensor) -> Tensor:
    d, (scales, minima) = _halves(raw, 0, 2), _scales_and_minima(raw[:, 4:16])
    return _scaled(d[:, :1] * scales, _digits(raw[:, 16:], 32, 4), d[:, 1:] * minima)


def _q5_k(raw: Tensor) -> Tensor:
    d, (scales, minima) = _halves(raw, 0, 2), _scales_and_minima(raw[:, 4:16])
    numbers = _digits(raw[:, 48:], 32, 4) | (_digits(raw[:, 16:48], 32, 1) << 4)
    return _scaled(d[:, :1] * scales, numbers, d[:, 1:] * minima)


def _q6_k(raw: Tensor) -> Tensor:
    numbers = _digits(raw[:, :128], 64, 4) | (_digits(raw[:, 128:192], 32, 2) << 4)
    return _scaled(_halves(raw, 208) * _signed(raw[:, 192:208]), numbers.float() - 32)


def _plain_less_one(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float32) - 1


CODED = {"Q4_0": (_q4_0_codes, 4), "Q5_0": (_q5_0_codes, 5), "Q8_0": (_q8_0_codes, 8)}
TYPES = {
    name: Blocks(name, numbers, size, decode, CODED.get(name))
    for name, numbers, size, decode in (
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

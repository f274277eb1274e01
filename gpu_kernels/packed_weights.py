"""Weights of 4 and 8 bits as they lie packed in memory, and what they stand for, in plain torch.

    packed = Packed(pack(u, "int4"), scales, None, "int4", group=128, K=4096)
    weight = dequantise_plain(packed, torch.bfloat16)   # [N, K]

What a program of low_bit_matmul.py reads at a time lies side by side in memory. A word of 16 bits
holds codes that lie SPAN columns apart: shifted and masked, each column of words is a column of
weights.

Shapes: N outputs, K inputs, G groups of `group` columns each (the last may be shorter)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SPAN = 32  # columns of one code's place within a word, and words of a row's tile
ROWS = 64  # of a tile
BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "e4m3": 8}  # of a code of each kind
# What a code's bits are as bfloat16, its raw value, less the code: of 4 bits u in 0..15 it is
# 128 + u, the bits 0x4300 | u; signed codes of 4 bits lie 8 higher, bytes without sign 128 lower
OFFSET = {"int4": 136.0, "uint4": 128.0, "int8": 0.0, "uint8": -128.0, "e4m3": 0.0}


class Packed(NamedTuple):
    """A weight [N, K]: (code - zero) * scale.

    words: int16 [blocks, tiles, ROWS, SPAN] as `pack` lays them; scales [G, N]; zeros [G, N] or
    None: float32; or bfloat16, with OFFSET added, where raw values less these are numbers of
    bfloat16.
    group: columns that share a scale. added: zeros, of any type, are added to the product instead.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    kind: str
    group: int
    K: int
    added: bool = False

    @property
    def N(self) -> int:
        return self.scales.shape[1]


def pack(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """int16 words [blocks, tiles, ROWS, SPAN] of codes [N, K]: int8, uint8, or float8_e4m3fn.

    A tile is ROWS rows of a word's codes times SPAN columns, side by side in memory; code i of a
    row's word j is the tile's column i * SPAN + j. Rows and columns that fill up tiles are bits 0.
    """
    (N, K), each = codes.shape, 16 // BITS[kind]
    values = codes.view(torch.uint8).to(torch.int16)
    if kind == "int4":
        values = values + 8 & 15
    elif kind == "uint8":
        values = values ^ 128
    values = F.pad(values, (0, -K % (each * SPAN), 0, -N % ROWS))
    values = values.view(-(-N // ROWS), ROWS, -1, each, SPAN)
    words = values[:, :, :, 0]
    for i in range(1, each):
        words = words | values[:, :, :, i] << (BITS[kind] * i)
    return words.transpose(1, 2).contiguous()


def raw_values(words: torch.Tensor, kind: str, N: int, K: int) -> torch.Tensor:
    """float32 [N, K] of `pack`'s words."""
    bits = BITS[kind]
    parts = [words >> shift & (1 << bits) - 1 for shift in range(0, 16, bits)]
    values = torch.stack(parts, dim=3).transpose(1, 2)  # [blocks, ROWS, tiles, codes, SPAN]
    values = values.reshape(len(words) * ROWS, -1)[:N, :K]
    if bits == 4:
        return 128.0 + values.float()
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.int8
    return values.to(torch.uint8).view(dtype).float()


def dequantise_plain(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """`dequantise` in plain operations."""
    group = torch.arange(packed.K, device=packed.words.device) // packed.group
    offset = offset_of(packed.kind, None if packed.added else packed.zeros)
    values = raw_values(packed.words, packed.kind, packed.N, packed.K) - offset
    zeros = 0.0 if packed.zeros is None else packed.zeros.float().t()[:, group]
    if packed.added:
        return (values * packed.scales.float().t()[:, group] + zeros).to(dtype)
    return ((values - zeros) * packed.scales.float().t()[:, group]).to(dtype)


def offset_of(kind: str, zeros: torch.Tensor | None) -> float:
    return 0.0 if zeros is not None and zeros.dtype == torch.bfloat16 else OFFSET[kind]

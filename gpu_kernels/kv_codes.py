"""Keys and values of 8 bits: codes, and a scale for each token and head.

    room = Codes.room((B, G, S, D), torch.int8, device)
    seen = store(room, (rows, slice(None), slice(T)), k)     # k as whoever reads it there finds it
    k = read(room, torch.float32)                            # [B, G, S, D]

The largest number of a token's key becomes the largest code, 127 of int8 and 448 of e4m3: scale =
absmax / 127 in float32, code = key / scale, rounded to the nearest, ties to even. A token's codes
depend on its own numbers alone, wherever and beside whom they lie. A plain tensor in a room's place
keeps what it is given. gpu_kernels/decode_attention.py has the same in its kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch

E4M3 = torch.float8_e4m3fn
DTYPES = {"fp8": E4M3, "int8": torch.int8}  # by the words of --kv-dtype
LARGEST = {E4M3: 448, torch.int8: 127}


@dataclass(frozen=True)
class Codes:
    """Numbers [..., D]: codes [..., D] of a dtype of LARGEST, times scales float32 [...]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def room(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> "Codes":
        """Zeros."""
        scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
        return cls(torch.zeros(shape, dtype=dtype, device=device), scales)

    @classmethod
    def of(cls, x: torch.Tensor, dtype: torch.dtype) -> "Codes":
        """x [..., D], rounded."""
        values, largest = x.float(), LARGEST[dtype]
        absmax = values.abs().amax(-1)
        # by a tensor: CUDA would multiply by the inverse of a plain number, which is not the same
        scales = absmax / absmax.new_full((), largest)
        codes = values / torch.where(scales > 0, scales, 1.0)[..., None]
        # the cast alone may make NaN of what is beyond 448, and anything of what is beyond 127
        codes.clamp_(-largest, largest)
        return cls((codes.round_() if dtype == torch.int8 else codes).to(dtype), scales)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __getitem__(self, at: Any) -> "Codes":
        """Of some tokens and heads: `at` is no index of the last dimension."""
        return Codes(self.codes[at], self.scales[at])


Room = torch.Tensor | Codes


def store(room: Room, at: Any, x: torch.Tensor) -> torch.Tensor:
    """Put x [..., D] where room[at] is; returns it as `read` finds it there, in its own dtype."""
    if isinstance(room, torch.Tensor):
        room[at] = x
        return x
    kept = Codes.of(x, room.codes.dtype)
    room.codes[at], room.scales[at] = kept.codes, kept.scales
    return read(kept, x.dtype)


def read(room: Room, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a room holds; codes are multiplied in float32."""
    if isinstance(room, torch.Tensor):
        return room.to(dtype)
    return (room.codes.float() * room.scales[..., None]).to(dtype)

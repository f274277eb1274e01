"""Keys and values in 8 bits, defined anew in plain numpy, and a cache that rounds by it.

codes, scales = rounded(x, "int8")                      # of x [..., D]: the values of codes
seen = dequantised(x, "fp8")                            # float32 [..., D]
model.hidden(ids, cache=RoundedAttention("fp8", T))     # the whole sequence, without any cache
"""

import numpy as np
import torch

from modeling.attention import attend


def e4m3_values() -> np.ndarray:
    """Every finite number that e4m3 holds, from 0 up: 4 bits of exponent, biased by 7, and 3 more;
    the highest code of all is NaN."""
    found = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        found.append(
            (mantissa / 8 if not exponent else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
        )
    return np.array(found)


E4M3 = e4m3_values()


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest of them, ties to the code that is even; what is larger than all is the last."""
    size = np.minimum(np.abs(x.astype(np.float64)), E4M3[-1])
    above = np.searchsorted(E4M3, size)
    below = np.maximum(above - 1, 0)
    up, down = E4M3[above] - size, size - E4M3[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(E4M3[code], x)


def rounded(x: np.ndarray, kv_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(values of the codes [..., D], scales float32 [...]) of x [..., D]."""
    x, largest = x.astype(np.float32), np.float32({"int8": 127, "fp8": 448}[kv_dtype])
    scales = np.abs(x).max(-1) / largest
    quotient = x / np.where(scales > 0, scales, np.float32(1))[..., None]
    codes = np.clip(np.rint(quotient), -127, 127) if kv_dtype == "int8" else nearest_e4m3(quotient)
    return codes, scales


def dequantised(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    codes, scales = rounded(x, kv_dtype)
    return codes.astype(np.float32) * scales[..., None]


class RoundedAttention:
    """What a model takes for a cache, of whole sequences of `longest` tokens at most: every query
    sees rounded keys and values, its own token's too."""

    of_latents = False

    def __init__(self, kv_dtype: str, longest: int):
        self.kv_dtype, self.longest = kv_dtype, longest

    def positions(self, T):
        return torch.arange(T)[None]

    def attend(self, layer, q, k, v, **options):
        seen = (dequantised(x.float().cpu().numpy(), self.kv_dtype) for x in (k, v))
        k, v = (torch.from_numpy(x).to(q) for x in seen)
        return attend(q, k, v, causal=True, **options)

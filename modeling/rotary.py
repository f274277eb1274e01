"""Rotary positions: the frequencies that a config names, and the turning of heads by them.

    frequencies, factor = rope_frequencies(config)                # [R/2], R = config.rotary_dim
    cos, sin = angles(positions, frequencies, factor)             # [B or 1, T, 1, R/2]
    q, k = rotate_both(q, k, cos, sin)                            # [B, T, H, D], [B, T, G, D]

Channel i of the first R pairs with i + R/2. Files whose pairs are neighbours (2i, 2i + 1) are
permuted where they are read: see formats/layouts.py.

Source: Su et al. 2021; the keys of `rope_scaling` mean what they mean to Hugging Face.
"""

import math

import torch
from torch import Tensor

from config import GPTConfig
from gpu_kernels import elementwise


def rope_frequencies(
    config: GPTConfig, kind: str = "global", long: bool = False
) -> tuple[Tensor, float]:
    """Angular frequency of each pair of channels [R/2], float32, and the factor on cos and sin.

    kind: of the layers that `config.layer_rope` calls so. Plain, linear interpolation, Llama 3's,
    YaRN's (Peng et al. 2023) and LongRoPE's (Ding et al. 2024) scaling; `long` asks for LongRoPE's
    frequencies of contexts beyond the original one.
    """
    R, theta, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    if kind == "local" and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequencies = 1.0 / theta ** (torch.arange(0, R, 2, dtype=torch.int64).float() / R)
    if scaling is None:
        return frequencies, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if scaling["rope_type"] == "longrope":
        return _longrope_frequencies(config, frequencies, scaling, original, long)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)  # over the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0
    return _yarn_frequencies(config, frequencies, scaling, original)


def _yarn_frequencies(config, frequencies, scaling, original):
    R, theta, factor = config.rotary_dim, config.rope_theta, scaling["factor"]

    def channel_turning(turns):  # the channel pair that turns so often over the original context
        return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = channel_turning(scaling.get("beta_fast") or 32)
    high = channel_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    ramp = (torch.arange(R // 2).float() - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0, 1)  # slow channels are interpolated, fast ones left alone

    def magnitude(scale, mscale=1.0):
        return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            attention_factor = magnitude(factor)
    return frequencies * (1 - interpolate) + frequencies / factor * interpolate, attention_factor


def _longrope_frequencies(config, frequencies, scaling, original, long):
    """Each pair slowed by a factor of its own: two lists, for short contexts and for long ones."""
    slowed = torch.tensor(scaling["long_factor" if long else "short_factor"], dtype=torch.float32)
    factor, attention_factor = scaling.get("factor"), scaling.get("attention_factor")
    if factor is None:
        factor = config.max_position_embeddings / original
    if attention_factor is None and factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / slowed, attention_factor or 1.0


def rope_tables(config: GPTConfig) -> dict[str, tuple[Tensor, float]]:
    """`rope_frequencies` of each kind of layer, and as "long" what the global ones turn by in long
    contexts; of a config without rotary positions none."""
    if config.position != "rope":
        return {}
    tables = {"global": rope_frequencies(config)}
    if config.local_rope_theta is not None:
        tables["local"] = rope_frequencies(config, "local")
    if (config.rope_scaling or {}).get("rope_type") == "longrope":
        tables["long"] = rope_frequencies(config, long=True)
    return tables


def is_long(config: GPTConfig, length: int) -> bool:
    """Whether a pass that reaches `length` tokens turns by LongRoPE's long frequencies: all of it,
    since queries and keys must turn alike."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "longrope":
        return False
    return length > scaling["original_max_position_embeddings"]


def angles(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, 1, R/2] at positions [T] or [B, T], each times the factor."""
    turned = positions.view(-1, positions.shape[-1], 1).float() * frequencies
    cos, sin = turned.cos() * factor, turned.sin() * factor
    return cos[:, :, None], sin[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D] with its first R channels turned by cos, sin [B or 1, T, 1, R/2]; where no
    gradient flows on a GPU, in place."""
    if elementwise.applies(x, x.dtype):
        return elementwise.rotate_(x, cos, sin)
    R = 2 * cos.shape[-1]
    a, b = x[..., :R].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), dim=-1)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys: on a GPU in one launch."""
    if elementwise.applies(q, q.dtype):
        return elementwise.rotate_(q, cos, sin, k), k
    return rotate(q, cos, sin), rotate(k, cos, sin)

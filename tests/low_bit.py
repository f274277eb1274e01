"""Codes of random weights, for tests of what keeps them packed: round to nearest, in ten lines."""

import torch

from modeling.mlp import Linear
from quantisation.codes import Codes


def codes_of(
    weight: torch.Tensor,
    bits: int = 4,
    group: int | None = None,
    zeros: str = "none",
    *,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Codes:
    """Round to nearest of weight [N, K], in groups of so many columns (None: a whole row).

    zeros: "none", "whole", "broken", which are no integers, or "added", GGUF's minima. shuffled:
    each column belongs to another group than its neighbours, as act-order leaves them. bits 0:
    e4m3. dtype: of scales.
    """
    N, K = weight.shape
    group = group or K
    groups = torch.arange(K, device=weight.device) // group
    if shuffled:
        groups = groups[torch.randperm(K, generator=torch.Generator().manual_seed(K))]
    n_groups = -(-K // group)
    low, high = (torch.zeros(N, n_groups, device=weight.device) for _ in range(2))
    for g in range(n_groups):
        own = weight[:, groups == g].float()
        low[:, g], high[:, g] = own.amin(1), own.amax(1)
    offset = None
    if zeros == "none":
        most = 448 if bits == 0 else 2 ** (bits - 1) - 1
        scales = (torch.maximum(-low, high) / most).clamp(min=1e-5).to(dtype)
        lowest, highest = -most, most
    else:
        lowest, highest = 0, 2**bits - 1
        scales = ((high - low) / highest).clamp(min=1e-5).to(dtype)
        offset = -low / scales.float()
        offset = offset.round().to(torch.int32) if zeros == "whole" else offset
    scaled = weight.float() / scales.float()[:, groups]
    if bits == 0:
        q = scaled.clamp(lowest, highest).to(torch.float8_e4m3fn)
    else:
        scaled = scaled if offset is None else scaled + offset[:, groups]
        kind = torch.int8 if offset is None else torch.uint8
        q = scaled.round().clamp(lowest, highest).to(kind)
    in_order = not shuffled and K % group == 0
    if zeros == "added":
        offset = low.to(dtype)
    groups = None if in_order else groups
    return Codes("a test's", bits or 8, q, scales, offset, groups, added=zeros == "added")


def codes_by_name(model: torch.nn.Module, **terms) -> dict[str, list[Codes]]:
    """Of the linear layers of a model's blocks."""
    layers = model.blocks.named_modules(prefix="blocks")
    return {
        name: [codes_of(layer.weight.data, **terms)]
        for name, layer in layers
        if isinstance(layer, Linear)
    }

"""A weight rounded by a rule: scales and zeros from the extremes of each group, then codes.

    codes = quantise(weight, "rtn-w4-g128")         # Codes of a weight [N, K], out x in
    rounded(weight, "bf16")                         # what any rule makes of it, in its own dtype

names.py says which rules there are and what their words mean. A fused projection is rounded part by
part (apply.py): its parts are matrices of their own. Everything is float32 here, on the device of
the weight, and its bits do not depend on which.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantisation.codes import Codes
from quantisation.names import Rule, parse

CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST = 1e-5  # of an absolute maximum, or of a range: llmc's and AutoAWQ's
EPS = torch.finfo(torch.float32).eps  # the scale of a group of zeros: compressed-tensors'
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448


@torch.no_grad()
def quantise(weight: Tensor, rule: Rule | str) -> Codes:
    """The codes of a weight [N, K]. ValueError where GGUF has no block for its rows, and for
    numbers that are not finite."""
    rule = parse(rule) if isinstance(rule, str) else rule
    assert rule.kind != "cast", f"{rule.name} is a cast, and has no codes"
    K = weight.shape[1]
    span = min(rule.span or K, K)
    if rule.kind == "gguf" and K % span:
        raise ValueError(f"{rule.name} has blocks of {rule.span}, but a row has {K:,} columns")
    groups = None if K % span == 0 else torch.arange(K, device=weight.device) // span
    x = _filled(weight.float(), span, dim=1).unflatten(1, (-1, span))  # [N, G, span]
    scales, zeros, codes = SCHEMES[rule.kind, rule.signs, rule.scale](x, rule)
    if not scales.isfinite().all():
        raise ValueError("it holds NaN, infinity, or numbers too large for their scale")
    return Codes(rule.name, rule.bits, codes.flatten(1)[:, :K].contiguous(), scales, zeros, groups)


def rounded(weight: Tensor, rule: Rule | str) -> Tensor:
    """What a rule makes of a weight [N, K], in the weight's dtype: computed in float32 and rounded
    once. ValueError for what its numbers do not hold."""
    rule = parse(rule) if isinstance(rule, str) else rule
    if rule.kind != "cast":
        return quantise(weight, rule).dequantise(weight.dtype)
    cast = weight.to(CASTS[rule.cast])
    if not cast.isfinite().all():
        largest = weight.abs().max().item()
        raise ValueError(f"it holds {largest:g}, which {rule.name} does not")
    return cast.to(weight.dtype)


def round_tokens(x: Tensor) -> Tensor:
    """x [..., C] rounded to 8 bits a token, in its dtype: a8's activations."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=LEAST) / 127
    return (torch.round(values / scale).clamp(-128, 127) * scale).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# Which numbers share a scale


def _filled(x: Tensor, span: int, dim: int) -> Tensor:
    """x up to a multiple of `span`, its last slice repeated: no group's extremes change."""
    missing = -x.shape[dim] % span
    if not missing:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat((x, last.expand(*(missing if d == dim else -1 for d in range(x.dim())))), dim)


def _shared(values: Tensor, rule: Rule, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """An extreme [N, G] of each row's groups, made that of all rows that share its scale."""
    N = len(values)
    if rule.grid not in ("tensor", "block"):
        return values
    rows = N if rule.grid == "tensor" else rule.span
    most = reduce(_filled(values, rows, dim=0).unflatten(0, (-1, rows)), 1)
    return most.repeat_interleave(rows, dim=0)[:N]


def _extremes(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(smallest, largest) [N, G] of the numbers x [N, G, span] that share a scale."""
    return _shared(x.amin(2), rule, torch.amin), _shared(x.amax(2), rule, torch.amax)


def _absmax(x: Tensor, rule: Rule) -> Tensor:
    return _shared(x.abs().amax(2), rule, torch.amax)


# ---------------------------------------------------------------------------------------------
# Scales, zeros and codes of x [N, G, span]


Scheme = Callable[[Tensor, Rule], tuple[Tensor, Tensor | None, Tensor]]


def _signed(x: Tensor, scales: Tensor, rule: Rule) -> tuple[Tensor, None, Tensor]:
    most = 2 ** (rule.bits - 1)
    q = torch.round(x / scales[..., None]).clamp(-most, most - 1)
    return scales, None, q.to(torch.int8)


def _sym_absmax(x: Tensor, rule: Rule) -> tuple[Tensor, None, Tensor]:
    scales = _absmax(x, rule).clamp(min=LEAST) / (2 ** (rule.bits - 1) - 1)
    return _signed(x, scales, rule)


def _sym_range(x: Tensor, rule: Rule) -> tuple[Tensor, None, Tensor]:
    scales = _absmax(x, rule) / ((2**rule.bits - 1) / 2)
    return _signed(x, _without_zero(scales), rule)


def _without_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, EPS, scales)


def _asym(
    x: Tensor, low: Tensor, scales: Tensor, rule: Rule
) -> tuple[Tensor, Tensor | None, Tensor]:
    most = 2**rule.bits - 1
    zeros = (-torch.round(low / scales)).clamp(0, most)
    q = (torch.round(x / scales[..., None]) + zeros[..., None]).clamp(0, most)
    return scales, zeros.to(torch.uint8), q.to(torch.uint8)


def _asym_minmax(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor | None, Tensor]:
    low, high = _extremes(x, rule)
    return _asym(x, low, (high - low).clamp(min=LEAST) / (2**rule.bits - 1), rule)


def _asym_range(x: Tensor, rule: Rule) -> tuple[Tensor, Tensor | None, Tensor]:
    low, high = _extremes(x, rule)
    low, high = low.clamp(max=0), high.clamp(min=0)
    return _asym(x, low, _without_zero((high - low) / (2**rule.bits - 1)), rule)


def _float8(x: Tensor, rule: Rule) -> tuple[Tensor, None, Tensor]:
    scales = _without_zero(_absmax(x, rule) / E4M3_MAX)
    q = (x / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)  # the cast does not saturate
    return scales, None, q.to(E4M3)


def _gguf(x: Tensor, rule: Rule) -> tuple[Tensor, None, Tensor]:
    """Codes come from the scale in float32, and are kept with the scale in float16."""
    if rule.bits == 4:  # the number of the largest size, whose sign decides, becomes -8
        extreme = x.gather(2, x.abs().argmax(2, keepdim=True))[..., 0]
        scales = extreme / -8
    else:
        scales = x.abs().amax(2) / 127
    scaled = x * torch.where(scales == 0, 0.0, 1 / scales)[..., None]
    if rule.bits == 4:
        q = torch.trunc(scaled + 8.5).clamp(0, 15) - 8
    else:  # halves away from zero
        whole = scaled.abs().floor()
        q = (whole + torch.floor(2 * (scaled.abs() - whole))) * scaled.sign()
    return scales.half(), None, q.to(torch.int8)


SCHEMES: dict[tuple[str, str, str], Scheme] = {
    ("rtn", "sym", "absmax"): _sym_absmax,
    ("rtn", "sym", "range"): _sym_range,
    ("rtn", "asym", "minmax"): _asym_minmax,
    ("rtn", "asym", "range"): _asym_range,
    ("fp8", "sym", "range"): _float8,
    ("gguf", "sym", "extreme"): _gguf,
}

"""compressed-tensors: what llm-compressor writes, a Hugging Face directory.

    pack-quantized  .weight_packed int32 [N, K bits / 32]   .weight_scale [N, G]   .weight_shape [2]
                    .weight_zero_point int32 [N bits / 32, G]   .weight_g_idx [K]
    int-, float-, naive-quantized
                    .weight int8 or float8_e4m3fn [N, K]   .weight_scale [1], [N, 1], [N, G] or
                    tiles   .weight_zero_point as the scales
    and of activations that are quantised by what was seen before, .input_scale and the like

Packed numbers are those of bits - 1 and a sign plus 2^(bits - 1), from one word on into the next;
older files of 3, 5, 6 and 7 bits leave the rest of a word empty, which their shape tells. Which of
several groups of settings a matrix belongs to is told by its shapes too, not by the patterns of
names, which are a stranger's programs: two that both fit and differ are refused. A weight is
(code - zero) * scale, which is rounded once, as its own decompressor does it in the scales' type.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import GPTConfig
from formats import Opened, huggingface, quantised
from formats.quantised import INTEGERS, Matrix, Module, Settings, unpack, values
from formats.stored import FLOATS, Stored
from quantisation.codes import Codes

FORMAT = "formats/compressed.py"
METHOD = "compressed-tensors"
FORMS: tuple[str, ...] = ("pack-quantized", "int-quantized", "float-quantized")
FORMS += ("naive-quantized", "mixed-precision", "dense")
KEYS = ("weight_packed", "weight_scale")
LEAVES = f"{'|'.join(KEYS)} weight weight_shape weight_zero_point weight_g_idx input_scale "
LEAVES += "input_zero_point output_scale output_zero_point weight_global_scale input_global_scale"
EIGHT = {"int": torch.int8, "float": torch.float8_e4m3fn}
SCALE = "weight_scale"
Rows = Callable[[int, int], torch.Tensor]  # of the first row to the last


class Scheme(NamedTuple):
    """How a group of matrices was quantised."""

    bits: int
    type: str  # int or float
    symmetric: bool
    strategy: str  # tensor, channel, group or block
    block: tuple[int, int]  # rows and columns that share a scale; 0: all
    by_activations: bool  # columns in the order of activations, weight_g_idx

    @property
    def rule(self) -> str:
        """Its name."""
        rows, columns = self.block
        kind = "fp8-e4m3" if self.type == "float" else f"w{self.bits}"
        size = {"group": f"g{columns}", "block": f"b{rows}x{columns}", "channel": "row"}
        sign = "sym" if self.symmetric else "asym"
        return f"{METHOD}-{kind}-{size.get(self.strategy, 'tensor')}-{sign}"

    def table(self, N: int, K: int) -> tuple[int, int]:
        """The shape of its scales."""
        return math.ceil(N / (self.block[0] or N)), math.ceil(K / (self.block[1] or K))


def open(
    path: Path, config: GPTConfig | None = None, values: dict[str, Any] | None = None
) -> Opened:
    """As huggingface.open."""
    return huggingface.open(path, config, _dense, FORMAT, values)


def _dense(
    table: dict[str, Stored], settings: Settings
) -> tuple[dict[str, Stored], dict[str, Any]]:
    settings.one_of("format", FORMS, "dense")
    settings.refuse("kv_cache_scheme", "transform_config")
    sparsity = settings.values.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{settings.file}: sparsity_config is {sparsity!r:.60}, which is not read")
    groups = settings.values.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(f"{settings.file}: config_groups must hold objects, not {groups!r:.60}")
    schemes = list(dict.fromkeys(_scheme(settings, name, said) for name, said in groups.items()))
    tensors, facts = quantised.dense(table, LEAVES, lambda m: _matrix(m, schemes), settings)
    wanted = [said.get("input_activations") for said in groups.values()]
    kinds = {_activations(said) for said in wanted if isinstance(said, dict)}
    if facts and kinds:
        facts["activations"] += f" (the file wants {', '.join(sorted(kinds))}): w8a16"
    return tensors, facts


def _scheme(settings: Settings, name: str, said: dict[str, Any]) -> Scheme:
    settings = settings._replace(values=said)
    settings.one_of("format", FORMS, "dense")
    settings.refuse("output_activations")
    weights = said.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{settings.file}: {name} says nothing of weights: {weights!r:.60}")
    settings = settings._replace(values=weights)
    settings.refuse("dynamic")
    kind = settings.one_of("type", tuple(EIGHT), "int")
    bits = settings.one_of("num_bits", tuple(range(1, 9)) if kind == "int" else (8,), 8)
    size = settings.group_size("group_size")
    usual = "group" if size else "tensor" if weights.get("group_size") is None else "channel"
    strategy = settings.one_of("strategy", ("tensor", "channel", "group", "block"), usual)
    tile, block = weights.get("block_structure"), {"tensor": (0, 0), "channel": (1, 0)}
    if strategy == "group" and size:
        block["group"] = (1, size)
    if strategy == "block":
        sides = [str(n) for n in (tile.split("x") if isinstance(tile, str) else tile or ())]
        if len(sides) == 2 and all(re.fullmatch("[1-9][0-9]{0,8}", n) for n in sides):
            block["block"] = (int(sides[0]), int(sides[1]))
    if strategy not in block:
        raise ValueError(f"{settings.file}: {name} is of strategy {strategy} without its size")
    symmetric = settings.one_of("symmetric", (True, False), True)
    ordered = settings.one_of("actorder", ("group", "weight", "static", "dynamic", False), False)
    by_activations = ordered in ("group", "dynamic")
    return Scheme(bits, kind, symmetric, strategy, block[strategy], by_activations)


def _activations(said: dict[str, Any]) -> str:
    """Such as "int8 by token, dynamic"."""
    how = "dynamic" if said.get("dynamic") else "static"
    words = (said.get("type", "int"), said.get("num_bits", 8), said.get("strategy", "tensor"))
    return "{:.10}{:.4} by {:.20}, ".format(*map(str, words)) + how


# ---------------------------------------------------------------------------------------------
# A matrix


def _matrix(module: Module, schemes: list[Scheme]) -> Matrix:
    for leaf in ("weight_global_scale", "input_global_scale"):
        if leaf in module.tensors:
            raise module.error(leaf, "is of nvfp4, which is not read: name the original")
    return (_packed if "weight_packed" in module.tensors else _plain)(module, schemes)


def _chosen(module: Module, leaf: str, fits: list[Scheme], shape: tuple[int, int]) -> Scheme:
    """The one scheme that fits, or one of those that mean the same for this shape: a row of one
    group. Zeros of a symmetric matrix, which older files have, are 0."""
    asymmetric = "weight_zero_point" in module.tensors
    fits = [s for s in fits if s.symmetric != asymmetric] or [s for s in fits if s.symmetric]
    bits = leaf == "weight_packed"  # a number of fewer bits is one of 8 where it lies alone
    meant = {(bits and s.bits, s.table(*shape), s.by_activations) for s in fits}
    if len(meant) != 1:
        many = f"fits {len(meant)} groups of the config that differ" if fits else "fits no group"
        stored = module.tensors[leaf]
        held = f"{stored.dtype} {list(stored.shape)}, scales {list(module.tensors[SCALE].shape)}"
        raise module.error(leaf, f"{many}: {held}, for a weight {list(shape)}")
    return fits[0]


def _scale_fits(scheme: Scheme, scale: Stored, N: int, K: int) -> bool:
    table = scheme.table(N, K)
    whole = scheme.strategy != "group" or K % scheme.block[1] == 0
    shapes = [table, table[:1]] if table[1] == 1 else [table]
    return whole and scale.shape in ([*shapes, ()] if table == (1, 1) else shapes)


def _plain(module: Module, schemes: list[Scheme]) -> Matrix:
    weight = module.tensor("weight", EIGHT.values(), (None, None))
    scale = module.tensor(SCALE, FLOATS)
    N, K = weight.shape
    fits = [s for s in schemes if EIGHT[s.type] == weight.dtype and _scale_fits(s, scale, N, K)]
    one = _chosen(module, "weight", fits, (N, K))
    zeros = None
    if "weight_zero_point" in module.tensors:
        zeros = module.tensor("weight_zero_point", (*EIGHT.values(), *INTEGERS), scale.shape)
    block = (one.block[0] or N, one.block[1] or K)
    return quantised.scaled(module, one.rule, weight, scale, block, zeros)


def _packed(module: Module, schemes: list[Scheme]) -> Matrix:
    packed = module.tensor("weight_packed", INTEGERS[:1], (None, None))
    scale = module.tensor(SCALE, FLOATS)
    N, K = (int(n) for n in values(module.tensor("weight_shape", INTEGERS, (2,))))
    W = packed.shape[1]
    if packed.shape[0] != N or not 0 < K <= 32 * W:
        raise module.error("weight_packed", f"{list(packed.shape)} is no packed weight {[N, K]}")
    fits = [
        s
        for s in schemes
        if s.type == "int"
        and W in (math.ceil(K * s.bits / 32), math.ceil(K / (32 // s.bits)))
        and _scale_fits(s, scale, N, K)
    ]
    one = _chosen(module, "weight_packed", fits, (N, K))
    bits, middle, (rows, G) = one.bits, 1 << (one.bits - 1), one.table(N, K)
    scales, spread = quantised.reshaped(scale, (rows, G)), W != math.ceil(K * bits / 32)
    zeros, parts = _zeros(module, N, G, bits)
    groups, index = _groups(module, K, G) if one.by_activations else (None, ())

    def band(first: int, last: int) -> Codes:
        codes = _unpack(values(packed, first, last), bits, spread)[:, :K].to(torch.int16) - middle
        found = values(scales, first, last) if rows == N else values(scales).expand(last - first, 1)
        shift = zeros and zeros(first, last)
        return Codes(one.rule, bits, codes.to(torch.int8), found, shift, groups)

    return Matrix(one.rule, bits, (N, K), (packed, scales, *parts, *index), band, step=32)


def _unpack(words: torch.Tensor, bits: int, spread: bool) -> torch.Tensor:
    """spread: a word holds whole numbers alone, as older files have it."""
    if not spread:
        return unpack(words, bits)
    shifts = torch.arange(32 // bits) * bits
    found = ((words.long() & 0xFFFFFFFF)[..., None] >> shifts) & ((1 << bits) - 1)
    return found.flatten(1).to(torch.uint8)


def _zeros(module: Module, N: int, G: int, bits: int) -> tuple[Rows | None, tuple[Stored, ...]]:
    """(rows of zeros, [rows, G], the tensors that say them), which are packed along the rows, or
    lie in int8 in older files."""
    leaf, middle = "weight_zero_point", 1 << (bits - 1)
    if leaf not in module.tensors:
        return None, ()
    stored = module.tensor(leaf, (torch.int8, *INTEGERS[:1]), (None, G))
    W, dense, spread = stored.shape[0], math.ceil(N * bits / 32), math.ceil(N / (32 // bits))
    if W not in ((N,) if stored.dtype == torch.int8 else (dense, spread)):
        raise module.error(leaf, f"{[W, G]} is not that of {N:,} rows of {bits} bits")

    def rows(first: int, last: int) -> torch.Tensor:
        if stored.dtype == torch.int8:
            return values(stored, first, last)
        found = _unpack(values(stored).t(), bits, W != dense).t()[first:last]
        return (found.to(torch.int16) - middle).to(torch.int8)

    return rows, (stored,)


def _groups(module: Module, K: int, G: int) -> tuple[torch.Tensor | None, tuple[Stored, ...]]:
    """(the group of each column, what says it); none where they are said to lie in order."""
    if "weight_g_idx" not in module.tensors:
        return None, ()
    stored = module.tensor("weight_g_idx", INTEGERS, (K,))
    groups = values(stored).long()
    if (groups == -1).all():
        return None, (stored,)
    if int(groups.min()) < 0 or int(groups.max()) >= G:
        raise module.error("weight_g_idx", f"names groups beyond its {G:,}")
    return quantised.in_order(groups, G), (stored,)

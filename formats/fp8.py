"""FP8: a Hugging Face directory whose matrices are float8_e4m3fn, as DeepSeek-V3's and others'.

    .weight [N, K]   .weight_scale_inv [N / 128, K / 128], a scale for each tile
                     .weight_scale [], [1] or [N, 1], one for the whole or for each row
                     .input_scale, of activations that are quantised by what was seen before

A weight is code * scale, whatever the scale is called, in float32, which is what their own kernels
compute. A tile at the edge is smaller.
"""

import math
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, huggingface, quantised
from formats.quantised import Matrix, Module, Settings
from formats.stored import FLOATS, Stored

FORMAT = "formats/fp8.py"
METHODS = ("fp8", "fbgemm_fp8")
SCALES = ("weight_scale_inv", "weight_scale")
LEAVES = "weight_scale_inv|weight_scale weight input_scale activation_scale input_scale_ub"


def open(
    path: Path, config: GPTConfig | None = None, values: dict[str, Any] | None = None
) -> Opened:
    """As huggingface.open."""
    return huggingface.open(path, config, _dense, FORMAT, values)


def _dense(
    table: dict[str, Stored], settings: Settings
) -> tuple[dict[str, Stored], dict[str, Any]]:
    settings.one_of("fmt", ("e4m3", "e4m3fn", "float8_e4m3fn"), "e4m3")
    settings.one_of("scale_fmt", ("ue8m0", "float"), "float")
    scheme = settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    settings.refuse("kv_cache_scheme", "kv_cache_quant_method")
    block = settings.value("weight_block_size")
    sides = block if isinstance(block, list) else [block] * 2
    if block is not None and not (len(sides) == 2 and all(map(quantised.is_size, sides))):
        raise ValueError(f"{settings.file}: weight_block_size must be two sizes, not {block!r:.60}")
    tile = (sides[0], sides[1]) if block is not None else None
    tensors, facts = quantised.dense(table, LEAVES, lambda m: _matrix(m, tile), settings)
    if facts:
        facts["activations"] += f" (the file wants fp8, {scheme}): w8a16"
    return tensors, facts


def _matrix(module: Module, tile: tuple[int, int] | None) -> Matrix:
    weight = module.tensor("weight", (torch.float8_e4m3fn,), (None, None))
    N, K = weight.shape
    leaf = next(leaf for leaf in SCALES if leaf in module.tensors)
    if len(module.tensors.keys() & set(SCALES)) > 1:
        raise module.error(leaf, f"stands beside {SCALES[1]}: which one counts?")
    scale = module.tensor(leaf, (*FLOATS, torch.float8_e8m0fnu))
    held, fitting = math.prod(scale.shape), {}
    if tile is not None:
        fitting[f"b{tile[0]}x{tile[1]}"] = (tile, (math.ceil(N / tile[0]), math.ceil(K / tile[1])))
    else:
        fitting = {"tensor": ((N, K), (1, 1)), "row": ((1, K), (N, 1))}
    for name, (block, table) in fitting.items():
        if held == math.prod(table) and (len(scale.shape) < 2 or scale.shape == table):
            return quantised.scaled(module, f"fp8-e4m3-{name}", weight, scale, block, None)
    shapes = " or ".join(str(list(table)) for _, table in fitting.values())
    raise module.error(leaf, f"is {list(scale.shape)} for a weight {[N, K]}, and not {shapes}")

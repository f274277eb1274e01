"""GPTQ: what AutoGPTQ and GPTQModel write, a Hugging Face directory with packed matrices.

    config.json with quantization_config, or quantize_config.json beside it
    model.layers.0.mlp.up_proj.qweight [K bits / 32, N]   .qzeros [G, N bits / 32]
                               .scales [G, N]             .g_idx [K], the group of each column

A weight is (code - zero) * scale. Files of the first version hold zero - 1; so do
not those of the second, nor, whatever they are called, some that say the first: where all zeros are
the middle one they tell by themselves. In float16 the numbers are those
of the kernels bit for bit: code and zero are small integers, and only their product is rounded.
"""

import math
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, huggingface, quantised
from formats.quantised import INTEGERS, Matrix, Module, Settings, unpack, values
from formats.stored import FLOATS, Stored
from quantisation.codes import Codes

FORMAT = "formats/gptq.py"
BITS = (2, 3, 4, 8)
FORMS = ("gptq", "gptq_v2")


def open(
    path: Path, config: GPTConfig | None = None, values: dict[str, Any] | None = None
) -> Opened:
    """As huggingface.open."""
    return huggingface.open(path, config, _dense, FORMAT, values)


def _dense(
    table: dict[str, Stored], settings: Settings
) -> tuple[dict[str, Stored], dict[str, Any]]:
    settings.one_of("checkpoint_format format", FORMS, "gptq")
    settings.refuse("rotation", "adapter", "is_marlin_format")
    leaves = "qweight|qzeros scales g_idx"
    return quantised.dense(table, leaves, lambda module: _matrix(module, settings), settings)


def _matrix(module: Module, settings: Settings) -> Matrix:
    symmetric = settings.one_of("sym", (True, False), True)
    scales = module.tensor("scales", FLOATS, (None, None))
    G, N = scales.shape
    bits = _bits(module, settings, N)
    qweight = module.tensor("qweight", INTEGERS[:1], (None, N))
    qzeros = module.tensor("qzeros", INTEGERS[:1], (G, math.ceil(N * bits / 32)))
    K, index = qweight.shape[0] * 32 // bits, None
    if "g_idx" in module.tensors:
        index = module.tensor("g_idx", INTEGERS, (None,))
        K = index.shape[0]
    if qweight.shape[0] != math.ceil(K * bits / 32) or not K:
        raise module.error(
            "qweight", f"{list(qweight.shape)} holds no {K:,} numbers of {bits} bits"
        )
    said = settings.group_size("group_size")
    size = said or K
    if (
        index is None
        and said
        and settings.value("desc_act")
        and not settings.value("static_groups")
    ):
        raise module.error("g_idx", "is not there, and desc_act says that columns are not in order")
    if index is None and math.ceil(K / size) != G:
        raise module.error("scales", f"has {G:,} groups for {K:,} columns in groups of {size:,}")
    rule = f"gptq-w{bits}-{f'g{said}' if said else 'row'}-{'sym' if symmetric else 'asym'}"
    form = settings.one_of("checkpoint_format format", FORMS, "gptq")

    def band(first: int, last: int) -> Codes:
        groups = torch.arange(first, last) // size
        if index is not None:
            groups = values(index, first, last).long()
        low, high = int(groups.min()), int(groups.max()) + 1
        if low < 0 or high > G:
            raise module.error("g_idx", f"names the groups {low:,} to {high - 1:,} of {G:,}")
        words = values(qweight, first * bits // 32, math.ceil(last * bits / 32))
        codes = unpack(words.t(), bits)[:, : last - first]
        zeros = values(qzeros, low, high)
        less_one = _less_one(unpack(values(qzeros, 0, 1), bits)[:, :N], bits, symmetric, form)
        zeros = (_plus_one(zeros, bits) if less_one else unpack(zeros, bits))[:, :N]
        of_band = quantised.in_order(groups - low, high - low)
        return Codes(rule, bits, codes, values(scales, low, high).t(), zeros.t(), of_band)

    parts = (qweight, qzeros, scales, *filter(None, (index,)))
    return Matrix(rule, bits, (N, K), parts, band, along=1, step=32)


def _bits(module: Module, settings: Settings, N: int) -> int:
    """What the config says; where it says others of some modules, by patterns of their names, what
    this one's shapes do."""
    bits = settings.one_of("bits w_bit", BITS)
    if not settings.values.get("dynamic"):
        return bits
    zeros = module.tensor("qzeros", INTEGERS[:1], (None, None)).shape[1]
    fits = [b for b in BITS if math.ceil(N * b / 32) == zeros]
    if bits not in fits and len(fits) != 1:
        raise module.error("qzeros", f"is of {zeros:,} words for {N:,} zeros of no known bits")
    return bits if bits in fits else fits[0]


def _less_one(zeros: torch.Tensor, bits: int, symmetric: bool, form: str) -> bool:
    """Whether a file holds zero - 1. Some of the second version call themselves the first, but the
    one zero of a symmetric matrix is known."""
    middle = 1 << (bits - 1)
    if symmetric and (zeros == middle).all():
        return False
    return form == "gptq" or bool(symmetric and (zeros == middle - 1).all())


def _plus_one(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Zeros of the first version, unpacked. The 1 was taken from all numbers of a word at once, so
    that one of 0 borrowed from the next; of 3 bits, which run on into other words, from each."""
    if 32 % bits:
        return (unpack(words, bits) + 1) & ((1 << bits) - 1)
    ones = sum(1 << at for at in range(0, 32, bits))
    return unpack(words + ones, bits)

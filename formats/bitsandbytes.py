"""bitsandbytes: what transformers saves of a model that it quantised as it loaded it.

    int8    .weight int8 [N, K]   .SCB [N], the largest of each row   .weight_format, 0 for rows
    nf4, fp4
            .weight uint8 [N K / 2, 1], two numbers a byte, the first in its high half
            .weight.absmax, one for each `blocksize` numbers, counted over the rows
            .weight.quant_map [16]   .weight.quant_state.bitsandbytes__nf4, JSON: shape, blocksize
    and where those scales are quantised too, absmax in uint8, .nested_absmax, .nested_quant_map

An int8 weight is code * SCB / 127 in the order of its own dequantiser, whose second product rounds
in float32 again. A 4-bit one is quant_map[code] * absmax in float32, as its CUDA kernels have it.
No Codes, whose scale is one number, say either to the last bit: both are dequantised as they are
read. LLM.int8 quantises activations too, but for columns of large ones; here none are.
"""

import math
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, huggingface, quantised
from formats.quantised import Matrix, Module, Settings, is_size, reshaped, values
from formats.stored import Stored
from inputs import parse_object

FORMAT = "formats/bitsandbytes.py"
PER_CODE = 7.874015718698502e-3  # 1 / 127, as its dequantiser has it
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
LEAVES = r"SCB|weight\.absmax|weight\.quant_map weight weight_format weight\.nested_absmax "
LEAVES += r"weight\.nested_quant_map weight\.quant_state\.bitsandbytes__(?:nf4|fp4)"
MAX_STATE = 4096  # bytes of JSON
BYTE, FLOAT = (torch.uint8,), (torch.float32,)


def open(
    path: Path, config: GPTConfig | None = None, values: dict[str, Any] | None = None
) -> Opened:
    """As huggingface.open."""
    return huggingface.open(path, config, _dense, FORMAT, values)


def _dense(
    table: dict[str, Stored], settings: Settings
) -> tuple[dict[str, Stored], dict[str, Any]]:
    tensors, facts = quantised.dense(table, LEAVES, _matrix, settings)
    if "bnb-int8-row" in facts.get("rule", ""):
        facts["activations"] += " (LLM.int8 has them in int8 but for outliers): w8a16"
    return tensors, facts


def _matrix(module: Module) -> Matrix:
    return _int8(module) if "SCB" in module.tensors else _four_bits(module)


# ---------------------------------------------------------------------------------------------
# 8 bits


def _int8(module: Module) -> Matrix:
    weight = module.tensor("weight", (torch.int8,), (None, None))
    N, K = weight.shape
    largest = module.tensor("SCB", FLOAT, (N,))
    if "weight_format" in module.tensors:
        order = module.tensor("weight_format", BYTE)
        if math.prod(order.shape) != 1 or values(order).item() != 0:
            raise module.error("weight_format", "is not 0: its numbers do not lie row by row")

    def dense(first: int, last: int) -> torch.Tensor:
        return values(weight, first, last) * values(largest, first, last)[:, None] * PER_CODE

    return Matrix("bnb-int8-row", 8, (N, K), (weight, largest), None, dense)


# ---------------------------------------------------------------------------------------------
# 4 bits


def _four_bits(module: Module) -> Matrix:
    state = next((leaf for leaf in STATES if leaf in module.tensors), STATES[0])
    stored = module.tensor(state, BYTE, (None,))
    if stored.shape[0] > MAX_STATE:
        raise module.error(state, f"has {stored.shape[0]:,} bytes")
    said = parse_object(values(stored).numpy().tobytes(), f"{stored.pieces[0].file}: {state}")
    shape, size = said.get("shape"), said.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_size, (*shape, size)))):
        raise module.error(state, f"says shape {shape!r:.60} and blocksize {size!r:.60}")
    N, K = (int(n) for n in shape)
    assert isinstance(size, int)
    weight = _bytes(module, N * K)
    table = module.tensor("weight.quant_map", FLOAT, (16,))
    absmax, parts = _absmax(module, state, said, math.ceil(N * K / size))
    rule = f"bnb-{state[-3:]}-b{size}{'-double' if len(parts) > 1 else ''}"

    def dense(first: int, last: int) -> torch.Tensor:
        begin, end = first * K, last * K
        raw = values(weight, begin // 2, math.ceil(end / 2))
        codes = torch.stack((raw >> 4, raw & 15), dim=1).flatten()[: end - begin].long()
        block = torch.arange(begin, end) // size
        scales = absmax(begin // size, math.ceil(end / size))[block - begin // size]
        return (values(table)[codes] * scales).view(last - first, K)

    return Matrix(rule, 4, (N, K), (weight, table, *parts), None, dense, step=2)


def _bytes(module: Module, numbers: int) -> Stored:
    """The weight as bytes, in whatever type it is kept for the sake of FSDP."""
    kinds = (*BYTE, torch.bfloat16, torch.float16, torch.float32)
    weight = module.tensor("weight", kinds)
    assert isinstance(weight.dtype, torch.dtype)
    size, wanted = math.prod(weight.shape) * weight.dtype.itemsize, math.ceil(numbers / 2)
    if size - wanted not in range(weight.dtype.itemsize):
        raise module.error("weight", f"has {size:,} bytes, and not the {wanted:,} of its shape")
    return reshaped(weight, (size,), torch.uint8)


def _absmax(module: Module, state: str, said: dict[str, Any], blocks: int) -> tuple[Any, tuple]:
    """(the scales of the first block to the last, the tensors that say them)."""
    if "weight.nested_absmax" not in module.tensors:
        plain = module.tensor("weight.absmax", FLOAT, (blocks,))
        return lambda first, last: values(plain, first, last), (plain,)
    size, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if not (is_size(size) and isinstance(offset, float) and math.isfinite(offset)):
        raise module.error(
            state, f"says nested_blocksize {size!r:.60}, nested_offset {offset!r:.60}"
        )
    assert isinstance(size, int)
    codes = module.tensor("weight.absmax", BYTE, (blocks,))
    largest = module.tensor("weight.nested_absmax", FLOAT, (math.ceil(blocks / size),))
    table = module.tensor("weight.nested_quant_map", FLOAT, (256,))

    def scales(first: int, last: int) -> torch.Tensor:
        block = torch.arange(first, last) // size
        factors = values(largest, first // size, math.ceil(last / size))[block - first // size]
        found = values(table)[values(codes, first, last).long()] * factors
        return found + torch.tensor(offset)

    return scales, (codes, largest, table)

"""AWQ: what AutoAWQ writes, and others in its form: a Hugging Face directory of packed matrices.

    gemm    .qweight [K, N / 8], 8 rows of ours a word in the order 0 2 4 6 1 3 5 7
            .qzeros [G, N / 8] likewise   .scales [G, N]
    gemv    .qweight [N, K / 8], 8 columns a word
            .qzeros [N, …]   .scales [N, …], with room at the end of a row

A weight is (code - zero) * scale; in float16 bit for bit that of the kernels. What AWQ scaled up is
scaled down in the layer before, in the weights of the file: nothing is to be undone.
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

FORMAT = "formats/awq.py"
BITS, WORD = 4, 8  # numbers of so many bits, so many of them a word
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the i-th of them is


def open(
    path: Path, config: GPTConfig | None = None, values: dict[str, Any] | None = None
) -> Opened:
    """As huggingface.open."""
    return huggingface.open(path, config, _dense, FORMAT, values)


def _dense(
    table: dict[str, Stored], settings: Settings
) -> tuple[dict[str, Stored], dict[str, Any]]:
    settings.one_of("bits w_bit", (BITS,), BITS)
    settings.one_of("backend", ("autoawq", "auto"), "autoawq")
    version = settings.one_of("version checkpoint_format format", ("gemm", "gemv"), "gemm")
    size = settings.group_size("group_size", "q_group_size")
    one = _gemm if version == "gemm" else _gemv
    return quantised.dense(table, "qweight|qzeros scales", lambda m: one(m, size), settings)


def _rule(size: int | None) -> str:
    return f"awq-w{BITS}-{f'g{size}' if size else 'row'}-asym"


def _gemm(module: Module, size: int | None) -> Matrix:
    scales = module.tensor("scales", FLOATS, (None, None))
    G, N = scales.shape
    qweight = module.tensor("qweight", INTEGERS[:1], (None, math.ceil(N / WORD)))
    qzeros = module.tensor("qzeros", INTEGERS[:1], (G, math.ceil(N / WORD)))
    K, rule = qweight.shape[0], _rule(size)
    if math.ceil(K / (size or K)) != G or N % WORD:
        raise module.error(
            "scales", f"{[G, N]} is not that of {K:,} columns in groups of {size or K}"
        )

    def band(first: int, last: int) -> Codes:
        groups = torch.arange(first, last) // (size or K)
        low, high = int(groups[0]), int(groups[-1]) + 1
        codes, zeros = _ordered(values(qweight, first, last)), _ordered(values(qzeros, low, high))
        of_band = quantised.in_order(groups - low, high - low)
        return Codes(rule, BITS, codes.t(), values(scales, low, high).t(), zeros.t(), of_band)

    return Matrix(rule, BITS, (N, K), (qweight, qzeros, scales), band, along=1)


def _ordered(words: torch.Tensor) -> torch.Tensor:
    return unpack(words, BITS).view(len(words), -1, WORD)[..., ORDER].flatten(1)


def _gemv(module: Module, size: int | None) -> Matrix:
    qweight = module.tensor("qweight", INTEGERS[:1], (None, None))
    N, K = qweight.shape[0], qweight.shape[1] * WORD
    scales, qzeros = (
        module.tensor("scales", FLOATS, (N, None)),
        module.tensor("qzeros", INTEGERS[:1], (N, None)),
    )
    G, rule = math.ceil(K / (size or K)), _rule(size)
    if scales.shape[1] < G or qzeros.shape[1] * WORD < G:
        raise module.error(
            "scales", f"{list(scales.shape)} has less than {G:,} groups of {size or K}"
        )
    groups = quantised.in_order(torch.arange(K) // (size or K), G)

    def band(first: int, last: int) -> Codes:
        codes = unpack(values(qweight, first, last), BITS)
        zeros = unpack(values(qzeros, first, last), BITS)[:, :G]
        return Codes(rule, BITS, codes, values(scales, first, last)[:, :G], zeros, groups)

    return Matrix(rule, BITS, (N, K), (qweight, qzeros, scales), band)

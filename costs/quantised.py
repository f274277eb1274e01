"""Bytes of a model's matrices under a rule of quantisation, from its config alone.

    bytes_per_weight(config, "rtn-w4-g128")     # of the blocks' matrices, scales and zeros included

The matrices are those that quantisation/apply.py rounds, each part of a fused one by itself.
"""

from collections.abc import Iterator

from config import GPTConfig
from quantisation.names import parse

Shape = tuple[int, int, int]  # rows, columns, how many of them


def matrix_shapes(c: GPTConfig) -> Iterator[Shape]:
    """Of all matrices of the blocks."""
    yield from ((rows, columns, n * c.n_layers) for rows, columns, n in _of_attention(c))
    moe = sum(c.layer_experts(layer) > 0 for layer in range(c.n_layers))
    for width, n in (
        (c.d_ff, c.n_layers - moe),
        (c.d_ff_expert, moe * c.n_experts),
        (c.d_ff_shared, moe),
    ):
        if width and n:
            yield width, c.d_model, n * (1 + c.gated_mlp)
            yield c.d_model, width, n


def _of_attention(c: GPTConfig) -> Iterator[Shape]:
    h, q = c.d_model, c.n_heads * c.head_dim
    yield h, c.n_heads * c.value_dim, 1
    if c.kv_lora_rank is None:
        yield q, h, 1
        yield c.n_kv_heads * c.head_dim, h, 2
        return
    rotary = c.qk_rope_head_dim or 0
    yield c.kv_lora_rank + rotary, h, 1
    yield c.n_heads * (c.head_dim - rotary + c.value_dim), c.kv_lora_rank, 1
    if c.q_lora_rank is None:
        yield q, h, 1
    else:
        yield c.q_lora_rank, h, 1
        yield q, c.q_lora_rank, 1


def bytes_per_weight(c: GPTConfig, rule: str) -> float:
    """The mean over the blocks' matrices."""
    wanted, shapes = parse(rule), list(matrix_shapes(c))
    if wanted.kind == "cast":
        return wanted.bits / 8
    size = sum(n * wanted.size(rows, columns) for rows, columns, n in shapes)
    return size / sum(rows * columns * n for rows, columns, n in shapes)

"""What lies between the matrix products of a block, each in one pass over memory, for eager CUDA.

    y = norm(x, Terms(weight, bias, 1e-5, rms=True), torch.bfloat16)     # [..., C]
    x, y = add_and_norm(x, branch, terms, torch.bfloat16)   # of x + branch, or x + norm(branch)
    rotate_(q, cos, sin, k, norms)                          # [B, T, H, D], in place
    h = gated(gate_and_up, "silu")                          # [..., 2F] -> [..., F]

Eager PyTorch makes two to fourteen passes of each, casts to and from float32 among them. With these
a dense model in 16 bits is 1 to 2% faster eager than compiled block by block
(benchmarks/results/kernels.md), and whatever runs too short, or in too many shapes, needs no
compiler: choice questions, few prompts, decode steps, a first result in seconds. Arithmetic is
float32 and rounded where PyTorch rounds; every row is computed alone and in a fixed order, so that
bits do not depend on its neighbours. modeling/norms.py, rotary.py and attention.py hold plain twins
and ask `applies` first; `activate` does it for the MLPs. On an H100, 16,384 rows of a 7B
(benchmarks/elementwise.py): norm and cast 0.41 -> 0.16 ms, rotary of q and k 2.6 -> 0.21, gated
SiLU 1.0 -> 0.39.

Shapes: B sequences, T tokens, C d_model, H heads, D head_dim, R rotary channels, F d_ff
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional

# by their numbers in the kernel; what is not here stays with PyTorch
ACTIVATIONS = {"silu": 0, "gelu_new": 1, "gelu": 2, "relu": 3}
PLAIN = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
COLUMNS = 1024  # of a gated row that one program takes
MAX_WIDTH = 16384  # of a norm whose row one program holds in registers


def applies(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether these kernels take x, on its way to products in `dtype`: float32 is the reference
    and stays plain PyTorch, a compiler fuses by itself, and no gradient flows through them."""
    return (
        x.is_cuda
        and dtype != torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def activate(h: torch.Tensor, activation: str, is_gated: bool) -> torch.Tensor:
    """activation(gate) * up of h [..., 2F], gate first, or activation(h): [..., F]."""
    if not is_gated:
        return PLAIN[activation](h)
    if activation in ACTIVATIONS and applies(h, h.dtype):
        return gated(h, activation)
    gate, up = h.chunk(2, dim=-1)
    return PLAIN[activation](gate) * up


# The Triton kernels are built on first use: there is no Triton where there is no GPU


@functools.cache
def _norm_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def normed(
        a, inside, C, weight, bias, column, eps, offset,
        RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ):  # fmt: skip
        """The norm of a row a [BLOCK], which is zero from C on; so is this."""
        if not RMS:
            a = tl.where(inside, a - tl.sum(a, axis=0) / C, 0.0)
        a = a * tl.rsqrt(tl.sum(a * a, axis=0) / C + eps)
        if WEIGHT:
            a = a * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
        if BIAS:
            a = a + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        return a

    @triton.jit
    def norm(
        x, branch, total, weight, bias, of_weight, of_bias, y, C, x_row, eps, offset,
        ADD: tl.constexpr, FIRST: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr,
        BIAS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program a row [C]: of x, or of x + branch, which is kept. FIRST: the branch is normed
        before it is added. x_row: stride of x."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < C
        a = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            b = tl.load(branch + row * C + column, mask=inside, other=0.0).to(tl.float32)
            if FIRST:
                b = normed(b, inside, C, of_weight, of_bias, column, eps, offset, RMS, WEIGHT, BIAS)
            a += b
            tl.store(total + row * C + column, a, mask=inside)
        a = normed(a, inside, C, weight, bias, column, eps, offset, RMS, WEIGHT, BIAS)
        tl.store(y + row * C + column, a.to(y.dtype.element_ty), mask=inside)

    return norm


@functools.cache
def _rotate_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def rotate(
        q, k, q_weight, k_weight, cos, sin, eps, offset, T, H, G,
        q_b, q_t, q_h, k_b, k_t, k_h, stride_rope_b,
        NORM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program a token, BLOCK_H of its H heads of q, or of its G of k. q_b, q_t, q_h and
        those of k: strides."""
        token, block = tl.program_id(0), tl.program_id(1)
        b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
        of_q = tl.cdiv(H, BLOCK_H)
        weight = q_weight
        if block < of_q:
            at, n, stride = q + b * q_b + t * q_t, H, q_h
        else:
            at, n, stride, block = k + b * k_b + t * k_t, G, k_h, block - of_q
            weight = k_weight
        h, d = block * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        at_rope = b * stride_rope_b + t * HALF + d
        c = tl.load(cos + at_rope, mask=d < HALF, other=0.0)[None, :]
        s = tl.load(sin + at_rope, mask=d < HALF, other=0.0)[None, :]
        low_at = at + h[:, None] * stride + d[None, :]
        inside = (h < n)[:, None] & (d < HALF)[None, :]
        low = tl.load(low_at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(low_at + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            w_low = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32) + offset
            w_high = tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32) + offset
            # rounded between, as PyTorch does
            low = (low * scale * w_low[None, :]).to(q.dtype.element_ty).to(tl.float32)
            high = (high * scale * w_high[None, :]).to(q.dtype.element_ty).to(tl.float32)
        tl.store(low_at, (low * c - high * s).to(q.dtype.element_ty), mask=inside)
        tl.store(low_at + HALF, (high * c + low * s).to(q.dtype.element_ty), mask=inside)

    return rotate


@functools.cache
def _gated_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def gated(h, out, F, KIND: tl.constexpr, BLOCK: tl.constexpr):
        """One program BLOCK columns of a row [gate; up]."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        gate = tl.load(h + row * 2 * F + column, mask=inside, other=0.0)
        up = tl.load(h + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
        x = gate.to(tl.float32)
        if KIND == 0:
            y = x / (1 + tl.exp(-x))
        elif KIND == 1:
            u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
            y = x * (1 - 1 / (1 + tl.exp(2 * u)))
        elif KIND == 2:
            y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
        else:
            y = tl.where(x < 0.0, 0.0, x)  # a maximum would lose NaN
        y = y.to(gate.dtype).to(tl.float32) * up  # rounded between, as PyTorch does
        tl.store(out + row * F + column, y.to(gate.dtype), mask=inside)

    return gated


class Terms(NamedTuple):
    """Of an RMSNorm or a LayerNorm over C channels, times weight + offset, plus bias."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    rms: bool
    offset: float = 0.0


def norm(x: torch.Tensor, terms: Terms, dtype: torch.dtype) -> torch.Tensor:
    """The norm of x [..., C], C <= MAX_WIDTH, in `dtype`."""
    C = x.shape[-1]
    rows, y = x.reshape(-1, C), torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(rows, x, x, y, terms, None)  # rows as they lie, also in a part of a wider product
    return y


def add_and_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    terms: Terms,
    dtype: torch.dtype,
    of_branch: Terms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + branch, its norm in `dtype`), both in one pass: x [..., C] float32, branch alike in any
    dtype. of_branch: of the norm of the branch that is added instead, of the same kind."""
    assert x.dtype == torch.float32 and branch.shape == x.shape, (x.dtype, branch.shape)
    total, y = torch.empty(x.shape, device=x.device), x.new_empty(x.shape, dtype=dtype)
    _launch(x.reshape(-1, x.shape[-1]), branch.contiguous(), total, y, terms, of_branch)
    return total, y


def _launch(rows, branch, total, y, terms: Terms, first: Terms | None) -> None:
    """rows [N, C]; branch, total, y: of as many, without gaps. Without a branch, it is total.
    first: of the branch."""
    N, C = rows.shape
    assert C <= MAX_WIDTH and rows.stride(1) == 1, (C, rows.stride())
    # one kind, as all norms of a residual stream are
    assert first is None or terms[2:] == first[2:], (terms[2:], first)
    if N == 0:
        return
    block = 1 << (C - 1).bit_length()
    weight, bias, of_weight, of_bias = (
        rows if term is None else term for term in (*terms[:2], *(first or terms)[:2])
    )
    _norm_kernel()[(N,)](
        rows, branch, total, weight, bias, of_weight, of_bias, y, C, rows.stride(0),
        terms.eps, terms.offset, ADD=branch is not total, FIRST=first is not None,
        RMS=terms.rms, WEIGHT=terms.weight is not None, BIAS=terms.bias is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


def rotate_(
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k: torch.Tensor | None = None,
    norms: tuple[torch.Tensor, torch.Tensor, float, float] | None = None,
) -> torch.Tensor:
    """q [B, T, H, D], and k [B, T, G, D] in the same launch, their first R channels turned in place
    by cos, sin [B or 1, T, 1, R/2] float32; returns q. norms: (weight of q's heads and of k's [D],
    eps, offset): an RMSNorm of each head first, where all of its channels are turned."""
    (B, T, H, _), G = q.shape, 0 if k is None else k.shape[2]
    k = q if k is None else k
    cos, sin, half = cos.contiguous(), sin.contiguous(), cos.shape[-1]
    assert q.stride(-1) == k.stride(-1) == 1 and q.dtype == k.dtype, (q.stride(), k.stride())
    assert norms is None or 2 * half == q.shape[-1], (half, q.shape)
    q_weight, k_weight, eps, offset = norms or (q, k, 0.0, 0.0)
    if q.numel():
        block_d = 1 << (half - 1).bit_length()
        block_h = min(1 << (H - 1).bit_length(), max(1, 2048 // block_d))
        _rotate_kernel()[(B * T, -(-H // block_h) + -(-G // block_h))](
            q, k, q_weight, k_weight, cos, sin, eps, offset, T, H, G,
            *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            NORM=norms is not None, HALF=half, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return q


def gated(h: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up of h [..., 2F], gate first: [..., F]."""
    width, h = h.shape[-1] // 2, h.contiguous()
    out = torch.empty(*h.shape[:-1], width, dtype=h.dtype, device=h.device)
    if out.numel():
        _gated_kernel()[(out.numel() // width, -(-width // COLUMNS))](
            h, out, width, KIND=ACTIVATIONS[activation], BLOCK=COLUMNS, num_warps=4
        )
    return out

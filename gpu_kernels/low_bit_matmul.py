"""Products with weights of 4 and 8 bits, unpacked on their way through the registers.

    packed = Packed(pack(u, "int4"), scales, None, "int4", group=128, K=4096)
    y = low_bit_matmul(x, packed, arrivals, bias)       # x [M <= 64, K] bfloat16 -> [M, N]
    weight = dequantise(packed, torch.bfloat16)         # [N, K], for products of more rows

Few rows cost what reading the weights costs, so these are read as they lie (packed_weights.py) and
never written. No code moves to another thread: the unpacked registers are themselves an operand of
the tensor cores. A weight minus its zero is a small integer, exact in bfloat16; its scale
multiplies the float32 sum of its group, so no weight is rounded, unless zeros are no integers or
are added after it, or groups end within a span.

Programs share the columns of K where rows of weights are too few to occupy the GPU; the last one to
arrive adds up the parts, in their order. How K is cut depends on the weight's shape alone: a row
has the same bits alone and among 63 others, and in every run.

Shapes: M rows, N outputs, K inputs, G groups of `group` columns each (the last may be shorter)
"""

import functools
from typing import Any, NamedTuple

import torch

from gpu_kernels.packed_weights import BITS, ROWS, SPAN, Packed, dequantise_plain, offset_of

MOST_ROWS = 64  # of one product; beyond, dequantised weights and cuBLAS are faster


class Way(NamedTuple):
    """How a program takes its part of a product."""

    rows: int  # of weights
    warps: int
    stages: int  # tiles on their way at a time, and one in use


# By the bits of a code, for up to so many rows of x; measured on an H100 (benchmarks/quantised.py).
# What a sum is does not depend on it
WAYS = {4: {32: Way(64, 2, 3), 64: Way(128, 4, 3)}, 8: {64: Way(64, 4, 5)}}
PROGRAMS = {4: 600, 8: 256}  # of ROWS rows of weights that share a product, at least
LEAST_ROWS = 8  # of x in a product of the tensor cores
LEAST_TILES = 4  # of K that one program takes


def matmul_plain(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """`low_bit_matmul` in plain operations: weights in float32, rounded nowhere."""
    y = x.float() @ dequantise_plain(packed, torch.float32).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# The Triton kernels, built on first use: there is no Triton where there is no GPU

# Of the code that lies SHIFT bits up in each of two words, its raw value, as two bfloat16. Of a
# byte b, (128 + its lower 7 bits) - (256 if it is negative else 128); of an e4m3, whose exponent is
# 120 smaller once it is read as a bfloat16's, 2 ** 120 times that
NIBBLE = "{ .reg .b32 t; shr.u32 t, $1, SHIFT; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }"
BYTE = (
    "{ .reg .b32 t, a, b; shr.u32 t, $1, SHIFT; lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;"
    " lop3.b32 b, t, 0x00800080, 0x43004300, 0xea; sub.bf16x2 $0, a, b; }"
)
FLOAT8 = (
    "{ .reg .b32 t, a, b; shr.u32 t, $1, SHIFT; shl.b32 a, t, 4; and.b32 a, a, 0x07f007f0;"
    " shl.b32 b, t, 8; lop3.b32 a, b, 0x80008000, a, 0xea; mov.b32 b, 0x7b807b80;"
    " mul.bf16x2 $0, a, b; }"
)
ASSEMBLY = {"int4": NIBBLE, "uint4": NIBBLE, "int8": BYTE, "uint8": BYTE, "e4m3": FLOAT8}


@functools.cache
def raw_of_words() -> Any:
    """A Triton function: raw values, bfloat16, of the codes that lie SHIFT bits up in words."""
    import triton
    import triton.language as tl

    @triton.jit
    def raw(words, KIND: tl.constexpr, SHIFT: tl.constexpr, CODE: tl.constexpr):
        if CODE != "":  # two at a time, which no compiler does by itself
            codes = tl.inline_asm_elementwise(
                CODE, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        elif KIND == "int4" or KIND == "uint4":
            codes = 128.0 + ((words >> SHIFT) & 15).to(tl.float32)
        elif KIND == "int8" or KIND == "uint8":
            codes = ((((words >> SHIFT) & 255) ^ 128) - 128).to(tl.float32)
        else:
            byte = ((words >> SHIFT) & 255).to(tl.uint8)
            codes = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        return codes

    return raw


@functools.cache
def _of_columns():
    """A Triton function: of scales or zeros [G, N], those of a span's columns."""
    import triton
    import triton.language as tl

    @triton.jit
    def of_columns(values, k, n, N, G, GROUP: tl.constexpr, SPAN: tl.constexpr):
        """For rows n, columns from k on: a column of them, or where a half of the span may lie in
        another group than the other, [n, SPAN]."""
        HALF: tl.constexpr = SPAN // 2
        at = tl.minimum(k // (GROUP if GROUP else 1 << 30), G - 1) * N + n
        found = tl.load(values + at, mask=n < N, other=0.0)[:, None]
        if GROUP % SPAN != 0:
            at = tl.minimum((k + HALF) // GROUP, G - 1) * N + n
            second = tl.load(values + at, mask=n < N, other=0.0)[:, None]
            found = tl.where(tl.arange(0, SPAN)[None, :] < HALF, found, second)
        return found

    return of_columns


@functools.cache
def _matmul_kernel():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["M", "G", "tiles_each"])  # one kernel for many numbers of rows
    def matmul(
        x, words, scales, zeros, bias, y, parts, arrivals, M, N, K, G, tiles_each,
        RAW: tl.constexpr, OF: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr,
        SPAN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
        OFFSET: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr,
        CODES: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        EARLY: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows of weights, one part of K. GROUP 0: one scale a row. ZEROS: none, whole
        ("bf16"), broken ("fp32") or "added" ones. SHARE: spans of a tile that share a scale. FULL:
        no tile reaches beyond K. EARLY: it is launched while the kernel before is ending. The next
        tile's scales and zeros come while this one is multiplied."""
        TILE: tl.constexpr = EACH * SPAN
        # weights are rounded to bfloat16 before the product
        ROUND: tl.constexpr = ZEROS == "fp32" or ZEROS == "added" or GROUP % SPAN != 0
        AHEAD: tl.constexpr = GROUP > 0 and SHARE == EACH
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m, j = tl.arange(0, BLOCK_M), tl.arange(0, SPAN)
        split, tiles = tl.program_id(1), tl.cdiv(K, TILE)
        low = split * tiles_each
        high = tl.minimum(low + tiles_each, tiles)
        row = tl.minimum(n, N - 1)  # beyond N: a row whose products are not kept
        row = (row // ROWS).to(tl.int64) * tiles * (ROWS * SPAN) + row % ROWS * SPAN
        words_at = words + row[:, None] + j[None, :]
        x_at, wanted = x + m[None, :] * K + j[:, None], m[None, :] < M
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if EARLY:  # what other kernels wrote is there from here on, and memory free that they read
            tl.extra.cuda.gdc_wait()
        if AHEAD:
            at = tl.minimum(low * TILE // GROUP, G - 1) * N + n
            scale = tl.load(scales + at, mask=n < N, other=0.0).to(tl.float32)
            if ZEROS != "":
                zero = tl.load(zeros + at, mask=n < N, other=0.0)
        for tile in range(low, high):
            word = tl.load(words_at + tile * (ROWS * SPAN))
            if AHEAD:
                at = tl.minimum((tile + 1) * TILE // GROUP, G - 1) * N + n
                next_scale = tl.load(scales + at, mask=n < N, other=0.0).to(tl.float32)
                if ZEROS != "":
                    next_zero = tl.load(zeros + at, mask=n < N, other=0.0)
            if GROUP == 0 or ROUND:
                part = total
            else:
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in tl.static_range(EACH):
                k = tile * TILE + i * SPAN
                inside = wanted if FULL else wanted & (k + j[:, None] < K)
                xs = tl.load(x_at + k, mask=inside, other=0.0)
                w = RAW(word, KIND, 16 // EACH * i, tl.constexpr(CODES[i]))
                if OFFSET != 0.0:
                    w = w - OFFSET
                if ZEROS != "":
                    z = zero[:, None] if AHEAD else OF(zeros, k, n, N, G, GROUP, SPAN)
                    if ZEROS != "added":
                        w = w - z
                if ROUND:
                    s = scale[:, None] if AHEAD else OF(scales, k, n, N, G, GROUP, SPAN)
                    w = w.to(tl.float32) * s.to(tl.float32)
                    if ZEROS == "added":
                        w = w + z.to(tl.float32)
                part = tl.dot(w.to(xs.dtype), xs, part)
                if GROUP > 0 and not ROUND and not AHEAD and (i + 1) % SHARE == 0:
                    total += part * OF(scales, k, n, N, G, GROUP, SPAN).to(tl.float32)
                    part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if AHEAD and not ROUND:
                total += part * scale[:, None]
            elif GROUP == 0 or ROUND:
                total = part
            if AHEAD:
                scale = next_scale
                if ZEROS != "":
                    zero = next_zero
        if GROUP == 0 and not ROUND:
            total = total * tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        inside = (m[None, :] < M) & (n[:, None] < N)
        place = m[None, :] * N + n[:, None]
        last = True
        if SPLITS > 1:
            tl.store(parts + split * M * N + place, total, mask=inside)
            tl.debug_barrier()  # all threads have stored theirs
            arrived = tl.atomic_add(arrivals + tl.program_id(0), 1)
            last = arrived == SPLITS - 1
        if last:
            if SPLITS > 1:
                total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                for s in tl.static_range(SPLITS):
                    total += tl.load(
                        parts + s * M * N + place, mask=inside, other=0.0, cache_modifier=".cg"
                    )
                tl.store(arrivals + tl.program_id(0), 0)
            if BIAS:
                total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)

    return matmul


@functools.cache
def _dequantise_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def dequantise(
        words, scales, zeros, out, N, K, G, group,
        RAW: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, SPAN: tl.constexpr,
        ZEROS: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr, CODES: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        """A tile. WHOLE: no span lies in two groups. ZEROS: "", "taken" or "added"."""
        TILE: tl.constexpr = EACH * SPAN
        tile, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
        r, j = tl.arange(0, ROWS), tl.arange(0, SPAN)
        n = block * ROWS + r
        at = (block * tl.cdiv(K, TILE) + tile) * (ROWS * SPAN)
        word = tl.load(words + at + r[:, None] * SPAN + j[None, :])
        for i in tl.static_range(EACH):
            first = tile * TILE + i * SPAN
            k = first + j
            inside = (n[:, None] < N) & (k[None, :] < K)
            if WHOLE:
                at = (tl.minimum(first // group, G - 1) * N + n)[:, None]
                there = n[:, None] < N
            else:
                at = (k // group)[None, :] * N + n[:, None]
                there = inside
            w = RAW(word, KIND, 16 // EACH * i, tl.constexpr(CODES[i])).to(tl.float32)
            w = w - OFFSET
            if ZEROS == "taken":
                w = w - tl.load(zeros + at, mask=there, other=0.0).to(tl.float32)
            w = w * tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
            if ZEROS == "added":
                w = w + tl.load(zeros + at, mask=there, other=0.0).to(tl.float32)
            tl.store(out + n[:, None] * K + k[None, :], w.to(out.dtype.element_ty), mask=inside)

    return dequantise


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Or later: two bfloat16 are subtracted at once, and a kernel may start while one ends."""
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def assembly_of(kind: str, device: torch.device) -> tuple[str, ...]:
    code = ASSEMBLY[kind] if _is_hopper(device) else ""
    return tuple(code.replace("SHIFT", str(shift)) for shift in range(0, 16, BITS[kind]))


# ---------------------------------------------------------------------------------------------
# What is called


def _tiles(K: int, kind: str) -> int:
    return -(-K // (16 // BITS[kind] * SPAN))


def _share(group: int, kind: str) -> int:
    """How many spans of each tile lie in one group; 1 where it differs."""
    each = 16 // BITS[kind]
    spans = min(group // SPAN, each)
    return spans if spans and group % (spans * SPAN) == 0 and each % spans == 0 else 1


def parts_of(N: int, K: int, kind: str) -> tuple[int, int]:
    """(programs that share K, tiles of each) for a weight [N, K]."""
    tiles, blocks = _tiles(K, kind), -(-N // ROWS)
    wanted = -(-PROGRAMS[BITS[kind]] // blocks)
    each = max(LEAST_TILES, -(-tiles // wanted))
    return -(-tiles // each), each


def arrivals_of(packed: Packed) -> torch.Tensor:
    """Counters that `low_bit_matmul` finds at 0 and leaves at 0; one product at a time has them."""
    return packed.words.new_zeros(len(packed.words), dtype=torch.int32)


def multiplies(x: torch.Tensor, packed: Packed) -> bool:
    """Whether `low_bit_matmul`'s kernel takes x [M, K]."""
    rows = len(x) <= MOST_ROWS and x.dtype == torch.bfloat16 and x.is_cuda
    return rows and (packed.group >= packed.K or packed.group % (SPAN // 2) == 0)


def _multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor,
    kind: str,
    group: int,
    added: bool,
) -> torch.Tensor:
    x = x.contiguous()
    (M, K), (G, N) = x.shape, scales.shape
    y = x.new_empty(M, N)
    if not M:
        return y
    splits, tiles_each = parts_of(N, K, kind)
    way = next(way for most, way in WAYS[BITS[kind]].items() if most >= M)
    parts = x.new_empty((splits, M, N) if splits > 1 else 1, dtype=torch.float32)
    whole = zeros is not None and zeros.dtype == torch.bfloat16
    early = _is_hopper(x.device)  # of which the interpreter knows nothing
    _matmul_kernel()[(-(-N // way.rows), splits)](
        x, words, scales, x if zeros is None else zeros, x if bias is None else bias,
        y, parts, arrivals, M, N, K, G, tiles_each,
        RAW=raw_of_words(), OF=_of_columns(), KIND=kind, EACH=16 // BITS[kind], SPAN=SPAN,
        ROWS=ROWS, GROUP=0 if G == 1 else group,
        ZEROS="" if zeros is None else "added" if added else "bf16" if whole else "fp32",
        OFFSET=offset_of(kind, None if added else zeros), BIAS=bias is not None, SPLITS=splits,
        SHARE=_share(group, kind), CODES=assembly_of(kind, x.device),
        FULL=K % (16 // BITS[kind] * SPAN) == 0,
        BLOCK_M=max(LEAST_ROWS, 1 << (M - 1).bit_length()), BLOCK_N=way.rows,
        EARLY=early, num_warps=way.warps, num_stages=way.stages,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return y


_multiply_operator = torch.library.custom_op(
    "roseval::low_bit_matmul", mutates_args=("arrivals",), device_types="cuda"
)(_multiply)


@_multiply_operator.register_fake
def _(x, words, scales, zeros, bias, arrivals, kind, group, added):
    return x.new_empty(x.shape[0], scales.shape[1])


def low_bit_matmul(
    x: torch.Tensor, packed: Packed, arrivals: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias [M, N] in x's dtype, of x [M, K] that it `multiplies`; sums in float32,
    rounded once. arrivals: `arrivals_of` this weight."""
    assert len(x) <= MOST_ROWS and x.shape[1] == packed.K, (x.shape, packed.K)
    # eager, the operator would first import torch's compiler, which takes seconds
    run = _multiply_operator if torch.compiler.is_compiling() else _multiply
    tensors = packed.words, packed.scales, packed.zeros, bias, arrivals
    return run(x, *tensors, packed.kind, packed.group, packed.added)


def _unpack(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    kind: str,
    group: int,
    K: int,
    added: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    G, N = scales.shape
    out = torch.empty(N, K, dtype=dtype, device=words.device)
    _dequantise_kernel()[(_tiles(K, kind), len(words))](
        words, scales, words if zeros is None else zeros, out, N, K, G, group,
        RAW=raw_of_words(), KIND=kind, EACH=16 // BITS[kind], SPAN=SPAN,
        ZEROS="" if zeros is None else "added" if added else "taken",
        OFFSET=offset_of(kind, None if added else zeros),
        WHOLE=G == 1 or group % SPAN == 0, CODES=assembly_of(kind, words.device), ROWS=ROWS,
        enable_fp_fusion=False,  # product and sum are rounded one after the other
    )  # fmt: skip
    return out


_unpack_operator = torch.library.custom_op(
    "roseval::dequantise", mutates_args=(), device_types="cuda"
)(_unpack)


@_unpack_operator.register_fake
def _(words, scales, zeros, kind, group, K, added, dtype):
    return scales.new_empty(scales.shape[1], K, dtype=dtype)


def dequantise(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K], computed in float32 and rounded once."""
    if not packed.words.is_cuda:
        return dequantise_plain(packed, dtype)
    run = _unpack_operator if torch.compiler.is_compiling() else _unpack
    return run(*packed, dtype)

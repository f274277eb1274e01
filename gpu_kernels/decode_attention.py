"""One decode step's attention: each row's one new query over its prompt and its own tokens.

    out, lse = decode_attention(q, k_new, v_new, own, prompts, row_prompt, tiles, read_limit)
    out = merge_parts(out, lse)

Keys lie in two places: prompts, each kept once however many rows continue it, and every row's own
tokens. On CUDA one Triton kernel reads both, each for exactly as long as it is filled: lengths are
read on the device, so that one CUDA graph serves a whole job. Rows that continue the same prompt
are queries of one matrix product over its keys. Elsewhere plain torch operations do the same.
Latents, whose last channels are their values too, are given without values and are read once.
Keys and values of 8 bits (kv_codes.py) are read as they lie, as words of two: each half of them,
exact in the queries' dtype, is an operand of its own (low_bit_matmul.py). A key's scale multiplies
its scores, and a value's the weights of them.

Shapes: B rows, H query heads, G key/value heads, R = H / G, D head_dim, E of values, N prompts of
at most P tokens, S own tokens of a row at most, X parts to be merged
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from gpu_kernels.kv_codes import LARGEST, Codes, Room, read, store
from gpu_kernels.low_bit_matmul import assembly_of, raw_of_words

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: fewer are split along the keys
MAX_SPLITS = 16
MANY_QUERIES = 64  # query rows of one tile where many rows share a prompt; 16 where few do,
WIDE = 256  # or where values are wider than this: each query's mixture of them lies in registers
BLOCK_BYTES = 16384  # keys of one step of the kernel's loop, in the queries' dtype
WARPS, STAGES = 4, 2
CODE_BYTES, CODE_WARPS, CODE_STAGES = 16384, 4, 2  # the same of codes, in 8 bits
LOG2_E = 1.4426950408889634


@functools.cache
def _kernel():
    """The Triton kernel, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(x, scale, MOST: tl.constexpr):
        """Codes of numbers, as bytes and as what they are."""
        x = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0))
        x = tl.minimum(tl.maximum(x, -MOST), MOST)
        if MOST == 127:  # to the nearest whole number: beyond 2^23 there are no others
            x = (x + 12582912.0) - 12582912.0
            codes = x.to(tl.int32) & 255
        else:
            codes = x.to(tl.float8e4nv)
            x = codes.to(tl.float32)
            codes = codes.to(tl.uint8, bitcast=True).to(tl.int32)
        return codes, x

    @triton.jit
    def keep(words, scales, slot, width, d, new, MOST: tl.constexpr):
        """kv_codes.store of one key or value, `width` words of two channels each, in a slot: the
        first and the second ones of words, as they are read there."""
        a = tl.load(new + 2 * d, mask=d < width, other=0.0).to(tl.float32)
        b = tl.load(new + 2 * d + 1, mask=d < width, other=0.0).to(tl.float32)
        absmax = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0)
        scale = tl.div_rn(absmax, tl.full([], MOST, tl.float32))
        scale += tl.sum(a * 0.0 + b * 0.0, axis=0)  # NaN, where a number is NaN or infinite
        low, a = rounded(a, scale, MOST)
        high, b = rounded(b, scale, MOST)
        tl.store(words + slot * width + d, (low | high << 8).to(tl.int16), mask=d < width)
        tl.store(scales + slot, scale)
        return a * scale, b * scale

    @triton.jit
    def attend(
        q, k_new, v_new, k, k_scales, v, v_scales, lengths, tiles, first, out, lse,
        stride_q, stride_k, stride_v,
        S, H, G, B, tile_width, scale, cap,
        R: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
        E: tl.constexpr, LATENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
        M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, OWN: tl.constexpr,
        WINDOW: tl.constexpr, CAP: tl.constexpr, MOST: tl.constexpr,
        RAW: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ):  # fmt: skip
        """One tile of M queries, one key head, HEADS of its R query heads, which are so many
        GROUPS, one part of the keys. OWN: a tile is a row with its own keys, the new one among
        them; otherwise tiles [., 1 + rows]: a prompt, and its rows. LATENT: the first so many
        channels of a key are scored alone, the others are its value. MOST: the largest of the
        codes that keys and values are, or 0. Codes come as words of two channels each: RAW makes
        the numbers of their LOW or HIGH halves, so that even channels have a product of their own,
        and odd ones another. Scores, and so scale and cap, are in base 2. Long, since Triton keeps
        no arrays between functions: the running maximum, sum and mixture, of codes MOST times what
        it is, live in registers from start to end."""
        STEP: tl.constexpr = 2 if MOST else 1  # channels of what k and v point at
        tile, split = tl.program_id(0), tl.program_id(2)
        g = tl.program_id(1) // GROUPS
        m, d, e = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
        own_head = tl.program_id(1) % GROUPS * HEADS + m % HEADS
        if OWN:
            keys = tile
            row = tile + 0 * m
            real = (m < HEADS) & (own_head < R)
        else:
            keys = tl.load(tiles + tile * tile_width)
            inside = m // HEADS < tile_width - 1
            row = tl.load(tiles + tile * tile_width + 1 + m // HEADS, mask=inside, other=-1)
            real = (row >= 0) & (own_head < R)
        in_d, in_e = d < (D - LATENT) // STEP, e < LATENT
        head = g * R + own_head
        q_at = q + row[:, None].to(tl.int64) * stride_q + head[:, None] * D
        channels, wanted = q_at + LATENT + STEP * d[None, :], real[:, None] & in_d[None, :]
        queries = tl.load(channels, mask=wanted, other=0.0)
        if MOST:
            odd_queries = tl.load(channels + 1, mask=wanted, other=0.0)
            mixed_odd = tl.zeros([M, BLOCK_D], tl.float32)
        if LATENT:
            first_queries = tl.load(
                q_at + e[None, :], mask=real[:, None] & in_e[None, :], other=0.0
            )
        base = (keys.to(tl.int64) * G + g) * S
        n = tl.minimum(tl.load(lengths + keys), S).to(tl.int32)
        n = tl.where(tl.max(row) >= 0, n, 0)  # a tile without rows has nothing to do
        share = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK_N) * BLOCK_N
        low = split * share
        high = tl.minimum(low + share, n)
        if WINDOW:  # the first key that each row still sees, counted as these keys are
            oldest = tl.load(first + row, mask=real, other=2147483647).to(tl.int32)
            low = tl.maximum(low, tl.min(oldest))
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, BLOCK_D], tl.float32)
        if OWN:  # noqa: SIM102 (decided when the kernel is compiled)
            if split == 0:  # the new key: scored here, then stored for the steps to come
                slot = base + tl.minimum(n, S - 1).to(tl.int64)
                k_at = k_new + tile.to(tl.int64) * stride_k + g * D
                v_at = v_new + tile.to(tl.int64) * stride_v + g * E
                if MOST:
                    new_k, odd_k = keep(k, k_scales, slot, D // 2, d, k_at, MOST)
                    top = tl.sum(queries.to(tl.float32) * new_k[None, :], axis=1)
                    top += tl.sum(odd_queries.to(tl.float32) * odd_k[None, :], axis=1)
                    new_v, odd_v = keep(v, v_scales, slot, E // 2, d, v_at, MOST)
                    new_v, mixed_odd = new_v * MOST, mixed_odd + odd_v[None, :] * MOST
                else:
                    new_k = tl.load(k_at + LATENT + d, mask=in_d, other=0.0)
                    tl.store(k + slot * D + LATENT + d, new_k, mask=in_d)
                    products = queries.to(tl.float32) * new_k.to(tl.float32)[None, :]
                    top = tl.sum(products, axis=1)
                    new_v = new_k
                if LATENT:
                    first_k = tl.load(k_at + e, mask=in_e, other=0.0)
                    tl.store(k + slot * D + e, first_k, mask=in_e)
                    products = first_queries.to(tl.float32) * first_k.to(tl.float32)[None, :]
                    top += tl.sum(products, axis=1)
                elif not MOST:
                    new_v = tl.load(v_at + d, mask=d < E, other=0.0)
                    tl.store(v + slot * E + d, new_v, mask=d < E)
                top = top * scale
                if CAP:
                    top = cap * (2.0 * tl.sigmoid(2.0 * top / cap) - 1.0)  # tanh
                total += 1.0
                mixed += new_v.to(tl.float32)[None, :]
        for start in range(low, high, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            there = column < high
            k_at = k + (base + column[None, :].to(tl.int64)) * (D // STEP)
            block = tl.load(
                k_at + LATENT + d[:, None], mask=there[None, :] & in_d[:, None], other=0.0
            )
            if MOST:
                odd = RAW(block, KIND, 8, HIGH).to(queries.dtype)
                block = RAW(block, KIND, 0, LOW).to(queries.dtype)
            scores = tl.dot(queries, block, input_precision="ieee")
            if MOST:
                scores += tl.dot(odd_queries, odd, input_precision="ieee")
            if LATENT:
                part = tl.load(k_at + e[:, None], mask=there[None, :] & in_e[:, None], other=0.0)
                scores += tl.dot(first_queries, part, input_precision="ieee")
            scores = scores * scale
            if MOST:
                of_key = tl.load(k_scales + base + column, mask=there, other=0.0)
                scores = scores * of_key[None, :]
            if CAP:
                scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
            seen = there[None, :]
            if WINDOW:
                seen = seen & (column[None, :] >= oldest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - finite)
            weights = tl.exp2(scores - finite[:, None])
            total = total * fade + tl.sum(weights, axis=1)
            if LATENT:
                block = tl.trans(block)
            else:
                in_v = d < E // STEP
                v_at = v + (base + column[:, None].to(tl.int64)) * (E // STEP) + d[None, :]
                block = tl.load(v_at, mask=there[:, None] & in_v[None, :], other=0.0)
            if MOST:  # times MOST it is a value's absmax, which no dtype of the queries rounds away
                of_value = tl.load(v_scales + base + column, mask=there, other=0.0)
                weights = (weights * (of_value * MOST)[None, :]).to(queries.dtype)
                odd = RAW(block, KIND, 8, HIGH).to(queries.dtype)
                block = RAW(block, KIND, 0, LOW).to(queries.dtype)
                mixed_odd = mixed_odd * fade[:, None]
                mixed_odd += tl.dot(weights, odd, input_precision="ieee")
            mixed = mixed * fade[:, None]
            mixed += tl.dot(weights.to(block.dtype), block, input_precision="ieee")
            top = new_top
        seen_any = total > 0.0
        divisor = tl.where(seen_any, total, 1.0)
        at = (split * B + row.to(tl.int64)) * H + head
        tl.store(lse + at, tl.where(seen_any, top + tl.log2(divisor), float("-inf")), mask=real)
        in_v, divisor = d < E // STEP, (divisor * (MOST or 1))[:, None]
        out_at, wanted = out + at[:, None] * E + STEP * d[None, :], real[:, None] & in_v[None, :]
        tl.store(out_at, mixed / divisor, mask=wanted)
        if MOST:
            tl.store(out_at + 1, mixed_odd / divisor, mask=wanted)

    return attend


def _splits(tiles: int, heads: int, length: int) -> int:
    """Parts into which the keys are cut, so that few rows still occupy the whole GPU; heads:
    programs that each tile has beside."""
    return max(1, min(PROGRAMS // (tiles * heads), MAX_SPLITS, -(-length // 64)))


def _power_of_2(n: int) -> int:
    """At least n, and at least 16, as tl.dot wants it."""
    return max(16, 1 << (n - 1).bit_length())


def _heads(R: int, E: int) -> tuple[int, int]:
    """Query heads of a key head that one program takes, and how many such groups they are."""
    heads = R if E <= WIDE else min(R, 16)
    return heads, -(-R // heads)


def _launch(own, n_tiles, q, new, kept, tiles, first, out, lse, splits, scale, softcap):
    """One call of the kernel; its own arguments, which say themselves what they are."""
    k, k_scales, v, v_scales, lengths = kept
    (B, H, D), E = q.shape, new[1].shape[-1]
    (G, S), latent = k.shape[1:3], D - E if v is None else 0
    (heads, groups), rows = _heads(H // G, E), 1 if own else tiles.shape[1] - 1
    block_d, most, kind, code = _power_of_2(D - latent), 0, "", ("", "")
    keys, warps, stages = BLOCK_BYTES // (block_d * q.element_size()), WARPS, STAGES
    if k_scales is not None:
        most, kind = LARGEST[k.dtype], "int8" if k.dtype == torch.int8 else "e4m3"
        code = assembly_of(kind, k.device) if q.dtype == torch.bfloat16 else code
        k, v, block_d = k.view(torch.int16), v.view(torch.int16), _power_of_2(D // 2)
        keys, warps, stages = CODE_BYTES // D, CODE_WARPS, CODE_STAGES
    _kernel()[(n_tiles, G * groups, splits)](
        q, *new, k, k_scales, k if v is None else v, v_scales, lengths, tiles, first, out, lse,
        q.stride(0), new[0].stride(0), new[1].stride(0),
        S, H, G, B, tiles.shape[1], scale * LOG2_E, softcap * LOG2_E,
        R=H // G, HEADS=heads, GROUPS=groups, D=D, E=E, LATENT=latent, BLOCK_D=block_d,
        BLOCK_L=_power_of_2(latent), M=_power_of_2(heads * rows),
        BLOCK_N=max(16, min(128, keys)), SPLITS=splits,
        OWN=own, WINDOW=first is not None, CAP=softcap > 0,
        MOST=most, RAW=raw_of_words(), KIND=kind, LOW=code[0], HIGH=code[1],
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def plan_tiles(
    row_prompt: Sequence[int] | np.ndarray, N: int, R: int, dtype: torch.dtype, E: int = 0
) -> torch.Tensor:
    """[n, 1 + rows] int32: a prompt and rows that continue it, -1 where there is none.

    row_prompt: the prompt, of N, that each of B rows continues; R: query heads for each key head.
    E: the values' width. Every row is in exactly one tile; the shape depends on the rest alone.
    """
    B = len(row_prompt)
    many = R * B > 16 * N and dtype != torch.float32  # float32 has no tensor cores to fill
    width = max(1, (MANY_QUERIES if many and E <= WIDE else 16) // R)
    tiles = np.full((min(B, B // width + N), 1 + width), -1, dtype=np.int32)
    tiles[:, 0] = 0
    rows_of = {}
    for row, prompt in enumerate(row_prompt):
        rows_of.setdefault(int(prompt), []).append(row)
    parts = (
        (p, rows[i : i + width]) for p, rows in rows_of.items() for i in range(0, len(rows), width)
    )
    for tile, (prompt, rows) in zip(tiles, parts):
        tile[0], tile[1 : 1 + len(rows)] = prompt, rows
    return torch.from_numpy(tiles)


def decode_attention(  # one step's tensors, and the terms that attention.attend has as well
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    own: tuple[Room, Room | None, torch.Tensor],
    prompts: tuple[Room, Room | None, torch.Tensor],
    row_prompt: torch.Tensor,
    tiles: torch.Tensor,
    read_limit: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store each row's new key and value, and attend to all that the row sees, as it is stored.

    q [B, H, D]; k_new, v_new [B, G, D]; own: k, v [B, G, S, D] and lengths [B], of which so many
    are filled; prompts: the same [N, G, P, D] and [N]; row_prompt [B]: each row's; tiles:
    plan_tiles(row_prompt). v, and v_new, may have another width E <= D; v None: the last E channels
    of k, and v_new of k_new. read_limit: an upper bound of the rows' lengths + 1 (torch only).
    window, softcap, scale: as in attention.attend. Returns parts [X, B, H, E] and the base-2
    log-sum-exp of their scores [X, B, H], both float32, for `merge_parts`.
    """
    if not q.is_cuda:
        return _decode_torch(
            q, k_new, v_new, own, prompts, row_prompt, read_limit, window, softcap, scale
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # eager, the operator would first import torch's compiler, which takes seconds
    decode = _operator if torch.compiler.is_compiling() else _decode_triton
    terms = row_prompt, tiles, window or 0, softcap or 0.0, scale
    return decode(q, k_new, v_new, *_parts_of(own), *_parts_of(prompts), *terms)


Parts = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor
]


def _parts_of(kept: tuple[Room, Room | None, torch.Tensor]) -> Parts:
    """k, its scales, v, its scales, lengths: None for what is not there."""
    k, v, lengths = kept
    if isinstance(k, Codes) and isinstance(v, Codes):
        return k.codes, k.scales, v.codes, v.scales, lengths
    assert not isinstance(k, Codes) and not isinstance(v, Codes), "both or none"
    return k, None, v, None, lengths


def _decode_triton(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor | None,
    v: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    lengths: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_k_scales: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    prompt_v_scales: torch.Tensor | None,
    prompt_lengths: torch.Tensor,
    row_prompt: torch.Tensor,
    tiles: torch.Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes k, v and scales in place. Compiled, it is an operator, whose schema knows tensors and
    numbers only: hence so many. window, softcap 0: none."""
    own = k, k_scales, v, v_scales, lengths
    prompts = prompt_k, prompt_k_scales, prompt_v, prompt_v_scales, prompt_lengths
    q, k_new, v_new = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k_new, v_new))
    n_own, n_prompt = _parts(q, k, prompt_k, tiles, v_new)
    out, lse = _empty(q, v_new, n_own + n_prompt)
    first = lengths - (window - 1) if window else None
    new = (k_new, v_new)
    _launch(True, len(q), q, new, own, tiles, first, out, lse, n_own, scale, softcap)
    if n_prompt:
        if first is not None:
            first = first + prompt_lengths[row_prompt]
        _launch(
            False, len(tiles), q, new, prompts, tiles, first, out[n_own:], lse[n_own:],
            n_prompt, scale, softcap,
        )  # fmt: skip
    return out, lse


def _parts(q, k, prompt_k, tiles, v_new):
    """Parts of a row's own keys and of its prompt's."""
    G, S, P = k.shape[1], k.shape[2], prompt_k.shape[2]
    programs = G * _heads(q.shape[1] // G, v_new.shape[-1])[1]
    return _splits(len(q), programs, S), _splits(len(tiles), programs, P) if P else 0


def _empty(q, v_new, parts):
    shape = (parts, *q.shape[:2])
    out = q.new_empty((*shape, v_new.shape[-1]), dtype=torch.float32)
    return out, q.new_empty(shape, dtype=torch.float32)


_operator = torch.library.custom_op(
    "roseval::decode_attention", mutates_args=("k", "k_scales", "v", "v_scales")
)(_decode_triton)


@_operator.register_fake
def _(q, k_new, v_new, k, ks, v, vs, n, prompt_k, pks, pv, pvs, pn, rp, tiles, *terms):
    return _empty(q, v_new, sum(_parts(q, k, prompt_k, tiles, v_new)))


def _decode_torch(
    q, k_new, v_new, own, prompts, row_prompt, read_limit, window=None, softcap=None, scale=None
):
    """The same in plain operations, prompt and own keys side by side under a mask."""
    (k, v, lengths), (prompt_k, prompt_v, prompt_lengths) = own, prompts
    (B, H, D), G = q.shape, k.shape[1]
    rows, E = torch.arange(B, device=q.device), v_new.shape[-1]
    at = rows, slice(None), lengths.clamp(max=k.shape[2] - 1)
    for room, new in ((k, k_new), (v, v_new)):
        if room is not None:
            store(room, at, new)
    if v is None:
        v, prompt_v = k[..., D - E :], prompt_k[..., D - E :]
    if isinstance(k, Codes):  # which are not rounded to the queries' dtype
        wide = torch.promote_types(q.dtype, torch.float32)
        q, prompt_k, prompt_v = q.to(wide), read(prompt_k, wide), read(prompt_v, wide)
        k, v = read(k[:, :, :read_limit], wide), read(v[:, :, :read_limit], wide)
    k, v = k[:, :, :read_limit], v[:, :, :read_limit]
    P, before = prompt_k.shape[2], prompt_lengths[row_prompt][:, None]
    key = torch.arange(P + k.shape[2], device=q.device)
    is_own = key >= P
    position = torch.where(is_own, key - P + before, key)  # [B, P + S]
    query = before + lengths[:, None]
    seen = (is_own | (key < before)) & (position <= query)
    if window:
        seen &= query - position < window
    if P:
        alone = len(prompt_k) == 1
        pick = (lambda x: x.expand(B, -1, -1, -1)) if alone else (lambda x: x[row_prompt])
        k, v = torch.cat((pick(prompt_k), k), dim=2), torch.cat((pick(prompt_v), v), dim=2)
    # the query heads of one key head become query positions of it: keys are read as they lie
    q, seen = q.view(B, G, -1, D), seen[:, None, None]
    if softcap:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.reshape(1, B, H, E).float(), q.new_zeros((1, B, H), dtype=torch.float32)


def merge_parts(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, E], float32, from that over disjoint keys [X, B, H, E] and base-2 lse."""
    if len(out) == 1:
        return out[0]
    share = torch.exp2(lse - lse.amax(dim=0))
    return (out * share[..., None]).sum(dim=0) / share.sum(dim=0)[..., None]

"""The Triton kernels of decode_attention.py, each built on first use: where there is no GPU there
is no Triton.

Shapes: B rows, H query heads, G key/value heads, R = H / G, D head_dim, E of values, S tokens that
there is room for, X parts to be merged
"""

import functools
from typing import Any


@functools.cache
def attend() -> Any:
    """Attention of tiles of queries over keys that lie in one place."""
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
        q, k_new, v_new, k, k_scales, v, v_scales, lengths, tiles, first, out, lse, y,
        stride_q, stride_k, stride_v,
        S, H, G, B, parts, tile_width, scale, cap,
        R: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
        E: tl.constexpr, LATENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
        M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, OWN: tl.constexpr,
        WINDOW: tl.constexpr, CAP: tl.constexpr, MOST: tl.constexpr, LAST: tl.constexpr,
        RAW: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ):  # fmt: skip
        """One tile of M queries, one key head, HEADS of its R query heads, which are so many
        GROUPS, one part of the keys. OWN: a tile is a row with its own keys, the new one among
        them; otherwise tiles [., 1 + rows]: a prompt, and its rows. LATENT: the first so many
        channels of a key are scored alone, the others are its value. MOST: the largest of the
        codes that keys and values are, or 0. Codes come as words of two channels each: RAW makes
        the numbers of their LOW or HIGH halves, so that even channels have a product of their own,
        and odd ones another. Scores, and so scale and cap, are in base 2. A part and its lse go to
        `out`; of the LAST one its mixture with the `parts` that are there to y. Long, since Triton
        keeps no arrays between functions: the running maximum, sum and mixture, of codes MOST times
        what it is, live in registers from start to end."""
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
        in_v = d < E // STEP
        in_y, of_d = real[:, None] & in_v[None, :], STEP * d[None, :]
        if LAST:
            for x in range(0, parts):
                part_at = (x * B + row.to(tl.int64)) * H + head
                of_part = tl.load(lse + part_at, mask=real, other=float("-inf"))
                higher = tl.maximum(top, of_part)
                kept, added = tl.exp2(top - higher), tl.exp2(of_part - higher)
                at_part, times = out + part_at[:, None] * E + of_d, (added * (MOST or 1))[:, None]
                mixture = tl.load(at_part, mask=in_y, other=0.0)
                mixed = mixed * kept[:, None] + mixture * times
                if MOST:
                    mixture = tl.load(at_part + 1, mask=in_y, other=0.0)
                    mixed_odd = mixed_odd * kept[:, None] + mixture * times
                total, top = total * kept + added, higher
        seen_any = total > 0.0
        divisor = tl.where(seen_any, total, 1.0)
        at = (split * B + row.to(tl.int64)) * H + head
        if LAST:
            out_at = y + at[:, None] * E + of_d
        else:
            tl.store(lse + at, tl.where(seen_any, top + tl.log2(divisor), float("-inf")), mask=real)
            out_at = out + at[:, None] * E + of_d
        divisor = (divisor * (MOST or 1))[:, None]
        tl.store(out_at, mixed / divisor, mask=in_y)
        if MOST:
            tl.store(out_at + 1, mixed_odd / divisor, mask=in_y)

    return attend


@functools.cache
def merge() -> Any:
    """Attention from that over disjoint keys."""
    import triton
    import triton.language as tl

    @triton.jit
    def merge(out, lse, y, X, N, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
        """One program BLOCK_N of all N rows and heads."""
        n, e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
        inside = (n < N)[:, None] & (e < E)[None, :]
        top = tl.full([BLOCK_N], float("-inf"), tl.float32)
        for x in range(X):
            top = tl.maximum(top, tl.load(lse + x * N + n, mask=n < N, other=0.0))
        total = tl.zeros([BLOCK_N], tl.float32)
        mixed = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
        at = n[:, None].to(tl.int64) * E + e[None, :]
        for x in range(X):
            share = tl.exp2(tl.load(lse + x * N + n, mask=n < N, other=0.0) - top)
            part = tl.load(out + x * N * E + at, mask=inside, other=0.0)
            total += share
            mixed += share[:, None] * part
        tl.store(y + at, (mixed / total[:, None]).to(y.dtype.element_ty), mask=inside)

    return merge

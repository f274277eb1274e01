"""One decode step's attention: each row's one new query over its prompt and its own tokens.

    out, lse = decode_attention(q, k_new, v_new, k, v, lengths, prefixes, ..., window, span)
    out = merge_parts(out, lse)

Keys lie in two places: prompts, each kept once however many rows continue it, and every row's own
tokens. On CUDA one Triton kernel reads both, each for exactly as long as it is filled: lengths are
read on the device, so that one CUDA graph serves a whole job. Rows that continue the same prompt
are queries of one matrix product over its keys. Elsewhere plain torch operations do the same.

Shapes: B rows, H query heads, G key/value heads, D head_dim, N prompts, X parts to be merged
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: fewer are split along the keys
MAX_SPLITS = 16
MANY_QUERIES = 64  # query rows of one tile where many rows share a prompt; 16 where few do
BLOCK_BYTES = 16384  # keys of one step of the kernel's loop
WARPS, STAGES = 4, 2


@functools.cache
def _kernel():
    """The Triton kernel, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        q, k_new, v_new, k, v, lengths, tiles, first, out, lse, stride_q, stride_k, stride_v,
        S, H, G, B, tile_width, scale,
        R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
        BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, OWN: tl.constexpr, WINDOW: tl.constexpr,
    ):  # fmt: skip
        """One tile of M queries, one key head, one part of the keys. OWN: a tile is a row with its
        own keys, the new one among them; otherwise tiles [., 1 + rows]: a prompt, and its rows."""
        tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
        if OWN:
            keys = tile
            row = tile + 0 * m
            real = m < R
        else:
            keys = tl.load(tiles + tile * tile_width)
            inside = m // R < tile_width - 1
            row = tl.load(tiles + tile * tile_width + 1 + m // R, mask=inside, other=-1)
            real = row >= 0
        in_d = d < D
        head = g * R + m % R
        q_at = q + row[:, None].to(tl.int64) * stride_q + head[:, None] * D + d[None, :]
        queries = tl.load(q_at, mask=real[:, None] & in_d[None, :], other=0.0)
        base = (keys.to(tl.int64) * G + g) * S * D
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
                new_k = tl.load(
                    k_new + tile.to(tl.int64) * stride_k + g * D + d, mask=in_d, other=0.0
                )
                new_v = tl.load(
                    v_new + tile.to(tl.int64) * stride_v + g * D + d, mask=in_d, other=0.0
                )
                slot = base + tl.minimum(n, S - 1).to(tl.int64) * D + d
                tl.store(k + slot, new_k, mask=in_d)
                tl.store(v + slot, new_v, mask=in_d)
                products = queries.to(tl.float32) * new_k.to(tl.float32)[None, :]
                top = tl.sum(products, axis=1) * scale
                total += 1.0
                mixed += new_v.to(tl.float32)[None, :]
        for start in range(low, high, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            there = column < high
            k_at = k + base + column[None, :].to(tl.int64) * D + d[:, None]
            block = tl.load(k_at, mask=there[None, :] & in_d[:, None], other=0.0)
            scores = tl.dot(queries, block, input_precision="ieee") * scale
            seen = there[None, :]
            if WINDOW:
                seen = seen & (column[None, :] >= oldest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - finite)
            weights = tl.exp2(scores - finite[:, None])
            total = total * fade + tl.sum(weights, axis=1)
            v_at = v + base + column[:, None].to(tl.int64) * D + d[None, :]
            block = tl.load(v_at, mask=there[:, None] & in_d[None, :], other=0.0)
            mixed = mixed * fade[:, None]
            mixed += tl.dot(weights.to(block.dtype), block, input_precision="ieee")
            top = new_top
        seen_any = total > 0.0
        divisor = tl.where(seen_any, total, 1.0)
        at = (split * B + row.to(tl.int64)) * H + head
        tl.store(lse + at, tl.where(seen_any, top + tl.log2(divisor), float("-inf")), mask=real)
        out_at = out + at[:, None] * D + d[None, :]
        tl.store(out_at, mixed / divisor[:, None], mask=real[:, None] & in_d[None, :])

    return attend


def _splits(tiles: int, G: int, length: int) -> int:
    """Parts into which the keys are cut, so that few rows still occupy the whole GPU."""
    return max(1, min(PROGRAMS // (tiles * G), MAX_SPLITS, -(-length // 64)))


def _launch(own, n_tiles, q, new, k, v, lengths, tiles, first, out, lse, splits, M):
    B, H, D = q.shape
    G, S = k.shape[1:3]
    block_d = max(16, 1 << (D - 1).bit_length())
    block_n = max(16, min(128, BLOCK_BYTES // (block_d * q.element_size())))
    _kernel()[(n_tiles, G, splits)](
        q, *new, k, v, lengths, tiles, first, out, lse,
        q.stride(0), new[0].stride(0), new[1].stride(0),
        S, H, G, B, tiles.shape[1], D**-0.5 * 1.4426950408889634,
        R=H // G, D=D, BLOCK_D=block_d, M=M, BLOCK_N=block_n, SPLITS=splits, OWN=own,
        WINDOW=first is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def plan_tiles(row_prefix, N: int, R: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, 1 + rows] int32: a prompt and rows that continue it, -1 where there is none.

    row_prefix: the prompt, of N, that each of B rows continues (any sequence); R: query heads for
    each key head. Every row is in exactly one tile; the shape depends on B, N, R and dtype alone.
    """
    B = len(row_prefix)
    many = R * B > 16 * N and dtype != torch.float32  # float32 has no tensor cores to fill
    width = max(1, (MANY_QUERIES if many else 16) // R)
    tiles = np.full((min(B, B // width + N), 1 + width), -1, dtype=np.int32)
    tiles[:, 0] = 0
    rows_of = {}
    for row, prefix in enumerate(row_prefix):
        rows_of.setdefault(int(prefix), []).append(row)
    parts = (
        (p, rows[i : i + width]) for p, rows in rows_of.items() for i in range(0, len(rows), width)
    )
    for tile, (prefix, rows) in zip(tiles, parts):
        tile[0], tile[1 : 1 + len(rows)] = prefix, rows
    return torch.from_numpy(tiles)


def decode_attention(
    q, k_new, v_new, k, v, lengths,
    prefix_k, prefix_v, prefix_lengths, row_prefix, tiles, window: int, span: int,
):  # fmt: skip
    """Store each row's new key and value, and attend to all that the row sees.

    q [B, H, D]; k_new, v_new [B, G, D]; k, v [B, G, S, D], of which `lengths` [B] are filled;
    prefix_k, prefix_v [N, G, P, D], of which prefix_lengths [N]; row_prefix [B]: each row's prompt;
    tiles: plan_tiles(row_prefix). window: 0, or keys a query sees, itself included. span: an upper
    bound of lengths + 1 (torch path only). Returns parts [X, B, H, D] and the base-2 log-sum-exp of
    their scores [X, B, H], both float32, for `merge_parts`.
    """
    stored = k, v, lengths, prefix_k, prefix_v, prefix_lengths, row_prefix
    if q.is_cuda:
        return _decode_triton(q, k_new, v_new, *stored, tiles, window)
    return _decode_torch(q, k_new, v_new, *stored, window, span)


@torch.library.custom_op("roseval::decode_attention", mutates_args=("k", "v"))
def _decode_triton(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    prefix_lengths: torch.Tensor,
    row_prefix: torch.Tensor,
    tiles: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator of its own, so that torch.compile takes it as it is and writes k, v in place."""
    B, R = len(q), q.shape[1] // k.shape[1]
    q, k_new, v_new = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k_new, v_new))
    own, shared = _parts(q, k, prefix_k, tiles)
    out, lse = _empty(q, own + shared)
    first = lengths - (window - 1) if window else None
    M = max(16, 1 << (R - 1).bit_length())
    new = (k_new, v_new)
    _launch(True, B, q, new, k, v, lengths, tiles, first, out, lse, own, M)
    if shared:
        if window:
            first = first + prefix_lengths[row_prefix]
        M = max(16, 1 << (R * (tiles.shape[1] - 1) - 1).bit_length())
        _launch(
            False, len(tiles), q, new, prefix_k, prefix_v, prefix_lengths, tiles, first,
            out[own:], lse[own:], shared, M,
        )  # fmt: skip
    return out, lse


def _parts(q, k, prefix_k, tiles):
    """Parts of a row's own keys and of its prompt's."""
    G, S, P = k.shape[1], k.shape[2], prefix_k.shape[2]
    return _splits(len(q), G, S), _splits(len(tiles), G, P) if P else 0


def _empty(q, parts):
    out = q.new_empty((parts, *q.shape), dtype=torch.float32)
    return out, q.new_empty((parts, *q.shape[:2]), dtype=torch.float32)


@_decode_triton.register_fake
def _(q, k_new, v_new, k, v, lengths, prefix_k, prefix_v, pl, rp, tiles, window):
    return _empty(q, sum(_parts(q, k, prefix_k, tiles)))


def _decode_torch(
    q, k_new, v_new, k, v, lengths, prefix_k, prefix_v, prefix_lengths, row_prefix, window, span
):
    """The same in plain operations, prompt and own keys side by side under a mask."""
    (B, H, D), G = q.shape, k.shape[1]
    rows = torch.arange(B, device=q.device)
    slots = lengths.clamp(max=k.shape[2] - 1)
    k[rows, :, slots], v[rows, :, slots] = k_new, v_new
    k, v = k[:, :, :span], v[:, :, :span]
    P, before = prefix_k.shape[2], prefix_lengths[row_prefix][:, None]
    key = torch.arange(P + k.shape[2], device=q.device)
    own = key >= P
    position = torch.where(own, key - P + before, key)  # [B, P + S]
    query = before + lengths[:, None]
    seen = (own | (key < before)) & (position <= query)
    if window:
        seen &= query - position < window
    if P:
        alone = len(prefix_k) == 1
        pick = (lambda x: x.expand(B, -1, -1, -1)) if alone else (lambda x: x[row_prefix])
        k, v = torch.cat((pick(prefix_k), k), dim=2), torch.cat((pick(prefix_v), v), dim=2)
    # the query heads of one key head become query positions of it: keys are read as they lie
    out = F.scaled_dot_product_attention(q.view(B, G, -1, D), k, v, attn_mask=seen[:, None, None])
    return out.reshape(1, B, H, D).float(), q.new_zeros((1, B, H), dtype=torch.float32)


def merge_parts(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, D], float32, from that over disjoint keys [X, B, H, D] and base-2 lse."""
    if len(out) == 1:
        return out[0]
    share = torch.exp2(lse - lse.amax(dim=0))
    return (out * share[..., None]).sum(dim=0) / share.sum(dim=0)[..., None]

"""One decode step's attention: each row's one new query over its prompt and its own tokens.

    out, lse = decode_attention(q, k_new, v_new, own, prompts, row_prompt, tiles, read_limit)
    out = merge_parts(out, lse)

Keys lie in two places: prompts, each kept once however many rows continue it, and every row's own
tokens. On CUDA one Triton kernel reads both, each for exactly as long as it is filled: lengths are
read on the device, so that one CUDA graph serves a whole job. Rows that continue the same prompt
are queries of one matrix product over its keys. Elsewhere plain torch operations do the same.

Shapes: B rows, H query heads, G key/value heads, R = H / G, D head_dim, N prompts of at most P
tokens, S own tokens of a row at most, X parts to be merged
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: fewer are split along the keys
MAX_SPLITS = 16
MANY_QUERIES = 64  # query rows of one tile where many rows share a prompt; 16 where few do
BLOCK_BYTES = 16384  # keys of one step of the kernel's loop
WARPS, STAGES = 4, 2
LOG2_E = 1.4426950408889634


@functools.cache
def _kernel():
    """The Triton kernel, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def attend(
        q, k_new, v_new, k, v, lengths, tiles, first, out, lse, stride_q, stride_k, stride_v,
        S, H, G, B, tile_width, scale, cap,
        R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
        BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, OWN: tl.constexpr, WINDOW: tl.constexpr,
        CAP: tl.constexpr,
    ):  # fmt: skip
        """One tile of M queries, one key head, one part of the keys. OWN: a tile is a row with its
        own keys, the new one among them; otherwise tiles [., 1 + rows]: a prompt, and its rows.
        Scores, and so scale and cap, are in base 2. Long, since Triton keeps no arrays between
        functions: the running maximum, sum and mixture live in registers from start to end."""
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
                if CAP:
                    top = cap * (2.0 * tl.sigmoid(2.0 * top / cap) - 1.0)  # tanh
                total += 1.0
                mixed += new_v.to(tl.float32)[None, :]
        for start in range(low, high, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            there = column < high
            k_at = k + base + column[None, :].to(tl.int64) * D + d[:, None]
            block = tl.load(k_at, mask=there[None, :] & in_d[:, None], other=0.0)
            scores = tl.dot(queries, block, input_precision="ieee") * scale
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


def _launch(own, n_tiles, q, new, k, v, lengths, tiles, first, out, lse, splits, M, scale, softcap):
    """One call of the kernel; its own arguments, which say themselves what they are."""
    B, H, D = q.shape
    G, S = k.shape[1:3]
    block_d = max(16, 1 << (D - 1).bit_length())
    block_n = max(16, min(128, BLOCK_BYTES // (block_d * q.element_size())))
    _kernel()[(n_tiles, G, splits)](
        q, *new, k, v, lengths, tiles, first, out, lse,
        q.stride(0), new[0].stride(0), new[1].stride(0),
        S, H, G, B, tiles.shape[1], scale * LOG2_E, softcap * LOG2_E,
        R=H // G, D=D, BLOCK_D=block_d, M=M, BLOCK_N=block_n, SPLITS=splits, OWN=own,
        WINDOW=first is not None, CAP=softcap > 0, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def plan_tiles(
    row_prompt: Sequence[int] | np.ndarray, N: int, R: int, dtype: torch.dtype
) -> torch.Tensor:
    """[n, 1 + rows] int32: a prompt and rows that continue it, -1 where there is none.

    row_prompt: the prompt, of N, that each of B rows continues; R: query heads for each key head.
    Every row is in exactly one tile; the shape depends on B, N, R and dtype alone.
    """
    B = len(row_prompt)
    many = R * B > 16 * N and dtype != torch.float32  # float32 has no tensor cores to fill
    width = max(1, (MANY_QUERIES if many else 16) // R)
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


def decode_attention(  # one step's tensors, and the terms that model.attend has as well
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    row_prompt: torch.Tensor,
    tiles: torch.Tensor,
    read_limit: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store each row's new key and value, and attend to all that the row sees.

    q [B, H, D]; k_new, v_new [B, G, D]; own: k, v [B, G, S, D] and lengths [B], of which so many
    are filled; prompts: the same [N, G, P, D] and [N]; row_prompt [B]: each row's; tiles:
    plan_tiles(row_prompt). read_limit: an upper bound of the rows' lengths + 1 (torch only).
    window, softcap, scale: as in model.attend. Returns parts [X, B, H, D] and the base-2
    log-sum-exp of their scores [X, B, H], both float32, for `merge_parts`.
    """
    if not q.is_cuda:
        return _decode_torch(
            q, k_new, v_new, own, prompts, row_prompt, read_limit, window, softcap, scale
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # eager, the operator would first import torch's compiler, which takes seconds
    decode = _operator if torch.compiler.is_compiling() else _decode_triton
    return decode(
        q, k_new, v_new, *own, *prompts, row_prompt, tiles, window or 0, softcap or 0.0, scale
    )


def _decode_triton(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    prompt_k: torch.Tensor,
    prompt_v: torch.Tensor,
    prompt_lengths: torch.Tensor,
    row_prompt: torch.Tensor,
    tiles: torch.Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes k, v in place. Compiled, it is an operator, whose schema knows tensors and numbers
    only: hence so many. window, softcap 0: none."""
    B, R = len(q), q.shape[1] // k.shape[1]
    q, k_new, v_new = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k_new, v_new))
    n_own, n_prompt = _parts(q, k, prompt_k, tiles)
    out, lse = _empty(q, n_own + n_prompt)
    first = lengths - (window - 1) if window else None
    M = max(16, 1 << (R - 1).bit_length())
    new = (k_new, v_new)
    _launch(True, B, q, new, k, v, lengths, tiles, first, out, lse, n_own, M, scale, softcap)
    if n_prompt:
        if first is not None:
            first = first + prompt_lengths[row_prompt]
        M = max(16, 1 << (R * (tiles.shape[1] - 1) - 1).bit_length())
        _launch(
            False, len(tiles), q, new, prompt_k, prompt_v, prompt_lengths, tiles, first,
            out[n_own:], lse[n_own:], n_prompt, M, scale, softcap,
        )  # fmt: skip
    return out, lse


def _parts(q, k, prompt_k, tiles):
    """Parts of a row's own keys and of its prompt's."""
    G, S, P = k.shape[1], k.shape[2], prompt_k.shape[2]
    return _splits(len(q), G, S), _splits(len(tiles), G, P) if P else 0


def _empty(q, parts):
    out = q.new_empty((parts, *q.shape), dtype=torch.float32)
    return out, q.new_empty((parts, *q.shape[:2]), dtype=torch.float32)


_operator = torch.library.custom_op("roseval::decode_attention", mutates_args=("k", "v"))(
    _decode_triton
)


@_operator.register_fake
def _(q, k_new, v_new, k, v, lengths, prompt_k, pv, pl, rp, tiles, window, softcap, scale):
    return _empty(q, sum(_parts(q, k, prompt_k, tiles)))


def _decode_torch(
    q, k_new, v_new, own, prompts, row_prompt, read_limit, window=None, softcap=None, scale=None
):
    """The same in plain operations, prompt and own keys side by side under a mask."""
    (k, v, lengths), (prompt_k, prompt_v, prompt_lengths) = own, prompts
    (B, H, D), G = q.shape, k.shape[1]
    rows = torch.arange(B, device=q.device)
    slots = lengths.clamp(max=k.shape[2] - 1)
    k[rows, :, slots], v[rows, :, slots] = k_new, v_new
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
    return out.reshape(1, B, H, D).float(), q.new_zeros((1, B, H), dtype=torch.float32)


def merge_parts(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention [B, H, D], float32, from that over disjoint keys [X, B, H, D] and base-2 lse."""
    if len(out) == 1:
        return out[0]
    share = torch.exp2(lse - lse.amax(dim=0))
    return (out * share[..., None]).sum(dim=0) / share.sum(dim=0)[..., None]

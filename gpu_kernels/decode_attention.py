"""One decode step's attention: each row's one new query over its prompt and its own tokens.

    y = decode_attention(q, k_new, v_new, own, prompts, row_prompt, tiles, read_limit)

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

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from gpu_kernels import decode_kernels
from gpu_kernels.kv_codes import LARGEST, Codes, Room, read, store
from gpu_kernels.low_bit_matmul import assembly_of, raw_of_words

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: fewer are split along the keys
MAX_SPLITS = 16
MANY_QUERIES = 64  # query rows of one tile where many rows share a prompt; 16 where few do,
WIDE = 256  # or where values are wider than this: each query's mixture of them lies in registers
BLOCK_BYTES = 16384  # keys of one step of the kernel's loop, in the queries' dtype
WARPS, STAGES = 4, 2
CODE_BYTES, CODE_WARPS, CODE_STAGES = 16384, 4, 2  # the same of codes, in 8 bits
MERGED = 2048  # numbers of each part that one program merges
LOG2_E = 1.4426950408889634


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


def _launch(own, n_tiles, q, new, kept, tiles, first, out, lse, splits, scale, softcap, y=None):
    """One call of the kernel; its own arguments, which say themselves what they are. y: where the
    mixture of all parts goes, of which out and lse are those that are there."""
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
    decode_kernels.attend()[(n_tiles, G * groups, splits)](
        q, *new, k, k_scales, k if v is None else v, v_scales, lengths, tiles, first, out, lse,
        out if y is None else y, q.stride(0), new[0].stride(0), new[1].stride(0),
        S, H, G, B, len(out), tiles.shape[1], scale * LOG2_E, softcap * LOG2_E,
        R=H // G, HEADS=heads, GROUPS=groups, D=D, E=E, LATENT=latent, BLOCK_D=block_d,
        BLOCK_L=_power_of_2(latent), M=_power_of_2(heads * rows),
        BLOCK_N=max(16, min(128, keys)), SPLITS=splits,
        OWN=own, WINDOW=first is not None, CAP=softcap > 0,
        LAST=y is not None, MOST=most, RAW=raw_of_words(), KIND=kind, LOW=code[0], HIGH=code[1],
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
) -> torch.Tensor:
    """Store each row's new key and value, and attend to all that the row sees, as it is stored.

    q [B, H, D]; k_new, v_new [B, G, D]; own: k, v [B, G, S, D] and lengths [B], of which so many
    are filled; prompts: the same [N, G, P, D] and [N]; row_prompt [B]: each row's; tiles:
    plan_tiles(row_prompt). v, and v_new, may have another width E <= D; v None: the last E channels
    of k, and v_new of k_new. read_limit: an upper bound of the rows' lengths + 1 (torch only).
    window, softcap, scale: as in attention.attend. Returns [B, H, E] in q's dtype.
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
) -> torch.Tensor:
    """Writes k, v and scales in place. Compiled, it is an operator, whose schema knows tensors and
    numbers only: hence so many. window, softcap 0: none."""
    own = k, k_scales, v, v_scales, lengths
    prompts = prompt_k, prompt_k_scales, prompt_v, prompt_v_scales, prompt_lengths
    q, k_new, v_new = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k_new, v_new))
    G, S, P = *k.shape[1:3], prompt_k.shape[2]
    programs = G * _heads(q.shape[1] // G, v_new.shape[-1])[1]
    n_own, n_prompt = _splits(len(q), programs, S), _splits(len(tiles), programs, P) if P else 0
    # what few rows are split into is merged by a kernel of its own, else the last part merges all
    n_apart = n_own if n_own > 1 else 0
    y = q.new_empty((*q.shape[:2], v_new.shape[-1]))
    out = q.new_empty((n_apart + n_prompt, *y.shape), dtype=torch.float32)
    lse = q.new_empty(out.shape[:-1], dtype=torch.float32)
    first = lengths - (window - 1) if window else None
    terms, new = (scale, softcap), (k_new, v_new)
    if n_prompt:
        of_prompt = None if first is None else first + prompt_lengths[row_prompt]
        there = out[n_apart:], lse[n_apart:], n_prompt
        _launch(False, len(tiles), q, new, prompts, tiles, of_prompt, *there, *terms)
    if not n_apart:
        _launch(True, len(q), q, new, own, tiles, first, out, lse, 1, *terms, y)
        return y
    _launch(True, len(q), q, new, own, tiles, first, out[:n_own], lse[:n_own], n_own, *terms)
    return merge_parts(out, lse, q.dtype)


_operator = torch.library.custom_op(
    "roseval::decode_attention", mutates_args=("k", "k_scales", "v", "v_scales")
)(_decode_triton)


@_operator.register_fake
def _(q, k_new, v_new, k, ks, v, vs, n, prompt_k, pks, pv, pvs, pn, rp, tiles, *terms):
    return q.new_empty((*q.shape[:2], v_new.shape[-1]))


def _decode_torch(
    q, k_new, v_new, own, prompts, row_prompt, read_limit, window=None, softcap=None, scale=None
):
    """The same in plain operations, prompt and own keys side by side under a mask."""
    (k, v, lengths), (prompt_k, prompt_v, prompt_lengths) = own, prompts
    (B, H, D), G, dtype = q.shape, k.shape[1], q.dtype
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
    return out.reshape(B, H, E).to(dtype)


def merge_parts(
    out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Attention [B, H, E] in `dtype` from that over disjoint keys [X, B, H, E] and base-2 lse."""
    X, B, H, E = out.shape
    if X == 1:
        return out[0].to(dtype)
    if not out.is_cuda:
        share = torch.exp2(lse - lse.amax(dim=0))
        return ((out * share[..., None]).sum(dim=0) / share.sum(dim=0)[..., None]).to(dtype)
    y = torch.empty((B, H, E), dtype=dtype, device=out.device)
    block_e = _power_of_2(E)
    block_n = max(1, MERGED // block_e)
    decode_kernels.merge()[(-(-B * H // block_n),)](
        out, lse, y, X, B * H, E, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=4
    )
    return y

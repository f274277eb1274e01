"""Keys and values already computed, which model.hidden(ids, cache=...) goes on from.

    cache = PrefixCache(model, len(prefix))                 # scoring: one prefix, any rows after it
    model.hidden(prefix_ids, cache=cache.filling())         # [1, P]
    model.hidden(ids, cache=cache)                          # [B, T], right-padded, batch by batch

    cache = DecodeCache(model, n_prompts=N, prompt_len=P, n_rows=B, max_len=S)       # generation
    model.hidden(ids, cache=cache.filling([2, 0], [9, 5]))  # [2, T], right-padded: two prompts
    model.hidden(ids, cache=cache.going_on(2, 9, [7, 8]))   # [2, T]: what two rows add to the first
    cache.assign(prompts)                                   # [B]: the prompt of each row
    model.hidden(next_ids, cache=cache)                     # [B, 1]: one decode step
    cache.advance(active)                                   # [B]: 1 where the row keeps that token

What the model asks of any of them is `positions(T)`, `attend(layer, q, k, v, **options)`, the
options being attention.attention_of's, and `longest`: the tokens that a row may reach in all, by
which LongRoPE's frequencies are chosen.

Latent attention's values have a width of their own, E. In generation only latents are kept, one of
R + L numbers a token for all heads, and queries come to them absorbed (`LatentAttention`); a shared
prefix lies expanded, since many tokens go over it and it is there once.

With `kv_dtype` a DecodeCache keeps keys and values in 8 bits (gpu_kernels/kv_codes.py), and every
token sees them so: those of its own prompt, and its own, too. What a token sees then depends on no
neighbour, and not on which part of its prompt is shared. Scoring's prefixes are never rounded.

Shapes: B rows, T tokens, N prompts of at most P tokens, S own tokens of a row at most, H query
heads, G key/value heads, D head_dim
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from config import GPTConfig
from gpu_kernels.decode_attention import decode_attention, plan_tiles
from gpu_kernels.kv_codes import DTYPES, Codes, Room, read, store
from model import GPTModel
from modeling.attention import attend
from transformers_model import Model


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], length: int | None = None) -> np.ndarray:
    """int64 [rows, length or the longest row's]: token ids, filled up with 0 on the right."""
    padded = np.zeros((len(rows), max(map(len, rows)) if length is None else length), np.int64)
    for place, ids in zip(padded, rows):
        place[: len(ids)] = ids
    return padded


def check_kv_dtype(model: Model, kv_dtype: str | None) -> None:
    """ValueError where generation cannot keep keys and values in this dtype; None: the model's."""
    if kv_dtype is None:
        return
    reason = None
    if kv_dtype not in DTYPES:
        reason = f"there are {', '.join(DTYPES)}"
    elif not model.supports_cache:
        reason = "this architecture runs through transformers, without our cache"
    elif model.config.kv_lora_rank is not None:
        reason = "latent attention keeps latents, which are not rounded"
    elif model.config.head_dim % 2:
        reason = f"heads of {model.config.head_dim} channels, of which two make a word"
    elif kv_dtype == "fp8" and model.device.type == "cuda" and not _has_float8(model.device):
        reason = "this GPU has no 8-bit floats: int8 goes with all"
    if reason:
        raise ValueError(f"--kv-dtype {kv_dtype}: {reason}")


def _has_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def token_bytes(c: GPTConfig, dtype: torch.dtype, kv_dtype: str | None) -> int:
    """Of one token in one layer of a cache, scales included."""
    if kv_dtype is None:
        return c.cache_dim * dtype.itemsize
    return c.cache_dim * DTYPES[kv_dtype].itemsize + 2 * c.n_kv_heads * torch.float32.itemsize


Rooms = dict[int, Any]  # `Room`s by layer, of those whose blocks are here; None where not needed


def _room(
    model: GPTModel, shape: tuple[int, ...], kv_dtype: str | None
) -> dict[int, torch.Tensor] | dict[int, Codes]:
    """Zeros [rows, heads, length, width] for each layer."""
    if kv_dtype is not None:
        return {at: Codes.room(shape, DTYPES[kv_dtype], model.device) for at in model.layers}
    return {at: torch.zeros(shape, dtype=model.dtype, device=model.device) for at in model.layers}


def _rooms(
    model: GPTModel, rows: int, length: int, kv_dtype: str | None = None
) -> tuple[Rooms, Rooms]:
    """For keys, and for values."""
    c = model.config
    shapes = ((rows, c.n_kv_heads, length, width) for width in (c.head_dim, c.value_dim))
    k, v = (_room(model, shape, kv_dtype) for shape in shapes)
    return k, v


def _latent_rooms(
    model: GPTModel, rows: int, length: int, kv_dtype: str | None = None
) -> tuple[Rooms, Rooms]:
    """For latents, whose last L numbers are values as well: those are None."""
    assert kv_dtype is None, kv_dtype
    shape = rows, 1, length, model.config.cache_dim
    return _room(model, shape, None), dict.fromkeys(model.layers)


class Filling:
    """What one call of `hidden` needs to fill slots [n] of k, v [N, G, P, D] with prompts; or of
    latents k [N, 1, P, R + L], where v are None."""

    of_latents = False  # a prompt's tokens see each other's keys and values

    def __init__(
        self,
        k: Rooms,
        v: Rooms,
        slots: torch.Tensor,
        longest: int,
    ):
        self.k, self.v, self.slots, self.longest = k, v, slots, longest

    def positions(self, T: int) -> torch.Tensor:
        return torch.arange(T, device=self.slots.device)[None]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        latent: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """latent [n, 1, T, R + L]: what k and v were made of, if they were."""
        at, values = (self.slots, slice(None), slice(q.shape[2])), self.v[layer]
        if values is None:
            assert latent is not None, "of a model whose cache has no room for values"
            store(self.k[layer], at, latent)
        else:
            k, v = store(self.k[layer], at, k), store(values, at, v)
        return attend(q, k, v, causal=True, **options)


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> torch.Tensor:
    """Attention over the union of two disjoint sets of keys, from that over each [B, H, T, D] and
    the log-sum-exp of its scores [B, H, T]."""
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    return torch.lerp(out_b, out_a, share.to(out_a.dtype))  # float32 inside


class GoingOn:
    """What one call of `hidden` needs for rows that go on from a prefix, whose keys and values are
    k, v [1, G, P, D] of each layer. longest: tokens of the prefix and the longest row."""

    of_latents = False

    def __init__(self, k: Rooms, v: Rooms, longest: int):
        self.k, self.v, self.longest = k, v, longest
        some: Room = next(iter(k.values()))
        self.prefix_len, self.device = some.shape[2], some.device

    def positions(self, T: int) -> torch.Tensor:
        return self.prefix_len + torch.arange(T, device=self.device)[None]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window: int | None = None,
        latent: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """q [B, H, T, D] over the prefix and the rows' own k, v [B, G, T, D], causally."""
        if window is not None and window < self.prefix_len + q.shape[2]:
            return self._attend_window(layer, q, k, v, window, options)
        own = attend(q, k, v, causal=True, lse=True, **options)
        return merge_attention(*self._attend_prefix(layer, q, options), *own)

    def _attend_prefix(self, layer, q, options) -> tuple[torch.Tensor, torch.Tensor]:
        """All queries of all rows see the whole prefix: one product without a mask."""
        B, H, T, D = q.shape
        queries = q.transpose(1, 2).reshape(1, B * T, H, D).transpose(1, 2)  # a view
        k, v = (read(x[layer], q.dtype) for x in (self.k, self.v))
        out, lse = attend(queries, k, v, causal=False, lse=True, **options)
        out = out.transpose(1, 2).reshape(B, T, H, -1).transpose(1, 2)
        return out, lse.view(H, B, T).transpose(0, 1)

    def _attend_window(self, layer, q, k, v, window, options):
        """With a window in reach: prefix and own keys side by side under a dense mask."""
        B, T = q.shape[0], q.shape[2]
        key = torch.arange(self.prefix_len + T, device=q.device)
        query = key[self.prefix_len :, None]
        seen = (key <= query) & (query - key < window)
        before = (read(x[layer], q.dtype).expand(B, -1, -1, -1) for x in (self.k, self.v))
        k, v = (torch.cat(parts, dim=2) for parts in zip(before, (k, v)))
        return attend(q, k, v, causal=False, mask=seen, **options)


class PrefixCache(GoingOn):
    """One prefix of `prefix_len` tokens, for rows that go on from it in as many batches as wanted:
    nothing is kept of a row. longest: the model's context unless given."""

    def __init__(self, model: GPTModel, prefix_len: int, longest: int | None = None):
        k, v = _rooms(model, 1, prefix_len)
        super().__init__(k, v, model.max_positions if longest is None else longest)

    def filling(self) -> Filling:
        slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Filling(self.k, self.v, slots, self.longest)


class GoingOnIn(GoingOn):
    """The same for rows whose keys and values are kept: in own_k, own_v [B, G, S, D] at `rows`."""

    def __init__(self, cache: "DecodeCache", slot: int, length: int, rows: torch.Tensor):
        at = slice(slot, slot + 1), slice(None), slice(length)
        k = {layer: own[at] for layer, own in cache.prompt_k.items()}
        v = {layer: own[at] for layer, own in cache.prompt_v.items()}
        super().__init__(k, v, cache.longest)
        self.own_k, self.own_v, self.rows = cache.k, cache.v, rows

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """`GoingOn.attend`, of which k and v stay."""
        at = self.rows, slice(None), slice(q.shape[2])
        k, v = store(self.own_k[layer], at, k), store(self.own_v[layer], at, v)
        return super().attend(layer, q, k, v, **options)


class DecodeCache:
    """Prompts, kept once each, and the own tokens of rows that go on from them, one a step. Where
    prompts of many rows begin alike, that beginning is the prompt here, and what a row's own prompt
    adds to it are the first of its own tokens (`going_on`).

    For each layer: prompt_k, prompt_v [N, G, P, D], of which prompt_lengths [N] are filled; k, v
    [B, G, S, D], of which lengths [B] are. Latents lie in prompt_k and k, [., 1, ., R + L], and
    there are no v. kv_dtype: of keys and values, "int8" or "fp8", instead of the model's. A decode
    step is captured once as a CUDA graph: what changes from step to step stays in the same tensors
    and is changed in place.
    """

    def __init__(
        self,
        model: GPTModel,
        n_prompts: int,
        prompt_len: int,
        n_rows: int,
        max_len: int,
        longest: int | None = None,
        kv_dtype: str | None = None,
    ):
        def integers(n):
            return torch.zeros(n, dtype=torch.int64, device=model.device)

        c = model.config
        self.dtype, self.device = model.dtype, model.device
        self.of_latents = c.kv_lora_rank is not None
        self.heads_per_key = c.n_heads if self.of_latents else c.n_heads // c.n_kv_heads
        self.value_dim = c.kv_lora_rank or c.value_dim
        rooms = _latent_rooms if self.of_latents else _rooms
        self.n_prompts, self.prompt_len, self.max_len = n_prompts, prompt_len, max_len
        self.read_limit, self.longest = max_len, longest or prompt_len + max_len
        self.prompt_k, self.prompt_v = rooms(model, n_prompts, prompt_len, kv_dtype)
        self.k, self.v = rooms(model, n_rows, max_len, kv_dtype)
        self.prompt_lengths = integers(n_prompts)
        self.lengths, self.row_prompt = integers(n_rows), integers(n_rows)
        self.tiles = self._plan_tiles([0] * n_rows).to(model.device)

    # Prompts

    def filling(self, slots: list[int], lengths: list[int]) -> Filling:
        """For one call of `hidden`, whose rows are these slots' prompts of so many tokens."""
        return Filling(self.prompt_k, self.prompt_v, self.set_lengths(slots, lengths), self.longest)

    def set_lengths(self, slots: list[int], lengths: list[int]) -> torch.Tensor:
        """How many tokens of these slots are filled: 0 for a prompt of one token, which is the
        first that its rows are given. Returns slots on the device."""
        where = torch.tensor(slots, device=self.device)
        self.prompt_lengths[where] = torch.tensor(lengths, device=self.device)
        return where

    def going_on(self, slot: int, length: int, rows: list[int]) -> GoingOnIn:
        """For one call of `hidden`, whose rows are the first own tokens of these rows, which go on
        from a slot's prompt of so many tokens, one at least; `start` says how many they are. Not
        for latents: a prompt's are not expanded here."""
        assert not self.of_latents and length, (self.of_latents, length)
        return GoingOnIn(self, slot, length, torch.tensor(rows, device=self.device))

    # Rows

    def assign(self, prompts: Sequence[int] | np.ndarray) -> None:
        """prompts [B]: the slot that each row goes on from, with the tokens of its own it has."""
        self.row_prompt.copy_(torch.as_tensor(prompts))
        self.group_rows(prompts)

    def group_rows(
        self, prompts: Sequence[int] | np.ndarray, staging: torch.Tensor | None = None
    ) -> None:
        """Group rows by their prompts [B] for the kernel. staging: a tensor of `new_staging`, free
        until the copy has run; with it nobody waits."""
        tiles = self._plan_tiles(prompts)
        if staging is not None:
            tiles = staging.copy_(tiles)
        self.tiles.copy_(tiles, non_blocking=staging is not None)

    def new_staging(self, pin_memory: bool) -> torch.Tensor:
        return torch.zeros(self.tiles.shape, dtype=self.tiles.dtype, pin_memory=pin_memory)

    def start(self, rows: torch.Tensor, prompts: torch.Tensor, own: torch.Tensor | int = 0) -> None:
        """On the device: where rows [B] is True, a row is on slot prompts [B], with own [B] tokens
        of its own."""
        self.lengths.copy_(torch.where(rows, own, self.lengths))
        self.row_prompt.copy_(torch.where(rows, prompts.to(torch.int64), self.row_prompt))

    def advance(self, active: torch.Tensor) -> None:
        """On the device: rows grow by active [B], 0 or 1. A full row keeps its last slot, and
        writes on in it until the host gives it away."""
        self.lengths.copy_((self.lengths + active).clamp(max=self.max_len - 1))

    def read_at_most(self, tokens: int) -> None:
        """No row has more own tokens, the next one included: plain torch reads no further."""
        self.read_limit = tokens

    def positions(self, T: int) -> torch.Tensor:
        ahead = torch.arange(T, device=self.device)[None]
        return (self.prompt_lengths[self.row_prompt] + self.lengths)[:, None] + ahead

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """q [B, H, 1, D] over everything before it and k, v [B, G, 1, D], which are stored; q of
        latents k, whose last numbers v are, where those are kept."""
        assert q.shape[2] == 1, f"rows take one token at a time, not {q.shape[2]}"
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        own = self.k[layer], self.v[layer], self.lengths
        prompts = self.prompt_k[layer], self.prompt_v[layer], self.prompt_lengths
        where = self.row_prompt, self.tiles, self.read_limit
        return decode_attention(q, k, v, own, prompts, *where, **options)[:, :, None]

    def _plan_tiles(self, prompts) -> torch.Tensor:
        """Rows that continue the same prompt, together: see gpu_kernels/decode_attention.py."""
        return plan_tiles(prompts, self.n_prompts, self.heads_per_key, self.dtype, self.value_dim)

"""Attention: which kernel runs, and the modules around it.

    y = attend(q, k, v, causal=True, window=4096)    # [B, H, T, E]; all but a decode step
    y, lse = attend_segments(q, k, v, queries, keys, causal=True)    # sequences laid end to end
    y = Attention(config, layer)(x, rope)            # [B, T, C] -> [B, T, C]
    y = LatentAttention(config, layer)(x, rope)

Shapes: B sequences, T tokens, C d_model, H query heads, G key/value heads, D head_dim, E of values
"""

import itertools
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import GPTConfig
from gpu_kernels import elementwise
from modeling.mlp import Linear
from modeling.norms import head_norm, latent_norm
from modeling.rotary import rotate_both

DENSE_BYTES = 2**30  # of attention's scores, where no kernel computes them block by block
BLOCK = 128  # queries, and keys, of a block that flex attention skips whole


class Cache(Protocol):
    """What the modules ask of keys and values already computed: see backends/kvcache.py."""

    longest: int  # tokens that a row may reach, those before it included
    of_latents: bool  # its keys are latents: queries must come absorbed

    def positions(self, T: int) -> Tensor: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor: ...


class DocumentMask:
    """Causal attention that ends at the borders of documents: what `attend` takes as its mask.

    starts [B, T] int64: the column in which each token's document begins, which never falls along a
    row. window: keys that a query sees at most. It is made once a batch, outside of what is
    compiled, and shared by the layers of that window.
    """

    def __init__(self, starts: Tensor, window: int | None = None):
        T = starts.shape[1]
        self.first_key = starts  # that each query sees
        if window is not None and window < T:
            reach = torch.arange(1 - window, T + 1 - window, device=starts.device)
            self.first_key = torch.maximum(starts, reach)
        # on the CPU there is no kernel by blocks, and all layers share the dense form
        self.blocks = _document_blocks(self.first_key) if starts.is_cuda else None
        self._dense = None if starts.is_cuda else self._make_dense()

    def dense(self) -> Tensor:
        """[B, 1, T, T], True where a query sees a key."""
        return self._make_dense() if self._dense is None else self._dense

    def _make_dense(self) -> Tensor:
        i = torch.arange(self.first_key.shape[1], device=self.first_key.device)
        return ((i <= i[:, None]) & (i >= self.first_key[:, :, None]))[:, None]


def _document_blocks(first_key: Tensor) -> Any:
    """The BlockMask of queries that see the keys from first_key [B, T] to their own. Along a row
    first_key never falls, so that a block's first and last query tell of all between them."""
    from torch.nn.attention.flex_attention import BlockMask

    T, device = first_key.shape[1], first_key.device
    first = torch.arange(0, T, BLOCK, device=device)  # column of each block
    last = (first + BLOCK - 1).clamp(max=T - 1)
    below = first < first[:, None]  # [queries, keys] in blocks: all keys come before
    inside = first[:, None] + BLOCK <= T  # the kernel looks at each query of a block that is not
    whole = below & inside & (first_key[:, last, None] <= first)
    partly = (below | (first == first[:, None])) & (first_key[:, first, None] <= last) & ~whole

    def listed(blocks):
        """How many each block of queries sees, [B, 1, n], and which, [B, 1, n, n]: those first."""
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    (count, which), (count_whole, which_whole) = listed(partly), listed(whole)
    return BlockMask.from_kv_blocks(
        count,
        which,
        count_whole,
        which_whole,
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: (j <= i) & (j >= first_key[b, i]),
        seq_lengths=(T, T),
    )


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: Literal[False] = False,
    mask: Tensor | DocumentMask | None = None, dropout: float = 0.0,
) -> Tensor: ...  # fmt: skip


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: Literal[True], mask: Tensor | DocumentMask | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attend(  # so many parameters, since they are the terms of attention itself
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: bool = False, mask: Tensor | DocumentMask | None = None,
    dropout: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [B, H, T, D] over k [B, G, S, D], v [B, G, S, E]: [B, H, T, E] in q's dtype.

    Which kernel runs is decided here, for all but the decode step (gpu_kernels/decode_attention).
    causal: a query sees itself and the keys before it (S = T), with a window no more than `window`
    keys. mask [T, S] or [B, 1, T, S]: True where a query sees a key, or a DocumentMask; instead of
    causal and window.
    scale: of the products, D ** -0.5 unless given. softcap: scores become softcap * tanh(score /
    softcap). lse: (out, log-sum-exp of the scores [B, H, T] float32), so that parts over disjoint
    keys can be merged.
    """
    D, E = q.shape[-1], v.shape[-1]
    if q.is_cuda and D != E:  # its fast kernels know one width: zeros change no score and no sum
        terms: dict[str, Any] = {"window": window, "softcap": softcap, "mask": mask}
        terms |= {
            "causal": causal,
            "dropout": dropout,
            "scale": D**-0.5 if scale is None else scale,
        }
        q, k, v = (
            F.pad(x, (0, n)) if n > 0 else x for x, n in ((q, E - D), (k, E - D), (v, D - E))
        )
        if lse:
            out, sums = attend(q, k, v, lse=True, **terms)
            return out[..., :E], sums
        return attend(q, k, v, **terms)[..., :E]
    T, capped = q.shape[2], softcap is not None
    causal = causal and mask is None
    reach = window if causal and window is not None and window < T else None
    plain = mask is None and reach is None and not (capped or dropout)
    if lse and plain and q.is_cuda and q.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, sums, *_ = flash(q, k, v, 0.0, causal, scale=scale)
        return out, sums[..., :T]
    # flex's kernel for 256 channels of float32 is compiled for minutes, if it ever ends
    blocks = q.is_cuda and not (lse or dropout or (q.dtype == torch.float32 and q.shape[-1] > 128))
    if isinstance(mask, DocumentMask):
        if blocks:
            return _flex_attention(q, k, v, mask.blocks, softcap, scale)
        mask = mask.dense()
    if causal and (reach is not None or capped) and blocks:
        return _flex_attention(q, k, v, _window_blocks(T, reach, q.device), softcap, scale)
    if causal and (reach is not None or capped or lse):
        i = torch.arange(T, device=q.device)
        mask = i[:, None] >= i
        if reach is not None:
            mask = mask & (i[:, None] - i < reach)
    if capped or lse:  # which scaled_dot_product_attention does not know
        out, sums = _dense_attention(q, k, v, mask, softcap, scale, dropout)
        return (out, sums) if lse else out
    gqa, causal = q.shape[1] != k.shape[1], causal and mask is None
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )


class Segments(NamedTuple):
    """Where sequences begin that are laid end to end. starts [S + 1] int32: the last is where they
    end. longest: tokens of one at most."""

    starts: Tensor
    longest: int


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `attend`'s, of q [1, H, N, D] over k, v [1, G, M, D], sequences end to end:
    those of a segment of queries see the keys of the segment of the same number, none of which is
    empty. What a segment gives depends on no other one."""
    if q.is_cuda and q.dtype != torch.float32:
        flash = torch.ops.aten._flash_attention_forward
        flat = (x[0].transpose(0, 1) for x in (q, k, v))
        most = max(queries.longest, 2), keys.longest  # of one, it may be taken for a decode step
        terms = queries.starts, keys.starts, *most, 0.0, causal, False
        out, lse, *_ = flash(*flat, *terms, scale=scale)
        return out.transpose(0, 1)[None], lse[None, :, : q.shape[2]]
    parts = []
    spans = zip(*(itertools.pairwise(of.starts.tolist()) for of in (queries, keys)))
    for (start, stop), (first, last) in spans:
        own, k_own, v_own = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        parts.append(attend(own, k_own, v_own, causal=causal, scale=scale, lse=True))
    outs, sums = zip(*parts)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _dense_attention(q, k, v, mask, softcap, scale, dropout):
    """(out, lse) with all scores [B, H, T, S] in memory, in float32; without gradients those of as
    many queries as DENSE_BYTES hold."""
    (B, H, T, D), S = q.shape, k.shape[2]
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    scale, k, v = D**-0.5 if scale is None else scale, k.float(), v.float()
    step = T if torch.is_grad_enabled() else min(T, max(1, DENSE_BYTES // (4 * B * H * S)))
    parts = []
    for start in range(0, T, step):
        scores = (q[:, :, start : start + step].float() @ k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start : start + step, :], float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        if dropout:
            weights = F.dropout(weights, dropout)
        parts.append(((weights @ v).to(q.dtype), lse))
    if len(parts) == 1:
        return parts[0]
    outs, sums = zip(*parts)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


Mask = Tensor | DocumentMask | None  # of one layer: see attend
_BLOCK_MASKS, _COMPILED = {}, {}


def _window_blocks(T: int, window: int | None, device: torch.device) -> Any:
    """The BlockMask of causal attention: blocks out of the window are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = (T, window, device)
    if key not in _BLOCK_MASKS:
        mask = lambda b, h, i, j: i >= j  # noqa: E731
        if window is not None:
            mask = lambda b, h, i, j: (i >= j) & (i - j < window)  # noqa: E731
        _BLOCK_MASKS[key] = create_block_mask(mask, None, None, T, T, device=device)
    return _BLOCK_MASKS[key]


def _flex_attention(q, k, v, blocks, softcap, scale):
    """Attention by blocks, of the BlockMask `blocks`."""
    from torch.nn.attention.flex_attention import flex_attention

    flex = flex_attention
    if not torch.compiler.is_compiling():  # what compiles the model compiles this with it
        if "flex" not in _COMPILED:
            _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
        flex = _COMPILED["flex"]
    capped = None
    if softcap is not None:
        capped = lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)  # noqa: E731
    return flex(
        q, k, v, score_mod=capped, block_mask=blocks, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def attention_of(config: GPTConfig, layer: int) -> dict[str, Any]:
    """What sets a layer's attention apart: options of `attend`, which every cache is given too."""
    scale = config.attention_scale
    if scale is None and config.kv_lora_rank is not None:  # not of the latents' width
        scale = config.head_dim**-0.5
    return {
        "window": config.layer_window(layer),
        "softcap": config.attention_softcap,
        "scale": scale,
    }


def attention_without_plans() -> AbstractContextManager[None]:
    """Within it, attention takes many shapes well: cuDNN, which PyTorch prefers on Hopper, first
    makes a plan for each new one, a tenth of a second that only repeated shapes pay back."""
    kinds = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return sdpa_kernel(list(kinds))


# ---------------------------------------------------------------------------------------------
# The modules. Names and registration order of Attention's are rosetrainer's


def turns_normed(config: GPTConfig) -> bool:
    """Whether heads are normed and turned by one kernel, where there is one."""
    c = config
    whole = c.qk_norm_over == "head" and c.position == "rope" and c.rotary_fraction == 1.0
    plain = c.qk_norm_type == "rmsnorm" and c.norm_weight
    return c.qk_norm and not c.qk_norm_after_rope and whole and plain


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.options = attention_of(config, layer)
        inner = config.n_heads * config.head_dim
        self.qkv_proj = Linear(config.d_model, config.qkv_dim, bias=config.qkv_bias)  # [q; k; v]
        self.out_proj = Linear(inner, config.d_model, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = head_norm(config, config.n_heads)
            self.k_norm = head_norm(config, config.n_kv_heads)
        self.turns_normed = turns_normed(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        heads = self.qkv_proj(x).view(B, T, -1, c.head_dim)
        if c.clip_qkv is not None:
            heads = heads.clamp(-c.clip_qkv, c.clip_qkv)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=2)  # [B, T, heads, D]
        if self.turns_normed and rope is not None and elementwise.applies(q, q.dtype):
            norm, of_keys = self.q_norm, self.k_norm.weight
            assert norm.weight is not None and of_keys is not None, "turns_normed says so"
            terms = norm.weight, of_keys, norm.eps, norm.offset
            q = elementwise.rotate_(q, *rope, k, terms)  # and k, both in place
        else:
            q, k = self._turned(q, k, rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, **self.options)
        else:
            dropout = c.dropout if self.training else 0.0
            y = attend(q, k, v, causal=True, mask=mask, dropout=dropout, **self.options)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _turned(
        self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """q, k [B, T, heads, D], normalised and with their positions."""
        c = self.config
        if c.qk_norm and not c.qk_norm_after_rope:
            q, k = self._normed(q, k)
        if rope is not None:
            q, k = rotate_both(q, k, *rope)
        if c.qk_norm and c.qk_norm_after_rope:
            q, k = self._normed(q, k)
        return q, k

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B, T, heads, D], each normalised."""
        if self.config.qk_norm_over != "width":
            return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        flat = self.q_norm(q.flatten(2), q.dtype), self.k_norm(k.flatten(2), k.dtype)
        return flat[0].to(q.dtype).view_as(q), flat[1].to(k.dtype).view_as(k)


class LatentAttention(nn.Module):
    """Attention whose keys and values are made of one latent a token, [R + L] numbers: R channels
    of a key that know the position, the same in all heads, and L that each head makes the N other
    channels of its key and the E of its value from (DeepSeek-AI 2024).

    Where a cache keeps latents alone, nothing is made of them: a head's queries are taken through
    its key matrix instead, and its mixture of latents through its value matrix.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.options = attention_of(config, layer)
        assert c.kv_lora_rank and c.qk_nope_head_dim and c.qk_rope_head_dim
        self.R, self.L = c.qk_rope_head_dim, c.kv_lora_rank
        self.N, self.E = c.qk_nope_head_dim, c.value_dim
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, bias=False)
        else:
            self.q_down_proj = Linear(c.d_model, c.q_lora_rank, bias=c.qkv_bias)
            self.q_down_norm = latent_norm(c, c.q_lora_rank)
            self.q_up_proj = Linear(c.q_lora_rank, c.n_heads * c.head_dim, bias=False)
        self.kv_down_proj = Linear(c.d_model, self.R + self.L, bias=c.qkv_bias)
        self.kv_down_norm = latent_norm(c, self.L)
        self.kv_up_proj = Linear(self.L, c.n_heads * (self.N + self.E), bias=False)
        self.out_proj = Linear(c.n_heads * self.E, c.d_model, bias=c.o_bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self._queries(x).view(B, T, c.n_heads, c.head_dim)  # of each head [R; N]
        turned, latent = self.kv_down_proj(x).split([self.R, self.L], dim=-1)
        turned = turned[:, :, None]
        if rope is not None:
            q, turned = rotate_both(q, turned, *rope)
        latent = self._normed(self.kv_down_norm, latent)[:, :, None]
        if cache is not None and cache.of_latents:
            q, k = self._absorbed(q), torch.cat((turned, latent), dim=-1)  # [B, T, heads or 1, R+L]
            q, k, v = (x.transpose(1, 2) for x in (q, k, latent))
            y = self._values(cache.attend(self.layer, q, k, v, **self.options).transpose(1, 2))
            return self.out_proj(y.reshape(B, T, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, *self._expanded(turned, latent)))
        if cache is not None:
            kept = torch.cat((turned, latent), dim=-1).transpose(1, 2)
            y = cache.attend(self.layer, q, k, v, latent=kept, **self.options)
        else:
            dropout = c.dropout if self.training else 0.0
            y = attend(q, k, v, causal=True, mask=mask, dropout=dropout, **self.options)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _queries(self, x: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_up_proj(self._normed(self.q_down_norm, self.q_down_proj(x)))

    @staticmethod
    def _normed(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.contiguous(), x.dtype).to(x.dtype)

    def _expanded(self, turned: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, T, H, R + N], v [B, T, H, E] of the two parts of latents [B, T, 1, R], [.., L]."""
        made = self.kv_up_proj(latent).unflatten(-1, (-1, self.N + self.E)).squeeze(2)
        k, v = made.split([self.N, self.E], dim=-1)
        return torch.cat((turned.expand(-1, -1, k.shape[2], -1), k), dim=-1), v

    def _matrices(self) -> list[Tensor]:
        """What each head makes its key and its value with, [H, N, L] and [H, E, L]."""
        heads = self.kv_up_proj.weight.unflatten(0, (-1, self.N + self.E))
        return list(heads.split([self.N, self.E], dim=1))

    def _absorbed(self, q: Tensor) -> Tensor:
        """Queries [B, T, H, R + N] of expanded keys as queries of latents [B, T, H, R + L]."""
        turned, plain = q.split([self.R, self.N], dim=-1)
        absorbed = torch.einsum("bthn,hnl->bthl", plain, self._matrices()[0])
        return torch.cat((turned, absorbed), dim=-1)

    def _values(self, mixed: Tensor) -> Tensor:
        """[B, T, H, E] of mixtures of latents [B, T, H, L]."""
        return torch.einsum("bthl,hel->bthe", mixed, self._matrices()[1])

"""One decoder-only transformer, built from a GPTConfig, whose fields are its features.

    model = GPTModel(load_config("gpt2"))
    logits, loss = model(input_ids, labels=input_ids)      # as rosetrainer's model
    hidden = model.hidden(input_ids)                       # [B, T, C], float32
    logits = model.logits(hidden)                          # [..., V]; scoring.py feeds it in chunks

Shapes: B sequences, T tokens, C d_model, H query heads, G key/value heads, D head_dim, V vocabulary

Numerics: the residual stream, the norms and the softmax are float32. Linear layers and attention
run in their weights' dtype (`for_inference` casts the weights once) or, in training, autocast's.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from config import VOCAB_MULTIPLE, GPTConfig
from gpu_kernels import elementwise
from gpu_kernels.cross_entropy import IGNORE, cross_entropy, head_cross_entropy
from mlp import MLP, Linear, Mixture
from rotary import angles, is_long, rope_tables, rotate

LATENT_EPS = 1e-6  # of the norms within latent attention, whatever norm_eps says
HEAD_ROWS = 1024  # of logits that a soft cap holds in float32 at once
DENSE_BYTES = 2**30  # of attention's scores, where no kernel computes them block by block


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, in float32, of x [..., width]. With weight w:
    times w, or 1 + w. heads: x [..., heads, width], with a weight of its own for each head."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: GPTConfig, width: int, kind: str, bias: bool, heads: int = 1):
        super().__init__()
        self.layer_norm, self.eps, self.offset = kind == "layernorm", config.norm_eps, 0.0
        self.width, self.heads = width, heads
        if config.norm_weight:
            self.offset = 1.0 if config.norm_offset else 0.0
            self.weight = nn.Parameter(torch.full((heads * width,), 1.0 - self.offset))
        else:
            self.register_parameter("weight", None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """float32; or in `dtype`, that of the products it goes into, where one kernel does both."""
        fits = self.heads == 1 and self.width <= elementwise.MAX_WIDTH
        if dtype is not None and fits and elementwise.applies(x, dtype):
            rms, offset = not self.layer_norm, self.offset
            return elementwise.norm(
                x, self.weight, self.bias, self.eps, rms=rms, offset=offset, dtype=dtype
            )
        x, shape = x.float(), (self.width,)
        weight: Tensor | None = self.weight
        if weight is not None and self.offset:
            weight = weight + self.offset
        own = None if self.heads == 1 or weight is None else weight.view(self.heads, self.width)
        shared = weight if own is None else None
        if self.layer_norm:
            x = F.layer_norm(x, shape, shared, self.bias, self.eps)
        else:
            x = F.rms_norm(x, shape, shared, self.eps)
        return x if own is None else x * own


def stream_norm(config: GPTConfig, wanted: bool = True) -> nn.Module:
    """A norm [..., C] of the residual stream or of what is added to it; nothing if not wanted."""
    if not wanted:
        return nn.Identity()
    return Norm(config, config.d_model, config.norm, config.norm_bias)


def head_norm(config: GPTConfig, heads: int) -> Norm:
    """A norm of queries or keys [..., heads, D]; over the width of all heads [..., heads * D]."""
    kind, over = config.qk_norm_type, config.qk_norm_over
    width = config.head_dim * (heads if over == "width" else 1)
    return Norm(config, width, kind, bias=False, heads=heads if over == "heads" else 1)


def latent_norm(config: GPTConfig, width: int) -> Norm:
    """A norm of what latent attention compresses [..., width]."""
    norm = Norm(config, width, "rmsnorm", bias=False)
    norm.eps = LATENT_EPS
    return norm


# ---------------------------------------------------------------------------------------------
# Attention


class Cache(Protocol):
    """What the modules ask of keys and values already computed: see backends/kvcache.py."""

    longest: int  # tokens that a row may reach, those before it included
    of_latents: bool  # its keys are latents: queries must come absorbed

    def positions(self, T: int) -> Tensor: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: Literal[False] = False, mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor: ...  # fmt: skip


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: Literal[True], mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attend(  # so many parameters, since they are the terms of attention itself
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, lse: bool = False, mask: Tensor | None = None, dropout: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [B, H, T, D] over k [B, G, S, D], v [B, G, S, E]: [B, H, T, E] in q's dtype.

    Which kernel runs is decided here, for all but the decode step (gpu_kernels/decode_attention).
    causal: a query sees itself and the keys before it (S = T), with a window no more than `window`
    keys. mask [T, S] or [B, 1, T, S]: True where a query sees a key, instead of causal and window.
    scale: of the products, D ** -0.5 unless given. softcap: scores become softcap * tanh(score /
    softcap). lse: (out, log-sum-exp of the scores [B, H, T] float32), so that parts over disjoint
    keys can be merged.
    """
    if q.is_cuda and (spare := q.shape[-1] - v.shape[-1]) > 0:  # its fast kernels know one width
        v = F.pad(v, (0, spare))
        terms: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
        terms |= {"causal": causal, "mask": mask, "dropout": dropout}
        if lse:
            out, sums = attend(q, k, v, lse=True, **terms)
            return out[..., :-spare], sums
        return attend(q, k, v, **terms)[..., :-spare]
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
    if causal and (reach is not None or capped) and blocks:
        return _flex_attention(q, k, v, reach, softcap, scale)
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


_BLOCK_MASKS, _COMPILED = {}, {}


def _flex_attention(q, k, v, window, softcap, scale):
    """Causal attention by blocks: those out of the window are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, gqa, mask = q.shape[2], q.shape[1] != k.shape[1], lambda b, h, i, j: i >= j
    if window is not None:
        mask = lambda b, h, i, j: (i >= j) & (i - j < window)  # noqa: E731
    key = (T, window, q.device)
    if key not in _BLOCK_MASKS:
        _BLOCK_MASKS[key] = create_block_mask(mask, None, None, T, T, device=q.device)
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    capped = None
    if softcap is not None:
        capped = lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)  # noqa: E731
    return _COMPILED["flex"](
        q, k, v, score_mod=capped, block_mask=_BLOCK_MASKS[key], scale=scale, enable_gqa=gqa
    )


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


def inductor_options() -> dict:
    """torch.compile's `options` wherever this project compiles: kernels chosen by rule. Left alone,
    inductor picks reductions by timing them, so that two processes, and with them two world sizes,
    could sum in another order."""
    import torch._inductor.config as inductor  # half of the start-up, needed to compile only

    options = {"triton.autotune_pointwise": False}
    return options | ({"deterministic": True} if hasattr(inductor, "deterministic") else {})


# ---------------------------------------------------------------------------------------------
# The model. Names and registration order are rosetrainer's, so its optimizer states fit as well


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

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: list[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        heads = self.qkv_proj(x).view(B, T, -1, c.head_dim)
        if c.clip_qkv is not None:
            heads = heads.clamp(-c.clip_qkv, c.clip_qkv)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=2)  # [B, T, heads, D]
        if c.qk_norm and not c.qk_norm_after_rope:
            q, k = self._normed(q, k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if c.qk_norm and c.qk_norm_after_rope:
            q, k = self._normed(q, k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, **self.options)
        else:
            own = None if mask is None else mask[self.layer]
            dropout = c.dropout if self.training else 0.0
            y = attend(q, k, v, causal=True, mask=own, dropout=dropout, **self.options)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B, T, heads, D], each normalised."""
        if self.config.qk_norm_over != "width":
            return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        flat = self.q_norm(q.flatten(2)), self.k_norm(k.flatten(2))
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
        mask: list[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self._queries(x).view(B, T, c.n_heads, c.head_dim)  # of each head [R; N]
        turned, latent = self.kv_down_proj(x).split([self.R, self.L], dim=-1)
        turned = turned[:, :, None]
        if rope is not None:
            q, turned = rotate(q, *rope), rotate(turned, *rope)
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
            own = None if mask is None else mask[self.layer]
            dropout = c.dropout if self.training else 0.0
            y = attend(q, k, v, causal=True, mask=own, dropout=dropout, **self.options)
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


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config = config
        self.ln1 = stream_norm(config, config.pre_norm)
        self.ln2 = stream_norm(config, config.pre_norm and not config.shared_norm)
        kind = Attention if config.kv_lora_rank is None else LatentAttention
        self.attn = kind(config, layer)
        mixture = config.layer_experts(layer) > 0
        self.mlp = Mixture(config) if mixture else MLP(config, config.d_ff)
        self.ln1_post = stream_norm(config, config.post_norm)
        self.ln2_post = stream_norm(config, config.post_norm)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: list[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        c, h = self.config, self._normed(self.ln1, x)
        y = x + self._branch(self.ln1_post(self.attn(h, rope, mask, cache)))
        if not c.shared_norm:
            h = self._normed(self.ln2, x if c.parallel_residual else y)
        return y + self._branch(self.ln2_post(self.mlp(h)))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """What goes into a branch."""
        return norm(x, self.mlp.dtype) if isinstance(norm, Norm) else norm(x)

    def _branch(self, y: Tensor) -> Tensor:
        """What a branch adds to the residual stream."""
        y, scale = self.dropout(y), self.config.residual_scale
        return y if scale == 1.0 else y * scale


class _WithoutInit(TorchFunctionMode):
    """torch.nn.init does nothing within: on meta, drawing numbers would import all of dynamo."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class GPTModel(nn.Module):
    """See the file's docstring. `activation_checkpointing` recomputes blocks in the backward."""

    # transformers' models, behind the same interface, say False
    is_native: Literal[True] = True
    supports_cache: Literal[True] = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.ln_embedding = stream_norm(config, config.embedding_norm)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = stream_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        self._padded_head: Tensor | None = None
        # rounded as the embeddings are: Gemma was trained with 59.75 for the root of 3584
        self.embedding_scales = {
            dtype: torch.tensor(config.embedding_scale, dtype=dtype, device="cpu").item()
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }
        self._init_weights()
        self.materialize_buffers(self.lm_head.weight.device)

    @classmethod
    def on_meta(cls, config: GPTConfig) -> "GPTModel":
        """The model without weights: shapes alone, until `allocate` makes room for them."""
        with torch.device("meta"), _WithoutInit():
            return cls(config)

    def _init_weights(self):
        """GPT-2's: N(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2L)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def materialize_buffers(self, device: torch.device | str) -> None:
        """Rotary frequencies on `device`; called again after a model was built on meta."""
        with torch.device("cpu"):
            tables = rope_tables(self.config)
        self.rope_factors = {kind: factor for kind, (_, factor) in tables.items()}
        for kind, (frequencies, _) in tables.items():
            self.register_buffer(f"rope_{kind}", frequencies.to(device), persistent=False)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the head, and so of the keys and values that a cache holds."""
        return self.lm_head.weight.dtype

    def inference_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of every parameter in evaluation: norms, and what decides between experts,
        stay float32, all else `dtype`."""
        norms = {name for name, module in self.named_modules() if isinstance(module, Norm)}

        def stays(name):
            module, _, leaf = name.rpartition(".")
            return module in norms or leaf == "choice_bias"

        return {
            name: torch.float32 if stays(name) else dtype for name, _ in self.named_parameters()
        }

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Room on `device` for the weights of a model that was built on meta, each once and in its
        dtype of evaluation."""
        dtypes = self.inference_dtypes(dtype)
        for name, p in list(self.named_parameters()):
            module, _, leaf = name.rpartition(".")
            place = torch.empty(p.shape, dtype=dtypes[name], device=device)
            setattr(self.get_submodule(module), leaf, nn.Parameter(place, requires_grad=False))
        if self.config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        self.materialize_buffers(device)

    @torch.no_grad()
    def for_inference(self, dtype: torch.dtype) -> "GPTModel":
        """Cast the weights once, freeze them, and lay the head out at a multiple of 64 rows.

        A tied embedding becomes a view of the padded head, so nothing is held twice; `state_dict`
        and parameter counts go on seeing the true vocabulary.
        """
        dtypes = self.inference_dtypes(dtype)
        for name, p in self.named_parameters():
            p.data = p.data.to(dtypes[name])
        head, V = self.lm_head.weight, self.config.vocab_size
        if V % VOCAB_MULTIPLE and head.is_cuda:
            self._padded_head = head.new_zeros(_padded(V), head.shape[1])
            self._padded_head[:V] = head
            head.data = self._padded_head[:V]
        return self.requires_grad_(False).eval()

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: list[Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, C], float32, of input_ids [B, T] int64.

        positions: [T] or [B, T], 0..T-1 unless given (or what the cache says). cache: keys and
        values already computed (backends/kvcache.py): an object with `positions(T)` and `attend`.
        mask: per-layer attention masks, only for left-padded input (`forward` makes them).
        """
        T = input_ids.shape[1]
        if positions is None and cache is not None:
            positions = cache.positions(T)
        elif positions is None:
            positions = torch.arange(T, device=input_ids.device)
        x = self.token_embedding(input_ids).float()
        if self.config.embedding_scale != 1.0:
            x = x * self.embedding_scales[self.token_embedding.weight.dtype]
        if self.config.position == "learned":
            x = x + self.position_embedding(positions).float()
        ropes = self._ropes(positions, T if cache is None else cache.longest)
        x = self.dropout(self.ln_embedding(x))
        for layer, block in enumerate(self.blocks):
            rope = ropes.get(self.config.layer_rope(layer))
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.ln_f(x)

    def _ropes(self, positions: Tensor, length: int) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin of these positions by kind of layer, in a pass that reaches `length`."""
        sources = {"global": "global", "local": "local"}
        ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
        if is_long(self.config, length):
            sources["global"] = "long"
        for kind, source in sources.items():
            if source in self.rope_factors:
                factor = self.rope_factors[source]
                ropes[kind] = angles(positions, getattr(self, f"rope_{source}"), factor)
        return ropes

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden [..., C], in the head's dtype (autocast's in training); float32 where
        a soft cap or a bias comes after the product."""
        logits = F.linear(*self._for_the_head(hidden))[..., : self.config.vocab_size]
        if self.lm_head.bias is not None:
            logits = logits.float() + self.lm_head.bias.float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats [N], float32, of targets [N] after hidden [N, C]; 0 where the target is -100."""
        if self.lm_head.bias is None and self.config.logit_softcap is None:
            return head_cross_entropy(*self._for_the_head(hidden), targets, self.config.vocab_size)
        if torch.is_grad_enabled():
            return F.cross_entropy(
                self.logits(hidden), targets, ignore_index=IGNORE, reduction="none"
            )
        rows = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS))
        V = self.config.vocab_size
        return torch.cat([cross_entropy(self.logits(h), t, V) for h, t in rows])

    def _for_the_head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, the head's weight), both in the dtype of their product. On CUDA the weight has
        rows beyond V, to a multiple of 64, whose logits mean nothing."""
        if self.config.logit_scale != 1.0:
            hidden = hidden.float() * self.config.logit_scale
        if self._padded_head is not None:
            return hidden.to(self._padded_head.dtype), self._padded_head
        weight, V = self.lm_head.weight, self.config.vocab_size
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        if V % VOCAB_MULTIPLE and weight.is_cuda:
            weight = F.pad(weight, (0, 0, 0, _padded(V) - V))
        return hidden.to(weight.dtype), weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits [B, T, V], loss). attention_mask [B, T]: 0 marks padding, on either side.

        Labels are shifted inside, as in rosetrainer: position t is scored on labels[t + 1]. -100
        and padding are left out; the loss is the mean over what remains, None without labels.
        """
        # rosetrainer's signature, for code written for it: nothing of ours passes an attention
        # mask, and the `mask` that the modules hand down is there for its left padding alone
        mask = None if attention_mask is None else self._padding_masks(attention_mask.bool())
        logits = self.logits(self.hidden(input_ids, mask=mask))
        if labels is None:
            return logits, None
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        shifted = logits[:, :-1].float().flatten(0, 1)
        return logits, F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)

    def _padding_masks(self, real: Tensor) -> list[Tensor] | None:
        """Bool masks [B, 1, T, T] by layer, None if causality alone hides the padding (right)."""
        if not (real[:, 1:] & ~real[:, :-1]).any():
            return None
        i = torch.arange(real.shape[1], device=real.device)
        distance = i[:, None] - i
        seen = (distance >= 0) & real[:, None, None, :]
        seen = seen | (distance == 0)  # a padded query sees itself: no empty softmax
        windows = [self.config.layer_window(layer) for layer in range(self.config.n_layers)]
        return [seen if w is None else seen & (distance < w) for w in windows]


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

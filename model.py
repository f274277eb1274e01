"""One decoder-only transformer for GPT-2 and Llama-style models, built from a GPTConfig.

    model = GPTModel(load_config("gpt2"))
    logits, loss = model(input_ids, labels=input_ids)      # as rosetrainer's model
    hidden = model.hidden(input_ids)                       # [B, T, C], float32
    logits = model.logits(hidden)                          # [..., V]; scoring.py feeds it in chunks

Shapes: B sequences, T tokens, C d_model, H query heads, G key/value heads, D head_dim, V vocabulary

Numerics: the residual stream, the norms and the softmax are float32. Linear layers and attention
run in their weights' dtype (`for_inference` casts the weights once) or, in training, autocast's.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from config import VOCAB_MULTIPLE, GPTConfig
from gpu_kernels.cross_entropy import head_cross_entropy
from gpu_kernels.decode_attention import decode_attention, merge_parts, plan_tiles


class Linear(nn.Linear):
    """nn.Linear that takes its input in any dtype: the weight's dtype decides."""

    def forward(self, x):
        if not torch.is_autocast_enabled(x.device.type):  # which casts x itself, without a detour
            x = x.to(self.weight.dtype)
        return F.linear(x, self.weight, self.bias)


def make_norm(config: GPTConfig, width: int, kind: str | None = None) -> nn.Module:
    if (kind or config.norm) == "rmsnorm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


# ---------------------------------------------------------------------------------------------
# Rotary positions


def rope_frequencies(config: GPTConfig) -> tuple[torch.Tensor, float]:
    """Angular frequency of each pair of channels [D/2], float32, and the factor on cos and sin.

    Plain (Su et al. 2021), linear interpolation, Llama 3's and YaRN's (Peng et al. 2023) scaling,
    with the meaning that Hugging Face gives to the keys of `rope_scaling`.
    """
    D, theta = config.head_dim, config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)  # over the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0
    return _yarn_frequencies(config, frequencies, scaling, original)


def _yarn_frequencies(config, frequencies, scaling, original):
    D, theta, factor = config.head_dim, config.rope_theta, scaling["factor"]

    def channel_turning(turns):  # the channel pair that turns so often over the original context
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = channel_turning(scaling.get("beta_fast") or 32)
    high = channel_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = (torch.arange(D // 2).float() - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0, 1)  # slow channels are interpolated, fast ones left alone

    def magnitude(scale, mscale=1.0):
        return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            attention_factor = magnitude(factor)
    return frequencies * (1 - interpolate) + frequencies / factor * interpolate, attention_factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, T, heads, D] turned by cos, sin [B or 1, T, 1, D/2]; channel i pairs with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# Attention


def causal_attention(q, k, v, window=None, dropout=0.0):
    """q [B, H, T, D] over k, v [B, G, T, D]: a query sees itself and the `window` - 1 before it."""
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or window >= T:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=gqa
        )
    if q.is_cuda and not dropout:
        return _flex_attention(q, k, v, T, window, gqa)
    i = torch.arange(T, device=q.device)
    near = (i[:, None] >= i) & (i[:, None] - i < window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=near, dropout_p=dropout, enable_gqa=gqa
    )


def attention_without_plans():
    """Within it, attention takes many shapes well: cuDNN, which PyTorch prefers on Hopper, first
    makes a plan for each new one, a tenth of a second that only repeated shapes pay back."""
    kinds = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return sdpa_kernel(list(kinds))


_BLOCK_MASKS, _COMPILED = {}, {}


def _flex_attention(q, k, v, T, window, gqa):
    """The sliding window as a block mask: blocks out of the window are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key = (T, window, q.device)
    if key not in _BLOCK_MASKS:
        _BLOCK_MASKS[key] = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device=q.device
        )
    if "flex" not in _COMPILED:
        _COMPILED["flex"] = torch.compile(flex_attention, dynamic=False)
    return _COMPILED["flex"](q, k, v, block_mask=_BLOCK_MASKS[key], enable_gqa=gqa)


def attention_with_lse(q, k, v, causal=False):
    """Attention and the log-sum-exp of its scores, so that parts over disjoint keys can be merged.

    q [B, H, T, D], k and v [B, H, S, D] or [B, G, S, D]. Returns out [B, H, T, D] and lse [B, H, T]
    float32.
    """
    if q.is_cuda and q.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse[..., : q.shape[2]]
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        T = q.shape[2]
        seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint sets of keys, from that over each [B, H, T, D]."""
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    return torch.lerp(out_b, out_a, share.to(out_a.dtype))  # float32 inside


class KVCache:
    """Keys and values already computed: prompts kept once each, then every row's own tokens.

    One prefix that all rows share, for scoring continuations of it, in as many batches as wanted:

        cache = KVCache(model, prefix_len=P)
        model.hidden(prefix_ids, cache=cache)   # [1, P]: fills the prefix
        model.hidden(ids, cache=cache)          # [B, T], right-padded: each row goes on from it

    Generation adds room for each row's own tokens, one a step, and possibly more prompts:

        cache = KVCache(model, prefix_len=P, batch_size=B, max_len=S, n_prefixes=N)
        cache.fill([2, 0], [9, 5])              # the next call fills prompts 2 and 0
        model.hidden(ids, cache=cache)          # [2, T], right-padded, T <= P
        cache.assign(row_prefix)                # [B]: the prompt that each row continues
        model.hidden(next_ids, cache=cache)     # [B, 1]: one decode step
        cache.lengths += 1                      # in place; a row starts anew at 0

    For each layer: prefix_k, prefix_v [N, G, P, D], of which prefix_lengths [N] are filled; k, v
    [B, G, S, D], of which `lengths` [B] are.
    """

    def __init__(self, model, prefix_len=0, batch_size=1, max_len=0, n_prefixes=1):
        c, weight = model.config, model.lm_head.weight

        def room(rows, length):
            shape = (rows, c.n_kv_heads, length, c.head_dim)
            return [weight.new_zeros(shape) for _ in range(c.n_layers)]

        def integers(n):
            return torch.zeros(n, dtype=torch.int64, device=weight.device)

        self.config, self.dtype, self.prefix_len = c, weight.dtype, prefix_len
        self.max_len = self.span = max_len  # span: at least lengths + 1; a CPU reads no further
        self.prefix_k, self.prefix_v = room(n_prefixes, prefix_len), room(n_prefixes, prefix_len)
        self.k, self.v = room(batch_size, max_len), room(batch_size, max_len)
        self.prefix_lengths = integers(n_prefixes)
        self.lengths, self.row_prefix = integers(batch_size), integers(batch_size)
        self.filling = None
        self.tiles = self.plan_tiles([0] * batch_size).to(weight.device)
        if prefix_len and n_prefixes == 1:
            self.fill([0], [prefix_len])

    def fill(self, slots, lengths) -> None:
        """The next call of `hidden` fills these prompts' slots with so many tokens each."""
        device = self.lengths.device
        self.filling = torch.tensor(slots, device=device)
        self.prefix_lengths[self.filling] = torch.tensor(lengths, device=device)

    def plan_tiles(self, row_prefix) -> torch.Tensor:
        """Rows that continue the same prompt, grouped for the kernel: see decode_attention.py."""
        c = self.config
        n_prefixes, R = len(self.prefix_lengths), c.n_heads // c.n_kv_heads
        return plan_tiles(row_prefix, n_prefixes, R, self.dtype)

    def assign(self, row_prefix) -> None:
        """row_prefix [B]: the prompt that each row continues from now on."""
        self.row_prefix.copy_(torch.as_tensor(row_prefix))
        self.tiles.copy_(self.plan_tiles(row_prefix))

    def positions(self, T: int, device) -> torch.Tensor:
        """Positions of the next T tokens: [1, T], or [B, T] where rows differ in length."""
        ahead = torch.arange(T, device=device)[None]
        if self.filling is not None:
            return ahead
        if self.max_len == 0:
            return self.prefix_len + ahead
        return (self.prefix_lengths[self.row_prefix] + self.lengths)[:, None] + ahead

    def end_of_call(self) -> None:
        if self.filling is not None:
            self.filling = None

    def attend(self, layer: int, q, k, v):
        """q [B, H, T, D] over everything before it and k, v [B, G, T, D] themselves."""
        T, window = q.shape[2], self.config.layer_window(layer)
        if self.filling is not None:
            self.prefix_k[layer][self.filling, :, :T] = k
            self.prefix_v[layer][self.filling, :, :T] = v
            return causal_attention(q, k, v, window)
        if self.max_len:
            return self._decode(layer, q, k, v, window)
        if window is not None and window < self.prefix_len + T:
            return self._attend_window(layer, q, k, v, window)
        own = attention_with_lse(q, k, v, causal=True)
        return merge_attention(*self._attend_prefix(layer, q), *own)

    def _decode(self, layer, q, k, v, window):
        assert q.shape[2] == 1, f"rows take one token at a time, not {q.shape[2]}"
        parts, lse = decode_attention(
            *(x[:, :, 0] for x in (q, k, v)),
            *(self.k[layer], self.v[layer], self.lengths),
            *(self.prefix_k[layer], self.prefix_v[layer], self.prefix_lengths),
            *(self.row_prefix, self.tiles, window or 0, self.span),
        )
        return merge_parts(parts, lse).to(q.dtype)[:, :, None]

    def _attend_prefix(self, layer, q):
        """All queries of all rows see the whole prefix: one product without a mask."""
        B, H, T, D = q.shape
        queries = q.transpose(1, 2).reshape(1, B * T, H, D).transpose(1, 2)  # a view
        out, lse = attention_with_lse(queries, self.prefix_k[layer], self.prefix_v[layer])
        out = out.transpose(1, 2).view(B, T, H, D).transpose(1, 2)
        return out, lse.view(H, B, T).transpose(0, 1)

    def _attend_window(self, layer, q, k, v, window):
        """With a window in reach: prefix and own keys side by side under a dense mask."""
        B, _, T, _ = q.shape
        key = torch.arange(self.prefix_len + T, device=q.device)
        query = key[self.prefix_len :, None]
        seen = (key <= query) & (query - key < window)
        k = torch.cat((self.prefix_k[layer].expand(B, -1, -1, -1), k), dim=2)
        v = torch.cat((self.prefix_v[layer].expand(B, -1, -1, -1), v), dim=2)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa)


# ---------------------------------------------------------------------------------------------
# The model. Names and registration order are rosetrainer's, so its optimizer states fit as well


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.window = config.layer_window(layer)
        inner = config.n_heads * config.head_dim
        self.qkv_proj = Linear(config.d_model, config.qkv_dim, bias=config.qkv_bias)  # [q; k; v]
        self.out_proj = Linear(inner, config.d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim, "rmsnorm")
            self.k_norm = make_norm(config, config.head_dim, "rmsnorm")

    def forward(self, x, rope=None, mask=None, cache=None):
        c, (B, T, _) = self.config, x.shape
        heads = self.qkv_proj(x).view(B, T, -1, c.head_dim)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=2)  # [B, T, heads, D]
        if c.qk_norm:
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropout = c.dropout if self.training else 0.0
        if cache is not None:
            y = cache.attend(self.layer, q, k, v)
        elif mask is not None:
            near, gqa = mask[self.layer], c.n_heads != c.n_kv_heads
            y = F.scaled_dot_product_attention(q, k, v, near, dropout_p=dropout, enable_gqa=gqa)
        else:
            y = causal_attention(q, k, v, self.window, dropout)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        width = 2 * config.d_ff if config.gated_mlp else config.d_ff  # [gate; up]
        self.fc1 = Linear(config.d_model, width, bias=config.bias)
        self.fc2 = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x):
        c, fc1 = self.config, self.fc1
        activation = ACTIVATIONS[c.activation]
        if c.gated_mlp:
            gate, up = fc1(x).chunk(2, dim=-1)
            return self.fc2(activation(gate) * up)
        if c.activation == "gelu_new" and c.bias and x.is_cuda and _is_half(fc1.weight):
            # cuBLAS applies bias and tanh GELU before it writes the product: one pass less
            rows = x.to(fc1.weight.dtype).flatten(0, -2)
            h = torch._addmm_activation(fc1.bias, rows, fc1.weight.t(), use_gelu=True)
            return self.fc2(h.view(*x.shape[:-1], -1))
        return self.fc2(activation(fc1(x)))


def _is_half(weight) -> bool:
    """True once the weights were cast for inference: training keeps them in float32."""
    return weight.dtype != torch.float32 and not weight.requires_grad


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln1 = make_norm(config, config.d_model)
        self.ln2 = make_norm(config, config.d_model)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.dropout(self.attn(self.ln1(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.ln2(x)))


class _WithoutInit(TorchFunctionMode):
    """torch.nn.init does nothing within: on meta, drawing numbers would import all of dynamo."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class GPTModel(nn.Module):
    """See the file's docstring. `activation_checkpointing` recomputes blocks in the backward."""

    is_native = True  # transformers' models, behind the same interface, say False
    supports_cache = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_experts:
            raise ValueError("GPTModel has no mixture of experts: transformers runs such models")
        self.config, self.activation_checkpointing = config, False
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = make_norm(config, config.d_model)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        self._padded_head = None
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
            elif p.dim() == 2:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def materialize_buffers(self, device) -> None:
        """Rotary frequencies on `device`; called again after a model was built on meta."""
        if self.config.position == "rope":
            with torch.device("cpu"):
                frequencies, self.rope_factor = rope_frequencies(self.config)
            self.register_buffer("rope", frequencies.to(device), persistent=False)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    # -- inference ----------------------------------------------------------------------------

    def inference_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of every parameter in evaluation: norms stay float32, all else `dtype`."""
        norms = (nn.LayerNorm, nn.RMSNorm)
        float32 = {name for name, module in self.named_modules() if isinstance(module, norms)}
        return {
            name: torch.float32 if name.rpartition(".")[0] in float32 else dtype
            for name, _ in self.named_parameters()
        }

    def allocate(self, dtype: torch.dtype, device) -> None:
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

    # -- forward ------------------------------------------------------------------------------

    def hidden(self, input_ids, positions=None, cache=None, mask=None) -> torch.Tensor:
        """Final hidden states [B, T, C], float32, of input_ids [B, T] int64.

        positions: [T] or [B, T], 0..T-1 unless given (or what the cache says). cache: a KVCache.
        mask: per-layer attention masks, only for left-padded input (`forward` makes them).
        """
        T = input_ids.shape[1]
        if positions is None and cache is not None:
            positions = cache.positions(T, input_ids.device)
        elif positions is None:
            positions = torch.arange(T, device=input_ids.device)
        x = self.token_embedding(input_ids).float()
        rope = None
        if self.config.position == "learned":
            x = x + self.position_embedding(positions).float()
        else:
            angles = positions.view(-1, T, 1).float() * self.rope  # [1 or B, T, D/2]
            cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
            rope = cos[:, :, None], sin[:, :, None]
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.end_of_call()
        return self.ln_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] of hidden [..., C], in the head's dtype (autocast's in training)."""
        return F.linear(*self._for_the_head(hidden))[..., : self.config.vocab_size]

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats [N], float32, of targets [N] after hidden [N, C]; 0 where the target is -100."""
        return head_cross_entropy(*self._for_the_head(hidden), targets, self.config.vocab_size)

    def _for_the_head(self, hidden):
        """(hidden, the head's weight), both in the dtype of their product. On CUDA the weight has
        rows beyond V, to a multiple of 64, whose logits mean nothing."""
        if self._padded_head is not None:
            return hidden.to(self._padded_head.dtype), self._padded_head
        weight, V = self.lm_head.weight, self.config.vocab_size
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        if V % VOCAB_MULTIPLE and weight.is_cuda:
            weight = F.pad(weight, (0, 0, 0, _padded(V) - V))
        return hidden.to(weight.dtype), weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        """(logits [B, T, V], loss). attention_mask [B, T]: 0 marks padding, on either side.

        Labels are shifted inside, as in rosetrainer: position t is scored on labels[t + 1]. -100
        and padding are left out; the loss is the mean over what remains, None without labels.
        """
        mask = None if attention_mask is None else self._padding_masks(attention_mask.bool())
        logits = self.logits(self.hidden(input_ids, mask=mask))
        if labels is None:
            return logits, None
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        shifted = logits[:, :-1].float().flatten(0, 1)
        return logits, F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)

    def _padding_masks(self, real: torch.Tensor) -> list[torch.Tensor] | None:
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

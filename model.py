"""One decoder-only transformer, built from a GPTConfig, whose fields are its features.

    model = GPTModel(load_config("gpt2"))
    logits, loss = model(input_ids, labels=input_ids)      # as rosetrainer's model
    hidden = model.hidden(input_ids)                       # [B, T, C]
    logits = model.logits(hidden)                          # [..., V]; scoring.py feeds it in chunks

Shapes: B sequences, T tokens, C d_model, H query heads, G key/value heads, D head_dim, V vocabulary

Numerics: the residual stream, the norms and the softmax are float32. Linear layers and attention
run in their weights' dtype (`for_inference` casts the weights once) or, in training, autocast's.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from config import VOCAB_MULTIPLE, GPTConfig
from gpu_kernels.cross_entropy import IGNORE, cross_entropy, head_cross_entropy
from modeling.attention import Attention, Cache, DocumentMask, LatentAttention, Mask
from modeling.mlp import MLP, Linear, Mixture
from modeling.norms import Norm, Stream, stream_norm
from modeling.rotary import angles, is_long, rope_tables
from quantisation.linear import weight_bytes

HEAD_ROWS = 1024  # of logits that are held in float32 at once


def inductor_options() -> dict:
    """torch.compile's `options` wherever this project compiles: kernels chosen by rule. Left alone,
    inductor picks reductions by timing them, so that two processes, and with them two world sizes,
    could sum in another order."""
    import torch._inductor.config as inductor  # half of the start-up, needed to compile only

    options = {"triton.autotune_pointwise": False}
    return options | ({"deterministic": True} if hasattr(inductor, "deterministic") else {})


# ---------------------------------------------------------------------------------------------
# The model. Names and registration order are rosetrainer's, so its optimizer states fit as well


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
        x: Tensor | Stream,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> Tensor | Stream:
        """The residual stream after this block, as it came: a tensor, or a Stream to which this
        block's last branch may still be to be added."""
        c, dtype = self.config, self.mlp.dtype
        stream = x if isinstance(x, Stream) else Stream(x)
        h = stream.normed(self.ln1, dtype)
        branch = self._branch(self.attn(h, rope, mask, cache), self.ln1_post)
        if c.parallel_residual and not c.shared_norm:
            h = stream.normed(self.ln2, dtype)
        stream.add(*branch)
        del branch  # or it would be held while the MLP runs
        if not c.parallel_residual:
            h = stream.normed(self.ln2, dtype)
        stream.add(*self._branch(self.mlp(h), self.ln2_post))
        return stream if x is stream else stream.whole()

    def _branch(self, y: Tensor, norm: nn.Module) -> tuple[Tensor, nn.Module | None]:
        """What is added to the residual stream: y, and the norm that is still to be taken of it."""
        scale = self.config.residual_scale
        if scale == 1.0 and not self.training:
            return y, norm
        y = self.dropout(norm(y))
        return y if scale == 1.0 else y * scale, None


class _WithoutInit(TorchFunctionMode):
    """torch.nn.init does nothing within: on meta, drawing numbers would import all of dynamo."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class GPTModel(nn.Module):
    """See the file's docstring. `activation_checkpointing` recomputes blocks in the backward,
    `recomputed_together` of them at a time."""

    # transformers' models, behind the same interface, say False
    is_native: Literal[True] = True
    supports_cache: Literal[True] = True
    # whether the embeddings, and the head, are here: not where ranks hold a model between them
    is_first, is_last = True, True
    recomputed_together = 1
    quantisation: dict | None = None  # how the weights were rounded: quantisation/apply.py
    packing: dict | None = None  # how those lie that a file has quantised: formats/packing.py

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
    def on_meta(cls, config: GPTConfig) -> Self:
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
    def layers(self) -> range:
        """Those whose blocks are here."""
        return range(self.config.n_layers)

    @property
    def is_compiled(self) -> bool:
        """Whether blocks run as torch.compile made them (backends/scoring.py)."""
        return any(self.blocks[layer]._compiled_call_impl for layer in self.layers)

    def whole(self) -> "GPTModel":
        """The names and shapes of the whole model, whatever part of it is here."""
        return self

    @property
    def copies(self) -> Sequence[nn.Module]:
        """Modules here whose weights another rank has too, and answers for."""
        return ()

    def of_all_ranks(self, counts: list[int]) -> list[int]:
        """The sums of what each rank that holds a part counts of its own."""
        return counts

    @property
    def largest_share(self) -> tuple[int, float]:
        """Layers, and bytes of weights, of the rank that has most of them."""
        return self.config.n_layers, weight_bytes(self)

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

    def allocate(
        self, dtype: torch.dtype, device: torch.device | str, later: Collection[str] = ()
    ) -> None:
        """Room on `device` for the weights of a model that was built on meta, each once and in its
        dtype of evaluation. later: layers whose weights stay there, in that dtype."""
        dtypes = self.inference_dtypes(dtype)
        for name, p in list(self.named_parameters()):
            module, _, leaf = name.rpartition(".")
            where = "meta" if leaf == "weight" and module in later else device
            place = torch.empty(p.shape, dtype=dtypes[name], device=where)
            setattr(self.get_submodule(module), leaf, nn.Parameter(place, requires_grad=False))
        if self.config.tie_embeddings and self.is_last:
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
        V = self.config.vocab_size
        if self.is_last and V % VOCAB_MULTIPLE and self.lm_head.weight.is_cuda:
            head = self.lm_head.weight
            self._padded_head = head.new_zeros(_padded(V), head.shape[1])
            self._padded_head[:V] = head
            head.data = self._padded_head[:V]
        return self.requires_grad_(False).eval()

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Sequence[Mask] | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, C] of input_ids [B, T] int64: float32, or rounded as the head
        rounds them, where one kernel does both.

        positions: [T] or [B, T], 0..T-1 unless given (or what the cache says). cache: keys and
        values already computed (backends/kvcache.py): an object with `positions(T)` and `attend`.
        mask: attention's, by layer: of left padding (`forward` makes them) or of documents
        (`within_documents` does).
        """
        positions = self.positions(input_ids, positions, cache)
        return self._final_norm(self.through_blocks(input_ids, positions, cache, mask))

    def _final_norm(self, stream: Stream) -> Tensor:
        scaled = self.config.logit_scale != 1.0  # before it is rounded
        return stream.normed(self.ln_f, torch.float32 if scaled else self.dtype)

    @staticmethod
    def positions(input_ids: Tensor, given: Tensor | None, cache: Cache | None) -> Tensor:
        """Of input_ids [B, T]: those given, else what the cache says, else 0..T-1."""
        if given is not None:
            return given
        T = input_ids.shape[1]
        return torch.arange(T, device=input_ids.device) if cache is None else cache.positions(T)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The residual stream [B, T, C], float32, that the blocks begin with."""
        x = self.token_embedding(input_ids)
        if self.config.embedding_scale != 1.0:
            x = x.float() * self.embedding_scales[self.token_embedding.weight.dtype]
        if self.config.position == "learned":
            x = x + self.position_embedding(positions).float()  # which makes all float32, exactly
        return self.dropout(self.ln_embedding(x.float()))

    def through_blocks(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: Cache | None,
        mask: Sequence[Mask] | None = None,
        came: list[Tensor] | None = None,
    ) -> Stream:
        """The residual stream [B, T, C] after the blocks that are here. came: what the stream was
        before them, if that is not the embeddings; it is taken out, so that nothing holds it."""
        x: Tensor | Stream = came.pop() if came else self.embed(input_ids, positions)
        ropes = self._ropes(positions, input_ids.shape[1] if cache is None else cache.longest)

        def through(x: Tensor | Stream, layers: range) -> Tensor | Stream:
            for layer in layers:
                own = None if mask is None else mask[layer]
                x = self.blocks[layer](x, ropes.get(self.config.layer_rope(layer)), own, cache)
            return x

        # what a compiled block takes, and what a backward begins again with, is whole
        if isinstance(x, Tensor) and not torch.is_grad_enabled() and not self.is_compiled:
            x = Stream(x)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        n = self.recomputed_together if again else 1  # one, so that no older x is held
        for first in self.layers[::n]:
            layers = range(first, min(first + n, self.layers.stop))
            x = checkpoint(through, x, layers, use_reentrant=False) if again else through(x, layers)
        return x if isinstance(x, Stream) else Stream(x)

    def within_documents(self, starts: Tensor) -> dict[str, Any]:
        """Options of `hidden` under which a token sees its own document alone, in which positions
        count from 0. starts [B, T] int64: the column in which each token's document begins. Whether
        LongRoPE's long frequencies turn goes by T, as without."""
        windows = [self.config.layer_window(layer) for layer in range(self.config.n_layers)]
        masks = {window: DocumentMask(starts, window) for window in set(windows)}
        positions = torch.arange(starts.shape[1], device=starts.device) - starts
        return {"positions": positions, "mask": [masks[window] for window in windows]}

    def router_loads(self) -> Tensor:
        """[L, 2, E]: `Mixture.load` of each mixture of experts in the last pass of training."""
        mixtures = (block.mlp for block in self.blocks if isinstance(block.mlp, Mixture))
        return torch.stack([mlp.load for mlp in mixtures if mlp.load is not None])

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

    def logits(self, hidden: Tensor, exact: bool = False) -> Tensor:
        """[..., V] of hidden [..., C], in the head's dtype (autocast's in training); float32 where
        a soft cap or a bias comes after the product. exact: in float32 always, the product of what
        the head multiplies not rounded to its dtype."""
        hidden, weight = self._for_the_head(hidden)
        if exact:
            hidden, weight = hidden.float(), weight.float()
        logits = F.linear(hidden, weight)[..., : self.config.vocab_size]
        if self.lm_head.bias is not None:
            logits = logits.float() + self.lm_head.bias.float()
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats [N], float32, of targets [N] after hidden [N, C]; 0 where the target is -100."""
        cap, V = self.config.logit_softcap, self.config.vocab_size
        if self.lm_head.bias is None and cap is None:
            return head_cross_entropy(*self._for_the_head(hidden), targets, V)
        if torch.is_grad_enabled():
            return F.cross_entropy(
                self.logits(hidden), targets, ignore_index=IGNORE, reduction="none"
            )
        if self.lm_head.bias is None:
            return cross_entropy(F.linear(*self._for_the_head(hidden)), targets, V, cap)
        rows = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS))
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
        # rosetrainer's signature, for code written for it: nothing of ours passes this mask
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

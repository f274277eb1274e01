"""Any causal language model that transformers has, behind GPTModel's interface.

Checkpoint.load falls back to it where GPTModel cannot express a config: gpt-oss, Llama 4, PhiMoE,
Falcon, Bloom, OPT and so on. It is evaluated like any other, without a KV cache.

No code but transformers' own runs, whatever a directory says: not the modules that its auto_map
names, no attention or expert kernel from a hub, no quantiser's package.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cli import first_line, note
from config import GPTConfig, read_json
from formats.tensorfiles import extremes, refuse_nonfinite, require_safe_torch
from gpu_kernels.cross_entropy import cross_entropy
from model import GPTModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What models hand to an attention function, and what changes no result if it is not looked at:
# windows are in the mask as well, and the rest is for packed sequences and for caches
NO_MATTER = {"sliding_window", "position_ids", "use_cache", "output_attentions", "deterministic"}
NO_MATTER |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class TransformersModel(nn.Module):
    """Any AutoModelForCausalLM behind GPTModel's interface, without a cache.

    `logits(hidden)` must be what the model itself makes of its hidden states: head, then the scale
    and the soft cap that its config names. Which of them hold is tried once, on a few tokens.
    """

    is_native: Literal[False] = False
    supports_cache: Literal[False] = False
    quantisation: dict | None = None  # how the weights were rounded: quantisation/apply.py
    packing: dict | None = None  # how those lie that a file has quantised: formats/packing.py

    def __init__(self, causal_lm: "PreTrainedModel", config: GPTConfig | None):
        super().__init__()
        self.causal_lm, self.config = causal_lm, config
        hf = causal_lm.config.get_text_config()
        self.vocab_size, self.max_positions = _sizes(hf)
        self.scale, self.softcap = 1.0, None
        self._probe = torch.arange(1, 9, device=causal_lm.device)[None] % self.vocab_size
        self._take_faithful_attention(hf)
        self._refuse_foresight(hf)
        self._find_logit_rule(hf)

    @torch.no_grad()
    def _take_faithful_attention(self, hf) -> None:
        """The model's own plain attention where transformers' choice would drop a part of it: SDPA
        does so with Gemma-2's soft cap, without a word."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

        name = hf._attn_implementation
        if name not in functions.valid_keys():
            return
        attend, dropped = functions[name], set()
        taken = NO_MATTER | inspect.signature(attend).parameters.keys()

        def look(*args, **given):
            dropped.update(k for k, v in given.items() if v is not None and k not in taken)
            return attend(*args, **given)

        functions[name] = look
        try:
            self.hidden(self._probe)
        finally:
            functions[name] = attend
        if dropped:
            self.causal_lm.set_attn_implementation("eager")
            what = f"{hf.model_type}: transformers' {name} attention drops {', '.join(dropped)}"
            if hf._attn_implementation != "eager":
                raise ValueError(f"{what}, and it has no other: it cannot be scored")
            note(f"{what}: its own plain attention runs, which takes more memory")

    @torch.no_grad()
    def _refuse_foresight(self, hf) -> None:
        """A token must not see those after it, as in an encoder: its loss would mean nothing."""
        other = self._probe.clone()
        other[:, -1] = (other[:, -1] + 1) % self.vocab_size
        seen, changed = self.hidden(self._probe)[:, :-1], self.hidden(other)[:, :-1]
        difference = (seen.float() - changed.float()).abs().max().item()
        if not difference <= 1e-2 * seen.float().abs().max().item():
            raise ValueError(
                f"{hf.model_type}: what comes later changes what it makes of a token (by "
                f"{difference:.3g}): it is no causal language model"
            )

    def _find_logit_rule(self, hf) -> None:
        """Of the scales and caps that the config names, those that make the model's own logits."""
        scales = [1.0, getattr(hf, "logit_scale", None), getattr(hf, "logits_scaling", None)]
        scales = [s for s in scales[:2] if s] + [1 / s for s in scales[2:] if s]
        caps = [getattr(hf, "final_logit_softcapping", None), None]
        ids = self._probe
        with torch.no_grad():
            hidden, wanted = self.hidden(ids), self.causal_lm(ids, use_cache=False).logits.float()
            errors = {}
            for self.scale in scales:
                for self.softcap in caps:
                    error = (self.logits(hidden).float() - wanted).abs().max().item()
                    errors.setdefault((self.scale, self.softcap), error)
        (self.scale, self.softcap), error = min(errors.items(), key=lambda item: item[1])
        if not error <= 1e-2 * wanted.abs().max().item():
            raise ValueError(
                f"{hf.model_type}: its logits are not those of its head on its hidden states "
                f"(difference {error:.3g}), so it cannot be scored"
            )

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.causal_lm.dtype

    def hidden(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: None = None,
    ) -> torch.Tensor:
        """Final hidden states [B, T, C] of input_ids [B, T]."""
        assert cache is None, "supports_cache is False"
        more = {} if positions is None else {"position_ids": positions.view(-1, input_ids.shape[1])}
        body = self.causal_lm.base_model
        if body is self.causal_lm:  # Llama 4's, whose prefix is that of a model with images
            body = self.causal_lm.model
        return body(input_ids, use_cache=False, **more).last_hidden_state

    def logits(self, hidden: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """[..., V] of hidden [..., C]. exact: as GPTModel's."""
        head = self.causal_lm.get_output_embeddings()
        hidden = hidden.to(head.weight.dtype)
        if exact:
            weights = {name: p.float() for name, p in head.named_parameters()}
            logits = torch.func.functional_call(head, weights, hidden.float())
        else:
            logits = head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats [N], float32, of targets [N] after hidden [N, C]; 0 where the target is -100."""
        logits = self.logits(hidden)
        return cross_entropy(logits, targets, logits.shape[-1])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(logits [B, T, V], mean loss of labels [B, T] or None), as GPTModel.forward."""
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        logits = self.causal_lm(input_ids, attention_mask=attention_mask, use_cache=False).logits
        if labels is None:
            return logits, None
        flat = logits[:, :-1].float().flatten(0, 1)
        return logits, nn.functional.cross_entropy(flat, labels[:, 1:].flatten())


Model = GPTModel | TransformersModel  # what Checkpoint.load gives


def _sizes(hf) -> tuple[int, int | None]:
    return hf.vocab_size, getattr(hf, "max_position_embeddings", None)


def transformers_sizes(path: Path) -> tuple[int, int | None]:
    """(vocab_size, max_positions) that TransformersModel will have, from config.json."""
    return _sizes(read_config(path).get_text_config())


def read_config(path: Path) -> "PreTrainedConfig":
    """transformers' config of a local directory, without what it says of how to run the model:
    attention and experts could be kernels of a hub. ValueError where only others' code could run
    it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an edge: transformers raises what it likes
        raise ValueError(f"{path}: transformers cannot read its config: {_why(error, path)}") from (
            error
        )
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{path} is quantised ({method}), which is not read: name the original")
    config._attn_implementation = config._experts_implementation = None  # as transformers chooses
    return config


def _why(error: Exception, path: Path) -> str:
    """The first line of what transformers says; where a directory brings code, that it never
    runs: transformers would advise to trust it."""
    code = read_json(path / "config.json").get("auto_map")
    return f"it names code of its own ({code}), which is never run" if code else first_line(error)


def load_transformers(
    path: Path, dtype: torch.dtype, device: str | torch.device, config: GPTConfig | None
) -> TransformersModel:
    """A local directory through AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    require_safe_torch()
    hf = read_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=hf,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        causal_lm, names = loaded
    except Exception as error:  # an edge: transformers raises what it likes
        raise ValueError(f"{path}: transformers cannot load it: {_why(error, path)}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names[what]:
            first = ", ".join(sorted(map(str, names[what]))[:5])
            raise ValueError(f"{path}: {len(names[what])} {what.replace('_', ' ')}: {first}")
    causal_lm = causal_lm.to(device).requires_grad_(False).eval()
    parameters = {name: p for name, p in causal_lm.named_parameters() if p.numel()}
    refuse_nonfinite({name: extremes(p.view(-1)) for name, p in parameters.items()}, path)
    return TransformersModel(causal_lm, config)

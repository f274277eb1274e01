"""Any causal language model that transformers has, behind GPTModel's interface.

Checkpoint.load falls back to it where GPTModel cannot express a config: mixtures of experts,
Falcon, Bloom, OPT and so on. It is evaluated like any other, without a KV cache.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cli import first_line
from config import GPTConfig
from formats.tensorfiles import extremes, refuse_nonfinite, require_safe_torch
from gpu_kernels.cross_entropy import cross_entropy
from model import GPTModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersModel(nn.Module):
    """Any AutoModelForCausalLM behind GPTModel's interface, without a cache.

    `logits(hidden)` must be what the model itself makes of its hidden states: head, then the scale
    and the soft cap that its config names. Which of them hold is tried once, on a few tokens.
    """

    is_native: Literal[False] = False
    supports_cache: Literal[False] = False

    def __init__(self, causal_lm: "PreTrainedModel", config: GPTConfig | None):
        super().__init__()
        self.causal_lm, self.config = causal_lm, config
        hf = causal_lm.config.get_text_config()
        self.vocab_size, self.max_positions = _sizes(hf)
        self.scale, self.softcap = 1.0, None
        self._find_logit_rule(hf)

    def _find_logit_rule(self, hf) -> None:
        """Of the scales and caps that the config names, those that make the model's own logits."""
        scales = [1.0, getattr(hf, "logit_scale", None), getattr(hf, "logits_scaling", None)]
        scales = [s for s in scales[:2] if s] + [1 / s for s in scales[2:] if s]
        caps = [getattr(hf, "final_logit_softcapping", None), None]
        ids = torch.arange(1, 9, device=self.causal_lm.device)[None] % self.vocab_size
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
        return self.causal_lm.base_model(input_ids, use_cache=False, **more).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] of hidden [..., C]."""
        head = self.causal_lm.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype))
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
    from transformers import AutoConfig

    try:
        return _sizes(AutoConfig.from_pretrained(path, local_files_only=True).get_text_config())
    except Exception as error:  # an edge: transformers raises what it likes
        raise ValueError(
            f"{path}: transformers cannot read its config: {first_line(error)}"
        ) from error


def load_transformers(
    path: Path, dtype: torch.dtype, device: str | torch.device, config: GPTConfig | None
) -> TransformersModel:
    """A local directory through AutoModelForCausalLM. Custom code in it is never run."""
    from transformers import AutoModelForCausalLM

    require_safe_torch()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        causal_lm, names = loaded
    except Exception as error:  # an edge: transformers raises what it likes
        raise ValueError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names[what]:
            first = ", ".join(sorted(map(str, names[what]))[:5])
            raise ValueError(f"{path}: {len(names[what])} {what.replace('_', ' ')}: {first}")
    causal_lm = causal_lm.to(device).requires_grad_(False).eval()
    parameters = {name: p for name, p in causal_lm.named_parameters() if p.numel()}
    refuse_nonfinite({name: extremes(p.view(-1)) for name, p in parameters.items()}, path)
    return TransformersModel(causal_lm, config)

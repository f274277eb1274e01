"""A model's weights rounded by a rule, where they lie.

    restore = quantise_model(model, "rtn-w4-g128", keep=True)
    ...                                             # any evaluation: the model says what it holds
    restore()                                       # the weights as they were, bit for bit

Rounded are the matrices of the blocks, experts among them, each part of a fused one by itself: a
query's rows and a key's have extremes of their own, as where they lie apart. Left alone are
embeddings and head unless asked for, norms, biases, and what chooses between experts. A cast is of
everything. Weights are rounded as they were loaded, in float32, and lie in the model's dtype
afterwards (`_hold`), or packed where a module of linear.py takes their place.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model import GPTModel
from modeling.mlp import Stack
from modeling.norms import Norm
from quantisation.codes import Codes
from quantisation.names import NORM_BYTES, REST_BYTES, Quantisation, Rule, parse
from quantisation.rules import CASTS, quantise, round_tokens, rounded

if TYPE_CHECKING:
    from transformers_model import Model


@dataclass(frozen=True)
class Matrix:
    """A weight that a rule is for: its module, where it lies there as [N, K], and the names of its
    parts with their rows, in order."""

    name: str
    module: nn.Module
    weight: Tensor
    parts: tuple[tuple[str, int], ...]


@torch.no_grad()
def quantise_model(
    model: "Model", wanted: Quantisation | str, keep: bool = False
) -> Callable[[], None]:
    """Round the weights of a model in evaluation, and note in `model.quantisation` how, and what
    they take. keep: what is returned, when called, puts them back, and so does a ValueError: for a
    pattern of `skip` that no matrix has, for weights or a model that the rule is not for."""
    wanted = Quantisation(wanted) if isinstance(wanted, str) else wanted
    rule, chosen = parse(wanted.rule), []
    assert model.quantisation is None, "a model is rounded once"
    if isinstance(model, GPTModel) and not (model.is_first and model.is_last):
        raise ValueError(
            f"--quantise {wanted.rule}: a model that several processes hold between them is not "
            "rounded: leave --shard out"
        )
    _check_dtype(model, rule)
    undo: list[Callable[[], object]] = []

    def restore() -> None:
        for put_back in undo:
            put_back()
        model.quantisation = None

    try:
        if rule.kind == "cast":
            for name, p in _casted(model):
                undo += _kept(p.data, keep)
                p.data.copy_(_named(name, rounded, p.data, rule))
        else:
            chosen = list(_chosen(model, wanted))
            for matrix in chosen:
                undo += _kept(matrix.weight, keep)
                _hold(matrix, _codes_of(matrix, rule))
        if rule.activations:
            undo += _round_activations(model, chosen)
    except ValueError:
        restore()
        raise
    model.quantisation = wanted.protocol | _sizes(model, rule, chosen)
    return restore


class Weights:
    """A model that is rounded by one rule after another, or by none. keep: there will be another
    one after the first."""

    def __init__(self, model: "Model", keep: bool):
        self.model, self.keep = model, keep
        self._now: Quantisation | None = None
        self._restore: Callable[[], None] = lambda: None

    def under(self, wanted: Quantisation | None) -> "Model":
        """The model, its weights as they were loaded and then rounded so."""
        if wanted != self._now:
            self._restore()
            self._now, self._restore = None, lambda: None
            if wanted is not None:
                self._restore = quantise_model(self.model, wanted, self.keep)
                self._now = wanted
        return self.model


# ---------------------------------------------------------------------------------------------
# Which matrices


def matrices(model: "Model", embeddings: bool = False) -> Iterator[Matrix]:
    """The matrices that a rule is for, once each; with `embeddings` those of the ends too."""
    if isinstance(model, GPTModel):
        yield from _native(model)
        ends: list[tuple[str, Any]] = [("token_embedding", model.token_embedding)]
        ends += [] if model.config.tie_embeddings else [("lm_head", model.lm_head)]
    else:
        yield from _of_transformers(model.causal_lm)
        ends = _ends_of(model.causal_lm)
    for name, module in ends if embeddings else ():
        weight: Tensor = module.weight.data
        yield Matrix(name, module, weight, ((name, len(weight)),))


def _native(model: GPTModel) -> Iterator[Matrix]:
    c = model.config
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if not isinstance(module, nn.Linear | Stack) or name.endswith("shared_gate"):
            continue
        weight = module.weight.data.flatten(0, -2)
        parts = [("", len(weight))]
        if name.endswith("qkv_proj"):
            heads = (".q", c.n_heads), (".k", c.n_kv_heads), (".v", c.n_kv_heads)
            parts = [(end, n * c.head_dim) for end, n in heads]
        elif name.endswith("fc1") and c.gated_mlp:
            parts = [(end, module.weight.shape[-2] // 2) for end in (".gate", ".up")]
        if isinstance(module, Stack):
            n = len(module.weight)
            rows = module.weight.shape[1]
            of_expert = parts if len(parts) > 1 else [("", rows)]
            parts = [(f".{e}{end}", rows) for e in range(n) for end, rows in of_expert]
        yield Matrix(name, module, weight, tuple((name + end, rows) for end, rows in parts))


def _ends_of(causal_lm: Any) -> list[tuple[str, Any]]:
    """Token embedding and head of a model of transformers', the head only where it is not tied."""
    ends = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends.pop()
    return [(name, module) for name, module in causal_lm.named_modules() if module in ends]


def _of_transformers(causal_lm: Any) -> Iterator[Matrix]:
    """Linear layers and GPT-2's Conv1D, which keeps them as [in, out]; fused parts, of which only
    their model knows, are rounded as one."""
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    stacked = [name for name, p in causal_lm.named_parameters() if p.dim() > 2 and "expert" in name]
    if stacked:
        raise ValueError(
            f"--quantise: {stacked[0]} holds several matrices, of which this model alone knows how "
            "they lie; only its casts are known"
        )
    for name, module in causal_lm.named_modules():
        turned = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or turned) and module not in ends:
            weight = module.weight.data.t() if turned else module.weight.data
            yield Matrix(name, module, weight, ((name, len(weight)),))


def _chosen(model: "Model", wanted: Quantisation) -> Iterator[Matrix]:
    """Without those that `skip` leaves out. A fused matrix stays one: its parts go together."""
    found = list(matrices(model, wanted.embeddings))
    if not found:
        raise ValueError(f"--quantise {wanted.rule}: the model has no matrices that it knows")
    names = [matrix.name for matrix in found]
    for pattern in wanted.skip:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"--quantise-skip {pattern}: no matrix has a name like it; there are "
                f"{', '.join(names[:3])} … {names[-1]}"
            )
    skipped = {name for name in names if any(fnmatch(name, p) for p in wanted.skip)}
    yield from (matrix for matrix in found if matrix.name not in skipped)


# ---------------------------------------------------------------------------------------------
# Rounding


def _check_dtype(model: "Model", rule: Rule) -> None:
    """A cast's numbers must be numbers of the dtype in which the model runs."""
    if rule.kind != "cast" or model.dtype in (CASTS[rule.cast], torch.float32):
        return
    dtype = str(model.dtype).removeprefix("torch.")
    raise ValueError(
        f"--quantise {rule.name}: weights that run in {dtype} cannot hold it: --dtype float32"
    )


def _casted(model: "Model") -> Iterator[tuple[str, nn.Parameter]]:
    """What a model loaded in another dtype has in it: all but norms and what chooses experts."""
    if isinstance(model, GPTModel):
        dtypes = model.inference_dtypes(torch.bfloat16)
        yield from ((n, p) for n, p in model.named_parameters() if dtypes[n] == torch.bfloat16)
    else:
        yield from model.causal_lm.named_parameters()


def _kept(weight: Tensor, keep: bool) -> list[Callable[[], object]]:
    """What puts a weight back as it is now, from the host; nothing unless it is to be kept."""
    values = weight.to("cpu", copy=True) if keep else None
    return [lambda: weight.copy_(values)] if values is not None else []


def _codes_of(matrix: Matrix, rule: Rule) -> Codes:
    rows = matrix.weight.split([n for _, n in matrix.parts])
    named = zip(matrix.parts, rows, strict=True)
    return joined([_named(name, quantise, part, rule) for (name, _), part in named])


def _named(name: str, function: Callable[[Tensor, Rule], Any], weight: Tensor, rule: Rule) -> Any:
    """function(weight, rule), whose ValueError says of which matrix."""
    try:
        return function(weight, rule)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (--quantise-skip leaves it out)") from None


def joined(parts: list[Codes]) -> Codes:
    """The codes of matrices that lie one below the other, as one."""
    first = parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Codes(
        first.rule,
        first.bits,
        torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        first.groups,
    )


def _hold(matrix: Matrix, codes: Codes) -> None:
    """The weight becomes what its codes stand for."""
    matrix.weight.copy_(codes.dequantise(matrix.weight.dtype))


def _round_activations(model: "Model", chosen: list[Matrix]) -> list[Callable[[], object]]:
    """Before each of the matrices. ValueError for models that multiply by a weight without asking
    its module."""
    config = model.config if isinstance(model, GPTModel) else None
    if config and (config.n_experts or config.kv_lora_rank is not None):
        what = "mixtures of experts" if config.n_experts else "latent attention"
        raise ValueError(f"a8: the activations of {what} cannot be rounded; a rule without a8 can")

    def before(module, args):
        return (round_tokens(args[0]), *args[1:])

    hooks = [matrix.module.register_forward_pre_hook(before) for matrix in chosen]
    _forget_compiled()
    return [*(hook.remove for hook in hooks), _forget_compiled]


def _forget_compiled() -> None:
    """torch.compile takes it that a module's hooks never change, and would run as before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------
# Sizes


def _sizes(model: "Model", rule: Rule, chosen: list[Matrix]) -> dict:
    """Bytes of all weights as the rule would store them, and bits a weight: the rest in 16 bits,
    norms in 32."""
    every = {id(p): p.numel() for p in model.parameters()}
    n_all = sum(every.values())
    norms = {id(p) for m in model.modules() if isinstance(m, Norm) for p in m.parameters()}
    n_norms = sum(n for which, n in every.items() if which in norms)
    n_rounded = sum(matrix.weight.numel() for matrix in chosen)
    rest = rule.bits // 8 if rule.kind == "cast" else REST_BYTES
    size = sum(
        rule.size(rows, matrix.weight.shape[1]) for matrix in chosen for _, rows in matrix.parts
    )
    size += NORM_BYTES * n_norms + rest * (n_all - n_norms - n_rounded)
    return {"weight_bytes": size, "bits_per_weight": 8 * size / n_all}

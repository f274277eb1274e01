"""A model's weights rounded by a rule, where they lie.

    restore = quantise_model(model, "rtn-w4-g128", keep=True)
    ...                                             # any evaluation: the model says what it holds
    restore()                                       # the weights as they were, bit for bit

Rounded are the matrices of the blocks, experts among them, each part of a fused one by itself: a
query's rows and a key's have extremes of their own, as where they lie apart. Left alone are
embeddings and head unless asked for, norms, biases, and what chooses between experts. A cast is of
everything. Weights are rounded as they were loaded, in float32. Of linear layers the codes alone
stay in memory, packed (linear.py); experts, embeddings, heads and layers of transformers' own kinds
become the numbers that their codes stand for. Weights that are to be put back wait on the host: on
a GPU one layer is dense at a time, from one rule to the next too.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model import GPTModel
from modeling.mlp import Linear, Stack
from modeling.norms import Norm
from quantisation.linear import n_weights, pack_model, put, weight_bytes
from quantisation.names import NORM_BYTES, REST_BYTES, Quantisation, Rule, parse
from quantisation.rules import CASTS, quantise, round_tokens, rounded

if TYPE_CHECKING:
    from transformers_model import Model


@dataclass(frozen=True)
class Matrix:
    """A weight that a rule is for: its module, where it lies there as [N, K], the names of its
    parts with their rows, in order, and whether it is an embedding or a head."""

    name: str
    module: nn.Module
    weight: Tensor
    parts: tuple[tuple[str, int], ...]
    is_end: bool = False


@torch.no_grad()
def quantise_model(
    model: "Model",
    wanted: Quantisation | str,
    keep: bool = False,
    device: torch.device | None = None,
) -> Callable[..., None]:
    """Round the weights of a model in evaluation, and note in `model.quantisation` how, and what
    they take. keep: what is returned, when called, puts them back, and so does a ValueError: for a
    pattern of `skip` that no matrix has, for weights or a model that the rule is not for. device:
    where the model runs, its own unless given: weights may lie on the host."""
    wanted = Quantisation(wanted) if isinstance(wanted, str) else wanted
    rule, sizes = parse(wanted.rule), Sizes()
    device = device or next(model.parameters()).device
    assert model.quantisation is None, "a model is rounded once"
    undo: list[Callable[[], object]] = []

    def restore(home: bool = True) -> None:
        """home: onto the device of the model; else what is packed next stays on the host."""
        for put_back in undo:
            put_back()
        if rule.activations:
            _forget_compiled()
        if home:
            _bring_home(model, device)
        model.quantisation = None

    try:
        _check(model, rule)
        if rule.kind == "cast":
            for name, p in _casted(model):
                undo += _kept(p.data, keep)
                p.data.copy_(_named(name, rounded, p.data, rule))
        for matrix in _chosen(model, wanted) if rule.kind != "cast" else ():
            undo += _hold(model, matrix, rule, keep, device)
            if matrix.module not in _copies(model):
                sizes.add(matrix, rule)
        _bring_home(model, device)
    except ValueError:
        restore()
        raise
    if rule.activations:
        _forget_compiled()
    model.quantisation = wanted.protocol | sizes.of(model, rule)
    return restore


class Weights:
    """A model that is rounded by one rule after another, or by none. keep: there will be another
    one after the first."""

    def __init__(self, model: "Model", keep: bool):
        self.model, self.keep, self.device = model, keep, next(model.parameters()).device
        self._now: Quantisation | None = None
        self._restore: Callable[..., None] = lambda home=True: None

    def under(self, wanted: Quantisation | None) -> "Model":
        """The model, its weights as they were loaded and then rounded so."""
        if wanted != self._now:
            packs = wanted is not None and parse(wanted.rule).kind != "cast"
            self._restore(home=not packs)
            self._now, self._restore = None, lambda home=True: None
            if wanted is not None:
                self._restore = quantise_model(self.model, wanted, self.keep, self.device)
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
        ends = [(name, end) for name, end in ends if not isinstance(end, nn.Identity)]
    else:
        yield from _of_transformers(model.causal_lm)
        ends = _ends_of(model.causal_lm)
    for name, module in ends if embeddings else ():
        weight: Tensor = module.weight.data
        yield Matrix(name, module, weight, ((name, len(weight)),), is_end=True)


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
    whole = model.whole() if isinstance(model, GPTModel) else model
    names = [matrix.name for matrix in matrices(whole, wanted.embeddings)]
    for pattern in wanted.skip:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"--quantise-skip {pattern}: no matrix has a name like it; there are "
                f"{', '.join(names[:3])} … {names[-1]}"
            )
    skipped = {name for name in names if any(fnmatch(name, p) for p in wanted.skip)}
    found = [matrix for matrix in reversed(found) if matrix.name not in skipped]
    while found:
        yield found.pop()  # and let go of it: it may be the last to hold a dense weight


# ---------------------------------------------------------------------------------------------
# Rounding


def _check(model: "Model", rule: Rule) -> None:
    """A cast's numbers must be numbers of the dtype in which the model runs. Activations cannot be
    rounded where a weight is multiplied by without asking its module."""
    if rule.kind == "cast" and model.dtype not in (CASTS[rule.cast], torch.float32):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"--quantise {rule.name}: weights that run in {dtype} cannot hold it: --dtype float32"
        )
    config = model.config if isinstance(model, GPTModel) else None
    if rule.activations and config and (config.n_experts or config.kv_lora_rank is not None):
        what = "mixtures of experts" if config.n_experts else "latent attention"
        raise ValueError(f"a8: the activations of {what} cannot be rounded; a rule without a8 can")


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


def _named(name: str, function: Callable[[Tensor, Rule], Any], weight: Tensor, rule: Rule) -> Any:
    """function(weight, rule), whose ValueError says of which matrix."""
    try:
        return function(weight, rule)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (--quantise-skip leaves it out)") from None


def _hold(
    model: "Model", matrix: Matrix, rule: Rule, keep: bool, device: torch.device
) -> list[Callable[[], object]]:
    """Codes take the place of a matrix, or the numbers that they stand for; what puts it back."""
    rows = matrix.weight.split([n for _, n in matrix.parts])
    named = zip(matrix.parts, rows, strict=True)
    codes = [_named(name, quantise, part.to(device), rule) for (name, _), part in named]
    layer, rounds = matrix.module, bool(rule.activations) and not matrix.is_end
    if _is_packed(matrix):
        owner = model if isinstance(model, GPTModel) else model.causal_lm
        pack_model(owner, {matrix.name: codes}, activations="e4m3" if _is_float8(rule) else None)
        undo: list[Callable[[], object]] = []
        if keep:
            layer.weight.data = layer.weight.data.to("cpu")
            undo.append(partial(put, owner, matrix.name, layer))
        layer = owner.get_submodule(matrix.name)
    elif rounds and _is_float8(rule):
        kind = type(layer).__name__
        raise ValueError(f"{matrix.name}: {rule.name} is for linear layers, not for a {kind}")
    else:
        undo = _kept(matrix.weight, keep)
        matrix.weight.copy_(torch.cat([part.dequantise(matrix.weight.dtype) for part in codes]))
    if rounds and not _is_float8(rule):
        undo.append(layer.register_forward_pre_hook(_round_activations).remove)
    return undo


def _is_packed(matrix: Matrix) -> bool:
    """Of a kind of which nothing is known but that it multiplies, the weight has to be there."""
    return type(matrix.module) in (nn.Linear, Linear) and not matrix.is_end


def _is_float8(rule: Rule) -> bool:
    """Whether 8-bit floats meet activations that are rounded alike."""
    return rule.kind == "fp8" and bool(rule.activations)


def _round_activations(module: nn.Module, args: tuple) -> tuple:
    return (round_tokens(args[0]), *args[1:])


def _bring_home(model: "Model", device: torch.device) -> None:
    """What lies on the host for the next rule, onto the device."""
    for p in model.parameters():
        if p.device != device:
            p.data = p.data.to(device)


def _forget_compiled() -> None:
    """torch.compile takes it that a module's hooks never change, and would run as before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------
# Sizes


class Sizes:
    """Counts the matrices that a rule has taken."""

    def __init__(self) -> None:
        self.numbers = self.bytes = self.packed = self.dense = 0

    def add(self, matrix: Matrix, rule: Rule) -> None:
        self.numbers += matrix.weight.numel()
        self.bytes += sum(rule.size(rows, matrix.weight.shape[1]) for _, rows in matrix.parts)
        if _is_packed(matrix):
            self.packed += 1
        else:
            self.dense += 1

    def of(self, model: "Model", rule: Rule) -> dict[str, Any]:
        """Bytes of all weights as the rule would store them, the rest in 16 bits, norms in 32, and
        bits a weight; bytes as they lie in memory, measured; and how many of the rule's matrices
        are packed there, or dequantised. Where ranks hold the model between them, of all of it."""
        norms = (m for m in model.modules() if isinstance(m, Norm))
        n_norms = sum(p.numel() for p in {p for m in norms for p in m.parameters()})
        n_all, memory = (
            count(model) - sum(map(count, _copies(model))) for count in (n_weights, weight_bytes)
        )
        counts = [self.numbers, self.bytes, self.packed, self.dense, n_norms, n_all, memory]
        if isinstance(model, GPTModel):
            counts = model.of_all_ranks(counts)
        numbers, size, packed, dense, n_norms, n_all, memory = counts
        rest = rule.bits // 8 if rule.kind == "cast" else REST_BYTES
        size += NORM_BYTES * n_norms + rest * (n_all - n_norms - numbers)
        held = {"weight_bytes": size, "bits_per_weight": 8 * size / n_all, "memory_bytes": memory}
        if rule.kind != "cast":
            held |= {"packed": packed, "dequantised": dense}
        return held


def _copies(model: "Model") -> Sequence[nn.Module]:
    """Modules here whose weights are another rank's, which counts them."""
    return model.copies if isinstance(model, GPTModel) else ()

"""Low-rank adaptation: a frozen model, and small matrices beside its linear layers that train.

    model, adapters = adapted(path, config, options, "bfloat16", device)
    adapters.write(directory)                       # PEFT's files, of the parts as they are named
    adapters.load(directory)                        # there, to go on

A linear layer W becomes y = W x + b + s B A x, with s = alpha / r (with --lora-rs, alpha / sqrt(r))
and B zero at first. Where ours is several modules of theirs, such as q_proj, k_proj and v_proj,
each has a pair (A, B) of its own, as in PEFT, whose files these are. The frozen weights are in the
dtype of the run, or packed by a rule of quantisation (QLoRA: Dettmers et al. 2023), as `eval.py
--quantise` has them; what is trained is float32. Read again, an adapter is merged into its base as
that lies on disk, not into what the rule made of it.

Source: Hu et al. 2021; Kalajdzievski 2023 (the root); embeddings and head trained whole, for a
vocabulary that was extended: Cui et al. 2023 (Chinese-LLaMA).

Shapes: r rank
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import checkpoint
import cli
from config import GPTConfig
from formats import adapters, layouts, naming, shown, training_state
from formats.adapter_config import is_named
from formats.stored import read_whole
from model import GPTModel
from modeling.mlp import Linear
from quantisation.apply import quantise_model
from quantisation.linear import PackedLinear, put
from training.low_rank import LowRank
from training.options import LoraOptions

HEAD = "lm_head"  # in transformers 5, of all families


# ---------------------------------------------------------------------------------------------
# A model's adapters


class Place(NamedTuple):
    """Where a module of theirs is in ours."""

    layer: LowRank
    part: int
    order: Tensor  # its i-th row is order[i]-th of the part


@dataclass
class Adapters:
    """All that is trained of a model: by the names of transformers' modules."""

    places: dict[str, Place]
    saved: dict[str, nn.Parameter]  # trained whole
    settings: dict[str, Any]  # of adapter_config.json
    base: str = ""  # where the frozen weights lie
    quantisation: dict[str, Any] | None = None  # how they were rounded: Quantisation.protocol

    @cached_property
    def base_fingerprint(self) -> str:
        return checkpoint.fingerprint(self.base)

    @property
    def frozen(self) -> dict[str, Any]:
        """What they were trained over, as a checkpoint notes it."""
        return {"base": self.base_fingerprint, "quantisation": self.quantisation}

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, under PEFT's names."""
        found = {f"{name}.weight": p.data for name, p in self.saved.items()}
        for name, (layer, part, order) in self.places.items():
            A, B = layer.part(part)
            found[f"{name}.lora_A.weight"] = A
            found[f"{name}.lora_B.weight"] = B[order.to(B.device)]
        return found

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, each once."""
        layers = dict.fromkeys(place.layer for place in self.places.values())
        return [*dict.fromkeys(self.saved.values()), *(p for x in layers for p in (x.A, x.B))]

    def write(self, directory: Path) -> None:
        """PEFT's two files."""
        settings = self.settings | {"base_model_name_or_path": self.base}
        adapters.write(directory, settings, self.tensors())

    def resume(self, path: Path, optimizer: Any, scheduler: Any) -> int:
        """The step that a checkpoint of train.py is of, once what it holds is restored. ValueError
        where it was trained over other weights."""
        state = checkpoint.load_training_state(path)
        training_state.require(state, optimizer, scheduler, path)
        extra = state["extra"] or {}
        if cli.rank() == 0 and extra.get("base") != self.base_fingerprint:
            raise ValueError(f"{path} was trained over other weights than those of {self.base}")
        if extra.get("quantisation") != self.quantisation:
            then, now = map(_rounding, (extra.get("quantisation"), self.quantisation))
            raise ValueError(f"{path} was trained over weights {then}, not {now}: --quantise")
        self.load(path)
        training_state.restore(state, optimizer, scheduler, path)
        return state["step"] or 0

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """From a directory that `write` filled. ValueError where it is of another adapter."""
        opened = adapters.open(path)
        said, ours = opened.adapter.config, self.settings
        odd = [name for name in ("dora", "rank_pattern", "alpha_pattern") if getattr(said, name)]
        if odd:
            raise ValueError(f"{path} has {odd[0]}: only plain LoRA of one rank is trained on")
        if lacks := {*self.places} ^ ({*opened.adapter.modules} - {*self.saved}):
            raise ValueError(f"{path} has other modules than these flags adapt: {min(lacks)}")
        now = ours["r"], ours["lora_alpha"], ours["use_rslora"], set(ours["target_modules"])
        then = said.r, said.alpha, said.rslora, set(said.targets)
        both = (*now, set(ours["modules_to_save"] or ())), (*then, set(said.saved))
        if both[0] != both[1]:
            raise ValueError(
                f"{path} has other adapters than these --lora-… flags make: rank {said.r}, alpha "
                f"{said.alpha:g}, {', '.join(sorted({*said.targets, *said.saved}))}"
            )
        for name, leaves in opened.adapter.modules.items():
            if name in self.saved:
                self.saved[name].copy_(read_whole(leaves["weight"]))
                continue
            if more := {*leaves} - {"A", "B"}:
                raise ValueError(f"{path}: {shown(name)} has a {min(more)} too, which none trains")
            layer, part, order = self.places[name]
            A, B = layer.part(part)
            A.copy_(read_whole(leaves["A"]))
            B[order.to(B.device)] = read_whole(leaves["B"]).to(B)


def adapted(
    path: str, config: GPTConfig, options: LoraOptions, dtype: str, device: torch.device
) -> tuple[GPTModel, Adapters]:
    """The frozen model of a checkpoint, in the dtypes that it is evaluated in, and its adapters."""
    base = checkpoint.open(path)
    if base.base is not None:
        raise ValueError(
            f"{path} is an adapter: merge it into its base first (checkpoint.py convert)"
        )
    layout, wanted = adapters.family_layout(base, config), options.quantisation
    model = GPTModel.on_meta(config)
    model.allocate(layouts.as_dtype(dtype), "cpu" if wanted else device)
    checkpoint.load_weights(path, model)
    if wanted:  # one dense matrix at a time comes to the device
        quantise_model(model, wanted, device=device, packed=True)
        model.materialize_buffers(device)
    found = adapt(model, layout, options)
    found.base, found.quantisation = path, wanted.protocol if wanted else None
    return model, found


def _rounding(quantisation: dict[str, Any] | None) -> str:
    """How weights were rounded, in words."""
    if quantisation is None:
        return "as they are"
    skipped = quantisation["skip"]
    return f"under {quantisation['rule']}" + f" without {', '.join(skipped)}" * bool(skipped)


def adapt(model: GPTModel, layout: str, options: LoraOptions) -> Adapters:
    """Freeze a model and put adapters, drawn from torch's seed, into it. layout: whose names its
    modules have (adapters.family_layout). ValueError for targets that it does not have."""
    whole = GPTModel.on_meta(model.config)  # what is packed has no parameters
    there = list(layouts.modules(whole, layout))
    chosen = _chosen([theirs for theirs, _, _ in there], options.lora_targets, layout)
    matrices = [name for name, part in layouts.parts(whole, layout) if part.tensor.dim() == 2]
    model.requires_grad_(False)
    model.recomputed_together = model.config.recomputed_together
    rank, alpha = options.lora_rank, options.lora_alpha
    assert rank is not None
    alpha = 2 * rank if alpha is None else alpha
    dropout = options.lora_dropout or 0.0
    scale = alpha / (math.sqrt(rank) if options.lora_rs else rank)
    ours: dict[str, list[tuple[str, Tensor]]] = {}
    for theirs, name, rows in there:
        if theirs in chosen:
            ours.setdefault(name, []).append((theirs, rows))
    places = {}
    for name, parts in ours.items():
        spans = [range(int(rows.min()), int(rows.max()) + 1) for _, rows in parts]
        assert all(len(span) == len(rows) for span, (_, rows) in zip(spans, parts)), name
        base = cast("Linear | PackedLinear", model.get_submodule(name))
        layer = LowRank(base, spans, rank, scale, dropout)
        put(model, name, layer)
        places |= {t: Place(layer, i, rows - rows.min()) for i, (t, rows) in enumerate(parts)}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):  # frozen alone: its gradients still pass through it
            put(model, name, LowRank(module, [], 0, 1.0, 0.0))
    saved = _train_whole(model, layout) if options.train_embeddings else {}
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": options.lora_rs,
        "target_modules": _as_targets(chosen, [m.removesuffix(".weight") for m in matrices]),
        "modules_to_save": sorted(name.rpartition(".")[2] for name in saved) or None,
        "fan_in_fan_out": layouts.LAYOUTS[layout].conv1d,
    }
    return Adapters(places, saved, settings)


def _chosen(there: list[str], targets: tuple[str, ...] | None, layout: str) -> set[str]:
    """The modules that --lora-targets names, by the ends of their names; all unless given."""
    ends = sorted({name.rpartition(".")[2] for name in there})
    for target in targets or ():
        if not any(is_named(name, (target,)) for name in there):
            more = ""
            if target in (HEAD, naming.embedding_name(layout).split(".")[-2]):
                more = "; --train-embeddings trains the embeddings and the head"
            raise ValueError(
                f"--lora-targets {shown(target)}: no linear layer of the blocks is called so; "
                f"there are {', '.join(ends)}{more}"
            )
    return {name for name in there if targets is None or is_named(name, targets)}


def _as_targets(chosen: set[str], matrices: list[str]) -> list[str]:
    """The ends of names that say just these modules among all matrices; else their whole names:
    experts' matrices, which have no adapters, end as an MLP's do."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    said = {name for name in matrices if is_named(name, tuple(ends))}
    return ends if said == chosen else sorted(chosen)


def _train_whole(model: GPTModel, layout: str) -> dict[str, nn.Parameter]:
    """The embedding and the head in float32, which stay one where they are tied."""
    embedding, head = model.token_embedding, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.data.float().clone())
    head.weight = nn.Parameter(head.weight.data.float().clone()) if not tied else embedding.weight
    name = naming.embedding_name(layout).removesuffix(".weight")
    return {name: embedding.weight, HEAD: head.weight}

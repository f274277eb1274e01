"""An adapter's tensors and the weights of its base: where each belongs, whether it fits, merging.

    check(adapter, places(adapter, model), base)    # shapes alone: a model on meta will do
    before = merge(adapter, model, base, keep=True)
    restore(adapter, model, before)                 # the base again, bit for bit

Merged is once, into the weights as they were loaded, in float32, then rounded to their dtype: the
bits of PEFT's merge_and_unload on a base loaded in that dtype. A module of the adapter is a part of
our parameter by the table of its family (layouts.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from formats import layouts, naming, shown, tensorfiles
from formats.adapter_config import AdapterConfig, around
from formats.layouts import Part
from formats.row_shards import is_sharded
from formats.stored import Stored, read_whole
from model import GPTModel

if TYPE_CHECKING:
    from transformers_model import Model


class Adapter(NamedTuple):
    """What an adapter's files say."""

    config: AdapterConfig
    file: Path  # of the tensors
    modules: dict[str, dict[str, Stored]]  # by transformers' names: {one of LEAVES: tensor}
    layout: str = ""  # whose names these are, once the base is known; "": transformers' own model


class Place(NamedTuple):
    """A parameter by transformers' name."""

    part: Part
    kind: str  # linear, conv1d ([in, out]), head, embedding, positions; other: no matrix


def head_of(adapter: Adapter) -> str:
    """What the adapter calls the head: as files of its family do, or as transformers 5 does."""
    name = naming.head_name(adapter.layout).removesuffix(".weight")
    return name if name in adapter.modules else "lm_head"


def places(adapter: Adapter, model: "Model") -> dict[str, Place]:
    """{transformers' name: its place} over a model."""
    if isinstance(model, GPTModel):
        layout, head = adapter.layout, f"{head_of(adapter)}.weight"
        matrix = "conv1d" if layouts.LAYOUTS[layout].conv1d else "linear"
        special = {
            naming.embedding_name(layout): "embedding",
            naming.theirs_of(layout, "position_embedding")[0]: "positions",
            head: "head",
        }
        heads = {naming.head_name(layout): head}
        parts = {heads.get(name, name): part for name, part in layouts.parts(model, layout)}
        kinds = {name: special.get(name, matrix) for name in parts}
    else:
        causal_lm = model.causal_lm
        parts = {name: Part(p.data, None, 0) for name, p in causal_lm.named_parameters()}
        kinds = {name: _kind_of_module(causal_lm, name.rpartition(".")[0]) for name in parts}
    return {
        name: Place(part, kinds[name] if _is_matrix(name, part) else "other")
        for name, part in parts.items()
    }


def _is_matrix(name: str, part: Part) -> bool:
    return name.endswith(".weight") and part.tensor.dim() == 2


def _kind_of_module(causal_lm: Any, name: str) -> str:
    module = causal_lm.get_submodule(name)
    if module is causal_lm.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding" if module is causal_lm.get_input_embeddings() else "positions"
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv1d" if type(module).__name__ == "Conv1D" else "other"


# ---------------------------------------------------------------------------------------------
# Whether it fits


def check(adapter: Adapter, there: dict[str, Place], base: Path) -> None:
    """Every tensor of the adapter has its place and shape in the base, every module that its config
    names has its tensors, and no other has any."""
    config, file = adapter.config, adapter.file
    nowhere, wrong = [], []
    for module, leaves in adapter.modules.items():
        place = there.get(f"{module}.weight")
        if place is None or "" in leaves or ("A" in leaves and place.kind == "other"):
            nowhere.append(module)
        elif ("A" in leaves) != ("B" in leaves):
            wrong.append(f"{module} has one of its two matrices only")
        else:
            wrong += _wrong_shapes(config, module, leaves, there)
    if nowhere:
        raise ValueError(
            f"{file}: {len(nowhere)} of its modules are none of the base's, {base}: "
            f"{shown(nowhere)}"
        )
    wrong += _lacking(adapter, there)
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} faults: {'; '.join(wrong[:3])}")


def _wrong_shapes(
    config: AdapterConfig, module: str, leaves: dict[str, Stored], there: dict[str, Place]
) -> list[str]:
    """What is wrong with a module's tensors, in words."""
    part, kind = there[f"{module}.weight"]
    shape = tuple(part.tensor.shape)
    wanted: dict[str, tuple[int, ...]] = {"weight": shape}
    if "A" in leaves:
        n_in, n_out = shape[::-1] if kind in ("linear", "head") else shape
        r = config.rank(module)
        wanted |= {"A": (r, n_in), "B": (n_out, r)}
        if config.dora:
            wanted["magnitude"] = (n_out,)
        if config.bias_of_b and kind not in ("embedding", "positions"):
            wanted["bias of B"] = (n_out,)
    if bias := there.get(f"{module}.bias"):
        wanted["bias"] = tuple(bias.part.tensor.shape)
    rows = config.rows(module, kind)
    if "rows" in leaves:
        wanted["rows"] = (len(rows), *shape[1:])
        if rows and max(rows) >= shape[0]:
            return [f"row {max(rows)} of {module} is replaced, which has {shape[0]:,}"]
    needed = [leaf for leaf in ("magnitude", "bias of B") if leaf in wanted]
    said = [f"{module} lacks its {leaf}" for leaf in needed if leaf not in leaves]
    if "bias of B" in leaves and "bias" not in wanted:
        said.append(f"{module} has no bias, to which lora_bias would be added")
    for leaf, stored in leaves.items():
        if leaf not in wanted:
            said.append(f"{module} has a {leaf}, which the config says nothing of")
        elif tuple(stored.shape) != wanted[leaf]:
            said.append(f"{leaf} of {module} is {list(stored.shape)}, not {list(wanted[leaf])}")
    return said


def _lacking(adapter: Adapter, there: dict[str, Place]) -> list[str]:
    """What the config names and the file has nothing of, and the other way round, in words."""
    config, said = adapter.config, []
    for name, place in there.items():
        module, _, leaf = name.rpartition(".")
        has = adapter.modules.get(module, {})
        if place.kind != "other":
            expected = config.changes(module, "linear" if place.kind == "conv1d" else place.kind)
            if expected and "A" not in has:
                said.append(f"{module} has no tensors, but target_modules names it")
            if "A" in has and not expected and not (config.tied and place.kind == "head"):
                said.append(f"{module} has tensors, but target_modules does not name it")
            if config.rows(module, place.kind) and "rows" not in has:
                said.append(f"{module} lacks the rows of trainable_token_indices")
        if config.saves(module) and leaf not in has:
            said.append(f"{name} is lacking, which modules_to_save names")
        biases = config.bias == "all" or (config.bias == "lora_only" and "A" in has)
        if biases and leaf == "bias" and leaf not in has:
            said.append(f"{name} is lacking, as bias is {config.bias!r}")
    names = {name for place in there for name in around(place.rpartition(".")[0])}
    names |= {"embed_out"}  # transformers 5 has no module of that name, and PEFT does not mind
    unknown = [end for end in config.saved if not any(name.endswith(end) for name in names)]
    ends = config.tokens if isinstance(config.tokens, dict) else {}
    unknown += [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
    if unknown:
        said.append(f"the base has no {shown(unknown)}, which is to be replaced")
    return said


# ---------------------------------------------------------------------------------------------
# Into the weights


@torch.no_grad()
def merge(adapter: Adapter, model: "Model", base: Path, keep: bool = False) -> dict[str, Tensor]:
    """Change the base's weights, in a model of the adapter's config, into those of both together.
    keep: return on the host what is changed, for `restore`. ValueError if a number becomes NaN or
    infinite: then the model is spoilt."""
    if is_sharded(model):
        raise ValueError(
            f"{adapter.file.parent} is an adapter, which --fsdp does not merge: merge it into its "
            "base first (checkpoint.py convert)"
        )
    there = places(adapter, model)
    if not isinstance(model, GPTModel):
        _check_untied(adapter, model)
        check(adapter, there, base)
    records = {
        piece.record
        for leaves in adapter.modules.values()
        for stored in leaves.values()
        for piece in stored.pieces
    }
    if records := records - {""}:
        tensorfiles.check_crc(adapter.file, records)
    before, extremes = {}, {}
    for module, leaves in adapter.modules.items():
        names = [name for name in (f"{module}.weight", f"{module}.bias") if name in there]
        if not names:  # of the base's, as was checked, but on another rank
            continue
        values = {leaf: read_whole(stored) for leaf, stored in leaves.items()}
        for name in names:
            if not _changes(name, values):
                continue
            part, kind = there[name]
            if keep:
                before[name] = part.get().to("cpu", copy=True)
            _change(part, kind, name, values, adapter.config)
            extremes[name] = tensorfiles.extremes(part.tensor)
    tensorfiles.refuse_nonfinite(extremes, adapter.file)
    return before


def restore(adapter: Adapter, model: "Model", before: dict[str, Tensor]) -> None:
    """The weights that `merge` kept."""
    there = places(adapter, model)
    for name, values in before.items():
        _put(there[name].part, values)


def _check_untied(adapter: Adapter, model: Any) -> None:
    """A model of transformers' own stays tied: both change, or none."""
    causal_lm = model.causal_lm
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if ends[0].weight is not ends[1].weight:
        return
    for name, module in causal_lm.named_modules():
        if module in ends and set(adapter.modules.get(name, {})) - {"rows"}:
            raise ValueError(
                f"{adapter.file} changes {name}, which the base ties to another: only a model that "
                "runs natively can be untied"
            )


def _changes(name: str, values: dict[str, Tensor]) -> bool:
    """Whether a parameter is changed by the tensors of its module."""
    own = {"weight": ("weight", "A", "rows"), "bias": ("bias", "bias of B")}
    return any(leaf in values for leaf in own[name.rpartition(".")[2]])


def _change(
    part: Part, kind: str, name: str, values: dict[str, Tensor], config: AdapterConfig
) -> None:
    """One parameter, all that its module's tensors make of it."""
    module, _, leaf = name.rpartition(".")
    if leaf in values:
        _put(part, values[leaf])
    if leaf == "bias":
        if "bias of B" in values:
            more = values["bias of B"].float() * config.scale(module)
            _put(part, part.get().float() + more.to(part.tensor.device))
        return
    if "A" in values:
        _put(part, _with_low_rank(part.get().float(), kind, values, config.scale(module)))
    if "rows" in values:
        changed = part.get().clone()
        at = torch.tensor(config.rows(module, kind), device=changed.device)
        _put(part, changed.index_copy(0, at, values["rows"].to(changed)))


def _with_low_rank(weight: Tensor, kind: str, values: dict[str, Tensor], scale: float) -> Tensor:
    """W + s B A, in float32 [out, in], or the transposed where `kind` stores it so; with DoRA's
    magnitudes m, each row of it (of what is [out, in]) has the norm that m says."""
    A, B = (values[leaf].to(weight.device).float() for leaf in "AB")
    turned = kind not in ("linear", "head")
    product = B @ A
    changed = weight + (product.t() if turned else product) * scale
    if "magnitude" not in values:
        return changed
    norms = torch.linalg.norm(changed.t() if turned else changed, dim=1)
    factor = values["magnitude"].to(weight.device).float() / norms
    return factor.view(1, -1) * changed if turned else factor.view(-1, 1) * changed


def _put(part: Part, values: Tensor) -> None:
    part.put(tuple(slice(0, n) for n in values.shape), values)

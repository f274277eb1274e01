"""A PEFT adapter's directory, and what it makes of the weights of its base.

    adapter_config.json   adapter_model.safetensors or adapter_model.bin

    opened = open(path)                             # the adapter alone: headers only
    opened = onto(opened, base)                     # over its base, a handle of checkpoint.py
    merging.merge(opened.adapter, model, base.path)     # into a model that holds the base's weights

Expressed are LoRA and DoRA of matrices and embeddings, modules saved whole, rows of an embedding,
biases. What is not is refused by name (adapter_config.py), and so is a tensor that belongs nowhere
and a module that lacks its own. Where a base ties its head to its embedding and the adapter changes
one of them alone, the model computed is the untied one, as PEFT computes it before it is merged.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import GPTConfig
from durable import dumps
from families.convert import config_to_hf
from formats import Opened, adapter_config, merging, naming, native, shown, tensorfiles, trained
from formats.merging import Adapter
from formats.stored import FLOATS, Stored
from model import GPTModel

if TYPE_CHECKING:
    import checkpoint

FORMAT = "formats/adapters.py"
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
LEAVES = {  # what a tensor's name ends in, after its module's name: what it is
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias of B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
# of a module saved whole under its own name too, where PEFT found the vocabulary resized
COPIES = re.compile(r"\.(modules_to_save|original_module)(?=\.\w+$)")


# ---------------------------------------------------------------------------------------------
# The format


def recognises(path: Path) -> bool:
    """A directory with an adapter's config or weights. With a model beside it is another's."""
    if not os.path.isdir(path):
        return False
    return any(os.path.lexists(path / name) for name in (CONFIG, *WEIGHTS))


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), the latter as our manifest has it, or as transformers' Trainer notes it."""
    manifest = native.read_manifest(path)
    return "adapter", manifest.get("step") if manifest else trained.step_beside(path)


def finished(path: Path) -> bool | None:
    """PEFT writes its config last, transformers' Trainer its state after all else; ours appear
    whole."""
    if native.read_manifest(path) is not None:
        return True
    if not os.path.isfile(path / CONFIG):
        return False
    return True if os.path.isfile(path / "trainer_state.json") else None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The adapter's config and the table of its tensors. config: the base's, not looked at."""
    if not os.path.lexists(path / CONFIG):
        raise ValueError(f"{path} lacks {CONFIG}, which says what its weights are")
    manifest = native.check_manifest(path)  # of those that train.py makes
    said = adapter_config.read(path / CONFIG)
    file = next((path / name for name in WEIGHTS if os.path.lexists(path / name)), None)
    if file is None:
        raise ValueError(f"{path} is an adapter without its weights: {' or '.join(WEIGHTS)}")
    if file.suffix == ".safetensors":
        table = tensorfiles.open_safetensors(file)
    else:
        source = tensorfiles.open_torch(file)
        table = tensorfiles.stored_tensors(source, tensorfiles.mapping(source))
    opened = Opened(
        path=path,
        kind="adapter",
        format=FORMAT,
        tensors=table,
        layout=None,
        files=(path / CONFIG, file),
        step=trained.step_beside(path),
        facts=dict.fromkeys(("epoch", "loss", "tokens")),
        adapter=Adapter(said, file, _by_module(table, file)),
    )
    return native.stated(opened, manifest) if manifest else opened


def _by_module(table: dict[str, Stored], file: Path) -> dict[str, dict[str, Stored]]:
    strange = [name for name in table if not name.startswith(PREFIX)]
    if strange or not table:
        what = f"{shown(strange)}, which do not begin with {PREFIX}" if strange else "no tensors"
        raise ValueError(f"{file} holds {what}: it is no file of PEFT's save_pretrained()")
    plain = {name.removeprefix(PREFIX): stored for name, stored in table.items()}
    copies = [name for name in plain if COPIES.search(name) and COPIES.sub("", name) in plain]
    plain = {name: stored for name, stored in plain.items() if name not in copies}
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in naming.text_only(plain).items():
        if stored.dtype not in FLOATS:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {shown(name)} is of type {kind}, which is not read")
        ending = next((ending for ending in LEAVES if name.endswith(ending)), "")
        leaves = modules.setdefault(name.removesuffix(ending), {})
        leaf = LEAVES.get(ending, "")
        if leaf in leaves:
            raise ValueError(f"{file} holds {shown(name)} under a second name too")
        leaves[leaf] = stored
    return modules


def base_path(opened: Opened, given: str | Path | None) -> Path:
    """Where the base lies: as given, else at the path that the adapter names, from here or beside
    the adapter. ValueError if it is nowhere, or an adapter itself."""
    found = Path(given) if given is not None else _named_base(opened)
    if recognises(found):
        _refuse_another_adapter(opened.path, found)
    return found


def _refuse_another_adapter(path: Path, base: Path) -> None:
    raise ValueError(
        f"{path} is an adapter of {base}, which is an adapter itself: merge that one into its base "
        "first (checkpoint.py convert)"
    )


def _named_base(opened: Opened) -> Path:
    name = opened.adapter.config.base
    if not name:
        raise ValueError(f"{opened.path / CONFIG} does not name its base: give it with --base")
    beside = [opened.path.parent, opened.path.resolve().parent.parent]
    places = [Path(name), *(folder / part for folder in beside for part in (name, Path(name).name))]
    found = next((place for place in places if os.path.exists(place)), None)
    if found is None:
        raise ValueError(
            f"{opened.path / CONFIG} names the base {shown(name)}, which lies neither there nor "
            "beside the adapter: give its path with --base"
        )
    return found


# ---------------------------------------------------------------------------------------------
# Over its base


def onto(opened: Opened, base: "checkpoint.Checkpoint") -> Opened:
    """The adapter's model, as a checkpoint: the base's tensors, the base's config with what the
    adapter makes of it, and every tensor of the adapter checked against it."""
    if base.kind == "adapter":
        _refuse_another_adapter(opened.path, base.path)
    adapter, tensors, config = opened.adapter, dict(base.tensors), base.config
    if base.native:
        assert config is not None and base.layout is not None, "a native one has both"
        adapter = adapter._replace(layout=family_layout(base, config))
        ends = [naming.embedding_name(adapter.layout).removesuffix(".weight")]
        changed = [adapter.modules.get(end, {}) for end in (*ends, merging.head_of(adapter))]
        config = _config_of(changed, config)
        names = naming.embedding_name(base.layout), naming.head_name(base.layout)
        if not config.tie_embeddings:
            tensors.setdefault(names[1], tensors[names[0]])
        for name, leaves in zip(names, changed):  # of a vocabulary that was made larger
            if "weight" in leaves and leaves["weight"].shape != tensors[name].shape:
                tensors[name] = leaves["weight"]
        merging.check(adapter, merging.places(adapter, GPTModel.on_meta(config)), base.path)
    return replace(
        opened,
        tensors=tensors,
        layout=base.layout,
        config=config,
        problem=base.problem,
        native=base.native,
        facts=base.facts | opened.facts,
        adapter=adapter,
    )


def family_layout(base: "checkpoint.Checkpoint", config: GPTConfig) -> str:
    """The names that transformers' class gives to the base's modules, however its files do."""
    if base.layout not in ("native", "nanogpt"):
        return str(base.layout)
    hf = config_to_hf(config)
    if hf is None:
        raise ValueError(
            f"{base.path}: no class of transformers has its features, so the names of an adapter's "
            "modules say nothing of it"
        )
    return str(naming.of_family(hf["model_type"]))


def _config_of(changed: list[dict[str, Stored]], config: GPTConfig) -> GPTConfig:
    """The base's config, with the vocabulary that the adapter has, and untied unless its embedding
    and its head change alike. changed: what the adapter has of the one and of the other."""
    if any(changed) and not (set(changed[0]) == {"rows"} and not changed[1]):
        config = config.replace(tie_embeddings=False)
    whole = changed[0].get("weight")
    if whole is not None and len(whole.shape) == 2:
        config = config.replace(vocab_size=whole.shape[0])
    return config


# ---------------------------------------------------------------------------------------------
# Writing


def write(directory: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The two files as PEFT's save_pretrained() writes them, in float32. settings: what sets this
    LoRA adapter apart; tensors: by the names of `LEAVES` after those of transformers' modules."""
    named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    tensorfiles.write_safetensors(directory / WEIGHTS[0], named, torch.float32)
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}
    text = dumps(said | settings, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")

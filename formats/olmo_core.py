"""OLMo-core's checkpoints: the container of dcp.py, and a config.json of its own.

    step1000/config.json  .metadata.json  train/rank0.pt …
             model_and_optim/.metadata  __0_0.distcp …

Models whose blocks are Llama's are read; blocks that normalise what a branch gives (OLMo 2 and 3),
and whatever else of config.json GPTConfig has no word for, are refused by name.
"""

import os
from pathlib import Path
from typing import Any

from config import GPTConfig, read_json
from formats import Opened, dcp, trained

FORMAT = "formats/olmo_core.py"
# what decides nothing, and what is read below
IGNORED = {"_CLASS_", "dtype", "name", "type", "init_method", "init_seed", "init_std", "backend"}
IGNORED |= {"loss_implementation", "use_flash", "full_precision", "freeze_params", "dropout"}


def recognises(path: Path) -> bool:
    """By its folder of weights."""
    folder = path / "model_and_optim"
    return os.path.isdir(folder) and dcp.place(folder) is not None


def finished(path: Path) -> bool | None:
    """As dcp.py's."""
    return dcp.finished(path / "model_and_optim")


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); the step is in the name."""
    return "olmo-core", None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The tables of dcp.py and what config.json says of the model."""
    tensors = dcp.tensors_in(path / "model_and_optim")
    files, problem = dcp.metadata_files(path / "model_and_optim"), ""
    file = path / "config.json"
    if config is None and file.is_file():
        try:
            config = _config(read_json(file), str(file))
        except ValueError as error:
            problem = str(error)
        files = [*files, file]
    return trained.opened(path, "olmo-core", FORMAT, tensors, config, files, problem=problem)


def _config(values: dict, where: str) -> GPTConfig:
    model = _section(values, "model", where)
    block = _section(model, "block", where)
    mixer = "attention" if "attention" in block else "sequence_mixer"
    attention, mlp = _section(block, mixer, where), _section(block, "feed_forward", where)
    norm, rope = _section(block, "layer_norm", where), _section(attention, "rope", where)
    head, qk = _section(model, "lm_head", where), attention.get("qk_norm")
    last = _section(head, "layer_norm", where)
    for section, name, taken in (
        (model, "model", "d_model n_layers vocab_size block lm_head tie_word_embeddings"),
        (block, "block", f"{mixer} feed_forward layer_norm"),
        (attention, mixer, "n_heads n_kv_heads head_dim rope qk_norm use_head_qk_norm"),
        (mlp, "feed_forward", "hidden_size activation"),
        (norm, "layer_norm", "eps elementwise_affine"),
        (rope, "rope", "theta partial_rotary_factor"),
        (head, "lm_head", "layer_norm"),
    ):
        for key in section.keys() - IGNORED - set(taken.split()):
            if section[key]:
                raise ValueError(f"{where}: {name}.{key} = {section[key]!r} has no native form")
    for found, wanted, name in (
        (block.get("name", "default"), "default", "block.name"),
        (attention.get("name", "default"), "default", f"{mixer}.name"),
        (rope.get("name", "default"), "default", "rope.name"),
        (rope.get("partial_rotary_factor", 1.0), 1.0, "rope.partial_rotary_factor"),
        (mlp.get("activation", "silu"), "silu", "feed_forward.activation"),
        (norm.get("name"), "rms", "layer_norm.name"),
        (last.get("eps"), norm.get("eps"), "lm_head.layer_norm.eps"),
        (qk is None or attention.get("use_head_qk_norm"), True, f"{mixer}.use_head_qk_norm"),
        ((qk or norm).get("eps"), norm.get("eps"), f"{mixer}.qk_norm.eps"),
    ):
        if found != wanted:
            raise ValueError(f"{where}: {name} = {found!r} has no native form, {wanted!r} has")
    fields = {
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": _context(values, where),
        "n_layers": model.get("n_layers"),
        "n_heads": attention.get("n_heads"),
        "n_kv_heads": attention.get("n_kv_heads"),
        "head_dim": attention.get("head_dim"),
        "d_model": model.get("d_model"),
        "d_ff": mlp.get("hidden_size"),
        "norm_eps": norm.get("eps"),
        "rope_theta": rope.get("theta"),
        "qk_norm": qk is not None,
        "tie_embeddings": bool(model.get("tie_word_embeddings", False)),
    }
    return GPTConfig.from_dict(fields | trained.LLAMA, where)


def _section(values: dict, name: str, where: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} has no section {name!r}: it is not of a language model's training"
        )
    return found


def _context(values: dict, where: str) -> int:
    """The longest sequence that it was trained on: no field of the model says it."""
    for section, name in (("train_module", "max_sequence_length"), ("dataset", "sequence_length")):
        found = values.get(section)
        if isinstance(found, dict) and type(found.get(name)) is int:
            return found[name]
    raise ValueError(
        f"{where} says neither train_module.max_sequence_length nor dataset.sequence_length: give "
        "the model's config with --config"
    )

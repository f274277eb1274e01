"""One file of weights: what torch.save wrote, or a .safetensors alone.

    rosetrainer   {model, optimizer, step, config, …}
    nanoGPT       {model, optimizer, model_args, iter_num, …}
    training      checkpoint-{step}/pytorch_model.bin: {model_state_dict, optimizer_state_dict, …}
    weights       a state dict alone, its config in config.json beside it or given with --config

Optimizers' tensors in the same file are never read, nor kept mapped.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import GPTConfig
from formats import Opened, huggingface, layouts, tensorfiles
from formats.stored import Stored

FORMAT = "formats/pt_files.py"
NOT_WEIGHTS = re.compile(
    r"(trainer_state|optimizer|scheduler|rng_state.*|training_args|scaler)\.\w+"
)


def recognises(path: Path) -> bool:
    """A file, by its suffix, or a directory with a lone pytorch_model.bin."""
    if path.is_dir():
        file = huggingface.weight_file(path)
        return file is not None and file.name == "pytorch_model.bin"
    suffixes = (*tensorfiles.TORCH_SUFFIXES, ".safetensors")
    return path.suffix in suffixes and path.is_file() and not NOT_WEIGHTS.fullmatch(path.name)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of the file. Its own config comes before a config.json beside it."""
    file = path / "pytorch_model.bin" if path.is_dir() else path
    table, rest = _open_file(file)
    if not table:
        raise ValueError(f"{path} holds no tensors")
    said = huggingface.config_beside(path, config, table)
    tensors, layout = layouts.identify(table, said.model_type)
    if config is None:
        try:
            inside = _config_inside(rest, tensors, path)
            if inside is not None:
                said = said._replace(config=inside, problem="", native=True)
        except ValueError as error:
            said = said._replace(config=None, problem=str(error), native=True)
    numbers = {name: number(rest.get(name)) for name in ("epoch", "loss", "step", "iter_num")}
    step = numbers["iter_num"] if numbers["step"] is None else numbers["step"]
    trained = rest.get("config")
    parallel = isinstance(trained, dict) and trained.get("use_tensor_parallel")
    return Opened(
        path=path,
        kind=_kind(path, rest),
        format=FORMAT,
        tensors=tensors,
        layout=layout,
        files=(file, *said.files),
        config=said.config,
        problem=said.problem,
        native=said.native,
        step=step if isinstance(step, int) else None,
        facts={"epoch": numbers["epoch"], "loss": numbers["loss"], **said.token_ids},
        hint="use_tensor_parallel saved the shard of one rank only" if parallel else "",
    )


def _open_file(file: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(tensors, what else there is) of one file."""
    if file.suffix == ".safetensors":
        return tensorfiles.open_safetensors(file), {}
    source = tensorfiles.open_torch(file)
    contents = tensorfiles.mapping(source)
    for key in ("model", "model_state_dict"):
        if isinstance(contents.get(key), dict):
            rest = {k: v for k, v in contents.items() if k != key}
            return tensorfiles.stored_tensors(source, contents[key]), rest
    return tensorfiles.stored_tensors(source, contents), {}


def _kind(path: Path, rest: dict) -> str:
    if _is_nanogpt(rest):
        return "nanogpt"
    if "optimizer_state_dict" in rest:
        return "training"
    if path.is_dir():
        return huggingface.glance(path)[0]
    return "rosetrainer" if "step" in rest or "config" in rest else "weights"


def number(value: Any) -> int | float | None:
    """A plain number of what a training file holds: numpy's and one-element tensors included."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, (int, float)) else None


# ---------------------------------------------------------------------------------------------
# The configs that such files hold


def _config_inside(rest: dict, tensors: dict[str, Stored], path: Path) -> GPTConfig | None:
    if isinstance(rest.get("model_args"), dict):
        return _nanogpt_config(rest["model_args"], path)
    if isinstance(rest.get("config"), dict):
        return _rosetrainer_config(rest["config"], tensors, path)
    return None


def _rosetrainer_config(values: dict, tensors: dict[str, Stored], path: Path) -> GPTConfig:
    """Of fields that older files lack, sizes are what the shapes say, dropout and activation
    rosetrainer's defaults (0.1, erf GELU). Its activation is tanh GELU only if "gelu_new"."""
    trainers_own = ("use_tensor_parallel", "use_activation_checkpoint")
    values = {k: v for k, v in values.items() if k not in trainers_own}
    values |= {k: v.item() for k, v in values.items() if isinstance(v, np.generic)}
    if "n_heads" not in values:
        raise ValueError(
            f"{path}: its config lacks n_heads, which no shape tells: give the model's "
            "config, a preset or a YAML file, with --config"
        )
    if "norm" not in values:  # rosetrainer's fields only
        values["activation"] = "gelu_new" if values.get("activation") == "gelu_new" else "gelu"
    return GPTConfig.from_dict(layouts.sizes(tensors) | values, str(path))


def _is_nanogpt(rest: dict) -> bool:
    """llama2.c has model_args too, of another architecture."""
    args = rest.get("model_args")
    return args is not None and not (
        isinstance(args, dict) and {"dim", "n_kv_heads"} <= args.keys()
    )


def _nanogpt_config(args: dict, path: Path) -> GPTConfig:
    if not _is_nanogpt({"model_args": args}):
        raise ValueError(f"{path}: its model_args are llama2.c's, which is not read")
    try:
        return GPTConfig(
            vocab_size=args["vocab_size"],
            max_position_embeddings=args["block_size"],
            n_layers=args["n_layer"],
            n_heads=args["n_head"],
            d_model=args["n_embd"],
            d_ff=4 * args["n_embd"],
            dropout=args.get("dropout", 0.0),
            bias=args.get("bias", True),
            activation="gelu",
        )
    except KeyError as error:
        raise ValueError(f"{path}: model_args lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from None

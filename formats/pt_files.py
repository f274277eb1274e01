"""One file of weights: what torch.save wrote, or a .safetensors alone.

    rosetrainer   {model, optimizer, step, config, …}
    nanoGPT       {model, optimizer, model_args, iter_num, …}
    training      checkpoint-{step}/pytorch_model.bin: {model_state_dict, optimizer_state_dict, …}
    Lightning     {state_dict, pytorch-lightning_version, global_step, …}
    DeepSpeed     {module, ds_version, global_steps, …} of ZeRO 0, 1 and 2
    weights       a state dict alone, its config in config.json beside it or given with --config

Optimizers' tensors in the same file are never read.
"""

import os
import re
from pathlib import Path
from typing import Any

from config import GPTConfig
from families.llama import size
from formats import Opened, huggingface, inert, layouts, llmc, naming, pickles, shown, tensorfiles
from formats.stored import Stored

FORMAT = "formats/pt_files.py"
NOT_WEIGHTS = re.compile(
    r"(trainer_state|optimizer|scheduler|rng_state.*|random_states.*|training_args|scaler"
    r"|adapter_model)\.\w+"
)
# Where the weights are, the first that is there; below one of them there can be another
WEIGHT_KEYS: tuple[str, ...] = (
    "model",
    "model_state_dict",
    "state_dict",
    "module",
    "model_state",
    "weights",
)
WEIGHT_KEYS += ("params", "net", "network", "ema_model", "ema", "ema_state_dict")
MAX_DEPTH = 4
STEPS = ("step", "iter_num", "global_step", "global_steps", "iteration")


def recognises(path: Path) -> bool:
    """A file, by its suffix, or a directory with a lone pytorch_model.bin."""
    if os.path.isdir(path):
        file = huggingface.weight_file(path)
        return file is not None and file.name == "pytorch_model.bin"
    suffixes = (*tensorfiles.TORCH_SUFFIXES, ".safetensors")
    other = NOT_WEIGHTS.fullmatch(path.name) or huggingface.SHARD.fullmatch(path.name)
    named = path.suffix in suffixes and not other
    return named and os.path.isfile(path) and llmc.magic(path) not in llmc.OTHERS


def tries(path: Path) -> bool:
    """Any file: what is in it says why it is none."""
    return os.path.isfile(path)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of the file. Its own config comes before a config.json beside it."""
    if other := llmc.OTHERS.get(llmc.magic(path) or 0):
        raise ValueError(f"{path} is a file of llm.c, but no model that is read: {other}")
    file = path
    if os.path.isdir(path):
        huggingface.refuse_strange_files(path)
        file = path / "pytorch_model.bin"
    table, rest, numbers, left_out = _open_file(file)
    if not table:
        raise ValueError(f"{path} holds no tensors")
    said = huggingface.config_beside(path, config, table)
    tensors, layout = naming.identify(table, said.model_types)
    if config is None:
        try:
            inside = _config_inside(rest, tensors, layout, path)
            if inside is not None:
                said = said._replace(config=inside, problem="", native=True)
        except ValueError as error:
            said = said._replace(config=None, problem=str(error)[:1000], native=True)
    steps = (numbers[name] for name in STEPS if numbers.get(name) is not None)
    step = next(steps, None)
    trained = rest.get("config")
    parallel = isinstance(trained, dict) and trained.get("use_tensor_parallel") is True
    facts = {"epoch": numbers.get("epoch"), "loss": numbers.get("loss"), **said.token_ids}
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
        step=step if isinstance(step, int) and 0 <= step < 2**53 else None,
        facts=facts | ({"left_out": left_out} if left_out else {}),
        hint="use_tensor_parallel saved the shard of one rank only" if parallel else "",
    )


def _open_file(file: Path) -> tuple[dict[str, Stored], dict[str, Any], dict, list[str]]:
    """(tensors, what else there is, the numbers among it, other weights' keys) of one file."""
    shard = huggingface.SHARD.fullmatch(file.name)
    if shard and int(shard[3]) > 1:
        raise ValueError(f"{file} is one shard of {int(shard[3])}: give its directory")
    if file.suffix == ".safetensors":
        return tensorfiles.open_safetensors(file), {}, {}, []
    source = tensorfiles.open_torch(file)
    weights, rest, left_out = _find_weights(tensorfiles.mapping(source), file)
    names = (*STEPS, "epoch", "loss")
    numbers = {name: tensorfiles.number(source, rest.get(name)) for name in names}
    return tensorfiles.stored_tensors(source, weights), rest, numbers, left_out


def _find_weights(contents: dict, file: Path) -> tuple[dict, dict[str, Any], list[str]]:
    """(the state dict, what lies beside it, the keys of other ones). ValueError where nothing says
    which of the dictionaries in a file are its weights."""
    rest: dict[str, Any] = {}
    weights = contents
    for _ in range(MAX_DEPTH):  # a dictionary can hold itself
        key = next((k for k in WEIGHT_KEYS if isinstance(weights.get(k), dict)), None)
        if key is None:
            break
        rest |= {k: v for k, v in weights.items() if k != key}
        weights = weights[key]
    if weights is contents and not any(isinstance(v, inert.Tensor) for v in weights.values()):
        whole = [v.name for v in weights.values() if isinstance(v, pickles.Record)]
        others = [str(k) for k, v in weights.items() if isinstance(v, dict) and _all_tensors(v)]
        if others or whole:
            raise ValueError(
                f"{file} holds no state dict under {', '.join(WEIGHT_KEYS[:4])}, but "
                f"{shown(others or whole)}: save the state_dict() of the model as `model`"
            )
    tables = [str(k) for k, v in rest.items() if isinstance(v, dict) and _all_tensors(v)]
    return weights, rest, tables


def _all_tensors(contents: dict) -> bool:
    return bool(contents) and all(isinstance(v, inert.Tensor) for v in contents.values())


def _kind(path: Path, rest: dict) -> str:
    if _is_nanogpt(rest):
        return "nanogpt"
    if "pytorch-lightning_version" in rest:
        return "lightning"
    if "ds_version" in rest or "ds_config" in rest:
        return "deepspeed"
    if "optimizer_state_dict" in rest:
        return "training"
    if os.path.isdir(path):
        return huggingface.glance(path)[0]
    return "rosetrainer" if "step" in rest or "config" in rest else "weights"


# ---------------------------------------------------------------------------------------------
# The configs that such files hold


def _config_inside(
    rest: dict, tensors: dict[str, Stored], layout: str | None, path: Path
) -> GPTConfig | None:
    if isinstance(rest.get("model_args"), dict):
        _refuse_nested(rest["model_args"], path)
        return _nanogpt_config(rest["model_args"], path)
    if isinstance(rest.get("config"), dict):
        _refuse_nested(rest["config"], path)
        return _rosetrainer_config(rest["config"], layouts.sizes(tensors, layout), path)
    return None


def _refuse_nested(values: dict, path: Path) -> None:
    """A list that holds one list twice, and so on, has no end when it is shown."""
    for name, value in values.items():
        items = value.values() if isinstance(value, dict) else value
        inside = items if isinstance(value, (dict, list, tuple)) else ()
        if any(isinstance(item, (dict, list, tuple)) for item in inside):
            raise ValueError(f"{path}: {name!r:.60} of its config is more than a list of values")


def _rosetrainer_config(values: dict, known: dict[str, int], path: Path) -> GPTConfig:
    """Of fields that older files lack, sizes are what the shapes say, dropout and activation
    rosetrainer's defaults (0.1, erf GELU). Its activation is tanh GELU only if "gelu_new"."""
    trainers_own = ("use_tensor_parallel", "use_activation_checkpoint")
    values = {k: v for k, v in values.items() if k not in trainers_own}
    if "n_heads" not in values:
        raise ValueError(
            f"{path}: its config lacks n_heads, which no shape tells: give the model's "
            "config, a preset or a YAML file, with --config"
        )
    if "norm" not in values:  # rosetrainer's fields only
        values["activation"] = "gelu_new" if values.get("activation") == "gelu_new" else "gelu"
    return GPTConfig.from_dict(known | values, str(path))


def _is_nanogpt(rest: dict) -> bool:
    """llama2.c has model_args too, of another architecture."""
    args = rest.get("model_args")
    return isinstance(args, dict) and "n_embd" in args


def _nanogpt_config(args: dict, path: Path) -> GPTConfig:
    if "dim" in args and "n_embd" not in args:
        raise ValueError(f"{path}: its model_args are llama2.c's, which is not read")
    try:
        return GPTConfig(
            vocab_size=args["vocab_size"],
            max_position_embeddings=args["block_size"],
            n_layers=args["n_layer"],
            n_heads=args["n_head"],
            d_model=args["n_embd"],
            d_ff=4 * size("n_embd", args["n_embd"]),
            dropout=args.get("dropout", 0.0),
            bias=args.get("bias", True),
            activation="gelu",
        )
    except KeyError as error:
        raise ValueError(f"{path}: model_args lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from None

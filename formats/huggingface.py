"""A directory as transformers writes it: config.json beside weights, whole or in shards.

    config.json   model.safetensors
                  model.safetensors.index.json, model-00001-of-00002.safetensors, …
                  pytorch_model.bin.index.json, pytorch_model-00001-of-00002.bin, …

GPTModel runs it where it can express the config, transformers where it cannot. A pytorch_model.bin
alone is pt_files.py's: only its contents tell what it is.
"""

import json
from pathlib import Path
from typing import NamedTuple

import cli
from config import GPTConfig, read_json
from durable import refuse_impostor
from formats import Opened, layouts, tensorfiles
from formats.stored import Stored
from hf_config import UnsupportedArchitecture
from hf_convert import config_to_hf

FORMAT = "formats/huggingface.py"
WEIGHT_FILES: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id")


def weight_file(directory: Path) -> Path | None:
    """The file of weights, or the index of its shards."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def recognises(path: Path) -> bool:
    """A directory of weights, but for a lone pytorch_model.bin."""
    file = weight_file(path)
    return file is not None and file.name != "pytorch_model.bin"


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the names of files."""
    return "huggingface" if (path / "config.json").is_file() else "weights", None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The headers of all shards, and config.json."""
    index = weight_file(path)
    if index is None:
        raise ValueError(f"{path} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    shards = shard_files(index)
    table = _tables(shards, path)
    said = config_beside(path, config, table)
    tensors, layout = layouts.identify(table, said.model_type)
    return Opened(
        path=path,
        kind=glance(path)[0],
        format=FORMAT,
        tensors=tensors,
        layout=layout,
        files=(*sorted({index, *shards}), *said.files),
        config=said.config,
        problem=said.problem,
        native=said.native,
        facts=said.token_ids,
    )


def shard_files(index: Path) -> list[Path]:
    """The files of an index, or the one file that it is."""
    if index.suffix != ".json":
        return [index]
    refuse_impostor(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = cli.first_line(error)
        raise ValueError(f"{index} is no index of shards: {why}") from None
    for name in names:
        if type(name) is not str or Path(name).name != name or name == "..":
            raise ValueError(f"{index} names {name!r}: a shard lies in the same directory")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:5])}"
        )
    return [index.parent / name for name in names]


def _tables(shards: list[Path], path: Path) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in shards:
        if file.suffix == ".safetensors":
            table = tensorfiles.open_safetensors(file)
        else:
            source = tensorfiles.open_torch(file)
            table = tensorfiles.stored_tensors(source, tensorfiles.mapping(source))
        for name in table.keys() & tensors.keys():
            raise ValueError(f"{file} holds {name}, and so does {tensors[name].pieces[0].file}")
        tensors |= table
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


# ---------------------------------------------------------------------------------------------
# config.json


class ConfigBeside(NamedTuple):
    """What is known of a model from outside its weights."""

    config: GPTConfig | None
    problem: str  # why there is none
    model_type: object  # Hugging Face's, which the names of weights depend on
    native: bool  # False: a directory whose architecture transformers alone has
    files: tuple[Path, ...]  # config.json, where it is part of the checkpoint
    token_ids: dict[str, int | None]


def config_beside(path: Path, given: GPTConfig | None, tensors: dict[str, Stored]) -> ConfigBeside:
    """`given`, else what the config.json in a directory, or beside a file, says."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    config, problem, native, values = given, "", True, {}
    if file.is_file():
        try:
            values = read_json(file)
            config = given or GPTConfig.from_json(values, str(file))
            native = given is not None or not config.n_experts or not path.is_dir()
        except UnsupportedArchitecture as error:
            problem, native = str(error), not path.is_dir()
        except ValueError as error:
            problem = str(error)
    elif given is None:
        problem = no_config(path, layouts.strip_wrappers(tensors))
    if given is not None:
        values = values | (config_to_hf(given) or {})
    files = (file,) if path.is_dir() and file.is_file() else ()
    token_ids = {key: values.get(key) for key in TOKEN_IDS}
    return ConfigBeside(config, problem, values.get("model_type"), native, files, token_ids)


def no_config(path: Path, tensors: dict[str, Stored]) -> str:
    """What to say of weights alone."""
    known = ", ".join(f"{k}={v}" for k, v in layouts.sizes(tensors).items())
    return (
        f"{path} has no config. Its shapes say {known or 'nothing'}, but not n_heads or "
        "the activation: give the model's config, a preset or a YAML file, with --config"
    )

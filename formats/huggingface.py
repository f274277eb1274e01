"""A directory as transformers writes it: config.json beside weights, whole or in shards.

    config.json   model.safetensors
                  model.safetensors.index.json, model-00001-of-00002.safetensors, …
                  pytorch_model.bin.index.json, pytorch_model-00001-of-00002.bin, …

GPTModel runs it where it can express the config, transformers where it cannot. A pytorch_model.bin
alone is pt_files.py's: only its contents tell what it is.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from config import GPTConfig, read_json
from durable import dumps
from families.convert import config_to_hf
from families.llama import UnsupportedArchitecture
from formats import Opened, layouts, naming, quantised, shown, tensorfiles
from formats.stored import Stored
from inputs import read_object
from packed import require_file

FORMAT = "formats/huggingface.py"
WEIGHT_FILES: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD = re.compile(r"(model|pytorch_model)-(\d{1,6})-of-(\d{1,6})\.(safetensors|bin)")
FILE_NAME = re.compile(r"\.(json|safetensors|bin|pt|model)$")
MAX_INDEX = 64 << 20  # bytes; that of a model of 10^12 parameters has 13 MB
TOKEN_IDS = ("bos_token_id", "eos_token_id")


def weight_file(directory: Path) -> Path | None:
    """The file of weights, or the index of its shards, whatever is the matter with it."""
    there = [directory / name for name in WEIGHT_FILES]
    there += sorted(directory.glob("gptq_model-*bit-*.safetensors"))  # AutoGPTQ's
    return next((file for file in there if os.path.lexists(file)), None)


def loose_shards(directory: Path) -> list[Path]:
    """Shards, where they lie without anything that says which belong together."""
    if weight_file(directory) or not os.path.isdir(directory):
        return []
    return sorted(directory / name for name in os.listdir(directory) if SHARD.fullmatch(name))


def recognises(path: Path) -> bool:
    """A directory of weights, but for a lone pytorch_model.bin."""
    file = weight_file(path)
    return file.name != "pytorch_model.bin" if file else bool(loose_shards(path))


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the names of files."""
    return "huggingface" if (path / "config.json").is_file() else "weights", None


Table = dict[str, Stored]


def open(
    path: Path,
    config: GPTConfig | None = None,
    dense: Callable[[Table, quantised.Settings], tuple[Table, dict[str, Any]]] | None = None,
    format: str = FORMAT,
) -> Opened:
    """The headers of all shards, and config.json. dense: for a format that knows how the weights
    were quantised, the table with one tensor for each matrix, and facts."""
    refuse_strange_files(path)
    settings = quantised.settings_of(path) if os.path.isdir(path) else None
    if settings is not None and dense is None:
        read = "GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes"
        raise ValueError(
            f"{settings.file}: the model is quantised ({settings.method}), which is not read (read "
            f"are {read}): name the original"
        )
    index = weight_file(path)
    if index is None:
        files, shards = [], complete(loose_shards(path), path)
        table = _union(shards)
    elif index.suffix == ".json":
        where = weight_map(index)
        files, shards = [index], sorted({index.parent / name for name in where.values()})
        table = _as_mapped(where, shards, index)
    else:
        files, shards = [], [index]
        table = _table(index)
    if not table:
        raise ValueError(f"{path} holds no tensors")
    facts = {}
    if settings is not None and dense is not None:
        table, facts = dense(table, settings)
        beside = settings.file.name != "config.json" and bool(facts)
        files += [settings.file] if beside else []
    said = config_beside(path, config, table)
    tensors, layout = naming.identify(table, said.model_types)
    return Opened(
        path=path,
        kind=facts["method"] if facts else glance(path)[0],
        format=format,
        tensors=tensors,
        layout=layout,
        files=(*sorted([*files, *shards]), *said.files),
        config=said.config,
        problem=said.problem,
        native=said.native,
        facts=said.token_ids | ({"quantisation": facts} if facts else {}),
    )


def refuse_strange_files(directory: Path) -> None:
    """ValueError for a FIFO, a socket or a device in a checkpoint's directory, and for a directory
    with the name of a file: whoever reads it next, transformers or the tokenizer, would hang."""
    for entry in os.scandir(directory):
        folder = os.path.isdir(entry.path) and not FILE_NAME.search(entry.name)
        if not folder and os.path.exists(entry.path):
            require_file(entry.path)
    if os.path.lexists(directory / "adapter_config.json"):
        raise ValueError(
            f"{directory} holds adapter_config.json beside a model: whether its numbers are with "
            "or without the adapter is not said. Merge it, or move the adapter away"
        )


# ---------------------------------------------------------------------------------------------
# Shards


def complete(shards: list[Path], directory: Path) -> list[Path]:
    """Shards without an index, if they are all of one model. ValueError names what is missing."""
    if not shards:
        raise ValueError(f"{directory} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    found = [m for file in shards if (m := SHARD.fullmatch(file.name))]
    if len({(m[1], m[3], m[4]) for m in found}) > 1:
        raise ValueError(f"{directory} holds shards of several models and no index says which")
    total, there = int(found[0][3]), {int(m[2]) for m in found}
    missing = [n for n in range(1, total + 1) if n not in there]
    if missing or len(found) != total:
        names = [f"{found[0][1]}-{n:05d}-of-{found[0][3]}.{found[0][4]}" for n in missing]
        raise ValueError(
            f"{directory} has no index of its shards, and of {total:,} lacks {len(missing):,}: "
            f"{shown(names)}"
        )
    return shards


def shard_names(n: int) -> list[str]:
    """The files of weights in n parts."""
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def write_index(directory: Path, where: dict[str, str], total_size: int) -> None:
    """Which file of several each tensor is in, and the bytes of all of them."""
    index = {"metadata": {"total_size": total_size}, "weight_map": where}
    text = dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, in the index's directory, as the index has it."""
    where = read_object(index, MAX_INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} is no index of shards: it has no weight_map")
    for name in where.values():
        if not is_plain_name(name):
            raise ValueError(f"{index} names {name!r:.100}: a shard lies in the same directory")
    names = set(where.values())
    missing = sorted(name for name in names if not os.path.lexists(index.parent / name))
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {shown(missing)}"
        )
    kind = index.name.removesuffix(".index.json").partition(".")  # model . safetensors
    shards = (SHARD.fullmatch(name) for name in os.listdir(index.parent))
    others = sorted(m[0] for m in shards if m and (m[1], m[4]) == (kind[0], kind[2]))
    unnamed = [name for name in others if name not in names]
    if unnamed:
        raise ValueError(f"{index} does not name {shown(unnamed)}, which lies beside it")
    return where


def is_plain_name(name: Any) -> bool:
    """Whether it is the name of a file in the same directory: a link in a cache is one too."""
    return type(name) is str and Path(name).name == name and name != ".." and "\0" not in name


def _table(file: Path) -> dict[str, Stored]:
    if file.suffix == ".safetensors":
        return tensorfiles.open_safetensors(file)
    source = tensorfiles.open_torch(file)
    return tensorfiles.stored_tensors(source, tensorfiles.mapping(source))


def _union(shards: list[Path]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in shards:
        table = _table(file)
        for name in table.keys() & tensors.keys():
            other = tensors[name].pieces[0].file
            raise ValueError(
                f"{file} holds {shown(name)}, and so does {other}: no index says which"
            )
        tensors |= table
    return tensors


def _as_mapped(where: dict[str, str], shards: list[Path], index: Path) -> dict[str, Stored]:
    """Each tensor from the file that the index names, whoever else holds one of that name."""
    tensors: dict[str, Stored] = {}
    for file in shards:
        table = _table(file)
        tensors |= {name: t for name, t in table.items() if where.get(name) == file.name}
        unnamed = [name for name in table if name not in where]
        if unnamed:
            raise ValueError(f"{file} holds {shown(unnamed)}, which {index.name} does not name")
    lacking = [name for name in where if name not in tensors]
    if lacking:
        file = index.parent / where[lacking[0]]
        raise ValueError(f"{file} lacks {shown(lacking)}, which {index.name} says it holds")
    return tensors


# ---------------------------------------------------------------------------------------------
# config.json


class ConfigBeside(NamedTuple):
    """What is known of a model from outside its weights."""

    config: GPTConfig | None
    problem: str  # why there is none
    model_types: tuple[object, ...]  # Hugging Face's, which the names of weights depend on
    native: bool  # False: a directory whose architecture transformers alone has
    files: tuple[Path, ...]  # config.json, where it is part of the checkpoint
    token_ids: dict[str, int | None]


def config_beside(path: Path, given: GPTConfig | None, tensors: dict[str, Stored]) -> ConfigBeside:
    """`given`, else what the config.json in a directory, or beside a file, says."""
    directory = os.path.isdir(path)
    file = (path if directory else path.parent) / "config.json"
    config, problem, native, values = given, "", True, {}
    try:
        values = read_json(file) if os.path.lexists(file) else {}
        if given is None and values:
            _refuse_too_large(values, tensors, file)
            config = GPTConfig.from_json(values, str(file))
    except UnsupportedArchitecture as error:
        problem, native = str(error)[:1000], not directory
    except ValueError as error:
        problem = str(error)[:1000]
    if not (config or problem):
        problem = no_config(path, tensors)
    model_types: tuple[object, ...] = tuple(v for k, v in values.items() if k == "model_type")
    if given is not None:  # which, if it is a Llama's, can be theirs as well
        model_types += ((config_to_hf(given) or {}).get("model_type"), "llama", "phi3", "glm")
    files = (file,) if directory and os.path.isfile(file) else ()
    ids = {key: _token_id(values.get(key)) for key in TOKEN_IDS}
    return ConfigBeside(config, "" if config else problem, model_types, native, files, ids)


def _token_id(value: Any) -> Any:
    """A token id or several, None for what is none."""
    plain = isinstance(value, list) and len(value) < 100 and all(type(v) is int for v in value)
    return value if plain or type(value) is int else None


SIDES: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_embd",
    "n_inner",
    "d_model",
)
SIDES += ("d_ff", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EXPERTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts")


def _refuse_too_large(values: dict, tensors: dict[str, Stored], file: Path) -> None:
    """ValueError for a size that no tensor has, and for more layers than there are tensors: before
    anybody makes a model, or a list, of them."""
    longest = max((n for t in tensors.values() for n in t.shape), default=0)
    sides = f"no tensor of the checkpoint has a side of more than {longest:,}"
    counts = f"the checkpoint has {len(tensors):,} tensors in all"
    limits = {name: (longest, sides) for name in SIDES}
    limits |= {name: (len(tensors), counts) for name in LAYERS}
    limits |= {name: (max(longest, len(tensors)), sides) for name in EXPERTS}
    inner = values.get("text_config")
    for part in (values, inner if isinstance(inner, dict) else {}):
        for name, (limit, why) in limits.items():
            value = part.get(name)
            if name == "intermediate_size" and "moe_intermediate_size" in part:
                continue  # of dense layers, of which a mixture may have none
            if isinstance(value, (int, float)) and value > limit:
                raise ValueError(f"{file}: {name} is {value!r:.30}, but {why}")


def no_config(path: Path, tensors: dict[str, Stored]) -> str:
    """What to say of weights alone."""
    tensors, layout = naming.identify(tensors)
    if layout is None:
        return f"{path} has no config, and {naming.unknown_names(tensors)}"
    known = ", ".join(f"{k}={v}" for k, v in layouts.sizes(tensors, layout).items())
    return (
        f"{path} has no config. Its shapes say {known or 'nothing'}, but not n_heads or "
        "the activation: give the model's config, a preset or a YAML file, with --config"
    )

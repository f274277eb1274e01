"""A checkpoint written anew: as our own directory, or as one that only transformers' files make up.

    to_native(ckpt, Path("out"))
    to_hf(ckpt, Path("out"), "bfloat16", max_shard_size=5 * 10**9)

`ckpt` is a handle of checkpoint.py. Everything is refused before anything is written; a directory
appears whole or not at all, and never in another's place.
"""

import dataclasses
import itertools
import os
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cli
from config import CHOICES, GPTConfig
from durable import check_writable, dumps
from families.convert import config_to_hf
from formats import huggingface, layouts, naming, native, tensorfiles
from formats.stored import FLOATS
from model import GPTModel
from tokenizer import TOKENIZER_COPIES, build_tokenizer

if TYPE_CHECKING:
    from checkpoint import Checkpoint

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MAX_SHARD_SIZE = "5GB"


def to_native(ckpt: "Checkpoint", final: Path) -> Path:
    """A directory as `save_checkpoint` writes it, in the dtype that the checkpoint has, without
    training state."""
    refuse(ckpt, final)
    model = loaded(ckpt, dtype_of(ckpt))
    about = {"step": ckpt.step, "converted": ckpt.path.name}
    with native.appearing(final, about) as directory:
        native.write_weights(model, model.config, directory, dtype=dtype_of(ckpt), **_ids(ckpt))
        _copy_tokenizer(ckpt, directory)
    return final


def to_hf(ckpt: "Checkpoint", final: Path, dtype: str | None, max_shard_size: int) -> Path:
    """A Hugging Face directory and nothing else: config.json of the family that computes the same,
    safetensors of at most `max_shard_size` bytes with their index, the tokenizer's files. dtype: as
    the checkpoint has it, unless given."""
    refuse(ckpt, final)
    assert ckpt.config is not None, "a native one has a config"
    hf = config_to_hf(ckpt.config)
    if hf is None:
        raise ValueError(f"{ckpt.path}: no class of transformers has {_obstacle(ckpt.config)}")
    written = layouts.as_dtype(dtype) if dtype else dtype_of(ckpt)
    model = loaded(ckpt, written)
    layout = naming.of_family(hf["model_type"])
    assert layout is not None, hf
    views = dict(layouts.views(model, layout))
    with native.appearing(final, None) as directory:
        said = hf | _ids(ckpt) | {"dtype": str(written).removeprefix("torch.")}
        _write_json(directory / "config.json", said)
        dtypes = dict.fromkeys(views, written) | layouts.never_rounded(views, layout)
        _write_shards(directory, views, dtypes, max_shard_size)
        _copy_tokenizer(ckpt, directory)
    return final


def add_job(jobs: Any) -> ArgumentParser:
    """`checkpoint.py convert` among the subparsers of its command line."""
    job = jobs.add_parser("convert", help="to a Hugging Face directory")
    job.add_argument("source")
    job.add_argument("destination")
    job.add_argument("--to", choices=("roseval", "hf"), default="roseval", help="whose form")
    job.add_argument("--dtype", choices=sorted(cli.DTYPES), help="with --to hf")
    job.add_argument("--max-shard-size", help="with --to hf: 5GB, 500MB, 2GiB", metavar="N")
    return job


def run(ckpt: "Checkpoint", args: Namespace) -> Path:
    """What `checkpoint.py convert` does."""
    if args.to == "roseval":
        if args.dtype or args.max_shard_size:
            raise ValueError("--dtype and --max-shard-size go with --to hf")
        return to_native(ckpt, Path(args.destination))
    size = bytes_of(args.max_shard_size or MAX_SHARD_SIZE)
    return to_hf(ckpt, Path(args.destination), args.dtype, size)


def bytes_of(size: str) -> int:
    """The number of bytes that 500MB or 2GiB says."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,3})?) ?([KMG]i?B)?", size)
    n = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if n < 1:
        raise ValueError(f"--max-shard-size must be a size such as {MAX_SHARD_SIZE}, not {size!r}")
    return n


# ---------------------------------------------------------------------------------------------
# What both need


def refuse(ckpt: "Checkpoint", final: Path) -> None:
    if os.path.lexists(final):
        raise ValueError(f"{final} exists already: name a new directory")
    check_writable(final, "the new directory")
    if not ckpt.native:
        raise ValueError(f"{ckpt.path} is of an architecture that transformers alone has")


def loaded(ckpt: "Checkpoint", dtype: torch.dtype) -> GPTModel:
    model = ckpt.load(dtype)
    assert isinstance(model, GPTModel), "native"
    return model


def dtype_of(ckpt: "Checkpoint") -> torch.dtype:
    """Of the embedding: norms and routers may be in another. float32 if it is none of ours."""
    assert ckpt.config is not None and ckpt.layout is not None, "a native one, or it says why not"
    dtype = ckpt.tensors[naming.embedding_name(ckpt.layout)].dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype in FLOATS else torch.float32


def _ids(ckpt: "Checkpoint") -> dict[str, Any]:
    """Null if not known: Hugging Face has defaults."""
    return {key: ckpt.facts.get(key) for key in huggingface.TOKEN_IDS}


def _copy_tokenizer(ckpt: "Checkpoint", directory: Path) -> None:
    if ckpt.tokenizer and os.path.isfile(ckpt.tokenizer):
        build_tokenizer(ckpt.tokenizer).save(directory)
    for name in TOKENIZER_COPIES:
        if ckpt.tokenizer and os.path.isfile(ckpt.tokenizer / name):
            shutil.copy(ckpt.tokenizer / name, directory)


# ---------------------------------------------------------------------------------------------
# Hugging Face's form


def _write_json(file: Path, values: dict) -> None:
    file.write_text(dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(
    directory: Path,
    views: dict[str, torch.Tensor],
    dtypes: dict[str, torch.dtype],
    max_bytes: int,
) -> None:
    """model.safetensors, or where that were larger, shards in the order of the tensors."""
    size = {name: view.numel() * dtypes[name].itemsize for name, view in views.items()}
    shards: list[list[str]] = [[]]
    for name in views:
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > max_bytes:
            shards.append([])
        shards[-1].append(name)
    files = huggingface.shard_names(len(shards))
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        huggingface.write_index(directory, where, sum(size.values()))
    with cli.progress(len(shards), f"writing {directory.name}", "shard") as bar:
        for file, names in zip(files, shards):
            part = {name: views[name] for name in names}
            tensorfiles.write_safetensors(directory / file, part, dtypes[names[0]], dtypes)
            bar.update(1)


def _obstacle(config: GPTConfig) -> str:
    """Which one or two of a config's features keep it from being some family's."""
    others = list(_other_values(config))
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    odd = [(name, value) for name, value in others if getattr(config, name) != defaults[name]]
    for changes in (*itertools.combinations(odd, 1), *itertools.combinations(odd, 2)):
        fields = [name for name, _ in changes]
        if len(set(fields)) == len(changes) and _is_somebodys(config, dict(changes)):
            said = " and ".join(f"{name} {getattr(config, name)!r}" for name in fields)
            return f"{said} together with the rest of it"
    return f"its features together: {', '.join(dict.fromkeys(name for name, _ in odd))}"


def _other_values(config: GPTConfig) -> Iterator[tuple[str, Any]]:
    """(field, another value that it could have), features alone: no sizes."""
    words: dict[str, tuple] = CHOICES | {"n_kv_heads": (config.n_heads,)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        others = words.get(field.name, ())
        if type(value) is bool:
            others = (not value,)
        elif not others and type(field.default) in (float, tuple, type(None)):
            others = (field.default,)
        yield from ((field.name, other) for other in others if other != value)


def _is_somebodys(config: GPTConfig, changes: dict[str, Any]) -> bool:
    try:
        return config_to_hf(config.replace(**changes)) is not None
    except (ValueError, TypeError):  # no config at all
        return False

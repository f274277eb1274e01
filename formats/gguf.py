"""GGUF: llama.cpp's file of a model, plain or quantised, with its config and tokenizer inside.

    SmolLM2-135M-Q4_K_M.gguf
    big-00001-of-00003.gguf  big-00002-of-00003.gguf  …     one model in parts, given by any of them

Quantised tensors are unpacked to float32 as they are read, bit for bit as the reference does it
(formats/blocks.py).
"""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, blocks, dialects, gguf_file, quantised, shown
from formats.gguf_config import ARCHITECTURES, Architecture, architecture, config_of
from formats.gguf_file import Container, Entry
from formats.stored import Stored, whole

FORMAT = "formats/gguf.py"
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
SPLIT = {"no": 0, "count": 1}  # of a model in parts; and what is meant where nothing is said


def recognises(path: Path) -> bool:
    """By its suffix; of a model in parts the first stands for all."""
    counted = gguf_file.PART.fullmatch(path.name)
    first = counted is None or int(counted[2]) == 1
    return path.suffix == ".gguf" and first and os.path.isfile(path)


def tries(path: Path) -> bool:
    """Any part of a model."""
    return path.suffix == ".gguf" and os.path.isfile(path)


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); a file says no step."""
    return "gguf", None


def finished(path: Path) -> bool | None:
    """A model in parts is not there before all of them are; there is no other sign."""
    try:
        gguf_file.parts(path)
    except ValueError:
        return False
    return None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The heads of all parts."""
    held = [gguf_file.read(file) for file in gguf_file.parts(path)]
    metadata = _metadata(held, path)
    name = metadata.get("general.architecture")
    if type(name) is not str or name not in ARCHITECTURES:
        raise ValueError(f"{path} is of the architecture {name!r:.60}, which is not read from GGUF")
    about, problem = architecture(metadata, name), ""
    tensors = _without_guesses(_tensors(held, path))
    quantisation = _quantisation(tensors)
    if config is None:
        try:
            config = config_of(metadata, name, tensors)
        except ValueError as error:
            problem = f"{path}: {error}"[:1000]
    if about.plus_one:
        tensors = {n: _less_one(t) if n.endswith("norm.weight") else t for n, t in tensors.items()}
    rows = {n: _as_row(t) for n, t in tensors.items() if n.endswith(".ffn_gate_inp_shexp.weight")}
    tensors = {n: t for n, t in (tensors | rows).items() if not n.startswith("rope_f")}
    try:
        tensors = dialects.under_ours(tensors, _dialect(tensors, about), config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    return Opened(
        path=path,
        kind="gguf",
        format=FORMAT,
        tensors=tensors,
        layout="native",
        files=tuple(container.path for container in held),
        config=config,
        problem=problem,
        facts={key: i for key, i in ids.items() if type(i) is int} | quantisation,
        rearranged=about.paired,
        tokenizer=held[0].path if "tokenizer.ggml.tokens" in metadata else None,
    )


# ---------------------------------------------------------------------------------------------
# Tensors


def _metadata(held: list[Container], path: Path) -> dict[str, Any]:
    """The first part's, which is the model's. ValueError for what is no whole model."""
    metadata = held[0].metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{path} is no model: its general.type is {kind!r:.60}")
    for n, container in enumerate(held):
        said = (container.metadata.get(f"split.{key}", usual) for key, usual in SPLIT.items())
        if tuple(said) != ((n, len(held)) if len(held) > 1 else (0, 1)):
            raise ValueError(
                f"{container.path} does not say of itself that it is part {n + 1} of {len(held)}: "
                "a part has the name that llama-gguf-split gave it"
            )
    total = metadata.get("split.tensors.count")
    there = sum(len(container.tensors) for container in held)
    if len(held) > 1 and total != there:
        raise ValueError(f"{path}: its parts hold {there:,} tensors, and should {total!r:.30}")
    return metadata


def _tensors(held: list[Container], path: Path) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for container in held:
        if twice := sorted(container.tensors.keys() & tensors.keys()):
            raise ValueError(f"{container.path} holds {shown(twice)}, and so does another part")
        tensors |= _placed(container)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


def _placed(container: Container) -> dict[str, Stored]:
    """Where tensors lie; each whole within the file, and none where another is."""
    path, size, end, last = container.path, container.path.stat().st_size, container.start, ""
    tensors = {}
    for name, entry in sorted(container.tensors.items(), key=lambda item: item[1].offset):
        stored, n_bytes = _stored(path, name, entry)
        if (entry.offset - container.start) % container.alignment or entry.offset < end:
            what = f"overlaps {shown(last)}" if entry.offset < end else "is not aligned"
            raise ValueError(f"{path} is damaged: {shown(name)} {what}")
        end, last = entry.offset + n_bytes, name
        if end > size:
            raise ValueError(
                f"{path} is truncated or still being written: {shown(name)} ends at byte {end:,}, "
                f"the file at {size:,}"
            )
        tensors[name] = stored
    return {name: tensors[name] for name in container.tensors}


def _stored(path: Path, name: str, entry: Entry) -> tuple[Stored, int]:
    """(a tensor, its bytes)."""
    numel = math.prod(entry.shape)
    if entry.type in PLAIN:
        dtype = PLAIN[entry.type]
        return whole(path, entry.offset, dtype, entry.shape), numel * dtype.itemsize
    packed = blocks.TYPES.get(entry.type)
    if packed is None:
        raise ValueError(
            f"{path}: {shown(name)} is of {entry.type}, which is not read; read are "
            f"{', '.join([*PLAIN, *blocks.TYPES])}"
        )
    if len(entry.shape) < 2 or entry.shape[-1] % packed.numbers:
        raise ValueError(
            f"{path} is damaged: {shown(name)} {list(entry.shape)} is no matrix whose rows are "
            f"blocks of {packed.numbers}, as {entry.type} has them"
        )
    stored = whole(path, entry.offset, torch.float32, entry.shape)
    return _packed(stored, packed), packed.size_of(numel)


def _packed(stored: Stored, how: blocks.Blocks) -> Stored:
    return stored._replace(pieces=tuple(p._replace(blocks=how) for p in stored.pieces))


def _quantisation(tensors: dict[str, Stored]) -> dict[str, Any]:
    """What a record says of tensors in blocks; nothing where there are none."""
    found = [(piece.blocks, t) for t in tensors.values() for piece in t.pieces if piece.blocks]
    if not found:
        return {}
    rules = Counter(f"gguf-{packed.name}" for packed, _ in found)
    sizes = [(packed, math.prod(stored.shape)) for packed, stored in found]
    weight_bytes = sum(packed.size_of(numbers) for packed, numbers in sizes)
    return {"quantisation": quantised.cost(rules, weight_bytes, sum(n for _, n in sizes))}


def _less_one(stored: Stored) -> Stored:
    if stored.dtype != torch.float32:
        raise ValueError(f"{stored.pieces[0].file}: a norm of 1 + weight is not in float32")
    return _packed(stored, blocks.LESS_ONE)


def _without_guesses(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Without the layers behind the last that guess at tokens further ahead."""
    ahead = tuple(n.partition("nextn.")[0] for n in tensors if ".nextn.eh_proj." in n)
    return {name: t for name, t in tensors.items() if not name.startswith(ahead)}


def _as_row(stored: Stored) -> Stored:
    """A vector as the matrix of one row that it is with us."""
    if len(stored.shape) != 1:
        return stored
    pieces = tuple(p._replace(start=(0, *p.start), shape=(1, *p.shape)) for p in stored.pieces)
    return stored._replace(shape=(1, *stored.shape), pieces=pieces)


def _dialect(tensors: dict[str, Stored], about: Architecture) -> dialects.Dialect:
    """llama.cpp's names. Of a projection's parts those that the file has."""
    at = "blk.{i}."
    fused, gated, second = (
        f"blk.0.{name}.weight" in tensors for name in ("attn_qkv", "ffn_gate", "ffn_norm")
    )
    qkv = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    post = {"blocks.{i}.ln1_post": [at + "post_attention_norm"]}
    if not second and "blk.0.post_ffw_norm.weight" not in tensors:  # Seed-OSS's name of it
        post = {"blocks.{i}.ln2": [at + "post_attention_norm"]}
    each = (
        ".{e}" if "blk.0.ffn_gate.0.weight" in tensors else "_exps"
    )  # before experts were stacked
    return dialects.Dialect(
        {
            "token_embedding": ["token_embd"],
            "position_embedding": ["position_embd"],
            "blocks.{i}.ln1": [at + "attn_norm"],
            "blocks.{i}.ln2": [at + "ffn_norm"],
            "blocks.{i}.ln2_post": [at + "post_ffw_norm"],
            "blocks.{i}.attn.qkv_proj": [at + name for name in qkv],
            "blocks.{i}.attn.out_proj": [at + "attn_output"],
            "blocks.{i}.attn.q_norm": [at + "attn_q_norm"],
            "blocks.{i}.attn.k_norm": [at + "attn_k_norm"],
            "blocks.{i}.mlp.fc1": [at + "ffn_gate", at + "ffn_up"] if gated else [at + "ffn_up"],
            "blocks.{i}.mlp.fc2": [at + "ffn_down"],
            "blocks.{i}.mlp.router": [at + "ffn_gate_inp"],
            "blocks.{i}.mlp.experts.fc1": [at + "ffn_gate" + each, at + "ffn_up" + each],
            "blocks.{i}.mlp.experts.fc2": [at + "ffn_down" + each],
            "blocks.{i}.mlp.shared.fc1": [at + "ffn_gate_shexp", at + "ffn_up_shexp"],
            "blocks.{i}.mlp.shared.fc2": [at + "ffn_down_shexp"],
            "blocks.{i}.mlp.shared_gate": [at + "ffn_gate_inp_shexp"],
            "ln_f": ["output_norm"],
            "lm_head": ["output"],
        }
        | post,
        paired=about.paired,
        ignored=r"attn_rot_embd\.weight$",  # frequencies, in old files
        choice_bias=at + "exp_probs_b.bias",
    )

"""GGUF: llama.cpp's file of a model, plain or quantised, with its config and tokenizer inside.

    SmolLM2-135M-Q4_K_M.gguf
    big-00001-of-00003.gguf  big-00002-of-00003.gguf  …     one model in parts, given by any of them

Quantised tensors are unpacked to float32 as they are read, bit for bit as the reference does it
(formats/blocks.py). The config is put together from what the metadata says, from which tensors are
there, and from what all models of a family share (hf_families.py). A key of the architecture that
is not known here is refused by name.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import GPTConfig
from formats import Opened, blocks, dialects, gguf_file, shown
from formats.gguf_file import Container, Entry
from formats.stored import Stored, read_whole, whole
from hf_convert import fields_from_hf
from hf_families import SIZES

FORMAT = "formats/gguf.py"
PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


class Architecture(NamedTuple):
    """What llama.cpp's code has and a file does not say."""

    model_type: str  # Hugging Face's, whose models all share some features
    paired: bool = False  # rotary channels (2i, 2i + 1) turn together, not (i, i + R/2)
    plus_one: bool = False  # norms hold 1 + weight
    windows: bool = False  # attention.sliding_window is a window of some layers, or of all


ARCHITECTURES = {
    "llama": Architecture("llama", paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gpt2": Architecture("gpt2"),
    "gptneox": Architecture("gpt_neox"),
    "gemma": Architecture("gemma", plus_one=True),
    "gemma2": Architecture("gemma2", plus_one=True, windows=True),
    "gemma3": Architecture("gemma3_text", plus_one=True, windows=True),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", windows=True),
    "starcoder2": Architecture("starcoder2"),
    "stablelm": Architecture("stablelm"),
    "olmo": Architecture("olmo", paired=True),
    "olmo2": Architecture("olmo2"),
    "granite": Architecture("granite", paired=True),
    "command-r": Architecture("cohere", paired=True),
    "cohere2": Architecture("cohere2", paired=True, windows=True),
    "glm4": Architecture("glm4", paired=True),
    "nemotron": Architecture("nemotron", plus_one=True),
    "smollm3": Architecture("smollm3", paired=True),
    "arcee": Architecture("arcee", paired=True),
    "seed_oss": Architecture("seed_oss"),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "ernie4_5": Architecture("ernie4_5", paired=True),
}


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
    about, tensors, problem = ARCHITECTURES[name], _tensors(held, path), ""
    if config is None:
        try:
            config = _config(metadata, name, about, tensors, path)
        except ValueError as error:
            problem = f"{path}: {error}"[:1000]
    if about.plus_one:
        tensors = {n: _less_one(t) if n.endswith("norm.weight") else t for n, t in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("rope_f", "rope_freqs"))}
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    return Opened(
        path=path,
        kind="gguf",
        format=FORMAT,
        tensors=dialects.under_ours(tensors, _dialect(tensors, about), config),
        layout="native",
        files=tuple(container.path for container in held),
        config=config,
        problem=problem,
        facts={key: i for key, i in ids.items() if type(i) is int},
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


SPLIT = {"no": 0, "count": 1}


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


def _less_one(stored: Stored) -> Stored:
    if stored.dtype != torch.float32:
        raise ValueError(f"{stored.pieces[0].file}: a norm of 1 + weight is not in float32")
    return _packed(stored, blocks.LESS_ONE)


def _dialect(tensors: dict[str, Stored], about: Architecture) -> dialects.Dialect:
    """llama.cpp's names. Of a projection's parts those that the file has."""
    at = "blk.{i}."
    fused, gated = "blk.0.attn_qkv.weight" in tensors, "blk.0.ffn_gate.weight" in tensors
    qkv = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    return dialects.Dialect(
        {
            "token_embedding": ["token_embd"],
            "position_embedding": ["position_embd"],
            "blocks.{i}.ln1": [at + "attn_norm"],
            "blocks.{i}.ln2": [at + "ffn_norm"],
            "blocks.{i}.ln1_post": [at + "post_attention_norm"],
            "blocks.{i}.ln2_post": [at + "post_ffw_norm"],
            "blocks.{i}.attn.qkv_proj": [at + name for name in qkv],
            "blocks.{i}.attn.out_proj": [at + "attn_output"],
            "blocks.{i}.attn.q_norm": [at + "attn_q_norm"],
            "blocks.{i}.attn.k_norm": [at + "attn_k_norm"],
            "blocks.{i}.mlp.fc1": [at + "ffn_gate", at + "ffn_up"] if gated else [at + "ffn_up"],
            "blocks.{i}.mlp.fc2": [at + "ffn_down"],
            "ln_f": ["output_norm"],
            "lm_head": ["output"],
        },
        paired=about.paired,
        ignored=r"attn_rot_embd\.weight$",  # frequencies, in old files
    )


# ---------------------------------------------------------------------------------------------
# The config

NUMBERS = {  # a key of the architecture, without its name: the field that it is
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "attention.clamp_kqv": "clip_qkv",
    "attention.scale": "attention_scale",
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
    "rope.freq_base_swa": "local_rope_theta",
}
KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.causal", "attention.sliding_window",
    "attention.sliding_window_pattern", "use_parallel_residual", "tensor_data_layout",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", *NUMBERS,
}  # fmt: skip


def _config(
    metadata: dict[str, Any],
    name: str,
    about: Architecture,
    tensors: dict[str, Stored],
    path: Path,
) -> GPTConfig:
    said = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    for key, value in said.items():
        if key in KNOWN or key.startswith("rope.scaling."):
            continue
        if not (type(value) is int and value == 0):  # no experts, for example
            raise ValueError(f"{name}.{key} = {value!r:.60} has no native form")
    model_type = about.model_type
    if name == "olmo2" and said.get("attention.sliding_window"):
        model_type, about = "olmo3", about._replace(windows=True)
    sizes = _sizes(said, tensors, name)
    base = fields_from_hf({"model_type": model_type, **{SIZES[f]: n for f, n in sizes.items()}})
    fields = base | sizes | _head(said, sizes) | {"dropout": 0.0}
    for key, field in NUMBERS.items():
        if key in said and said[key] != 0:
            fields[field] = _decimal(said[key], key)
    if name == "granite":
        fields["logit_scale"] = 1 / fields["logit_scale"]
    if name in ("gemma2", "gemma3") and "attention.scale" not in said:
        largest = sizes["n_layers"] == {"gemma2": 46, "gemma3": 62}[name]  # the 27B's
        per_head = sizes["d_model"] / sizes["n_heads"] if largest else fields["head_dim"]
        fields["attention_scale"] = per_head**-0.5
    fields |= _from_tensors(tensors, said, fields)
    fields |= _windows(said, about, sizes["n_layers"])
    if fields["position"] == "rope":
        fields |= _rope(said, tensors, fields)
    if said.get("attention.causal", True) is not True:
        raise ValueError(f"{name}.attention.causal is false: it is no model that writes")
    if about.paired and fields["qk_norm"]:
        raise ValueError(f"norms of queries and keys of {name} have no native form")
    return GPTConfig(**fields)


def _sizes(said: dict[str, Any], tensors: dict[str, Stored], name: str) -> dict[str, int]:
    """What says how large it is. No more layers, and no longer sides, than the tensors have."""
    longest = max((n for t in tensors.values() for n in t.shape), default=0)

    def size(key: str, most: int) -> int:
        value = said.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # of each layer the same
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(
                f"{name}.{key} is {value!r:.60}, and should be a number up to {most:,}"
            )
        return value

    heads = size("attention.head_count", longest)
    embedding = tensors.get("token_embd.weight")
    return {
        "vocab_size": embedding.shape[0] if embedding else size("vocab_size", longest),
        "max_position_embeddings": size("context_length", 1 << 30),
        "n_layers": size("block_count", len(tensors)),
        "n_heads": heads,
        "n_kv_heads": size("attention.head_count_kv", heads)
        if "attention.head_count_kv" in said
        else heads,
        "d_model": size("embedding_length", longest),
        "d_ff": size("feed_forward_length", longest),
    }


def _head(said: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    key = said.get("attention.key_length", sizes["d_model"] // sizes["n_heads"])
    value = said.get("attention.value_length", key)
    if type(key) is not int or key < 1 or key != value:
        raise ValueError(f"heads of {key!r:.30} channels, and values of {value!r:.30}")
    return {"head_dim": key}


def _decimal(value: Any, key: str) -> float:
    """The shortest number that is this float32: 1e-05, not 9.999999747378752e-06."""
    if type(value) is int:
        value = float(value)
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"{key} is {value!r:.60}, and should be a number")
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _from_tensors(
    tensors: dict[str, Stored], said: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """What is known of a model by which tensors it has."""
    there = {n.removeprefix("blk.0.") for n in tensors}
    up = tensors.get("blk.0.ffn_up.weight")
    fused = up is not None and up.shape[0] == 2 * fields["d_ff"]
    found: dict[str, Any] = {
        "tie_embeddings": "output.weight" not in there,
        "head_bias": "output.bias" in there,
        "qkv_bias": bool({"attn_q.bias", "attn_qkv.bias"} & there),
        "o_bias": "attn_output.bias" in there,
        "mlp_bias": "ffn_up.bias" in there,
        "norm_bias": "output_norm.bias" in there,
        "gated_mlp": "ffn_gate.weight" in there or fused,
        "qk_norm": "attn_q_norm.weight" in there,
    }
    if "use_parallel_residual" in said:
        found["parallel_residual"] = said["use_parallel_residual"]
        found["shared_norm"] = said["use_parallel_residual"] and "ffn_norm.weight" not in there
    return found


def _windows(said: dict[str, Any], about: Architecture, n_layers: int) -> dict[str, Any]:
    """A window, and which layers it is of, where that is not the family's own pattern."""
    window, pattern = (said.get(f"attention.sliding_window{x}") for x in ("", "_pattern"))
    if window is None:
        return {}
    if not about.windows and window:
        raise ValueError(f"attention.sliding_window {window!r:.60} has no native form")
    window = window or None
    if pattern is None:
        return {"sliding_window": window}
    if type(pattern) is int and pattern > 0:
        full = tuple(i for i in range(n_layers) if (i + 1) % pattern == 0)
    elif isinstance(pattern, list) and len(pattern) == n_layers:
        full = tuple(i for i, windowed in enumerate(pattern) if not windowed)
    else:
        raise ValueError(f"attention.sliding_window_pattern {pattern!r:.60} is none")
    return {"sliding_window": window, "full_attention_layers": full}


def _rope(
    said: dict[str, Any], tensors: dict[str, Stored], fields: dict[str, Any]
) -> dict[str, Any]:
    turned = said.get("rope.dimension_count", fields["head_dim"])
    if type(turned) is not int or not 0 < turned <= fields["head_dim"]:
        raise ValueError(f"rope.dimension_count {turned!r:.60} of {fields['head_dim']} channels")
    found = {
        "rope_theta": _decimal(said.get("rope.freq_base", 10000.0), "rope.freq_base"),
        "rotary_fraction": turned / fields["head_dim"],
        "rope_scaling": _rope_scaling(said, tensors, fields),
    }
    return found


def _rope_scaling(
    said: dict[str, Any], tensors: dict[str, Stored], fields: dict[str, Any]
) -> dict[str, Any] | None:
    scaling = {k.rpartition(".")[2]: v for k, v in said.items() if k.startswith("rope.scaling.")}
    kind, factor = scaling.pop("type", "none"), scaling.pop("factor", None)
    original = scaling.pop("original_context_length", fields["max_position_embeddings"])
    attention = _decimal(scaling.pop("attn_factor", 1.0), "rope.scaling.attn_factor")
    scaling.pop("finetuned", None)
    factors = {n: _few(tensors, f"rope_factors_{n}.weight") for n in ("short", "long")}
    if own := _few(tensors, "rope_freqs.weight"):  # Llama 3.1's
        factors = {"short": own, "long": own}
    found: dict[str, Any] | None = None
    if any(factors.values()):
        found = {f"{n}_factor": values for n, values in factors.items()}
        found |= {"rope_type": "longrope", "attention_factor": attention}
        found["original_max_position_embeddings"] = original
    elif kind == "linear" or (kind == "none" and said.get("rope.scale_linear", 1) != 1):
        found = {"rope_type": "linear", "factor": _decimal(factor or said["rope.scale_linear"], "")}
    elif kind == "yarn" and attention == 1:
        found = {"rope_type": "yarn", "factor": _decimal(factor, "rope.scaling.factor")}
        found["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (value := scaling.pop(f"yarn_{name}", None)) is not None:
                found[name] = _decimal(value, name)
    elif kind != "none" or attention != 1:
        raise ValueError(f"rope.scaling.type {kind!r:.60} with these values has no native form")
    if scaling:
        name, value = next(iter(scaling.items()))
        raise ValueError(f"rope.scaling.{name} = {value!r:.60} has no native form")
    return found


def _few(tensors: dict[str, Stored], name: str) -> list[float]:
    """The numbers of a short vector; none where it is not there."""
    stored = tensors.get(name)
    if stored is None:
        return []
    if len(stored.shape) != 1 or stored.shape[0] > 4096:
        raise ValueError(f"{name} {list(stored.shape)} is none")
    return read_whole(stored).tolist()

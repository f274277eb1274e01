"""The config of a GGUF's model: from what its metadata says, from which tensors are there, and from
what all models of a family share.

    config = config_of(metadata, "llama", tensors)

A key of the architecture that is not known here is refused by name.
"""

import math
import struct
from typing import Any, NamedTuple

from config import GPTConfig
from families import mixtures
from families.convert import fields_from_hf
from families.dense import SIZES
from formats.stored import Stored, read_whole


class Architecture(NamedTuple):
    """What llama.cpp's code has and a file does not say."""

    model_type: str  # Hugging Face's, whose models all share some features
    paired: bool = False  # rotary channels (2i, 2i + 1) turn together, not (i, i + R/2)
    plus_one: bool = False  # norms hold 1 + weight
    windows: bool = False  # attention.sliding_window is a window of some layers, or of all
    router_norm: bool = False  # of a mixture, where expert_weights_norm is not said


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
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3moe": Architecture("qwen3_moe", router_norm=True),
    "olmoe": Architecture("olmoe"),
    "granitemoe": Architecture("granitemoe", paired=True, router_norm=True),
    "glm4moe": Architecture("glm4_moe"),
}
MIXTRAL = Architecture("mixtral", paired=True, router_norm=True)  # a llama with experts

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
OF_EXPERTS = {
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_count",
    "expert_shared_feed_forward_length", "expert_gating_func", "expert_weights_norm",
    "expert_weights_scale", "expert_group_count", "expert_group_used_count",
    "leading_dense_block_count", "nextn_predict_layers",
}  # fmt: skip
SCORES = {1: "softmax", 2: "sigmoid"}  # expert_gating_func


def config_of(metadata: dict[str, Any], name: str, tensors: dict[str, Stored]) -> GPTConfig:
    """Of a model of the architecture `name`, an entry of ARCHITECTURES. ValueError for what is
    missing, is none, or has no native form."""
    about = architecture(metadata, name)
    said = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    for key, value in said.items():
        if key in KNOWN or key.startswith("rope.scaling."):
            continue
        if key in OF_EXPERTS and about.model_type in mixtures.FAMILIES:
            continue
        if not (type(value) is int and value == 0):  # no experts, for example
            raise ValueError(f"{name}.{key} = {value!r:.60} has no native form")
    model_type = about.model_type
    if name == "olmo2" and said.get("attention.sliding_window"):
        model_type, about = "olmo3", about._replace(windows=True)
    if not {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"} & said.keys():
        raise ValueError(f"{name}.attention has no epsilon of norms")
    sizes = _sizes(said, tensors, name)
    base = fields_from_hf({"model_type": model_type, **{SIZES[f]: n for f, n in sizes.items()}})
    fields = base | sizes | _head(said, sizes) | {"dropout": 0.0}
    for key, field in NUMBERS.items():
        if key in said and said[key] != 0:
            fields[field] = _decimal(said[key], key)
    if name in ("granite", "granitemoe"):
        fields["logit_scale"] = 1 / fields["logit_scale"]
    if name in ("gemma2", "gemma3") and "attention.scale" not in said:
        largest = sizes["n_layers"] == {"gemma2": 46, "gemma3": 62}[name]  # the 27B's
        per_head = sizes["d_model"] / sizes["n_heads"] if largest else fields["head_dim"]
        fields["attention_scale"] = per_head**-0.5
    fields |= _from_tensors(tensors, said, fields)
    fields |= _windows(said, about, sizes["n_layers"])
    if about.model_type in mixtures.FAMILIES:
        fields |= _experts(said, tensors, about, sizes)
    if fields.get("position") == "rope":
        fields |= _rope(said, tensors, fields)
    if said.get("attention.causal", True) is not True:
        raise ValueError(f"{name}.attention.causal is false: it is no model that writes")
    if about.paired and fields["qk_norm"]:
        raise ValueError(f"norms of queries and keys of {name} have no native form")
    return GPTConfig(**fields)


def architecture(metadata: dict[str, Any], name: str) -> Architecture:
    """The entry of ARCHITECTURES; a llama with experts is another model."""
    return (
        MIXTRAL if name == "llama" and metadata.get("llama.expert_count") else ARCHITECTURES[name]
    )


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
    n_layers = size("block_count", len(tensors))
    if said.get("nextn_predict_layers"):  # which guess at tokens further ahead, behind the others
        n_layers -= size("nextn_predict_layers", n_layers - 1)
    return {
        "vocab_size": embedding.shape[0] if embedding else size("vocab_size", longest),
        "max_position_embeddings": size("context_length", 1 << 30),
        "n_layers": n_layers,
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
        "bias": "attn_output.bias" in there,
        "mlp_bias": "ffn_up.bias" in there,
        "norm_bias": "output_norm.bias" in there,
        "gated_mlp": "ffn_gate.weight" in there or fused,
        "qk_norm": "attn_q_norm.weight" in there,
    }
    if "use_parallel_residual" in said:
        found["parallel_residual"] = said["use_parallel_residual"]
        found["shared_norm"] = said["use_parallel_residual"] and "ffn_norm.weight" not in there
    return found


def _experts(
    said: dict[str, Any], tensors: dict[str, Stored], about: Architecture, sizes: dict[str, int]
) -> dict[str, Any]:
    """Of a mixture: how many experts, how wide, and how a router chooses and weighs them."""

    def count(key: str, usual: int = 0) -> int:
        value = said.get(key, usual)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise ValueError(f"{key} is {value!r:.60}, and should be a number")
        return value

    def has(layer: int, name: str) -> bool:
        return f"blk.{layer}.{name}" in tensors

    layers, width = range(sizes["n_layers"]), count("expert_feed_forward_length") or sizes["d_ff"]
    mixed = [i for i in layers if has(i, "ffn_gate_inp.weight")]
    dense = tuple(i for i in layers if i not in mixed)
    leading = count("leading_dense_block_count", len(dense))
    if not mixed:
        raise ValueError(f"expert_count is {said['expert_count']!r:.60}, and no layer has a router")
    if dense != tuple(range(leading)):
        raise ValueError(f"leading_dense_block_count is {leading}, but layers {mixed} have experts")
    chosen_by_bias = any(has(i, "exp_probs_b.bias") for i in mixed)
    score = said.get("expert_gating_func") or (2 if about.model_type == "glm4_moe" else 1)
    if score not in SCORES:
        raise ValueError(f"expert_gating_func {score!r:.60} has no native form")
    shared = count("expert_shared_feed_forward_length") or count("expert_shared_count") * width
    return {
        "n_experts": count("expert_count"),
        "n_experts_per_token": count("expert_used_count"),
        "d_ff_expert": width,
        "d_ff_shared": shared,
        "dense_layers": dense,
        "router_score": SCORES[score],
        "router_norm": said.get("expert_weights_norm", about.router_norm),
        "router_scale": _decimal(said.get("expert_weights_scale") or 1.0, "expert_weights_scale"),
        "router_choice_bias": chosen_by_bias,
        "n_expert_groups": count("expert_group_count") or 1,
        "n_expert_groups_per_token": count("expert_group_used_count") or 1,
        "gated_mlp": has(mixed[0], "ffn_gate_exps.weight") or has(mixed[0], "ffn_gate.0.weight"),
    }


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
    return {
        "rope_theta": _decimal(said.get("rope.freq_base", 10000.0), "rope.freq_base"),
        "rotary_fraction": turned / fields["head_dim"],
        "rope_scaling": _rope_scaling(said, tensors, fields),
    }


def _rope_scaling(
    said: dict[str, Any], tensors: dict[str, Stored], fields: dict[str, Any]
) -> dict[str, Any] | None:
    scaling = {k.rpartition(".")[2]: v for k, v in said.items() if k.startswith("rope.scaling.")}
    kind, old = scaling.pop("type", "none"), said.get("rope.scale_linear", 1)
    factor = scaling.pop("factor", old)
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
    elif kind == "linear" or (kind == "none" and old != 1):
        found = {"rope_type": "linear", "factor": _decimal(factor, "rope.scaling.factor")}
    elif kind == "yarn" and attention == 1:
        found = {"rope_type": "yarn", "factor": _decimal(factor, "rope.scaling.factor")}
        found["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (value := scaling.pop(f"yarn_{name}", None)) is not None:
                found[name] = _decimal(value, name)
    elif kind != "none" or attention != 1:
        raise ValueError(f"rope.scaling.type {kind!r:.60} with these values has no native form")
    for name, value in scaling.items():
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

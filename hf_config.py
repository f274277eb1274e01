"""config.json of GPT-2 and of Llama's kin, both ways: its keys to GPTConfig's fields, and back.

    fields_from_hf({"model_type": "llama", "hidden_size": 4096, ...})    # {"d_model": 4096, ...}
    config_to_hf(GPTConfig(norm="rmsnorm", ...))                     # None if no class computes it

Reading is strict: what GPTConfig has no word for is refused, never ignored. Other families are a
table (hf_families.py); hf_convert.py is the door to all. Plain Python, no torch.
"""

import contextlib
import math
from typing import Any

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
ROPE_SCALING_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
ROPE_SCALING_TYPES = tuple(ROPE_SCALING_NEEDS)
ROPE_SCALING_POSITIVE = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
ROPE_SCALING_NUMBERS: tuple[str, ...] = ("low_freq_factor", "high_freq_factor")
ROPE_SCALING_NUMBERS += ("attention_factor", "mscale", "mscale_all_dim")


class UnsupportedArchitecture(ValueError):
    """A Hugging Face config that GPTModel cannot express; transformers itself may still run it."""


def number(name: str, value: Any, kind: type = float) -> int | float:
    """`value` as a number; a text of one too, since PyYAML reads 1e-05 as text. kind: float takes
    integers as well, int nothing else. ValueError names the field."""
    taken = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            taken = kind(value)
    if type(taken) is int:
        return taken
    if kind is float and isinstance(taken, float) and math.isfinite(taken):
        return float(taken)  # numpy's float64 is a float too
    raise ValueError(f"{name} must be a{'n integer' if kind is int else ' number'}, not {value!r}")


def size(name: str, value: Any) -> int:
    """A positive integer; a number of experts may be 0."""
    with contextlib.suppress(ValueError):
        taken = int(number(name, value, int))
        if taken >= (0 if name.startswith("n_experts") else 1):
            return taken
    raise ValueError(f"{name} must be a positive integer, not {value!r}")


def checked_rope_scaling(scaling: Any) -> dict:
    """Hugging Face's `rope_scaling` with what its type needs, its numbers as numbers."""
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be a mapping with a rope_type, not {scaling!r}")
    kind, checked = scaling.get("rope_type"), dict(scaling)
    if kind not in ROPE_SCALING_TYPES:
        raise UnsupportedArchitecture(
            f"rope_scaling['rope_type'] must be one of {ROPE_SCALING_TYPES}, not {kind!r}"
        )
    for name in ROPE_SCALING_NEEDS[kind]:
        if scaling.get(name) is None:
            raise ValueError(f"rope_scaling of type {kind} lacks {name!r}")
    for name in (*ROPE_SCALING_POSITIVE, *ROPE_SCALING_NUMBERS):
        if scaling.get(name) is not None:
            checked[name] = number(f"rope_scaling[{name!r}]", scaling[name])
            if name in ROPE_SCALING_POSITIVE and checked[name] <= 0:
                raise ValueError(f"rope_scaling[{name!r}] must be positive, not {checked[name]!r}")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        checked[name] = _numbers(f"rope_scaling[{name!r}]", scaling[name])
    if kind == "llama3" and checked["low_freq_factor"] >= checked["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be less than high_freq_factor")
    return checked


def _numbers(name: str, values: Any) -> list:
    """A list of positive numbers."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of numbers, not {values!r}")
    checked = [number(f"{name}[{i}]", value) for i, value in enumerate(values)]
    if not all(value > 0 for value in checked):
        raise ValueError(f"{name} must be positive, not {min(checked)!r}")
    return checked


def fields_from_hf(hf: dict) -> dict:
    """GPTConfig's fields as a Hugging Face config has them, or UnsupportedArchitecture.

    Covers gpt2, llama, mistral, qwen2, qwen3 and mixtral. A field that would change the function
    computed and that GPTConfig has no word for is refused, never ignored.
    """
    model_type = hf.get("model_type")
    try:
        if model_type == "gpt2":
            return _gpt2_from_hf(hf)
        if model_type in ("llama", "mistral", "qwen2", "qwen3", "mixtral"):
            return _llama_from_hf(hf, model_type)
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"a field is of another type than {model_type} has: {error}") from None
    raise UnsupportedArchitecture(f"model_type {model_type!r} has no native form")


def activation(name: str) -> str:
    """Ours of a Hugging Face name."""
    if name not in ACTIVATIONS:
        raise UnsupportedArchitecture(f"activation {name!r} has no native form")
    return ACTIVATIONS[name]


def hf_activation(name: str) -> str:
    """And back."""
    return {"gelu_new": "gelu_pytorch_tanh"}.get(name, name)


def _flag(hf: dict, name: str, default: bool = False) -> bool:
    """A field that is true or false."""
    value = hf.get(name, default)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return bool(value)  # null is false, as transformers has it


def _gpt2_from_hf(hf: dict) -> dict:
    if not hf.get("scale_attn_weights", True) or hf.get("scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedArchitecture("GPT-2's attention scaling variants have no native form")
    return dict(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["n_positions"],
        n_layers=hf["n_layer"],
        n_heads=hf["n_head"],
        d_model=hf["n_embd"],
        d_ff=hf.get("n_inner") or 4 * size("n_embd", hf["n_embd"]),
        dropout=hf.get("resid_pdrop", 0.1),
        activation=activation(hf.get("activation_function", "gelu_new")),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=_flag(hf, "tie_word_embeddings", True),
    )


def _llama_from_hf(hf: dict, model_type: str) -> dict:
    theta, scaling = _rope_from_hf(hf)
    attention_bias, mlp_bias = _flag(hf, "attention_bias"), _flag(hf, "mlp_bias")
    if attention_bias != mlp_bias and model_type != "llama":
        raise UnsupportedArchitecture("biases on some of the linear layers only")
    window, full_layers = _window_from_hf(hf, model_type)
    moe = model_type == "mixtral"
    return dict(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        d_model=hf["hidden_size"],
        d_ff=hf["intermediate_size"],
        dropout=hf.get("attention_dropout", 0.0),
        activation=activation(hf.get("hidden_act", "silu")),
        n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        # Qwen3's head_dim is 128 whatever the width; the others derive theirs
        head_dim=hf.get("head_dim") or (128 if model_type == "qwen3" else None),
        norm="rmsnorm",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        gated_mlp=True,
        bias=attention_bias,
        qkv_bias=True if model_type == "qwen2" else attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=model_type == "qwen3",
        tie_embeddings=_flag(hf, "tie_word_embeddings"),
        sliding_window=window,
        full_attention_layers=full_layers,
        n_experts=hf["num_local_experts"] if moe else 0,
        n_experts_per_token=hf["num_experts_per_tok"] if moe else 0,
    )


def _rope_from_hf(hf: dict) -> tuple[float, dict | None]:
    """transformers 5 keeps `rope_parameters`; older files have `rope_theta` and `rope_scaling`."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be a mapping with a rope_type, not {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    theta = float(number("rope_theta", theta))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if hf.get("partial_rotary_factor", rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedArchitecture("partial rotary embeddings have no native form")
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind} | rope


def _window_from_hf(hf: dict, model_type: str) -> tuple[int | None, tuple[int, ...]]:
    window = hf.get("sliding_window")
    if model_type.startswith("qwen") and not hf.get("use_sliding_window", False):
        return None, ()
    if model_type == "llama" or window is None:
        return None, ()
    layers = range(size("num_hidden_layers", hf["num_hidden_layers"]))
    if hf.get("layer_types"):
        return window, tuple(i for i in layers if hf["layer_types"][i] == "full_attention")
    if model_type.startswith("qwen"):  # the first max_window_layers layers attend in full
        return window, tuple(i for i in layers if i < hf.get("max_window_layers", 28))
    return window, ()


# What these families have a word for. Llama has one for biases of the MLP alone as well.
WORDS: tuple[str, ...] = ("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "d_model")
WORDS += ("d_ff", "dropout", "activation", "n_kv_heads", "head_dim", "norm", "norm_eps", "position")
WORDS += ("rope_theta", "rope_scaling", "gated_mlp", "bias", "qkv_bias", "qk_norm")
WORDS += ("tie_embeddings", "sliding_window", "full_attention_layers")
WORDS += ("n_experts", "n_experts_per_token")


def config_to_hf(c: Any) -> dict | None:
    """The config of GPT-2 or of Llama's kin that computes what a GPTConfig does, None where none
    does."""
    longrope = (c.rope_scaling or {}).get("rope_type") == "longrope"  # Phi-3 is known for it
    if longrope or type(c)(**{word: getattr(c, word) for word in (*WORDS, "mlp_bias")}) != c:
        return None
    if c.norm == "layernorm" and c.position == "learned":
        return _gpt2_to_hf(c)
    if c.norm == "rmsnorm" and c.position == "rope" and c.gated_mlp:
        return _llama_to_hf(c)
    return None


def _gpt2_to_hf(c) -> dict | None:
    plain = c.bias and c.qkv_bias and c.mlp_bias and not (c.gated_mlp or c.qk_norm or c.n_experts)
    square = c.n_kv_heads == c.n_heads and c.head_dim * c.n_heads == c.d_model
    if not (plain and square and c.sliding_window is None):
        return None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_positions": c.max_position_embeddings,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.d_model,
        "n_inner": c.d_ff,
        "activation_function": c.activation,
        "layer_norm_epsilon": c.norm_eps,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
    }


def _llama_to_hf(c) -> dict | None:
    family = _llama_family(c)
    if family is None:
        return None
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "hidden_act": hf_activation(c.activation),
        "rms_norm_eps": c.norm_eps,
        "attention_dropout": c.dropout,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling,
    }
    if family == "llama":
        hf |= {"attention_bias": c.bias, "mlp_bias": c.mlp_bias}
    if family in ("mistral", "mixtral"):
        hf |= {"sliding_window": c.sliding_window}
    if family in ("qwen2", "qwen3"):
        full = set(c.full_attention_layers)
        hf |= {
            "attention_bias": False,
            "use_sliding_window": c.sliding_window is not None,
            "sliding_window": c.sliding_window,
            "layer_types": [
                "full_attention" if i in full or c.sliding_window is None else "sliding_attention"
                for i in range(c.n_layers)
            ],
        }
    if family == "mixtral":
        hf |= {
            "num_local_experts": c.n_experts,
            "num_experts_per_tok": c.n_experts_per_token,
        }
    return hf


def _llama_family(c) -> str | None:
    """Which of transformers' Llama-style classes has exactly these features."""
    windowed = c.sliding_window is not None
    if c.mlp_bias != c.bias:
        plain = not (windowed or c.qk_norm or c.n_experts) and c.qkv_bias == c.bias
        return "llama" if plain else None
    if c.n_experts:
        ok = not (c.bias or c.qkv_bias or c.qk_norm or c.full_attention_layers)
        return "mixtral" if ok else None
    if c.qk_norm:
        return None if c.bias or c.qkv_bias else "qwen3"
    if c.qkv_bias and not c.bias:
        return "qwen2" if c.head_dim * c.n_heads == c.d_model else None
    if c.qkv_bias != c.bias:
        return None
    if windowed:
        if c.bias or c.full_attention_layers:
            return None
        return "mistral"
    return "llama"

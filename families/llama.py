"""config.json of GPT-2 and of Llama's kin, both ways: its keys to GPTConfig's fields, and back.

    fields_from_hf({"model_type": "llama", "hidden_size": 4096, ...})    # {"d_model": 4096, ...}
    config_to_hf(GPTConfig(norm="rmsnorm", ...))                     # None if no class computes it

Reading is strict: what GPTConfig has no word for is refused, never ignored. Other families are a
table (families/dense.py); families/convert.py is the door to all. Plain Python, no torch.
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
# No model has more, and what is built layer by layer must end
MOST_LAYERS, MOST = 10_000, 2**31 - 1
MAY_BE_ZERO = ("n_experts", "n_experts_per_token", "d_ff_shared")


class UnsupportedArchitecture(ValueError):
    """A Hugging Face config that GPTModel cannot express; transformers itself may still run it."""


def number(name: str, value: Any, kind: type = float) -> int | float:
    """`value` as a number; a text of one too, since PyYAML reads 1e-05 as text. kind: float takes
    integers as well, int nothing else. ValueError names the field."""
    taken = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            taken = kind(value)
    if type(taken) is int and (kind is int or abs(taken) < 2**63):  # torch takes no larger ones
        return taken
    if kind is float and isinstance(taken, float) and math.isfinite(taken):
        return float(taken)  # numpy's float64 is a float too
    what = "an integer" if kind is int else "a number"
    raise ValueError(f"{name} must be {what}, not {value!r:.100}")


def size(name: str, value: Any) -> int:
    """A positive integer that a model could have; what a model may lack can be 0."""
    taken = -1
    with contextlib.suppress(ValueError):
        taken = int(number(name, value, int))
    if taken < (0 if name in MAY_BE_ZERO else 1):
        raise ValueError(f"{name} must be a positive integer, not {value!r:.100}")
    most = MOST_LAYERS if name in ("n_layers", "num_hidden_layers") else MOST
    if taken > most:
        raise ValueError(f"{name} must be {most:,} at most, not {value!r:.100}")
    return taken


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
        raise ValueError(f"{name} must be a list of numbers, not {values!r:.100}")
    checked = [number(f"{name}[{i}]", value) for i, value in enumerate(values)]
    if not all(value > 0 for value in checked):
        raise ValueError(f"{name} must be positive, not {min(checked)!r}")
    return checked


# What transformers' config class of each family means by a field that a config.json lacks. A field
# that a family's class does not have is here as what its model computes, and is not read.
_GPT2: dict[str, Any] = dict(
    vocab_size=50257,
    n_positions=1024,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_inner=None,
    activation_function="gelu_new",
    resid_pdrop=0.1,
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
)
_LLAMA: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    attention_dropout=0.0,
    sliding_window=None,
)
_MISTRAL = _LLAMA | dict(
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    sliding_window=4096,
)
_QWEN2 = _LLAMA | dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | dict(head_dim=128),
}
NOT_READ: dict[str, tuple[str, ...]] = {
    "llama": ("sliding_window",),
    "mistral": ("attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("mlp_bias",),
}
# Other names that transformers takes for the same fields, and reads last
ALIASES: dict[str, dict[str, str]] = {
    "gpt2": dict(
        hidden_size="n_embd",
        max_position_embeddings="n_positions",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
    ),
}


def refuse_strange(hf: dict) -> None:
    """UnsupportedArchitecture for fields that change what any family of transformers' computes."""
    for name, usual in (("is_causal", True), ("per_layer_config", None)):
        if (given := hf.get(name)) not in (None, usual):
            raise UnsupportedArchitecture(f"{name} {given!r:.60} has no native form")


def fields_from_hf(hf: dict) -> dict:
    """GPTConfig's fields as a Hugging Face config has them, or UnsupportedArchitecture.

    Covers FAMILIES. A field that would change the function computed and that GPTConfig has no word
    for is refused, never ignored.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedArchitecture(f"model_type {family!r} has no native form")
    said = {k: v for k, v in hf.items() if k not in NOT_READ.get(family, ())}
    renamed = {name: hf[alias] for alias, name in ALIASES.get(family, {}).items() if alias in hf}
    try:
        values = FAMILIES[family] | said | renamed
        return _gpt2_from_hf(values) if family == "gpt2" else _llama_from_hf(values, family)
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"a field is of another type than {family} has: {error}") from None


def activation(name: str) -> str:
    """Ours of a Hugging Face name."""
    if name not in ACTIVATIONS:
        raise UnsupportedArchitecture(f"activation {name!r} has no native form")
    return ACTIVATIONS[name]


def hf_activation(name: str) -> str:
    """And back."""
    return {"gelu_new": "gelu_pytorch_tanh"}.get(name, name)


def _flag(hf: dict, name: str) -> bool:
    """A field that is true or false."""
    value = hf[name]
    if value is not None and type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return bool(value)  # null is false, as transformers has it


def _gpt2_from_hf(hf: dict) -> dict:
    if not hf["scale_attn_weights"] or hf["scale_attn_by_inverse_layer_idx"]:
        raise UnsupportedArchitecture("GPT-2's attention scaling variants have no native form")
    return dict(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["n_positions"],
        n_layers=hf["n_layer"],
        n_heads=hf["n_head"],
        d_model=hf["n_embd"],
        d_ff=4 * size("n_embd", hf["n_embd"]) if hf["n_inner"] is None else hf["n_inner"],
        dropout=hf["resid_pdrop"],
        activation=activation(hf["activation_function"]),
        norm_eps=hf["layer_norm_epsilon"],
        tie_embeddings=_flag(hf, "tie_word_embeddings"),
    )


def _llama_from_hf(hf: dict, model_type: str) -> dict:
    theta, scaling = _rope_from_hf(hf)
    attention_bias, mlp_bias = _flag(hf, "attention_bias"), _flag(hf, "mlp_bias")
    window, full_layers = _window_from_hf(hf, model_type)
    n_heads, n_kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    return dict(
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        d_model=hf["hidden_size"],
        d_ff=hf["intermediate_size"],
        dropout=hf["attention_dropout"],
        activation=activation(hf["hidden_act"]),
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        head_dim=hf["head_dim"],
        norm="rmsnorm",
        norm_eps=hf["rms_norm_eps"],
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
    )


def _rope_from_hf(hf: dict) -> tuple[float, dict | None]:
    """transformers 5 keeps `rope_parameters`; older files have `rope_theta` and `rope_scaling`,
    which win where a file has both."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling must be a mapping with a rope_type, not {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedArchitecture("rotary positions of their own for each type of layer")
    rope = dict(rope)
    theta = float(number("rope_theta", rope.pop("rope_theta", hf["rope_theta"])))
    older = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or older or "default"
    for fraction in (rope.pop("partial_rotary_factor", None), hf.get("partial_rotary_factor")):
        if fraction not in (None, 1):
            raise UnsupportedArchitecture("partial rotary embeddings have no native form")
    if kind == "default":
        return theta, None
    trained = hf.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope") and trained is not None:
        rope["original_max_position_embeddings"] = trained
    if kind == "longrope":
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    return theta, {"rope_type": kind} | rope


def _window_from_hf(hf: dict, model_type: str) -> tuple[int | None, tuple[int, ...]]:
    window, qwen = hf["sliding_window"], model_type.startswith("qwen")
    if window is None or (qwen and not _flag(hf, "use_sliding_window")):
        return None, ()
    n_layers, types = size("num_hidden_layers", hf["num_hidden_layers"]), hf.get("layer_types")
    if not types:
        first = number("max_window_layers", hf["max_window_layers"], int) if qwen else 0
        return window, tuple(range(min(max(int(first), 0), n_layers)))
    if len(types) != n_layers or not {*types} <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types must say full_attention or sliding_attention of each of {n_layers} layers"
        )
    return window, tuple(i for i, kind in enumerate(types) if kind == "full_attention")


# What these families have a word for. Llama and Qwen3 have one for biases of the MLP as well.
WORDS: tuple[str, ...] = ("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "d_model")
WORDS += ("d_ff", "dropout", "activation", "n_kv_heads", "head_dim", "norm", "norm_eps", "position")
WORDS += ("rope_theta", "rope_scaling", "gated_mlp", "bias", "qkv_bias", "qk_norm")
WORDS += ("tie_embeddings", "sliding_window", "full_attention_layers")
WORDS += ("n_experts", "n_experts_per_token")


def config_to_hf(c: Any) -> dict | None:
    """The config of GPT-2 or of Llama's kin that computes what a GPTConfig does, None where none
    does."""
    longrope = (c.rope_scaling or {}).get("rope_type") == "longrope"  # Phi-3 is known for it
    said = {word: getattr(c, word) for word in (*WORDS, "mlp_bias")}
    if longrope or c.n_experts or c.kv_lora_rank or type(c)(**said) != c:
        return None
    if c.norm == "layernorm" and c.position == "learned":
        return _gpt2_to_hf(c)
    if c.norm == "rmsnorm" and c.position == "rope" and c.gated_mlp:
        return _llama_to_hf(c)
    return None


def _gpt2_to_hf(c) -> dict | None:
    plain = c.bias and c.qkv_bias and c.mlp_bias and not (c.gated_mlp or c.qk_norm)
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
    if family == "mistral":
        hf |= {"sliding_window": c.sliding_window}
    if family in ("qwen2", "qwen3"):
        full = set(c.full_attention_layers)
        hf |= {
            "attention_bias": c.bias,
            "use_sliding_window": c.sliding_window is not None,
            "sliding_window": c.sliding_window,
            "layer_types": [
                "full_attention" if i in full or c.sliding_window is None else "sliding_attention"
                for i in range(c.n_layers)
            ],
        }
    return hf


def _llama_family(c) -> str | None:
    """Which of transformers' Llama-style classes has exactly these features."""
    windowed = c.sliding_window is not None
    if c.qk_norm:
        plain = c.qkv_bias == c.bias and not c.mlp_bias
        return "qwen3" if plain else None
    if c.mlp_bias != c.bias:
        plain = not windowed and c.qkv_bias == c.bias
        return "llama" if plain else None
    if c.qkv_bias and not c.bias:
        return "qwen2" if c.head_dim * c.n_heads == c.d_model else None
    if c.qkv_bias != c.bias:
        return None
    if windowed:
        if c.bias or c.full_attention_layers:
            return None
        return "mistral"
    return "llama"

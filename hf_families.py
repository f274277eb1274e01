"""Hugging Face's config.json, both ways: the door to it, and the families as a table.

    fields_from_hf({"model_type": "gemma2", "hidden_size": 3584, ...})   # {"d_model": 3584, ...}
    config_to_hf(GPTConfig(norm="rmsnorm", ...))                     # None if no class computes it

hf_config.py reads and writes GPT-2, Llama and its next of kin. Of all others a row of FAMILIES says
what the models of a `model_type` share, which keys its class reads, and what an absent one means. A
config belongs to the family that reads back what it writes of it. A value that would change the
function computed, and that we have no word for, is refused.

Source: configuration_*.py and modeling_*.py of transformers 5.17. Plain Python, no torch.
"""

from typing import Any, NamedTuple

import hf_config
from hf_config import UnsupportedArchitecture, number, size

SIZES = {  # field: key of config.json, for all families, in the order of Family.sizes
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
}
CONVERTED = {  # key: to the field, and back
    "hidden_act": (hf_config.activation, hf_config.hf_activation),
    "hidden_activation": (hf_config.activation, hf_config.hf_activation),
    "logits_scaling": (lambda x: 1 / number("logits_scaling", x), lambda scale: 1 / scale),
    "query_pre_attn_scalar": (
        lambda x: number("query_pre_attn_scalar", x) ** -0.5,
        lambda scale: _whole(scale**-2),
    ),
}


class Family(NamedTuple):
    """What is known of a `model_type`."""

    title: str  # of the class {title}ForCausalLM
    sizes: tuple[int | None, ...]  # its class's defaults; no key/value heads: as many as heads
    features: dict[str, Any]  # fields of all its models, if no key says otherwise
    keys: dict[str, tuple[str, Any]]  # field: the key that says it, and what its absence means
    theta: float = 10000.0
    theta_key: str = "rope_theta"
    rotary: float | None = None  # the rotary fraction; None: always the whole head
    rotary_key: str = "partial_rotary_factor"
    local_theta: float | None = None  # of layers with a window; 0: as the others, but unscaled
    window: int | None = None
    full_every: int | None = None  # each n-th layer has no window; 0: all have; None: none has
    no_rope: str = ""  # layers without: "listed", or "full" for those without a window
    refused: tuple[str, ...] = ()  # keys that must be absent, null or false


def _whole(x: float) -> float:
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _biases(given: bool) -> dict[str, bool]:
    """Of all layers, where a family's keys say nothing else."""
    return dict.fromkeys(("bias", "qkv_bias", "o_bias", "mlp_bias", "norm_bias"), given)


RMS = _biases(False) | {"norm": "rmsnorm", "position": "rope", "gated_mlp": True}
UNGATED = RMS | {"gated_mlp": False}
LAYER = _biases(True) | {"norm": "layernorm", "position": "rope"}
GEMMA = RMS | {"norm_offset": True, "embedding_scale": lambda fields: fields["d_model"] ** 0.5}
GEMMA2 = GEMMA | {"post_norm": True}
OLMO2 = RMS | {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_over": "width"}
# what these classes derive, whatever a file says
HEADS = {"head_dim": lambda fields: fields["d_model"] // fields["n_heads"]}
STABLELM = RMS | HEADS | {"norm": "layernorm", "norm_bias": True}
STABLELM |= {"qk_norm_type": "layernorm", "qk_norm_over": "heads"}
COHERE = STABLELM | {"norm_bias": False, "parallel_residual": True, "shared_norm": True}

ACT, EPS = {"activation": ("hidden_act", "silu")}, {"norm_eps": ("rms_norm_eps", 1e-6)}
LAYER_EPS = {"norm_eps": ("layer_norm_eps", 1e-5)}
TIED = {"tie_embeddings": ("tie_word_embeddings", True)}
UNTIED = {"tie_embeddings": ("tie_word_embeddings", False)}
BIASES = dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", False))
MLP_BIAS = {"mlp_bias": ("mlp_bias", False)}
HEAD_256 = {"head_dim": ("head_dim", 256)}
GEMMA_KEYS = TIED | EPS | BIASES | HEAD_256
GEMMA2_KEYS = GEMMA_KEYS | {
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "attention_scale": ("query_pre_attn_scalar", 256),
}
OLMO_KEYS = UNTIED | ACT | BIASES
OLMO2_KEYS = OLMO_KEYS | {"norm_eps": ("rms_norm_eps", 1e-5)}
COHERE_KEYS = TIED | ACT | BIASES | LAYER_EPS | {"logit_scale": ("logit_scale", 0.0625)}
GLM_KEYS = (
    UNTIED
    | ACT
    | {
        "qkv_bias": ("attention_bias", True),
        "head_dim": ("head_dim", 128),
        "norm_eps": ("rms_norm_eps", 1.5625e-7),
    }
)
GLM_SIZES = (151552, 131072, 40, 32, 2, 4096, 13696)
OLMO_SIZES = (50304, 2048, 32, 32, None, 4096, 11008)
COHERE_SIZES = (256000, 8192, 40, 64, None, 8192, 22528)

FAMILIES = {
    "olmo": Family(
        "Olmo",
        OLMO_SIZES,
        RMS | {"norm": "layernorm", "norm_weight": False, "norm_eps": 1e-5},
        OLMO_KEYS | {"clip_qkv": ("clip_qkv", None)},
    ),
    "olmo2": Family("Olmo2", OLMO_SIZES, OLMO2, OLMO2_KEYS),
    "olmo3": Family(
        "Olmo3", OLMO_SIZES, OLMO2, OLMO2_KEYS, theta=5e5, local_theta=0, window=4096, full_every=4
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        (50432, 2048, 44, 64, None, 6144, 24576),
        LAYER | HEADS | {"n_kv_heads": lambda fields: fields["n_heads"]},
        UNTIED
        | LAYER_EPS
        | dict.fromkeys(("qkv_bias", "o_bias"), ("attention_bias", True))
        | {
            "activation": ("hidden_act", "gelu"),
            "parallel_residual": ("use_parallel_residual", True),
        },
        theta_key="rotary_emb_base",
        rotary=0.25,
        rotary_key="rotary_pct",
    ),
    "gemma": Family(
        "Gemma",
        (256000, 8192, 28, 16, 16, 3072, 24576),
        GEMMA,
        GEMMA_KEYS | {"activation": ("hidden_act", "gelu_pytorch_tanh")},
        refused=("use_bidirectional_attention",),
    ),
    "gemma2": Family(
        "Gemma2",
        (256000, 8192, 26, 8, 4, 2304, 9216),
        GEMMA2,
        GEMMA2_KEYS
        | {
            "attention_softcap": ("attn_logit_softcapping", 50.0),
            "logit_softcap": ("final_logit_softcapping", 30.0),
        },
        window=4096,
        full_every=2,
        refused=("use_bidirectional_attention",),
    ),
    "gemma3_text": Family(
        "Gemma3",
        (262208, 131072, 26, 8, 4, 2304, 9216),
        GEMMA2 | {"qk_norm": True},
        GEMMA2_KEYS | {"logit_softcap": ("final_logit_softcapping", None)},
        theta=1e6,
        local_theta=1e4,
        window=4096,
        full_every=6,
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),
    ),
    "phi": Family(
        "Phi",
        (51200, 2048, 24, 32, None, 2048, 8192),
        LAYER | {"parallel_residual": True, "shared_norm": True, "head_bias": True},
        UNTIED | LAYER_EPS | {"activation": ("hidden_act", "gelu_new")},
        rotary=0.5,
        refused=("qk_layernorm",),
    ),
    "phi3": Family(
        "Phi3",
        (32064, 4096, 32, 32, None, 3072, 8192),
        RMS,
        UNTIED | ACT | {"norm_eps": ("rms_norm_eps", 1e-5)},
        rotary=1.0,
        full_every=0,
    ),
    "smollm3": Family(
        "SmolLM3",
        (128256, 32768, 36, 16, 4, 2048, 11008),
        RMS,
        TIED | ACT | EPS | BIASES | MLP_BIAS,
        theta=2e6,
        full_every=0,
        no_rope="listed",
    ),
    "granite": Family(
        "Granite",
        (32000, 2048, 32, 32, None, 4096, 11008),
        RMS,
        UNTIED
        | ACT
        | EPS
        | BIASES
        | MLP_BIAS
        | {
            "embedding_scale": ("embedding_multiplier", 1.0),
            "attention_scale": ("attention_multiplier", 1.0),
            "residual_scale": ("residual_multiplier", 1.0),
            "logit_scale": ("logits_scaling", 1.0),
        },
    ),
    "stablelm": Family(
        "StableLm",
        (50304, 4096, 32, 32, 32, 2560, 6912),
        STABLELM,
        UNTIED
        | ACT
        | LAYER_EPS
        | dict.fromkeys(("parallel_residual", "shared_norm"), ("use_parallel_residual", False))
        | {"qkv_bias": ("use_qkv_bias", False), "qk_norm": ("qk_layernorm", False)},
        rotary=0.25,
    ),
    "glm": Family("Glm", GLM_SIZES, RMS, GLM_KEYS, rotary=0.5),
    "glm4": Family("Glm4", GLM_SIZES, RMS | {"post_norm": True}, GLM_KEYS, rotary=0.5),
    "cohere": Family(
        "Cohere",
        COHERE_SIZES,
        COHERE,
        COHERE_KEYS | {"qk_norm": ("use_qk_norm", False)},
        theta=5e5,
    ),
    "cohere2": Family(
        "Cohere2", COHERE_SIZES, COHERE, COHERE_KEYS, window=4096, full_every=4, no_rope="full"
    ),
    "starcoder2": Family(
        "Starcoder2",
        (49152, 4096, 30, 24, 2, 3072, 12288),
        LAYER,
        TIED
        | {"activation": ("hidden_act", "gelu_pytorch_tanh"), "norm_eps": ("norm_epsilon", 1e-5)}
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("use_bias", True)),
        full_every=0,
    ),
    "nanochat": Family(  # its first form, which transformers has
        "NanoChat",
        (50304, 2048, 12, 6, None, 768, 8192),
        UNGATED
        | {"norm_weight": False, "embedding_norm": True}
        | {"qk_norm": True, "qk_norm_after_rope": True},
        UNTIED
        | EPS
        | BIASES
        | {"activation": ("hidden_act", "relu2")}
        | {"logit_softcap": ("final_logit_softcapping", 15.0)},
    ),
    "nemotron": Family(
        "Nemotron",
        (256000, 4096, 32, 48, None, 6144, 24576),
        UNGATED | {"norm": "layernorm", "norm_bias": True, "norm_offset": True},
        UNTIED
        | BIASES
        | MLP_BIAS
        | {"activation": ("hidden_act", "relu2"), "norm_eps": ("norm_eps", 1e-5)},
        rotary=0.5,
    ),
    "arcee": Family(
        "Arcee",
        (32000, 4096, 32, 32, None, 2560, 18432),
        UNGATED,
        UNTIED
        | BIASES
        | MLP_BIAS
        | {"activation": ("hidden_act", "relu2"), "norm_eps": ("rms_norm_eps", 1e-5)},
    ),
    "seed_oss": Family(
        "SeedOss",
        (155136, 524288, 64, 80, 8, 4096, 27648),
        RMS,
        UNTIED
        | ACT
        | EPS
        | MLP_BIAS
        | {"qkv_bias": ("attention_bias", True), "o_bias": ("attention_out_bias", False)}
        | {"head_dim": ("head_dim", 128), "dropout": ("attention_dropout", 0.1)},
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1",
        (290943, 2048, 32, 32, None, 4096, 11008),
        RMS | {"qk_norm": True, "qk_norm_after_rope": True},
        UNTIED
        | ACT
        | BIASES
        | {"norm_eps": ("rms_norm_eps", 1e-5), "head_dim": ("head_dim", None)},
    ),
    "ernie4_5": Family(
        "Ernie4_5",
        (103424, 131072, 18, 16, 2, 1024, 3072),
        RMS,
        TIED
        | ACT
        | {"head_dim": ("head_dim", 128), "norm_eps": ("rms_norm_eps", 1e-5)}
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("use_bias", False)),
        theta=5e5,
    ),
}


# ---------------------------------------------------------------------------------------------
# Reading


def fields_from_hf(hf: dict) -> dict:
    """GPTConfig's fields as a Hugging Face config has them, or UnsupportedArchitecture."""
    model_type = hf.get("model_type")
    if model_type == "gemma3" and isinstance(hf.get("text_config"), dict):  # it sees images too
        hf = hf["text_config"] | {"model_type": "gemma3_text"}
        model_type = "gemma3_text"
    if model_type not in FAMILIES:
        return hf_config.fields_from_hf(hf)
    try:
        return _read(hf, FAMILIES[model_type])
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"a field is of another type than {model_type} has: {error}") from None


def _read(hf: dict, family: Family) -> dict:
    for key in family.refused:
        if hf.get(key):
            raise UnsupportedArchitecture(f"{key} {hf[key]!r} has no native form")
    fields = {field: value for field, value in family.features.items() if not callable(value)}
    fields |= {"dropout": hf.get("attention_dropout") or 0.0, "head_dim": hf.get("head_dim")}
    for (field, key), default in zip(SIZES.items(), family.sizes, strict=True):
        fields[field] = hf.get(key, default)
    for field, (key, default) in family.keys.items():
        value = hf.get(key, default)
        fields[field] = CONVERTED[key][0](value) if key in CONVERTED else value
    for field in ("d_model", "n_layers", "n_heads"):  # which others are made of
        size(field, fields[field])
    for field, value in family.features.items():
        if callable(value):
            fields[field] = value(fields)
    return fields | _layers_from_hf(hf, family, fields["n_layers"]) | _rope_from_hf(hf, family)


def _layers_from_hf(hf: dict, family: Family, n: int) -> dict:
    """Which layers have a window, and which no rotary positions."""
    window, types = hf.get("sliding_window", family.window), hf.get("layer_types")
    if family.full_every is None:
        return {}
    if family.no_rope == "listed":
        every = hf.get("no_rope_layer_interval", 4)
        listed = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]
        without = tuple(i for i in range(n) if not listed[i])
        if not hf.get("use_sliding_window"):
            return {"no_rope_layers": without}
        full = [i for i in range(n) if (types[i] != "sliding_attention" if types else listed[i])]
        fields = {"sliding_window": window, "full_attention_layers": tuple(full)}
        return fields | {"no_rope_layers": without}
    every = hf.get("sliding_window_pattern") or family.full_every
    if not family.full_every:
        full = []
    elif types:
        full = [i for i in range(n) if types[i] == "full_attention"]
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedArchitecture(f"layer type {unknown.pop()!r} has no native form")
    else:
        full = [i for i in range(n) if (i + 1) % every == 0]
    fields = {"sliding_window": window, "full_attention_layers": tuple(full)}
    if family.no_rope == "full":
        fields["no_rope_layers"] = tuple(range(n)) if window is None else tuple(full)
    return fields


def _rope_from_hf(hf: dict, family: Family) -> dict:
    """transformers 5 keeps all of it in `rope_parameters`, by type of layer where those differ;
    older files have keys at the top, and `rope_scaling`."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling must be a mapping with a rope_type, not {given!r}")
    by_type = hf.get("rope_parameters") or {}
    full, sliding = by_type.get("full_attention"), by_type.get("sliding_attention")
    if full or sliding:
        if family.local_theta is None:
            raise UnsupportedArchitecture("rotary positions by type of layer")
        given = full or {}
    theta, fraction, scaling = _one_rope(hf, family, given)
    fields = {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": fraction}
    if family.local_theta is None:
        return fields
    if sliding:
        local, _, local_scaling = _one_rope(hf, family, sliding)
        if local_scaling is not None and (local, local_scaling) != (theta, scaling):
            raise UnsupportedArchitecture("rope_scaling of layers with a window")
    else:
        local = hf.get("rope_local_base_freq") or family.local_theta or theta
        local_scaling = None
    same = (local, local_scaling) == (theta, scaling)
    return fields | {"local_rope_theta": None if same else local}


def _one_rope(hf: dict, family: Family, given: dict) -> tuple[float, float, dict | None]:
    """(theta, rotary fraction, scaling)."""
    given = dict(given)
    theta = given.pop("rope_theta", None) or hf.get(family.theta_key) or family.theta
    fraction = given.pop("partial_rotary_factor", None) or hf.get(family.rotary_key)
    if family.rotary is None and (fraction or 1.0) != 1.0:
        raise UnsupportedArchitecture(f"partial rotary positions of {family.title}")
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if family.title == "Phi3" and kind in ("su", "yarn"):  # earlier names of it
        kind = "longrope"
    theta = float(number("rope_theta", theta))
    fraction = float(number("rotary_fraction", fraction or family.rotary or 1.0))
    if kind == "default":
        return theta, fraction, None
    original = hf.get("original_max_position_embeddings")
    if original is None and family.title == "Phi3":
        original = 4096
    if original is not None:
        given["original_max_position_embeddings"] = original
    elif kind == "longrope":
        given.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    return theta, fraction, {"rope_type": kind} | given


# ---------------------------------------------------------------------------------------------
# Writing


def config_to_hf(c: Any) -> dict | None:
    """The Hugging Face config that computes what a GPTConfig does, None where none does."""
    known = hf_config.config_to_hf(c)
    if known is not None:
        return known
    for model_type, family in FAMILIES.items():
        hf = {"model_type": model_type, "architectures": [f"{family.title}ForCausalLM"]}
        hf |= _write(c, family)
        try:
            read = type(c)(**fields_from_hf(hf) | {"bias": c.bias})  # a default of others only
        except ValueError:
            continue
        if read == c:
            return hf
    return None


def _write(c: Any, family: Family) -> dict:
    hf = {key: getattr(c, field) for field, key in SIZES.items()}
    hf |= {"attention_dropout": c.dropout, "pad_token_id": None}  # the class's may be too large
    if c.head_dim * c.n_heads != c.d_model:
        hf["head_dim"] = c.head_dim
    for field, (key, _) in family.keys.items():
        value = getattr(c, field)
        if field == "attention_scale" and value is None:
            value = c.head_dim**-0.5
        hf[key] = CONVERTED[key][1](value) if key in CONVERTED else value
    layers, full = range(c.n_layers), set(c.full_attention_layers)
    if family.full_every is not None:
        hf["sliding_window"] = c.sliding_window
    if family.no_rope == "listed":
        hf["no_rope_layers"] = [int(i not in c.no_rope_layers) for i in layers]
        hf["use_sliding_window"] = c.sliding_window is not None
    if family.full_every or (family.no_rope == "listed" and c.sliding_window is not None):
        kinds = ("sliding_attention", "full_attention")
        hf["layer_types"] = [kinds[i in full] for i in layers]
    return hf | _write_rope(c, family)


def _write_rope(c: Any, family: Family) -> dict:
    scaling = None if c.rope_scaling is None else dict(c.rope_scaling)
    hf = {family.theta_key: c.rope_theta, "rope_scaling": scaling}
    if family.rotary is not None:
        hf[family.rotary_key] = c.rotary_fraction
    if scaling is not None and family.title == "Phi3":
        hf["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if family.local_theta is not None:
        full = {"rope_type": "default", "rope_theta": c.rope_theta} | (scaling or {})
        local = full
        if c.local_rope_theta is not None:
            local = {"rope_type": "default", "rope_theta": c.local_rope_theta}
        hf["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        hf["rope_local_base_freq"] = local["rope_theta"]
        if local is full and scaling is not None:
            del hf["rope_scaling"]  # which would be the full layers' alone
    return hf

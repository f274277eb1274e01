"""Hugging Face's config.json, both ways: the door to it.

    fields_from_hf({"model_type": "gemma2", "hidden_size": 3584, ...})   # {"d_model": 3584, ...}
    config_to_hf(GPTConfig(norm="rmsnorm", ...))                     # None if no class computes it

GPT-2, Llama and its next of kin are families/llama.py's; of all others a row of FAMILIES
says what to read and to write. A config belongs to the first family that reads back what it writes
of it. A value that would change the function computed, and that we have no word for, is refused.
Plain Python, no torch.
"""

from collections.abc import Callable
from typing import Any

from families import dense, llama, mixtures
from families.dense import SIZES, Family
from families.llama import UnsupportedArchitecture, number, size

ALIKE = {"kimi_k2": "deepseek_v3"}  # whose code files of these bring along
FAMILIES = {**dense.FAMILIES, **mixtures.FAMILIES}


def _whole(x: float) -> float:
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


# Keys that count in units of something else of the model, null being one such unit; and their kind
UNITS: dict[str, tuple[Callable, Callable]] = {
    "scale_depth": (lambda fields: fields["n_layers"] ** 0.5, lambda x: float(f"{x:.12g}")),
    "dim_model_base": (lambda fields: fields["d_model"], round),
}
CONVERTED = {  # key: to the field, and back
    "hidden_act": (llama.activation, llama.hf_activation),
    "hidden_activation": (llama.activation, llama.hf_activation),
    "logits_scaling": (lambda x: 1 / number("logits_scaling", x), lambda scale: 1 / scale),
    "query_pre_attn_scalar": (
        lambda x: number("query_pre_attn_scalar", x) ** -0.5,
        lambda scale: _whole(scale**-2),
    ),
}

# ---------------------------------------------------------------------------------------------
# Reading


def fields_from_hf(hf: dict) -> dict:
    """GPTConfig's fields as a Hugging Face config has them, or UnsupportedArchitecture."""
    model_type = hf.get("model_type")
    llama.refuse_strange(hf)
    if model_type == "gemma3" and isinstance(hf.get("text_config"), dict):  # it sees images too
        hf = hf["text_config"] | {"model_type": "gemma3_text"}
        model_type = "gemma3_text"
        llama.refuse_strange(hf)
    model_type = ALIKE.get(str(model_type), model_type)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return llama.fields_from_hf(hf)
    try:
        return _read(hf, FAMILIES[model_type])
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"a field is of another type than {model_type} has: {error}") from None


def _read(hf: dict, family: Family) -> dict:
    hf = hf | {key: hf[other] for other, key in family.aliases if other in hf}
    for key in family.refused:
        if hf.get(key):
            raise UnsupportedArchitecture(f"{key} {hf[key]!r} has no native form")
    for key, value in family.needed:
        if hf.get(key, value) != value:
            raise UnsupportedArchitecture(f"{key} {hf[key]!r:.60} has no native form")
    fields = {field: value for field, value in family.features.items() if not callable(value)}
    fields |= {"dropout": hf.get("attention_dropout") or 0.0, "head_dim": hf.get("head_dim")}
    for (field, key), default in zip(SIZES.items(), family.sizes, strict=True):
        fields[field] = hf.get(key, default)
    for field, (key, default) in family.keys.items():
        value = hf.get(key, default)
        if value is None and type(default) is bool:
            value = False  # as transformers has it
        fields[field] = CONVERTED[key][0](value) if key in CONVERTED else value
    for field in ("d_model", "n_layers", "n_heads"):  # which others are made of
        size(field, fields[field])
    for field, (key, _) in family.keys.items():
        if key in UNITS:
            told = fields[field]
            fields[field] = 1.0 if told is None else number(key, told) / UNITS[key][0](fields)
    fields |= _layers_from_hf(hf, family, fields["n_layers"]) | _rope_from_hf(hf, family)
    for field, value in family.features.items():
        if callable(value):
            fields[field] = value(fields)
    return fields | (_experts_from_hf(hf, family, fields) if "n_experts" in fields else {})


def _experts_from_hf(hf: dict, family: Family, fields: dict) -> dict:
    """Which layers of a mixture are dense, and how wide what all tokens pass is."""
    n, layers = size("n_experts", fields["n_experts"]), range(fields["n_layers"])
    if not n:
        raise UnsupportedArchitecture("a mixture without experts has no native form")
    found: dict[str, Any] = {}
    if family.dense == "listed":
        step, listed = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
        found["dense_layers"] = tuple(i for i in layers if i in listed or (i + 1) % step)
    elif family.dense == "typed":
        types = hf.get("mlp_layer_types") or ["dense" if i == 0 else "sparse" for i in layers]
        if len(types) != len(layers) or not {*types} <= {"dense", "sparse"}:
            raise ValueError(f"mlp_layer_types must say dense or sparse of {len(layers)} layers")
        found["dense_layers"] = tuple(i for i in layers if types[i] == "dense")
    elif family.dense is not None:
        first = number("first_k_dense_replace", hf.get("first_k_dense_replace", family.dense), int)
        found["dense_layers"] = tuple(i for i in layers if i < first)
    if family.keys.get("d_ff_shared", ("",))[0] == "n_shared_experts":  # side by side in one MLP
        shared = number("n_shared_experts", fields["d_ff_shared"] or 0, int)
        found["d_ff_shared"] = shared * number("d_ff_expert", fields["d_ff_expert"], int)
    if family.title == "DeepseekV2":  # which heeds its groups of experts by one method alone
        method = hf.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise UnsupportedArchitecture(f"topk_method {method!r:.60} of {family.title}")
        if method == "greedy":
            found |= {"n_expert_groups": 1, "n_expert_groups_per_token": 1}
    return found


def _layers_from_hf(hf: dict, family: Family, n: int) -> dict:
    """Which of n layers have a window, and which no rotary positions."""
    if family.full_every is None:
        return {}
    if family.no_rope == "listed":
        return _listed_layers(hf, n)
    window, types = hf.get("sliding_window", family.window), hf.get("layer_types")
    every = family.full_every and (hf.get(family.pattern_key) or family.full_every)
    full = tuple(i for i in range(n) if every and (i + 1) % every == 0)
    if every and types:
        full = _full_layers(types, n)
    fields = {"sliding_window": window, "full_attention_layers": full}
    if family.no_rope == "full":
        fields["no_rope_layers"] = tuple(range(n)) if window is None else full
    return fields


def _full_layers(types: Any, n: int) -> tuple[int, ...]:
    """Those of `layer_types` without a window."""
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedArchitecture(f"layer type {unknown[0]!r:.60} has no native form")
    if len(types) != n:
        raise ValueError(f"layer_types has {len(types)} entries for {n} layers")
    return tuple(i for i in range(n) if types[i] == "full_attention")


def _listed_layers(hf: dict, n: int) -> dict:
    """SmolLM3's: a list says which have rotary positions; of a window, if any, those without."""
    every, listed = hf.get("no_rope_layer_interval", 4), hf.get("no_rope_layers")
    listed = listed or [int((i + 1) % every != 0) for i in range(n)]
    fields: dict[str, Any] = {"no_rope_layers": tuple(i for i in range(n) if not listed[i])}
    if hf.get("use_sliding_window"):
        types = hf.get("layer_types")
        full = _full_layers(types, n) if types else tuple(i for i in range(n) if listed[i])
        fields |= {"sliding_window": hf.get("sliding_window"), "full_attention_layers": full}
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
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedArchitecture("rotary positions of their own for each type of layer")
    theta = given.pop("rope_theta", None) or hf.get(family.theta_key) or family.theta
    fraction = given.pop("partial_rotary_factor", None) or hf.get(family.rotary_key)
    if family.rotary is None and (fraction or 1.0) != 1.0:
        raise UnsupportedArchitecture(f"partial rotary positions of {family.title}")
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if family.title == "Phi3" and kind in ("su", "yarn"):  # earlier names of it
        kind = "longrope"
    if family.title == "Phi3" and kind not in ("default", "longrope"):
        raise UnsupportedArchitecture(f"rope_scaling of type {kind!r} of {family.title}")
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
    known = llama.config_to_hf(c)
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
    if c.head_dim * c.n_heads != c.d_model and c.kv_lora_rank is None:
        hf["head_dim"] = c.head_dim
    for field, (key, _) in family.keys.items():
        value = getattr(c, field)
        if field == "attention_scale" and value is None:
            value = c.head_dim**-0.5
        if key in UNITS:
            unit, kind = UNITS[key]
            value = kind(value * unit(vars(c)))
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
    if "n_experts" in family.keys:
        hf |= _write_experts(c, family)
    return hf | _write_rope(c, family)


def _write_experts(c: Any, family: Family) -> dict:
    hf: dict[str, Any] = {}
    if family.dense == "listed":
        hf = {"decoder_sparse_step": 1, "mlp_only_layers": list(c.dense_layers)}
    elif family.dense == "typed":
        types = [c.layer_experts(i) for i in range(c.n_layers)]
        hf = {"mlp_layer_types": ["sparse" if n else "dense" for n in types]}
    elif family.dense is not None:
        hf = {"first_k_dense_replace": len(c.dense_layers)}
    if family.keys.get("d_ff_shared", ("",))[0] == "n_shared_experts":
        hf["n_shared_experts"] = c.d_ff_shared // c.d_ff_expert
    if family.title == "DeepseekV2":
        hf["topk_method"] = "greedy" if c.n_expert_groups == 1 else "group_limited_greedy"
    return hf


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

"""What the model of a Megatron checkpoint is, by the settings that lie beside the weights.

    config = config_of(args, sizes, "iter_0001000")     # args: {"num_layers": 24, …}

Megatron pickles its command line, NeMo 2 and Megatron-Bridge write the fields of a class as YAML:
the same settings under two sets of names. What would change the function computed and has no word
in GPTConfig is refused by name, and so is a checkpoint whose settings leave something open: what
the shapes do not tell either is listed.
"""

import re
from pathlib import Path
from typing import Any

from config import GPTConfig, load_yaml

# settings that must be absent, false, zero or empty
ABSENT: tuple[str, ...] = (
    "multi_latent_attention",
    "heterogeneous_block_specs",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "spec",
    "mrope_section",
    "use_mup",
)
ABSENT += ("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern")
ABSENT += ("experimental_attention_variant", "linear_attention_freq", "attention_output_gate")
ABSENT += ("window_size", "no_rope_freq", "qk_l2_norm", "quick_geglu", "glu_linear_offset")
ABSENT += ("activation_func_clamp_value", "apply_residual_connection_post_layernorm")
ABSENT += ("retro_add_retriever", "add_retriever")
ABSENT += ("moe_expert_capacity_factor", "moe_apply_probs_on_input", "moe_extended_tp")
ABSENT += ("moe_router_force_load_balancing", "moe_latent_size")
ONLY = {"softmax_type": "vanilla", "rope_type": "rope"}  # the one value that is read
# NeMo's and Megatron-Bridge's names of what Megatron's command line calls otherwise
FIELDS_OF_CLASSES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "bias_activation_fusion": "bias_gelu_fusion",
    "rope_scaling": "use_rope_scaling",
}
# classes that are Megatron's GPT with other defaults; what others add, no field says
PLAIN_CLASSES = re.compile(r"(.*\.)?(GPT|Llama|Mistral|Mixtral|Qwen2|Qwen25|Qwen3)[0-9A-Z_a-z]*")
SETTINGS_FILES = (("run_config.yaml", "model"), ("context/model.yaml", "config"))


def settings_beside(folder: Path) -> tuple[dict | None, Path | None]:
    """(settings, their file) of NeMo 2's or Megatron-Bridge's YAML; (None, None) without one."""
    for name, section in SETTINGS_FILES:
        file = folder / name
        if file.is_file():
            said = load_yaml(file).get(section)
            if not isinstance(said, dict):
                raise ValueError(f"{file} has no section {section!r} of a model's fields")
            return _of_class(said, str(file)), file
    return None, None


def _of_class(said: dict, where: str) -> dict[str, Any]:
    """The fields of a class under the names of the command line."""
    kind = said.get("_target_")
    if kind is not None and not (type(kind) is str and PLAIN_CLASSES.fullmatch(kind)):
        raise ValueError(f"{where}: what models of {kind!r:.100} compute is not known here")
    args = {FIELDS_OF_CLASSES.get(str(name), str(name)): value for name, value in said.items()}
    function = said.get("activation_func")
    function = function.get("_target_") if isinstance(function, dict) else function
    function = str(function or "gelu").rpartition(".")[2]
    gated = said.get("gated_linear_unit") is True
    if (function, gated) not in (("gelu", False), ("silu", True), ("squared_relu", False)):
        raise ValueError(
            f"{where}: activation_func = {function!r:.100} "
            f"{'with' if gated else 'without'} gated_linear_unit has no native form"
        )
    args |= {"swiglu": gated, "squared_relu": function == "squared_relu"}
    args["group_query_attention"] = args.get("num_query_groups") is not None
    if "share_embeddings_and_output_weights" in said:
        shared = said["share_embeddings_and_output_weights"]
        args["untie_embeddings_and_output_weights"] = not shared
    if "scale_factor" in said:  # Llama 3.1's of NeMo
        args |= {"use_rope_scaling": True, "rope_scaling_factor": said["scale_factor"]}
    return args


def config_of(args: dict[str, Any], sizes: dict[str, int], where: str) -> GPTConfig:
    """The GPTConfig of Megatron's settings. sizes: fields that the tensors' shapes fix, which stand
    in for settings that are not there. ValueError for what has no native form, and with the list of
    what nothing tells."""
    for name in ABSENT:
        if args.get(name):
            raise ValueError(f"{where}: {name} = {args[name]!r:.100} has no native form")
    for name, read in ONLY.items():
        if args.get(name) not in (None, read):
            raise ValueError(f"{where}: {name} = {args[name]!r:.100} has no native form")
    bias = args.get("add_bias_linear", not args.get("disable_bias_linear", False))
    norm = args.get("normalization", "LayerNorm")
    grouped = args.get("group_query_attention") and args.get("num_query_groups")
    fields = {
        "vocab_size": _vocabulary(args, sizes.get("vocab_size")),
        "n_layers": args.get("num_layers"),
        "d_model": args.get("hidden_size"),
        "n_heads": args.get("num_attention_heads"),
        "d_ff": args.get("ffn_hidden_size"),
        "max_position_embeddings": args.get("max_position_embeddings") or args.get("seq_length"),
        "norm_eps": args.get("norm_epsilon", args.get("layernorm_epsilon")),
    }
    fields = {name: sizes.get(name) if v is None else v for name, v in fields.items()}
    activation = _activation(args, bias is True)
    missing = [name for name, value in fields.items() if value is None]
    missing += ["activation (bias_gelu_fusion)"] if activation is None else []
    if missing:
        raise ValueError(
            f"{where}: its settings do not say {', '.join(missing)}, and no shape does: give the "
            "model's config, a preset or a YAML file, with --config"
        )
    if norm not in ("LayerNorm", "RMSNorm"):
        raise ValueError(f"{where}: normalization = {norm!r:.100} has no native form")
    fields |= {
        "n_kv_heads": grouped or fields["n_heads"],
        "head_dim": args.get("kv_channels"),
        "dropout": 0.0,
        "activation": activation,
        "norm": norm.lower(),
        "norm_bias": norm == "LayerNorm",
        "norm_offset": bool(args.get("apply_layernorm_1p"))
        or bool(args.get("layernorm_zero_centered_gamma")),
        "gated_mlp": bool(args.get("swiglu")),
        "bias": bias,
        "qkv_bias": bias or bool(args.get("add_qkv_bias")),
        **({"qk_norm": True, "qk_norm_type": norm.lower()} if args.get("qk_layernorm") else {}),
        "attention_scale": args.get("softmax_scale"),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
    }
    return GPTConfig.from_dict(fields | _positions(args, where) | _experts(args, where), where)


def _activation(args: dict, bias: bool) -> str | None:
    """Megatron's GELU is its tanh approximation where it is fused with a bias, else the exact one.
    None where nothing says which."""
    if args.get("swiglu"):
        return "silu"
    if args.get("squared_relu"):
        return "relu2"
    if args.get("openai_gelu"):
        return "gelu_new"
    if args.get("onnx_safe") or not bias:
        return "gelu"
    fused = args.get("bias_gelu_fusion")
    return None if fused is None else "gelu_new" if fused else "gelu"


def _experts(args: dict, where: str) -> dict[str, Any]:
    """Of a mixture. A router weighs by a softmax over the logits of those chosen, unless it is
    said to be over all, or sigmoids."""
    n = args.get("num_experts") or args.get("num_moe_experts")
    if not n:
        return {}
    score, chosen = args.get("moe_router_score_function") or "softmax", args.get("moe_router_topk")
    chosen = 2 if chosen is None else chosen
    sigmoid, before = score == "sigmoid", bool(args.get("moe_router_pre_softmax"))
    groups, of_groups = args.get("moe_router_num_groups") or 1, args.get("moe_router_group_topk")
    balance = args.get("moe_router_load_balancing_type")
    bias = bool(args.get("moe_router_enable_expert_bias"))
    each = chosen // of_groups if groups != 1 and type(of_groups) is int and of_groups > 0 else 1
    for name, value, read in (
        ("moe_router_score_function", score, score in ("softmax", "sigmoid")),
        ("moe_router_topk", chosen, type(chosen) is int),
        ("moe_router_load_balancing_type", balance, "sinkhorn" not in str(balance)),
        ("moe_router_enable_expert_bias", bias, sigmoid or not bias),
        # the best one or two of a group count, by scores that are no logits
        ("moe_router_group_topk", of_groups, each == 1 or (each == 2 and (sigmoid or before))),
    ):
        if not read:
            raise ValueError(f"{where}: {name} = {value!r:.100} has no native form")
    return {
        "n_experts": n,
        "n_experts_per_token": chosen,
        "d_ff_expert": args.get("moe_ffn_hidden_size"),
        "dense_layers": _dense_layers(args, where),
        "d_ff_shared": args.get("moe_shared_expert_intermediate_size") or 0,
        "shared_gate": bool(args.get("moe_shared_expert_gate")),
        "router_score": score,
        "router_norm": chosen > 1 if sigmoid else not before,
        "router_scale": args.get("moe_router_topk_scaling_factor") or 1.0,
        "router_choice_bias": bias,
        "n_expert_groups": groups,
        "n_expert_groups_per_token": of_groups if groups != 1 else 1,
        "expert_group_score": "top2" if each == 2 else "max",
    }


def _dense_layers(args: dict, where: str) -> tuple[int, ...]:
    """Every so many layers there is a mixture, or a list says of each whether it is one."""
    every, layers = args.get("moe_layer_freq", 1), args.get("num_layers")
    if type(layers) is int and layers < 1 << 20:
        if type(every) is int and every > 0:
            return tuple(i for i in range(layers) if i % every)
        if isinstance(every, (list, tuple)) and len(every) == layers:
            return tuple(i for i in range(layers) if not every[i])
    raise ValueError(f"{where}: moe_layer_freq = {every!r:.100} has no native form")


def _positions(args: dict, where: str) -> dict[str, Any]:
    kind = args.get("position_embedding_type")
    if kind is None:  # before there was such a setting
        rotary = args.get("use_rotary_position_embeddings")
        kind = "rope" if rotary else "learned_absolute"
        if not rotary and not args.get("add_position_embedding", True):
            kind = "none"
    if kind == "learned_absolute":
        return {"position": "learned"}
    if kind != "rope":
        raise ValueError(f"{where}: position_embedding_type = {kind!r:.100} has no native form")
    theta, part = args.get("rotary_base"), args.get("rotary_percent")
    fields = {"position": "rope", "rope_theta": 10000 if theta is None else theta,
              "rotary_fraction": 1.0 if part is None else part}  # fmt: skip
    stretched = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling") and stretched not in (None, 1):
        raise ValueError(f"{where}: two ways to scale rotary positions have no native form")
    if args.get("use_rope_scaling"):  # all but the factor are constants in Megatron
        factor = args.get("rope_scaling_factor")
        fields["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0 if factor is None else factor,
            "low_freq_factor": args.get("low_freq_factor", 1.0),
            "high_freq_factor": args.get("high_freq_factor", 4.0),
            "original_max_position_embeddings": args.get("old_context_len", 8192),
        }  # fmt: skip
    elif stretched not in (None, 1):
        fields["rope_scaling"] = {"rope_type": "linear", "factor": stretched}
    return fields


def padded(args: dict, vocab_size: int) -> int | None:
    """To what Megatron pads a vocabulary; None where its settings do not say."""
    multiple, ranks = (
        args.get("make_vocab_size_divisible_by"),
        args.get("tensor_model_parallel_size", 1),
    )
    if any(type(n) is not int or n < 1 for n in (multiple, ranks, vocab_size)):
        return None
    multiple *= ranks
    return -(-vocab_size // multiple) * multiple


def _vocabulary(args: dict, rows: int | None) -> int | None:
    """Without its padding, where the settings say how long it is. NullTokenizer's setting counts
    an end of text or not, by version."""
    size = args.get("vocab_size")
    if type(size) is int and args.get("tokenizer_type") != "NullTokenizer":
        return size if padded(args, size) == rows else rows
    return rows

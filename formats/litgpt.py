"""litgpt's checkpoints: a directory with lit_model.pth and model_config.yaml.

    step-00001000/lit_model.pth  model_config.yaml  hyperparameters.yaml  tokenizer.json …

lit_model.pth is a file of torch.save or, from FSDP, a directory as dcp.py reads it. Every field of
model_config.yaml that would change the function computed and that GPTConfig has no word for is
refused by name. Logits over the padded vocabulary are what litgpt trains and what is kept.
"""

import os
from pathlib import Path
from typing import Any

from config import GPTConfig, load_yaml
from formats import Opened, archives, dcp, dialects, trained

FORMAT = "formats/litgpt.py"
WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"
IGNORED = {"name", "hf_config", "org", "vocab_size", "padding_multiple", "gelu_approximate"}
IGNORED |= {"moe_intermediate_size", "n_expert_per_token", "routed_scaling_factor"}
TAKEN = {"block_size", "n_layer", "n_embd", "padded_vocab_size", "norm_class_name", "norm_eps"}
TAKEN |= {"norm_qk", "n_head", "head_size", "n_query_groups", "attn_bias", "rope_base"}
TAKEN |= {"rope_condense_ratio", "rope_adjustments", "intermediate_size", "bias", "mlp_class_name"}
TAKEN |= {"sliding_window_size", "sliding_window_indices"}
# litgpt's own defaults matter where an older file lacks a field
PLAIN = {
    "parallel_residual": (True, False),  # (litgpt's default, what GPTModel computes)
    "rotary_percentage": (0.25, 1.0),
    "norm_1": (True, True),
    "norm_2": (True, True),
    "norm_qk_type": ("default", "default"),
}


def recognises(path: Path) -> bool:
    """The directory, or lit_model.pth in it."""
    if path.name == WEIGHTS:
        return os.path.exists(path)
    return os.path.isdir(path) and os.path.exists(path / WEIGHTS)


def finished(path: Path) -> bool | None:
    """Of the sharded form, as dcp.py's; model_config.yaml is written after the other."""
    folder = path if path.name != WEIGHTS else path.parent
    sharded = dcp.finished(folder / WEIGHTS) if (folder / WEIGHTS).is_dir() else True
    return sharded and (folder / CONFIG).is_file()


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); the step is in the name."""
    return "litgpt", None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The weights and model_config.yaml beside them."""
    folder = path if path.name != WEIGHTS else path.parent
    source, said, contents = folder / WEIGHTS, folder / CONFIG, {}
    if source.is_dir():
        tensors, files = dcp.tensors_in(source), dcp.metadata_files(source)
    else:
        contents, files = archives.open_archive(source), [source]
        inner = contents.get("model", contents) if isinstance(contents, dict) else contents
        tensors = dialects.model_part(trained.weights(inner, source))
    problem = "" if config else f"{folder} lacks {CONFIG}, which says what the model is"
    if config is None and said.is_file():
        try:
            config, problem = _config(load_yaml(said), str(said)), ""
        except ValueError as error:
            problem = str(error)
    if said.is_file():
        files = [*files, said]
    step = contents.get("step_count") if isinstance(contents, dict) else None
    return trained.opened(path, "litgpt", FORMAT, tensors, config, files, problem, step=step)


def _config(values: dict, where: str) -> GPTConfig:
    for name in values.keys() - IGNORED - TAKEN - PLAIN.keys():
        if values[name]:
            raise ValueError(f"{where}: {name} = {values[name]!r} has no native form")
    for name, (default, computed) in PLAIN.items():
        if values.get(name, default) != computed:
            raise ValueError(
                f"{where}: {name} = {values.get(name, default)!r} has no native form, "
                f"{computed!r} has"
            )
    name = str(values.get("name") or "")
    if "Gemma" in name or "OLMo" in name:  # litgpt itself goes by the name
        raise ValueError(f"{where}: the norms of {name!r} have no native form")
    activations = {
        "GptNeoxMLP": {"none": "gelu", "tanh": "gelu_new"},
        "GemmaMLP": {"none": "gelu", "tanh": "gelu_new"},
        "LLaMAMLP": dict.fromkeys(("none", "tanh"), "silu"),
    }
    norms = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
    mlp, norm = (
        values.get("mlp_class_name", "GptNeoxMLP"),
        values.get("norm_class_name", "LayerNorm"),
    )
    if mlp not in activations or norm not in norms:
        raise ValueError(f"{where}: {mlp} and {norm} have no native form")
    bias = values.get("bias", True)
    fields = {
        "vocab_size": values.get("padded_vocab_size"),
        "max_position_embeddings": values.get("block_size"),
        "n_layers": values.get("n_layer"),
        "n_heads": values.get("n_head"),
        "n_kv_heads": values.get("n_query_groups"),
        "head_dim": values.get("head_size"),
        "d_model": values.get("n_embd"),
        "d_ff": values.get("intermediate_size"),
        "dropout": 0.0,
        "activation": activations[mlp].get(values.get("gelu_approximate", "none"), "unknown"),
        "norm": norms[norm],
        "norm_eps": values.get("norm_eps", 1e-5),
        "position": "rope",
        "rope_theta": values.get("rope_base", 10000),
        "rope_scaling": _scaling(values, where),
        "gated_mlp": mlp != "GptNeoxMLP",
        "bias": bias,
        "qkv_bias": bias or values.get("attn_bias", False),
        "qk_norm": values.get("norm_qk", False),
        "tie_embeddings": False,
    }
    missing = [key for key in ("vocab_size", "d_ff", "n_layers", "n_heads") if fields[key] is None]
    if missing:
        raise ValueError(f"{where} lacks what says {missing[0]}")
    return GPTConfig.from_dict(fields | _window(values), where)


def _scaling(values: dict, where: str) -> dict | None:
    """Positions divided by a number, or Llama 3's rule."""
    ratio, adjust = values.get("rope_condense_ratio", 1), values.get("rope_adjustments")
    if ratio != 1 and adjust:
        raise ValueError(f"{where}: rope_condense_ratio and rope_adjustments at once: not read")
    if ratio != 1:
        return {"rope_type": "linear", "factor": ratio}
    if not adjust:
        return None
    llama3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if set(adjust) == llama3:
        named = {k: v for k, v in adjust.items() if k != "original_max_seq_len"}
        original = adjust["original_max_seq_len"]
        return {"rope_type": "llama3", "original_max_position_embeddings": original} | named
    if set(adjust) == {"factor"}:
        return {"rope_type": "linear", "factor": adjust["factor"]}
    raise ValueError(f"{where}: rope_adjustments = {adjust!r} has no native form")


def _window(values: dict) -> dict[str, Any]:
    window, which = values.get("sliding_window_size"), values.get("sliding_window_indices")
    if window is None:
        return {}
    full = [i for i in range(values["n_layer"]) if which is not None and not which[i]]
    return {"sliding_window": window, "full_attention_layers": full}

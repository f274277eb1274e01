"""Configs and models that costs are counted on, and what was measured on GPUs."""

import json

import torch
import transformers
from builders import ROOT

from config import GPTConfig, config_to_hf

FEATURED = ("olmo", "olmo2", "gpt_neox", "gemma2", "gemma3_text", "phi", "granite", "stablelm")
FEATURED += ("glm4", "cohere", "starcoder2", "smollm3", "youtu")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3")
LATENT = ("youtu", "deepseek_v3")  # attention
KINDS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", *FEATURED, *MIXTURES)


def tiny(kind: str, **changes) -> GPTConfig:
    """Small models whose sizes are all different, so that no two symbols can be confused."""
    llama = dict(norm="rmsnorm", position="rope", activation="silu", gated_mlp=True, bias=False)
    llama |= dict(n_heads=6, n_kv_heads=2, head_dim=16, d_ff=144, tie_embeddings=False)
    layer = dict(position="rope", n_heads=4, d_ff=144, tie_embeddings=False)
    featured = llama | dict(n_heads=6, n_kv_heads=2, head_dim=16)  # whole heads make the width
    gemma = featured | dict(norm_offset=True, post_norm=True, embedding_scale=96**0.5)
    gemma |= dict(sliding_window=24, full_attention_layers=(1,), attention_scale=0.25)
    gemma |= dict(activation="gelu_new", tie_embeddings=True)
    cohere = featured | dict(norm="layernorm", qk_norm_type="layernorm", qk_norm_over="heads")
    experts = llama | dict(n_experts=7, n_experts_per_token=3, d_ff_expert=40)
    latent = dict(head_dim=None, n_kv_heads=6, kv_lora_rank=40, q_lora_rank=56, v_head_dim=14)
    latent |= dict(qk_nope_head_dim=10, qk_rope_head_dim=8)
    kinds = {
        "olmo": featured | dict(norm="layernorm", norm_weight=False, clip_qkv=2.0),
        "olmo2": featured
        | dict(pre_norm=False, post_norm=True, qk_norm=True, qk_norm_over="width"),
        "gpt_neox": layer | dict(parallel_residual=True, rotary_fraction=0.5, activation="gelu"),
        "gemma2": gemma | dict(attention_softcap=20.0, logit_softcap=10.0),
        "gemma3_text": gemma | dict(qk_norm=True, local_rope_theta=100.0),
        "phi": layer
        | dict(parallel_residual=True, shared_norm=True, head_bias=True, activation="gelu_new")
        | dict(rotary_fraction=0.5, n_kv_heads=2),
        "granite": featured
        | dict(qkv_bias=True, o_bias=True, residual_scale=0.3, attention_scale=0.4),
        "stablelm": cohere | dict(norm_bias=True, qkv_bias=True, rotary_fraction=0.5),
        "glm4": featured | dict(qkv_bias=True, post_norm=True, rotary_fraction=0.5),
        "cohere": cohere | dict(parallel_residual=True, shared_norm=True, qk_norm=True),
        "starcoder2": layer | dict(n_kv_heads=2, tie_embeddings=True, activation="gelu_new"),
        "smollm3": featured | dict(no_rope_layers=(1,)),
        "youtu": llama | latent,
        "gpt2": dict(activation="gelu_new", n_heads=4, d_ff=224),
        "llama": llama,
        "qwen2": llama | dict(qkv_bias=True, head_dim=None, n_heads=4),
        "qwen3": llama | dict(qk_norm=True, tie_embeddings=True),
        "mistral": llama | dict(sliding_window=24),
        "mixtral": llama | dict(n_experts=5, n_experts_per_token=2, router_norm=True),
        "qwen2_moe": experts
        | dict(d_ff_shared=56, shared_gate=True, qkv_bias=True, dense_layers=(1,)),
        "qwen3_moe": experts | dict(qk_norm=True, router_norm=True),
        "glm4_moe": experts
        | dict(router_score="sigmoid", router_choice_bias=True, router_norm=True, d_ff_shared=80)
        | dict(expert_group_score="top2", dense_layers=(0,), rotary_fraction=0.5),
        "deepseek_v3": experts
        | latent
        | dict(n_experts=8, n_expert_groups=4, n_expert_groups_per_token=2, dense_layers=(0,))
        | dict(router_score="sigmoid", router_choice_bias=True, router_norm=True, d_ff_shared=80)
        | dict(expert_group_score="top2"),
    }
    sizes = dict(vocab_size=131, max_position_embeddings=64, n_layers=3, d_model=96, dropout=0.0)
    return GPTConfig(**sizes | kinds[kind] | changes)


def hf_model(c: GPTConfig, device="meta", **kwargs):
    hf = transformers.AutoConfig.for_model(**config_to_hf(c))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(hf, **kwargs)


def to_pure(model):
    dtypes = model.inference_dtypes(torch.bfloat16)
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes[name])
    return model


# parameters in billions, heads, width, layers: Narayanan et al. 2021, table 1 (V 51,200, T 2,048)
MEGATRON = (
    (1.7, 24, 2304, 24),
    (3.6, 32, 3072, 30),
    (7.5, 32, 4096, 36),
    (18.4, 48, 6144, 40),
    (39.1, 64, 8192, 48),
    (76.1, 80, 10240, 60),
    (145.6, 96, 12288, 80),
    (310.1, 128, 16384, 96),
    (529.6, 128, 20480, 105),
    (1008.0, 160, 25600, 128),
)


def megatron(heads, width, layers, **changes) -> GPTConfig:
    shape = dict(n_heads=heads, d_model=width, n_layers=layers, d_ff=4 * width, dropout=0.1)
    return GPTConfig(**dict(vocab_size=51200, max_position_embeddings=2048) | shape | changes)


def measured(name):
    records = json.loads((ROOT / "benchmarks/results" / name).read_text())["records"]
    return [r for r in records if "error" not in r["measured"]]

"""The families of Hugging Face's models with a mixture of experts, latent attention, or both: more
rows of the table that families/dense.py explains.
"""

import math

from families.dense import (
    ACT,
    BIASES,
    EPS,
    GRANITE_KEYS,
    HEADS,
    MLP_BIAS,
    OLMO2_KEYS,
    RMS,
    TIED,
    UNTIED,
    Family,
)


def _latent_scale(fields: dict) -> float | None:
    """Of latent attention's products: YaRN's mscale_all_dim raises it. None: as usual."""
    scaling = fields["rope_scaling"] or {}
    every, factor = scaling.get("mscale_all_dim"), scaling.get("factor") or 1
    if not every or factor <= 1:
        return None
    return fields["head_dim"] ** -0.5 * (0.1 * every * math.log(factor) + 1) ** 2


LATENT = RMS | {  # what these classes derive
    "n_kv_heads": lambda fields: fields["n_heads"],
    "head_dim": lambda fields: fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
    "attention_scale": _latent_scale,
}
LATENT_KEYS = {
    "kv_lora_rank": ("kv_lora_rank", 512),
    "q_lora_rank": ("q_lora_rank", 1536),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "qk_rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}
INTERLEAVED = (("rope_interleave", True),)  # so that their rotary pairs are neighbours
RENORMALISED = {"router_norm": True, "d_ff_expert": lambda fields: fields["d_ff"]}
CHOSEN = {"n_experts_per_token": ("num_experts_per_tok", 8)}
NORMALISED = {"router_norm": ("norm_topk_prob", False)}
BALANCED = {"router_loss": ("router_aux_loss_coef", 0.001)}
QWEN_MOE_KEYS = UNTIED | ACT | EPS | CHOSEN | NORMALISED | BALANCED
# DeepSeek-V3's router: sigmoids, a bias that balances the load without a loss, groups of experts
NO_LOSS = {"router_score": "sigmoid", "router_choice_bias": True, "expert_group_score": "top2"}
NO_LOSS_KEYS = CHOSEN | {
    "router_norm": ("norm_topk_prob", True),
    "router_scale": ("routed_scaling_factor", 1.0),
    "n_expert_groups": ("n_group", 1),
    "n_expert_groups_per_token": ("topk_group", 1),
}

FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2",
        (102400, 2048, 32, 32, None, 4096, 11008),
        LATENT,
        UNTIED
        | ACT
        | EPS
        | BIASES
        | MLP_BIAS
        | LATENT_KEYS
        | {
            "n_experts": ("n_routed_experts", 64),
            "n_experts_per_token": ("num_experts_per_tok", None),
            "d_ff_expert": ("moe_intermediate_size", 1407),
            "d_ff_shared": ("n_shared_experts", 2),
            "router_scale": ("routed_scaling_factor", 1.0),
            "n_expert_groups": ("n_group", None),
            "n_expert_groups_per_token": ("topk_group", None),
        },
        dense=0,
        aliases=(("num_experts", "n_routed_experts"),),
        refused=("norm_topk_prob",),  # which its class reads and does not heed
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        (129280, 4096, 61, 128, 128, 7168, 18432),
        LATENT | NO_LOSS,
        UNTIED
        | ACT
        | EPS
        | BIASES
        | LATENT_KEYS
        | NO_LOSS_KEYS
        | {
            "n_experts": ("n_routed_experts", 256),
            "d_ff_expert": ("moe_intermediate_size", 2048),
            "d_ff_shared": ("n_shared_experts", 1),
            "router_scale": ("routed_scaling_factor", 2.5),
            "n_expert_groups": ("n_group", 8),
            "n_expert_groups_per_token": ("topk_group", 4),
        },
        dense=3,
        aliases=(("num_local_experts", "n_routed_experts"),),
        needed=INTERLEAVED,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLite",
        (154880, 202752, 47, 20, 20, 2048, 10240),
        LATENT | NO_LOSS,
        UNTIED
        | ACT
        | BIASES
        | LATENT_KEYS
        | NO_LOSS_KEYS
        | {
            "norm_eps": ("rms_norm_eps", 1e-5),
            "q_lora_rank": ("q_lora_rank", 768),
            "qk_nope_head_dim": ("qk_nope_head_dim", 192),
            "v_head_dim": ("v_head_dim", 256),
            "n_experts": ("n_routed_experts", 64),
            "n_experts_per_token": ("num_experts_per_tok", 4),
            "d_ff_expert": ("moe_intermediate_size", 1536),
            "d_ff_shared": ("n_shared_experts", 1),
            "router_scale": ("routed_scaling_factor", 1.8),
        },
        dense="typed",
        aliases=(("num_local_experts", "n_routed_experts"),),
        needed=INTERLEAVED,
    ),
    "youtu": Family(
        "Youtu",
        (128256, 131072, 32, 16, 16, 2048, 6144),
        LATENT,
        TIED | ACT | EPS | BIASES | LATENT_KEYS,
        needed=INTERLEAVED,
    ),
    "minicpm3": Family(
        "MiniCPM3",
        (73448, 32768, 62, 40, 40, 2560, 6400),
        LATENT | {"v_head_dim": lambda f: f["v_head_dim"] or f["d_model"] // f["n_heads"]},
        TIED
        | ACT
        | BIASES
        | MLP_BIAS
        | {
            "norm_eps": ("rms_norm_eps", 1e-5),
            "embedding_scale": ("scale_emb", 12),
            "residual_scale": ("scale_depth", 1.4),
            "logit_scale": ("dim_model_base", 256),
            "kv_lora_rank": ("kv_lora_rank", 256),
            "q_lora_rank": ("q_lora_rank", 768),
            "qk_nope_head_dim": ("qk_nope_head_dim", 64),
            "qk_rope_head_dim": ("qk_rope_head_dim", 32),
            "v_head_dim": ("v_head_dim", None),
        },
    ),
    "mixtral": Family(
        "Mixtral",
        (32000, 131072, 32, 32, 8, 4096, 14336),
        RMS | RENORMALISED,
        UNTIED
        | ACT
        | BALANCED
        | {
            "norm_eps": ("rms_norm_eps", 1e-5),
            "n_experts": ("num_local_experts", 8),
            "n_experts_per_token": ("num_experts_per_tok", 2),
        },
        theta=1e6,
        full_every=0,
        aliases=(("num_experts", "num_local_experts"),),
    ),
    "granitemoe": Family(
        "GraniteMoe",
        (32000, 2048, 32, 32, None, 4096, 11008),
        RMS | RENORMALISED,
        GRANITE_KEYS
        | BALANCED
        | {
            "n_experts": ("num_local_experts", 8),
            "n_experts_per_token": ("num_experts_per_tok", 2),
        },
    ),
    "olmoe": Family(
        "Olmoe",
        (50304, 4096, 16, 16, None, 2048, 2048),
        RMS
        | HEADS
        | {"qk_norm": True, "qk_norm_over": "width", "d_ff_expert": lambda fields: fields["d_ff"]},
        OLMO2_KEYS
        | CHOSEN
        | NORMALISED
        | {"n_experts": ("num_experts", 64), "router_loss": ("router_aux_loss_coef", 0.01)},
        aliases=(("num_local_experts", "num_experts"),),
        refused=("clip_qkv",),  # which it clips behind the norms
    ),
    "qwen2_moe": Family(
        "Qwen2Moe",
        (151936, 32768, 24, 16, 16, 2048, 5632),
        RMS | {"shared_gate": True},
        QWEN_MOE_KEYS
        | {
            "qkv_bias": ("qkv_bias", True),
            "n_experts": ("num_experts", 60),
            "n_experts_per_token": ("num_experts_per_tok", 4),
            "d_ff_expert": ("moe_intermediate_size", 1408),
            "d_ff_shared": ("shared_expert_intermediate_size", 5632),
        },
        dense="listed",
        refused=("use_sliding_window",),
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        (151936, 32768, 24, 32, 4, 2048, 6144),
        RMS | {"qk_norm": True},
        QWEN_MOE_KEYS
        | BIASES
        | {
            "n_experts": ("num_experts", 128),
            "d_ff_expert": ("moe_intermediate_size", 768),
        },
        aliases=(("num_local_experts", "num_experts"),),
        dense="listed",
        refused=("use_sliding_window",),
    ),
    "glm4_moe": Family(
        "Glm4Moe",
        (151552, 131072, 46, 96, 8, 4096, 10944),
        RMS | NO_LOSS,
        UNTIED
        | ACT
        | NO_LOSS_KEYS
        | {
            "norm_eps": ("rms_norm_eps", 1e-5),
            "qkv_bias": ("attention_bias", False),
            "qk_norm": ("use_qk_norm", False),
            "d_ff_expert": ("moe_intermediate_size", 1408),
            "n_experts": ("n_routed_experts", 128),
            "d_ff_shared": ("n_shared_experts", 1),
        },
        rotary=0.5,
        dense=1,
        aliases=(("num_local_experts", "n_routed_experts"),),
    ),
}

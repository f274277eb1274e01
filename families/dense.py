"""The families of Hugging Face's models beside GPT-2 and Llama's kin, as a table: those without
experts and latent attention, which families/mixtures.py has.

A row of FAMILIES says what the models of a `model_type` share, which keys of config.json its class
reads, and what an absent one means: the class's own default. families/convert.py reads and
writes by it.

Source: configuration_*.py and modeling_*.py of transformers 5.17.
"""

from typing import Any, NamedTuple

SIZES = {  # field: key of config.json, for all families, in the order of Family.sizes
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
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
    pattern_key: str = ""  # the key that says another n
    no_rope: str = ""  # layers without: "listed", or "full" for those without a window
    dense: int | str | None = None  # layers of a mixture: the first n, those "listed" or "typed"
    aliases: tuple[tuple[str, str], ...] = ()  # (another name, the key it stands for), read last
    refused: tuple[str, ...] = ()  # keys that must be absent, null or false
    needed: tuple[tuple[str, Any], ...] = ()  # keys that must be absent or say this


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
GRANITE_KEYS = (
    UNTIED
    | ACT
    | EPS
    | BIASES
    | {
        "embedding_scale": ("embedding_multiplier", 1.0),
        "attention_scale": ("attention_multiplier", 1.0),
        "residual_scale": ("residual_multiplier", 1.0),
        "logit_scale": ("logits_scaling", 1.0),
    }
)
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
        pattern_key="sliding_window_pattern",
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
        GRANITE_KEYS | MLP_BIAS,
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
        "Cohere2",
        COHERE_SIZES,
        COHERE,
        COHERE_KEYS,
        window=4096,
        full_every=4,
        pattern_key="sliding_window_pattern",
        no_rope="full",
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

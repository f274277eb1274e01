"""What the formulas of costs/formulas.py are solved for: a model's sizes, and how it is run.

values = solve_all(config, batch_size, seq_len, Setup(dtype="bf16"))     # by symbol
for title, rows, values in tables(config, batch_size, seq_len, Setup()): ...
"""

from dataclasses import dataclass

from config import VOCAB_MULTIPLE, GPTConfig
from costs.adapters import adapter_symbols
from costs.formulas import (
    ACTIVATIONS,
    FLOPS,
    INFERENCE,
    LOSS,
    MATRICES,
    OPTIMIZERS,
    PARAMETERS,
    STATE,
    STEP,
    rounding,
    solve,
)
from costs.quantised import bytes_per_weight
from quantisation.names import CASTS, KV_DTYPES, parse

# ---------------------------------------------------------------------------------------------
# The symbols

DTYPES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5625}  # bytes a weight
DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
CUDA_CONTEXT = 500 * 2**20  # driver, kernels, handles: outside torch's counters
SENT_AHEAD = 2  # batches that a stage of a sharded model may have sent and the next not yet taken
CHUNK_TOKENS = 8192  # rows of logits that scoring.py holds: 0.8 GB of GPT-2's in bfloat16


SWITCHES: tuple[str, ...] = ("qkv_bias", "o_bias", "mlp_bias", "head_bias", "qk_norm", "norm_bias")
SWITCHES += ("norm_weight", "norm_offset", "shared_norm", "embedding_norm")
SWITCHES += ("shared_gate", "router_norm")  # as GPTConfig's fields


def model_symbols(c: GPTConfig, batch_size: int = 1, seq_len: int = 1) -> dict:
    """A model's sizes and switches (0 or 1), and those of its input, as the formulas name them."""
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    windowed = sum(c.layer_window(layer) is not None for layer in range(c.n_layers))
    turned = sum(c.layer_rope(layer) is not None for layer in range(c.n_layers))
    return {name: int(getattr(c, name)) for name in SWITCHES} | {
        "B": batch_size,
        "T": seq_len,
        "s": batch_size * seq_len,
        "L": c.n_layers,
        "h": c.d_model,
        "hr": c.d_model,
        "a": c.n_heads,
        "k": c.n_kv_heads,
        "d": c.head_dim,
        **{"dv": c.value_dim, "kv": c.cache_dim, "latent": int(c.kv_lora_rank is not None)},
        **{"kl": c.kv_lora_rank or 0, "ql": c.q_lora_rank or 0, "dr": c.qk_rope_head_dim or 0},
        "widened": int(c.value_dim < c.head_dim),
        "absorbed": int(c.kv_lora_rank is not None and seq_len == 1),
        **mlp_symbols(c, c.d_ff, c.d_ff_expert, c.d_ff_shared),
        "V": c.vocab_size,
        "T_max": c.max_position_embeddings,
        "window": c.sliding_window or seq_len,
        "L_window": windowed,
        "L_full": c.n_layers - windowed,
        "gated": int(c.gated_mlp),
        **{"qk_each": int(c.qk_norm_over == "heads"), "qk_all": int(c.qk_norm_over == "width")},
        "qk_rms": int(c.qk_norm_type == "rmsnorm"),
        "clipped": int(c.clip_qkv is not None),
        "capped": int(c.logit_softcap is not None),
        "rms": int(c.norm == "rmsnorm"),
        "norms": 2 * c.pre_norm - c.shared_norm + 2 * c.post_norm,  # of a block
        "norm_inputs": (2 - c.parallel_residual) * c.pre_norm + 2 * c.post_norm,
        "learned": int(c.position == "learned"),
        "rope": 1 if turned == c.n_layers else turned / c.n_layers,  # share of the layers
        "scaled": int(c.logit_scale != 1.0),
        "relu": int(c.activation == "relu"),
        "tanh": int(c.activation == "gelu_new"),
        "drop": int(c.dropout > 0),
        "spared": int(not (c.dropout or c.post_norm)),  # nothing reads what a block ends with
        "tied": int(c.tie_embeddings),
        **{"first": 1, "last": 1},
    }


def mlp_symbols(c: GPTConfig, dense: int, expert: int, shared: int, together: int = 1) -> dict:
    """Of MLPs and mixtures of these widths, which tensor parallelism divides. together: blocks that
    are recomputed at a time."""
    L, E, K = c.n_layers, c.n_experts, c.n_experts_per_token
    moe = sum(c.layer_experts(layer) > 0 for layer in range(L))

    def mean(of_dense, of_moe):
        total = (L - moe) * of_dense + moe * of_moe
        return total // L if total % L == 0 else total / L

    of_moe, every = 0 if c.shared_gate else shared, int(shared > 0)
    spared = [of_moe if c.layer_experts(layer) else dense for layer in range(L)]
    ends = {*range(together - 1, L, together), L - 1}
    return {
        "f": dense,
        "fe": expert if E else 0,
        "fs": shared,
        "E": E,
        "K": K,
        "L_moe": moe,
        "m": mean(0, 1),
        "router_biases": c.router_bias + c.router_choice_bias,
        "f_held": mean(dense, E * expert + shared),
        "f_met": mean(dense, K * expert + shared),
        "F_met": (L - moe) * dense + moe * (K * expert + shared),
        "F_spared": sum(spared[i] for i in ends),  # of products unread, each a group's last
        "mlps_held": mean(1, E + every),
        "mlps_lora": mean(1, every),  # experts have no adapters
        "f_lora": mean(dense, shared),
        "mlps_met": mean(1, K + every),
    }


@dataclass(frozen=True)
class Setup:
    """How a model is run; the defaults are train.py's.

    int8 and int4 hold the blocks' linear weights in 8 or 4.5 bits (NF4: a float32 scale per 64),
    `quantise` as its rule does, and all else in 16; they train through LoRA alone. "selective"
    recomputation drops the attention scores, which flash attention never keeps.
    """

    dtype: str = "bf16"
    training: bool = True
    optimizer: str = "adamw"
    fused: bool = True  # else foreach
    precision: str = "autocast"  # float32 weights, cast as used; pure; master-weights
    gradients: str | None = None  # "fp32": beside 16-bit weights, as Megatron-LM has them
    recompute: str = "none"
    attention: str = "flash"  # math: scores are kept
    held_logits: bool = False  # the caller keeps them: logits, loss = model(ids, labels=ids)
    implementation: str = "roseval"
    accumulate: bool = False  # gradients of earlier micro-batches live through the forward
    lora_rank: int = 0
    lora_targets: tuple[str, ...] | None = None  # modules that have adapters; None: all but experts
    train_embeddings: bool = False  # with the head, in full, beside adapters
    dp: int = 1
    zero: int = 0  # 3 is FSDP
    tp: int = 1
    shard: int = 1  # GPUs that hold one model between them, layer by layer: --shard
    first: bool = True  # of such a GPU's share (costs/shards.py): whether the embeddings are here,
    last: bool = True  # and the head
    sequence_parallel: bool = False
    quantise: str | None = None  # a rule of quantisation/names.py, of weights that do not train
    block_bytes: float | None = None  # of a weight of the blocks' matrices: of packed files
    kv_dtype: str | None = None  # of inference: keys and values in 8 bits, by --kv-dtype's words
    kernels: bool = True  # of inference in 16 bits: norms, rotations and gates in one kernel each
    workspace: int = 32 * 2**20  # bytes of cuBLAS a handle (Hopper): forward and backward have one

    def __post_init__(self):
        object.__setattr__(self, "dtype", DTYPE_NAMES.get(self.dtype, self.dtype))
        choices = {
            "dtype": tuple(DTYPES),
            "optimizer": tuple(OPTIMIZERS),
            "precision": ("autocast", "pure", "master-weights"),
            "gradients": (None, "fp32"),
            "recompute": ("none", "selective", "full"),
            "attention": ("flash", "math"),
            "implementation": tuple(ACTIVATIONS),
            "zero": (0, 1, 2, 3),
            "kv_dtype": (None, *KV_DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name in ("dp", "tp", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.shard > 1 and (self.training or self.dp > 1 or self.tp > 1):
            raise ValueError(f"shard {self.shard} is of inference, and goes with no dp, zero or tp")
        if self.quantise is not None:
            object.__setattr__(self, "quantise", parse(self.quantise).name)
            if self.dtype in ("int8", "int4"):
                raise ValueError(f"{self.dtype} and {self.quantise} both say what weights are")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, not {self.lora_rank}")
        if self.train_embeddings and not self.lora_rank:
            raise ValueError("--train-embeddings goes with --lora-rank")
        if self.lora_targets and not self.lora_rank:
            raise ValueError("--lora-targets goes with --lora-rank")
        adapter_symbols(self.lora_targets)  # which knows their names
        if self.training and not self.trains:
            kind = self.quantise or self.dtype
            raise ValueError(f"{kind} weights do not train: add --lora-rank")

    @property
    def trains(self) -> bool:
        """Whether its weights can: few bits train through LoRA alone."""
        return self.lora_rank > 0 or not (self.quantise or self.dtype in ("int8", "int4"))

    def together(self, model: GPTConfig | None) -> int:
        """Blocks whose activations are recomputed at a time."""
        frozen = self.implementation == "roseval" and self.recompute == "full" and self.lora_rank
        return model.recomputed_together if frozen and model else 1

    def symbols(self, model: GPTConfig | None = None) -> dict:
        """Bytes per number and switches (0 or 1), as the formulas name them; those of `quantise`
        depend on the model."""
        c = 4 if self.dtype == "fp32" else 2
        mixed = self.precision if self.training and c == 2 and not self.lora_rank else "pure"
        w = 4 if mixed == "autocast" else c
        if self.zero == 3 and mixed == "autocast":
            mixed = "gathered"  # FSDP's mixed precision: float32 shards, blocks gathered in 16 bits
        ours = self.implementation == "roseval"
        w_block = DTYPES[self.dtype] if self.dtype in ("int8", "int4") else w
        if self.block_bytes is not None:
            assert self.quantise is None, "rounded weights are no longer those of the file"
            w_block = self.block_bytes
        if self.quantise is not None:
            assert model is not None, "the size of groups depends on the matrices"
            w_block = bytes_per_weight(model, self.quantise)
            w = int(w_block) if self.quantise in CASTS else w  # which are of all matrices
        kv = {"c_kv": c, "c_scale": 0.0}
        if self.kv_dtype is not None:
            assert model is not None, "the share of scales depends on the heads"
            if model.kv_lora_rank is not None:
                raise ValueError(f"kv_dtype {self.kv_dtype}: latents are not rounded")
            kv = {"c_kv": 1, "c_scale": 4 / model.head_dim}
        return {
            "c": c,
            "w": w,
            "w_norm": 4 if ours else w,
            "w_block": w_block,
            **kv,
            "g": 4 if self.lora_rank or self.gradients else w,
            "o": 4 if self.lora_rank or mixed == "master-weights" else w,
            "autocast": int(mixed == "autocast"),
            "master": int(mixed == "master-weights"),
            "adam": int(self.optimizer == "adamw"),
            "fused": int(self.fused),
            "one": int(self.kernels and c == 2),
            "full_recompute": int(self.recompute == "full"),
            "together": self.together(model),
            "math": int(self.attention == "math" and self.recompute == "none"),
            "flash": int(self.attention == "flash"),
            "held": int(self.held_logits),
            "chunk": CHUNK_TOKENS,
            **{"first": int(self.first), "last": int(self.last), "sent": SENT_AHEAD},
            "lora": int(self.lora_rank > 0),
            "whole": int(self.train_embeddings),
            "ours": int(ours),  # PEFT keeps the frozen embeddings beside those that it trains
            "headed": int(not self.lora_rank or self.train_embeddings),  # the head has a gradient
            "r": self.lora_rank,
            **adapter_symbols(self.lora_targets),
            "packed": int(
                self.dtype in ("int8", "int4")
                or self.quantise not in (None, *CASTS)
                or self.block_bytes is not None
            ),
            "n": self.dp,
            "zero": self.zero,
            "n_w": self.dp if self.zero == 3 else 1,
            "n_g": self.dp if self.zero >= 2 else 1,
            "n_o": self.dp if self.zero >= 1 else 1,
        }


def tables(c: GPTConfig, batch_size: int, seq_len: int, setup: Setup) -> list[tuple]:
    """(title, rows, values) of every table: FLOPs of the whole model, memory of one GPU."""
    whole, t = model_symbols(c, batch_size, seq_len) | setup.symbols(c), setup.tp
    widths = c.d_ff, c.d_ff_expert, c.d_ff_shared
    whole |= mlp_symbols(c, *widths, together=setup.together(c))
    if setup.lora_targets and c.kv_lora_rank is not None:
        raise ValueError("--lora-targets: matrices of latent attention are counted together")
    if c.n_heads % t or any(width % t for width in widths):
        raise ValueError(f"tp {t} does not divide n_heads {c.n_heads} and d_ff {c.d_ff}")
    each = c.d_ff // t, c.d_ff_expert // t, c.d_ff_shared // t
    shard: dict[str, float] = {
        "a": c.n_heads // t,
        "k": max(c.n_kv_heads // t, 1),
        **mlp_symbols(c, *each, together=setup.together(c)),
    }
    shard |= {"V": -(-c.vocab_size // t)}
    if setup.sequence_parallel:
        shard["hr"] = c.d_model / t
    expression, meaning, source = OPTIMIZERS[setup.optimizer]
    optimizer = ("M_optimizer", f"({expression})/n_o", "byte", meaning, source)
    kind = setup.implementation
    fused = kind == "roseval" and not (setup.held_logits or c.head_bias or c.logit_softcap)
    memory = (*STATE, optimizer, *rounding(MATRICES[kind]), *ACTIVATIONS[kind])
    memory += (*LOSS["roseval" if fused else "elementary"], *STEP)
    multiple = VOCAB_MULTIPLE if kind == "roseval" else 1
    shard |= {"Vp": -(-shard["V"] // multiple) * multiple}
    rank = solve(PARAMETERS + memory + INFERENCE, whole | shard)
    whole = solve(PARAMETERS + FLOPS, whole)
    return [
        ("Parameters", PARAMETERS, whole),
        ("FLOPs", FLOPS, whole),
        ("Memory of a training step, one GPU", memory, rank),
        ("Memory of inference, one GPU", INFERENCE, rank),
    ]


def solve_all(c: GPTConfig, batch_size: int, seq_len: int, setup: Setup) -> dict:
    """The value of every formula by symbol; parameters and FLOPs are those of the whole model."""
    parts = tables(c, batch_size, seq_len, setup)
    return parts[-1][2] | parts[0][2]

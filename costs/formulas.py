"""Every formula of compute.py, one row each, and the symbols that they are solved with.

    values = solve(PARAMETERS + FLOPS, model_symbols(config, batch_size, seq_len))   # symbols.py
    values["N"], values["F_forward"]

A row is a symbol, the expression that is evaluated, its unit, its meaning and its source. Symbols:
B sequences of T tokens, s = B*T, L layers, h width, a query heads, k key/value heads, d head width,
f MLP width, V vocabulary. Mixtures: L_moe layers, a share m of all, with E experts of width fe, K
of them per token, and an MLP of width fs for all tokens; f_held and f_met are the widths that a
layer holds and a token meets, in the mean of all layers. Latent attention: ql, kl numbers that
queries, and keys and values, are made of, dr channels of positions, dv of a value. Features that a
model has or lacks (tied, gated, rope, …) count as 1 or 0. Bytes per number: c computing, w weight,
g gradient, o optimizer state, c_kv a key or value that is kept, c_scale its part of a scale.

Shortcuts that are wrong: 4*B*T^2*h for attention leaves out the projections; 2*s*h*f is one product
of an MLP that has two or, gated, three; the head runs forward and backward, so it counts three
times in training; key/value caches hold two tensors, of k heads and not a.
"""

from collections.abc import Iterable
from functools import cache

# ---------------------------------------------------------------------------------------------
# The tables: symbol, expression, unit, meaning, source

# fmt: off
PARAMETERS = (
    ("n_qk_norm", "norm_weight*(qk_norm*((a + k)*d if qk_each or qk_all else 2*d) + ql + kl)", "",
     "norms of queries and keys in a block, or of latents", "Henry 2020"),
    ("n_in", "h*(((ql or a*d) + kl + dr) if latent else (a + 2*k)*d)", "",
     "attention's matrices that read the stream", "latent: DeepSeek-AI 2024"),
    ("n_qkv", "n_in + ql*a*d + kl*a*(d - dr + dv)", "", "matrices that make q, k and v", ""),
    ("w_qkv", "a*(3*d - dr + dv) if latent else (a + 2*k)*d", "", "numbers of q, k and v", ""),
    ("n_sides", "3*h + 2*(ql + kl) + dr + a*(2*d - dr + 2*dv) if latent else 2*(a + k)*d + 4*h", "",
     "ins and outs of attention's matrices", ""),
    ("n_attn", "n_qkv + a*dv*h + qkv_bias*(ql + kl + dr if latent else (a + 2*k)*d) + o_bias*h"
     " + n_qk_norm", "", "attention of a block", "Vaswani 2017; grouped queries: Ainslie 2023"),
    ("n_dense", "(2 + gated)*h*f + mlp_bias*((1 + gated)*f + h)",
     "", "a dense MLP", "gated: Shazeer 2020"),
    ("n_expert", "(2 + gated)*h*fe", "", "one expert", "Shazeer 2017"),
    ("n_mixture", "E*n_expert + (2 + gated)*h*fs + shared_gate*h + E*(h + router_biases)",
     "", "experts, what all tokens pass, and the router", "Jiang 2024; shared: DeepSeek-AI 2024"),
    ("n_mlps", "(L - L_moe)*n_dense + L_moe*n_mixture", "", "MLPs of all layers", ""),
    ("n_norm", "h*(norm_weight + norm_bias)", "", "one norm", "Ba 2016; Zhang 2019"),
    ("n_block", "n_attn + n_mlps//L + norms*n_norm", "", "a block, the mean of all", ""),
    ("n_largest", "n_attn + norms*n_norm + max((L > L_moe)*n_dense, (L_moe > 0)*n_mixture)", "",
     "the largest block", ""),
    ("n_embed", "first*(V*h + learned*T_max*h)", "", "token and position embeddings", ""),
    ("n_head", "last*((1 - tied*first)*V*h + head_bias*V)", "",
     "LM head, no matrix where tied and in one place with the embedding", "Press 2017"),
    ("n_ends", "(last + first*embedding_norm)*n_norm", "", "norms outside of blocks", ""),
    ("N", "n_embed + L*(n_attn + norms*n_norm) + n_mlps + n_ends + n_head",
     "", "all parameters", ""),
    ("N_active", "N - L_moe*(E - K)*n_expert", "", "used by one token", "Jiang 2024"),
    ("n_linear", "n_qkv + a*dv*h + (2 + gated)*h*f_held", "", "block's matrices", ""),
    ("n_norms", "norms*L*n_norm + n_ends + L*n_qk_norm", "", "all norms", ""),
    ("n_adapted", "(n_sides if latent else on_q*(h + a*d) + (on_k + on_v)*(h + k*d)"
     " + on_o*(a*dv + h) - one_qkv*2*h) + (on_gate*gated + on_up + on_down)*(mlps_lora*h + f_lora)"
     " - one_gate*mlps_lora*h + on_up*shared_gate*m*(h + 1)",
     "", "in + out of the matrices of a block that have adapters", ""),
    ("n_lora", "r*n_adapted", "", "adapters of a block", "Hu 2021"),
)

FLOPS = (
    ("p_blocks", "L*(n_qkv + a*dv*h) + (2 + gated)*h*F_met + L_moe*h*(E + shared_gate)",
     "", "products a token meets in the blocks", ""),
    ("P_full", "L*B*T**2", "", "query-key pairs, full mask", ""),
    ("P_causal", "B*(L_full*pairs(T, T) + L_window*pairs(T, window))",
     "", "attended pairs: pairs(T, w) = sum of min(t, w)", "windows: Beltagy 2020"),
    ("F_linear", "2*s*p_blocks", "FLOP", "projections, MLP, router", "Kaplan 2020"),
    ("F_attention", "2*a*(d + dv)*P_full", "FLOP", "QK' and AV", "Narayanan 2021"),
    ("F_attention_causal", "2*a*(d + dv)*P_causal", "FLOP", "QK' and AV, attended", "Dao 2022"),
    ("F_head", "2*s*h*V", "FLOP", "LM head", "Narayanan 2021"),
    ("F_forward", "F_linear + F_attention + F_head", "FLOP", "forward, full mask", ""),
    ("F_forward_causal", "F_linear + F_attention_causal + F_head", "FLOP", "forward, causal", ""),
    ("F_training", "3*F_forward", "FLOP", "model FLOPs of a step", "PaLM: Chowdhery 2022, app. B"),
    ("F_training_causal", "3*F_forward_causal", "FLOP", "the same, causal", ""),
    ("F_recompute", "full_recompute*(F_linear + F_attention - spared*2*s*h*F_spared)",
     "FLOP", "one more forward of the blocks; torch skips an unread last product", "Chen 2016"),
    ("F_executed", "3*(F_linear + F_head + F_attention) + flash*2*a*d*P_full + F_recompute",
     "FLOP", "run in a step: flash's backward computes the scores again", "Dao 2022"),
    ("F_lora", "2*s*L*n_lora", "FLOP", "adapters, forward", "Hu 2021"),
    ("F_training_lora", "2*(F_linear + F_head) + 3*F_attention + 3*F_lora"
     " - 2*s*(n_in + (2 if latent else on_q + on_k + on_v - 2*one_qkv)*r*h)",
     "FLOP", "frozen base: no weight gradients, nothing flows into block 0's input", "Hu 2021"),
    ("rule_2N", "2*N_active*s", "FLOP", "rule of thumb for a forward", "Kaplan 2020"),
    ("rule_6N", "6*N_active*s", "FLOP", "rule of thumb for a step", "Kaplan 2020"),
)

OPTIMIZERS = {  # bytes of state: n_train parameters, n_matrix of them in the blocks' matrices
    "adamw": ("2*o*n_train", "two moments", "Loshchilov 2019"),
    "adamw8bit": ("2*(1 + 4/256)*n_train", "8-bit moments, a scale per 256", "Dettmers 2022"),
    "sgd": ("0", "no state", ""),
    "momentum": ("o*n_train", "one moment", "Sutskever 2013"),
    "adafactor": ("4*n_factors", "row and column means of squares", "Shazeer 2018"),
    "muon": ("o*n_matrix + 2*o*(n_train - n_matrix)", "momentum; AdamW off the matrices",
             "Jordan 2024"),
}

STATE = (
    ("n_factors", "L*(n_sides - (not latent)*2*h + (2 + gated)*f_held + 2*mlps_held*h) + n_norms"
     " + (2 - tied)*(V + h) + learned*(T_max + h)", "", "rows and columns", ""),
    ("n_whole", "whole*(2 - tied)*V*h", "", "embeddings and head beside adapters", "Cui 2023"),
    ("n_train", "(not lora)*N + lora*L*n_lora + n_whole", "", "trained parameters", ""),
    ("n_matrix", "(not lora)*L*n_linear", "", "of which matrices in blocks", ""),
    ("M_weights", "(w*(N - ours*n_whole - L*n_linear - n_norms) + w_norm*n_norms"
     " + w_block*L*n_linear)/n_w",
     "byte", "weights", "sharded: Rajbhandari 2020"),
    ("M_adapters", "lora*4*n_train", "byte", "what trains beside the frozen, float32", "Hu 2021"),
    ("M_gradients", "g*n_train/n_g", "byte", "gradients", "sharded: Rajbhandari 2020"),
    ("M_master", "master*4*n_train/n_o", "byte", "float32 copies", "Micikevicius 2018"),
)

LATENT = ("latent*h*(ql or a*d)", "ql*a*d", "h*(kl + dr)", "kl*a*(d - dr + dv)")
MATRICES = {  # of a block, in the order of their allocation
    "roseval": ("(not latent)*n_in", *LATENT, "a*dv*h", "(1 + gated)*h*f_held", "f_held*h"),
    "transformers": ("(not latent)*h*a*d", "(not latent)*h*k*d", "(not latent)*h*k*d", *LATENT,
                     "a*dv*h", "gated*h*f_held", "h*f_held", "f_held*h"),
}
MATRICES["megatron"] = MATRICES["roseval"]


def rounding(matrices: Iterable[str]) -> tuple:
    """Rows: what the allocator adds to one copy of the matrices, of w, g or o bytes a number."""
    rows = []
    for b, meaning in (("w", "weights"), ("g", "gradients"), ("o", "a moment, or a copy like it")):
        each = "w_block" if b == "w" else b
        sizes = ", ".join(f"{each}*{size}/n_{b}" for size in matrices)
        matrices_of_V = "first + last*(1 - tied*first)"
        ends = f"slack({matrices_of_V}, {b}*V*h/n_{b}) + slack(first*learned, {b}*T_max*h/n_{b})"
        rows.append((f"R_{b}", f"slack(L, {sizes}) + {ends}", "byte",
                     f"rest of the allocator's blocks: {meaning}", "CUDACachingAllocator"))
    return tuple(rows)


ACTIVATIONS = {  # bytes a token that one block saves; hr: h, or its share in sequence parallelism
    "roseval": (  # a float32 residual stream; fused RMSNorm
        ("A_residual", "4*hr", "byte", "residual stream", ""),
        ("A_norms", "norm_inputs*A_residual", "byte", "norm inputs", ""),
        ("A_inputs", "(2 - (c == 4)*shared_norm + latent*(c < 4))*c*hr", "byte",
         "inputs of qkv and fc1", ""),
        ("A_latent", "latent*c*a*(3*d if widened else 3*d - dr + dv)", "byte",
         "q, k, v of latents; kernels want v as wide as k", "DeepSeek-AI 2024"),
        ("A_qkv", "A_latent if latent else c*(a + 2*k)*d*(1 + clipped) + rope*c*(a + k)*d", "byte",
         "q, k, v; before they are clipped; q, k as rotated", ""),
        ("A_qk_norm", "qk_norm*(4*((c < 4) + qk_each*norm_weight)*(a + k)*d"
         " + (8 - 4*qk_rms)*(2 if qk_all else a + k)) + (4 + c)*(ql + kl) + 4*((ql > 0) + latent)",
         "byte", "norms of queries and keys, or of latents", ""),
        ("A_attention", "c*a*dv + widened*c*a*d", "byte", "attention's output", "Dao 2022"),
        ("A_mlp", "c*f_met*(2 + 2*gated - (relu and not gated))", "byte",
         "around the activation", ""),
        ("A_experts", "m*(K*h*(c + 4) + 4*E + 28*K + router_norm*4*(K + 1) + shared_gate*c*(h + 1)"
         " + (c < 4)*h*(4 - c + c*((fs > 0) + autocast*shared_gate)))", "byte",
         "tokens by expert, what comes of them, and the router's choices", ""),
    ),
    "transformers": (  # residual in the weights' dtype, RMSNorm and tanh GELU by elementary steps
        ("A_residual", "hr*max(c, 4*autocast)", "byte", "residual stream", ""),
        ("A_norms", "2*((not (rms and lora))*A_residual + rms*4*hr)", "byte",
         "norm inputs; normalised, which a frozen weight does not ask for", ""),
        ("A_inputs", "c*hr*(2 + 3*autocast*rms)", "byte", "inputs of q, k, v, gate, up", ""),
        ("A_qkv", "c*w_qkv", "byte", "q, k, v", ""),
        ("A_qk_norm", "qk_norm*((4 + c)*(a + k)*d + 4*(a + k)) + (4 + c)*(ql + kl)", "byte",
         "norms of queries and keys, or of latents", ""),
        ("A_attention", "c*a*dv", "byte", "attention's output", "Dao 2022"),
        ("A_mlp", "f_met*(2*c + 2*c*gated + (3*c + 6*autocast)*(tanh and not gated))",
         "byte", "around the activation", ""),
        ("A_experts", "2*m*K*c*h", "byte", "tokens by expert, and what comes of them", ""),
    ),
    "megatron": (  # residual in the weights' dtype, or autocast's float32: nanoGPT, Megatron-LM
        ("A_residual", "hr*max(c, 4*autocast)", "byte", "residual stream", ""),
        ("A_norms", "2*A_residual", "byte", "norm inputs", ""),
        ("A_inputs", "2*c*hr", "byte", "inputs of qkv and fc1", ""),
        ("A_qkv", "c*w_qkv", "byte", "q, k, v", ""),
        ("A_qk_norm", "2*c*(qk_norm*(a + k)*d + ql + kl)", "byte", "norms of queries and keys", ""),
        ("A_attention", "c*a*dv", "byte", "attention's output", "Dao 2022"),
        ("A_mlp", "c*f_met*(2 + 2*gated)", "byte", "around the activation", ""),
        ("A_experts", "2*m*K*c*h", "byte", "tokens by expert, and what comes of them", ""),
    ),
}

LOSS = {
    "roseval": (  # cross_entropy.py: gradients take the place of the logits; none for a frozen head
        ("M_loss_forward", "s*(Vp*c + (c < 4)*4*h)", "byte", "logits; float32 hidden states", ""),
        ("M_loss_kept", "s*(Vp*c + 4)", "byte", "their gradient in their place; nats", "Hsu 2024"),
        ("M_loss_backward", "s*Vp*c + s*h*c + max(s*h*(4 + (c < 4)*c), s*h*c + headed*Vp*h*c)",
         "byte", "and gradients of hidden states, of the head", ""),
        ("M_tied", "tied*headed*g*V*h", "byte", "two gradients of a tied embedding", ""),
    ),
    "elementary": (  # F.cross_entropy of float32 logits
        ("M_loss_forward", "s*V*(12 if capped else c + 8)", "byte", "logits, in float32 too", ""),
        ("M_loss_kept", "s*V*(4 + held*c + 4*capped)", "byte", "log-softmax; tanh", ""),
        ("M_loss_backward", "s*V*(12 + held*c + 4*capped)", "byte", "and two gradients", ""),
        ("M_tied", "tied*headed*g*V*h*(1 + (not autocast and Vp == V))", "byte",
         "two gradients of a tied embedding; their sum, where the first is a transposed view", ""),
    ),
}

STEP = (
    ("A_dropout", "drop*2*hr", "byte", "masks", "Korthikanti 2022"),
    ("A_scores", "math*a*T*(c + drop*(1 + c))", "byte", "eager attention only", "Korthikanti 2022"),
    ("A_lora", "lora*c*r*(on_q + on_k + on_v + on_o - 2*one_qkv + on_gate*gated + on_up + on_down"
     " - one_gate)", "byte", "between the halves of adapters", ""),
    ("A_unread", "ours*lora*c*((not (on_q or on_k or on_v))*hr + (not (on_gate*gated or on_up))*hr"
     " + (not on_down)*f_met)", "byte", "inputs that no trained matrix reads", ""),
    ("A_statistics", "norms*(8 - 4*rms) + flash*4*a", "byte", "of norms; log-sum-exp", "Dao 2022"),
    ("A_block", "s*(A_norms + A_inputs + A_qkv + A_qk_norm + A_attention + A_mlp + A_experts"
     " + A_dropout + A_scores + A_lora - A_unread + A_statistics)"
     " + norm_offset*4*(norms*n_norm + n_qk_norm)"
     " + ours*lora*(c < 4)*c*n_lora",
     "byte", "saved by a block", "Korthikanti 2022"),
    ("A_kept", "s*A_residual if full_recompute else A_block", "byte",
     "until the backward: of a block, or what goes into several that are recomputed together",
     "Chen 2016"),
    ("A_shared", "s*(16 + drop*hr) + (rope > 0)*4*T*d", "byte", "token ids, dropout, angles", ""),
    ("A_ends", "s*(A_residual + 8 - 4*rms + c*hr)", "byte", "final norm, head's input", ""),
    ("A_backward", "s*(A_residual + max(c*hr + c*f_met, 2*gated*c*f_met))", "byte",
     "gradients passing through a block", ""),
    ("M_dense", "packed*c*max(n_in, a*dv*h, (1 + gated)*h*f)", "byte",
     "a packed matrix, dequantised for its product", "Dettmers 2023"),
    ("M_held", "held*s*V*c", "byte", "logits that the caller keeps", ""),
    ("M_casts", "autocast*2*n_linear", "byte", "16-bit casts of a block's weights", ""),
    ("M_cast_head", "(autocast or Vp > V or whole*(c < 4))*c*Vp*h", "byte",
     "of the head; or padded", ""),
    ("M_buckets", "(zero == 0 and n > 1)*g*n_train", "byte", "DDP's gradient buckets", "Li 2020"),
    ("M_gathered_ends", "(zero == 3)*c*(n_embed + n_head)", "byte",
     "FSDP: embeddings and head", "Zhao 2023"),
    ("M_gathered", "M_gathered_ends + (zero == 3)*c*2*n_largest", "byte",
     "and a block, and the next", "Zhao 2023"),
    ("M_scattered", "(zero == 3)*((c + 4)*n_largest + c*(n_embed + n_head))", "byte",
     "FSDP: gradients of a block before and after its cast, and of the ends", "Zhao 2023"),
    ("M_scattered_ends", "(zero == 3)*((c + 4 - g/n_g)*(n_embed + n_head) + 4*n_largest)", "byte",
     "the last of them, whose shards come after; the last block's until then", ""),
    ("M_temporary", "(not fused and adam)*o*n_train/n_o", "byte", "foreach: square roots", ""),
)

INFERENCE = (
    ("M_cache", "L*kv*(c_kv + c_scale)*s", "byte",
     "keys and values, or the latents that they are made of", "Pope 2022; DeepSeek-AI 2024"),
    ("R_cache", "slack(L*(2 - latent), kv/(2 - latent)*c_kv*s, kv/(2 - latent)*c_scale*s)", "byte",
     "rest of the allocator's blocks: the cache", "CUDACachingAllocator"),
    ("W_stream", "4*h + (c if one else 4)*h", "byte", "a token's stream, and its norm", ""),
    ("W_turned", "c*(a*dv + h) if one else rope*(8 + 4*(c < 4))*a*d", "byte",
     "a token's attention and output; or the rotation of its queries by plain operations", ""),
    ("W_attention", "s*(W_stream + c*w_qkv + (c*(2*kv + widened*a*d + max(widened*a*d, a*dv + h))"
     " if latent else W_turned + qk_norm*c*(a + k)*d))", "byte", "prefill, of attention", ""),
    ("W_rounding", "(c_scale > 0)*s*(8*h + c*w_qkv + rope*c*(a + k)*d + (5 + c + 4*(c < 4))*k*d)",
     "byte", "prefill, where values become codes", ""),
    ("W_dense", "s*(W_stream + ((2 - one)*c*h + c*f if tanh and mlp_bias and c < 4"
     " else c*f*(2 + (2 - one)*gated)))", "byte",
     "prefill, at the activation; cuBLAS applies tanh GELU with a bias", ""),
    ("W_experts", "s*(12*h + c*h + K*c*(2*h + fe*(2 + 2*gated)))", "byte",
     "of a mixture: tokens sorted by expert, and what comes of them", ""),
    ("W_mlp", "max((L > L_moe)*W_dense, (m > 0)*W_experts)", "byte", "the larger of the two", ""),
    ("W_decode", "last*B*(Vp*c + V*4*(1 + capped))", "byte", "logits of B tokens, and in float32",
     ""),
    ("W_hidden", "(c if one and not scaled else 4)*h", "byte", "a token's last hidden state", ""),
    ("W_logits", "W_decode + s*W_hidden", "byte", "beside the last hidden states", ""),
    ("W_sent", "(not last)*sent*s*4*h", "byte", "on its way to the next stage", "Huang 2019"),
    ("W_prefill", "max(W_attention, W_rounding, W_mlp, W_logits) + W_sent", "byte",
     "workspace of a prefill", ""),
    ("W_scoring", "max(W_attention, W_mlp, s*W_hidden + last*min(s, chunk)*(Vp*c"
     " + (W_hidden > c*h)*c*h)) + W_sent", "byte", "of scoring.py: logits of a chunk", ""),
)

PASS = (  # T new tokens a sequence over X of context: operation, FLOPs, bytes moved, kernels
    ("qkv", "2*s*n_qkv", "w_block*n_qkv + c*s*(h + w_qkv + 2*(ql + kl))",
     "1 if not latent else 4 + 2*(ql > 0) + 2*(T == 1)"),
    ("attention", "2*a*P_pass*(2*kl + dr if absorbed else d + dv)",
     "c*s*a*(2*kl + dr if absorbed else d + dv) + B*X*(c*a*(d + dv) if latent and not absorbed"
     " else kv*(c_kv + c_scale if T == 1 else c))",
     "10 + 3*(L_window > 0) if T == 1 else 3"),  # decode merges parts of the keys
    ("out", "2*s*a*dv*h", "w_block*a*dv*h + c*s*(a*dv + h)", "1"),
    ("router", "2*s*h*E*m", "m*(w*h*E + s*(6*h + 8*E + K*(6 + c)*h))",  # sorts, sums of experts
     "(m > 0)*(24 + (2 if compiled else 4*K))"),
    ("up", "2*s*(1 + gated)*h*f_met",
     "w_block*(1 + gated)*h*f_read + c*s*(mlps_met*h + (1 + gated)*f_met)", "1 + (fs > 0)"),
    ("down", "2*s*f_met*h", "w_block*f_read*h + c*s*(f_met + mlps_met*h)", "1 + (fs > 0)"),
    ("elementwise", "0", "s*(32*h + 4*rope*(a + k)*d + 3*c*f_met) if compiled else"
     " s*(48*h + 48*rope*(a + k)*d + 28*qk_norm*(a + k)*d + 4*c*k*d + c*f_met*(2 + 3*gated))",
     "(4 if compiled else 7 + 18*rope + 6*qk_norm + gated)"),
    ("head", "last*2*B*h*V", "last*(w*h*V + c*B*V)", "8 + 9*(rope > 0)"),  # once, with embeddings
)
# fmt: on


def pairs(T: int, window: int) -> int:
    """Query-key pairs of T tokens that each see themselves and window - 1 before them."""
    w = min(T, window)
    return w * (w + 1) // 2 + (T - w) * w


MIB = 2**20


@cache
def slack(times: int, *sizes: float) -> float:
    """Bytes that torch's caching allocator counts beyond `sizes`, allocated in turn, `times` times.

    Tensors below 10 MiB share segments of 20 MiB; larger ones get one of their own, a multiple of
    2 MiB. What a tensor leaves of a segment is given to others only where it exceeds 1 MiB, and
    counts as the tensor's otherwise.
    """
    lost, free = 0.0, []
    for size in times * sizes:
        if size <= MIB:
            continue  # rounded to 512 bytes
        rest = min((left for left in free if left >= size), default=0)
        if rest:
            free.remove(rest)
        else:
            rest = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        rest -= size
        if rest > MIB:
            free.append(rest)
        else:
            lost += rest
    return lost


@cache
def _compiled(expression: str):
    return compile(expression, "<formula>", "eval")


def solve(rows: Iterable[tuple], symbols: dict) -> dict:
    """`symbols` and, by symbol, the value of each row: a row may use all rows before it."""
    values = dict(symbols)
    names = {"pairs": pairs, "slack": slack, "max": max, "min": min, "__builtins__": {}}
    for symbol, expression, *_ in rows:
        values[symbol] = eval(_compiled(expression), names, values)
    return values

"""Parameters of a model, and the FLOPs of a pass through it.

    count_parameters(config)["total"]
    estimate_flops(config, batch_size=8, seq_len=1024)["forward_causal"]

Reference: Llama-2-7B has 6,738,415,616 parameters; a forward of 2,048 tokens is 29,261,612,187,648
FLOPs with the full attention mask.
"""

from config import GPTConfig
from costs.formulas import PARAMETERS, solve
from costs.symbols import Setup, model_symbols, solve_all


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """total, embedding (tokens and positions), active (without the experts that a token does not
    visit), head (0 where tied) and block: numbers of parameters."""
    v = solve(PARAMETERS, model_symbols(config) | Setup().symbols())
    names = {"total": "N", "embedding": "n_embed", "active": "N_active", "head": "n_head"}
    return {name: v[symbol] for name, symbol in (names | {"block": "n_block"}).items()}


def estimate_flops(model_config: GPTConfig, batch_size: int, seq_len: int, **settings) -> dict:
    """FLOPs of one pass over batch_size x seq_len tokens; an addition and a product count as two.

    forward (full mask, as torch's FlopCounterMode counts), forward_causal (attended pairs only),
    training and training_causal (3 x), training_executed (what flash attention and recomputation
    really run), their parts, and the same per token. Settings are those of `Setup`; with a LoRA
    rank there is training_lora.
    """
    v = solve_all(model_config, batch_size, seq_len, Setup(**settings))
    names = ("forward", "forward_causal", "training", "training_causal")
    flops = {name: v[f"F_{name}"] for name in names}
    flops["per_token"] = {name: value / v["s"] for name, value in flops.items()}
    flops["training_executed"] = int(v["F_executed"])
    if v["r"]:
        flops["training_lora"] = v["F_training_lora"]
    parts = ("linear", "attention", "attention_causal", "head", "recompute")
    flops["parts"] = {name: v[f"F_{name}"] for name in parts}
    return flops | {"rule_2N": v["rule_2N"], "rule_6N": v["rule_6N"]}

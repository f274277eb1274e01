"""What a model costs: parameters, FLOPs, memory and time, from its config alone (no torch needed).

    python compute.py --config 7b                          # a summary, on one H100
    python compute.py --config 7b --training --precision pure --gpu h200
    python compute.py --config 7b --fits --gpu a100        # what fits: batch, length, sharding
    python compute.py --config 7b --explain                # every formula with the numbers put in
    python compute.py --config checkpoints/checkpoint-1000 --json
    python compute.py --params 7e9                         # rules of thumb only

    from compute import count_parameters, estimate_flops, estimate_memory, find_gpu, mfu

formulas.py has every formula, one line each; --explain shows them with the numbers put in.

Reference: Llama-2-7B has 6,738,415,616 parameters; a forward of 2,048 tokens is 29,261,612,187,648
FLOPs with the full attention mask.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from config import GPTConfig, load_config, load_yaml, presets
from costs.formulas import (
    ACTIVATIONS,
    CUDA_CONTEXT,
    DTYPE_NAMES,
    DTYPES,
    OPTIMIZERS,
    PARAMETERS,
    PASS,
    STEP,
    Setup,
    model_symbols,
    pairs,
    solve,
    solve_all,
    tables,
)

# ---------------------------------------------------------------------------------------------
# GPUs


@dataclass(frozen=True)
class GPU:
    """Datasheet peaks, dense (no sparsity); memory as torch reports it, in bytes."""

    name: str
    words: str  # all of them occur in torch.cuda.get_device_name
    bf16_flops: float  # FLOP/s; FP16's where the chip has no BF16
    fp32_flops: float  # FLOP/s without TF32
    bandwidth: float  # bytes/s
    memory: float  # bytes


def _gpu(name, words, bf16, fp32, bandwidth, gib):
    return GPU(name, words, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e12, gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # TFLOP/s bf16 and fp32, TB/s, GiB
        _gpu("h200", "H200", 989.4, 66.9, 4.8, 139.8),
        _gpu("h200-nvl", "H200 NVL", 835.5, 60.0, 4.8, 139.8),
        _gpu("gh200", "GH200", 989.4, 66.9, 4.0, 94.5),
        _gpu("h100", "H100", 989.4, 66.9, 3.35, 79.1),
        _gpu("h100-pcie", "H100 PCIE", 756.0, 51.2, 2.0, 79.1),
        _gpu("h100-nvl", "H100 NVL", 835.5, 60.0, 3.9, 93.1),
        _gpu("h800", "H800", 989.4, 66.9, 3.35, 79.1),
        _gpu("h20", "H20", 148.0, 44.0, 4.0, 95.1),
        _gpu("b200", "B200", 2250.0, 80.0, 8.0, 178.3),
        _gpu("a100", "A100 80GB", 312.0, 19.5, 2.039, 79.2),
        _gpu("a100-pcie", "A100 80GB PCIE", 312.0, 19.5, 1.935, 79.2),
        _gpu("a100-40gb", "A100", 312.0, 19.5, 1.555, 39.4),
        _gpu("a800", "A800", 312.0, 19.5, 2.039, 79.2),
        _gpu("l40s", "L40S", 362.0, 91.6, 0.864, 44.4),
        _gpu("l4", "L4", 121.0, 30.3, 0.3, 22.0),
        _gpu("a10g", "A10G", 70.0, 31.2, 0.6, 22.0),
        _gpu("a10", "A10", 125.0, 31.2, 0.6, 22.0),
        _gpu("a6000", "A6000", 154.8, 38.7, 0.768, 47.4),
        _gpu("6000-ada", "6000 ADA", 364.2, 91.1, 0.96, 47.4),
        _gpu("rtx4090", "RTX 4090", 165.2, 82.6, 1.008, 23.5),
        _gpu("rtx3090", "RTX 3090", 71.0, 35.6, 0.936, 23.6),
        _gpu("v100", "V100", 125.0, 15.7, 0.9, 15.8),
        _gpu("v100-32gb", "V100 32GB", 125.0, 15.7, 0.9, 31.7),
        _gpu("t4", "T4", 65.0, 8.1, 0.32, 14.6),
        _gpu("mi300x", "MI300X", 1307.4, 163.4, 5.3, 191.5),
    )
}
OTHER_CHIPS = {"LAPTOP", "MIG", "D"}  # namesakes with other peaks


def find_gpu(device_name: str) -> GPU | None:
    """The GPU of a table name ("h100") or a torch.cuda.get_device_name ("NVIDIA H100 80GB HBM3").

    The entry with most matching words wins; None for a chip that is not in the table.
    """
    if device_name.lower() in GPUS:
        return GPUS[device_name.lower()]
    words = set(re.split(r"[\s_-]+", device_name.upper()))
    if words & OTHER_CHIPS:
        return None
    found = [gpu for gpu in GPUS.values() if set(gpu.words.split()) <= words]
    return max(found, key=lambda gpu: len(gpu.words.split()), default=None)


def load_gpu(spec: str) -> GPU:
    """A table name, a device name, or a YAML file with the fields of `GPU` (plain units)."""
    if Path(spec).suffix in (".yaml", ".yml"):
        values = {"name": Path(spec).stem, "words": ""} | load_yaml(spec)
        try:
            return GPU(**values)
        except TypeError:
            wanted = "bf16_flops, fp32_flops, bandwidth, memory"
            raise ValueError(
                f"{spec}: a GPU file has the fields {wanted} (per second, bytes)"
            ) from None
    gpu = find_gpu(spec)
    if gpu is None:
        raise ValueError(f"no GPU named {spec!r}; known are {', '.join(GPUS)}, or a YAML file")
    return gpu


def mfu(flops: float, seconds: float, n_gpus: int, gpu: GPU) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022): model FLOPs done over what the dense bf16
    peak allows. Evaluation counts `forward_causal`, training `training` of `estimate_flops`."""
    return flops / (seconds * n_gpus * gpu.bf16_flops)


# ---------------------------------------------------------------------------------------------
# Parameters and FLOPs


def count_parameters(config: GPTConfig) -> dict:
    """total, embedding (tokens and positions), active (without the experts that a token does not
    visit), head (0 where tied) and block: numbers of parameters."""
    v = solve(PARAMETERS, model_symbols(config) | {"r": 0})
    names = {"total": "N", "embedding": "n_embed", "active": "N_active", "head": "n_head"}
    return {name: v[symbol] for name, symbol in (names | {"block": "n_block"}).items()}


def estimate_flops(model_config, batch_size: int, seq_len: int, **settings) -> dict:
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


# ---------------------------------------------------------------------------------------------
# Memory of one GPU


STATES = ("weights", "adapters", "gradients", "optimizer", "master")


def estimate_memory(model_config, batch_size, seq_len, dtype="fp16", training=True, **settings):
    """Bytes that torch allocates on one GPU: of a training step, or of a prefill with its cache.

    peak_bytes is the maximum over `timeline`, a list of {"event", "bytes", "parts"}; `parts` is the
    peak's own. In training: load_bytes, forward_end_bytes, backward_peak_bytes, step_peak_bytes and
    `activations`, what all blocks save by operation. The part `rounding` is what torch's allocator
    counts beyond the tensors (see `slack`); cuda_context_bytes lies outside torch's count.
    Settings are those of `Setup`.
    """
    setup = Setup(dtype=dtype, training=training, **settings)
    v = tables(model_config, batch_size, seq_len, setup)[-1][2]  # of one GPU's share
    if not training:
        return _inference(v, setup)
    timeline = [_event(name, parts) for name, parts in training_timeline(v, setup)]
    peak = max(timeline, key=lambda event: event["bytes"])

    def highest(word):
        return max(event["bytes"] for event in timeline if word in event["event"])

    saved = [row[0] for row in ACTIVATIONS[setup.implementation] + STEP[:4]]
    return {
        "peak_bytes": peak["bytes"],
        "peak_at": peak["event"],
        "parts": peak["parts"],
        "load_bytes": highest("load"),
        "forward_end_bytes": highest("end of forward"),
        "backward_peak_bytes": highest("backward of"),
        "step_peak_bytes": highest("optimizer step"),
        "cuda_context_bytes": CUDA_CONTEXT,
        "activations": {name: v["L"] * v["s"] * v[name] for name in saved if name != "A_residual"},
        "states": {name: int(v[f"M_{name}"]) for name in STATES},
        "timeline": timeline,
    }


def _event(name: str, parts: dict) -> dict:
    parts = {part: int(size) for part, size in parts.items() if size}
    return {"event": name, "bytes": sum(parts.values()), "parts": parts}


def training_timeline(v: dict, setup: Setup) -> list[tuple[str, dict]]:
    """What is alive, by part, at each event of a step that is not the first (optimizer state is
    there) after zero_grad(set_to_none=True): gradients grow while activations shrink."""
    L = v["L"]
    loaded = {
        "weights": v["M_weights"] + v["M_adapters"],
        "master": v["M_master"],
        "rounding": v["R_w"] + v["master"] * v["R_o"],
    }
    full = 0 if v["lora"] else 1  # adapters are small: their copies are not rounded
    copies = full * v["M_optimizer"] * v["n_o"] / (v["o"] * v["n_train"])  # of moments
    idle = loaded | {
        "optimizer": v["M_optimizer"],
        "rounding": loaded["rounding"] + copies * v["R_o"],
        "communication": v["M_buckets"],
        "cublas": 2 * setup.workspace,
    }
    accumulated = v["M_gradients"] if setup.accumulate else 0
    per_block = v["g"] * (v["n_lora"] if v["lora"] else v["n_block"]) / v["n_g"]

    def at(blocks, casts, gradients=0.0, head=1, **more):
        parts = dict(idle, activations=blocks * v["A_kept"] + v["A_shared"] + head * v["A_ends"])
        parts["autocast"] = casts * v["M_casts"] + head * v["M_cast_head"]
        parts["gradients"] = accumulated or gradients
        parts["communication"] += v["M_gathered"]
        parts["rounding"] += full * v["R_g"] * parts["gradients"] / v["M_gradients"]
        return parts | more

    events = [("load", loaded)]
    events += [(f"forward of block {i + 1}", at(i + 1, i + 1, head=0)) for i in range(L)]
    events.append(("logits and loss", at(L, L, loss=v["M_loss_forward"])))
    kept = 0 if v["full_recompute"] else L  # casts in autocast's cache die with the forward
    alone = {"communication": v["M_buckets"] + v["M_gathered_ends"]}  # the blocks are let go
    events.append(("end of forward", at(L, kept, loss=v["M_loss_kept"]) | alone))
    events.append(("backward of the loss", at(L, kept, loss=v["M_loss_backward"])))
    first = 0 if v["lora"] else v["g"] * v["V"] * v["h"] / v["n_g"]  # the head's gradient
    for i in range(L, 0, -1):
        casts = 1 if v["full_recompute"] else i
        parts = at(i, casts, first + (L - i) * per_block, head=0)
        parts["activations"] += v["A_block"] - v["A_kept"]  # recomputed
        parts["loss"] = v["M_held"]
        parts["backward"] = v["A_backward"] + v["M_scattered"]
        events.append((f"backward of block {i}", parts))
    step = idle | {"gradients": v["M_gradients"], "loss": v["M_held"]}
    step["rounding"] += full * v["R_g"]
    last = v["M_scattered_ends"] if v["zero"] == 3 else v["M_tied"]
    embeddings = {"backward": v["s"] * v["A_residual"] + last}
    events.append(("backward of the embeddings", step | embeddings))
    if v["M_temporary"]:
        step = step | {"step": v["M_temporary"], "rounding": step["rounding"] + full * v["R_o"]}
    events.append(("optimizer step", step))
    return events


def _inference(v: dict, setup: Setup) -> dict:
    loaded = {"weights": v["M_weights"] + v["M_adapters"], "rounding": v["R_w"]}
    cached = loaded | {"kv cache": v["M_cache"], "cublas": setup.workspace}
    cached["rounding"] += v["R_cache"]
    prefill = cached | {"workspace": v["W_prefill"]}
    decode = cached | {"workspace": v["W_decode"]}
    scoring = loaded | {"cublas": setup.workspace, "workspace": v["W_scoring"]}
    events = (("load", loaded), ("prefill", prefill), ("decode", decode), ("scoring", scoring))
    timeline = [_event(name, parts) for name, parts in events]
    peak = timeline[1]
    return {
        "peak_bytes": peak["bytes"],
        "peak_at": "prefill",
        "parts": peak["parts"],
        "load_bytes": timeline[0]["bytes"],
        "decode_bytes": timeline[2]["bytes"],
        "scoring_bytes": timeline[3]["bytes"],
        "cache_bytes_per_token": int(v["M_cache"] / v["s"]),
        "cuda_context_bytes": CUDA_CONTEXT,
        "states": {name: 0 for name in STATES} | {"weights": int(v["M_weights"])},
        "timeline": timeline,
    }


# ---------------------------------------------------------------------------------------------
# Time on one GPU: each operation takes the longer of its FLOPs and its bytes (roofline: Williams
# 2009), and every kernel the time to start and to drain, which nothing hides: the next one needs
# its result


@dataclass(frozen=True)
class Ceilings:
    """What a model's kernels reach of a GPU's datasheet, as fractions, and the time of each kernel
    that is not of its FLOPs or bytes.

    benchmarks/roofline.py fits them to the GPU at hand; the defaults are an H100's, where a single
    8192^3 product reaches 0.74, a copy 0.88, and the smallest kernel takes 1.2 µs.
    """

    matmul: float = 0.60
    attention: float = 0.54  # measured alone, causal, 4096 tokens
    memory: float = 0.83
    kernel_seconds: float = 2.3e-6


TRAINING_MFU = 0.40  # assumed of a well-tuned dense run; give --mfu where it is known


def pass_seconds(c, gpu, batch, new, context, setup, compiled=False, ceilings=None) -> dict:
    """Seconds of one forward of `new` tokens in each of `batch` sequences, which then hold
    `context` tokens each: in all, by operation, and what limits most of them."""
    v, ceilings = model_symbols(c, batch, new) | setup.symbols(), ceilings or Ceilings()
    before = context - new
    windows = [c.layer_window(layer) or context for layer in range(c.n_layers)]
    seen = sum(min(w, context) for w in windows) / c.n_layers
    full = sum(pairs(context, w) - pairs(before, w) for w in windows) / c.n_layers
    touched = c.n_experts and c.n_experts * (1 - (1 - v["K"] / v["E"]) ** v["s"])
    v |= {"X": seen, "P_pass": batch * full, "touched": touched or 1, "compiled": int(compiled)}
    peak = gpu.fp32_flops if v["c"] == 4 else gpu.bf16_flops
    seconds, bound = {}, {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    for name, flops, size, kernels in PASS:
        times = 1 if name == "head" else c.n_layers
        row = solve((("flops", flops), ("bytes", size), ("kernels", kernels)), v)
        efficiency = ceilings.attention if name == "attention" else ceilings.matmul
        limits = {
            "compute": times * row["flops"] / (efficiency * peak),
            "memory": times * row["bytes"] / (ceilings.memory * gpu.bandwidth),
            "launch": times * row["kernels"] * ceilings.kernel_seconds,
        }
        for reason in (max("compute", "memory", key=limits.get), "launch"):
            seconds[name] = seconds.get(name, 0.0) + limits[reason]
            bound[reason] += limits[reason]
    total = sum(seconds.values())
    return {"seconds": total, "bound": max(bound, key=bound.get), "operations": seconds}


def turning_batch(gpu: GPU, setup: Setup) -> float:
    """Sequences from which decode is no longer limited by reading weights: P*bytes/(2*BW)."""
    v = setup.symbols()
    peak = gpu.fp32_flops if v["c"] == 4 else gpu.bf16_flops
    return peak * v["w_block"] / (2 * gpu.bandwidth)


def roofline(c, gpu, batch: int, prompt: int, generated: int = 256, **settings) -> dict:
    """Predicted prefill and decode: seconds, tokens/s, requests/s, what limits them.

    A request is a prompt of `prompt` tokens and `generated` new ones; decode is taken at the middle
    of them. Settings are those of `Setup`, `compiled` and `ceilings`.
    """
    how = {name: settings.pop(name) for name in ("compiled", "ceilings") if name in settings}
    setup = Setup(training=False, **settings)
    prefill = pass_seconds(c, gpu, batch, prompt, prompt, setup, **how)
    decode = pass_seconds(c, gpu, batch, 1, prompt + generated // 2, setup, **how)
    total = prefill["seconds"] + generated * decode["seconds"]
    return {
        "batch": batch,
        "prefill_seconds": prefill["seconds"],
        "prefill_tokens_per_second": batch * prompt / prefill["seconds"],
        "prefill_bound": prefill["bound"],
        "decode_seconds": decode["seconds"],
        "decode_tokens_per_second": batch / decode["seconds"],
        "decode_bound": decode["bound"],
        "requests_per_second": batch / total,
        "turning_batch": turning_batch(gpu, setup),
    }


def training_time(c, gpu, seq_len, tokens, n_gpus=1, assumed_mfu=TRAINING_MFU, lora_rank=0) -> dict:
    """Tokens/s and days for `tokens` at a stated MFU, counting 3 x the full-mask forward, or what
    a frozen base leaves of it."""
    flops = estimate_flops(c, 1, seq_len, lora_rank=lora_rank)
    per_token = flops.get("training_lora", flops["training"]) / seq_len
    rate = assumed_mfu * n_gpus * gpu.bf16_flops / per_token
    days = tokens / rate / 86400
    return {"tokens_per_second": rate, "days": days, "gpu_days": days * n_gpus, "mfu": assumed_mfu}


# ---------------------------------------------------------------------------------------------
# What fits


def usable_memory(gpu: GPU) -> float:
    """Bytes to plan with: without CUDA's context and 5% that the caching allocator cannot use."""
    return 0.95 * (gpu.memory - CUDA_CONTEXT)


def largest(fits, limit: int = 2**24) -> int:
    """The largest n in 0..limit with fits(n), for a `fits` that stays false once false."""
    if not fits(1):
        return 0
    high = 1
    while high < limit and fits(2 * high):
        high *= 2
    low, high = high, min(2 * high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_fits(c, gpu, batch_size, seq_len, setup: Setup) -> dict:
    """The largest batch at seq_len and the longest sequence at batch_size; 0: not even one."""

    def fits(b, t):
        return estimate_memory(c, b, t, **asdict(setup))["peak_bytes"] <= usable_memory(gpu)

    return {
        "batch_size": largest(lambda b: fits(b, seq_len), 2**16),
        "seq_len": largest(lambda t: fits(batch_size, t)),
    }


def fewest_gpus(c, gpu, batch_size, seq_len, setup: Setup, limit=4096) -> tuple[int, int] | None:
    """(GPUs, ZeRO stage): the fewest, and the lowest stage among them; None beyond `limit`.

    batch_size sequences on each GPU; sharding over the data-parallel ranks, 3 being FSDP.
    """
    n = 1
    while n <= limit:
        for stage in (0, 1, 2, 3) if n > 1 and setup.training else (0,):
            run = replace(setup, dp=n, zero=stage)
            peak = estimate_memory(c, batch_size, seq_len, **asdict(run))["peak_bytes"]
            if peak <= usable_memory(gpu):
                return n, stage
        n *= 2
    return None


TRAINING_RUNS = (  # the table that people ask for
    ("FP32, AdamW", {"dtype": "fp32"}),
    ("BF16 autocast, AdamW", {}),
    ("BF16 autocast, 8-bit Adam", {"optimizer": "adamw8bit"}),
    ("BF16 + FP32 master, AdamW", {"precision": "master-weights"}),
    ("BF16 pure, AdamW", {"precision": "pure"}),
    ("BF16 pure, 8-bit Adam", {"precision": "pure", "optimizer": "adamw8bit"}),
    ("BF16 + master, ZeRO-1 on 8", {"precision": "master-weights", "dp": 8, "zero": 1}),
    ("BF16 + master, ZeRO-2 on 8", {"precision": "master-weights", "dp": 8, "zero": 2}),
    ("BF16 + master, ZeRO-3 on 8", {"precision": "master-weights", "dp": 8, "zero": 3}),
    ("BF16 LoRA, rank 16", {"lora_rank": 16}),
    ("INT8 LoRA, rank 16", {"lora_rank": 16, "dtype": "int8"}),
    ("INT4 LoRA, rank 16 (QLoRA)", {"lora_rank": 16, "dtype": "int4"}),
)


def fits_table(c, gpu, batch_size, seq_len, setup: Setup) -> list[dict]:
    """Rows of training runs and of inference at each dtype, with peak and whether it fits."""
    runs = [(name, {"training": True} | run) for name, run in TRAINING_RUNS]
    names = {"fp32": "FP32", "bf16": "BF16 / FP16", "int8": "INT8", "int4": "INT4"}
    runs += [(f"inference {names[d]}", {"dtype": d, "training": False}) for d in names]
    base = {"recompute": setup.recompute, "implementation": setup.implementation}
    rows = []
    for name, run in runs:
        memory = estimate_memory(c, batch_size, seq_len, **({"dtype": "bf16"} | base | run))
        rows.append(
            {
                "run": name,
                "weights": sum(memory["states"][s] for s in ("weights", "adapters", "master")),
                "gradients": memory["states"]["gradients"],
                "optimizer": memory["states"]["optimizer"],
                "peak_bytes": memory["peak_bytes"],
                "fits": memory["peak_bytes"] <= usable_memory(gpu),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# Printing


def amount(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; bytes in binary units."""
    if unit == "byte":
        for name in ("B", "KiB", "MiB", "GiB", "TiB"):
            if value < 1024 or name == "TiB":
                return f"{value:.4g} {name}"
            value /= 1024
    for name in ("", "k", "M", "G", "T", "P", "E", "Z", "Y"):
        if value < 1000 or name == "Y":
            return f"{value:.4g} {name}{unit}".rstrip()
        value /= 1000


def duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def section(title: str, rows) -> None:
    """Rows of (label, value, note) under a title, values aligned on the right."""
    print(f"\n{title}")
    for label, value, *note in rows:
        print(f"  {label:<28}{value:>22}  {'  '.join(note)}".rstrip())


def print_model(c, flops, batch_size, seq_len) -> None:
    n = count_parameters(c)
    share = f"{n['embedding'] / n['total']:.1%} of all"
    rows = [("total", f"{n['total']:,}"), ("embedding", f"{n['embedding']:,}", share)]
    if c.n_experts:
        rows.append(("active for a token", f"{n['active']:,}"))
    section("Parameters", rows)
    token, tokens = flops["per_token"], batch_size * seq_len
    rows = [
        (
            name.replace("_", ", "),
            amount(flops[name], "FLOP"),
            amount(token[name], "FLOP") + " a token",
        )
        for name in ("forward", "forward_causal", "training", "training_causal")
    ]
    rows.append(("run in a training step", amount(flops["training_executed"], "FLOP")))
    if "training_lora" in flops:
        rows.append(("LoRA step", amount(flops["training_lora"], "FLOP")))
    for rule, exact in (("rule_2N", "forward"), ("rule_6N", "training")):
        error = flops[rule] / flops[exact] - 1
        rows.append((f"rule of thumb {rule[5:]}", amount(flops[rule], "FLOP"), f"{error:+.1%}"))
    section(f"FLOPs of {tokens:,} tokens ({batch_size} x {seq_len})", rows)


def print_memory(title: str, memory: dict, gpu) -> None:
    rows = [(part, amount(size, "byte")) for part, size in memory["parts"].items()]
    rows.append(("peak", amount(memory["peak_bytes"], "byte"), f"at: {memory['peak_at']}"))
    share = memory["peak_bytes"] / gpu.memory
    rows.append((f"of {gpu.name}'s memory", f"{share:.1%}", "" if share < 1 else "does not fit"))
    section(f"{title} (beside {amount(CUDA_CONTEXT, 'byte')} of CUDA context)", rows)


def print_activations(memory: dict) -> None:
    rows = [(k[2:], amount(v, "byte")) for k, v in memory["activations"].items() if v]
    section("Saved activations of all blocks, by operation, nothing recomputed", rows)
    stages = ("load", "forward_end", "backward_peak", "step_peak")
    section(
        "Timeline", [(s.replace("_", " "), amount(memory[f"{s}_bytes"], "byte")) for s in stages]
    )


def print_time(c, gpu, seq_len, setup: Setup, assumed_mfu, tokens, price) -> None:
    print(f"\nInference on {gpu.name}: prompts of {seq_len}, 256 new tokens (roofline)")
    print(
        f"  {'batch':>7}{'first token':>14}{'a step':>12}{'tokens/s':>12}{'requests/s':>12}  limit"
    )
    for batch in (1, 8, 64):
        r = roofline(c, gpu, batch, seq_len, dtype=setup.dtype)
        first, step = duration(r["prefill_seconds"]), duration(r["decode_seconds"])
        rates = f"{r['decode_tokens_per_second']:>12,.0f}{r['requests_per_second']:>12.3g}"
        print(f"  {batch:>7}{first:>14}{step:>12}{rates}  {r['decode_bound']}")
    print(f"  reading weights stops being the limit of decode at batch {r['turning_batch']:.0f}")
    n_gpus = setup.dp * setup.tp
    t = training_time(c, gpu, seq_len, tokens, n_gpus, assumed_mfu, setup.lora_rank)
    cost = f"{t['gpu_days'] * 24 * price:,.0f} at {price:g} a GPU-hour" if price else ""
    rows = [
        ("tokens/s", f"{t['tokens_per_second']:,.0f}"),
        (f"{amount(tokens)} tokens", duration(t["days"] * 86400)),
        ("GPU-hours", f"{t['gpu_days'] * 24:,.0f}", cost),
    ]
    section(f"Training on {n_gpus} x {gpu.name} at an assumed MFU of {assumed_mfu:.0%}", rows)


def print_fits(c, gpu, batch_size, seq_len, setup: Setup) -> None:
    print(f"\nWhat it takes, batch {batch_size} x {seq_len}, on one GPU of the group (GiB)")
    print(f"  {'':<28}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'peak':>9}  {gpu.name}")
    for row in fits_table(c, gpu, batch_size, seq_len, setup):
        gib = [row[name] / 2**30 for name in ("weights", "gradients", "optimizer", "peak_bytes")]
        sizes = f"{gib[0]:>9.1f}{gib[1]:>11.1f}{gib[2]:>11.1f}{gib[3]:>9.1f}"
        print(f"  {row['run']:<28}{sizes}  {'fits' if row['fits'] else '-'}")
    rows = []
    for training in (True, False):
        run = replace(setup, training=training)
        if training and run.dtype in ("int8", "int4") and not run.lora_rank:
            continue
        name = "training" if training else "inference"
        best = largest_fits(c, gpu, batch_size, seq_len, run)
        rows.append((f"{name}: largest batch", f"{best['batch_size']:,}", f"at {seq_len} tokens"))
        rows.append((f"{name}: longest sequence", f"{best['seq_len']:,}", f"at batch {batch_size}"))
        fewest = fewest_gpus(c, gpu, batch_size, seq_len, run)
        text = f"{fewest[0]} (ZeRO stage {fewest[1]})" if fewest else "more than 4,096"
        rows.append((f"{name}: fewest GPUs", text, f"{batch_size} sequences each"))
    section(f"Limits on {gpu.name}, {usable_memory(gpu) / 2**30:.1f} GiB usable", rows)


def explain(c, batch_size, seq_len, setup: Setup) -> None:
    """Every formula with its symbols, then its numbers, then its value."""
    for title, rows, values in tables(c, batch_size, seq_len, setup):
        print(f"\n{title}")
        for symbol, expression, unit, meaning, source in rows:
            numbers = re.sub(
                r"[A-Za-z_]\w*",
                lambda m: f"{values[m[0]]:.12g}" if m[0] in values else m[0],  # noqa: B023
                expression,
            )
            print(f"  {symbol}: {meaning}{f' [{source}]' if source else ''}")
            print(f"    = {expression}\n    = {numbers}")
            print(f"    = {values[symbol]:,.12g} {unit}".rstrip())


def plot_timeline(memory: dict, path: str) -> None:
    """Stacked parts over the events of a step. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timeline = memory["timeline"]
    parts = list(dict.fromkeys(part for event in timeline for part in event["parts"]))
    heights = [[event["parts"].get(part, 0) / 2**30 for event in timeline] for part in parts]
    figure, axes = plt.subplots(figsize=(10, 5))
    axes.stackplot(range(len(timeline)), heights, labels=parts)
    labels = ("load", "end of forward", "optimizer step")
    shown = [i for i, event in enumerate(timeline) if event["event"] in labels]
    axes.set_xticks(shown, labels)
    axes.margins(x=0)
    axes.set_ylabel("GiB allocated")
    axes.set_title(f"peak {amount(memory['peak_bytes'], 'byte')} at: {memory['peak_at']}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def print_rules(n: float, gpu: GPU) -> None:
    """What N alone says: good to a few percent for memory of states, to 10-30% for FLOPs."""
    states = {"FP32 or autocast": 16, "BF16 + FP32 master": 16, "BF16 pure": 8}
    section(f"Rules of thumb for {amount(n)} parameters", [
        ("FLOPs a token, forward", amount(2 * n, "FLOP"), "2N, attention left out"),
        ("FLOPs a token, training", amount(6 * n, "FLOP"), "6N"),
        *((f"AdamW states, {name}", amount(b * n, "byte"), f"{b}N") for name, b in states.items()),
        *((f"weights, {name}", amount(b * n, "byte")) for name, b in DTYPES.items()),
        (f"decode on {gpu.name}, batch 1", f"{gpu.bandwidth / (2 * n):,.0f} tokens/s",
         "weights read once, BF16, at the datasheet's bandwidth"),
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Command line


def read_config(spec: str) -> GPTConfig:
    """load_config, and where to find the config of a checkpoint that is a bare weights file."""
    path = Path(spec)
    weights = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    inside = path.is_dir() and any(p.suffix in weights for p in path.iterdir())
    if path.suffix in weights or (inside and not (path / "config.json").exists()):
        raise ValueError(
            f"{spec} has no config.json, and weights are not opened here: "
            f"`python checkpoint.py inspect {spec}` prints its config"
        )
    return load_config(spec)


def make_parser(cli):
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--config", help=f"{', '.join(presets())}, a YAML file, a config.json or its directory")
    add("--params", type=float, metavar="N", help="rules of thumb for N parameters, such as 7e9")
    add("--batch-size", type=cli.positive_int, default=1)
    add("--seq-len", type=cli.positive_int, help="default: the model's longest, at most 4096")
    add("--dtype", default="bf16", choices=(*DTYPES, *DTYPE_NAMES))
    add("--training", action="store_true", help="the training step in detail; its memory in --json")
    add("--optimizer", default="adamw", choices=tuple(OPTIMIZERS))
    add("--foreach", action="store_true", help="AdamW that is not fused")
    add("--precision", default="autocast", choices=("autocast", "pure", "master-weights"))
    add("--recompute", default="none", choices=("none", "selective", "full"))
    add("--implementation", default="roseval", choices=tuple(ACTIVATIONS))
    add("--lora-rank", type=int, default=0)
    add("--dp", type=cli.positive_int, default=1, help="data-parallel GPUs")
    add("--zero", type=int, default=0, choices=(0, 1, 2, 3))
    add("--fsdp", action="store_true", help="the same as --zero 3")
    add("--tp", type=cli.positive_int, default=1, help="tensor-parallel GPUs")
    add("--gpu", default="h100", help=f"{', '.join(GPUS)}, or a YAML file")
    add("--mfu", type=float, default=TRAINING_MFU, help="assumed for training time (0.40)")
    add("--tokens", type=float, help="training budget; default: 20 a parameter (Hoffmann 2022)")
    add("--price", type=float, help="of a GPU-hour")
    add("--fits", action="store_true", help="what fits the GPU: batch, length, sharding")
    add("--explain", action="store_true", help="every formula with the numbers put in")
    add("--plot", metavar="FILE", help="draw the training step's memory over time (matplotlib)")
    add("--json", action="store_true")
    add("--debug", action="store_true", help="show the traceback of input errors")
    return p


def read_setup(args) -> Setup:
    if args.fsdp and args.zero not in (0, 3):
        raise ValueError(f"--fsdp is ZeRO stage 3 and contradicts --zero {args.zero}")
    return Setup(
        dtype=args.dtype,
        training=args.training,
        optimizer=args.optimizer,
        fused=not args.foreach,
        precision=args.precision,
        recompute=args.recompute,
        implementation=args.implementation,
        lora_rank=args.lora_rank,
        dp=args.dp,
        zero=3 if args.fsdp else args.zero,
        tp=args.tp,
    )


def main(argv=None) -> None:
    import cli

    args = make_parser(cli).parse_args(argv)
    if (args.config is None) == (args.params is None):
        raise ValueError("give either --config (a model) or --params (a number of parameters)")
    gpu = load_gpu(args.gpu)
    if args.params:
        return print_rules(args.params, gpu)
    c, setup, batch = read_config(args.config), read_setup(args), args.batch_size
    seq_len = args.seq_len or min(c.max_position_embeddings, 4096)
    settings = asdict(setup)
    flops = estimate_flops(c, batch, seq_len, **settings)
    memory = estimate_memory(c, batch, seq_len, **settings)
    tokens = args.tokens or 20 * count_parameters(c)["active"]
    if args.plot:
        plot_timeline(
            estimate_memory(c, batch, seq_len, **settings | {"training": True}), args.plot
        )
    if args.json:
        time = {
            "inference": roofline(c, gpu, batch, seq_len, dtype=setup.dtype),
            "training": training_time(
                c, gpu, seq_len, tokens, setup.dp * setup.tp, args.mfu, setup.lora_rank
            ),
        }
        report = {"config": c.to_dict(), "setup": settings, "gpu": asdict(gpu)}
        report |= {"parameters": count_parameters(c), "flops": flops, "memory": memory}
        return print(json.dumps(report | {"time": time}, indent=2))
    if args.explain:
        return explain(c, batch, seq_len, setup)
    print(f"{args.config}: {c.n_layers} layers, width {c.d_model}, {c.n_heads} heads"
          f" ({c.n_kv_heads} of keys and values) of {c.head_dim}, MLP {c.d_ff}")  # fmt: skip
    if args.fits:
        return print_fits(c, gpu, batch, seq_len, setup)
    print_model(c, flops, batch, seq_len)
    if not args.training:
        print_memory(f"Memory of inference, {setup.dtype}", memory, gpu)
    if args.training or setup.lora_rank or setup.dtype not in ("int8", "int4"):
        memory = estimate_memory(c, batch, seq_len, **settings | {"training": True})
        how = f"LoRA of rank {setup.lora_rank}" if setup.lora_rank else setup.precision
        how = f"{setup.dtype} {how}, {setup.optimizer}"
        print_memory(f"Memory of training, {how}", memory, gpu)
        if args.training:
            print_activations(memory)
    print_time(c, gpu, seq_len, setup, args.mfu, tokens, args.price)


if __name__ == "__main__":
    import cli

    cli.run(main)

"""Memory of one GPU, in training and in inference, and what fits it.

    estimate_memory(config, batch_size=8, seq_len=1024, dtype="bf16")["peak_bytes"]
    largest_fits(config, find_gpu("h100"), 1, 4096, Setup())

benchmarks/memory.py holds it against what torch allocates.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from config import GPTConfig
from costs.formulas import ACTIVATIONS, STEP
from costs.gpus import GPU
from costs.shards import shares
from costs.symbols import CUDA_CONTEXT, Setup, tables

STATES = ("weights", "adapters", "gradients", "optimizer", "master")


def estimate_memory(
    model_config: GPTConfig,
    batch_size: int,
    seq_len: int,
    dtype: str = "fp16",
    training: bool = True,
    **settings,
) -> dict:
    """Bytes that torch allocates on one GPU: of a training step, or of a prefill with its cache.

    peak_bytes is the maximum over `timeline`, a list of {"event", "bytes", "parts"}; `parts` is the
    peak's own. In training: load_bytes, forward_end_bytes, backward_peak_bytes, step_peak_bytes and
    `activations`, what all blocks save by operation. The part `rounding` is what torch's allocator
    counts beyond the tensors (see `slack`); cuda_context_bytes lies outside torch's count.
    Settings are those of `Setup`.
    """
    setup = Setup(dtype=dtype, training=training, **settings)
    if setup.shard > 1:  # of the GPU that needs most, which is another one at another time
        each = shares(model_config, setup)
        found = [estimate_memory(c, batch_size, seq_len, **asdict(own)) for c, own in each]
        fullest = max(found, key=lambda memory: memory["peak_bytes"])
        return fullest | {k: max(m[k] for m in found) for k in fullest if k.endswith("_bytes")}
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
    """An entry of the timeline: whole bytes, and only the parts that are there."""
    parts = {part: int(size) for part, size in parts.items() if size}
    return {"event": name, "bytes": sum(parts.values()), "parts": parts}


def _whole_matrices(v: dict) -> int:
    """1 where matrices of the model train; 0 with LoRA: adapters are small, their copies are not
    rounded by the allocator."""
    return 0 if v["lora"] else 1


def _between_steps(v: dict, setup: Setup) -> tuple[dict, dict]:
    """What is alive once the model is loaded, and between two steps, by part."""
    loaded = {
        "weights": v["M_weights"] + v["M_adapters"],
        "master": v["M_master"],
        "rounding": v["R_w"] + v["master"] * v["R_o"],
    }
    moments = v["M_optimizer"] * v["n_o"] / (v["o"] * v["n_train"])  # or copies like them
    idle = loaded | {
        "optimizer": v["M_optimizer"],
        "rounding": loaded["rounding"] + _whole_matrices(v) * moments * v["R_o"],
        "communication": v["M_buckets"],
        "cublas": 2 * setup.workspace,
    }
    return loaded, idle


def training_timeline(v: dict, setup: Setup) -> list[tuple[str, dict]]:
    """What is alive, by part, at each event of a step that is not the first (optimizer state is
    there) after zero_grad(set_to_none=True): gradients grow while activations shrink. v: the value
    of every formula, of one GPU's share."""
    L, full = v["L"], _whole_matrices(v)
    loaded, idle = _between_steps(v, setup)
    accumulated = v["M_gradients"] if setup.accumulate else 0
    per_block = v["g"] * (v["n_lora"] if v["lora"] else v["n_block"]) / v["n_g"]

    def at(blocks, casts, gradients=0.0, head=1, **more):
        kept = -(-blocks // v["together"]) * v["A_kept"]
        parts = dict(idle, activations=kept + v["A_shared"] + head * v["A_ends"])
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
    first = v["headed"] * v["g"] * v["V"] * v["h"] / v["n_g"]  # the head's gradient
    for i in range(L, 0, -1):
        casts = 1 if v["full_recompute"] else i
        parts = at(i, casts, first + (L - i) * per_block, head=0)
        again = (i - 1) % v["together"] + 1  # blocks that were recomputed and are still there
        parts["activations"] += again * v["A_block"] - v["A_kept"]
        parts["loss"] = v["M_held"]
        parts["backward"] = v["A_backward"] + v["M_scattered"] + v["M_dense"]
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
    """`estimate_memory` without training; v as in `training_timeline`."""
    loaded = {"weights": v["M_weights"] + v["M_adapters"], "rounding": v["R_w"]}
    kept = "latent cache" if v["latent"] else "kv cache"
    cached = loaded | {kept: v["M_cache"], "cublas": setup.workspace}
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
# What fits


def usable_memory(gpu: GPU) -> float:
    """Bytes to plan with: without CUDA's context and 5% that the caching allocator cannot use."""
    return 0.95 * (gpu.memory - CUDA_CONTEXT)


def largest(fits: Callable[[int], bool], limit: int = 2**24) -> int:
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


def largest_fits(
    c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup
) -> dict[str, int]:
    """The largest batch at seq_len and the longest sequence at batch_size; 0: not even one."""

    def fits(b, t):
        return estimate_memory(c, b, t, **asdict(setup))["peak_bytes"] <= usable_memory(gpu)

    return {
        "batch_size": largest(lambda b: fits(b, seq_len), 2**16),
        "seq_len": largest(lambda t: fits(batch_size, t)),
    }


def fewest_gpus(
    c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup, limit: int = 4096
) -> tuple[int, int] | None:
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


def fewest_shards(
    c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup, among: Iterable[int]
) -> int | None:
    """The first of so many GPUs that hold the model between them, of inference; None: of none."""
    for n in among:
        if n <= c.n_layers:
            run = asdict(replace(setup, training=False, shard=n))
            memory = estimate_memory(c, batch_size, seq_len, **run)
            if max(memory["peak_bytes"], memory["scoring_bytes"]) <= usable_memory(gpu):
                return n
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


def fits_table(c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup) -> list[dict]:
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

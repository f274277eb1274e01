"""What compute.py prints: a model's parameters and FLOPs, memory by part, time, what fits a GPU.

print_memory("Memory of inference", estimate_memory(config, 1, 1024, training=False), gpu)
explain(config, 1, 1024, Setup())               # every formula with the numbers put in
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, replace

from config import GPTConfig
from costs.flops import count_parameters
from costs.gpus import GPU
from costs.memory import estimate_memory, fewest_gpus, fits_table, largest_fits, usable_memory
from costs.pipeline import sharded_time
from costs.symbols import CUDA_CONTEXT, DTYPES, Setup, tables
from costs.time import roofline, training_time


def amount(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; bytes in binary units."""
    if unit == "byte":
        for name in ("B", "KiB", "MiB", "GiB", "TiB"):
            if value < 1024 or name == "TiB":
                return f"{value:.4g} {name}"
            value /= 1024
    for name in ("", "k", "M", "G", "T", "P", "E", "Z", "Y"):
        if value < 1000 or name == "Y":
            break
        value /= 1000
    return f"{value:.4g} {name}{unit}".rstrip()


def duration(seconds: float) -> str:
    """5400 -> "1.5 hours"."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def section(title: str, rows: Iterable[tuple]) -> None:
    """Rows of (label, value, note) under a title, values aligned on the right."""
    print(f"\n{title}")
    for label, value, *note in rows:
        print(f"  {label:<28}{value:>22}  {'  '.join(note)}".rstrip())


def print_model(c: GPTConfig, flops: dict, batch_size: int, seq_len: int) -> None:
    """Parameters, and FLOPs beside the rules of thumb."""
    n = count_parameters(c)
    share = f"{n['embedding'] / n['total']:.1%} of all"
    rows: list[tuple[str, ...]] = [
        ("total", f"{n['total']:,}"),
        ("embedding", f"{n['embedding']:,}", share),
    ]
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


def print_memory(title: str, memory: dict, gpu: GPU) -> None:
    """What `estimate_memory` says is alive at the peak, by part."""
    rows: list[tuple[str, ...]] = [
        (part, amount(size, "byte")) for part, size in memory["parts"].items()
    ]
    rows.append(("peak", amount(memory["peak_bytes"], "byte"), f"at: {memory['peak_at']}"))
    share = memory["peak_bytes"] / gpu.memory
    rows.append((f"of {gpu.name}'s memory", f"{share:.1%}", "" if share < 1 else "does not fit"))
    section(f"{title} (beside {amount(CUDA_CONTEXT, 'byte')} of CUDA context)", rows)


def print_training(
    c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup, detailed: bool
) -> None:
    """Memory of a training step; detailed: the activations by operation and the stages too."""
    run = asdict(setup) | {"training": True}
    memory = estimate_memory(c, batch_size, seq_len, **run)
    how = f"LoRA of rank {setup.lora_rank}" if setup.lora_rank else setup.precision
    print_memory(f"Memory of training, {setup.dtype} {how}, {setup.optimizer}", memory, gpu)
    if detailed:
        print_activations(memory)


def print_activations(memory: dict) -> None:
    """What a training step saves by operation, and its stages."""
    rows = [(k[2:], amount(v, "byte")) for k, v in memory["activations"].items() if v]
    section("Saved activations of all blocks, by operation, nothing recomputed", rows)
    stages = ("load", "forward_end", "backward_peak", "step_peak")
    section(
        "Timeline", [(s.replace("_", " "), amount(memory[f"{s}_bytes"], "byte")) for s in stages]
    )


def print_time(
    c: GPTConfig,
    gpu: GPU,
    seq_len: int,
    setup: Setup,
    assumed_mfu: float,
    tokens: float,
    price: float | None,
) -> None:
    """Inference at three batches, and training for `tokens`; price: of a GPU-hour, or None."""
    print(f"\nInference on {gpu.name}: prompts of {seq_len}, 256 new tokens (roofline)")
    print(
        f"  {'batch':>7}{'first token':>14}{'a step':>12}{'tokens/s':>12}{'requests/s':>12}  limit"
    )
    for batch in (1, 8, 64):
        r = roofline(c, gpu, batch, seq_len, **weights_of(setup))
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


def print_shards(c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup) -> None:
    """The share of each GPU, and how fast they are together."""
    t, rows = sharded_time(c, gpu, batch_size, seq_len, setup), []
    for k, (layers, size) in enumerate(zip(t["layers"], t["weight_bytes"])):
        ends = ", the embeddings" * (k == 0) + ", the head" * (k == setup.shard - 1)
        rows.append((f"GPU {k}", amount(size, "byte"), f"{layers} layers{ends}"))
    note = f"{t['batches']} batches of {batch_size} x {seq_len}; {t['fill']:.1%} fills the pipe"
    rows.append(("scoring", f"{t['scoring_tokens_per_second']:,.0f} tokens/s", note))
    note = f"{setup.shard} x {batch_size} rows under way"
    rows.append(("decode", f"{t['decode_tokens_per_second']:,.0f} tokens/s", note))
    section(f"Sharded over {setup.shard} x {gpu.name}, layer by layer (roofline)", rows)


def weights_of(setup: Setup) -> dict:
    """What of it a pass without training depends on."""
    return {name: getattr(setup, name) for name in ("dtype", "quantise", "kv_dtype")}


def print_fits(c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup) -> None:
    """The table of usual runs, and the limits of this one."""
    print(f"\nWhat it takes, batch {batch_size} x {seq_len}, on one GPU of the group (GiB)")
    print(f"  {'':<28}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'peak':>9}  {gpu.name}")
    for row in fits_table(c, gpu, batch_size, seq_len, setup):
        gib = [row[name] / 2**30 for name in ("weights", "gradients", "optimizer", "peak_bytes")]
        sizes = f"{gib[0]:>9.1f}{gib[1]:>11.1f}{gib[2]:>11.1f}{gib[3]:>9.1f}"
        print(f"  {row['run']:<28}{sizes}  {'fits' if row['fits'] else '-'}")
    rows = []
    for training in (True, False)[not setup.trains :]:
        run = replace(setup, training=training)
        name = "training" if training else "inference"
        best = largest_fits(c, gpu, batch_size, seq_len, run)
        rows.append((f"{name}: largest batch", f"{best['batch_size']:,}", f"at {seq_len} tokens"))
        rows.append((f"{name}: longest sequence", f"{best['seq_len']:,}", f"at batch {batch_size}"))
        fewest = fewest_gpus(c, gpu, batch_size, seq_len, run)
        text = f"{fewest[0]} (ZeRO stage {fewest[1]})" if fewest else "more than 4,096"
        rows.append((f"{name}: fewest GPUs", text, f"{batch_size} sequences each"))
    section(f"Limits on {gpu.name}, {usable_memory(gpu) / 2**30:.1f} GiB usable", rows)


def explain(c: GPTConfig, batch_size: int, seq_len: int, setup: Setup) -> None:
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

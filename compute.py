"""What a model costs: parameters, FLOPs, memory and time, from its config alone (no torch needed).

    python compute.py --config 7b                          # a summary, on one H100
    python compute.py --config 7b --training --precision pure --gpu h200
    python compute.py --config 7b --fits --gpu a100        # what fits: batch, length, sharding
    python compute.py --config 7b --quantise rtn-w4-g128   # weights of few bits
    python compute.py --config 7b --explain                # every formula with the numbers put in
    python compute.py --config checkpoints/checkpoint-1000 --json
    python compute.py --params 7e9                         # rules of thumb only

    from compute import count_parameters, estimate_flops, estimate_memory, find_gpu, mfu

costs/ does the counting; costs/formulas.py has every formula, one line each, and --explain shows
them with the numbers put in.

Reference: Llama-2-7B has 6,738,415,616 parameters; a forward of 2,048 tokens is 29,261,612,187,648
FLOPs with the full attention mask.
"""

import contextlib
import json
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType

from config import GPTConfig, load_config, load_yaml, presets
from costs.flops import count_parameters, estimate_flops
from costs.formulas import ACTIVATIONS, OPTIMIZERS
from costs.gpus import GPU, GPUS, find_gpu, mfu
from costs.memory import estimate_memory, fewest_gpus, fits_table, largest_fits, usable_memory
from costs.pipeline import sharded_time
from costs.plot import plot_timeline
from costs.symbols import CUDA_CONTEXT, DTYPE_NAMES, DTYPES, Setup, tables
from costs.time import TRAINING_MFU, Ceilings, pass_seconds, roofline, training_time, turning_batch
from families.llama import number
from quantisation.names import KV_DTYPES

__all__ = [
    "GPU",
    "GPUS",
    "TRAINING_MFU",
    "Ceilings",
    "Setup",
    "count_parameters",
    "estimate_flops",
    "estimate_memory",
    "fewest_gpus",
    "find_gpu",
    "fits_table",
    "largest_fits",
    "load_gpu",
    "mfu",
    "pass_seconds",
    "roofline",
    "training_time",
    "turning_batch",
    "usable_memory",
]

SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
MOST_PARAMETERS = 1e30  # and tokens, and prices: what is beyond is a slip of the keyboard
MOST_TOKENS = 2**63  # of a step


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


def load_gpu(spec: str) -> GPU:
    """A table name, a device name, or a YAML file with the fields of `GPU` (plain units)."""
    if Path(spec).suffix in (".yaml", ".yml"):
        values, wanted = load_yaml(spec), ("bf16_flops", "fp32_flops", "bandwidth", "memory")
        if {*values} - {"name", "words"} != {*wanted}:
            fields = ", ".join(wanted)
            raise ValueError(f"{spec}: a GPU file has the fields {fields} (per second, bytes)")
        peaks = {name: number(f"{spec}: {name}", values[name]) for name in wanted}
        for name, peak in peaks.items():
            if peak <= 0:
                raise ValueError(f"{spec}: {name} must be positive, not {peak!r}")
        return GPU(name=str(values.get("name", Path(spec).stem)), words="", **peaks)
    gpu = find_gpu(spec)
    if gpu is None:
        raise ValueError(f"no GPU named {spec!r}; known are {', '.join(GPUS)}, or a YAML file")
    return gpu


def positive(text: str) -> float:
    """A number such as 7e9, 7B or 350M."""
    digits, scale = text.replace("_", ""), 1.0
    if digits[-1:].upper() in SCALES:
        digits, scale = digits[:-1], SCALES[digits[-1].upper()]
    with contextlib.suppress(ValueError):
        value = float(digits) * scale
        if 0 < value < MOST_PARAMETERS:
            return value
    raise ArgumentTypeError(f"needs a positive number such as 7e9 or 7B, not {text!r:.60}")


def share(text: str) -> float:
    """More than 0, 1 at most."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise ArgumentTypeError(f"needs a share between 0 and 1, not {text!r:.60}")


def rank(text: str) -> int:
    """A whole number; 0: none."""
    with contextlib.suppress(ValueError):
        if int(text) >= 0:
            return int(text)
    raise ArgumentTypeError(f"needs a whole number from 0 on, not {text!r:.60}")


def make_parser(cli: ModuleType) -> ArgumentParser:
    """The flags. cli: the module, imported by `main` alone, since it is not needed to count."""
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--config", help=f"{', '.join(presets())}, a YAML file, a config.json or its directory")
    add("--params", type=positive, metavar="N", help="rules of thumb for N parameters: 7e9 or 7B")
    add("--batch-size", type=cli.positive_int, default=1)
    add("--seq-len", type=cli.positive_int, help="default: the model's longest, at most 4096")
    add("--dtype", default="bf16", choices=(*DTYPES, *DTYPE_NAMES))
    add("--training", action="store_true", help="the training step in detail; its memory in --json")
    add("--optimizer", default="adamw", choices=tuple(OPTIMIZERS))
    add("--foreach", action="store_true", help="AdamW that is not fused")
    add("--precision", default="autocast", choices=("autocast", "pure", "master-weights"))
    add("--recompute", default="none", choices=("none", "selective", "full"))
    add("--implementation", default="roseval", choices=tuple(ACTIVATIONS))
    add("--lora-rank", type=rank, default=0)
    add("--quantise", metavar="RULE", help="as the evaluations round weights: rtn-w4-g128, say")
    add("--kv-dtype", choices=tuple(KV_DTYPES), help="as generation keeps keys and values")
    add("--train-embeddings", action="store_true", help="with the head, beside LoRA's adapters")
    add("--dp", type=cli.positive_int, default=1, help="data-parallel GPUs")
    add("--zero", type=int, default=0, choices=(0, 1, 2, 3))
    add("--fsdp", action="store_true", help="the same as --zero 3")
    add("--tp", type=cli.positive_int, default=1, help="tensor-parallel GPUs")
    add("--shard", type=cli.positive_int, default=1, help="GPUs that hold a model between them")
    add("--gpu", default="h100", help=f"{', '.join(GPUS)}, or a YAML file")
    add("--mfu", type=share, default=TRAINING_MFU, help="assumed for training time (0.40)")
    add("--tokens", type=positive, help="training budget; default: 20 a parameter (Hoffmann 2022)")
    add("--price", type=positive, help="of a GPU-hour")
    add("--fits", action="store_true", help="what fits the GPU: batch, length, sharding")
    add("--explain", action="store_true", help="every formula with the numbers put in")
    add("--plot", metavar="FILE", help="draw the training step's memory over time (matplotlib)")
    add("--json", action="store_true")
    add("--debug", action="store_true", help="show the traceback of input errors")
    return p


def read_setup(args: Namespace) -> Setup:
    """The flags that say how a model is run; ValueError where they contradict each other."""
    if args.fsdp and args.zero not in (0, 3):
        raise ValueError(f"--fsdp is ZeRO stage 3 and contradicts --zero {args.zero}")
    given = vars(args) | {"fused": not args.foreach, "zero": 3 if args.fsdp else args.zero}
    return Setup(**{f.name: given[f.name] for f in fields(Setup) if f.name in given})


def time_report(
    c: GPTConfig, gpu: GPU, batch_size: int, seq_len: int, setup: Setup, args: Namespace
) -> dict:
    """The part "time" of --json."""
    if setup.shard > 1:
        return {"sharded": sharded_time(c, gpu, batch_size, seq_len, setup)}
    n_gpus, tokens = setup.dp * setup.tp, training_tokens(c, args)
    return {
        "inference": roofline(c, gpu, batch_size, seq_len, **weights_of(setup)),
        "training": training_time(c, gpu, seq_len, tokens, n_gpus, args.mfu, setup.lora_rank),
    }


def training_tokens(c: GPTConfig, args: Namespace) -> float:
    """The budget: --tokens, or 20 for each parameter that a token meets (Hoffmann 2022)."""
    return args.tokens or 20 * count_parameters(c)["active"]


def main(argv=None) -> None:
    import cli

    args = make_parser(cli).parse_args(argv)
    if (args.config is None) == (args.params is None):
        raise ValueError("give either --config (a model) or --params (a number of parameters)")
    gpu = load_gpu(args.gpu)
    if args.params is not None:
        return print_rules(args.params, gpu)
    c, setup, batch_size = read_config(args.config), read_setup(args), args.batch_size
    seq_len = args.seq_len or min(c.max_position_embeddings, 4096)
    if max(batch_size * seq_len, setup.lora_rank, setup.dp * setup.tp) > MOST_TOKENS:
        raise ValueError(
            "--batch-size, --seq-len, --lora-rank, --dp or --tp is beyond all machines"
        )
    settings = asdict(setup)
    flops = estimate_flops(c, batch_size, seq_len, **settings)
    memory = estimate_memory(c, batch_size, seq_len, **settings)
    if args.plot:
        training = settings | {"training": True}
        plot_timeline(estimate_memory(c, batch_size, seq_len, **training), args.plot)
    if args.json:
        report = {"config": c.to_dict(), "setup": settings, "gpu": asdict(gpu)}
        report |= {"parameters": count_parameters(c), "flops": flops, "memory": memory}
        report["time"] = time_report(c, gpu, batch_size, seq_len, setup, args)
        return print(json.dumps(report, indent=2))
    if setup.shard > 1 and (args.explain or args.fits):
        raise ValueError("--explain and --fits are of one GPU: they do not go with --shard")
    if args.explain:
        return explain(c, batch_size, seq_len, setup)
    heads = f"{c.n_heads} heads ({c.n_kv_heads} of keys and values) of {c.head_dim}"
    if c.kv_lora_rank is not None:
        heads = f"{c.n_heads} heads of {c.head_dim}, values of {c.value_dim}"
        heads += f", made of latents of {c.kv_lora_rank} + {c.rotary_dim}"
    print(f"{cli.printable(args.config)}: {c.n_layers} layers, width {c.d_model}, {heads}"
          f", MLP {c.d_ff}")  # fmt: skip
    if args.fits:
        return print_fits(c, gpu, batch_size, seq_len, setup)
    print_model(c, flops, batch_size, seq_len)
    if not args.training:
        whose = f" of the fullest of {setup.shard} GPUs" if setup.shard > 1 else ""
        how = setup.quantise or setup.dtype
        how += f", keys and values {setup.kv_dtype}" if setup.kv_dtype else ""
        print_memory(f"Memory of inference{whose}, {how}", memory, gpu)
    if setup.shard > 1:
        return print_shards(c, gpu, batch_size, seq_len, setup)
    if setup.trains:
        print_training(c, gpu, batch_size, seq_len, setup, args.training)
    print_time(c, gpu, seq_len, setup, args.mfu, training_tokens(c, args), args.price)


if __name__ == "__main__":
    import cli

    cli.run(main)

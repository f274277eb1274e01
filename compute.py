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
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import installed  # noqa: F401

from config import GPTConfig, load_config, load_yaml, presets
from costs.flops import count_parameters, estimate_flops
from costs.formulas import ACTIVATIONS, OPTIMIZERS
from costs.gpus import GPU, GPUS, find_gpu, mfu
from costs.memory import estimate_memory, fewest_gpus, fits_table, largest_fits, usable_memory
from costs.pipeline import sharded_time
from costs.plot import plot_timeline
from costs.printed import (
    explain,
    print_fits,
    print_memory,
    print_model,
    print_rules,
    print_shards,
    print_time,
    print_training,
    weights_of,
)
from costs.symbols import DTYPE_NAMES, DTYPES, Setup
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
# Command line


def read_config(spec: str) -> GPTConfig:
    """load_config, and where to find the config of a checkpoint that is a bare weights file."""
    path = Path(spec)
    weights = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    inside = path.is_dir() and any(p.suffix in weights for p in path.iterdir())
    if path.suffix in weights or (inside and not (path / "config.json").exists()):
        raise ValueError(
            f"{spec} has no config.json, and weights are not opened here: "
            f"`python checkpoint.py inspect {shlex.quote(spec)}` prints its config"
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
    add("--lora-targets", nargs="+", metavar="NAME", help="as train.py's; default: all it adapts")
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


def check_given(args: Namespace, cli: ModuleType) -> None:
    """ValueError for flags of which nothing would come."""
    if args.params is not None:
        of_config = args.given - {"params", "gpu", "debug"}
        cli.check_unused(args, sorted(of_config), "with --config, not with --params")
    answers = [name for name in ("json", "explain", "fits") if name in args.given]
    if len(answers) > 1:
        raise ValueError(f"{' and '.join(map(cli.flag_of, answers))} are two answers: give one")
    if answers:
        cli.check_unused(args, ("price",), f"with the summary, not with --{answers[0]}")
    if args.shard > 1:
        cli.check_unused(args, ("explain", "fits"), "with one GPU, not with --shard")
        cli.check_unused(args, ("tokens", "mfu", "price"), "with training, not with --shard")


def read_setup(args: Namespace) -> Setup:
    """The flags that say how a model is run; ValueError where they contradict each other."""
    if args.fsdp and "zero" in args.given and args.zero != 3:
        raise ValueError(f"--fsdp is ZeRO stage 3 and contradicts --zero {args.zero}")
    given = vars(args) | {"fused": not args.foreach, "zero": 3 if args.fsdp else args.zero}
    given |= {"lora_targets": args.lora_targets and tuple(args.lora_targets)}
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
    check_given(args, cli)
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

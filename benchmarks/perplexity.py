"""eval.py beside transformers' own model on one GPU: tokens a second, seconds of the whole job.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 10_000_000
    python benchmarks/perplexity.py --data /dev/shm/bench.npy --work /dev/shm --out results.json
    python benchmarks/perplexity.py … --models 7b --peers compiled     # a part; the others are kept
    python benchmarks/perplexity.py … --small                          # a CPU's rehearsal

Random weights in bfloat16 (random_weights.py), a Hugging Face directory that both sides load. Ours
is the real command, `eval.py`, its data loading and checkpoint included. The peer is
AutoModelForCausalLM with sdpa, whose logits go to cross-entropy in float32, on batches that already
lie on the GPU: eager; compiled, the usual way (`model = torch.compile(model)`); and fused, the best
way known to us (model and loss compiled as one function, so that float32 logits are never written).

Both sides score the same windows, for a minute or more each, since cards slow down under load, and
begin with empty caches of their compilers (--keep-caches: as the run before left them). A job's
seconds are those of the process, from its launch; without compiling, less the first batches, which
compile. The mean loss is printed for both. Tokens beyond a preset's vocabulary are wrapped around,
and a shard that is too short is repeated: that changes the loss, not the work.

Before and after each side the model's matrix products run alone for --ceiling seconds (ceiling.py).
The share of the matrix rate is a loop's model FLOPs a second, causal attention counted, over the
mean of the two; beside it the clock, power and temperature of either.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks import random_weights  # noqa: E402
from benchmarks.ceiling import Ceiling, Clocks  # noqa: E402
from config import GPTConfig, load_config  # noqa: E402
from costs.flops import estimate_flops  # noqa: E402


class Case(NamedTuple):
    """What is scored: whole batches, and that of the rehearsal."""

    batch: int
    window: int
    batches: int

    @property
    def tokens(self) -> int:
        return self.batch * self.window * self.batches


CASES = {  # a minute or more on an H100
    "gpt2": Case(32, 1024, 3051),  # 100M tokens
    "gpt2-xl": Case(32, 1024, 336),
    "7b": Case(4, 4096, 171),
}
SMALL = Case(2, 64, 6)
PEERS = ("eager", "compiled", "fused")


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="a shard of GPT-2 tokens")
    p.add_argument("--work", type=Path, required=True, help="for checkpoints: 14 GB for the 7B")
    p.add_argument("--out", type=Path, required=True, help="JSON; what is there is kept")
    p.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="beside which peers")
    p.add_argument("--ceiling", type=float, default=5.0, help="seconds of products alone")
    p.add_argument("--keep-caches", action="store_true", help="of compilers, from the run before")
    p.add_argument("--small", action="store_true", help="tiny models")
    p.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # the script calling itself
    args = p.parse_args(argv)
    if args.peer:
        print(json.dumps(measure_peer(args)))
        return
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report["machine"] = machine()
    for name in args.models:
        start = time.perf_counter()
        save_random(name, args.work, args.small)
        write_shard(name, args)
        print(f"{name}: made in {time.perf_counter() - start:.1f} s", flush=True)
        rows: dict[str, dict] = {}
        for label, row in measured(name, args):
            rows[label] = row
            row |= speed_ups(rows["eval.py"], row)
            report[name] = report.get(name, {}) | rows
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # if the next one fails
            print(f"  {label}: {row['wall_seconds']:.1f} s", flush=True)
        print_table(name, rows)


def measured(name: str, args):
    """(label, row) of each side of a model, in turn, between products alone."""
    config, case = shape_of(name, args.small), case_of(name, args.small)
    flops = estimate_flops(config, case.batch * case.batches, case.window)["forward_causal"]
    sides: dict[str, list[str]] = {"eval.py": ours(name, args)}
    sides |= {f"transformers {kind}": theirs(name, args, kind) for kind in args.peers}
    with Ceiling(config, case.batch * case.window) as ceiling, Clocks() as clocks:

        def products() -> dict[str, Any]:
            start = time.time()
            rate = ceiling.flops_per_second(args.ceiling)
            return {"flops_per_second": rate} | clocks.during(start, time.time())

        before = products()
        for label, command in sides.items():
            start = time.time()
            row = run(command, caches(args, label), told if label == "eval.py" else answered)
            row["clocks"] = clocks.during(start, time.time())
            after = products()
            row["products"] = [before, after]
            if "loop_seconds" in row:
                ceilings = (before["flops_per_second"] + after["flops_per_second"]) / 2
                row["share_of_matrix_rate"] = flops / row["loop_seconds"] / ceilings
            before = after
            yield label, row


def run(command: list[str], env: dict[str, str], read: Callable[[str], dict]) -> dict[str, Any]:
    """What a process answered, and its seconds from launch to end."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    wall = time.perf_counter() - start
    row = {"error": done.stderr[-2000:]} if done.returncode else read(done.stdout)
    row["wall_seconds"] = wall
    if "compile_seconds" in row:
        row["wall_seconds_without_compiling"] = wall - row["compile_seconds"]
    return row


def caches(args, label: str) -> dict[str, str]:
    """Where the compilers of one side keep what they make."""
    place = args.work / "bench-caches" / label.replace(" ", "-")
    if not args.keep_caches:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
    }


# ---------------------------------------------------------------------------------------------
# What both load


def case_of(name: str, small: bool) -> Case:
    return SMALL if small else CASES[name]


def shape_of(name: str, small: bool) -> GPTConfig:
    config = load_config(name).replace(dropout=0.0)
    if not small:
        return config
    heads = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 16}
    return config.replace(n_layers=2, d_model=64, d_ff=128, **heads)


def folder(name: str, work: Path, small: bool) -> Path:
    return work / f"random-{name}{'-small' if small else ''}"


def save_random(name: str, work: Path, small: bool = False) -> Path:
    """The checkpoint of a preset, made if it is not there."""
    place = folder(name, work, small)
    if not random_weights.is_written(place):
        random_weights.write(shape_of(name, small), place)
    return place


def shard_of(name: str, args) -> Path:
    return args.work / f"bench-{name}{'-small' if args.small else ''}.npy"


def write_shard(name: str, args) -> None:
    """The tokens that a model scores, and one more, each in its vocabulary."""
    case, vocab_size = case_of(name, args.small), load_config(name).vocab_size
    tokens = np.resize(np.load(args.data, mmap_mode="r")[: case.tokens + 1], case.tokens + 1)
    np.save(shard_of(name, args), (tokens % vocab_size).astype(np.uint16))


# ---------------------------------------------------------------------------------------------
# Ours


def ours(name: str, args) -> list[str]:
    case = case_of(name, args.small)
    command = [sys.executable, str(ROOT / "eval.py")]
    command += ["--checkpoint-path", str(folder(name, args.work, args.small))]
    command += ["--data-mode", "fineweb_npy", "--val-npy", str(shard_of(name, args))]
    command += ["--seq-len", str(case.window), "--batch-size", str(case.batch)]
    command += ["--max-tokens", str(case.tokens + 1)]
    command += ["--results-dir", str(args.work / "bench-results" / str(time.time_ns()))]
    return [*command, *(["--device", "cpu"] if args.small else [])]


def told(printed: str) -> dict[str, Any]:
    """Of the record whose path eval.py printed."""
    lines = [line for line in printed.splitlines() if line.startswith("record: ")]
    record_path = Path(lines[0].removeprefix("record: "))
    record = json.loads(record_path.read_text())
    cost, arrays = record["cost"], np.load(record_path.with_suffix(".npz"))
    return {
        "tokens": record["data"]["tokens_scored"],
        "tokens_per_second": cost["tokens_per_second"],
        "loop_seconds": cost["seconds"],
        "loss": arrays["nll"].sum() / arrays["count"].sum(),
        "peak_GiB": (cost["peak_memory_bytes"] or 0) / 2**30,
        "mfu": cost["mfu"],
        "load_seconds": cost["load_seconds"],
        "compile_seconds": cost["warm_up_seconds"],
        "compiled": record["protocol"]["compiled"],
    }


# ---------------------------------------------------------------------------------------------
# Theirs


def theirs(name: str, args, kind: str) -> list[str]:
    command = [sys.executable, __file__, "--data", str(args.data), "--work", str(args.work)]
    command += ["--out", str(args.out), "--models", name, "--peer", kind]
    return [*command, *(["--small"] if args.small else [])]


def answered(printed: str) -> dict[str, Any]:
    return json.loads(printed.splitlines()[-1])


def measure_peer(args) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    name, device = args.models[0], "cpu" if args.small else "cuda"
    case = case_of(name, args.small)
    stream = torch.from_numpy(np.load(shard_of(name, args))).to(device).long()
    inputs, targets = (
        part.view(case.batches, case.batch, case.window) for part in (stream[:-1], stream[1:])
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder(name, args.work, args.small),
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map=device,
    ).eval()
    loaded = time.perf_counter() - start

    def loss(ids, wanted):
        logits = model(ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    if args.peer == "compiled":
        model = torch.compile(model)
    if args.peer == "fused":
        loss = torch.compile(loss)
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(2):  # what is compiled once more, when it is called again, is so by now
            loss(inputs[0], targets[0])
        synchronize()
        compiled = time.perf_counter() - start
        start = time.perf_counter()
        losses = [loss(x, y) for x, y in zip(inputs, targets, strict=True)]
        synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - stream.nbytes if device == "cuda" else 0  # a model's
    return {
        "tokens": case.tokens,
        "tokens_per_second": case.tokens / seconds,
        "loop_seconds": seconds,
        "loss": float(torch.stack(losses).double().mean()),
        "peak_GiB": peak / 2**30,
        "load_seconds": loaded,
        "compile_seconds": compiled,
    }


# ---------------------------------------------------------------------------------------------
# The table


def machine() -> dict:
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def speed_ups(mine: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """How often as fast as a side ours is, by each of the seconds."""
    if "error" in mine or "error" in row:
        return {}
    names = "loop_seconds", "wall_seconds", "wall_seconds_without_compiling"
    return {"speed_up": {name: row[name] / mine[name] for name in names}}


def print_table(name: str, rows: dict[str, dict]) -> None:
    print(f"\n{name}")
    for label, row in rows.items():
        if "error" in row:
            print(f"  {label:<22} {row['error'][-600:]}")
            continue
        ups = ", ".join(f"{ratio:.2f}x {what}" for what, ratio in row.get("speed_up", {}).items())
        print(
            f"  {label:<22} {row['tokens_per_second']:>11,.0f} tokens/s for"
            f" {row['loop_seconds']:.1f} s  {row['peak_GiB']:.2f} GiB  loss {row['loss']:.5f}"
            f"  job {row['wall_seconds']:.1f} s, {row['compile_seconds']:.1f} of it compiling"
            f"\n{'':25}{row['share_of_matrix_rate']:.1%} of the matrix rate"
            f"  clocks {json.dumps(row['clocks'])}  products {json.dumps(row['products'])}"
            f"\n{'':25}eval.py over it: {ups}",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)

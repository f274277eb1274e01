"""Is scoring faster compiled? Eager and compiled blocks in turns, on one model of random weights.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json    # four minutes of a GPU
    python benchmarks/compiled.py --models 7b --out …
    python benchmarks/compiled.py --small --out …                            # a CPU's rehearsal

eval.py's pass over a batch, from token ids to nats, without data and records. Each side twice for
half of --seconds, in turns, so that a card that grows hot meets both. Beside the rates: seconds of
the first two passes, in which a compiler compiles and Triton loads its kernels, the seconds that
the host took to launch a pass, and the mean loss.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import cli  # noqa: E402
from backends import scoring  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402
from config import load_config  # noqa: E402
from model import GPTModel  # noqa: E402

BATCHES = {"gpt2": (32, 1024), "gpt2-xl": (16, 1024), "7b": (4, 4096)}
BATCHES |= {"qwen3-8b": (4, 2048), "gemma-3-4b": (4, 2048), "olmo-2-7b": (4, 2048)}
SIDES = {"eager": False, "compiled": True}


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    p.add_argument("--seconds", type=float, default=6.0, help="of each side")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--small", action="store_true", help="two narrow layers, on a CPU")
    args = p.parse_args(argv)
    report: dict[str, Any] = {"machine": machine()}
    for name in args.models:
        report[name] = measure(name, args)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        for side, row in report[name].items():
            print(f"{name:<10} {side:<9} {json.dumps(row)}", flush=True)


@torch.no_grad()
def measure(name: str, args) -> dict[str, dict[str, Any]]:
    """{side: its row}"""
    config, device = load_config(name).replace(dropout=0.0), "cpu" if args.small else "cuda"
    (B, T), dtype = BATCHES[name], torch.bfloat16
    if args.small:
        narrow = {"n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "d_model": 64, "d_ff": 128}
        config, (B, T) = config.replace(n_layers=2, **narrow), (2, 64)
    model = GPTModel.on_meta(config)
    model.allocate(dtype, device)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.02)
    model.for_inference(dtype)
    ids = torch.randint(config.vocab_size, (B, T), device=device)
    rows: dict[str, dict[str, Any]] = {side: {"rates": []} for side in SIDES}
    for turn in range(2):
        for side, compiled in SIDES.items():
            nll, row = scoring.nll_function(model, compiled), rows[side]
            seconds = timed(lambda: (nll(ids, ids), nll(ids, ids)))  # noqa: B023
            if turn == 0:
                row["first_two_seconds"] = seconds
                row["loss"] = float(nll(ids, ids).double().mean())
                synchronize()
                start = time.perf_counter()
                nll(ids, ids)
                row["host_seconds"] = time.perf_counter() - start
            passes, spent = 0, 0.0
            while spent < args.seconds / 2:
                spent += timed(lambda: [nll(ids, ids) for _ in range(4)])  # noqa: B023
                passes += 4
            row["rates"].append(passes * B * T / spent)
    for row in rows.values():
        row["tokens_per_second"] = statistics.mean(row["rates"])
    return rows


def timed(work) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli.run(main)

"""What a sweep's checkpoints cost beyond their scoring: wall seconds from one record to the next.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 10_000_001
    python benchmarks/sweep.py --data /dev/shm/bench.npy --work /dev/shm --checkpoints 50 \\
        --out benchmarks/results/sweep.json
    python benchmarks/sweep.py … --small          # a CPU's rehearsal, on a tiny model

The real command, sweep.py, over checkpoints of a 124M GPT-2 with random weights (250 MB each), one
evaluation of --tokens tokens. Pure scoring is the record's `cost.seconds`, eval.py's loop over its
windows; the wall seconds of a checkpoint are those between its record and the one before, so the
first one's, which are those of start, tokens and compiler too, stand alone. A second sweep over the
same checkpoints, into other results, tells what a start costs once the compiler's cache is there.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks import random_weights  # noqa: E402
from benchmarks.start import machine  # noqa: E402
from config import load_config  # noqa: E402
from results import load_records  # noqa: E402


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="a shard of GPT-2 tokens")
    p.add_argument("--work", type=Path, required=True, help="for checkpoints: 250 MB each")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--checkpoints", type=cli.positive_int, default=50)
    p.add_argument("--tokens", type=cli.positive_int, default=10_000_000)
    p.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    p.add_argument("--again", type=int, default=2, help="checkpoints of the second sweep; 0: none")
    p.add_argument("--small", action="store_true", help="a tiny model")
    args = p.parse_args(argv)
    make_checkpoints(args)
    report = {"machine": machine(), "tokens": args.tokens}
    for name, n in (("first", args.checkpoints), ("again", args.again)):
        if n:
            report[name] = swept(args, n)
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # if the next one fails
            print(name, json.dumps(report[name]), flush=True)


def make_checkpoints(args) -> None:
    """Of random weights, each of its own."""
    config = load_config("gpt2").replace(dropout=0.0)
    if args.small:
        config = config.replace(n_layers=2, d_model=64, n_heads=2, n_kv_heads=2, d_ff=128)
    for step, folder in enumerate(folders(args, args.checkpoints), start=1):
        if not random_weights.is_written(Path(folder)):
            random_weights.write(config, Path(folder), seed=step)


def swept(args, n: int) -> dict[str, Any]:
    """Seconds of a sweep over the first n checkpoints, into results of its own."""
    results = args.work / f"swept-results-{time.time_ns()}"
    yaml = args.work / "sweep.yaml"
    yaml.write_text(
        f"perplexity: {{data-mode: fineweb_npy, val-npy: {args.data}, seq-len: 1024, "
        f"batch-size: 32, max-tokens: {args.tokens}, compile: {args.compile}}}\n"
    )
    command = [sys.executable, "sweep.py", "--checkpoint-path", *folders(args, n)]
    command += ["--evaluations", str(yaml), "--results-dir", str(results)]
    command += ["--tokenizer-name", "gpt2", *(["--device", "cpu"] if args.small else [])]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    ended = time.time() - start
    records = sorted(load_records(results), key=lambda record: record["checkpoint"]["step"])
    assert len(records) == n, (len(records), n)
    saved = [os.stat(record["_path"]).st_mtime - start for record in records]
    costs = [record["cost"] for record in records]
    return {
        "checkpoints": n,
        "wall_seconds": ended,
        "first_record_seconds": saved[0],
        "compiled": records[0]["protocol"]["compiled"],
    } | beyond_scoring(saved, costs)


def beyond_scoring(saved: list[float], costs: list[dict]) -> dict[str, Any]:
    """Medians over all checkpoints but the first. saved: when each record was there."""
    walls = [after - before for before, after in itertools.pairwise(saved)]
    if not walls:
        return {}
    medians = {
        name: statistics.median(cost[name] for cost in costs[1:])
        for name in ("seconds", "load_seconds", "warm_up_seconds", "tokens_per_second")
    }
    wall = statistics.median(walls)
    return medians | {
        "wall_seconds_of_one": wall,
        "beyond_scoring": wall / medians["seconds"] - 1,
        "walls": [round(seconds, 3) for seconds in walls],
    }


def folders(args, n: int) -> list[str]:
    small = "-small" if args.small else ""
    return [str(args.work / f"swept{small}" / f"checkpoint-{step}") for step in range(1, n + 1)]


if __name__ == "__main__":
    cli.run(main)

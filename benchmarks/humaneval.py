"""humaneval_eval.py from launch to table with a 7B Llama shape: drawing and judging side by side.

    python benchmarks/humaneval.py --problems HumanEval.jsonl.gz --tokenizer DIR --work /dev/shm \
        --out benchmarks/results/humaneval.json          # 3 minutes of one GPU at --samples 20

Random weights in bfloat16 with GPT-2's vocabulary as a Hugging Face directory, temperature 0.8,
top-p 0.95, `--new-tokens` a sample: such a model says stop strings seldom, so that nearly all have
all of them. Its programs are not Python: judging them costs a process's start, and no test passes.
The share of the limit is that of the seconds of drawing, as in generation.py.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from mmlu import timed  # noqa: E402

import cli  # noqa: E402
from config import load_config  # noqa: E402

VOCABULARY, CONTEXT = 50257, 2048


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--problems", type=Path, required=True)
    p.add_argument("--tokenizer", type=Path, required=True, help="GPT-2's vocab.json, merges.txt")
    p.add_argument("--work", type=Path, required=True, help="a place with 14 GB, of memory say")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--samples", type=int, nargs="+", default=[20], help="of each problem")
    p.add_argument("--limit", type=int, help="the first so many problems")
    p.add_argument("--new-tokens", type=int, default=256)
    p.add_argument("--rows", type=int, default=200, help="drawn at a time")
    p.add_argument("--small", action="store_true", help="a tiny model, for a CPU's rehearsal")
    args = p.parse_args(argv)
    config = load_config("7b").replace(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    if args.small:
        config = config.replace(n_layers=2, d_model=64, d_ff=96, n_heads=4, head_dim=16)
    model = args.work / "humaneval-7b"
    written = time.perf_counter()
    make(config, model)
    report = {"written_s": time.perf_counter() - written, "new_tokens": args.new_tokens, "runs": []}
    for samples in args.samples:
        report["runs"].append(run(args, model, samples))
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        limits(report, config, args.rows)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def make(config, place: Path) -> None:
    from benchmarks import random_weights

    random_weights.make_room(place.parent, random_weights.n_bytes(config))
    if not random_weights.is_written(place):
        random_weights.write(config, place)


def run(args, model: Path, samples: int) -> dict:
    results = args.work / f"humaneval-results-{time.time_ns()}"
    command = [sys.executable, "humaneval_eval.py", "--checkpoint-path", model, "--k", 1]
    command += ["--data-path", args.problems.resolve(), "--num-samples", samples]
    command += ["--tokenizer-name", args.tokenizer.resolve(), "--temperature", 0.8]
    command += ["--max-new-tokens", args.new_tokens, "--results-dir", results]
    command += ["--batch-size", args.rows]
    command += ["--limit", args.limit] if args.limit else []
    seconds, text = timed(command)
    (path,) = results.glob("*/*/humaneval-*.json")
    record = json.loads(path.read_text())
    print(text[-1200:], f"\n{seconds:.1f} s from launch to table", flush=True)
    found = {"samples": samples, "problems": record["data"]["tasks"], "wall_s": seconds}
    return found | {"cost": record["cost"], "finish": record["breakdown"]["finish"]}


def limits(report, config, rows: int) -> None:
    """The least seconds of drawing, of samples as long as the mean."""
    from benchmarks import cases
    from benchmarks.generation import Limits, Size

    size = Size(False, *cases.measured_limits())
    report["limits"] = {"bytes_per_s": size.bandwidth, "flop_per_s": size.rate}
    for one in report["runs"]:
        n = one["samples"] * one["problems"]
        lengths = np.full(n, one["cost"]["tokens"] / n)
        memory, both = Limits(config, size).seconds(rows, 1, lengths)
        one["share_of_limit"] = memory / one["cost"]["draw_seconds"]
        one["limit_s"], one["limit_with_arithmetic_s"] = memory, both
        print(f"{one['samples']} samples: {one['share_of_limit']:.1%} of the limit of {rows} rows")


if __name__ == "__main__":
    cli.run(main)

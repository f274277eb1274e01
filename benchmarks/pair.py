"""Two checkouts of roseval beside each other in one run: is the other one faster?

    git worktree add /tmp/before v1        # or any folder with an earlier tree
    python benchmarks/pair.py --before /tmp/before --data /dev/shm/bench.npy --mmlu data/mmlu \\
        --work /dev/shm --out benchmarks/results/pair.json

The same commands in both trees, turn by turn, so that a card that warms up or a busy neighbour
meets both: eval.py on a shard, mmlu_eval.py on all questions (5-shot), humaneval_eval.py drawing
(judging left out of its figure), on one GPT-2 124M of random weights; `--small` rehearses on a CPU.
Rates are the records' own, seconds are of the whole process. Medians, and after over before.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--before", type=Path, required=True, help="the other checkout")
    p.add_argument("--data", type=Path, required=True, help="a shard of GPT-2 tokens")
    p.add_argument("--mmlu", type=Path, help="MMLU in its original layout")
    p.add_argument("--problems", type=Path, help="HumanEval.jsonl.gz")
    p.add_argument("--work", type=Path, required=True, help="for the checkpoint and records")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument(
        "--tokens", type=cli.positive_int, default=50_000_000, help="that eval.py scores"
    )
    p.add_argument("--repeat", type=cli.positive_int, default=3)
    p.add_argument("--small", action="store_true", help="a tiny model: does every case run?")
    args = p.parse_args(argv)
    saved = save_model(args.work / "pair-model", args.small)
    report = {"machine": machine(), "cases": {}}
    for name, command in commands(args, saved).items():
        runs = {"before": [], "after": []}
        for turn in range(args.repeat):
            order = ("before", "after") if turn % 2 == 0 else ("after", "before")
            for side in order:
                tree = args.before if side == "before" else ROOT
                runs[side].append(run(tree, command, args.work / f"pair-{side}-{len(runs[side])}"))
                print(f"{name:<12} {side:<7} {runs[side][-1]}", flush=True)
        report["cases"][name] = summary(runs)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, case in report["cases"].items():
        print(
            f"{name:<12} {case['before']['tokens_per_second']:>12,.0f} -> "
            f"{case['after']['tokens_per_second']:>12,.0f} tokens/s ({case['rate_ratio']:.3f}), "
            f"{case['before']['wall_seconds']:.1f} -> {case['after']['wall_seconds']:.1f} s"
        )


def save_model(directory: Path, small: bool) -> Path:
    """A Hugging Face directory of random bfloat16 weights that both trees read."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if not directory.exists():
        torch.manual_seed(0)
        shape = {"n_layer": 2, "n_embd": 64, "n_head": 2} if small else {}
        model = GPT2LMHeadModel(GPT2Config(n_positions=4096, **shape))
        model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def commands(args, saved: Path) -> dict[str, list[str]]:
    common = ["--checkpoint-path", saved, "--tokenizer-name", "gpt2"]
    shard = ["--data-mode", "fineweb_npy", "--val-npy", args.data, "--max-tokens", args.tokens]
    found = {"perplexity": ["eval.py", *common, *shard, "--seq-len", "1024", "--batch-size", "32"]}
    if args.mmlu:
        found["mmlu"] = ["mmlu_eval.py", *common, "--data-path", args.mmlu, "--num-few-shot", "5"]
        if args.small:
            found["mmlu"] += ["--limit", "1"]
    if args.problems:
        few = (
            ["--limit", "4", "--max-new-tokens", "16"]
            if args.small
            else ["--max-new-tokens", "256"]
        )
        found["generation"] = ["humaneval_eval.py", *common, "--data-path", args.problems]
        found["generation"] += ["--num-samples", "10", "--temperature", "0.8", *few]
    return {name: [str(word) for word in words] for name, words in found.items()}


def run(tree: Path, command: list[str], results: Path) -> dict:
    """{wall_seconds, seconds, tokens_per_second} of one process."""
    subprocess.run(["rm", "-rf", str(results)], check=True)
    words = [sys.executable, str(tree / command[0]), *command[1:], "--results-dir", str(results)]
    start = time.perf_counter()
    out = subprocess.run(words, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if out.returncode:
        raise ValueError(f"{tree / command[0]} failed: {out.stderr[-500:]}")
    (record,) = (json.loads(path.read_text()) for path in results.rglob("*.json"))
    cost = record["cost"]
    return {
        "wall_seconds": round(wall, 2),
        "seconds": round(cost.get("draw_seconds", cost["seconds"]), 3),
        "tokens_per_second": round(cost["tokens_per_second"], 1),
        "value": next(iter(record["metrics"].values()))["value"],
    }


def summary(runs: dict) -> dict:
    found = {
        side: {name: statistics.median(r[name] for r in listed) for name in listed[0]}
        for side, listed in runs.items()
    }
    rates = [found[side]["tokens_per_second"] for side in ("before", "after")]
    return found | {"rate_ratio": rates[1] / rates[0], "runs": runs}


if __name__ == "__main__":
    cli.run(main)

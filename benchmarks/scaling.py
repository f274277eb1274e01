"""The same bits on 1, 2, 4 and 8 GPUs of one host, and how much faster so many are.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 5_000_000
    python benchmarks/scaling.py --data /dev/shm/bench.npy --mmlu data/mmlu \\
        --problems data/HumanEval.jsonl.gz --tokenizer gpt2 --work /dev/shm --out scaling.json
    python benchmarks/scaling.py … --small --ranks 1 4 8      # a CPU's rehearsal, on gloo
    python benchmarks/scaling.py --plan --mmlu data/mmlu --tokenizer gpt2   # no model is run

The commands that users type, on random weights in bfloat16: eval.py, mmlu_eval.py (5-shot, all
questions) and humaneval_eval.py of the 7B shape, the same three on GPT-2 124M, and train.py on
124M, whose tokens a second are the median of its log's. Each case runs on every number of ranks;
arrays and metrics of its records are compared to the last bit with those of the first number. The
efficiency is the rate over that of one rank times their number; wall seconds, from launch to exit,
stand beside. `--plan` deals the real batches of MMLU to many ranks without a GPU and tells the
share of the work that the fullest rank does not wait for.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402
from benchmarks.training import rate_of, train_command  # noqa: E402

PLANNED = (1, 2, 4, 8, 16, 64)
WANTED = {"perplexity 7b": 0.95, "mmlu 7b": 0.85, "generation 7b": 0.9, "training gpt2": 0.9}


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, help="a shard of GPT-2 tokens")
    p.add_argument("--mmlu", type=Path, required=True, help="MMLU in its original layout")
    p.add_argument("--problems", type=Path, help="HumanEval.jsonl.gz")
    p.add_argument("--tokenizer", required=True, help="gpt2, or a directory that holds it")
    p.add_argument("--work", type=Path, help="for models and records: 15 GB for the 7B")
    p.add_argument("--out", type=Path, help="JSON; cases that are there already are kept")
    p.add_argument("--ranks", type=cli.positive_int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--cases", nargs="+", help="of these only: perplexity, mmlu, …")
    p.add_argument("--models", nargs="+", default=["7b", "gpt2"])
    p.add_argument("--small", action="store_true", help="a tiny model and little work")
    p.add_argument("--plan", action="store_true", help="how evenly MMLU's batches are dealt")
    args = p.parse_args(argv)
    if args.plan:
        return print_plan(args)
    missing = [f"--{name}" for name in ("data", "problems", "work", "out") if not vars(args)[name]]
    if missing:
        p.error(f"{', '.join(missing)} is needed to run the cases")
    report = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    report["machine"] = machine() | {"date": time.strftime("%Y-%m-%d")}
    for name, measure in cases(args):
        runs = report["cases"].setdefault(name, {})
        for ranks in args.ranks:
            runs[str(ranks)] = measure(ranks)
            print(f"{name:<16} {ranks} ranks: {runs[str(ranks)]}", flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # nothing is lost
    print_table(report["cases"])


# ---------------------------------------------------------------------------------------------
# Cases


def cases(args) -> Iterator[tuple]:
    """(name, function of the number of ranks) of every case that was asked for."""
    for model in args.models:
        saved = args.work / f"scaling-{model}"
        for name, words in evaluations(args, model).items():
            if args.cases and name not in args.cases:
                continue
            if not saved.exists():
                make_model("nano" if args.small else model, saved)
            words = [*words, "--checkpoint-path", saved, "--tokenizer-name", args.tokenizer]
            yield f"{name} {model}", Compared(words, args.work / f"{name}-{model}-results")
    if "gpt2" in args.models and (not args.cases or "training" in args.cases):
        yield "training gpt2", lambda ranks: train(args, ranks)


def evaluations(args, model: str) -> dict[str, list]:
    large = model == "7b"
    window, tokens = (4096, 3_600_000) if large else (1024, 4_000_000)
    samples, tasks, new = (200, 24, 128) if large else (20, 24, 128)
    few: list = []
    if args.small:
        window, tokens, samples, tasks, new, few = 256, 20_000, 2, 9, 8, ["--limit", 2]
    shard = ["--data-mode", "fineweb_npy", "--val-npy", args.data, "--max-tokens", tokens]
    draw = ["--num-samples", samples, "--temperature", 0.8, "--max-new-tokens", new]
    draw += ["--limit", tasks, "--compile", "off", "--k", 1]
    return {
        "perplexity": ["eval.py", *shard, "--seq-len", window, "--batch-size", 4],
        "mmlu": ["mmlu_eval.py", "--data-path", args.mmlu, "--num-few-shot", 5, *few],
        "generation": ["humaneval_eval.py", "--data-path", args.problems, *draw],
    }


class Compared:
    """A command on any number of ranks, whose records are compared with those of its first run."""

    def __init__(self, words: list, results: Path):
        self.words, self.results, self.first = list(map(str, words)), results, None

    def __call__(self, ranks: int) -> dict:
        folder = self.results / f"{ranks}-{time.time_ns()}"
        start = time.perf_counter()
        launch([ROOT / self.words[0], *self.words[1:], "--results-dir", folder], ranks)
        wall = time.perf_counter() - start
        (path,) = folder.glob("*/*/*-*.json")
        record = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as file:
            bits = {name: file[name].tobytes() for name in file.files}
        bits |= {name: metric["value"] for name, metric in record["metrics"].items()}
        self.first = self.first or bits
        cost = record["cost"]
        seconds = cost.get("draw_seconds", cost["seconds"])
        return {
            "same_bits": bits == self.first,
            "compared": len(bits),
            "tokens_per_second": round(cost["tokens_per_second"], 1),
            "seconds": round(seconds, 3),
            "wall_seconds": round(wall, 1),
            "mfu": cost["mfu"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
        }


def train(args, ranks: int) -> dict:
    command = train_command(args.data, args.work, 100, "nobias")
    command[-1] += f"-{time.time_ns()}"  # the directory of its checkpoints
    if args.small:  # a later flag takes the place of an earlier one
        command += ["--n-layers", "1", "--d-model", "32", "--n-heads", "2", "--d-ff", "64"]
        command += ["--batch-size", "1", "--seq-len", "16"]
    return rate_of([*torchrun(ranks), *map(str, command[1:])])


def make_model(preset: str, saved: Path) -> None:
    """Random weights with GPT-2's vocabulary, by a process that gives its memory back."""
    words = ["--make", preset, "--result", saved, "--data", ".", "--tokenizer", "."]
    command = [sys.executable, ROOT / "benchmarks" / "mmlu.py", *words]
    subprocess.run(list(map(str, command)), check=True)


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]


def launch(words: list, ranks: int) -> None:
    done = subprocess.run([*torchrun(ranks), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{words[0]} on {ranks} ranks failed: {done.stderr[-1500:]}")


def print_table(found: dict) -> None:
    print(f"\n{'case':<18}{'ranks':>6}{'tokens/s':>14}{'efficiency':>12}{'wanted at 8':>13}  bits")
    for name, runs in found.items():
        base = min(runs, key=int)
        for ranks, run in sorted(runs.items(), key=lambda item: int(item[0])):
            rate, first = run.get("tokens_per_second"), runs[base].get("tokens_per_second")
            share = rate * int(base) / (first * int(ranks)) if rate and first else float("nan")
            bits = {True: "same", False: "DIFFER", None: "–"}[run.get("same_bits")]
            wanted = WANTED.get(name, "–")
            print(f"{name:<18}{ranks:>6}{rate or 0:>14,.0f}{share:>12.3f}{wanted:>13}  {bits}")


# ---------------------------------------------------------------------------------------------
# How evenly the work is dealt


def print_plan(args) -> None:
    """Of MMLU, 5-shot, the whole test set: strips of each model, and the balance on many ranks."""
    import torch

    from backends import BATCH_TOKENS, Facts, engine
    from backends.continuations import deal_batches
    from backends.local import batch_overhead
    from backends.strips import plan_strips
    from config import load_config
    from mmlu_eval import MMLU
    from model import GPTModel
    from tokenizer import build_tokenizer

    tokenizer = build_tokenizer(args.tokenizer)
    facts = Facts("planned", tokenizer.vocab_size, 4096, "bfloat16", "cuda", tokenizer)
    options = MMLU.Options(data_path=str(args.mmlu), num_few_shot=5)
    (options,) = MMLU.variants(options)
    rows = MMLU.plan(options, facts).work.prepared[0].rows
    print(f"{'':<22}{'units':>7}" + "".join(f"{n:>8}" for n in PLANNED) + "  ranks")
    for name in ("gpt2", "7b"):
        model = GPTModel.on_meta(load_config(name))
        overhead = batch_overhead(model, torch.device("cuda"))
        batches = plan_strips(rows, BATCH_TOKENS["cuda"], None, overhead)
        shares = []
        for n in PLANNED:
            costs = [run_cost(rows, batches, run) for run in deal_batches(rows, batches, n)]
            alone = run_cost(rows, batches, range(len(batches)))
            shares.append(alone / (n * max(costs)))
        line(f"mmlu {name}", len(batches), shares)
    units = engine.plan_units(164, 200, 256)
    dealt = [[sum(map(len, units[rank::n])) for rank in range(n)] for n in PLANNED]
    line("humaneval, n = 200", len(units), [164 / (n * max(d)) for n, d in zip(PLANNED, dealt)])


def run_cost(rows, batches, run) -> int:
    """Tokens of a contiguous run of strips, the prefixes of each section that it meets once."""
    total, prefix = 0, None
    for i in run:
        batch = batches[i]
        if batch.prefix != prefix:
            prefix = batch.prefix
            total += batch.before(rows) + batch.overhead
        total += batch.tokens + batch.overhead
    return total


def line(name: str, units: int, shares: list[float]) -> None:
    print(f"{name:<22}{units:>7}" + "".join(f"{share:>8.1%}" for share in shares))


if __name__ == "__main__":
    cli.run(main)

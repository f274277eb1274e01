"""Samples of programs for problems with tests: read from files, judged, counted.

    from tasks.programs import judge_file
    judge_file("S.jsonl", problems)             # prints pass@k, writes S.jsonl_results.jsonl

problems: tasks/problems.py's. No model is needed, whatever drew the samples; `humaneval_eval.py
--samples-file` is the command for it. Files are JSONL, gzipped or not: samples as OpenAI's
evaluate_functional_correctness or EvalPlus takes them, results as the former writes them, with the
sandbox's tier. What is wrong is named with its file and line. Where there are EvalPlus's tests
beside the base ones, a sample has two verdicts: one that passes the base tests is judged by those
too, and `plus_pass@k` counts what passes both. Source of the formats and of pass@k:
Chen et al., "Evaluating Large Language Models Trained on Code" (2021),
github.com/openai/human-eval.
"""

import ast
import json
import os
import queue
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cli
import durable
from cli import printable
from inputs import read_jsonl
from sandbox.judge import TIERS, Sandbox, Verdict
from tasks import evalplus
from tasks.problems import Problems, has_plus
from tasks.scores import PREFIX, Judged, all_ks, print_scores, summarise_all

# ---------------------------------------------------------------------------------------------
# How they are judged


@dataclass(frozen=True)
class JudgeOptions:
    """Flags, YAML keys and keywords of whoever judges programs. EvalPlus's tests are a thousand to
    a task, some of them large: the canonical solution of Mbpp/599 takes 21 s of a core, all others
    less than 5, so that a program has two minutes. One that never ends is late sooner, since a call
    has a limit too: the longest of a canonical solution takes 1.4 s."""

    workers: int | None = cli.option(
        None, "judges a rank (its share of cores)", type=cli.positive_int
    )
    judge_timeout: float | None = cli.option(
        None, "of a program (3; 120 with EvalPlus's tests)", type=float, metavar="SECONDS"
    )
    judge_call_timeout: float | None = cli.option(
        None, "of a call of it (none; 10 with EvalPlus's tests)", type=float, metavar="SECONDS"
    )
    judge_memory: int | None = cli.option(
        None, "of a program (1024; 4096 with EvalPlus's)", type=cli.positive_int, metavar="MB"
    )
    sandbox_tier: str | None = cli.option(None, "default: the best that works here", choices=TIERS)
    unsafe_no_sandbox: bool = cli.option(False, "if no sandbox works: none")

    def sandbox(self, problems: Problems) -> dict:
        """Of Sandbox, what these problems need."""
        usual = (120.0, 10.0, 4096) if has_plus(problems) else (3.0, None, 1024)
        given = self.judge_timeout, self.judge_call_timeout, self.judge_memory
        timeout, call, memory = (u if g is None else g for g, u in zip(given, usual))
        return {
            "timeout": timeout,
            "call_timeout": call,
            "memory_mb": memory,
            "tier": self.sandbox_tier,
            "unsafe": self.unsafe_no_sandbox,
        }

    def protocol(self, problems: Problems) -> dict:
        """What a record says of it."""
        used = self.sandbox(problems)
        call = used["call_timeout"]
        return {
            "judge_timeout": used["timeout"],
            **({} if call is None else {"judge_call_timeout": call}),
            "judge_memory_mb": used["memory_mb"],
            "sandbox_tier_asked": self.sandbox_tier,
            "unsafe_no_sandbox": self.unsafe_no_sandbox,
        }


# ---------------------------------------------------------------------------------------------
# Which problems can be judged


def split_off(problems: Problems, sandbox: Sandbox, dist: Any = None) -> tuple[Problems, dict]:
    """(the problems that can be judged here, {task_id: why not} of the others).

    Where a problem has a `canonical_solution`, it is judged: a problem whose own solution does not
    pass would count against every model. It may be broken, or hold what cannot cross to another
    process. A solution that is only late is no reason, lest a busy machine changed the score, and
    one that fails is looked at twice. dist: the ranks that share the work.
    """
    tests, broken = evalplus.suites(problems, sandbox, dist)
    problems = {task: p | tests.get(task, {}) for task, p in problems.items() if task not in broken}
    own = [task for task in problems if isinstance(problems[task].get("canonical_solution"), str)]
    own = dist.mine(own) if dist else own
    failing = {task: "" for task in own}
    for look in ("", "\n# once more\n"):
        asked = [(task, suite) for task in failing for suite in suites_of(problems[task])]
        programs = (own_program(problems[task], look, suite) for task, suite in asked)
        verdicts = dict(sandbox.judge_many(programs))
        failing = {
            task: verdicts[i].result
            for i, (task, _) in enumerate(asked)
            if not verdicts[i].passed and verdicts[i].kind != "timeout"
        }
    for part in dist.gather(failing) if dist else []:
        failing |= part
    left_out = broken | {task: failing[task] for task in problems if task in failing}
    kept = {task: problem for task, problem in problems.items() if task not in left_out}
    if not kept:
        task, why = next(iter(left_out.items()))
        raise ValueError(f"no task can be judged: their own solutions fail; {task}: {why}")
    return kept, left_out


def suites_of(problem: dict) -> list[str]:
    """base, and plus where there is such."""
    return [suite for suite, field in evalplus.SUITES.items() if field in problem]


def own_program(problem: dict, tail: str = "", suite: str = "base") -> tuple[str, str, str, str]:
    """The canonical solution as what Sandbox.judge takes."""
    return program_of(problem, {"completion": problem["canonical_solution"] + tail}, suite)


# ---------------------------------------------------------------------------------------------
# Samples


def read_samples(path: str | Path, problems: Problems) -> list[dict]:
    """OpenAI's {"task_id", "completion"} and EvalPlus's {"task_id", "solution"}, as they are."""
    samples = []
    for where, _, sample in read_jsonl(path, "file of samples"):
        task = sample.get("task_id")
        if not isinstance(task, str) or task not in problems:
            raise ValueError(f"{where}: task {task!r:.60} is not among the problems (--data-path)")
        if not isinstance(sample.get("solution", sample.get("completion")), str):
            raise ValueError(f"{where}: neither 'completion' nor 'solution' is there as text")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: holds no samples")
    return samples


def program_of(problem: dict, sample: dict, suite: str = "base") -> tuple[str, str, str, str]:
    """What Sandbox.judge takes. A completion continues the prompt. A solution is the program whole;
    the prompt's helpers, which some tests call, are then given to the tests alone."""
    prompt, test, entry = problem["prompt"], problem[evalplus.SUITES[suite]], problem["entry_point"]
    if "solution" not in sample:
        return prompt, sample["completion"], test, entry
    try:
        ast.parse(prompt)
    except SyntaxError:
        return "", sample["solution"], test, entry
    helpers = f"candidate_ = {entry}\n{prompt}\n{entry} = candidate_\n"
    return "", sample["solution"], helpers + test, entry


def judge_file(
    path: str | Path,
    problems: Problems,
    sandbox: dict | None = None,
    *,
    ks: Sequence[int] = (),
    workers: int | None = None,
    ignore_incomplete: bool = False,
    show: str | None = None,
) -> None:
    """Judge a file of samples, print their scores, and write {path}_results.jsonl, a line for each
    sample, in its order.

    sandbox: options of Sandbox. ks: k of pass@k beside the usual ones. workers: judges, default a
    core each. ignore_incomplete: judge the others where tasks have no samples, which is ValueError
    otherwise. show: the task of which a failing sample is printed.
    """
    out = results_beside(path)
    samples = read_samples(path, problems)
    counts = Counter(s["task_id"] for s in samples)
    ks = check_counts(path, counts, problems, ks, ignore_incomplete)
    sampled = {task: problems[task] for task in problems if counts[task]}
    with (
        Sandbox(workers or count_cores(), **(sandbox or {})) as cage,
        cli.progress(len(samples), "judging", "sample") as bar,
    ):
        judgeable, left_out = split_off(sampled, cage)
        start = time.perf_counter()
        verdicts, programs = _judge_all(samples, judgeable, cage, bar)
        tier = cage.tier
    seconds = time.perf_counter() - start
    by = {"sandbox_tier": tier.partition(" ")[0]}  # beside OpenAI's own fields
    judged = {
        suite: [(samples[i]["task_id"], samples[i], own[i]) for i in sorted(own)]
        for suite, own in verdicts.items()
    }
    lines = (s | _words(verdicts, i) | by for i, s in enumerate(samples))
    problem = None
    try:
        durable.write_atomic(out, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:  # the scores are printed all the same
        problem = error
    tallies, metrics, _, _ = summarise_all(problems, judged, ks)
    print(f"{printable(path)}: {len(samples):,} samples of {len(tallies['base'])} tasks")
    if len(sampled) < len(problems):
        print("A PART OF THE TASKS (--ignore-incomplete): not a score of the set")
    print_scores(metrics, tallies, left_out)
    fenced = sum("```" in (s.get("solution") or s["completion"]) for s in samples)
    if 2 * fenced > len(samples):
        print(f"{fenced:,} samples hold ```: Markdown fences are no Python, cut them away")
    print(f"{len(set(programs)):,} different programs judged in {seconds:.1f} s; sandbox {tier}")
    if show:
        print_example(judgeable.get(show, problems[show]), judged)
    if problem:
        raise problem
    print(f"results: {printable(out)}")


def _judge_all(
    samples: list[dict], problems: Problems, cage: Sandbox, bar: Any
) -> tuple[dict[str, dict[int, Verdict]], list]:
    """({suite: {place of a sample: its verdict}}, programs judged): those that pass the base tests
    are judged by EvalPlus's too; what fails them fails both."""
    verdicts: dict[str, dict[int, Verdict]] = {}
    right = [i for i, s in enumerate(samples) if s["task_id"] in problems]
    programs = []
    for suite in suites_of(next(iter(problems.values()))):
        asked = [program_of(problems[samples[i]["task_id"]], samples[i], suite) for i in right]
        verdicts[suite] = dict(verdicts.get("base", {}))
        for at, verdict in cage.judge_many(asked):
            verdicts[suite][right[at]] = verdict
            bar.update(suite == "base")
        programs += asked
        right = [i for i in right if verdicts[suite][i].passed]
    return verdicts, programs


def _words(verdicts: dict[str, dict[int, Verdict]], i: int) -> dict:
    """OpenAI's fields of a sample's verdict, and the same with `plus_` before."""
    found = {}
    for suite, own in verdicts.items():
        nothing = "not judged: the task's own solution fails"
        result, passed = (own[i].result, own[i].passed) if i in own else (nothing, None)
        found |= {f"{PREFIX[suite]}result": result, f"{PREFIX[suite]}passed": passed}
    return found


def results_beside(path: str | Path) -> str:
    """Where the results of a file of samples go. ValueError, before any is judged, if they cannot:
    beside a pipe, or in a folder that nobody may write to."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no file, beside which results could be written: save it first")
    durable.check_writable(Path(path).parent, "the results' folder")
    return f"{path}_results.jsonl"


def check_counts(
    path: str | Path,
    counts: Counter,
    problems: Problems,
    ks: Sequence[int],
    ignore_incomplete: bool,
) -> list[int]:
    """The k of pass@k that these numbers of samples allow. Tasks with fewer are named."""
    missing = [task for task in problems if not counts[task]]
    if missing and not ignore_incomplete:
        raise ValueError(
            f"{path}: no samples of {named(missing)}, so this is no score of the "
            f"{len(problems)} tasks; --ignore-incomplete judges the others alone"
        )
    most, fewest = max(counts.values()), min(counts.values())

    def short(of):
        return named([f"{task} ({n})" for task, n in counts.items() if n < of])

    for k in ks:
        if k > fewest:
            raise ValueError(f"--k {k}: fewer samples of {short(k)}; ask for a smaller k")
    if fewest < most:
        print(f"tasks with fewer samples than the {most} of others: {printable(short(most))}")
    return all_ks(ks, fewest)


def named(tasks: list[str], most: int = 8) -> str:
    """The first few by name."""
    more = f" and {len(tasks) - most} more" if len(tasks) > most else ""
    return ", ".join(tasks[:most]) + more


def count_cores() -> int:
    """Cores that this process may use. More judges would turn slow programs into timeouts."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = cores if quota == "max" else min(cores, int(quota) // int(period))
    except (OSError, ValueError):  # no control group, or an older kernel's
        pass
    return max(1, cores)


def count_workers() -> int:
    """Judges beside a model: this rank's share of the host's cores, less one for itself."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


class Judging:
    """Samples on their way through this rank's sandbox; verdicts go into entries and journal."""

    def __init__(self, sandbox, problems, folder, bar):
        self.sandbox, self.problems, self.folder, self.bar = sandbox, problems, folder, bar
        self.waiting, self.done = 0, queue.SimpleQueue()

    def take(self, entry: dict) -> None:
        self._ask_next(entry)
        while not self.done.empty():
            self._settle(*self.done.get())

    def _ask_next(self, entry: dict) -> None:
        """Have it judged by the first suite that has not, as long as it passes."""
        problem, suite = self.problems[entry["task_id"]], "base"
        if "verdict" in entry:
            suite = "plus"
            judged = not entry["verdict"]["passed"] or "plus_verdict" in entry
            if judged or suite not in suites_of(problem):
                self.bar.update(1)
                return
        future = self.sandbox.submit(*program_of(problem, entry, suite))  # equal ones: once
        field = f"{PREFIX[suite]}verdict"
        future.add_done_callback(lambda future: self.done.put((entry, field, future)))
        self.waiting += 1

    def finish(self, dist: Any) -> None:
        """Wait for all verdicts."""
        while self.waiting:
            dist.bump()  # the sandbox bounds how long a verdict takes
            with suppress(queue.Empty):
                self._settle(*self.done.get(timeout=1.0))

    def _settle(self, entry: dict, field: str, future) -> None:
        entry[field] = asdict(future.result())
        self.folder.append({name: entry[name] for name in ("task_id", "sample", field)})
        self.waiting -= 1
        self._ask_next(entry)


def judged_by(entries: list[dict], problems: Problems) -> dict[str, Judged]:
    """Of each suite; what fails the base tests fails both."""
    found: dict[str, Judged] = {}
    for suite in suites_of(next(iter(problems.values()))):
        own = (e.get(f"{PREFIX[suite]}verdict", e["verdict"]) for e in entries)
        found[suite] = [(e["task_id"], e, Verdict(**v)) for e, v in zip(entries, own)]
    return found


def print_example(problem: dict, judged: dict[str, Judged]) -> None:
    """The first failing sample of a task, as a program, and what became of it."""
    by_last = list(judged.values())[-1]
    own = [(sample, verdict) for task, sample, verdict in by_last if task == problem["task_id"]]
    failed = [(sample, verdict) for sample, verdict in own if not verdict.passed]
    task = printable(problem["task_id"])
    if not failed:
        what = f"all of its {len(own)} samples passed" if own else "none of its samples was judged"
        print(f"--show {task}: {what}")
        return
    sample, verdict = failed[0]
    prompt, completion, *_ = program_of(problem, sample)
    print(f"--- {task}, failing sample 1 of {len(failed)}\n{printable(prompt, lines=True)}")
    begins = ">>> the program" if "solution" in sample else ">>> drawn from here"
    print(f"{begins}\n{printable(completion, lines=True)}")
    print(f"--- {verdict.kind}: {printable(verdict.detail)}")

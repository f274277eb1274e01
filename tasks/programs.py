"""Problems with tests, and samples of programs for them: read from files, judged, counted.

    from tasks.programs import judge_file, read_problems
    problems = read_problems("data/HumanEval.jsonl.gz")     # {task_id: problem}
    judge_file("S.jsonl", problems)             # prints pass@k, writes S.jsonl_results.jsonl

No model is needed, whatever drew the samples; `humaneval_eval.py --samples-file` is the command for
it. Files are JSONL, gzipped or not: problems as HumanEval's, samples as OpenAI's
evaluate_functional_correctness or EvalPlus takes them, results as the former writes them, with the
sandbox's tier. What is wrong is named with its file and line. Source of the formats and of pass@k:
Chen et al., "Evaluating Large Language Models Trained on Code" (2021),
github.com/openai/human-eval.
"""

import ast
import builtins
import hashlib
import json
import os
import queue
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import cli
import durable
import results
import stats
from cli import printable
from inputs import read_jsonl
from sandbox.judge import Sandbox, Verdict

Problems = dict[str, dict]  # by task_id
Judged = list[tuple[str, dict, Verdict]]  # task_id, sample, what became of it

PASS_KS = (1, 10, 100)
FIELDS = ("task_id", "prompt", "entry_point", "test")
WHERE_TO_GET = "scripts/fetch_humaneval.sh downloads HumanEval.jsonl.gz"


# ---------------------------------------------------------------------------------------------
# Problems


def read_problems(path: str | Path, limit: int | None = None) -> Problems:
    """{task_id: problem} in the order of the file, the first `limit` of them."""
    problems = {}
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file of problems; {WHERE_TO_GET}")
    for where, _, problem in read_jsonl(path):
        for name in FIELDS:
            if not isinstance(problem.get(name), str):
                raise ValueError(f"{where}: field {name!r} is missing or not text")
        if problem["task_id"] in problems:
            raise ValueError(f"{where}: task {problem['task_id']} appears twice")
        check_tests(where, problem)
        problems[problem["task_id"]] = problem
    if not problems:
        raise ValueError(f"{path}: holds no problems; {WHERE_TO_GET}")
    return dict(list(problems.items())[:limit])


def check_tests(where: str, problem: dict) -> None:
    """ValueError for tests that no program could pass: the score would be a wrong 0, not low."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in published tests
            names = compile(problem["test"], "<tests>", "exec", dont_inherit=True).co_names
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: field 'test' is not Python: {error}") from None
    if "check" not in names:
        raise ValueError(f"{where}: field 'test' defines no function check(candidate)")
    if not problem["entry_point"].isidentifier():
        raise ValueError(f"{where}: field 'entry_point' is no name: {problem['entry_point']!r:.60}")


def data_hash(problems: Problems) -> str:
    """sha256 of what decides a verdict."""
    rows = [[problem[name] for name in FIELDS] for problem in problems.values()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def find_task(problems: Problems, name: str) -> str:
    """The task that --show names, in full or by what follows the last slash."""
    tasks = list(problems)
    for task in tasks:
        if name in (task, task.rpartition("/")[2]):
            return task
    raise ValueError(f"--show {name}: no such task; there are {tasks[0]} to {tasks[-1]}")


def split_off(problems: Problems, sandbox: Sandbox, dist: Any = None) -> tuple[Problems, dict]:
    """(the problems that can be judged here, {task_id: why not} of the others).

    Where a problem has a `canonical_solution`, it is judged: a problem whose own solution does not
    pass would count against every model. It may be broken, or hold what cannot cross to another
    process. A solution that is only late is no reason, lest a busy machine changed the score, and
    one that fails is looked at twice. dist: the ranks that share the work.
    """
    own = [task for task in problems if isinstance(problems[task].get("canonical_solution"), str)]
    if dist:
        own = own[dist.rank :: dist.world_size]
    failing = {task: "" for task in own}
    for look in ("", "\n# once more\n"):
        tasks = list(failing)
        programs = (own_program(problems[task], look) for task in tasks)
        verdicts = dict(sandbox.judge_many(programs))
        failing = {
            task: verdicts[i].result
            for i, task in enumerate(tasks)
            if not verdicts[i].passed and verdicts[i].kind != "timeout"
        }
    for part in dist.gather(failing) if dist else []:
        failing |= part
    left_out = {task: failing[task] for task in problems if task in failing}
    kept = {task: problem for task, problem in problems.items() if task not in left_out}
    if not kept:
        task, why = next(iter(left_out.items()))
        raise ValueError(f"no task can be judged: their own solutions fail; {task}: {why}")
    return kept, left_out


def own_program(problem: dict, tail: str = "") -> tuple[str, str, str, str]:
    """The canonical solution as what Sandbox.judge takes."""
    return program_of(problem, {"completion": problem["canonical_solution"] + tail})


# ---------------------------------------------------------------------------------------------
# Samples


def read_samples(path: str | Path, problems: Problems) -> list[dict]:
    """OpenAI's {"task_id", "completion"} and EvalPlus's {"task_id", "solution"}, as they are."""
    samples = []
    for where, _, sample in read_jsonl(path, "file of samples"):
        task = sample.get("task_id")
        if not isinstance(task, str) or task not in problems:
            raise ValueError(f"{where}: task {task!r:.60} is not among the problems (--data-path)")
        if not isinstance(sample.get("completion", sample.get("solution")), str):
            raise ValueError(f"{where}: neither 'completion' nor 'solution' is there as text")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: holds no samples")
    return samples


def program_of(problem: dict, sample: dict) -> tuple[str, str, str, str]:
    """What Sandbox.judge takes. A completion continues the prompt. A solution is the program whole;
    the prompt's helpers, which some tests call, are then given to the tests alone."""
    prompt, test, entry = problem["prompt"], problem["test"], problem["entry_point"]
    if "completion" in sample:
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
    verdicts, sampled = {}, {task: problems[task] for task in problems if counts[task]}
    with (
        Sandbox(workers or count_cores(), **(sandbox or {})) as cage,
        cli.progress(len(samples), "judging", "sample") as bar,
    ):
        judgeable, left_out = split_off(sampled, cage)
        start = time.perf_counter()
        scored = [i for i, s in enumerate(samples) if s["task_id"] in judgeable]
        programs = [program_of(problems[samples[i]["task_id"]], samples[i]) for i in scored]
        for at, verdict in cage.judge_many(programs):
            verdicts[scored[at]] = verdict
            bar.update(1)
        tier = cage.tier
    seconds = time.perf_counter() - start
    by = {"sandbox_tier": tier.partition(" ")[0]}  # beside OpenAI's own fields
    judged = [(samples[i]["task_id"], samples[i], verdicts[i]) for i in scored]
    words = {i: {"result": v.result, "passed": v.passed} for i, v in verdicts.items()}
    nothing = {"result": "not judged: the task's own solution fails", "passed": None}
    lines = (s | words.get(i, nothing) | by for i, s in enumerate(samples))
    problem = None
    try:
        durable.write_atomic(out, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:  # the scores are printed all the same
        problem = error
    tally = count_kinds(problems, judged)
    metrics, _, _ = summarise(tally, ks)
    print(f"{printable(path)}: {len(samples):,} samples of {len(tally)} tasks")
    if len(sampled) < len(problems):
        print("A PART OF THE TASKS (--ignore-incomplete): not a score of the set")
    print_scores(metrics, tally, left_out)
    fenced = sum("```" in s.get("completion", s.get("solution", "")) for s in samples)
    if 2 * fenced > len(samples):
        print(f"{fenced:,} samples hold ```: Markdown fences are no Python, cut them away")
    print(f"{len(set(programs)):,} different programs judged in {seconds:.1f} s; sandbox {tier}")
    if show:
        print_example(problems[show], judged)
    if problem:
        raise problem
    print(f"results: {printable(out)}")


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
        if "verdict" in entry:
            self.bar.update(1)
            return
        program = program_of(self.problems[entry["task_id"]], entry)
        future = self.sandbox.submit(*program)  # an equal program is judged once
        future.add_done_callback(lambda future: self.done.put((entry, future)))
        self.waiting += 1
        while not self.done.empty():
            self._settle(*self.done.get())

    def finish(self, dist: Any) -> None:
        """Wait for all verdicts."""
        while self.waiting:
            dist.bump()  # the sandbox bounds how long a verdict takes
            with suppress(queue.Empty):
                self._settle(*self.done.get(timeout=1.0))

    def _settle(self, entry: dict, future) -> None:
        entry["verdict"] = asdict(future.result())
        self.folder.append({name: entry[name] for name in ("task_id", "sample", "verdict")})
        self.waiting -= 1
        self.bar.update(1)


# ---------------------------------------------------------------------------------------------
# Scores


def kind_of(verdict: Verdict) -> str:
    """passed, wrong answer, timeout, …, and for an exception its builtin type."""
    if verdict.kind != "exception":
        return verdict.kind
    name = verdict.detail.partition(":")[0]  # a program may raise what it likes, under any name
    builtin = getattr(builtins, name, None)
    known = isinstance(builtin, type) and issubclass(builtin, BaseException)
    return name if known else "other exception"


def count_kinds(problems: Problems, judged: Judged) -> dict[str, Counter]:
    """{task_id: {kind of verdict: samples}}, tasks in the order of the problems."""
    tally = {task: Counter() for task in problems}
    for task, _, verdict in judged:
        tally[task][kind_of(verdict)] += 1
    return {task: kinds for task, kinds in tally.items() if kinds}


def summarise(tally: dict[str, Counter], ks: Sequence[int]) -> tuple[dict, dict, dict]:
    """(metrics, breakdown, arrays) of a record."""
    n = np.array([kinds.total() for kinds in tally.values()])
    c = np.array([kinds["passed"] for kinds in tally.values()])
    metrics, estimates = pass_at(n, c, ks)
    total = sum(tally.values(), Counter())
    breakdown = {
        "task": {
            task: {"pass@1": results.share(kinds["passed"], kinds.total())}
            for task, kinds in tally.items()
        },
        "failure": {kind: count for kind, count in total.most_common() if kind != "passed"},
    }
    arrays = {"n": n, "c": c, "task_id": np.array(list(tally))}
    return metrics, breakdown, arrays | estimates


def pass_at(n: np.ndarray, c: np.ndarray, ks: Sequence[int]) -> tuple[dict, dict]:
    """(metrics, estimates by task) of each pass@k; n: samples of a task, c: those that passed."""
    metrics = {}
    for k in ks:
        found = stats.pass_at_k_summary(n, c, k)
        metrics[f"pass@{k}"] = results.metric(found["value"], found["stderr"], len(n), unit="share")
    return metrics, {f"pass@{k}": stats.pass_at_k(n, c, k) for k in ks}


def pass_at_more(record: dict, ks: Sequence[int]) -> dict | None:
    """{metrics, arrays, examples} with the pass@k of these k too, from the counts that a loaded
    record keeps; None if it has them all."""
    known = {int(name.removeprefix("pass@")) for name in record["metrics"]}
    if known.issuperset(ks):
        return None
    arrays = results.load_arrays(record)
    if not {"n", "c"} <= arrays.keys():
        raise ValueError(f"{record['_path']}: its counts of samples were not kept")
    metrics, estimates = pass_at(arrays["n"], arrays["c"], sorted(known.union(ks)))
    examples = record["examples"] | {"scores": {name: name for name in metrics}}
    return {"metrics": metrics, "arrays": estimates, "examples": examples}


def all_ks(ks: Sequence[int], num_samples: int) -> list[int]:
    """Those asked for, and the usual ones that so many samples allow."""
    return sorted({*ks, *(k for k in PASS_KS if k <= num_samples)})


# ---------------------------------------------------------------------------------------------
# Output


def print_scores(
    metrics: dict[str, dict], tally: dict[str, Counter], left_out: dict[str, str] | None = None
) -> None:
    """The table by task, then failures by kind, then pass@k, and what is not counted in it."""
    rows = [(printable(task), kinds) for task, kinds in tally.items()]
    width = max(4, *(len(task) for task, _ in rows))
    print(f"{'task':{width}}  passed  samples  failures")
    for task, kinds in rows:
        failures = ", ".join(f"{k} {c:,}" for k, c in kinds.most_common() if k != "passed")
        print(f"{task:{width}}  {kinds['passed']:>6,}  {kinds.total():>7,}  {failures}".rstrip())
    total = sum(tally.values(), Counter())
    failed = [(kind, count) for kind, count in total.most_common() if kind != "passed"]
    print(f"{total['passed']:,} of {total.total():,} samples passed")
    for kind, count in failed:
        print(f"  {kind:24} {count:>9,}  {count / total.total():7.2%}")
    for name, metric in metrics.items():
        print(f"{name:9} {stats.show_share(metric, 7)}  ({metric['n']} tasks)")
    if left_out:
        print(f"LEFT OUT, NOT COUNTED: {len(left_out)} tasks that cannot be judged here: their own")
        print("canonical_solution fails (README: what a problem file may use)")
    for task, why in (left_out or {}).items():
        print(f"  {task}: {printable(why)}")


def print_example(problem: dict, judged: Judged) -> None:
    """The first failing sample of a task, as a program, and what became of it."""
    own = [(sample, verdict) for task, sample, verdict in judged if task == problem["task_id"]]
    failed = [(sample, verdict) for sample, verdict in own if not verdict.passed]
    task = printable(problem["task_id"])
    if not failed:
        what = f"all of its {len(own)} samples passed" if own else "none of its samples was judged"
        print(f"--show {task}: {what}")
        return
    sample, verdict = failed[0]
    prompt, completion, *_ = program_of(problem, sample)
    print(f"--- {task}, failing sample 1 of {len(failed)}\n{printable(prompt, lines=True)}")
    print(f">>> drawn from here\n{printable(completion, lines=True)}")
    print(f"--- {verdict.kind}: {printable(verdict.detail)}")

"""What judged programs amount to: kinds of failures, pass@k, and the table of them.

    tallies, metrics, breakdown, arrays = summarise_all(problems, judged, ks)
    print_scores(metrics, tallies)

A suite of tests has its own: EvalPlus's, which counts what passes base and plus, begins with
`plus_`.
"""

import builtins
from collections import Counter
from collections.abc import Sequence

import numpy as np

import results
import stats
from cli import printable
from sandbox.judge import Verdict
from tasks.problems import Problems

Judged = list[tuple[str, dict, Verdict]]  # task_id, sample, what became of it

PASS_KS = (1, 10, 100)
PREFIX = {"base": "", "plus": "plus_"}  # of a suite's metrics


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


def summarise_all(
    problems: Problems, judged: dict[str, Judged], ks: Sequence[int]
) -> tuple[dict, dict, dict, dict]:
    """(tallies by suite, metrics, breakdown, arrays) of a record; plus's names begin so."""
    tallies, metrics, breakdown, arrays = {}, {}, {}, {}
    for suite, own in judged.items():
        tallies[suite] = count_kinds(problems, own)
        found = summarise(tallies[suite], ks)
        for into, part in zip((metrics, breakdown, arrays), found):
            into |= {PREFIX[suite] + name: value for name, value in part.items()}
    for name in ("plus_n", "plus_task_id"):
        arrays.pop(name, None)
    return tallies, metrics, breakdown, arrays


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
    known = {int(name.rpartition("@")[2]) for name in record["metrics"]}
    if known.issuperset(ks):
        return None
    arrays = results.load_arrays(record)
    if not {"n", "c"} <= arrays.keys():
        raise ValueError(f"{record['_path']}: its counts of samples were not kept")
    metrics, estimates = {}, {}
    for prefix in PREFIX.values():
        if f"{prefix}c" in arrays:
            found = pass_at(arrays["n"], arrays[f"{prefix}c"], sorted(known.union(ks)))
            metrics |= {prefix + name: value for name, value in found[0].items()}
            estimates |= {prefix + name: value for name, value in found[1].items()}
    examples = record["examples"] | {"scores": {name: name for name in metrics}}
    return {"metrics": metrics, "arrays": estimates, "examples": examples}


def all_ks(ks: Sequence[int], num_samples: int) -> list[int]:
    """Those asked for, and the usual ones that so many samples allow."""
    return sorted({*ks, *(k for k in PASS_KS if k <= num_samples)})


# ---------------------------------------------------------------------------------------------
# Output


def print_scores(
    metrics: dict[str, dict],
    tallies: dict[str, dict[str, Counter]],
    left_out: dict[str, str] | None = None,
) -> None:
    """The table by task, then failures by kind, then pass@k, and what is not counted in it. With
    EvalPlus's tests, passed means both suites."""
    tally = list(tallies.values())[-1]
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
    width = max(9, *map(len, metrics))
    for name, metric in metrics.items():
        print(f"{name:{width}} {stats.show_share(metric, 7)}  ({metric['n']} tasks)")
    if left_out:
        print(f"LEFT OUT, NOT COUNTED: {len(left_out)} tasks that cannot be judged here: their own")
        print("canonical_solution fails (README: what a problem file may use)")
    for task, why in (left_out or {}).items():
        print(f"  {printable(task)}: {printable(why)}")

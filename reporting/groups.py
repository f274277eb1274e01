"""Records as the report shows them: read, sorted into groups that may be compared, and named.

    found = read("results")             # what is good, failed, replaced, unreadable
    for group in groups_of(found["ok"]):
        title_of(group), metric_names(group)

Everything is read from the records, which say themselves what their numbers are (results.SCHEMA).
"""

import math
import os
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import cli
from cli import printable
from inputs import read_jsonl
from recording.runs import told_apart, walk
from results import load_records

Record = dict[str, Any]
LARGEST = sys.float_info.max  # whole numbers have no end
Group = list[Record]  # of the same evaluation, configuration and data: their numbers are comparable


# ---------------------------------------------------------------------------------------------
# Numbers and texts


def real(value: Any) -> float | int | None:
    """A finite number, or None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if known and -LARGEST <= value <= LARGEST else None


def triple(metric: Any) -> tuple:
    """(value, stderr, n) of a metric or of a plain number; None where it has none."""
    if isinstance(metric, dict):
        return tuple(real(metric.get(key)) for key in ("value", "stderr", "n"))
    return real(metric), None, None


def number(value: float | int | None) -> str:
    """For a table: four decimals, two from 100 on, four digits from 10,000 on."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e4:
        return f"{value:.4g}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"


# ---------------------------------------------------------------------------------------------
# Metrics


def metric_names(records: Iterable[Record]) -> list[str]:
    """Metrics with a number in any record, in the records' own order: the first one ranks."""
    names = (
        name
        for record in records
        for name, metric in record["metrics"].items()
        if triple(metric)[0] is not None
    )
    return list(dict.fromkeys(names))


def value_of(record: Record, name: str) -> float | int | None:
    return triple(record["metrics"].get(name))[0]


def lower_is_better(records: Iterable[Record], name: str) -> bool:
    """As the first record that has the metric says."""
    metrics = (record["metrics"][name] for record in records if name in record["metrics"])
    return next(metrics)["better"] == "lower"


def units_of(records: Iterable[Record]) -> dict[str, str]:
    """{metric: its unit}, of those that have one."""
    metrics = [item for record in records for item in record["metrics"].items()]
    return {name: str(metric["unit"]) for name, metric in metrics if metric.get("unit")}


# ---------------------------------------------------------------------------------------------
# Reading


def read(results_dir: str | Path) -> dict:
    """{ok, failed, replaced, skipped, differences}: good records, failed ones, copies of which a
    later one shows the same work, (path, reason) of unreadable files, and the examples that several
    records of one checkpoint answer differently. Runs and checkpoints have names that tell them
    apart (recording/runs.py)."""
    skipped, newest, replaced = [], {}, []
    records = told_apart(load_records(results_dir, skipped))
    for record in sorted(records, key=lambda r: str(r["environment"].get("time"))):
        checkpoint, data = record["checkpoint"], record["data"].get("hash")
        which = record["run"], checkpoint.get("name"), str(checkpoint.get("fingerprint"))
        key = which, record["status"], record["evaluation"], record.get("config_hash"), data
        if key in newest:
            replaced.append(newest[key])
        newest[key] = record
    kept = sorted(newest.values(), key=by_step)
    return {
        "differences": read_differences(results_dir, skipped),
        "ok": [r for r in kept if r["status"] == "ok"],
        "failed": [r for r in kept if r["status"] != "ok"],
        "replaced": replaced,
        "skipped": skipped,
    }


def read_differences(results_dir: str | Path, skipped: list) -> list[dict]:
    """The *-differences-* files beside records: {place, evaluation, file, columns, answers, rows},
    a row for each example on which not all agree. answers: how many of the last columns are
    answers, those whose name holds a slash."""
    found = []
    for path in _differences_below(results_dir):
        examples = {}  # an example has a line for each pair of records that differ on it
        try:
            for _, _, entry in read_jsonl(path) if path.stat().st_size else ():
                if "where" in entry:
                    entry["where"] = os.path.basename(entry["where"])  # the page may travel
                examples.setdefault(entry["id"], {}).update(entry)
            rows = [example for _, example in sorted(examples.items())]
        except Exception as error:  # an edge: one file of many
            why = cli.reason_of(error)
            skipped.append((str(path), f"{path}: no list of differences: {why}"))
            continue
        names = list(dict.fromkeys(name for row in rows for name in row if name != "id"))
        answers = [name for name in names if "/" in name]
        columns = [name for name in names if name not in answers] + answers
        if rows:
            found.append(
                {
                    "place": "/".join(path.parts[-3:-1]),
                    "evaluation": path.name.partition("-differences-")[0],
                    "file": path.name,
                    "columns": columns,
                    "answers": len(answers),
                    "rows": [[row.get(name) for name in columns] for row in rows],
                }
            )
    return found


def _differences_below(results_dir: str | Path) -> list[Path]:
    files = (Path(folder, name) for folder, names in walk(results_dir) for name in names)
    return [file for file in files if fnmatch(file.name, "*-differences-*.jsonl")]


def by_step(record: Record) -> tuple:
    """Sorts by run, step and name; what has no step comes last in its run."""
    checkpoint = record["checkpoint"]
    step = real(checkpoint.get("step"))
    return str(record["run"]), math.inf if step is None else step, str(checkpoint.get("name"))


# ---------------------------------------------------------------------------------------------
# Groups


def groups_of(records: Iterable[Record]) -> list[Group]:
    """Records whose numbers may be compared: the same evaluation, configuration and data."""
    groups = {}
    for record in records:
        key = (record["evaluation"], record.get("config_hash"), record["data"].get("hash"))
        groups.setdefault(key, []).append(record)
    return sorted(groups.values(), key=title_of)


def words_of(group: Group) -> list[str]:
    """What the numbers of a group are, in a few words each."""
    return list(dict.fromkeys(printable(words) for words in group[0]["words"]))


def title_of(group: Group) -> str:
    return " · ".join([printable(group[0]["evaluation"]), *words_of(group)])


def difference_of(group: Group, groups: list[Group]) -> str:
    """What sets a group apart from the others of its evaluation; "" if it is the only one."""
    others = [g for g in groups if g is not group and g[0]["evaluation"] == group[0]["evaluation"]]
    common = set(words_of(group)).intersection(*(words_of(g) for g in others))
    own = [words for words in words_of(group) if words not in common]
    own = [words for words in own if not words.endswith(" tokens")] or own
    return " · ".join(own or [str(group[0].get("config_hash"))[:8]]) if others else ""

"""Is one checkpoint better than another? Paired by example, as the records keep them.

    for a, b in pairs_of("results/base/checkpoint-1000-…", "results/base/checkpoint-2000-…"):
        print(compare_text(a, b, compare(a, b)))

A record says which arrays hold the scores of its examples, or what makes a score of all of them
together, such as BLEU (`examples` of results.SCHEMA).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import resampling
from cli import printable
from recording.runs import told_apart
from reporting import by_bytes
from reporting.groups import Record, lower_is_better, number, title_of, triple
from results import load_arrays, load_record, load_records, load_samples
from stats import bootstrap_ci, examples_to_resolve, flips, paired_difference, ratio

ANSWERS = "predicted"  # the array of what was answered, where right and wrong is not all

# ---------------------------------------------------------------------------------------------
# Examples


class Statistic(NamedTuple):
    """A metric that is no mean: `score` of resampling.py makes it of columns [examples, k]."""

    score: str
    columns: np.ndarray


class Examples(NamedTuple):
    """unit: what the examples are. scores: {metric: float64 [examples]}, sums where there is a
    weight [examples]. tie_break: {metric: [examples]}. arrays: all that the record keeps."""

    unit: str
    scores: dict[str, np.ndarray]
    weight: np.ndarray | None
    tie_break: dict[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]
    statistics: dict[str, Statistic]

    def __len__(self) -> int:
        columns = [statistic.columns for statistic in self.statistics.values()]
        return len(next(iter([*self.scores.values(), *columns])))

    def values(self, name: str) -> np.ndarray | None:
        """A metric's value for each example alone; None where that means nothing."""
        if name in self.scores:
            return self.scores[name]
        score, columns = self.statistics[name]
        return resampling.SEGMENTS[score](columns) if score in resampling.SEGMENTS else None


def examples_of(record: Record) -> Examples:
    """A record's examples. ValueError where it keeps none, or not those that it says it keeps."""
    about, path = record["examples"], record["_path"]
    arrays = load_arrays(record) if about else {}
    if not arrays:
        raise ValueError(f"{path}: the record keeps no per-example results to compare")

    def column(name: str, most_dimensions: int = 1) -> np.ndarray:
        array = arrays.get(name)
        known = array is not None and array.dtype.kind in "biuf"
        if array is None or not known or not 1 <= array.ndim <= most_dimensions:
            raise ValueError(f"{path}: its arrays have no {name!r} with a number for each example")
        return array.astype(np.float64)

    def columns_of(names: list[str]) -> np.ndarray:
        parts = [column(name, 2) for name in names]
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"{path}: its arrays {', '.join(names)} differ in length")
        return np.column_stack(parts)

    scores = {metric: column(name) for metric, name in about["scores"].items()}
    weight = column(about["weight"]) if about.get("weight") else None
    tie_break = {
        metric: column(name)
        for metric, name in (about.get("tie_break") or {}).items()
        if name in arrays
    }
    statistics = {
        metric: Statistic(entry["score"], columns_of(entry["arrays"]))
        for metric, entry in (about.get("statistics") or {}).items()
        if entry["score"] in resampling.SCORES  # a later roseval may know more
    }
    columns = [*scores.values(), *tie_break.values(), *([] if weight is None else [weight])]
    columns += [statistic.columns for statistic in statistics.values()]
    if len({len(values) for values in columns}) > 1:
        raise ValueError(f"{path}: its per-example arrays differ in length")
    if not scores and not statistics:
        raise ValueError(f"{path}: its scores are made in ways unknown here: update roseval")
    return Examples(about["unit"], scores, weight, tie_break, arrays, statistics)


def _over_bytes(a: Record, b: Record) -> tuple[Examples, Examples]:
    """Pieces of one text as examples, under two tokenizers."""
    *bits, n_bytes = by_bytes.segments(a, b)
    unit, name = "pieces of the text", "bits_per_byte"
    x, y = (Examples(unit, {name: values}, n_bytes, {}, {}, {}) for values in bits)
    return x, y


def check_pair(a: Record, b: Record, x: Examples, y: Examples) -> None:
    """ValueError unless two records hold the same examples."""
    name = a["evaluation"]
    if name != b["evaluation"]:
        raise ValueError(f"cannot compare {name} with {b['evaluation']}")
    hashes = a["data"].get("hash"), b["data"].get("hash")
    if hashes[0] != hashes[1]:
        raise ValueError(f"{name}: A and B saw different data (hashes {hashes})")
    differ = None
    if (x.unit, len(x)) != (y.unit, len(y)):
        differ = f"A has {len(x):,} {x.unit}, B {len(y):,} {y.unit}"
    elif not _same_weights(x.weight, y.weight):
        differ = f"the weights of their {x.unit} differ ({a['examples'].get('weight')})"
    if differ:
        raise ValueError(f"{name}: {differ}: the same tokenizer and protocol are needed")


def _same_weights(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)


def shared_metrics(a: Record, b: Record, x: Examples, y: Examples) -> list[str]:
    """Metrics that both records report and keep scores of, in the order of the first."""

    def kind(examples: Examples, name: str) -> Any:
        statistic = examples.statistics.get(name)
        own = "mean" if name in examples.scores else None
        return (statistic.score, statistic.columns.shape) if statistic else own

    both = [name for name in a["metrics"] if name in b["metrics"]]
    return [name for name in both if kind(x, name) and kind(x, name) == kind(y, name)]


# ---------------------------------------------------------------------------------------------
# Differences


def difference(x: Examples, y: Examples, name: str, seed: int = resampling.SEED) -> dict[str, Any]:
    """How far a metric of y lies from x's on the same examples, as stats.paired_difference says it;
    of one that is no mean, as resampling.paired does."""
    if name in x.scores:
        return paired_difference(x.scores[name], y.scores[name], x.weight)
    (score, before), (_, after) = x.statistics[name], y.statistics[name]
    return resampling.paired(score, before, after, seed=seed)


def difference_to(
    best: Record, record: Record, name: str, best_examples: Examples | None
) -> tuple[float, float, float, bool] | None:
    """(difference, low, high, paired) of a metric from the best record's, at 95%. Paired by example
    where both records kept the examples behind this metric, else from the two standard errors."""
    (v0, e0, _), (v1, e1, _) = (triple(r["metrics"].get(name)) for r in (best, record))
    if v0 is None or v1 is None:
        return None
    if best_examples:
        try:
            examples = examples_of(record)
            check_pair(best, record, best_examples, examples)
            if name not in shared_metrics(best, record, best_examples, examples):
                raise ValueError(f"{name}: not of the same kind of examples")
            out = difference(best_examples, examples, name)
            if abs(out["difference"] - (v1 - v0)) <= 1e-6 * max(1.0, abs(v0)):
                return out["difference"], out["low"], out["high"], True
        except (ValueError, KeyError):
            pass  # no arrays, or other examples: the standard errors still say something
    margin = math.nan if e0 is None or e1 is None else 1.96 * math.hypot(e0, e1)
    return v1 - v0, v1 - v0 - margin, v1 - v0 + margin, False


def pairs_of(a: str | Path, b: str | Path) -> list[tuple[Record, Record]]:
    """The records to compare: two files, or what two folders hold of the same evaluation,
    configuration and data. ValueError when there is nothing to pair."""
    a, b = Path(a), Path(b)
    if a.is_file() and b.is_file():
        pairs = [(load_record(a), load_record(b))]
    elif a.is_dir() and b.is_dir():
        sides = [_by_work(a), _by_work(b)]
        pairs = [(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
        pairs += [
            (x, y) for x in sides[0].values() for y in sides[1].values() if by_bytes.match(x, y)
        ]
        if not pairs:
            raise ValueError(f"{a} and {b} share no evaluation with the same flags and data")
    else:
        missing = [str(p) for p in (a, b) if not p.exists()]
        raise ValueError(
            f"--compare {missing[0]}: no such file or folder; give a record's path, or that of a "
            "checkpoint's folder of records, results/RUN/CHECKPOINT-…"
            if missing
            else "--compare takes two record files or two checkpoints' folders, not one of each"
        )
    for record in (r for pair in pairs for r in pair):
        if record["status"] != "ok":
            raise ValueError(f"{record['_path']}: that evaluation failed: {record.get('reason')}")
    return pairs


def _by_work(folder: Path) -> dict[tuple, Record]:
    """{(evaluation, configuration, data): record} of one checkpoint's folder."""
    records = [r for r in load_records(folder) if r["status"] == "ok"]
    contents = {r["checkpoint"].get("fingerprint") for r in records}
    if len(contents) > 1:
        raise ValueError(f"{folder}: holds {len(contents)} checkpoints; name one's folder")
    return {(r["evaluation"], r.get("config_hash"), r["data"].get("hash")): r for r in records}


def compare(a: Record, b: Record, examples: int = 10, seed: int = 0) -> dict:
    """Paired statistics of one pair of records, b against a, by the first metric that both keep
    scores of: `difference`'s fields and {metric, unit, test, bootstrap, resamples, seed, better,
    worse, needed, verdict, changed}; for scores of 0 and 1 McNemar's p and `both`, those that both
    get right; for what is no mean the bootstrap's p. better, worse: None where single examples have
    no score. others: {metric: `difference`'s fields}. examples: how many changed ones to list.
    ValueError when the records do not pair."""
    if by_bytes.differ(a, b):
        x, y = _over_bytes(a, b)
    else:
        x, y = examples_of(a), examples_of(b)
        check_pair(a, b, x, y)
    names = shared_metrics(a, b, x, y)
    if not names:
        raise ValueError(f"{a['evaluation']}: A and B keep scores of no metric in common")
    name, lower = names[0], lower_is_better([a], names[0])
    out: dict[str, Any] = difference(x, y, name, seed)
    out |= {"metric": name, "unit": x.unit, "seed": seed, "better": None, "worse": None}
    before, after, mean = x.values(name), y.values(name), name in x.scores
    if before is not None and after is not None:
        gain = before - after if lower else after - before
        out |= {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}
    out["needed"] = examples_to_resolve(out["difference"], out["sd"])
    if mean:
        out |= _of_means(x, y, name, lower, out)
    else:
        out |= {"test": "bootstrap", "resamples": resampling.RESAMPLES}
        out["bootstrap"] = out["low"], out["high"]
    resolved = out["p"] < 0.05 if "p" in out else out["low"] > 0 or out["high"] < 0
    winner = "B" if (out["difference"] < 0) == lower else "A"
    out["verdict"] = f"{winner} is better" if resolved else "not resolved"
    out["others"] = {n: difference(x, y, n, seed) for n in names[1:]}
    out["changed"] = changed_most(a, x, y, name, examples)
    return out


def _of_means(x: Examples, y: Examples, name: str, lower: bool, out: dict) -> dict:
    """The bootstrap of a mean's difference and, for scores of 0 and 1, McNemar's test."""
    before, after, weight = x.scores[name], y.scores[name], x.weight
    resamples = 10_000 if out["n"] <= 50_000 else 1_000
    found: dict[str, Any] = {"test": "t", "resamples": resamples}
    change = after - before
    if weight is None:
        found["bootstrap"] = bootstrap_ci(change, n=resamples, seed=out["seed"])
    else:
        found["bootstrap"] = bootstrap_ci((change, weight), ratio, resamples, out["seed"])
    if weight is None and are_verdicts(before, after):
        found |= {"test": "McNemar", "flips": verdicts_changed(x, y, name, lower)}
        found["p"] = found["flips"]["p"]
    return found


def are_verdicts(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether all that examples scored is 0 or 1: right or wrong."""
    return bool(np.isin([before, after], (0, 1)).all())


def verdicts_changed(x: Examples, y: Examples, name: str, lower: bool) -> dict[str, Any]:
    """stats.flips of a metric of verdicts, with the answers where both kept them."""
    before, after = x.scores[name], y.scores[name]
    answers = [examples.arrays.get(ANSWERS) for examples in (x, y)]
    known = all(a is not None and a.shape == before.shape for a in answers)
    verdicts = (1 - before, 1 - after) if lower else (before, after)
    return flips(*verdicts, tuple(answers) if known else None)


# ---------------------------------------------------------------------------------------------
# Changed examples


def changed_most(record: Record, x: Examples, y: Examples, name: str, limit: int) -> list[dict]:
    """The examples whose score moved most, as {example, a, b, change, what}; of those that moved
    alike, such as answers that flipped, first the ones whose `tie_break` moved most."""
    before, after = x.values(name), y.values(name)
    if before is None or after is None:
        return []
    if name in x.scores and x.weight is not None:
        before, after = before / np.maximum(x.weight, 1), after / np.maximum(x.weight, 1)
    change, moved = after - before, np.zeros(len(x))
    if name in x.tie_break and name in y.tie_break:
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(np.abs(y.tie_break[name] - x.tie_break[name]))
    order = np.lexsort((-moved, -np.abs(change)))[:limit]
    samples = {}
    for sample in load_samples(record):
        samples.setdefault(str(sample.get("id")), sample)
    return [
        {
            "example": int(i),
            "a": float(before[i]),
            "b": float(after[i]),
            "change": float(change[i]),
            "what": label_of(record, x.arrays, samples, int(i)),
        }
        for i in order
        if change[i]
    ]


def label_of(record: Record, arrays: Mapping[str, Any], samples: dict, i: int) -> str:
    """What example i is, from arrays and samples that the record names, as far as it has them."""
    said, sample = [], samples.get(str(i), {})
    for name, text in (record["examples"].get("labels") or {}).items():
        value = arrays[name][i] if name in arrays and i < len(arrays[name]) else sample.get(name)
        if value is not None:
            value = value.item() if isinstance(value, np.generic) else value
            said.append(text.format(value) if isinstance(value, (int, float)) else f"{value}")
    text = printable(" ".join(": ".join(said).split()))
    return text if len(text) <= 70 else text[:69] + "…"


# ---------------------------------------------------------------------------------------------
# As text


def compare_text(a: Record, b: Record, out: dict) -> str:
    """What `compare` found, for a terminal."""
    unit, (low, high) = printable(out["unit"]), out["bootstrap"]
    lines = _head(a, b, out["metric"])
    lines.append(f"  B - A            {out['difference']:+.5f} ±{out['stderr']:.5f}")
    drawn = (
        f"[{low:+.5f}, {high:+.5f}] bootstrap over {out['n']:,} {unit}, {out['resamples']:,} "
        f"resamples, seed {out['seed']}"
    )
    if out["test"] == "bootstrap":
        lines += [f"  95% interval     {drawn}", f"  paired bootstrap p = {out['p']:.4g}"]
    else:
        student = f"[{out['low']:+.5f}, {out['high']:+.5f}] paired Student t"
        lines += [f"  95% interval     {student}", f"                   {drawn}"]
    if out["better"] is not None:
        same = out["n"] - out["better"] - out["worse"]
        counts = f"B better on {out['better']:,}, worse on {out['worse']:,}, same on {same:,}"
        lines.append(f"  {unit:<16} {counts}")
        if "flips" in out:
            lines += _flip_lines(out["flips"])
    for name, d in out["others"].items():
        lines.append(
            f"  {printable(name):<16} {d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        )
    if math.isfinite(out["needed"]):
        lines.append(
            f"  to resolve       {max(out['needed'], 2):,.0f} {unit} for a difference of this size "
            f"(80% power at 5%); there are {out['n']:,}"
        )
    lines.append(f"  verdict          {out['verdict']}")
    if out["changed"]:
        lines += ["", "  changed most        A        B   change"]
        for row in out["changed"]:
            numbers = f"{row['a']:>8.3f} {row['b']:>8.3f} {row['change']:>+8.3f}"
            lines.append(f"  {row['example']:>12} {numbers}  {row['what']}".rstrip())
    return "\n".join(lines)


def _flip_lines(found: dict) -> list[str]:
    both = f"both right {found['both_right']:,}, both wrong {found['both_wrong']:,}"
    flipped = (
        f"{found['right_to_wrong']:,} right to wrong, {found['wrong_to_right']:,} wrong to right"
    )
    lines = [f"                   {both}", f"  flips            {flipped}"]
    if "answers_changed" in found:
        others = f"of them {found['wrong_to_wrong']:,} from one wrong one to another"
        lines.append(f"  answers          {found['answers_changed']:,} changed, {others}")
    return [*lines, f"  McNemar, exact   p = {found['p']:.4g}"]


def _head(a: Record, b: Record, name: str) -> list[str]:
    """Which records, their values, and where their protocols differ."""
    lines = [title_of([a])]
    for side, record in zip("AB", told_apart([a, b]), strict=True):
        value, stderr, _ = triple(record["metrics"].get(name))
        where = printable(f"{record['run']}/{record['checkpoint'].get('name')}: {name}")
        spread = "" if stderr is None else f" ±{number(stderr)}"
        lines.append(f"  {side}  {where} {number(value)}{spread}")
    if by_bytes.differ(a, b):
        lines.append(f"  {by_bytes.WHY}")
    before, after = a["protocol"], b["protocol"]
    differ = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
    if differ:
        said = (printable(f"{k} {before.get(k)} / {after.get(k)}") for k in differ)
        lines.append("  the protocols differ: " + ", ".join(said))
    return lines

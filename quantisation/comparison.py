"""One table of a model under several rules, and how far results lie apart, paired by example.

differences(base, other)        # {metric: {difference, low, high, ...}}, 95% intervals
print_rules(pairs)              # a row for each rule, against the first of its checkpoint

A result is a record with its arrays (evaluation.Result).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

import resampling
import stats
from recording.runs import called

Pair = tuple[Any, Any]  # the first result of a checkpoint, and another


def differences(base: Any, other: Any) -> dict[str, dict]:
    """How far each metric of `other` lies from base's, of those whose examples both have kept."""
    about, found = other["examples"] or {}, {}
    weight = other.arrays.get(about.get("weight"))
    for name, column in (about.get("scores") or {}).items():
        before, after = base.arrays.get(column), other.arrays.get(column)
        if before is not None and after is not None and before.shape == after.shape:
            found[name] = stats.paired_difference(before, after, weight)
    for name, made in (about.get("statistics") or {}).items():
        sides = [
            np.column_stack([np.asarray(arrays[array], np.float64) for array in made["arrays"]])
            for arrays in (base.arrays, other.arrays)
            if all(array in arrays for array in made["arrays"])
        ]
        if len(sides) == 2 and sides[0].shape == sides[1].shape:
            found[name] = resampling.paired(made["score"], sides[0], sides[1])
    return found


def print_differences(pairs: Iterable[Pair]) -> None:
    """A line for each, of all its metrics."""
    pairs = list(pairs)
    if pairs:
        print("\ndifference to the base [95%], paired by example")
    for base, other in pairs:
        told = [f"{name} {_shown(out)}" for name, out in differences(base, other).items()]
        print(f"{called([other])[0]}: {', '.join(told) or 'not comparable'}")


def print_rules(pairs: Iterable[Pair]) -> None:
    """A table for each evaluation asked, of all checkpoints and rules."""
    tables: dict[str, list[Pair]] = {}
    for base, other in pairs:
        tables.setdefault(base["config_hash"], []).append((base, other))
    for mine in tables.values():
        _print_table(mine)


def _print_table(pairs: list[Pair]) -> None:
    first, records = pairs[0][0], [other for _, other in pairs]
    rule = first["protocol"]["quantisation"]["rule"]
    words = [word for word in first["words"] if word != rule]
    print(f"\n{first['evaluation']} ({', '.join(words)}), difference to {rule} [95%], by example")
    rows = [["", "weights", "bits", "tokens/s"]]
    names = list(first["metrics"])
    rows[0] += [cell for name in names for cell in (name, "difference")]
    for name, (base, other) in zip(called(records), pairs, strict=True):
        held, found = other["protocol"]["quantisation"], differences(base, other)
        rate = other["cost"].get("tokens_per_second")
        row = [name, f"{held['weight_bytes'] / 1e6:,.1f} MB", f"{held['bits_per_weight']:.2f}"]
        row.append("" if rate is None else f"{rate:,.0f}")
        for metric in names:
            row.append(_value(other["metrics"].get(metric)))
            row.append(_shown(found[metric]) if metric in found and base is not other else "")
        rows.append(row)
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    for row in rows:
        cells = [row[i].rjust(width) for i, width in zip(kept, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def _value(metric: dict | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    return f"{metric['value']:.2%}" if metric.get("unit") == "share" else f"{metric['value']:.5f}"


def _shown(out: dict) -> str:
    return f"{out['difference']:+.5f} [{out['low']:+.5f}, {out['high']:+.5f}]"

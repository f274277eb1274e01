"""One table of a model under several rules, and how far results lie apart, paired by example.

differences(base, other)        # {metric: {difference, low, high, ...}}, 95% intervals
print_rules(pairs)              # a row for each rule, against the first of its checkpoint
print_differences(pairs)        # a line for each, of every metric

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


def flips(base: Any, other: Any) -> dict | None:
    """stats.flips of the first metric, where its examples are right or wrong."""
    about, first = other["examples"] or {}, next(iter(other["metrics"]), None)
    column = (about.get("scores") or {}).get(first)
    before, after = base.arrays.get(column), other.arrays.get(column)
    if about.get("weight") or before is None or after is None or before.shape != after.shape:
        return None
    if not np.isin([before, after], (0, 1)).all():
        return None
    wrong_is_1 = other["metrics"][first].get("better") == "lower"
    return stats.flips(before != wrong_is_1, after != wrong_is_1)


def print_rules(pairs: Iterable[Pair]) -> None:
    """A table for each evaluation asked, of all checkpoints and rules: all metrics, how far the
    first lies from the first rule's, and how many answers became wrong or right."""
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
    names, head = list(first["metrics"]), ["", "weights", "bits", "tokens/s"]
    rows = [[*head, names[0], "difference", "flips - +", "p", *names[1:]]]
    for name, (base, other) in zip(called(records), pairs, strict=True):
        held, rate = other["protocol"]["quantisation"], other["cost"].get("tokens_per_second")
        row = [name, f"{held['weight_bytes'] / 1e6:,.1f} MB", f"{held['bits_per_weight']:.2f}"]
        row.append("" if rate is None else f"{rate:,.0f}")
        found = differences(base, other).get(names[0]) if base is not other else None
        turned = flips(base, other) if base is not other else None
        values = [_value(other["metrics"].get(metric)) for metric in names]
        row += [values[0], _shown(found) if found else ""]
        row += [f"{turned['right_to_wrong']} {turned['wrong_to_right']}"] if turned else [""]
        row += [f"{turned['p']:.2g}" if turned else "", *values[1:]]
        rows.append(row)
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    for row in rows:
        cells = [row[i].rjust(width) for i, width in zip(kept, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def _value(metric: dict | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    value = metric["value"]
    if metric.get("unit") == "share":
        return f"{value:.2%}"
    return f"{value:.5f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def _shown(out: dict) -> str:
    return f"{out['difference']:+.5f} [{out['low']:+.5f}, {out['high']:+.5f}]"

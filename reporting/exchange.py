"""Does it forget? What each checkpoint gained and lost since the one that it began from.

    table = since(groups, "smollm2-135m", domain="zh.txt")      # as tables.terminal takes it

A column for each group of records that has the base: its first metric's change, paired by example.
With `domain`, what every other group paid for a unit of what that one gained: the exchange.
"""

import math
import os
from typing import Any

from cli import printable
from reporting.compare import difference_to, examples_of
from reporting.groups import Group, Record, lower_is_better, metric_names, number, real
from reporting.tables import interval_text


def since(groups: list[Group], base: str, domain: str | None = None) -> dict[str, Any]:
    """{title, header, rows, best, notes}, checkpoints in the order of tokens seen. base: a
    checkpoint's name, its run's where that has one, or run/name; domain: a word in the name of a
    group's data. ValueError where there is no such base, or domain."""
    columns = [(group, own) for group in groups if (own := _base_of(group, base)) is not None]
    columns = [(group, own) for group, own in columns if len(group) > 1 and metric_names(group)]
    if not columns:
        there = list(dict.fromkeys("/".join(_key(r)[:2]) for group in groups for r in group))
        more = ", …" if len(there) > 5 else ""
        raise ValueError(
            f"--since {base}: no checkpoint of that name was evaluated beside others; there are "
            f"{', '.join(map(printable, there[:5]))}{more}"
        )
    columns.sort(key=lambda column: _about(column[0]))
    names = _called([group for group, _ in columns])
    gaining = _index_of(names, domain)
    changes = [_changes(group, own) for group, own in columns]
    signs = [-1 if lower_is_better(group, metric_names(group)[0]) else 1 for group, _ in columns]
    records = {_key(r): r for group, own in columns for r in group if r is not own}
    header = ["run", "checkpoint", "tokens", *names]
    others = [i for i in range(len(names)) if gaining is not None and i != gaining]
    header += [f"{names[i]} lost per gain" for i in others]
    cells = []
    for key, record in sorted(records.items(), key=lambda item: _by_tokens(item[1])):
        info, found = record["checkpoint"], [change.get(key) for change in changes]
        row = [printable(record["run"]), printable(info.get("name"))]
        row += [number(real(info.get("tokens"))), *map(interval_text, found)]
        gains = [sign * f[0] if f else math.nan for f, sign in zip(found, signs, strict=True)]
        for i in others:
            assert gaining is not None
            paid = gains[gaining] > 0 and math.isfinite(gains[i])
            row.append(number(-gains[i] / gains[gaining]) if paid else "–")
        cells.append(row)
    notes = ["changes [95%], paired by example, from the two standard errors where marked ~"]
    if others:
        gained = names[gaining or 0]
        notes.append(f"lost per gain: for a unit gained in {gained}; below 0: gained there too")
    title = f"since {printable(base)}"
    return {"title": title, "header": header, "rows": cells, "best": set(), "notes": notes}


def _base_of(group: Group, base: str) -> Record | None:
    named = [(r, *_key(r)[:2]) for r in group]
    found = [r for r, run, name in named if base in (name, run, f"{run}/{name}")]
    if len(found) > 1:
        runs = ", ".join(printable("/".join(_key(r)[:2])) for r in found)
        raise ValueError(f"--since {base}: there are several, {runs}: name one as run/name")
    return found[0] if found else None


def _about(group: Group) -> str:
    """The evaluation, its metric, and which data."""
    files = group[0]["data"].get("files") or []
    data = os.path.basename(str(files[0])) if files else ""
    return printable(f"{group[0]['evaluation']} {metric_names(group)[0]} {data}").strip()


def _called(groups: list[Group]) -> list[str]:
    names = [_about(group) for group in groups]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _index_of(names: list[str], domain: str | None) -> int | None:
    if domain is None:
        return None
    found = [i for i, name in enumerate(names) if domain in name]
    if len(found) != 1:
        raise ValueError(f"--domain {domain} is in {len(found)} of: {'; '.join(names)}")
    return found[0]


def _changes(group: Group, base: Record) -> dict[tuple, Any]:
    """What difference_to says of each record of a group, by _key."""
    try:
        examples = examples_of(base)
    except ValueError:
        examples = None
    name = metric_names(group)[0]
    return {_key(r): difference_to(base, r, name, examples) for r in group if r is not base}


def _key(record: Record) -> tuple[str, str, str]:
    info = record["checkpoint"]
    return str(record["run"]), str(info.get("name")), str(info.get("fingerprint"))


def _by_tokens(record: Record) -> tuple:
    info = record["checkpoint"]
    at = [real(info.get(name)) for name in ("tokens", "step")]
    return str(record["run"]), *(math.inf if value is None else value for value in at)

"""The web page: what it draws as data, and the file that holds data, scripts and plotly.js."""

import base64
import gzip
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from durable import dumps, encode
from reporting.groups import (
    Group,
    Record,
    difference_of,
    groups_of,
    lower_is_better,
    metric_names,
    triple,
    units_of,
    words_of,
)
from reporting.quantised import data_of, families_of, tables_of_rules
from reporting.tables import SHOWN_DIFFERENCES
from results import SCHEMA_VERSION, utc_now

PAGE = Path(__file__).resolve().parent / "page.html"


def short(value: Any, digits: int = 8) -> float | int | str | None:
    """Eight significant digits, as the page and its downloads show; the CSV file has them all."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) else None


def columns_of(group: Group, metrics_of: Callable[[Record], Any]) -> dict:
    """{metric: {v, e, n}}: one list each over a group's records, null where a record lacks it."""
    rows = [metrics_of(record) or {} for record in group]
    rows = [row if isinstance(row, dict) else {} for row in rows]
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        triples = [triple(row.get(name)) for row in rows]
        if any(t[0] is not None for t in triples):
            v, e, n = ([short(x) for x in column] for column in zip(*triples))
            columns[name] = {"v": v}
            columns[name] |= {"e": e} if any(x is not None for x in e) else {}
            columns[name] |= {"n": n} if any(x is not None for x in n) else {}
    return columns


def breakdowns_of(group: Group) -> dict:
    """{dimension: {group name: {metric: {v, e, n}}}}; a plain number is the metric "value"."""
    found = {}
    for record in group:
        for dimension, values in record["breakdown"].items():
            if isinstance(values, dict):
                found.setdefault(dimension, {}).update(dict.fromkeys(values))

    def metrics_of(dimension: str, name: str) -> Callable[[Record], dict]:
        def get(record: Record) -> dict:
            values = record["breakdown"].get(dimension)
            value = values.get(name) if isinstance(values, dict) else None
            return value if isinstance(value, dict) and "value" not in value else {"value": value}

        return get

    return {
        dimension: {name: columns_of(group, metrics_of(dimension, name)) for name in names}
        for dimension, names in found.items()
    }


def lists_of(records: Group, curves: bool) -> dict[str, list]:
    """The dimensions of breakdowns that are lists: curves of risk over coverage, or else bins. In
    five digits, more than a figure shows: they are most of a page of many checkpoints."""

    def wanted(values: Any) -> bool:
        points = isinstance(values, list) and values and all(isinstance(v, dict) for v in values)
        return bool(points) and ("coverage" in values[0]) == curves

    names = dict.fromkeys(n for r in records for n, v in r["breakdown"].items() if wanted(v))
    found = {name: [r["breakdown"].get(name) for r in records] for name in names}

    def rounded(points: list[dict]) -> list[dict]:
        return [
            {k: short(v, 5) if isinstance(v, float) else v for k, v in point.items()}
            for point in points
        ]

    return {
        name: [rounded(v) if wanted(v) else None for v in lists] for name, lists in found.items()
    }


def series_of(run: str, records: Group) -> dict:
    """One run's curves within a group: columns over its checkpoints. calibration and risk: what its
    breakdown has as lists, {dimension: the list of each checkpoint, or null}."""
    checkpoints = [r["checkpoint"] for r in records]
    return {
        "run": run,
        "name": [str(c.get("name")) for c in checkpoints],
        "fingerprint": [str(c.get("fingerprint"))[:8] for c in checkpoints],
        "step": [short(c.get("step")) for c in checkpoints],
        "tokens": [short(c.get("tokens")) for c in checkpoints],
        "metrics": columns_of(records, lambda r: r["metrics"]),
        "breakdown": breakdowns_of(records),
        "cost": columns_of(records, lambda r: r["cost"]),
        "calibration": lists_of(records, curves=False),
        "risk": lists_of(records, curves=True),
    }


def group_data(group: Group, groups: list[Group]) -> dict:
    runs = {}
    for record in group:
        runs.setdefault(str(record["run"]), []).append(record)
    names = metric_names(group)
    return {
        "evaluation": group[0]["evaluation"],
        "config": str(group[0].get("config_hash"))[:8],
        "words": " · ".join(words_of(group)),
        "apart": difference_of(group, groups),
        "metrics": names,
        "lower": [name for name in names if lower_is_better(group, name)],
        "units": units_of(group),
        "protocol": group[0]["protocol"],
        "data": group[0]["data"],
        "environment": group[0]["environment"],
        "gpu": sorted({str(r["cost"]["gpu"]) for r in group if r["cost"].get("gpu")}),
        "series": [series_of(run, records) for run, records in runs.items()],
    }


def page_data(found: dict, title: str, refresh: float | None = None) -> dict:
    """All that the page draws of what `groups.read` found: for each comparable group its protocol
    and, for each run, columns over that run's checkpoints. refresh: seconds between reloads."""
    groups, families = groups_of(found["ok"]), families_of(found["ok"])
    failed = [
        [str(r["run"]), r["checkpoint"].get("name"), r["evaluation"], r.get("reason")]
        for r in found["failed"]
    ]
    return {
        "title": title,
        "made": utc_now(),
        "schema_version": SCHEMA_VERSION,
        "refresh": refresh,
        "groups": [group_data(group, groups) for group in groups],
        "quantised": [data_of(family) for family in families],
        "rules": tables_of_rules(families),
        "differences": [
            d | {"rows": d["rows"][:SHOWN_DIFFERENCES], "total": len(d["rows"])}
            for d in found["differences"]
        ],
        "failed": failed,
        "replaced": len(found["replaced"]),
        "skipped": [[os.path.basename(path), reason] for path, reason in found["skipped"]],
    }


def page(data: dict) -> str:
    """The page's HTML with plotly.js and, compressed, the data inside."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError(
            "report.html needs plotly, whose plotly.js it carries: pip install plotly "
            "(or --no-html)"
        ) from None
    packed = gzip.compress(encode(dumps(data, separators=(",", ":"))), compresslevel=6)
    parts = {"{{plotly.js}}": get_plotlyjs(), "{{data}}": base64.b64encode(packed).decode()}
    out = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, after = out.split(name)
        out = before + part + after
    return out

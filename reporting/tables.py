"""Groups of records as tables: for the terminal, as Markdown and as CSV."""

import csv
import io
import math
from collections.abc import Callable

from reporting.compare import difference_to, examples_of
from reporting.groups import (
    Group,
    Record,
    by_step,
    lower_is_better,
    metric_names,
    number,
    plain,
    real,
    title_of,
    triple,
    value_of,
)
from results import scalars

SHOWN_DIFFERENCES = 100  # examples of a checkpoint


def sort_key(group: Group, sort: str) -> Callable[[Record], tuple]:
    """Best first by `sort`, a metric; or "step". Missing values come last."""
    if sort == "step":
        return by_step
    sign = 1 if lower_is_better(group, sort) else -1

    def key(record: Record) -> tuple:
        value = value_of(record, sort)
        return value is None, sign * (value or 0.0), by_step(record)

    return key


def best_value(group: Group, name: str) -> float | int | None:
    """A metric's best value; None where all of several checkpoints have the same."""
    values = {v for record in group if (v := value_of(record, name)) is not None}
    if len(values) == 1 and len(group) > 1:
        return None
    return min(values) if lower_is_better(group, name) else max(values)


def table_of(group: Group, sort: str | None = None, rows: int = 0) -> dict:
    """{title, header, rows, best, notes}: one group's checkpoints as cells of text. `best` is the
    set of (row, column) that hold a column's best value; rows = 0 shows all."""
    names = metric_names(group)
    if not names:
        return {"title": title_of(group), "header": [], "rows": [], "best": set(), "notes": []}
    primary = names[0]
    winner = min(group, key=sort_key(group, primary))
    known = sort if sort is not None and sort in ("step", *names) else primary
    ordered = sorted(group, key=sort_key(group, known))
    shown = ordered[:rows] if rows else ordered
    top = {name: best_value(group, name) for name in names}
    try:
        examples = examples_of(winner)
    except ValueError:
        examples = None
    header = ["run", "checkpoint", "step", primary, "Δ to best [95%]", *names[1:]]
    cells, best, unpaired = [], set(), False
    for i, record in enumerate(shown):
        found = None if record is winner else difference_to(winner, record, primary, examples)
        unpaired |= found is not None and not found[3]
        row = [plain(record["run"]), plain(record["checkpoint"].get("name"))]
        row.append(number(real(record["checkpoint"].get("step"))))
        for name in names:
            value, stderr, _ = triple(record["metrics"].get(name))
            if value is not None and value == top[name]:
                best.add((i, len(row)))
            row.append(number(value) + ("" if stderr is None else f" ±{number(stderr)}"))
            if name == primary:
                row.append("best" if record is winner else interval_text(found))
        cells.append(row)
    notes = ["± is one standard error; Δ is paired by example"]
    if unpaired:
        notes[0] += ", from the two standard errors where marked ~"
    if len(shown) < len(ordered):
        notes.append(f"{len(ordered) - len(shown)} more checkpoints: --rows 0 shows them all")
    return {"title": title_of(group), "header": header, "rows": cells, "best": best, "notes": notes}


def interval_text(found: tuple[float, float, float, bool] | None) -> str:
    """What `difference_to` gives, as a cell."""
    if not found:
        return "–"
    difference, low, high, paired = found
    mark = "" if paired else "~"
    if not math.isfinite(low):
        return f"{mark}{difference:+.4f}"
    return f"{mark}{difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def terminal(table: dict, colour: bool = False) -> str:
    """A table as aligned lines; a column's best value carries a star."""
    marked = [
        [cell + (" *" if (i, j) in table["best"] else "  ") for j, cell in enumerate(row)]
        for i, row in enumerate(table["rows"])
    ]
    lines = [f"\033[1m{table['title']}\033[0m" if colour else table["title"]]
    if not marked:
        return lines[0] + "\n  no metrics"
    header = [cell + "  " for cell in table["header"]]
    widths = [max(len(row[j]) for row in [header, *marked]) for j in range(len(header))]
    for i, row in enumerate([header, *marked]):
        parts = []
        for j, cell in enumerate(row):
            text = cell.ljust(widths[j]) if j < 2 else cell.rjust(widths[j])
            bold = colour and (i == 0 or (i - 1, j) in table["best"])
            parts.append(f"\033[1m{text}\033[0m" if bold else text)
        lines.append("  " + " ".join(parts).rstrip())
    return "\n".join(lines + [f"  {note}" for note in table["notes"]])


def markdown(tables: list[dict], found: dict) -> str:
    """report.md: the tables, and what `groups.read` found beside good records."""

    def line(cells) -> str:
        texts = [plain(cell).replace("|", "\\|") for cell in cells]
        return f"| {' | '.join(texts)} |"

    out = ["# Results", ""]
    for table in tables:
        out += [f"## {table['title']}", ""]
        if table["header"]:
            ruler = ["---"] * 2 + ["---:"] * (len(table["header"]) - 2)
            out += [line(table["header"]), line(ruler)]
            for i, row in enumerate(table["rows"]):
                best = (f"**{c}**" if (i, j) in table["best"] else c for j, c in enumerate(row))
                out.append(line(best))
            out += ["", *(f"{note}." for note in table["notes"]), ""]
    for d in found["differences"]:
        title = f"{d['evaluation']} of {d['place']}, {len(d['rows']):,} examples"
        out += [f"## Answered differently: {plain(title)}", ""]
        out += [line(d["columns"]), line(["---"] * len(d["columns"]))]
        out += [line(row) for row in d["rows"][:SHOWN_DIFFERENCES]]
        if len(d["rows"]) > SHOWN_DIFFERENCES:
            out += ["", f"The first {SHOWN_DIFFERENCES}; {plain(d['file'])} has them all."]
        out.append("")
    if found["failed"]:
        columns = ["run", "checkpoint", "evaluation", "reason"]
        out += ["## Failed", "", line(columns), line(["---"] * 4)]
        for r in found["failed"]:
            name = r["checkpoint"].get("name")
            out.append(line([r["run"], name, r["evaluation"], r.get("reason")]))
        out.append("")
    out += [f"Not readable: {plain(reason)}" for _, reason in found["skipped"]]
    return "\n".join(out).rstrip() + "\n"


def csv_text(records: list[Record]) -> str:
    """One line a record at full precision: what it is, its metrics and its cost."""
    rows = []
    for r in records:
        checkpoint = r["checkpoint"]
        row = {"run": r["run"], "checkpoint": checkpoint.get("name")}
        row |= {"step": checkpoint.get("step"), "tokens": checkpoint.get("tokens")}
        row |= {"fingerprint": checkpoint.get("fingerprint"), "evaluation": r["evaluation"]}
        row |= {"config": str(r.get("config_hash"))[:8], "status": r["status"]}
        row |= {"reason": r.get("reason")} | scalars(r | {"breakdown": {}})
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

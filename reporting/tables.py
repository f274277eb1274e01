"""Groups of records as tables: for the terminal, as Markdown and as CSV."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from cli import printable
from reporting.compare import difference_to, examples_of
from reporting.groups import (
    Group,
    Record,
    by_step,
    lower_is_better,
    metric_names,
    number,
    real,
    title_of,
    triple,
    value_of,
)
from results import scalars

SHOWN_DIFFERENCES = 100  # examples of a checkpoint
TO_BEST = "Δ to best [95%]"
FORMULA = tuple("=+-@＝＋－＠\t\r")  # how a spreadsheet knows one


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
    first, *more = map(printable, names)
    header = ["run", "checkpoint", "step", first, TO_BEST, *more]
    cells, best, unpaired = [], set(), False
    for i, record in enumerate(shown):
        found = None if record is winner else difference_to(winner, record, primary, examples)
        unpaired |= found is not None and not found[3]
        row = [printable(record["run"]), printable(record["checkpoint"].get("name"))]
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


# ---------------------------------------------------------------------------------------------
# Files, in which text of others stays text


def marked_down(text: Any) -> str:
    """Text of others for Markdown: no tag, link, image, code, emphasis or column comes of it."""
    text = re.sub(r"[\\`*\[\]<>|~$&#]", r"\\\g<0>", printable(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is only itself
    text = re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text)  # GitHub makes links of bare addresses
    return text.replace("@", "@<!-- -->")  # and of these, which it tells whom they name


def markdown(tables: list[dict], found: dict) -> str:
    """report.md: the tables, and what `groups.read` found beside good records."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def others(cells: Iterable[Any]) -> str:
        return line(map(marked_down, cells))

    out = ["# Results", ""]
    for table in tables:
        out += [f"## {marked_down(table['title'])}", ""]
        if table["header"]:
            ruler = ["---"] * 2 + ["---:"] * (len(table["header"]) - 2)
            header = (name if name == TO_BEST else marked_down(name) for name in table["header"])
            out += [line(header), line(ruler)]
            for i, row in enumerate(table["rows"]):
                row = [*map(marked_down, row[:2]), *row[2:]]  # the others are numbers
                out.append(
                    line(f"**{c}**" if (i, j) in table["best"] else c for j, c in enumerate(row))
                )
            out += ["", *(f"{note}." for note in table["notes"]), ""]
    for d in found["differences"]:
        title = f"{d['evaluation']} of {d['place']}, {len(d['rows']):,} examples"
        out += [f"## Answered differently: {marked_down(title)}", ""]
        out += [others(d["columns"]), line(["---"] * len(d["columns"]))]
        out += [others(row) for row in d["rows"][:SHOWN_DIFFERENCES]]
        if len(d["rows"]) > SHOWN_DIFFERENCES:
            out += ["", f"The first {SHOWN_DIFFERENCES}; {marked_down(d['file'])} has them all."]
        out.append("")
    if found["failed"]:
        out += ["## Failed", "", line(["run", "checkpoint", "evaluation", "reason"])]
        out.append(line(["---"] * 4))
        for r in found["failed"]:
            name = r["checkpoint"].get("name")
            out.append(others([r["run"], name, r["evaluation"], r.get("reason")]))
        out.append("")
    if found["replaced"]:
        out += [f"Left out, as later ones replace them: {len(found['replaced'])} records.", ""]
    for _, reason in found["skipped"]:
        out += [f"Not readable: {marked_down(reason)}", ""]
    return "\n".join(out).rstrip() + "\n"


def csv_cell(value: Any) -> Any:
    """What is no number, for a spreadsheet: one that begins like a formula begins with a quote."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = printable(value, lines=True)
    return f"'{text}" if text.startswith(FORMULA) else text


def csv_text(records: list[Record]) -> str:
    """One line a record at full precision: what it is, its metrics and its cost."""
    rows = []
    for r in records:
        checkpoint = r["checkpoint"]
        row = {"run": r["run"], "checkpoint": checkpoint.get("name")}
        row |= {"step": checkpoint.get("step"), "tokens": checkpoint.get("tokens")}
        row |= {"fingerprint": checkpoint.get("fingerprint"), "path": checkpoint.get("path")}
        row |= {"evaluation": r["evaluation"]}
        row |= {"config": str(r.get("config_hash"))[:8], "status": r["status"]}
        row |= {"reason": r.get("reason")} | scalars(r | {"breakdown": {}})
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows([csv_cell(row.get(name)) for name in columns] for row in rows)
    return out.getvalue()

"""Tables, a web page and paired comparisons from a directory of results.

    python report.py results                  # tables here; report.html, .csv and .md in results/
    python report.py results --since BASE     # gained and lost since the checkpoint they began from
    python report.py results --watch 30       # again whenever a record is added
    python report.py --compare A B            # is B better than A? two records, or two
                                              # checkpoints' folders of records

The page is one file that opens offline: plotly.js and the data are inside it (`pip install plotly`;
`--no-html` does without). Everything is read from the records, whose fields `results.py` documents;
what a record lacks is left out. Here the command; the rest is in reporting/.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import installed  # noqa: F401

import cli
from durable import write_atomic
from recording.runs import walk
from reporting.charts import draw, draw_families
from reporting.compare import compare, compare_text, pairs_of
from reporting.exchange import since
from reporting.groups import groups_of, metric_names, read
from reporting.page import page, page_data
from reporting.quantised import families_of, table_of_family, tables_of_rules
from reporting.tables import csv_text, markdown, table_of, terminal
from results import utc_now

# ---------------------------------------------------------------------------------------------
# Files


def write_report(
    results_dir: str | Path,
    out_dir: str | Path,
    *,
    html: bool = True,
    sort: str | None = None,
    rows: int = 0,
    refresh: float | None = None,
    charts: bool = False,
    began: tuple[str, str | None] | None = None,
) -> str:
    """Write report.csv, .md and, with `html`, .html; return the tables as text for the terminal.
    sort: a metric or "step"; rows: checkpoints of a table, 0 for all; refresh: seconds after which
    an open page reloads itself; charts: pictures of calibration, too; began: the checkpoint that
    others began from, and the data that they are trained for, as `exchange.since` takes them."""
    found = read(results_dir)
    known = metric_names(found["ok"])
    if sort and known and sort not in ("step", *known):
        raise ValueError(f"--sort {sort}: no such metric; there are step, {', '.join(known)}")
    title = Path(results_dir).resolve().name
    try:
        tables, data, files = drawn(found, title, sort, rows, refresh)
    except Exception:  # an edge: one record of a directory
        leave_out_the_odd(found)
        tables, data, files = drawn(found, title, sort, rows, refresh)
    if began:
        tables.append(since(groups_of(found["ok"]), *began))
        files["report.md"] = markdown(tables, found)
    try:
        for name, text in files.items():
            write_atomic(Path(out_dir, name), text)
        if html:
            write_atomic(Path(out_dir, "report.html"), page(data))
        pictures = []
        if charts:
            pictures = draw(groups_of(found["ok"]), out_dir)
            pictures += draw_families(families_of(found["ok"]), out_dir)
    except OSError as error:  # a full disk, a directory of somebody else's
        where, why = error.filename or out_dir, error.strerror or error
        raise ValueError(f"{where}: {why}; --out FOLDER writes the report elsewhere") from None
    parts = [terminal(table, sys.stdout.isatty()) for table in tables]
    parts = parts or [f"{cli.printable(results_dir)}: no results yet"]
    parts += beside_tables(found)
    names = ["report.html"] * html + list(files)
    places = [*(Path(out_dir, name) for name in names), *pictures]
    parts.append("written: " + ", ".join(map(cli.printable, places)))
    return "\n\n".join(parts)


def drawn(
    found: dict, title: str, sort: str | None = None, rows: int = 0, refresh: float | None = None
) -> tuple[list[dict], dict, dict[str, str]]:
    """(tables, the page's data, {file: text}) of what `groups.read` found."""
    tables = [table_of(group, sort, rows) for group in groups_of(found["ok"])]
    families = families_of(found["ok"])
    tables += [*map(table_of_family, families), *tables_of_rules(families)]
    files = {
        "report.csv": csv_text(found["ok"] + found["failed"]),
        "report.md": markdown(tables, found),
    }
    return tables, page_data(found, title, refresh), files


def leave_out_the_odd(found: dict) -> None:
    """Move the records that cannot be shown even alone to those that are not readable."""
    nothing = {name: [] for name in found}
    for kind in ("ok", "failed"):
        for record in list(found[kind]):
            try:
                drawn(nothing | {kind: [record]}, "")
            except Exception as error:  # the same edge
                found[kind].remove(record)
                path = record["_path"]
                found["skipped"].append((path, f"{path}: {cli.reason_of(error)}"))


def beside_tables(found: dict) -> list[str]:
    """What else `groups.read` found, a line each."""
    lines = []
    for r in found["failed"]:
        name = f"{r['run']}/{r['checkpoint'].get('name')}"
        lines.append(cli.printable(f"failed: {name} {r['evaluation']}: {r.get('reason')}"))
    if found["replaced"]:
        lines.append(f"left out, as later ones replace them: {len(found['replaced'])} records")
    for d in found["differences"]:
        answers = ", ".join(d["columns"][-d["answers"] :]) if d["answers"] else "its records"
        what = f"{len(d['rows']):,} examples of {d['evaluation']}"
        lines.append(cli.printable(f"{d['place']}: {what} answered differently by {answers}"))
    return lines + [cli.printable(f"not readable: {reason}") for _, reason in found["skipped"]]


def signature(results_dir: str | Path) -> set:
    """What changes when a record is added or rewritten."""
    found = set()
    for directory, names in walk(results_dir):
        for name in names:
            if name.endswith((".json", ".jsonl")):
                try:
                    stat = os.stat(os.path.join(directory, name))
                except FileNotFoundError:  # replaced meanwhile
                    continue
                found.add((directory, name, stat.st_mtime_ns, stat.st_size))
    return found


# ---------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    p.add_argument("results_dir", nargs="?", default="results")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is B better than A?")
    p.add_argument("--examples", type=int, default=10, help="changed examples to list (10)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    p.add_argument("--out", help="folder of report.html, .csv and .md; default: RESULTS_DIR")
    p.add_argument("--no-html", action="store_true")
    p.add_argument(
        "--charts",
        action="store_true",
        help="also pictures as .png: reliability, bytes (matplotlib)",
    )
    p.add_argument("--since", metavar="BASE", help="gained and lost since this checkpoint")
    p.add_argument("--domain", metavar="WORD", help="of --since: what others pay for its gain")
    p.add_argument("--sort", metavar="METRIC", help='a metric, best first, or "step"')
    p.add_argument("--rows", type=int, default=20, help="checkpoints a table shows (20; 0: all)")
    p.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="look for new records that often (30) until Ctrl-C; an open page reloads itself",
    )
    p.add_argument("--debug", action="store_true", help="show the traceback of input errors")
    args = p.parse_args(argv)
    for name in ("examples", "seed", "rows"):
        if getattr(args, name) < 0:
            p.error(f"--{name} cannot be negative")
    if args.domain and not args.since:
        p.error("--domain goes with --since")
    of_compare = {"compare", "examples", "seed"}
    if args.compare:
        if "results_dir" in args.given:
            p.error(f"--compare takes two places: what is {args.results_dir}?")
        of_report = args.given - of_compare - {"debug"}
        cli.check_unused(args, sorted(of_report), "without --compare, which only prints")
    else:
        cli.check_unused(args, sorted(of_compare), "with --compare A B")
    cli.check_seconds(p, args, "watch")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        pairs = pairs_of(*args.compare)
        texts = [compare_text(a, b, compare(a, b, args.examples, args.seed)) for a, b in pairs]
        print("\n\n".join(texts))
        return
    out_dir = args.out or args.results_dir
    options = {"html": not args.no_html, "sort": args.sort, "rows": args.rows}
    options |= {"charts": args.charts, "began": (args.since, args.domain) if args.since else None}
    seen = None
    while True:
        now = signature(args.results_dir)
        if now != seen:
            text = write_report(args.results_dir, out_dir, refresh=args.watch, **options)
            print(text if seen is None else f"\n{utc_now()}\n{text}", flush=True)
            seen = now
        if not args.watch:
            return
        time.sleep(args.watch)


if __name__ == "__main__":
    cli.run(main)

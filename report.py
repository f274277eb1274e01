"""Tables, a web page and paired comparisons from a directory of results.

    python report.py results                  # tables here; report.html, .csv and .md in results/
    python report.py results --watch 30       # again whenever a record is added
    python report.py --compare A B            # is B better than A? two records, or two
                                              # checkpoints' folders of records

The page is one file that opens offline: plotly.js and the data are inside it (`pip install plotly`;
`--no-html` does without). Everything is read from the records, whose fields `results.py` documents;
what a record lacks is left out.
"""

import csv
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

import cli
from durable import dumps, write_atomic
from results import (
    SCHEMA_VERSION,
    load_arrays,
    load_record,
    load_records,
    load_samples,
    scalars,
    utc_now,
)
from stats import (
    bootstrap_ci,
    examples_to_resolve,
    mcnemar_exact,
    paired_difference,
    pass_at_k,
    ratio,
)

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "reporting" / "page.html"
SHOWN_DIFFERENCES = 100  # questions of a checkpoint
# Columns come in this order, then by name; the first of them ranks the checkpoints.
METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy", "accuracy_macro", "pass@1")
# What identifies a protocol at a glance, in the order it is said.
SPOKEN = (
    ("template", "{}"),
    ("scoring", "{}"),
    ("shots", "{}-shot"),
    ("window", "window {}"),
    ("stride", "stride {}"),
    ("bos", "BOS"),
    ("num_samples", "{} samples"),
    ("temperature", "temperature {}"),
    ("top_p", "top-p {}"),
    ("dtype", "{}"),
    ("subjects", "{} subjects only: not a score"),
    ("limit", "limit {}: not a score"),
)


# --- Reading


def real(value):
    """A finite number, or None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if known and math.isfinite(value) else None


def triple(metric) -> tuple:
    """(value, stderr, n) of a metric in any of its forms; None where it has none."""
    if isinstance(metric, dict):
        return tuple(real(metric.get(key)) for key in ("value", "stderr", "n"))
    return real(metric), None, None


def plain(text) -> str:
    """Text for one line of a terminal: no control characters, whatever a name or reason holds."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def metric_names(records) -> list[str]:
    """Metrics with a number in any record, the ranking one first."""
    names = {n for r in records for n, m in r["metrics"].items() if triple(m)[0] is not None}

    def order(name):
        size = int(name[5:]) if name.startswith("pass@") and name[5:].isdigit() else 0
        return METRICS.index(name) if name in METRICS else len(METRICS), size, name

    return sorted(names, key=order)


def pass_ks(records) -> list[int]:
    """The k of every pass@k in the records, the ranking one first."""
    return [int(n[5:]) for n in metric_names(records) if n[:5] == "pass@" and n[5:].isdigit()]


def value_of(record, name):
    return triple(record["metrics"].get(name))[0]


def read(results_dir) -> dict:
    """{ok, failed, replaced, skipped, differences}: good records, failed ones, those that a later
    record of the same run, checkpoint name and configuration replaces, (path, reason) of unreadable
    files, and the questions that scorings of one checkpoint answer differently."""
    skipped, newest, replaced = [], {}, []
    records = load_records(results_dir, skipped)
    for record in sorted(records, key=lambda r: str(r["environment"].get("time"))):
        name = record["checkpoint"].get("name")
        key = (record["run"], name, record["evaluation"], record.get("config_hash"))
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


def read_differences(results_dir, skipped: list) -> list[dict]:
    """What mmlu_eval.py leaves beside the records of several scorings of one checkpoint: {place,
    columns, rows}, a row for each question on which not all of them agree."""
    found = []
    for path in sorted(Path(results_dir).glob("*/*/mmlu-differences-*.jsonl")):
        questions = {}  # a question has a line for each pair of columns that differ on it
        try:
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                entry["where"] = os.path.basename(entry["where"])  # the page may travel
                questions.setdefault(entry["id"], {}).update(entry)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            skipped.append((str(path), f"{path}: no list of differences: {error}"))
            continue
        names = dict.fromkeys(name for entry in questions.values() for name in entry)
        columns = ["where", "subject", "gold", *(name for name in names if "/" in name)]
        rows = [[q.get(name) for name in columns] for _, q in sorted(questions.items())]
        found.append({"place": "/".join(path.parts[-3:-1]), "columns": columns, "rows": rows})
    return found


def by_step(record):
    checkpoint = record["checkpoint"]
    step = real(checkpoint.get("step"))
    return str(record["run"]), math.inf if step is None else step, str(checkpoint.get("name"))


def groups_of(records) -> list[list[dict]]:
    """Records whose numbers may be compared: the same evaluation, configuration and data."""
    groups = {}
    for record in records:
        key = (record["evaluation"], record.get("config_hash"), record["data"].get("hash"))
        groups.setdefault(key, []).append(record)
    order = {"perplexity": 0, "mmlu": 1, "humaneval": 2}
    return sorted(groups.values(), key=lambda g: (order.get(g[0]["evaluation"], 9), title_of(g)))


def spoken(group) -> list[str]:
    """What the numbers of a group are, in a few words each."""
    protocol, data = group[0]["protocol"], group[0]["data"]
    said = []
    for key, text in SPOKEN:
        value = protocol.get(key)
        if value is not None and value is not False:
            said.append(text.format(len(value) if isinstance(value, list) else value))
    if real(data.get("tokens")):
        said.append(f"{data['tokens']:,} tokens")
    files = data.get("files")
    if isinstance(files, list) and files:
        several = f"{len(files)} files"
        said.append(os.path.basename(str(files[0])) if len(files) == 1 else several)
    return list(dict.fromkeys(plain(words) for words in said))


def title_of(group) -> str:
    return " · ".join([group[0]["evaluation"], *spoken(group)])


def difference_of(group, groups) -> str:
    """What sets a group apart from the others of its evaluation; "" if it is the only one."""
    others = [g for g in groups if g is not group and g[0]["evaluation"] == group[0]["evaluation"]]
    common = set(spoken(group)).intersection(*(spoken(g) for g in others))
    own = [words for words in spoken(group) if words not in common]
    own = [words for words in own if not words.endswith(" tokens")] or own
    return " · ".join(own or [str(group[0].get("config_hash"))[:8]]) if others else ""


# --- Paired differences


def per_example(record) -> dict:
    """{score, count, unit, arrays} of a record's examples: nats and tokens of windows, right or
    wrong answers, or a task's pass@k for the k that ranks. ValueError without such arrays."""
    arrays = load_arrays(record)
    out = {"count": None, "arrays": arrays}
    if "nll" in arrays and "count" in arrays:
        return out | {"score": arrays["nll"], "count": arrays["count"], "unit": "windows"}
    if "correct" in arrays:
        return out | {"score": arrays["correct"].astype(float), "unit": "questions"}
    if "n" in arrays and "c" in arrays:
        k = next(iter(pass_ks([record])), 1)
        return out | {"score": pass_at_k(arrays["n"], arrays["c"], k), "unit": "tasks"}
    raise ValueError(f"{record['_path']}: the record keeps no per-example results to compare")


def check_pair(a, b, x, y) -> None:
    """ValueError unless two records hold the same examples."""
    if a["evaluation"] != b["evaluation"]:
        raise ValueError(f"cannot compare {a['evaluation']} with {b['evaluation']}")
    hashes = a["data"].get("hash"), b["data"].get("hash")
    if hashes[0] != hashes[1]:
        raise ValueError(f"{a['evaluation']}: A and B saw different data (hashes {hashes})")
    if x["score"].shape != y["score"].shape or not np.array_equal(x["count"], y["count"]):
        raise ValueError(
            f"{a['evaluation']}: A has {x['score'].shape} {x['unit']}, B {y['score'].shape}, or "
            "their token counts differ: the same tokenizer, window and stride are needed"
        )


def difference_to(best, record, name, best_examples) -> tuple[float, float, float, bool] | None:
    """(difference, low, high, paired) of a metric from the best record's, at 95%. Paired by example
    where both records kept the examples behind this metric, else from the two standard errors."""
    (v0, e0, _), (v1, e1, _) = (triple(r["metrics"].get(name)) for r in (best, record))
    if v0 is None or v1 is None:
        return None
    if best_examples:
        try:
            examples = per_example(record)
            check_pair(best, record, best_examples, examples)
            out = paired_difference(best_examples["score"], examples["score"], examples["count"])
            if abs(out["difference"] - (v1 - v0)) <= 1e-6 * max(1.0, abs(v0)):
                return out["difference"], out["low"], out["high"], True
        except ValueError:
            pass  # no arrays, or other examples: the standard errors still say something
    margin = math.nan if e0 is None or e1 is None else 1.96 * math.hypot(e0, e1)
    return v1 - v0, v1 - v0 - margin, v1 - v0 + margin, False


# --- Tables


def number(value, name="") -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if name == "perplexity":
        return f"{value:,.3f}" if value < 1e4 else f"{value:.4g}"
    return f"{value:.4f}"


def sort_key(sort, primary):
    """Best first by `sort`, a metric; or "step". Missing values come last."""
    if sort == "step":
        return by_step
    name = sort or primary
    sign = 1 if name in LOWER_IS_BETTER else -1

    def key(record):
        value = value_of(record, name)
        return (value is None, sign * (value or 0.0), by_step(record))

    return key


def best_value(group, name):
    """A metric's best value; None where all of several checkpoints have the same."""
    values = {value_of(record, name) for record in group} - {None}
    if len(values) == 1 and len(group) > 1:
        return None
    return (min if name in LOWER_IS_BETTER else max)(values)


def table_of(group, sort=None, rows=0) -> dict:
    """{title, header, rows, best, notes}: one group's checkpoints as cells of text. `best` is the
    set of (row, column) that hold a column's best value; rows = 0 shows all."""
    names = metric_names(group)
    if not names:
        return {"title": title_of(group), "header": [], "rows": [], "best": set(), "notes": []}
    primary = names[0]
    ranked = sorted(group, key=sort_key(None, primary))
    sort = sort if sort == "step" or sort in names else None
    ordered = sorted(group, key=sort_key(sort, primary))
    shown = ordered[:rows] if rows else ordered
    winner = ranked[0]
    top = {n: best_value(group, n) for n in names}
    try:
        examples = per_example(winner)
    except ValueError:
        examples = None
    header = ["run", "checkpoint", "step", primary, "Δ to best [95%]", *names[1:]]
    cells, best, unpaired = [], set(), False
    for i, record in enumerate(shown):
        row = [plain(record["run"]), plain(record["checkpoint"].get("name"))]
        row.append(number(real(record["checkpoint"].get("step"))))
        for name in names:
            value, stderr, _ = triple(record["metrics"].get(name))
            spread = f" ±{number(stderr, name)}" if stderr is not None else ""
            row.append(number(value, name) + spread)
            if value is not None and value == top[name]:
                best.add((i, 3 if name == primary else 4 + names.index(name)))
        found = None if record is winner else difference_to(winner, record, primary, examples)
        row.insert(4, "best" if record is winner else interval_text(found))
        unpaired |= bool(found) and not found[3]
        cells.append(row)
    notes = ["± is one standard error; Δ is paired by example"]
    if unpaired:
        notes[0] += ", from the two standard errors where marked ~"
    if len(shown) < len(ordered):
        notes.append(f"{len(ordered) - len(shown)} more checkpoints: --rows 0 shows them all")
    return {"title": title_of(group), "header": header, "rows": cells, "best": best, "notes": notes}


def interval_text(found) -> str:
    if not found:
        return "–"
    difference, low, high, paired = found
    mark = "" if paired else "~"
    if not math.isfinite(low):
        return f"{mark}{difference:+.4f}"
    return f"{mark}{difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def terminal(table, colour=False) -> str:
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


def markdown(tables, found) -> str:
    def line(cells):
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
        out += [f"## Answered differently: {plain(d['place'])}, {len(d['rows']):,} questions", ""]
        out += [line(d["columns"]), line(["---"] * len(d["columns"]))]
        out += [line(row) for row in d["rows"][:SHOWN_DIFFERENCES]]
        if len(d["rows"]) > SHOWN_DIFFERENCES:
            out += ["", f"The first {SHOWN_DIFFERENCES}; its mmlu-differences file has them all."]
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


def csv_text(records) -> str:
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


# --- Comparison of two records


def pairs_of(a, b) -> list[tuple[dict, dict]]:
    """The records to compare: two files, or what two folders hold of the same evaluation,
    configuration and data. ValueError when there is nothing to pair."""
    a, b = Path(a), Path(b)
    if a.is_file() and b.is_file():
        pairs = [(load_record(a), load_record(b))]
    elif a.is_dir() and b.is_dir():
        sides = []
        for path in (a, b):
            records = [r for r in load_records(path) if r["status"] == "ok"]
            names = {r["checkpoint"].get("name") for r in records}
            if len(names) > 1:
                raise ValueError(f"{path}: holds {len(names)} checkpoints; name one's folder")
            key = ("evaluation", "config_hash")
            sides.append({(*(r.get(k) for k in key), r["data"].get("hash")): r for r in records})
        pairs = [(sides[0][k], sides[1][k]) for k in sides[0] if k in sides[1]]
        if not pairs:
            raise ValueError(f"{a} and {b} share no evaluation with the same flags and data")
    else:
        missing = [str(p) for p in (a, b) if not p.exists()]
        raise ValueError(
            f"{missing[0]}: no such file or folder"
            if missing
            else "--compare takes two record files or two checkpoints' folders, not one of each"
        )
    for record in (r for pair in pairs for r in pair):
        if record["status"] != "ok":
            raise ValueError(f"{record['_path']}: that evaluation failed: {record.get('reason')}")
    return pairs


def compare(a, b, examples=10, seed=0) -> dict:
    """Paired statistics of one pair of records, b against a: {difference, low, high, bootstrap,
    needed, verdict, ...} as `compare_text` prints them. ValueError when they do not pair."""
    x, y = per_example(a), per_example(b)
    check_pair(a, b, x, y)
    names = [n for n in metric_names([a]) if value_of(b, n) is not None]
    name = names[0] if names else x["unit"]
    out = paired_difference(x["score"], y["score"], x["count"])
    resamples = 10_000 if out["n"] <= 50_000 else 1_000
    change = y["score"] - x["score"]
    if x["count"] is None:
        out["bootstrap"] = bootstrap_ci(change, n=resamples, seed=seed)
    else:
        out["bootstrap"] = bootstrap_ci((change, x["count"]), ratio, resamples, seed)
        change = change / np.maximum(x["count"], 1)
    lower = x["unit"] == "windows"
    out |= {"metric": name, "unit": x["unit"], "resamples": resamples, "seed": seed}
    out["better"] = int((change < 0).sum() if lower else (change > 0).sum())
    out["worse"] = int((change > 0).sum() if lower else (change < 0).sum())
    out["needed"] = examples_to_resolve(out["difference"], out["sd"])
    resolved = out["low"] > 0 or out["high"] < 0
    if x["unit"] == "questions":
        out["p"] = mcnemar_exact(out["better"], out["worse"])
        out["both"] = int(((x["score"] == 1) & (y["score"] == 1)).sum())
        resolved = out["p"] < 0.05
    winner = "B" if (out["difference"] < 0) == lower else "A"
    out["verdict"] = f"{winner} is better" if resolved else "not resolved"
    if x["unit"] == "tasks":
        out["pass"] = pass_differences(a, b, x["arrays"], y["arrays"])
    out["changed"] = changed_most(a, x, y, change, examples)
    return out


def pass_differences(a, b, x, y) -> dict:
    """{"pass@k": paired difference} for every k that both records report."""
    out = {}
    for k in pass_ks([a]):
        if k in pass_ks([b]):
            before, after = (pass_at_k(side["n"], side["c"], k) for side in (x, y))
            out[f"pass@{k}"] = paired_difference(before, after)
    return out


def changed_most(record, x, y, change, limit) -> list[dict]:
    """The examples whose score moved most, as {example, a, b, change, what}. Questions that flipped
    are ranked by how far the log-probability of the right answer moved."""
    size, shown = np.abs(change), (x["score"], y["score"])
    if x["count"] is not None:
        shown = tuple(s / np.maximum(x["count"], 1) for s in shown)
    logprobs = [s["arrays"].get("logprobs") for s in (x, y)]
    gold = x["arrays"].get("gold")
    if gold is not None and all(p is not None and p.ndim == 2 for p in logprobs):
        rows = np.arange(len(gold))
        log_total = [np.logaddexp.reduce(p, axis=1) for p in logprobs]
        right = [p[rows, gold.astype(int)] - t for p, t in zip(logprobs, log_total)]
        with np.errstate(invalid="ignore"):
            moved = np.nan_to_num(np.abs(right[1] - right[0]))
        size = np.where(change != 0, 1 + moved, 0)
    order = np.argsort(-size, kind="stable")[:limit]
    samples = {}
    for i, sample in enumerate(load_samples(record)):
        samples.setdefault(sample.get("id", i), sample)
    return [
        {
            "example": int(i),
            "a": float(shown[0][i]),
            "b": float(shown[1][i]),
            "change": float(change[i]),
            "what": what_is(record, samples, x["arrays"], int(i)),
        }
        for i in order
        if size[i] > 0
    ]


def what_is(record, samples, arrays, i) -> str:
    """What example i is, from the record's samples or names, as far as it kept them."""
    sample, protocol = samples.get(i, {}), record["protocol"]
    keys = ("subject", "task_id", "question", "text")
    said = [str(sample[k]) for k in keys if sample.get(k) is not None]
    if not said:
        said = [str(arrays[k][i]) for k in ("task_id", "subject") if k in arrays]
    if not said and isinstance(protocol.get("stride"), int) and "nll" in arrays:
        said = [f"from token {i * protocol['stride']:,}"]
    text = plain(": ".join(said))
    return text if len(text) <= 70 else text[:69] + "…"


def compare_text(a, b, out) -> str:
    lines = [title_of([a])]
    for side, r in (("A", a), ("B", b)):
        value, stderr, _ = triple(r["metrics"].get(out["metric"]))
        name = plain(f"{r['run']}/{r['checkpoint'].get('name')}")
        spread = "" if stderr is None else f" ±{stderr:.4f}"
        lines.append(f"  {side}  {name}: {out['metric']} {number(value)}{spread}")
    keys = sorted(a["protocol"].keys() | b["protocol"].keys())
    differ = [k for k in keys if a["protocol"].get(k) != b["protocol"].get(k)]
    if differ:
        said = (f"{k} {a['protocol'].get(k)} / {b['protocol'].get(k)}" for k in differ)
        lines.append("  the protocols differ: " + ", ".join(said))
    unit, low, high = out["unit"], *out["bootstrap"]
    same = out["n"] - out["better"] - out["worse"]
    lines += [
        f"  B - A            {out['difference']:+.5f} ±{out['stderr']:.5f}",
        f"  95% interval     [{out['low']:+.5f}, {out['high']:+.5f}] paired Student t",
        f"                   [{low:+.5f}, {high:+.5f}] bootstrap over {out['n']:,} {unit}, "
        f"{out['resamples']:,} resamples, seed {out['seed']}",
        f"  {unit:<16} B better on {out['better']:,}, worse on {out['worse']:,}, same on {same:,}",
    ]
    if "p" in out:
        neither = same - out["both"]
        lines.append(f"                   both right {out['both']:,}, both wrong {neither:,}")
        lines.append(f"  McNemar, exact   p = {out['p']:.4g}")
    for name, d in out.get("pass", {}).items():
        lines.append(f"  {name:<16} {d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]")
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


# --- The page


def short(value):
    """Eight significant digits, as the page and its downloads show; the CSV file has them all."""
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) else None


def columns_of(group, metrics_of) -> dict:
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


def breakdowns_of(group) -> dict:
    """{dimension: {group name: {metric: {v, e, n}}}}; a plain number is the metric "value"."""
    found = {}
    for record in group:
        for dimension, values in record["breakdown"].items():
            if isinstance(values, dict):
                found.setdefault(dimension, {}).update(dict.fromkeys(values))

    def metrics_of(dimension, name):
        def get(record):
            values = record["breakdown"].get(dimension)
            value = values.get(name) if isinstance(values, dict) else None
            return value if isinstance(value, dict) and "value" not in value else {"value": value}

        return get

    return {
        dimension: {name: columns_of(group, metrics_of(dimension, name)) for name in names}
        for dimension, names in found.items()
    }


def page_data(found, title, refresh=None) -> dict:
    """All that the page draws: for each comparable group its protocol and, for each run, columns
    over that run's checkpoints."""
    groups, comparable = [], groups_of(found["ok"])
    for group in comparable:
        runs = {}
        for record in group:
            runs.setdefault(str(record["run"]), []).append(record)
        series = []
        for run, records in runs.items():
            checkpoints = [r["checkpoint"] for r in records]
            calibration = [r["breakdown"].get("calibration") for r in records]
            series.append(
                {
                    "run": run,
                    "name": [str(c.get("name")) for c in checkpoints],
                    "fingerprint": [str(c.get("fingerprint"))[:8] for c in checkpoints],
                    "step": [short(c.get("step")) for c in checkpoints],
                    "tokens": [short(c.get("tokens")) for c in checkpoints],
                    "metrics": columns_of(records, lambda r: r["metrics"]),
                    "breakdown": breakdowns_of(records),
                    "cost": columns_of(records, lambda r: r["cost"]),
                    "calibration": calibration if any(calibration) else None,
                }
            )
        names = metric_names(group)
        groups.append(
            {
                "evaluation": group[0]["evaluation"],
                "config": str(group[0].get("config_hash"))[:8],
                "words": " · ".join(spoken(group)),
                "apart": difference_of(group, comparable),
                "metrics": names,
                "lower": [n for n in names if n in LOWER_IS_BETTER],
                "protocol": group[0]["protocol"],
                "data": group[0]["data"],
                "environment": group[0]["environment"],
                "gpu": sorted({str(r["cost"]["gpu"]) for r in group if r["cost"].get("gpu")}),
                "series": series,
            }
        )
    failed = [
        [str(r["run"]), r["checkpoint"].get("name"), r["evaluation"], r.get("reason")]
        for r in found["failed"]
    ]
    return {
        "title": title,
        "made": utc_now(),
        "schema_version": SCHEMA_VERSION,
        "refresh": refresh,
        "groups": groups,
        "differences": [
            d | {"rows": d["rows"][:SHOWN_DIFFERENCES], "total": len(d["rows"])}
            for d in found["differences"]
        ],
        "failed": failed,
        "replaced": len(found["replaced"]),
        "skipped": [[os.path.basename(path), reason] for path, reason in found["skipped"]],
    }


def page(data) -> str:
    """The page's HTML with plotly.js and the data inside."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError(
            "report.html needs plotly, whose plotly.js it carries: pip install plotly "
            "(or --no-html)"
        ) from None
    text = dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag ends the script
    parts = {"{{plotly.js}}": get_plotlyjs(), "{{data}}": text}
    out = PAGE.read_text()
    for name, part in parts.items():
        before, after = out.split(name)
        out = before + part + after
    return out


# --- The command


def write_report(results_dir, out_dir, *, html, sort, rows, refresh=None) -> str:
    """Write the files; return the tables as text for the terminal."""
    found = read(results_dir)
    known = metric_names(found["ok"])
    if sort and known and sort not in ("step", *known):
        raise ValueError(f"--sort {sort}: no such metric; there are step, {', '.join(known)}")
    tables = [table_of(group, sort, rows) for group in groups_of(found["ok"])]
    files = {
        "report.csv": csv_text(found["ok"] + found["failed"]),
        "report.md": markdown(tables, found),
    }
    title = Path(results_dir).resolve().name
    try:
        for name, text in files.items():
            write_atomic(Path(out_dir, name), text)
        if html:
            write_atomic(Path(out_dir, "report.html"), page(page_data(found, title, refresh)))
    except OSError as error:  # a full disk, a directory of somebody else's
        raise ValueError(f"{error}; --out FOLDER writes the report elsewhere") from None
    parts = [terminal(table, sys.stdout.isatty()) for table in tables]
    if not parts:
        parts = [f"{results_dir}: no results yet"]
    for r in found["failed"]:
        name = f"{r['run']}/{r['checkpoint'].get('name')}"
        parts.append(plain(f"failed: {name} {r['evaluation']}: {r.get('reason')}"))
    if found["replaced"]:
        parts.append(f"left out, as later ones replace them: {len(found['replaced'])} records")
    parts += [
        plain(
            f"{d['place']}: {len(d['rows']):,} questions answered differently by "
            f"{', '.join(d['columns'][3:])}"
        )
        for d in found["differences"]
    ]
    parts += [plain(f"not readable: {reason}") for _, reason in found["skipped"]]
    names = ["report.html"] * html + list(files)
    parts.append("written: " + ", ".join(str(Path(out_dir, name)) for name in names))
    return "\n\n".join(parts)


def signature(results_dir) -> set:
    """What changes when a record is added or rewritten."""
    found = set()
    for directory, _, names in os.walk(results_dir):
        for name in names:
            if name.endswith((".json", ".jsonl")):
                try:
                    stat = os.stat(os.path.join(directory, name))
                except FileNotFoundError:  # replaced meanwhile
                    continue
                found.add((directory, name, stat.st_mtime_ns, stat.st_size))
    return found


def parse_args(argv):
    p = cli.parser(__doc__)
    p.add_argument("results_dir", nargs="?", default="results")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is B better than A?")
    p.add_argument("--examples", type=int, default=10, help="changed examples to list (10)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    p.add_argument("--out", help="folder of report.html, .csv and .md; default: RESULTS_DIR")
    p.add_argument("--no-html", action="store_true")
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
    cli.check_seconds(p, args, "watch")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        pairs = pairs_of(*args.compare)
        texts = [compare_text(a, b, compare(a, b, args.examples, args.seed)) for a, b in pairs]
        print("\n\n".join(texts))
        return
    out_dir = args.out or args.results_dir
    options = {"html": not args.no_html, "sort": args.sort, "rows": args.rows}
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

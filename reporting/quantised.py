"""Quality over bytes: a model under several rules of quantisation, against itself in full.

    for family in families_of(found["ok"]):         # a model's records under one protocol
        table_of_family(family)                     # as tables.terminal and tables.markdown take it
    tables_of_rules(families)                   # all evaluations of a model in one table
    pareto(family, "loss")                          # rows that none both smaller and better beats

A record says how its weights are quantised in its protocol, if a rule rounded them as they were
loaded, or in its checkpoint, if they lie so in its files; one that says nothing has them in the
dtype of its protocol. Bytes are those of all weights: of what a file has not quantised, in 16 bits.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from cli import printable
from config import GPTConfig
from costs.flops import count_parameters
from durable import dumps
from recording.identity import config_hash
from reporting.compare import (
    Examples,
    are_verdicts,
    check_pair,
    difference_to,
    examples_of,
    verdicts_changed,
)
from reporting.groups import (
    Record,
    lower_is_better,
    metric_names,
    number,
    real,
    title_of,
    triple,
    units_of,
    value_of,
)

# of a protocol: what two rules may differ in, and are compared all the same
APART: tuple[str, ...] = (
    "quantisation",
    "packing",
    "tokenizer",
    "tokenizer_fingerprint",
    "compiled",
    "batch_size",
)
APART += ("batch_tokens", "dtype")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REST_BYTES = 2


class Weights(NamedTuple):
    """How a record's weights lay in memory: the rule, bytes of all of them, bits of one. full:
    whether that is the model's own precision."""

    rule: str
    bytes: float
    bits: float
    full: bool


@dataclass
class Family:
    """A model's records under one protocol, the largest weights first: that is the base."""

    records: list[Record] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)

    @property
    def base(self) -> Record:
        return self.records[0]


def weights_of(record: Record) -> Weights | None:
    """None where a record does not say enough."""
    of_rule = record["protocol"].get("quantisation")
    of_file = record["checkpoint"].get("quantisation")
    if isinstance(of_rule, dict):
        held = [real(of_rule.get(name)) for name in ("weight_bytes", "bits_per_weight")]
        if None in held:
            return None
        full = bool(held[1] and held[1] >= 16)
        return Weights(printable(of_rule.get("rule")), held[0] or 0, held[1] or 0, full)
    n_all = _parameters(dumps(record["checkpoint"].get("config"), sort_keys=True))
    if n_all is None:
        return None
    if isinstance(of_file, dict):
        size, bits = (real(of_file.get(name)) for name in ("weight_bytes", "bits_per_weight"))
        if not size or not bits:
            return None
        whole = size + REST_BYTES * max(0.0, n_all - 8 * size / bits)
        return Weights(printable(of_file.get("rule")), whole, 8 * whole / n_all, False)
    dtype = record["protocol"].get("dtype")
    if dtype not in DTYPE_BYTES:
        return None
    size = DTYPE_BYTES[dtype]
    return Weights(dtype, size * n_all, 8 * size, True)


@functools.cache
def _parameters(config: str) -> int | None:
    """Of a config as JSON; None of one that is not ours."""
    known, given = {f.name for f in fields(GPTConfig)}, json.loads(config)
    if not isinstance(given, dict):
        return None
    try:
        kept = {name: value for name, value in given.items() if name in known}
        return count_parameters(GPTConfig(**kept))["total"]
    except (ValueError, TypeError, AssertionError):  # as a later or an older version wrote it
        return None


def families_of(records: Iterable[Record]) -> list[Family]:
    """Those that hold a quantised record and another. Files that others quantised are compared with
    every model of their shape, for they do not say which they were made of."""
    records, shapes = list(records), {}
    if not any(_is_quantised(record) for record in records):
        return []
    for record in records:
        weights = weights_of(record)
        if weights is not None:
            shapes.setdefault(_work_of(record), []).append((record, weights))
    found = []
    for each in shapes.values():
        files = [pair for pair in each if pair[0]["checkpoint"].get("quantisation")]
        models: dict[str, list] = {}
        for pair in each:
            if not pair[0]["checkpoint"].get("quantisation"):
                models.setdefault(str(pair[0]["checkpoint"].get("fingerprint")), []).append(pair)
        for mine in models.values() or [files]:
            pairs = mine + files if mine is not files else files
            pairs.sort(key=lambda pair: -pair[1].bytes)
            if len(pairs) > 1 and not all(weights.full for _, weights in pairs):
                found.append(Family(*map(list, zip(*pairs))))
    return sorted(found, key=lambda family: _title(family))


def _is_quantised(record: Record) -> bool:
    return "quantisation" in record["protocol"] or "quantisation" in record["checkpoint"]


def _work_of(record: Record) -> str:
    """What two records of a family have in common: the work, and the model's shape."""
    protocol = {k: v for k, v in record["protocol"].items() if k not in APART}
    reference = protocol.get("reference")
    if isinstance(reference, dict):
        protocol["reference"] = [reference.get("fingerprint"), reference.get("dtype")]
    config, data = record["checkpoint"].get("config"), record["data"].get("hash")
    return config_hash({"work": [record["evaluation"], protocol, config, data]})


def _title(family: Family) -> str:
    common = [w for w in family.base["words"] if all(w in r["words"] for r in family.records)]
    run, name = family.base["run"], family.base["checkpoint"].get("name")
    title = title_of([family.base | {"words": common}])
    return f"Quality over bytes: {printable(run)}/{printable(name)} · {title}"


# ---------------------------------------------------------------------------------------------
# As a table


def table_of_family(family: Family) -> dict:
    """{title, header, rows, best, notes} as tables.table_of's: the first metric with its paired
    difference from the base, the others, and for answers that are right or wrong the flips."""
    names = metric_names(family.records)
    base = family.base
    examples = _examples(base)
    units, primary = units_of(family.records), names[0]
    verdicts = _verdicts(examples, primary)
    header = ["checkpoint", "rule", "MB", "bits", printable(primary), "Δ to the first [95%]"]
    header += [*map(printable, names[1:]), *(["flips − +", "p"] if verdicts else [])]
    rows, best = [], set()
    front = pareto(family, primary)
    for i, (record, weights) in enumerate(zip(family.records, family.weights)):
        row = [printable(record["checkpoint"].get("name")), weights.rule]
        row += [f"{weights.bytes / 1e6:,.1f}", f"{weights.bits:.2f}"]
        for name in names:
            value, stderr, _ = triple(record["metrics"].get(name))
            row.append(_number(value, units.get(name)))
            if name == primary:
                row[-1] += "" if stderr is None else f" ±{_number(stderr, units.get(name))}"
                found = None if i == 0 else difference_to(base, record, primary, examples)
                row.append("" if found is None else _interval(found))
        row += _flips(base, record, examples, primary) if verdicts else []
        if i in front:
            best.add((i, 4))
        rows.append(row)
    notes = ["* no other is both smaller and better; Δ is paired by example, ~ where it is not"]
    if verdicts:
        notes.append("flips: right to wrong, wrong to right, against the first; p: McNemar, exact")
    return {"title": _title(family), "header": header, "rows": rows, "best": best, "notes": notes}


# Of each evaluation, beside its first metric
OF_ALL = ("perplexity", "bits_per_byte", "kl", "same_top")


def tables_of_rules(families: Iterable[Family]) -> list[dict]:
    """For each model that was asked by several evaluations, a row for each rule: bytes as the rule
    stores them and as they were measured in memory, the chief metrics of all, and their speeds."""
    models: dict[str, list[Family]] = {}
    for family in families:
        base = family.base
        of = [base["run"], base["checkpoint"].get("name"), base["checkpoint"].get("fingerprint")]
        models.setdefault(json.dumps(of), []).append(family)
    return [_of_rules(found) for found in models.values() if len(found) > 1]


def _of_rules(families: list[Family]) -> dict:
    header, rows = ["checkpoint", "rule", "MB", "MB in memory", "bits"], {}
    for key, record, weights in (each for family in families for each in _rows_of(family)):
        held = [f"{weights.bytes / 1e6:,.1f}", _memory(record), f"{weights.bits:.2f}"]
        rows.setdefault(key, [*key, *held])
    for family in families:
        names, units = metric_names(family.records), units_of(family.records)
        names = [names[0], *(name for name in OF_ALL if name in names[1:])]
        evaluation = printable(family.base["evaluation"])
        header += [f"{evaluation}: {printable(name)}" for name in (*names, "tokens/s")]
        records = {key: record for key, record, _ in _rows_of(family)}
        for key, row in rows.items():
            record = records.get(key) or {"metrics": {}, "cost": {}}
            values = [triple(record["metrics"].get(name))[0] for name in names]
            row += [_number(v, units.get(name)) for v, name in zip(values, names, strict=True)]
            rate = real(record["cost"].get("tokens_per_second"))
            row.append("" if rate is None else f"{rate:,.0f}")
    base = families[0].base
    of = f"{printable(base['run'])}/{printable(base['checkpoint'].get('name'))}"
    title = f"Rules of quantisation: {of}"
    return {"title": title, "header": header, "rows": [*rows.values()], "best": [], "notes": []}


def _rows_of(family: Family) -> Iterator[tuple[tuple[str, str], Record, Weights]]:
    """((checkpoint, rule), record, weights) of each."""
    for record, weights in zip(family.records, family.weights):
        yield (printable(record["checkpoint"].get("name")), weights.rule), record, weights


def _memory(record: Record) -> str:
    """Bytes of the weights as they lay in memory, where they were measured."""
    for how in ("quantisation", "packing"):
        said = record["protocol"].get(how)
        size = real(said.get("memory_bytes")) if isinstance(said, dict) else None
        if size is not None:
            return f"{size / 1e6:,.1f}"
    return ""


def _number(value: float | int | None, unit: str | None) -> str:
    """As elsewhere, but that small divergences keep their digits."""
    small = isinstance(value, float) and 0 < abs(value) < 0.01 and unit != "share"
    return f"{value:.2e}" if small else number(value)


def _interval(found: tuple[float, float, float, bool]) -> str:
    difference, low, high, paired = found
    mark = "" if paired else "~"
    interval = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else ""
    return f"{mark}{difference:+.4f}{interval}"


def _examples(record: Record) -> Examples | None:
    try:
        return examples_of(record)
    except ValueError:
        return None


def _verdicts(examples: Examples | None, name: str) -> bool:
    if examples is None or name not in examples.scores or examples.weight is not None:
        return False
    return are_verdicts(examples.scores[name], examples.scores[name])


def _flips(base: Record, record: Record, examples: Examples | None, name: str) -> list[str]:
    if record is base or examples is None:
        return ["", ""]
    try:
        theirs = examples_of(record)
        check_pair(base, record, examples, theirs)
        found = verdicts_changed(examples, theirs, name, lower_is_better([base], name))
    except (ValueError, KeyError):
        return ["–", "–"]
    return [f"{found['right_to_wrong']} {found['wrong_to_right']}", f"{found['p']:.2g}"]


def pareto(family: Family, name: str) -> list[int]:
    """Places of the records that no other beats in bytes without losing quality by a metric."""
    sign = 1 if lower_is_better(family.records, name) else -1
    points = [
        (weights.bytes, sign * value, i)
        for i, (record, weights) in enumerate(zip(family.records, family.weights))
        if (value := value_of(record, name)) is not None
    ]
    kept, best = [], math.inf
    for _, value, i in sorted(points):
        if value < best:
            kept.append(i)
            best = value
    return sorted(kept)


# ---------------------------------------------------------------------------------------------
# As the page's data


def data_of(family: Family) -> dict[str, Any]:
    """What the page draws: for each metric values and standard errors over bytes."""
    names = metric_names(family.records)
    columns = {name: [triple(r["metrics"].get(name)) for r in family.records] for name in names}
    return {
        "title": _title(family).removeprefix("Quality over bytes: "),
        "name": [str(r["checkpoint"].get("name")) for r in family.records],
        "rule": [weights.rule for weights in family.weights],
        "bytes": [weights.bytes for weights in family.weights],
        "bits": [weights.bits for weights in family.weights],
        "metrics": {
            name: {"v": [t[0] for t in found], "e": [t[1] for t in found]}
            for name, found in columns.items()
        },
        "lower": [name for name in names if lower_is_better(family.records, name)],
        "units": units_of(family.records),
        "front": {name: pareto(family, name) for name in names},
    }

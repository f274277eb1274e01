"""What was measured: how a result is written, named and found again.

    metrics = {"loss": metric(3.1, stderr=0.02, n=512, better="lower", unit="nats per token")}
    record = new_record("perplexity", metrics, protocol, run="gpt2", checkpoint={...}, ...)
    path = save_record("results", record, arrays={"nll": nll, "count": count})
    records = load_records("results")

    import glob, json, pandas   # every record of a results directory as one table
    pandas.json_normalize([json.load(open(p)) for p in glob.glob("results/*/*/*.json")])

A record's schema is SCHEMA below: it says itself what its numbers are, so that whoever tables,
compares, draws or exports it need not know the evaluation. What the numbers mean is stats.py's; how
files survive a crash, durable.py's; which code made them, recording/sources.py's; what tells two
records apart, and where they lie, recording/identity.py's. Standard library and numpy only.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import cli
from durable import dumps, encode, write_atomic, write_json
from recording.identity import config_hash, record_path, resume_key
from recording.runs import walk
from recording.sources import (
    ROOT,
    code_commit,
    code_files,
    code_version,
    running_code,
    source_files,
)
from recording.version_1 import arrays_from_version_1, from_version_1
from stats import proportion_stderr

__all__ = ["ROOT", "SCHEMA", "SCHEMA_VERSION", "checkpoint_of", "code_files", "code_version"]
__all__ += ["config_hash", "data_words", "environment", "load_arrays", "load_record"]
__all__ += ["load_records", "load_samples", "metric", "new_record", "record_path", "resume_key"]
__all__ += ["running_code", "save_record", "scalars", "share", "source_files", "utc_now"]

SCHEMA_VERSION = 2
SCHEMA = """
One JSON object for each (checkpoint, evaluation, configuration), at
results/{run}/{checkpoint}-{fingerprint8}/{evaluation}-{config8}.json, with 16 more digits where
that is another record's place (recording/identity.py). Only a rerun of the same work, by newer
code perhaps, replaces a record. Strict JSON: NaN and infinities are null. Beside it, under the
same name: `.npz` (arrays, one row per example) and `.jsonl` (samples, one object per example), both
optional and written before the JSON.

schema_version  2
evaluation      "perplexity" | "mmlu" | "humaneval" | ...: any name
run             the training run that the checkpoint belongs to
status          "ok" | "failed"; failed: `reason` says why and metrics is empty
reason          null | one line
checkpoint      {path, name, step, tokens, fingerprint, config, module, base?, trained_over?,
                quantisation?}; step and tokens may be null; module is what ran it: "GPTModel" or
                "transformers"; base is {path, fingerprint} of the model that an adapter was merged
                into, trained_over the rule that its weights were rounded by while the adapter was
                trained, if any: they are merged as they lie on disk; quantisation of
                matrices that are quantised in the file, {rule, matrices, weight_bytes,
                bits_per_weight, method?, activations?}
metrics         {name: {value, stderr?, low?, high?, n?, better, unit?}}. The order matters: the
                first metric ranks the checkpoints. low and high: its 95% interval, where that is
                not value +- 1.96 stderr; n counts the examples behind the value; better is "lower"
                or "higher"; unit is "share" for what is shown in percent, else a text that follows
                the name ("nats per token"), or absent
examples        null | {unit, scores, statistics?, weight?, labels?, tie_break?}: the values that
                are kept for each example, for paired comparison. unit: what the examples are
                ("windows", "questions", "tasks"). scores: {metric: array of the .npz, a value an
                example}, whose mean is the metric; with weight, another array, it is sum(scores) /
                sum(weight). statistics: {metric: {score, arrays}}, of metrics that are no mean:
                `score` of resampling.py makes the metric of those arrays, side by side. labels:
                {name: format}: what an example is called, in this order; the name is an array's, or
                a field of the sample whose `id` is the example; the format holds one {} or {:,}.
                tie_break: {metric: array}: of examples whose score changed alike, those come first
                for which this moved most
words           the protocol in words, each a short text: "5-shot", "window 1024", "bfloat16".
                "...: not a score" marks a part of the set
breakdown       {dimension: {group: {name: metric as above, or a number}, or a number}}: by file,
                category, subject, task, ... Metrics keep the names they have above; whole numbers
                alone are counts of kinds (of failures, say); a dimension may also be a list of
                {low, high, n, confidence, accuracy}, the bins of a calibration, or of {coverage,
                risk, threshold}, the errors among the most confident answers
protocol        how it was obtained: window, stride, bos, template, template_hash, shots, dtype,
                seed, batch_size, compiled, truncated, limit, sandbox tier, quantisation {rule,
                embeddings, skip, weight_bytes, bits_per_weight, memory_bytes, packed?,
                dequantised?} where weights were rounded: bytes as the rule stores them and as
                they lay in memory, and how many of its matrices lay there in which way, ...
data            {files, hash, tokens, bytes}
cost            {seconds, tokens_per_second, mfu, peak_memory_bytes, gpu, world_size, shard}; shard:
                ranks that held one model between them, where several did
environment     {time, python, packages, code}: UTC, versions, commit; nothing about the host
config_hash     sha256 of the configuration asked for (the protocol, where none was given)
code_version    sha256 of the sources that the evaluation imports, or null
resume_key      sha256 of (fingerprint, model's config, evaluation, config_hash, data.hash,
                code_version)
files           {arrays: {name, sha256}, samples: {name, sha256}}: what lies beside the JSON

Version 1 had no better, unit, examples and words, and metrics could be plain numbers. Such records
are read as version 2 (recording/version_1.py) and never rewritten.

Beside the records of one checkpoint, {evaluation}-differences-{hash8 of their names}.jsonl may hold
the examples that several of them answer differently: `id`, fields that say which example it is
(`where` is a place in a file), and under names with a slash ("lm_eval/letter") what each answered.
"""


# ---------------------------------------------------------------------------------------------
# Metrics

BETTER = ("lower", "higher")


def metric(
    value: float,
    stderr: float | None = None,
    n: int | None = None,
    better: str = "higher",
    unit: str | None = None,
) -> dict:
    """A metric as SCHEMA has it; what is None is left out."""
    assert better in BETTER, f"better is 'lower' or 'higher', not {better!r}"
    optional = {"stderr": stderr, "n": n}
    given = {name: number for name, number in optional.items() if number is not None}
    return {"value": value, **given, "better": better, **({"unit": unit} if unit else {})}


def share(count: int, n: int, better: str = "higher") -> dict:
    """The metric of `count` examples out of n, with the standard error of a proportion."""
    p = count / n
    return metric(p, proportion_stderr(p, n), n, better, "share")


def data_words(data: Mapping[str, Any]) -> list[str]:
    """What a record's words may say of its data: how many tokens, and the file or how many."""
    data = data if isinstance(data, dict) else {}
    tokens, files, words = data.get("tokens"), data.get("files"), []
    if isinstance(tokens, int):
        words.append(f"{tokens:,} tokens")
    if isinstance(files, list) and files:
        words.append(os.path.basename(str(files[0])) if len(files) == 1 else f"{len(files)} files")
    return words


# ---------------------------------------------------------------------------------------------
# Records


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment() -> dict:
    """What the numbers were made with; nothing that names the host. Imports nothing."""
    packages = {}
    for name in ("torch", "transformers", "numpy", "tokenizers", "tiktoken", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "time": utc_now(),
        "python": platform.python_version(),
        "packages": packages,
        "code": code_commit(),
    }


IN_MEMORY = {"name": "in-memory", "fingerprint": "0" * 16}  # a model that came from no file


def checkpoint_of(info: Mapping[str, Any] | Callable[[], Any] | None) -> dict:
    """What a record says of its checkpoint: `info`, what it gives if it is a function (hashing goes
    on meanwhile), or IN_MEMORY if it is None."""
    return dict((info() if callable(info) else info) or IN_MEMORY)


def new_record(
    evaluation: str,
    metrics: dict[str, dict],
    protocol: dict,
    *,
    run: str,
    checkpoint: Mapping[str, Any] | Callable[[], Any] | None,
    configuration: dict | None = None,
    examples: dict | None = None,
    words: Sequence[str] = (),
    data: dict | None = None,
    cost: dict | None = None,
    breakdown: dict | None = None,
    code: str | None = None,
    status: str = "ok",
    reason: str | None = None,
) -> dict:
    """A record as SCHEMA has it; each argument is one of its fields. `metrics` are made by `metric`
    and `share`. `configuration` is what was asked for, where the protocol also says what came of it
    (a batch halved for memory); `checkpoint` is what `checkpoint_of` takes; `code` is
    `code_version(__file__)`."""
    fields = ("path", "name", "step", "tokens", "fingerprint", "config", "module")
    checkpoint = dict.fromkeys(fields) | checkpoint_of(checkpoint)
    assert checkpoint["name"] and checkpoint["fingerprint"], f"unnamed checkpoint {checkpoint}"
    data = data or {}
    hashed = config_hash(protocol if configuration is None else configuration)
    key = resume_key(checkpoint, evaluation, hashed, data.get("hash"), code)
    record = {
        "schema_version": SCHEMA_VERSION,
        "evaluation": evaluation,
        "run": run,
        "status": status,
        "reason": reason,
        "checkpoint": checkpoint,
        "metrics": metrics,
        "examples": examples,
        "words": list(words),
        "breakdown": breakdown or {},
        "protocol": protocol,
        "data": data,
        "cost": cost or {},
        "environment": environment(),
        "config_hash": hashed,
        "code_version": code,
        "resume_key": key,
        "files": {},
    }
    wrong = _wrong_field(record)
    assert not wrong, wrong
    return record


def save_record(
    results_dir: str | Path,
    record: dict,
    arrays: Mapping[str, Any] | None = None,
    samples: Iterable[dict] | None = None,
) -> Path:
    """Write a record, and beside it `arrays` ({name: array}) as .npz and `samples` (an iterable of
    dicts) as .jsonl. The JSON comes last and holds their hashes, so it never vouches for files
    that are not whole. Returns the JSON's path."""
    path, files = record_path(results_dir, record), {}
    if arrays:
        buffer = io.BytesIO()
        plain = {name: np.asarray(array) for name, array in arrays.items()}
        np.savez_compressed(buffer, **plain)  # type: ignore[arg-type]  # taken for allow_pickle
        files["arrays"] = _save_beside(path, ".npz", buffer.getvalue())
    if samples is not None:
        text = "".join(dumps(sample) + "\n" for sample in samples)
        files["samples"] = _save_beside(path, ".jsonl", encode(text))
    stored = {key: value for key, value in record.items() if not key.startswith("_")}
    write_json(path, stored | {"files": files})
    return path


def _save_beside(path: Path, suffix: str, data: bytes) -> dict:
    path = path.with_suffix(suffix)
    write_atomic(path, data)
    return {"name": path.name, "sha256": hashlib.sha256(data).hexdigest()}


# ---------------------------------------------------------------------------------------------
# Reading

REQUIRED = {"schema_version", "evaluation", "run", "status"}
OBJECTS = ("checkpoint", "metrics", "protocol", "data", "cost", "breakdown", "environment", "files")
TEXTS: tuple[str, ...] = ("evaluation", "run", "status", "config_hash", "code_version")
TEXTS += ("resume_key", "checkpoint.name", "checkpoint.path", "data.hash")
LABEL = re.compile(r"[^{}]*\{(:,)?\}[^{}]*")  # a format that can do nothing else


def _wrong_field(record: dict) -> str | None:
    """The first field that is not as SCHEMA has it, in a line; None where all are."""
    for name in OBJECTS:
        if not isinstance(record[name], dict):
            return f"field {name!r} must be an object, not {record[name]!r:.60}"
    for name in TEXTS:
        within, _, key = name.rpartition(".")
        value = (record[within] if within else record).get(key)
        if not isinstance(value, str | None):
            return f"field {name!r} must be text, not {value!r:.60}"
    if record["status"] not in ("ok", "failed"):
        return f"field 'status' must be 'ok' or 'failed', not {record['status']!r:.60}"
    for name, value in record["metrics"].items():
        fields = value if isinstance(value, dict) else {}
        if "value" not in fields or fields.get("better") not in BETTER:
            return f"metric {name!r} must be an object with value and better, not {value!r:.60}"
    for kind, entry in record["files"].items():
        named = [entry.get(key) for key in ("name", "sha256")] if isinstance(entry, dict) else None
        if not _is_list_of_texts(named):
            return f"file of {kind} must be an object with name and sha256, not {entry!r:.60}"
    if not _is_list_of_texts(record["words"]):
        return f"field 'words' must be a list of texts, not {record['words']!r:.60}"
    examples = record["examples"]
    if examples is not None and not _are_examples(examples):
        return f"field 'examples' is not what the schema says: {examples!r:.200}"
    return None


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_examples(examples: Any) -> bool:
    if not isinstance(examples, dict) or not isinstance(examples.get("unit"), str):
        return False
    maps = [examples.get(name) or {} for name in ("scores", "labels", "tie_break")]
    texts = [text for m in maps for text in (m.values() if isinstance(m, dict) else [None])]
    labels = maps[1].values() if isinstance(maps[1], dict) else ()
    statistics = examples.get("statistics") or {}
    return (
        bool(maps[0] or statistics)
        and all(isinstance(text, str) for text in texts)
        and isinstance(statistics, dict)
        and all(map(_is_statistic, statistics.values()))
        and isinstance(examples.get("weight"), str | None)
        and all(LABEL.fullmatch(text) for text in labels)
    )


def _is_statistic(entry: Any) -> bool:
    score = entry.get("score") if isinstance(entry, dict) else None
    return isinstance(score, str) and _is_list_of_texts(entry.get("arrays"))


def load_record(path: str | Path) -> dict:
    """One record, as the present version has it; its place is added as `_path` and its version in
    the file as `_version`. ValueError when the file is not a record."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or not all of it: {error}") from None
    if not isinstance(record, dict) or any(record.get(name) is None for name in REQUIRED):
        raise ValueError(f"{path}: JSON, but no roseval record ({', '.join(sorted(REQUIRED))})")
    version = record["schema_version"]
    if version not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(
            f"{path}: schema version {version!r}; this roseval reads up to {SCHEMA_VERSION}: "
            "update it"
        )
    for name in OBJECTS:
        record.setdefault(name, {})
    record.setdefault("examples", None)
    record.setdefault("words", [])
    if version == 1:
        record = from_version_1(record, data_words(record["data"]))
    wrong = _wrong_field(record)
    if wrong:
        raise ValueError(f"{path}: {wrong}")
    return record | {"_path": str(path), "_version": version}


def load_records(results_dir: str | Path, skipped: list | None = None) -> list[dict]:
    """All records under a directory, in the order of their paths. A file that is no record is left
    out, and (path, reason) appended to `skipped`. Hidden files and folders are not looked at."""
    if not Path(results_dir).is_dir():
        raise ValueError(f"{results_dir}: no such directory of results")
    records = []
    for directory, names in walk(results_dir, skipped):
        exports = "results_" if "lm_eval" in directory.split(os.sep) else "."
        for name in names:
            if name.endswith(".json") and not name.startswith((".", exports)):
                path = os.path.join(directory, name)
                try:
                    records.append(load_record(path))
                except Exception as error:  # an edge: one file of many
                    if skipped is not None:
                        skipped.append((path, cli.reason_of(error)))
    return records


def _beside(record: dict, kind: str) -> bytes | None:
    entry = record["files"].get(kind)
    if not entry:
        return None
    path = Path(record["_path"]).with_name(entry["name"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the record's {kind} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path}: not the {kind} that {record['_path']} was written with")
    return data


def load_arrays(record: dict) -> dict[str, np.ndarray]:
    """The per-example arrays of a loaded record, {} if it has none. ValueError when the file is
    missing or is not the one that the record was written with."""
    data = _beside(record, "arrays")
    if data is None:
        return {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as npz:
            arrays = dict(npz)
    except Exception as error:  # zip, zlib and numpy have many kinds of it
        raise ValueError(f"{record['_path']}: its arrays cannot be read: {error}") from None
    return arrays if record["_version"] > 1 else arrays | arrays_from_version_1(record, arrays)


def load_samples(record: dict) -> list[dict]:
    """The samples of a loaded record, [] if it has none; errors as `load_arrays`."""
    data = _beside(record, "samples")
    samples = [json.loads(line) for line in data.split(b"\n") if line] if data else []
    return [sample for sample in samples if isinstance(sample, dict)]


def scalars(record: dict) -> dict[str, float]:
    """A record's numbers under stable flat names, for tables and trackers: "mmlu/accuracy",
    "mmlu/accuracy_stderr", "mmlu/category/stem/accuracy", "mmlu/cost/seconds"."""
    flat = {}

    def add(name, value):
        if isinstance(value, dict) and "value" in value:
            add(name, value["value"])
            add(f"{name}_stderr", value.get("stderr"))
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}/{key}", item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = value

    evaluation = record["evaluation"]
    add(evaluation, record["metrics"])
    add(evaluation, record.get("breakdown", {}))
    add(f"{evaluation}/cost", record.get("cost", {}))
    return flat

"""What was measured: how a result is written, named and found again.

    record = new_record("perplexity", metrics, protocol, run="gpt2", checkpoint={...}, ...)
    path = save_record("results", record, arrays={"nll": nll, "count": count})
    records = load_records("results")

    import glob, json, pandas   # every record of a results directory as one table
    pandas.json_normalize([json.load(open(p)) for p in glob.glob("results/*/*/*.json")])

A record's schema is SCHEMA below. What the numbers mean is stats.py's; how files survive a crash,
durable.py's. Standard library and numpy only.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from durable import dumps, encode, write_atomic, write_json

ROOT = Path(__file__).resolve().parent
SCHEMA_VERSION = 1
SCHEMA = """
One JSON object for each (checkpoint, evaluation, configuration), at
results/{run}/{checkpoint}-{fingerprint8}/{evaluation}-{config8}.json. Strict JSON: NaN and
infinities are null. Beside it, under the same name: `.npz` (arrays, one row per example) and
`.jsonl` (samples, one object per example), both optional and written before the JSON.

schema_version  1
evaluation      "perplexity" | "mmlu" | "humaneval" | ...
run             the training run that the checkpoint belongs to
status          "ok" | "failed"; failed: `reason` says why and metrics is empty
reason          null | one line
checkpoint      {path, name, step, tokens, fingerprint, config}; step and tokens may be null
metrics         {name: {value, stderr, n} | number}; n counts the examples behind the value.
                Names: loss, perplexity, bits_per_byte; accuracy, accuracy_macro, ece, brier;
                pass@1, pass@10, ...
breakdown       {dimension: {group: metrics as above, or a number}}: file, category, subject,
                letter, task, failure (kind: count), ...; `calibration` is a list of
                {low, high, n, confidence, accuracy}
protocol        how it was obtained: window, stride, bos, template, template_hash, shots, dtype,
                seed, batch_size, compiled, truncated, limit, sandbox tier, ...
data            {files, hash, tokens, bytes}
cost            {seconds, tokens_per_second, mfu, peak_memory_bytes, gpu, world_size}
environment     {time, python, packages, code}: UTC, versions, commit; nothing about the host
config_hash     sha256 of the configuration asked for (the protocol, where none was given)
code_version    sha256 of the sources that the evaluation imports, or null
resume_key      sha256 of (fingerprint, evaluation, config_hash, data.hash, code_version)
files           {arrays: {name, sha256}, samples: {name, sha256}}: what lies beside the JSON

Arrays by evaluation: perplexity `nll [windows]`, `count [windows]` (nats, scored tokens);
mmlu `correct [questions]`, `logprobs [questions, 4]`, `gold`, `subject_id`;
humaneval `n [tasks]`, `c [tasks]` (samples drawn, samples passed).
"""


# --- Records


def config_hash(configuration: dict) -> str:
    """sha256 of a configuration's canonical JSON: the order of keys does not matter."""
    text = dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encode(text)).hexdigest()


def resume_key(fingerprint, evaluation, configuration, data_hash, code) -> str:
    """sha256 that names one piece of work: the same key, the same numbers. File names, world
    size and time play no part. `configuration` is the dict or its `config_hash`."""
    if isinstance(configuration, dict):
        configuration = config_hash(configuration)
    return config_hash({"key": [fingerprint, evaluation, configuration, data_hash, code]})


# What an evaluation's numbers do not depend on: how flags are read and what is printed
WITHOUT_NUMBERS = ("cli.py",)
# A door to rooms of which one is entered: its imports of those are left to `chosen`
DOORS = {"checkpoint.py": "formats", "evaluation.py": "backends"}


def _imported_files(path: Path, root: Path):
    """The files below `root` that a source file imports, at its top or inside a function: `import
    a.b`, `from a import b` and `from a.b import c`, and the packages' own files that come first."""
    within = path.parent.relative_to(root).parts  # of a relative import
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(within[: len(within) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:depth])
                for candidate in (place.with_suffix(".py"), place / "__init__.py"):
                    if parts[0] and candidate.is_file():
                        yield candidate


def code_files(module_file, chosen=(), root: Path | None = None) -> list[Path]:
    """The sources that an evaluation's numbers depend on: its script and all that it imports,
    directly or not, below `root`, the script's own directory unless given. Of the formats and
    backends behind DOORS only `chosen` count, paths relative to `root`, where programs that are
    started instead of imported are named too. Read from the AST, so nothing is imported."""
    module_file = Path(module_file).resolve()
    root = root or module_file.parent
    seen, waiting = set(), [module_file, *(root / name for name in chosen)]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(root))
        if path in seen or name in WITHOUT_NUMBERS:
            continue
        seen.add(path)
        behind = root / DOORS[name] if name in DOORS else None
        waiting += [p for p in _imported_files(path, root) if p.parent != behind]
    return sorted(seen)


PRINTING = re.compile(r"show|(show|print)_\w+|main")


def _source_that_counts(path: Path) -> bytes:
    """A file without its functions that print (by their names, PRINTING) and what starts it."""
    source = path.read_bytes()
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source, str(path)).body:
        prints = isinstance(node, ast.FunctionDef) and PRINTING.fullmatch(node.name)
        starts = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if prints or starts:
            lines[node.lineno - 1 : node.end_lineno] = [b""] * (node.end_lineno - node.lineno + 1)
    return b"".join(lines)


def code_version(module_file, chosen=()) -> str:
    """sha256 of `code_files`, without what prints: an edited README, table or flag's help changes
    nothing, an edited score everything."""
    module_file = Path(module_file).resolve()
    digest = hashlib.sha256()
    for path in code_files(module_file, chosen):
        content = hashlib.sha256(_source_that_counts(path)).hexdigest()
        digest.update(f"{path.relative_to(module_file.parent)} {content}\n".encode())
    return digest.hexdigest()


running_code = functools.cache(code_version)  # the code that runs, whatever is edited meanwhile


def source_files() -> list[Path]:
    """Every script and room of the house, without tests, benchmarks and helpers of the shell."""
    rooms = [p.parent for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"]
    return sorted(p for folder in (ROOT, *rooms) for p in folder.glob("*.py"))


@functools.cache  # the code that runs is the code that was there at the start
def _code_commit() -> str:
    """`git:COMMIT`, with `-dirty` when tracked files differ from it; without git a hash of the
    scripts."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        out = None
    if out and out.returncode == 0:
        return "git:" + out.stdout.strip()
    return "sources:" + hashlib.sha256(b"".join(p.read_bytes() for p in source_files())).hexdigest()


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
        "code": _code_commit(),
    }


IN_MEMORY = {"name": "in-memory", "fingerprint": "0" * 16}  # a model that came from no file


def checkpoint_of(info) -> dict:
    """What a record says of its checkpoint: `info`, what it gives if it is a function (hashing goes
    on meanwhile), or IN_MEMORY if it is None."""
    return (info() if callable(info) else info) or IN_MEMORY


def metric(value, stderr=None, n=None, better: str = "higher") -> dict:
    """A metric as records hold it; n counts the examples behind it."""
    assert better in ("higher", "lower"), f"better {better!r}"
    found = {"value": value, "stderr": stderr, "n": n, "better": better}
    return {name: x for name, x in found.items() if name in ("value", "better") or x is not None}


def new_record(
    evaluation: str,
    metrics: dict,
    protocol: dict,
    *,
    run: str,
    checkpoint,
    configuration: dict | None = None,
    data: dict | None = None,
    cost: dict | None = None,
    breakdown: dict | None = None,
    code: str | None = None,
    status: str = "ok",
    reason: str | None = None,
    examples: dict | None = None,
    words=(),
) -> dict:
    """A record as SCHEMA has it. `configuration` is what was asked for, where the protocol also
    says what came of it (a batch halved for memory); `checkpoint` is what `checkpoint_of` takes;
    `code` is `code_version(__file__)`."""
    assert status in ("ok", "failed"), f"status {status!r} is neither 'ok' nor 'failed'"
    for name, value in metrics.items():
        assert not isinstance(value, dict) or "value" in value, (
            f"metric {name}: {value} lacks value"
        )
    fields = ("path", "name", "step", "tokens", "fingerprint", "config")
    checkpoint = dict.fromkeys(fields) | checkpoint_of(checkpoint)
    assert checkpoint["name"] and checkpoint["fingerprint"], f"unnamed checkpoint {checkpoint}"
    data = data or {}
    hashed = config_hash(protocol if configuration is None else configuration)
    key = resume_key(checkpoint["fingerprint"], evaluation, hashed, data.get("hash"), code)
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation": evaluation,
        "run": run,
        "status": status,
        "reason": reason,
        "checkpoint": checkpoint,
        "metrics": metrics,
        "breakdown": breakdown or {},
        "protocol": protocol,
        "data": data,
        "cost": cost or {},
        "environment": environment(),
        "config_hash": hashed,
        "code_version": code,
        "resume_key": key,
        "files": {},
        "examples": examples,
        "words": list(words),
    }


def _file_name(name) -> str:
    """A run's or checkpoint's name as one harmless path component."""
    name = re.sub(r"[^\w.+=-]+", "_", str(name)).lstrip(".")
    if not name:
        raise ValueError("a run or checkpoint needs a name with a letter or digit in it")
    return name


def record_path(results_dir, run, checkpoint, fingerprint, evaluation, config) -> Path:
    """results/{run}/{checkpoint}-{fingerprint8}/{evaluation}-{config8}.json; `config` is a
    configuration's `config_hash`."""
    directory = f"{_file_name(checkpoint)}-{fingerprint[:8]}"
    name = f"{_file_name(evaluation)}-{config[:8]}.json"
    return Path(results_dir) / _file_name(run) / directory / name


def save_record(results_dir, record: dict, arrays=None, samples=None) -> Path:
    """Write a record, and beside it `arrays` ({name: array}) as .npz and `samples` (an iterable of
    dicts) as .jsonl. The JSON comes last and holds their hashes, so it never vouches for files
    that are not whole. Returns the JSON's path."""
    checkpoint = record["checkpoint"]
    path = record_path(
        results_dir,
        record["run"],
        checkpoint["name"],
        checkpoint["fingerprint"],
        record["evaluation"],
        record["config_hash"],
    )
    files = {}
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: np.asarray(array) for name, array in arrays.items()})
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


REQUIRED = {"schema_version", "evaluation", "run", "status"}
OBJECTS = ("checkpoint", "metrics", "protocol", "data", "cost", "breakdown", "environment", "files")
TEXTS = ("evaluation", "run", "status", "config_hash", "code_version", "resume_key")
TEXTS += ("checkpoint.name", "checkpoint.path", "data.hash")


def load_record(path) -> dict:
    """One record; its place is added as `_path`. ValueError when the file is not a record."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or not all of it: {error}") from None
    if not isinstance(record, dict) or any(record.get(name) is None for name in REQUIRED):
        raise ValueError(f"{path}: JSON, but no roseval record ({', '.join(sorted(REQUIRED))})")
    if record["schema_version"] not in range(1, SCHEMA_VERSION + 1):
        raise ValueError(
            f"{path}: schema version {record['schema_version']!r}; this roseval reads up to "
            f"{SCHEMA_VERSION}: update it"
        )
    for name in OBJECTS:
        if not isinstance(record.setdefault(name, {}), dict):
            raise ValueError(f"{path}: field {name!r} must be an object, not {record[name]!r:.60}")
    for name in TEXTS:
        within, _, key = name.rpartition(".")
        value = (record[within] if within else record).get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"{path}: field {name!r} must be text, not {value!r:.60}")
    return record | {"_path": str(path)}


def load_records(results_dir, skipped: list | None = None) -> list[dict]:
    """All records under a directory, in the order of their paths. A file that is no record is left
    out, and (path, reason) appended to `skipped`. Hidden files and folders are not looked at."""
    results_dir = Path(results_dir)
    if not results_dir.is_dir():
        raise ValueError(f"{results_dir}: no such directory of results")
    records = []
    for directory, folders, names in os.walk(results_dir):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "lm_eval")
        for name in sorted(names):
            if name.endswith(".json") and not name.startswith("."):
                path = os.path.join(directory, name)
                try:
                    records.append(load_record(path))
                except (OSError, ValueError) as error:
                    if skipped is not None:
                        skipped.append((path, str(error)))
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


def load_arrays(record: dict) -> dict:
    """The per-example arrays of a loaded record, {} if it has none. ValueError when the file is
    missing or is not the one that the record was written with."""
    data = _beside(record, "arrays")
    if data is None:
        return {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def load_samples(record: dict) -> list[dict]:
    """The samples of a loaded record, [] if it has none; errors as `load_arrays`."""
    data = _beside(record, "samples")
    return [json.loads(line) for line in data.split(b"\n") if line] if data else []


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


LM_EVAL_NAMES = {"accuracy": "acc", "accuracy_normalised": "acc_norm"}
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "ece", "brier", "ties")


def to_lm_eval(record: dict) -> dict:
    """A record in the shape of lm-eval's results_*.json (0.4): one task for the evaluation and one
    for each category, subject or file that has metrics of its own. Keep such files out of the
    records' own folders (in `lm_eval/`, say), where they would count as unreadable records."""
    task, protocol, checkpoint = record["evaluation"], record["protocol"], record["checkpoint"]
    tasks = {task: record["metrics"]}
    for dimension in ("category", "subject", "file"):
        groups = record["breakdown"].get(dimension)
        for group, metrics in groups.items() if isinstance(groups, dict) else ():
            if isinstance(metrics, dict):
                tasks[f"{task}_{group}"] = metrics
    environment = record["environment"]
    return {
        "results": {name: _lm_eval_task(name, metrics) for name, metrics in tasks.items()},
        "group_subtasks": {task: [name for name in tasks if name != task]},
        "configs": {name: {"task": name, "metadata": protocol} for name in tasks},
        "versions": dict.fromkeys(tasks, record["schema_version"]),
        "n-shot": dict.fromkeys(tasks, protocol.get("shots") or 0),
        "higher_is_better": {
            name: {LM_EVAL_NAMES.get(m, m): m not in LOWER_IS_BETTER for m in metrics}
            for name, metrics in tasks.items()
        },
        "n-samples": {name: _lm_eval_count(metrics) for name, metrics in tasks.items()},
        "config": {
            "model": "roseval",
            "model_args": f"pretrained={checkpoint.get('path')}",
            "model_dtype": protocol.get("dtype"),
            "model_sha": checkpoint.get("fingerprint"),
            "batch_size": protocol.get("batch_size"),
            "limit": protocol.get("limit"),
            "random_seed": protocol.get("seed"),
        },
        "git_hash": environment.get("code"),
        "date": _timestamp(environment.get("time")),
        "transformers_version": (environment.get("packages") or {}).get("transformers"),
        "model_source": "roseval",
        "model_name": checkpoint.get("name"),
        "total_evaluation_time_seconds": str(record["cost"].get("seconds")),
    }


def _timestamp(time) -> float | None:
    """Of `utc_now`'s text."""
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(time).timestamp()


def _lm_eval_task(alias: str, metrics: dict) -> dict:
    """lm-eval's keys are "name,filter" and "name_stderr,filter"."""
    out = {"alias": alias}
    for name, metric in metrics.items():
        name = LM_EVAL_NAMES.get(name, name)
        metric = metric if isinstance(metric, dict) else {"value": metric}
        out[f"{name},none"] = metric.get("value")
        stderr = metric.get("stderr")
        out[f"{name}_stderr,none"] = "N/A" if stderr is None else stderr
    return out


def _lm_eval_count(metrics: dict) -> dict:
    counts = [m["n"] for m in metrics.values() if isinstance(m, dict) and type(m.get("n")) is int]
    return dict.fromkeys(("original", "effective"), max(counts, default=0))

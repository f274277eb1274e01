"""What was measured: how a result is written, named, found again, and what its numbers mean.

    record = new_record("perplexity", metrics, protocol, run="gpt2", checkpoint={...}, ...)
    path = save_record("results", record, arrays={"nll": nll, "count": count})
    records = load_records("results")

    import glob, json, pandas   # every record of a results directory as one table
    pandas.json_normalize([json.load(open(p)) for p in glob.glob("results/*/*/*.json")])

Three parts, in this order: files that survive a crash (`write_atomic`, `Journal`), records
(the schema is SCHEMA below), and statistics. Standard library and numpy only.
"""

import ast
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist

import numpy as np

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


# --- Files that survive a crash


def _plain(value):
    """numpy, tuples and paths as JSON has them; NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def dumps(obj, **options) -> str:
    """Strict JSON text. NaN and infinities become null: one undefined standard error must not cost
    the hours that the rest of a record took."""
    return json.dumps(_plain(obj), ensure_ascii=False, allow_nan=False, **options)


def fsync(path: Path) -> None:
    """A file or a directory to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems' directories cannot be synced
            raise
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _encode(text: str) -> bytes:
    # A lone surrogate (a model's broken output) becomes \\udxxx, JSON's own escape for it.
    return text.encode(errors="backslashreplace")


def _make_directories(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        fsync(directory.parent)


def write_atomic(path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old one or the whole new
    one: temporary in the same directory, fsync, rename, fsync of the directory. Parents are made.
    OSError, in one line that names `path`, when it cannot; then no partial file is left."""
    path = Path(path)
    data = _encode(data) if isinstance(data, str) else data
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _make_directories(path.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _write_error(error, path) from None
        raise


def _write_error(error: OSError, path: Path) -> OSError:
    number = error.errno or errno.EIO
    return OSError(number, f"{os.strerror(number)}; nothing was written", str(path))


def write_json(path, obj) -> None:
    """`write_atomic` of strict, indented JSON (see `dumps`)."""
    write_atomic(path, dumps(obj, indent=2) + "\n")


def _frame(record) -> bytes:
    payload = _encode(dumps(record, separators=(",", ":")))  # holds no newline
    return b"%08x %08x %s\n" % (len(payload), zlib.crc32(payload), payload)


def _unframe(line: bytes):
    payload = line[18:]
    if line[:18] != b"%08x %08x " % (len(payload), zlib.crc32(payload)):
        raise ValueError("length or checksum differ")
    return json.loads(payload)


def _scan(data: bytes):
    """(records, bad, end): the whole records, how many lines are not one, and where the last
    whole record ends."""
    *lines, torn = data.split(b"\n")
    records, bad, end, position = [], int(bool(torn)), 0, 0
    for line in lines:
        position += len(line) + 1
        try:
            records.append(_unframe(line))
            end = position
        except ValueError:
            bad += 1
    return records, bad, end


def read_journal(path) -> tuple[list, int]:
    """(records, bad): what `Journal` wrote, and how many lines were torn or damaged and skipped.
    A journal that does not exist is empty. Safe while a writer appends."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    return _scan(data)[:2]


class Journal:
    """Append-only file of JSON records that survives kill -9: one line a record, framed by length
    and crc32, one writer.

    Opening reads what is there into `records` (damaged lines counted in `bad`) and cuts the file
    after the last whole record, so that a torn line never swallows the next one. `append` hands
    the record to the kernel before it returns: a killed process loses nothing. It is on disk after
    at most `sync_seconds` of appending and at `close`: a power cut loses no more than that.
    ValueError when another process writes the same journal; OSError when the disk is full, and
    then the file ends with the last whole record.
    """

    def __init__(self, path, sync_seconds: float = 1.0):
        self.path, self.sync_seconds = Path(path), sync_seconds
        _make_directories(self.path.parent)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self.records, self.bad, self._end = _scan(self.path.read_bytes())
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            fsync(self.path.parent)
        except BaseException:
            os.close(self._fd)
            raise
        self._synced = time.monotonic()

    def _lock(self):
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another process is writing this journal; wait for it or end it"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a mount without locks
                raise

    def append(self, record) -> None:
        frame = _frame(record)
        try:
            os.lseek(self._fd, self._end, os.SEEK_SET)
            _write_all(self._fd, frame)
            if time.monotonic() - self._synced >= self.sync_seconds:
                self.sync()
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise _write_error(error, self.path) from None
        self._end += len(frame)

    def sync(self) -> None:
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# --- Records


def config_hash(configuration: dict) -> str:
    """sha256 of a configuration's canonical JSON: the order of keys does not matter."""
    text = dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(_encode(text)).hexdigest()


def resume_key(fingerprint, evaluation, configuration, data_hash, code) -> str:
    """sha256 that names one piece of work: the same key, the same numbers. File names, world
    size and time play no part. `configuration` is the dict or its `config_hash`."""
    if isinstance(configuration, dict):
        configuration = config_hash(configuration)
    return config_hash({"key": [fingerprint, evaluation, configuration, data_hash, code]})


def _imported_files(path: Path, root: Path):
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            candidate = root / (name.replace(".", "/") + ".py")
            if candidate.is_file():
                yield candidate


def code_version(module_file, extra=()) -> str:
    """sha256 of a script and of all it imports, directly or not, from the script's own directory;
    `extra` adds files that it uses without importing (a program it starts). Read from the AST, so
    nothing is imported, and an edited README changes nothing."""
    module_file = Path(module_file).resolve()
    root = module_file.parent
    seen, waiting = set(), [module_file, *(root / name for name in extra)]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting.extend(_imported_files(path, root))
    digest = hashlib.sha256()
    for path in sorted(seen):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


running_code = functools.cache(code_version)  # the code that runs, whatever is edited meanwhile


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
    return "sources:" + code_version(__file__, extra=[p.name for p in ROOT.glob("*.py")])


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


def new_record(
    evaluation: str,
    metrics: dict,
    protocol: dict,
    *,
    run: str,
    checkpoint: dict,
    configuration: dict | None = None,
    data: dict | None = None,
    cost: dict | None = None,
    breakdown: dict | None = None,
    code: str | None = None,
    status: str = "ok",
    reason: str | None = None,
) -> dict:
    """A record as SCHEMA has it. `configuration` is what was asked for, where the protocol also
    says what came of it (a batch halved for memory); `code` is `code_version(__file__)`."""
    assert status in ("ok", "failed"), f"status {status!r} is neither 'ok' nor 'failed'"
    for name, value in metrics.items():
        assert not isinstance(value, dict) or "value" in value, (
            f"metric {name}: {value} lacks value"
        )
    fields = ("path", "name", "step", "tokens", "fingerprint", "config")
    checkpoint = dict.fromkeys(fields) | checkpoint
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
        files["samples"] = _save_beside(path, ".jsonl", _encode(text))
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


# --- Statistics


def ratio_stderr(nll, count) -> float:
    """Standard error of the loss per token, sum(nll) / sum(count), with windows as clusters: tokens
    of one window are not independent, windows are taken to be. nll [n] nats, count [n] tokens.
    NaN for fewer than two windows. With count = 1 it is that of a plain mean.
    Source: the ratio estimator, Cochran, Sampling Techniques (1977), section 2.11 and chapter 6."""
    nll, count = np.asarray(nll, np.float64), np.asarray(count, np.float64)
    assert nll.shape == count.shape, f"nll {nll.shape} and count {count.shape} differ in shape"
    nll, count = nll[count > 0], count[count > 0]
    n = len(nll)
    if n < 2:
        return math.nan
    residual = nll - nll.sum() / count.sum() * count
    return float(math.sqrt(n / (n - 1) * (residual @ residual)) / count.sum())


def proportion_stderr(p: float, n: int) -> float:
    """Standard error of a share p of n right answers: sqrt(p(1-p)/(n-1)), the sample standard
    deviation over sqrt(n) as lm-eval reports it. NaN for n < 2."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def _mean(values):
    return values.mean(axis=-1)


def ratio(numerator, denominator):
    """sum / sum along the last axis, 0/0 = NaN: the statistic of a loss per token."""
    with np.errstate(invalid="ignore"):
        return numerator.sum(axis=-1) / denominator.sum(axis=-1)


def bootstrap_ci(values, statistic=_mean, n: int = 10_000, seed: int = 0, level: float = 0.95):
    """Percentile interval (low, high) from n resamples of the examples, drawn with replacement.

    values: an array [examples], or a tuple of such arrays that are resampled together (pairs, or
    nll and count). statistic: gets each array as [resamples, examples] and reduces the last axis.
    The same seed gives the same interval. (NaN, NaN) without examples.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13."""
    arrays = [np.asarray(a) for a in (values if isinstance(values, tuple) else (values,))]
    size = len(arrays[0])
    assert all(a.shape == (size,) for a in arrays), f"shapes {[a.shape for a in arrays]}"
    if size == 0:
        return math.nan, math.nan
    rng, drawn = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // size)  # 16 MB of indices at a time
    for start in range(0, n, step):
        index = rng.integers(size, size=(min(step, n - start), size), dtype=np.int32)
        drawn.append(statistic(*(a[index] for a in arrays)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t. Source: the expansion in 1/df, Abramowitz & Stegun 26.7.5; within
    0.1% for df >= 4 at p = 0.975, too small below (12% at df = 1)."""
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * df**4)
    )


def paired_difference(a, b, count=None, level: float = 0.95) -> dict:
    """How far b lies from a on the same examples: {difference, stderr, low, high, sd, n}.

    a, b [n]: scores, or with `count` [n] the summed nats of windows of that many tokens; then the
    difference is in nats per token. sd is per example: stderr * sqrt(n), for
    `examples_to_resolve`. The interval is Student's t; NaN for fewer than two examples.
    Source: Miller, Adding Error Bars to Evals (2024), section 4.2; ratios as in `ratio_stderr`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"a {a.shape} and b {b.shape} are not the same examples"
    count = np.ones_like(a) if count is None else np.asarray(count, np.float64)
    kept = count > 0
    n = int(kept.sum())
    difference = float(ratio((b - a)[kept], count[kept])) if n else math.nan
    stderr = ratio_stderr(b - a, count)
    margin = t_quantile((1 + level) / 2, n - 1) * stderr if n > 1 else math.nan
    return {
        "difference": difference,
        "stderr": stderr,
        "low": difference - margin,
        "high": difference + margin,
        "sd": stderr * math.sqrt(n),
        "n": n,
    }


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value that b and c, the examples that only one of two models got right, come
    from a fair coin: min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2), in exact integers.
    Source: McNemar, Psychometrika 12 (1947); the exact form, Fagerland et al. (2013)."""
    b, c = int(b), int(c)
    term, below = 1, 0  # C(b + c, i), and their sum up to min(b, c)
    for i in range(min(b, c) + 1):
        below += term
        term = term * (b + c - i) // (i + 1)
    return min(1.0, 2 * below / 2 ** (b + c))


def pass_at_k(n, c, k: int):
    """1 - C(n-c, k) / C(n, k) for each task: the chance that one of k samples, out of n drawn of
    which c passed, passes. n, c: integers or arrays [tasks]. ValueError when k exceeds an n.
    Computed as 1 - prod_{j<k} (n-c-j)/(n-j), which neither overflows nor loses digits.
    Source: Chen et al., Evaluating Large Language Models Trained on Code (2021), eq. 1."""
    n, c = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(c, np.int64))
    if k < 1:
        raise ValueError(f"pass@{k}: k must be at least 1")
    if np.any(n < k):
        raise ValueError(
            f"pass@{k} needs at least {k} samples of every task; {int((n < k).sum())} of {n.size} "
            f"have fewer, the least {int(n.min())}: draw more samples or ask for a smaller k"
        )
    assert np.all((c >= 0) & (c <= n)), f"c must lie in 0..n: c {c}, n {n}"
    none_passes = np.ones(n.shape)
    for j in range(k):
        none_passes *= np.maximum(n - c - j, 0) / (n - j)
    return 1 - none_passes if n.ndim else float(1 - none_passes)


def pass_at_k_summary(n, c, k: int) -> dict:
    """{value, stderr, n} over tasks: the mean of `pass_at_k` and the standard error of that mean,
    the tasks being a sample of all the tasks there could be (so it holds both the spread between
    tasks and that of the samples drawn). n, c [tasks]. Source: Miller (2024), sections 2.1, 3.1."""
    scores = np.atleast_1d(pass_at_k(n, c, k))
    if not len(scores):
        raise ValueError(f"pass@{k}: there are no tasks")
    stderr = float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan
    return {"value": float(scores.mean()), "stderr": stderr, "n": len(scores)}


def examples_to_resolve(diff: float, sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """How many paired examples a two-sided test at level alpha needs to see a difference `diff`
    with the given power, when single differences have standard deviation `sd`:
    ((z_{1-alpha/2} + z_power) sd / diff)^2, rounded up; infinite for diff = 0.
    Source: Miller (2024), section 5 (the usual sample size of a paired test)."""
    if not diff or not math.isfinite(sd):
        return math.inf
    z = NormalDist().inv_cdf
    return float(math.ceil(((z(1 - alpha / 2) + z(power)) * sd / diff) ** 2))


def calibration(probabilities, correct, bins: int = 10) -> dict:
    """Whether answers given with probability p are right p of the time.

    probabilities [n] of the answer given, correct [n] booleans. Returns {ece, brier, bins}: the
    expected calibration error over equal-width bins (low, high] weighted by their counts (Naeini
    et al. 2015; Guo et al. 2017), the mean of (p - correct)^2 (Brier 1950, of the top answer
    alone), and every bin that holds examples as {low, high, n, confidence, accuracy}."""
    p, correct = np.asarray(probabilities, np.float64), np.asarray(correct, np.float64)
    assert p.shape == correct.shape, f"probabilities {p.shape}, correct {correct.shape}"
    if not p.size:
        return {"ece": math.nan, "brier": math.nan, "bins": []}
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"calibration: probabilities must lie in 0..1, not {p.min()}..{p.max()}")
    index = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(index, minlength=bins)
    confidence = np.bincount(index, p, bins) / np.maximum(n, 1)
    accuracy = np.bincount(index, correct, bins) / np.maximum(n, 1)
    return {
        "ece": float(n @ np.abs(accuracy - confidence) / p.size),
        "brier": float(np.mean((p - correct) ** 2)),
        "bins": [
            {
                "low": i / bins,
                "high": (i + 1) / bins,
                "n": int(n[i]),
                "confidence": float(confidence[i]),
                "accuracy": float(accuracy[i]),
            }
            for i in np.flatnonzero(n).tolist()
        ],
    }

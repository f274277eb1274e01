"""What tells two results apart: the key of a piece of work, and the place of its record.

    key = resume_key(checkpoint, "mmlu", protocol, data_hash, code)     # the same key: done already
    path = record_path("results", record)   # where it lies, or will lie: never another one's place

Two results differ by their checkpoint's content, the config that its weights ran under, evaluation,
configuration and data; a record also by its run's and checkpoint's name. The code tells keys apart,
not records: a rerun with newer code replaces its predecessor, and nothing else does. Standard
library and numpy only.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from durable import dumps, encode, plain

NAME_BYTES = 180  # of a run's or checkpoint's name in a path; file systems take 255 with the rest


# ---------------------------------------------------------------------------------------------
# Keys


def config_hash(configuration: Mapping[str, Any]) -> str:
    """sha256 of a configuration's canonical JSON: the order of keys does not matter."""
    text = dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encode(text)).hexdigest()


def rows_hash(rows: Iterable[Any]) -> str:
    """sha256 of what is asked, as rows of plain values: the order counts."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def resume_key(
    checkpoint: Mapping[str, Any],
    evaluation: str,
    configuration: Mapping[str, Any] | str,
    data_hash: str | None,
    code: str | None,
) -> str:
    """sha256 that names one piece of work: the same key, the same numbers. File names, world
    size and time play no part. `checkpoint` is a record's; of it count the fingerprint and the
    config, which may have been given beside the files. `configuration` is the dict or its
    `config_hash`."""
    if not isinstance(configuration, str):
        configuration = config_hash(configuration)
    model = [checkpoint["fingerprint"], checkpoint.get("config")]
    return config_hash({"key": [*model, evaluation, configuration, data_hash, code]})


# ---------------------------------------------------------------------------------------------
# Places


def record_path(results_dir: str | Path, record: Mapping[str, Any]) -> Path:
    """results/{run}/{checkpoint}-{fingerprint8}/{evaluation}-{config8}.json, and where the record
    of other work lies there (a config corrected since, names that differ in case or in what paths
    cannot hold), {evaluation}-{config8}-{16 more}.json.

    Of the record these count: run, checkpoint, evaluation, config_hash, data, status.
    """
    checkpoint = record["checkpoint"]
    directory = f"{_file_name(checkpoint['name'])}-{checkpoint['fingerprint'][:8]}"
    name = f"{_file_name(record['evaluation'])}-{record['config_hash'][:8]}"
    place = run_directory(results_dir, record["run"]) / directory / f"{name}.json"
    work = config_hash({"work": [*_work_of(record), checkpoint.get("config")]})
    another = place.with_name(f"{name}-{work[:16]}.json")
    if _holds(another, record):
        return another
    return another if place.exists() and not _holds(place, record) else place


def run_directory(results_dir: str | Path, run: str) -> Path:
    """Where the records of a run lie."""
    return Path(results_dir) / _file_name(run)


def _work_of(record: Mapping[str, Any]) -> list:
    checkpoint, data = record["checkpoint"], record.get("data") or {}
    of_checkpoint = checkpoint.get("name"), checkpoint.get("fingerprint")
    about = record.get("run"), record.get("evaluation"), record.get("status", "ok")
    return [*about, *of_checkpoint, record.get("config_hash"), data.get("hash")]


def _holds(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a record of the same work lies there. A field that one of two configs lacks is
    younger than the code that wrote it, and had no effect then."""
    try:
        found = json.loads(path.read_bytes())
        same = _work_of(found) == _work_of(record)
        theirs = found["checkpoint"].get("config")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False  # nothing, or what we cannot read and so must not replace
    ours = plain(record["checkpoint"].get("config"))
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return same and ours == theirs
    return same and all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def _file_name(name: object) -> str:
    """A run's or checkpoint's name as one harmless path component."""
    short = str(name).encode(errors="replace")[:NAME_BYTES].decode(errors="ignore")
    return re.sub(r"[^\w.+=-]+", "_", short).lstrip(".") or "_"

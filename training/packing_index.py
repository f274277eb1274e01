"""Plans of packing on disk: made once, beside the data that they are of.

    write(path, plan, counts, about)        # whole or not at all
    plan, counts = read(path, about)        # ValueError if it is damaged, or of anything else

Two lines, the SHA-256 of all that follows it and JSON (what the plan is about, the counts, the
arrays' lengths), then the arrays, little-endian int64.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import durable
from training.packing import Counts, Plan

FORMAT = "roseval packing 1"
ARRAYS = ("starts", "lengths", "first", "after")
REMEDY = "remove it, and it is made anew, or name another with --packing-index FILE"


def write(path: Path, plan: Plan, counts: Counts, about: dict[str, Any]) -> None:
    """about: plain values that decide the plan, the data's fingerprint among them. ValueError where
    the file cannot be written."""
    arrays = [np.ascontiguousarray(getattr(plan, name), dtype="<i8") for name in ARRAYS]
    head = {
        "format": FORMAT,
        "about": about,
        "counts": dataclasses.asdict(counts),
        "seq_len": plan.seq_len,
        "lengths": [len(array) for array in arrays],
    }
    body = durable.encode(durable.dumps(head)) + b"\n" + b"".join(a.tobytes() for a in arrays)
    digest = hashlib.sha256(body).hexdigest().encode()
    try:
        durable.write_atomic(path, digest + b"\n" + body)
    except OSError as error:
        raise ValueError(
            f"{path}: the plan of packing cannot be written ({error.strerror}); name another place "
            "with --packing-index FILE"
        ) from None


def read(path: Path, about: dict[str, Any]) -> tuple[Plan, Counts]:
    """What `write` wrote under the same `about`. ValueError, in one line, for anything else."""
    digest, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: no plan of packing, or a damaged one; {REMEDY}")
    line, _, data = body.partition(b"\n")
    head = json.loads(line)
    theirs, about = (
        {"format": f} | a for f, a in ((head["format"], head["about"]), (FORMAT, about))
    )
    if theirs != about:
        keys = [key for key in theirs | about if theirs.get(key) != about.get(key)]
        what = "; ".join(
            f"{key}: {theirs.get(key)!s:.16} there, {about.get(key)!s:.16} here" for key in keys
        )
        raise ValueError(f"{path}: a plan of packing for something else ({what}); {REMEDY}")
    ends = np.cumsum(head["lengths"])[:-1]
    arrays = np.split(np.frombuffer(data, dtype="<i8").astype(np.int64), ends)
    return Plan(head["seq_len"], *arrays), Counts(**head["counts"])

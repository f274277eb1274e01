"""What the tests of sweep.py share: small data, a small run, a sweep of it and what came out."""

import json

import yaml
from builders import command, saved_checkpoint, small_humaneval, small_mmlu, token_shard

import results
import sweep

STEPS = (10, 20, 30)


def small_data(root):
    """root with x.npy, a small MMLU, problems.jsonl, and e.yaml that names the first two."""
    token_shard(root / "x.npy")
    small_mmlu(root / "mmlu", ["anatomy"])
    small_humaneval(root / "problems.jsonl")
    flags = {
        "perplexity": {"data-mode": "fineweb_npy", "val_npy": str(root / "x.npy"), "seq-len": 32},
        "mmlu": [{"data-path": str(root / "mmlu"), "num-few-shot": 1}],
    }
    (root / "e.yaml").write_text(yaml.safe_dump(flags))
    return root


def small_run(folder):
    """folder with checkpoints of three steps, to spoil at will"""
    for step in STEPS:
        saved_checkpoint(folder, step)
    return folder


def flags(run_dir, data, name="results", *more):
    argv = ["--device", "cpu", "--checkpoint-path", run_dir, "--evaluations", data / "e.yaml"]
    argv += ["--results-dir", run_dir.parent / name, "--poll-seconds", "0.1", *more]
    return [str(word) for word in argv]


def run_sweep(run_dir, data, *more, name="results"):
    """(exit code, records) of a sweep in this process."""
    code = 0
    try:
        sweep.main(flags(run_dir, data, name, *more))
    except SystemExit as stop:
        code = stop.code
    return code, results.load_records(run_dir.parent / name)


def numbers(records) -> dict:
    """{(checkpoint, evaluation): all that must be the same to the bit}; each there once."""
    found = {}
    for r in records:
        key = r["checkpoint"]["name"], r["evaluation"]
        assert key not in found, key
        arrays = {name: a.tobytes() for name, a in results.load_arrays(r).items()}
        found[key] = r["status"], r["resume_key"], json.dumps(r["metrics"]), arrays
    return found


def expected(steps=STEPS):
    return {(f"checkpoint-{s}", e) for s in steps for e in ("perplexity", "mmlu")}


def start_words(run_dir, data, *more, ranks=0, name="results"):
    return command(ranks, "sweep.py", *flags(run_dir, data, name, *more))

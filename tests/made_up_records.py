"""Records made up for the tests of what reads them: the report, the ledger, results.py itself."""

import base64
import gzip
import importlib.util
import json
from pathlib import Path

import builders
import numpy as np

import results
import stats

ROOT = Path(results.__file__).parent
VERSION_1 = ROOT / "tests/fixtures/version_1"  # written by the code that knew no other
HOSTILE = "</script><img src=x onerror=\"document.title='broken in'\"><b>&"
WINDOWS = {
    "unit": "windows",
    "scores": {"loss": "nll"},
    "weight": "count",
    "labels": {"start": "from token {:,}"},
}
QUESTIONS = {
    "unit": "questions",
    "scores": {"accuracy": "correct"},
    "labels": {"subject": "{}", "question": "{}"},
}


def page_parts(path):
    """(html, data) of a written page."""
    html = Path(path).read_text()
    start = html.index(">", html.index('<script type="application/gzip" id="data"')) + 1
    packed = base64.b64decode(html[start : html.index("</script>", start)])
    return html, json.loads(gzip.decompress(packed))


def make_record(**changes):
    """A small record of a four-choice set, with `changes`."""
    fields = {
        "evaluation": "mmlu",
        "metrics": {
            "accuracy": results.metric(0.5, 0.1, 26),
            "ece": results.metric(0.25, better="lower"),
        },
        "protocol": {"shots": 5, "dtype": "float32"},
        "run": "base",
        "checkpoint": {"name": "checkpoint-10", "step": 10, "fingerprint": "ab" * 32},
        "data": {"hash": "d" * 64},
        "cost": {"seconds": 2.0},
        "breakdown": {"category": {"stem": {"accuracy": {"value": 0.4, "stderr": None, "n": 9}}}},
        "code": "c" * 64,
    }
    fields.update(changes)
    return results.new_record(fields.pop("evaluation"), fields.pop("metrics"), **fields)


def save(
    directory, evaluation, metrics, arrays=None, *, run="base", step=1, samples=None, n=0, **more
):
    """Save a record and return its path. metrics: plain numbers are higher-is-better ones; n: tells
    two checkpoints of one run and step apart."""
    metrics = {
        name: value if isinstance(value, dict) else results.metric(value)
        for name, value in metrics.items()
    }
    fields = {"protocol": {"window": 8, "stride": 8}, "data": {"hash": "d" * 64}} | more
    fingerprint = results.config_hash({"run": run, "step": step, "n": n})
    name = f"checkpoint-{step}"
    checkpoint = {"name": name, "step": step, "fingerprint": fingerprint, "path": name}
    protocol = fields.pop("protocol")
    record = results.new_record(
        evaluation, metrics, protocol, run=run, checkpoint=checkpoint, **fields
    )
    return results.save_record(directory, record, arrays, samples)


def loss_record(directory, nll, count, **more):
    value, stderr = float(nll.sum() / count.sum()), stats.ratio_stderr(nll, count)
    metrics = {"loss": results.metric(value, stderr, len(nll), "lower", "nats per token")}
    arrays = {"nll": nll, "count": count, "start": np.arange(len(nll)) * 8}
    return save(directory, "perplexity", metrics, arrays, examples=WINDOWS, **more)


def answers_record(directory, correct, arrays=None, tie_break=None, **more):
    metrics = {"accuracy": results.share(int(correct.sum()), len(correct))}
    examples = QUESTIONS | {"tie_break": {"accuracy": tie_break} if tie_break else {}}
    arrays = {"correct": correct} | (arrays or {})
    return save(directory, "mmlu", metrics, arrays, examples=examples, **more)


def odd_records(directory):
    """No metrics, null values, no step, unknown evaluations and breakdowns."""
    save(directory, "mmlu", {})
    save(directory, "mmlu", {"accuracy": None}, step=2)
    save(directory, "mmlu", {"accuracy": float("nan")}, step=3)
    save(directory, "gsm8k", {"exact_match": 0.25, "flag": True}, step=None)
    odd = {"depth": {"1": 0.5, "2": {"value": 0.6}}, "text": "x", "calibration": None}
    save(directory, "gsm8k", {"exact_match": 0.5}, step=5, breakdown=odd)
    escape = save(directory, "mmlu", {"accuracy": 0.5}, run="a\x1b[2Jb", step=7)
    record = json.loads(escape.read_text())
    record["checkpoint"]["step"], record["data"]["tokens"] = "seven", "many"  # edited by hand
    escape.write_text(json.dumps(record))


def run_report(*arguments, **options):
    return builders.torchrun(0, "report.py", *arguments, code=None, cold=True, **options)


def synthetic():
    """benchmarks/report.py as a module."""
    spec = importlib.util.spec_from_file_location("synthetic", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Records in the shape of other programs' files: lm-evaluation-harness' results_*.json."""

import contextlib
from datetime import datetime
from typing import Any

LM_EVAL_NAMES = {"accuracy": "acc", "accuracy_normalised": "acc_norm"}


def to_lm_eval(record: dict) -> dict:
    """A record in the shape of lm-eval's results_*.json (0.4): one task for the evaluation and one
    for each part of it (`_parts`). Keep such files out of the records' own folders (in `lm_eval/`,
    say), where they would count as unreadable records."""
    task, protocol, checkpoint = record["evaluation"], record["protocol"], record["checkpoint"]
    better = {name: metric["better"] for name, metric in record["metrics"].items()}
    tasks = {task: record["metrics"]}
    tasks |= {f"{task}_{group}": metrics for group, metrics in _parts(record).items()}
    environment = record["environment"]
    return {
        "results": {name: _lm_eval_task(name, metrics) for name, metrics in tasks.items()},
        "group_subtasks": {task: [name for name in tasks if name != task]},
        "configs": {name: {"task": name, "metadata": protocol} for name in tasks},
        "versions": dict.fromkeys(tasks, record["schema_version"]),
        "n-shot": dict.fromkeys(tasks, protocol.get("shots") or 0),
        "higher_is_better": {
            name: {LM_EVAL_NAMES.get(m, m): better.get(m) != "lower" for m in metrics}
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


def _parts(record: dict) -> dict[str, dict]:
    """{group: metrics} of the breakdowns (categories, subjects, files) whose groups hold metrics of
    the record. One whose groups are the single examples (tasks) is left out."""
    parts, metrics = {}, record["metrics"]
    n_examples = max((m["n"] for m in metrics.values() if type(m.get("n")) is int), default=None)
    for groups in record["breakdown"].values():
        if isinstance(groups, dict) and len(groups) != n_examples:
            for group, values in groups.items():
                if isinstance(values, dict) and values.keys() & metrics.keys():
                    parts[group] = values
    return parts


def _timestamp(time: str | None) -> float | None:
    """Of `utc_now`'s text."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(time or "").timestamp()
    return None


def _lm_eval_task(alias: str, metrics: dict) -> dict:
    """lm-eval's keys are "name,filter" and "name_stderr,filter"."""
    out: dict[str, Any] = {"alias": alias}
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

"""Records of schema version 1, read as version 2.

results.py asks this of a file that says version 1; no such record is rewritten. numpy only.
"""

import numpy as np

from stats import choice_logprob, pass_at_k

PROTOCOL_WORDS = {
    "template": "{}",
    "scoring": "{}",
    "shots": "{}-shot",
    "window": "window {}",
    "stride": "stride {}",
    "bos": "BOS",
    "num_samples": "{} samples",
    "temperature": "temperature {}",
    "top_p": "top-p {}",
    "dtype": "{}",
    "subjects": "{} subjects only: not a score",
    "limit": "limit {}: not a score",
}


def from_version_1(record: dict, data_words: list[str]) -> dict:
    """A record of schema version 1 as version 2 has it. It does not say itself what its numbers
    are, so this knows the three evaluations of that time by name: nothing else in the house does.
    data_words: what results.data_words says. Fields of the wrong kind are left to be refused."""
    metrics, protocol = {}, record["protocol"]
    if not isinstance(record["metrics"], dict) or not isinstance(protocol, dict):
        return record
    shares = ("accuracy", "pass@", "answered", "same_answer")
    for name, value in record["metrics"].items():
        lower = name in ("loss", "perplexity", "bits_per_byte", "ece", "brier", "ties")
        metrics[name] = dict(value) if isinstance(value, dict) else {"value": value}
        metrics[name]["better"] = "lower" if lower else "higher"
        if name == "loss" or name.startswith(shares):
            metrics[name]["unit"] = "nats per token" if name == "loss" else "share"
    correct = {"accuracy": "correct", "accuracy_normalised": "correct_normalised"}
    examples = {
        "perplexity": {
            "unit": "windows",
            "scores": {"loss": "nll"},
            "weight": "count",
            "labels": {"start": "from token {:,}"},
        },
        "mmlu": {
            "unit": "questions",
            "scores": {name: array for name, array in correct.items() if name in metrics},
            "labels": {"subject": "{}", "question": "{}"},
            "tie_break": {"accuracy": "gold_logprob"},
        },
        "humaneval": {
            "unit": "tasks",
            "scores": {name: name for name in metrics},
            "labels": {"task_id": "{}"},
        },
    }.get(record["evaluation"])
    words = []
    for name, text in PROTOCOL_WORDS.items():
        value = protocol.get(name)
        if value is not None and value is not False:
            words.append(text.format(len(value) if isinstance(value, list) else value))
    return record | {
        "schema_version": 2,
        "metrics": metrics,
        "examples": examples if examples and examples["scores"] else None,
        "words": words + data_words,
    }


def arrays_from_version_1(record: dict, arrays: dict) -> dict[str, np.ndarray]:
    """What version 2 keeps beside the arrays of a version 1 record, derived from them."""
    found, protocol = {}, record["protocol"]
    if {"n", "c"} <= arrays.keys():
        for name in record["metrics"]:
            k = name.removeprefix("pass@")
            if k.isdigit():
                found[name] = np.asarray(pass_at_k(arrays["n"], arrays["c"], int(k)))
    if {"logprobs", "gold"} <= arrays.keys():
        found["gold_logprob"] = choice_logprob(arrays["logprobs"], arrays["gold"])
    stride, window = protocol.get("stride"), protocol.get("window")
    if "nll" in arrays and protocol.get("windows") != "random" and isinstance(stride, int):
        ids = np.arange(len(arrays["nll"]))  # the first scored token, as Windows.target_span has it
        overlap = window - stride if isinstance(window, int) else 0
        found["start"] = ids * stride + 1 - bool(protocol.get("bos")) + overlap * (ids > 0)
    return found

"""How sure answers were, and whether that tells right from wrong: figures for records.

    metrics, breakdown, brier = measured(confidence, correct)
    metrics["auroc"]                                # {"value": 0.71, "stderr": 0.01, ...}
    breakdown["calibration"]                        # bins of a reliability diagram
    add_examples(examples, "confidence", "correct", "brier")    # for report.py --compare

Any evaluation's confidence will do: the probability of a choice, a share of votes, the model's own
word (P(True), tasks/p_true.py). The figures are certainty.py's.
"""

import math
from typing import Any

import numpy as np

import certainty
import resampling
import results
import stats

BETTER = {"ece": "lower", "ece_mass": "lower", "brier": "lower"}
BETTER |= {"auroc": "higher", "aurc": "lower", "selective_accuracy": "higher"}
RESAMPLES = 200  # of a standard error; a comparison takes more
POINTS = 50  # of a curve that is kept


def measured(
    confidence: np.ndarray, correct: np.ndarray, prefix: str = ""
) -> tuple[dict[str, dict], dict[str, list], np.ndarray]:
    """(metrics, breakdown, Brier score of each) of confidence [n] in 0..1 in the answers given and
    whether they were right; names begin with `prefix`."""
    values = certainty.measure(confidence, correct)
    columns = certainty.columns_of(confidence, correct)
    own, metrics = certainty.brier(*columns.T), {}
    spreads = resampling.spreads([name for name in values if name != "brier"], columns, RESAMPLES)
    for name, value in values.items():
        error = stats.mean_stderr(own) if name == "brier" else spreads[name]["stderr"]
        metrics[prefix + name] = results.metric(value, error, len(own), BETTER[name])
    breakdown = {
        f"{prefix}calibration": certainty.reliability(confidence, correct),
        f"{prefix}risk_coverage": certainty.risk_coverage(confidence, correct, POINTS),
    }
    return metrics, breakdown, own


def add_examples(
    examples: dict[str, Any], confidence: str, correct: str, brier: str, prefix: str = ""
) -> None:
    """Put into results.SCHEMA's `examples` which arrays those metrics are made of."""
    examples["scores"] = examples["scores"] | {f"{prefix}brier": brier}
    made = {
        prefix + name: {"score": name, "arrays": [confidence, correct]}
        for name in BETTER
        if name != "brier"
    }
    examples["statistics"] = examples.get("statistics", {}) | made


def show_figures(metrics: dict, prefix: str = "") -> str:
    """The first of them in words, for a terminal."""
    said = []
    for words, name in (("calibration error", "ece"), ("Brier", "brier"), ("AUROC", "auroc")):
        value = metrics[prefix + name]["value"]
        # all answers right, or all wrong: nothing to tell apart
        said.append(f"{words} undefined" if math.isnan(value) else f"{words} {value:.4f}")
    return ", ".join(said)


def of_classes(probabilities: np.ndarray, gold: np.ndarray) -> tuple[dict, np.ndarray]:
    """(metric, values [n]) of the Brier score over all choices, 0..2."""
    own = certainty.brier_classes(probabilities, gold)
    return results.metric(float(own.mean()), stats.mean_stderr(own), len(own), "lower"), own


def rescaled(
    held_out: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]
) -> tuple[float, dict[str, dict]]:
    """(temperature, metrics) of log-probabilities [n, K] and right answers [n]: fitted on the first
    pair, applied to the second. log_loss and what it, ece and brier become."""
    temperature = certainty.fit_temperature(*held_out)
    logits, gold = asked
    p = certainty.softmax(logits, temperature)
    chosen = logits.argmax(axis=1)  # a temperature changes no answer
    found = certainty.measure(p[np.arange(len(p)), chosen], chosen == gold)
    n = len(gold)
    numbers = {
        "log_loss": certainty.log_loss(logits, gold),
        "log_loss_scaled": certainty.log_loss(logits, gold, temperature),
        "ece_scaled": found["ece"],
        "ece_mass_scaled": found["ece_mass"],
        "brier_scaled": found["brier"],
    }
    units = {"log_loss": "nats a question", "log_loss_scaled": "nats a question"}
    return temperature, {
        name: results.metric(value, n=n, better="lower", unit=units.get(name))
        for name, value in numbers.items()
    }

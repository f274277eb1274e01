"""What answers to multiple-choice questions amount to: accuracy in its forms, calibration, bias.

    metrics, breakdown, arrays = summarise(data, "letter", answers, gold)
    metrics["accuracy"]                      # a metric of results.py

Question by question, subject by subject and category by category (micro and macro means), over
rotated orders of the choices, and how sure the answers were.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import results
import stats
from tasks.prompts import Prompts
from tasks.questions import LETTERS, QuestionSet, subject_table


@dataclass(frozen=True)
class Answers:
    """predicted [questions, rotations]: the letter's index, -1 where none was given. scores
    [questions, rotations, 4]: log-probabilities in nats of the letters or of the whole choices, or
    None; texts, likewise [questions, rotations]: what was generated, or None."""

    predicted: np.ndarray
    scores: np.ndarray | None = None
    texts: np.ndarray | None = None


def first_letter(text: str) -> int:
    """Of those that stand alone before a blank line, as its index; -1 if there is none."""
    found = re.search(r"(?<![A-Za-z])[A-D](?![A-Za-z])", text.strip().split("\n\n")[0])
    return LETTERS.index(found[0]) if found else -1


def examples_of(arrays: dict) -> dict:
    """results.SCHEMA's `examples`: which arrays hold a score for each question."""
    scores = {"accuracy": "correct", "accuracy_normalised": "correct_normalised"}
    return {
        "unit": "questions",
        "scores": {metric: name for metric, name in scores.items() if name in arrays},
        "labels": {"subject": "{}", "question": "{}"},
        "tie_break": {"accuracy": "gold_logprob"} if "gold_logprob" in arrays else {},
    }


def share_of(correct: np.ndarray) -> dict:
    """The metric of booleans [n]."""
    return results.share(int(np.sum(correct)), len(correct))


def mean_of_shares(shares: Sequence[dict]) -> dict:
    """Their unweighted mean; n counts the questions behind it. The groups are taken as given, the
    questions in each as drawn: variances add."""
    values, errors = [s["value"] for s in shares], [s["stderr"] for s in shares]
    stderr = math.sqrt(sum(e * e for e in errors)) / len(errors)
    n = sum(s["n"] for s in shares)
    return results.metric(float(np.mean(values)), stderr, n, unit="share")


def accuracies(data: QuestionSet, correct: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """(metrics, breakdown by category and by subject) of booleans [questions] by metric name:
    micro over questions (lm-evaluation-harness's weighting), macro over subjects."""
    subject = np.array([q.subject for q in data.questions])
    category_of = subject_table(data.subjects)["categories"]
    category = np.array([category_of.get(s, "") for s in subject])
    metrics, by_subject, by_category = {}, {}, {}
    for name, right in correct.items():
        for key, groups, out in (
            (subject, data.subjects, by_subject),
            (category, sorted({*category} - {""}), by_category),
        ):
            for group in groups:
                out.setdefault(str(group), {})[name] = share_of(right[key == group])
        metrics[name] = share_of(right)
        macro = name.replace("accuracy", "accuracy_macro")
        metrics[macro] = mean_of_shares([by_subject[s][name] for s in data.subjects])
    return metrics, {"category": by_category, "subject": by_subject}


def summarise(
    data: QuestionSet, scoring: str, answers: Answers, gold: np.ndarray
) -> tuple[dict, dict, dict]:
    """(metrics, breakdown, arrays), all but the permuted ones of the choices as they are listed."""
    right, predicted = answers.predicted == gold, answers.predicted[:, 0]
    arrays = {
        "correct": right[:, 0],
        "predicted": predicted,
        "gold": gold[:, 0],
        "subject": np.array([q.subject for q in data.questions]),
        "subject_id": np.array([data.subjects.index(q.subject) for q in data.questions]),
    }
    correct, scores = {"accuracy": right[:, 0]}, None
    if answers.scores is not None:
        arrays["logprobs"] = scores = answers.scores[:, 0]
    if scoring == "continuation":  # log-likelihood per character, lm-evaluation-harness's acc_norm
        characters = np.array([[max(len(c), 1) for c in q.choices] for q in data.questions])
        correct["accuracy_normalised"] = (scores / characters).argmax(-1) == gold[:, 0]
        arrays["correct_normalised"] = correct["accuracy_normalised"]
    metrics, breakdown = accuracies(data, correct)
    breakdown["letter"] = {  # position bias, over all rotations
        letter: {
            "predicted": float(np.mean(answers.predicted == i)),
            "gold": float(np.mean(gold == i)),
        }
        for i, letter in enumerate(LETTERS)
    }
    if scores is None:
        metrics["answered"] = share_of(predicted >= 0)
    else:
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[np.arange(len(p)), predicted]
        measured = stats.calibration(p, right[:, 0])
        for name in ("ece", "brier"):
            metrics[name] = results.metric(measured[name], better="lower")
        breakdown["calibration"] = measured["bins"]
        ordered = np.sort(scores, -1)
        ties = int((ordered[:, -1] == ordered[:, -2]).sum())  # of the two best
        metrics["ties"] = results.metric(ties, better="lower")
        arrays["gold_logprob"] = stats.choice_logprob(scores, gold[:, 0])
    if right.shape[1] > 1:
        add_permuted(metrics, breakdown, answers.predicted, right)
        arrays["correct_permuted"] = right
    return metrics, breakdown, arrays


def add_permuted(metrics: dict, breakdown: dict, predicted: np.ndarray, right: np.ndarray) -> None:
    """Accuracy over rotated choice orders [questions, rotations], a question being the unit that
    was drawn, and how often a question gets the same choice in all of them."""
    rotations, mean = right.shape[1], right.mean(axis=1)
    stderr = mean.std(ddof=1) / math.sqrt(len(mean)) if len(mean) > 1 else math.nan
    metrics["accuracy_permuted"] = results.metric(
        float(mean.mean()), stderr, len(mean), unit="share"
    )
    chosen = np.where(predicted < 0, -1, (predicted + np.arange(rotations)) % len(LETTERS))
    metrics["same_answer"] = share_of((chosen == chosen[:, :1]).all(axis=1) & (chosen[:, 0] >= 0))
    breakdown["rotation"] = {str(r): {"accuracy": share_of(right[:, r])} for r in range(rotations)}


def make_samples(
    data: QuestionSet, prompts: Prompts, answers: Answers, gold: np.ndarray
) -> Iterator[dict]:
    """One dict a question (and rotation): what was asked, scored and answered."""
    for i, q in enumerate(data.questions):
        for r, predicted in enumerate(answers.predicted[i].tolist()):
            yield {
                "id": i,
                "subject": q.subject,
                "rotation": r,
                "question": q.question,
                "choices": q.choices[r:] + q.choices[:r],
                "gold": LETTERS[gold[i, r]],
                "predicted": letter_or_none(predicted),
                "correct": predicted == gold[i, r],
                "shots": prompts.shots[i, r],
                "logprobs": None if answers.scores is None else answers.scores[i, r],
                "text": None if answers.texts is None else answers.texts[i, r],
            }


def letter_or_none(index: int) -> str | None:
    return LETTERS[index] if index >= 0 else None

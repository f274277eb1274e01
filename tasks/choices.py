"""What answers to multiple-choice questions amount to: accuracy in its forms, calibration, bias.

    right = right_places(data, rotations=1)
    metrics, breakdown, arrays = summarise(data, Terms("letter"), answers, right)
    metrics["accuracy"]                      # a metric of results.py

Question by question, subject by subject and category by category (micro and macro means), over
rotated orders of the choices, and how sure the answers were.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import resampling
import results
import stats
from certainty import softmax
from tasks import confidence
from tasks.prompts import Prompts
from tasks.questions import LETTERS, Question, QuestionSet


@dataclass(frozen=True)
class Answers:
    """predicted [questions, rotations]: the choice's index, -1 where none was given. scores
    [questions, rotations, K]: log-probabilities in nats of the letters or of the whole choices,
    -inf for those that a question does not have, or None; texts, likewise [questions, rotations]:
    what was generated, or None."""

    predicted: np.ndarray
    scores: np.ndarray | None = None
    texts: np.ndarray | None = None


@dataclass(frozen=True)
class Terms:
    """How answers are counted: by letter or whole choice, what its length is counted in, which
    metric ranks checkpoints, and whether the last choice is to say that one does not know."""

    scoring: str
    normalisation: str = "characters"
    metric: str = "accuracy"
    abstain: bool = False


ABSTAIN = "I don't know"


def with_abstention(data: QuestionSet) -> QuestionSet:
    """The same questions and examples with one more choice, the last, which is never right."""

    def more(q: Question) -> Question:
        where = f"{q.where} (with --allow-abstain)"  # whose choice is none of the file's
        return q._replace(choices=(*q.choices, ABSTAIN), where=where)

    return replace(
        data,
        questions=[more(q) for q in data.questions],
        examples={name: [more(q) for q in shown] for name, shown in data.examples.items()},
        drawn=tuple([more(q) for q in shown] for shown in data.drawn),
    )


def first_letter(text: str, n: int = 4) -> int:
    """Of those of n choices that stand alone before a blank line, as its index; -1 if there is
    none."""
    letters = f"[A-{LETTERS[n - 1]}]"
    found = re.search(rf"(?<![A-Za-z]){letters}(?![A-Za-z])", text.strip().split("\n\n")[0])
    return LETTERS.index(found[0]) if found else -1


def right_places(data: QuestionSet, rotations: int) -> np.ndarray:
    """[questions, rotations, K]: whether the choice at that place of that order is right."""
    right = np.zeros((len(data.questions), rotations, data.n_choices.max()), dtype=bool)
    question, place = (
        np.array([(i, c) for i, q in enumerate(data.questions) for c in q.right], np.int64)
        .reshape(-1, 2)
        .T
    )
    for r in range(rotations):
        right[question, r, (place - r) % data.n_choices[question]] = True
    return right


SCORES = {  # metrics that are means of an array
    "accuracy": "correct",
    "accuracy_normalised": "correct_normalised",
    "right_mass": "right_mass",
    "answered": "answered",
    "brier_classes": "brier_classes",
}


def examples_of(arrays: dict) -> dict | None:
    """results.SCHEMA's `examples`: which arrays hold a score for each question, or what makes a
    score of all of them."""
    if "correct" not in arrays:
        return None
    examples: dict[str, Any] = {
        "unit": "questions",
        "scores": {metric: name for metric, name in SCORES.items() if name in arrays},
        "labels": {"subject": "{}", "question": "{}"},
        "tie_break": {"accuracy": "gold_logprob"} if "gold_logprob" in arrays else {},
    }
    if "confidence" in arrays:
        confidence.add_examples(examples, "confidence", "confident_right", "brier")
    if "p_true" in arrays:
        confidence.add_examples(examples, "p_true", "correct", "p_true_brier", "p_true_")
    if "answered" in arrays:
        share = {"score": "share", "arrays": ["correct", "answered"]}
        examples["statistics"] = examples.get("statistics", {}) | {"accuracy_answered": share}
    return examples


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
    category_of = data.table["categories"]
    category = np.array([category_of.get(s, "") for s in subject])
    metrics, by_subject, by_category = {}, {}, {}
    for name, right in correct.items():
        for key, groups, out in (
            (subject, data.subjects, by_subject),
            (category, sorted({*category} - {""}), by_category),
        ):
            for group in groups if data.layout.has_subjects else ():
                out.setdefault(str(group), {})[name] = share_of(right[key == group])
        metrics[name] = share_of(right)
        if data.layout.has_subjects:
            macro = name.replace("accuracy", "accuracy_macro")
            metrics[macro] = mean_of_shares([by_subject[s][name] for s in data.subjects])
    return metrics, {"category": by_category, "subject": by_subject}


def lengths_of(data: QuestionSet, normalisation: str) -> np.ndarray:
    """[questions, K]: of each choice, in characters or bytes; 1 where there is none."""
    lengths = np.ones((len(data.questions), data.n_choices.max()))
    for i, q in enumerate(data.questions):
        for c, choice in enumerate(q.choices):
            size = len(choice.encode()) if normalisation == "bytes" else len(choice)
            lengths[i, c] = max(size, 1)
    return lengths


def summarise(
    data: QuestionSet, asked: Terms, answers: Answers, right: np.ndarray
) -> tuple[dict, dict, dict]:
    """(metrics, breakdown, arrays), all but the permuted ones of the choices as they are listed.
    right: right_places."""
    gold = np.where(right.any(-1), right.argmax(-1), -1)
    chosen = np.take_along_axis(right, np.maximum(answers.predicted, 0)[..., None], -1)[..., 0]
    hits, predicted = chosen & (answers.predicted >= 0), answers.predicted[:, 0]
    arrays = {
        "correct": hits[:, 0],
        "predicted": predicted,
        "gold": gold[:, 0],
        "subject": np.array([q.subject for q in data.questions]),
        "subject_id": np.array([data.subjects.index(q.subject) for q in data.questions]),
    }
    correct, scores = {"accuracy": hits[:, 0]}, None
    if answers.scores is not None:
        arrays["logprobs"] = scores = answers.scores[:, 0]
    if asked.scoring == "continuation" and asked.normalisation != "none":
        # log-likelihood per character, lm-evaluation-harness's acc_norm, or per byte
        best = (scores / lengths_of(data, asked.normalisation)).argmax(-1)
        correct["accuracy_normalised"] = right[np.arange(len(best)), 0, best]
        arrays["correct_normalised"] = correct["accuracy_normalised"]
    metrics, breakdown = accuracies(data, correct)
    breakdown["letter"] = {  # position bias, over all rotations
        letter: {
            "predicted": float(np.mean(answers.predicted == i)),
            "gold": float(np.mean(gold == i)),
        }
        for i, letter in enumerate(LETTERS[: right.shape[-1]])
    }
    if scores is None:
        metrics["answered"] = share_of(predicted >= 0)
    else:
        p = softmax(scores)
        if asked.metric == "right_mass" or any(q.several for q in data.questions):
            arrays["right_mass"] = mass = (p * right[:, 0]).sum(-1)
            value, error = float(mass.mean()), stats.mean_stderr(mass)
            metrics["right_mass"] = results.metric(value, error, len(mass), unit="share")
        else:
            metrics["brier_classes"], arrays["brier_classes"] = confidence.of_classes(p, gold[:, 0])
        add_confidence(data, asked, scores, right[:, 0], metrics, breakdown, arrays)
        ordered = np.sort(scores, -1)
        ties = int((ordered[:, -1] == ordered[:, -2]).sum())  # of the two best
        metrics["ties"] = results.metric(ties, better="lower")
        arrays["gold_logprob"] = stats.choice_logprob(scores, gold[:, 0])
    if asked.abstain:
        add_abstention(data, predicted, metrics, arrays)
    if hits.shape[1] > 1:
        add_permuted(data, metrics, breakdown, answers.predicted, hits)
        arrays["correct_permuted"] = hits
    first = asked.metric if asked.metric in metrics else "accuracy"
    return {first: metrics[first]} | metrics, breakdown, arrays


def add_confidence(
    data: QuestionSet,
    asked: Terms,
    scores: np.ndarray,
    right: np.ndarray,
    metrics: dict,
    breakdown: dict,
    arrays: dict,
) -> None:
    """How sure the likeliest answer was, of scores and right places [questions, K]: its share of
    the probability of all choices. Where a model may abstain, of what it would have answered."""
    scores = without_abstention(data, scores) if asked.abstain else scores
    each, best = np.arange(len(scores)), scores.argmax(-1)
    p, hit = softmax(scores)[each, best], right[each, best]
    own, drawn, arrays["brier"] = confidence.measured(p, hit)
    arrays |= {"confidence": p, "confident_right": hit}
    metrics |= own
    breakdown |= drawn


def without_abstention(data: QuestionSet, scores: np.ndarray) -> np.ndarray:
    """Scores [questions, K] with the last choice of each question impossible."""
    last = np.arange(scores.shape[1]) == data.n_choices[:, None] - 1
    return np.where(last, -np.inf, scores)


def add_abstention(data: QuestionSet, predicted: np.ndarray, metrics: dict, arrays: dict) -> None:
    """The share of the questions that were answered with anything but the last choice, and the
    accuracy on those; accuracy itself counts the others as wrong."""
    arrays["answered"] = answered = (predicted >= 0) & (predicted < data.n_choices - 1)
    metrics["answered"] = share_of(answered)
    columns = np.column_stack([arrays["correct"], answered]).astype(np.float64)
    n = int(answered.sum())
    error = resampling.spread("share", columns)["stderr"]
    value = resampling.score_of("share", columns)
    metrics["accuracy_answered"] = results.metric(value, error, n, unit="share")


def without_answers(data: QuestionSet, answers: Answers) -> tuple[dict, dict, dict]:
    """What summarise gives, where the right answers are not published: what was predicted."""
    predicted = answers.predicted[:, 0]
    arrays = {
        "predicted": predicted,
        "subject": np.array([q.subject for q in data.questions]),
    }
    if answers.scores is not None:
        arrays["logprobs"] = answers.scores[:, 0]
    letters = {
        letter: {"predicted": float(np.mean(answers.predicted == i))}
        for i, letter in enumerate(LETTERS[: data.n_choices.max()])
    }
    return {"answered": share_of(predicted >= 0)}, {"letter": letters}, arrays


def add_permuted(
    data: QuestionSet,
    metrics: dict,
    breakdown: dict,
    predicted: np.ndarray,
    right: np.ndarray,
) -> None:
    """Accuracy over rotated choice orders [questions, rotations], a question being the unit that
    was drawn, and how often a question gets the same choice in all of them."""
    rotations, mean = right.shape[1], right.mean(axis=1)
    stderr = mean.std(ddof=1) / math.sqrt(len(mean)) if len(mean) > 1 else math.nan
    metrics["accuracy_permuted"] = results.metric(
        float(mean.mean()), stderr, len(mean), unit="share"
    )
    n = data.n_choices[:, None]
    chosen = np.where(predicted < 0, -1, (predicted + np.arange(rotations)) % n)
    metrics["same_answer"] = share_of((chosen == chosen[:, :1]).all(axis=1) & (chosen[:, 0] >= 0))
    breakdown["rotation"] = {str(r): {"accuracy": share_of(right[:, r])} for r in range(rotations)}


def make_samples(
    data: QuestionSet, prompts: Prompts, answers: Answers, right: np.ndarray
) -> Iterator[dict]:
    """One dict a question (and rotation): what was asked, scored and answered."""
    for i, q in enumerate(data.questions):
        for r, predicted in enumerate(answers.predicted[i].tolist()):
            n, places = len(q.choices), np.flatnonzero(right[i, r]).tolist()
            sample = {
                "id": i,
                "subject": q.subject,
                "rotation": r,
                "question": q.question,
                "choices": q.choices[r:] + q.choices[:r],
                "gold": name_of(places[0] if places else -1),
                "predicted": name_of(predicted),
                "correct": predicted in places if places else None,
                "shots": prompts.shots[i, r],
                "logprobs": None if answers.scores is None else answers.scores[i, r, :n],
                "text": None if answers.texts is None else answers.texts[i, r],
            }
            if q.several:
                sample["right"] = [name_of(place) for place in places]
            yield sample


def name_of(index: int) -> str | None:
    """A choice's letter; its number where there are more choices than letters."""
    if index < 0:
        return None
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)

"""What a choice set may be asked beside its questions: leave not to answer, whether the answers are
right, and other questions, on which a temperature is fitted.

    further = Further(p_true=True, fit_temperature="val")
    held_out = further.held_out(data, asked="test", shown=None, read=lambda split: ...)
    found, terms = further.measure(ask, data, held_out, answers, arrays)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

import cli
from certainty import softmax
from tasks.choices import ABSTAIN, Answers, without_abstention
from tasks.confidence import measured, rescaled
from tasks.p_true import questions_about
from tasks.questions import QuestionSet
from tasks.templates import load_template

# Scores other questions as those of the set are, but for these terms of a PromptMaker
Ask = Callable[[QuestionSet, dict], Answers]


class Parts(NamedTuple):
    """Parts of a record."""

    metrics: dict
    breakdown: dict
    arrays: dict
    protocol: dict


@dataclass(frozen=True)
class Further:
    """Flags, YAML keys and keywords of a choice set's evaluation."""

    allow_abstain: bool = cli.option(
        False, f'one more choice, "{ABSTAIN}": accuracy of what is answered, and how much that is'
    )
    p_true: bool = cli.option(
        False, "ask of each answer whether it is right: P(True), a confidence of its own"
    )
    fit_temperature: str | None = cli.option(
        None,
        "fit a temperature on this split, and say what calibration becomes with it",
        choices=("val", "dev"),
    )

    def check(self, data: QuestionSet, scoring: str) -> None:
        """ValueError for what cannot be asked of these questions."""
        if data.hidden and (self.allow_abstain or self.p_true or self.fit_temperature):
            raise ValueError(
                "the right answers are not published, so that --allow-abstain, --p-true and "
                "--fit-temperature say nothing"
            )
        if self.fit_temperature and scoring == "generate":
            raise ValueError("--fit-temperature needs probabilities: not with --scoring generate")
        if self.fit_temperature and any(q.several for q in data.questions):
            raise ValueError("--fit-temperature: a question has several right answers")

    def held_out(
        self, data: QuestionSet, asked: str, shown: str | None, read: Callable[[str], QuestionSet]
    ) -> QuestionSet | None:
        """The questions that a temperature is fitted on, without those of `data` itself. asked,
        shown: the split that is asked, and that of the few-shot examples. ValueError where none is
        left, or where the split is one of these."""
        split = self.fit_temperature
        if split is None:
            return None
        for other, what in ((asked, "what is asked"), (shown, "what the examples are taken from")):
            if split == other:
                raise ValueError(f"--fit-temperature {split}: it is {what}; name another split")
        found, known = read(split), {(q.question, q.choices) for q in data.questions}
        kept = [i for i, q in enumerate(found.questions) if (q.question, q.choices) not in known]
        if not kept:
            raise ValueError(f"--fit-temperature {split}: all of its questions are asked, too")
        drawn = tuple(found.drawn[i] for i in kept) if found.drawn else ()
        return replace(found, questions=[found.questions[i] for i in kept], drawn=drawn)

    def terms(self, held_out: QuestionSet | None) -> dict:
        """What a protocol says of it; records without any of it keep their names."""
        found: dict[str, Any] = {"abstain": ABSTAIN} if self.allow_abstain else {}
        if self.p_true:
            found["p_true"] = load_template("p_true").hash
        if held_out is not None:
            found["temperature_split"] = self.fit_temperature
            found["temperature_data"] = held_out.hash
            found["temperature_questions"] = len(held_out.questions)
        return found

    def measure(
        self,
        ask: Ask,
        data: QuestionSet,
        held_out: QuestionSet | None,
        answers: Answers,
        arrays: dict,
    ) -> Parts:
        """Asks, and says what came of it; arrays: tasks.choices.summarise's."""
        found = Parts({}, {}, {}, {})
        if self.p_true:
            about = questions_about(data, answers.predicted[:, 0])
            terms = {"template": load_template("p_true"), "scoring": "letter", "truncate": True}
            p = softmax(_scores(ask(about, terms)))[:, 0]
            metrics, breakdown, brier = measured(p, arrays["correct"], "p_true_")
            found.metrics.update(metrics)
            found.breakdown.update(breakdown)
            found.arrays.update({"p_true": p, "p_true_brier": brier})
        if held_out is not None:
            scores, fitted_on = arrays["logprobs"], _scores(ask(held_out, {}))
            if self.allow_abstain:
                scores = without_abstention(data, scores)
                fitted_on = without_abstention(held_out, fitted_on)
            right = np.array([q.answer for q in held_out.questions])
            temperature, metrics = rescaled((fitted_on, right), (scores, arrays["gold"]))
            found.metrics.update(metrics)
            found.protocol["fitted_temperature"] = temperature
        return found


def _scores(answers: Answers) -> np.ndarray:
    """[questions, K] of the choices as they are listed."""
    assert answers.scores is not None, "generated answers have none"
    return answers.scores[:, 0]

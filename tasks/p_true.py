"""P(True): a model is shown a question with its own answer and asked whether that is right.

    asked = questions_about(data, predicted)        # a set of its own, of two choices
    template = load_template("p_true")              # configs/prompts/p_true.yaml

Kadavath et al., "Language Models (Mostly) Know What They Know" (2022), section 3: the probability
of True, among True and False, is the confidence. The examples before a question are those of the
set, with their right answers and with wrong ones by turns.
"""

from dataclasses import replace

import numpy as np

from tasks.questions import LETTERS, Question, QuestionSet

TRUTH = ("True", "False")


def questions_about(data: QuestionSet, predicted: np.ndarray) -> QuestionSet:
    """For each question whether the choice `predicted` [questions] is right; -1 for one that was
    not answered asks about no answer at all, which is false."""

    def shown(examples: list[Question]) -> list[Question]:
        return [about(q, _proposed(q, i)) for i, q in enumerate(examples)]

    return replace(
        data,
        questions=[about(q, choice) for q, choice in zip(data.questions, predicted.tolist())],
        examples={subject: shown(own) for subject, own in data.examples.items()},
        drawn=tuple(map(shown, data.drawn)),
    )


def about(q: Question, choice: int) -> Question:
    """The question whether a choice answers a question."""
    listed = "".join(f"({letter}) {text}\n" for letter, text in zip(LETTERS, q.choices))
    proposed = q.choices[choice] if choice >= 0 else "(none)"
    text = f"{q.question.strip()}\n{listed}Proposed answer: {proposed}"
    answer = 0 if choice in q.right else 1
    return Question(q.subject, text, TRUTH, answer, q.where)


def _proposed(q: Question, i: int) -> int:
    """Of every other example the right choice, of the others the one after it."""
    wrong = (n for n in range(q.answer + 1, q.answer + len(q.choices)))
    first = next((n % len(q.choices) for n in wrong if n % len(q.choices) not in q.right), q.answer)
    return q.answer if i % 2 == 0 else first

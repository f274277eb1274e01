"""P(True): a model is shown a question with its own answer and asked whether that is right.

    asked = questions_about(data, predicted)        # a set of its own, of two choices
    asked = questions_on([(question, solution, is_right, where), ...])
    prompts = make_prompts(facts, asked, bos, chat)
    p = probability_of_true(backend, prompts)       # [questions]

Kadavath et al., "Language Models (Mostly) Know What They Know" (2022), section 3: the probability
of True, among True and False, is the confidence. The examples before a question are those of the
set, with their right answers and with wrong ones by turns; solutions in writing are asked about
without examples. The words are those of configs/prompts/p_true.yaml.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from backends import BATCH_TOKENS, Backend, Facts
from certainty import softmax
from tasks.chat import Chat
from tasks.layouts import Layout
from tasks.questions import LETTERS, Question, QuestionSet
from tasks.templates import load_template

if TYPE_CHECKING:  # torch comes with it
    from tasks.prompts import Prompts

TRUTH = ("True", "False")
WRITTEN = Layout("solutions", (2, 2), rows=({},))  # a set without subjects, in no file

# ---------------------------------------------------------------------------------------------
# What is asked


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
    return _whether(
        q.subject, f"{q.question.strip()}\n{listed}", proposed, choice in q.right, q.where
    )


def questions_on(solutions: Iterable[tuple[str, str, bool, str]]) -> QuestionSet:
    """Whether each solution is right, of (question, solution, whether it is, file:line)."""
    name = WRITTEN.name
    asked = [
        _whether(name, f"{question.strip()}\n", solution.strip(), right, where)
        for question, solution, right, where in solutions
    ]
    return QuestionSet(asked, {name: []}, 0, "", "", WRITTEN)


def _whether(subject: str, asked: str, proposed: str, right: bool, where: str) -> Question:
    text = f"{asked}Proposed answer: {proposed}"
    return Question(subject, text, TRUTH, 0 if right else 1, where)


def _proposed(q: Question, i: int) -> int:
    """Of every other example the right choice, of the others the one after it."""
    wrong = (n for n in range(q.answer + 1, q.answer + len(q.choices)))
    first = next((n % len(q.choices) for n in wrong if n % len(q.choices) not in q.right), q.answer)
    return q.answer if i % 2 == 0 else first


# ---------------------------------------------------------------------------------------------
# Asked by itself


def make_prompts(facts: Facts, data: QuestionSet, bos: bool, chat: Chat | None) -> "Prompts":
    """Rows of tokens; what exceeds the context is cut on the left. ValueError for a tokenizer whose
    tokens do not tell A from B."""
    from tasks.prompts import PromptMaker

    maker = PromptMaker(
        tokenizer=facts.tokenizer,
        data=data,
        template=load_template("p_true"),
        scoring="letter",
        context=facts.context or sys.maxsize,
        rotations=1,
        truncate=True,
        bos=bos,
        chat=chat,
    )
    return maker.make(facts.shares_prefixes)


def probability_of_true(backend: Backend, prompts: "Prompts") -> np.ndarray:
    """[questions]: of True, among True and False."""
    found = backend.score_rows(prompts.rows, BATCH_TOKENS.get(backend.facts.device))
    p = np.zeros(len(prompts.question))
    p[prompts.question] = softmax(found.choices)[:, 0]
    return p

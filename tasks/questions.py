"""Multiple-choice questions from files.

    from tasks.questions import read_data
    data = read_data("data/mmlu", num_few_shot=5)         # data.questions, data.examples by subject
    data = read_data("data/arc", 25, layout=load_set("arc_challenge").layout)

Reads MMLU's original layout (headerless CSV in dev/, val/, test/), CSV with a header, CMMLU's and
C-Eval's CSV, and JSON or parquet rows of question, choices, answer, subject; other sets as their
Layout says (tasks/layouts.py). Every field is text as it stands ("None" and "NA" too); what is
wrong is named with its file and line. Whether numbered answers begin at 0 or at 1 is told by all of
them: one off, and every score is wrong.
"""

import ast
import contextlib
import functools
import itertools
import json
import random
import re
import string
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import CONFIGS_DIR, load_yaml
from packed import require_file
from recording.identity import rows_hash
from tasks.layouts import Layout
from tasks.question_files import ANSWERS, rows_of, split_files, where_to_get

LETTERS = string.ascii_uppercase
LM_EVAL_SEED = 1234  # of the examples that its tasks draw, anew for each question in turn
SETTLED = 2  # seconds after which a file shows by its time that it was written again
NO_TABLE: dict = {"categories": {}, "names": {}}


class Question(NamedTuple):
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice, the first of several; -1 where it is not published
    where: str  # file:line
    several: tuple[int, ...] = ()  # indices of all right ones, where the set may have several
    id: str | None = None

    @property
    def right(self) -> tuple[int, ...]:
        return self.several or ((self.answer,) if self.answer >= 0 else ())


@dataclass(frozen=True)
class QuestionSet:
    """questions: what is asked, subject by subject. examples: by subject, what comes before.
    layout: the set's; where that has no subjects, there is one, of the set's name. drawn: other
    examples for each question, or none."""

    questions: list[Question]
    examples: dict[str, list[Question]]
    files: int
    hash: str
    examples_hash: str
    layout: Layout = Layout()  # noqa: RUF009  # frozen
    drawn: tuple[list[Question], ...] = ()

    @functools.cached_property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(q.subject for q in self.questions))

    @property
    def groups(self) -> list[tuple[str, list[Question], list[int]]]:
        """(subject, examples, places of questions) of questions that share their examples."""
        places = range(len(self.questions))
        subject = [q.subject for q in self.questions]
        if self.drawn:
            return [(subject[i], self.drawn[i], [i]) for i in places]
        by_subject = itertools.groupby(places, key=subject.__getitem__)
        return [(name, self.examples[name], list(members)) for name, members in by_subject]

    @functools.cached_property
    def table(self) -> dict:
        """Categories and names of the subjects, where they are those of a known set."""
        return NO_TABLE if self.layout.rows else subject_table(self.subjects)

    @functools.cached_property
    def n_choices(self) -> np.ndarray:
        """[questions]"""
        return np.array([len(q.choices) for q in self.questions])

    @property
    def hidden(self) -> bool:
        """Whether the answers are not published."""
        return self.questions[0].answer < 0


def read_data(
    data_path: str | Path,
    num_few_shot: int = 0,
    split: str | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    layout: Layout = Layout(),  # noqa: B008  # frozen
    draw: bool = False,
) -> QuestionSet:
    """The questions of a split, and the first `num_few_shot` of each subject's few-shot split (dev
    in MMLU), or of the whole of it where the layout's examples are for all.

    data_path: a directory in the set's layout, in a Hugging Face data set's, or one file. split:
    default: the one that the set is asked on. limit: so many questions of each subject. draw: other
    examples for each question, as lm-evaluation-harness draws them. Raises ValueError naming file
    and line.
    """
    root, split = Path(data_path), split or layout.ask
    read, files = _read_split(root, split, layout)
    if num_few_shot and layout.few_shot in (None, split):
        why = f"are what --split {split} asks" if layout.few_shot else "stand in its prompt"
        raise ValueError(
            f"--num-few-shot {num_few_shot}: the examples of {layout.name} {why}: leave it out"
        )
    told = not layout.rows  # the few-shot split may tell what numbers count from
    read_dev, dev_files = [], []
    if layout.few_shot and not root.is_file() and (num_few_shot or told):
        read_dev, dev_files = _read_split(root, layout.few_shot, layout)
    first = _first_number(read + read_dev)
    asked, dev = _numbered_from(first, read), _numbered_from(first, read_dev)
    if not asked:
        raise ValueError(f"{root}: no {split} questions there; {where_to_get(layout, root, split)}")
    questions = _chosen(root, asked, dev, split, subjects, limit, layout)
    examples = _examples(root, dev, questions, num_few_shot, layout)
    if num_few_shot:
        files += dev_files
    shown: Iterable[Question] = itertools.chain.from_iterable(examples.values())
    drawn: tuple[list[Question], ...] = ()
    if draw and num_few_shot:
        if layout.has_subjects:
            raise ValueError(
                f"--few-shot-draw lm_eval: {layout.name} is asked by subject, where lm-eval takes "
                "the first examples, too"
            )
        rng, shown = random.Random(LM_EVAL_SEED), dev
        drawn = tuple(rng.sample(dev, num_few_shot) for _ in questions)
    hashes = _digest(questions), _digest(shown)
    return QuestionSet(questions, examples, len(files), *hashes, layout, drawn)


def _chosen(root, asked, dev, split, subjects, limit, layout) -> list[Question]:
    """Those of the subjects wanted, subject by subject, the first `limit` of each."""
    by_subject = {}
    for q in asked:
        by_subject.setdefault(q.subject, []).append(q)
    missing = sorted({q.subject for q in dev} - by_subject.keys())
    if missing and not subjects and not layout.for_all:
        raise ValueError(
            f"{root}: the {split} split has no question of {', '.join(missing)}, which the "
            f"{layout.few_shot} split has examples of; --subjects names those to ask"
        )
    for name in subjects or ():
        if name not in by_subject:
            raise ValueError(
                f"--subjects: {root} has no {name!r}; it has {', '.join(sorted(by_subject))}"
            )
    chosen = sorted(set(subjects or by_subject))
    return [q for name in chosen for q in by_subject[name][:limit]]


def _examples(root, dev, questions, wanted, layout) -> dict[str, list[Question]]:
    """The first of each subject, or of all; ValueError where there are fewer."""
    examples: dict[str, list[Question]] = {q.subject: [] for q in questions}
    for name, found in examples.items() if wanted else ():
        found += [q for q in dev if layout.for_all or q.subject == name][:wanted]
        if len(found) < wanted:
            split = layout.few_shot
            remedy = f" (one file has no {split} split: name its directory)" * root.is_file()
            of_subject = "" if layout.for_all else f" of subject {name!r}"
            raise ValueError(
                f"{root}: {wanted} few-shot examples asked for, but the {split} split has "
                f"{len(found)}{of_subject}{remedy}"
            )
    return examples


def _digest(questions) -> str:
    return rows_hash([*q[:4], q.several] if q.several else q[:4] for q in questions)


def _read_split(root: Path, split: str, layout: Layout) -> tuple[list["_Read"], list]:
    files = split_files(root, split, layout)
    hidden, questions = split in layout.hidden, []
    for path, subject in files:
        found = _read_file(path, subject, layout, hidden)
        if not found:
            raise ValueError(f"{path}:1: no question in this file")
        questions += found
    answered = {r.question.answer >= 0 for r in questions}
    if len(answered) > 1:
        first = next(r.question for r in questions if r.question.answer < 0)
        raise ValueError(f"{first.where}: no answer, while others of the split have one")
    return questions, files


_KNOWN: dict[tuple, list["_Read"]] = {}  # of files as they were: they are checked, then planned


def _read_file(path: Path, subject: str | None, layout: Layout, hidden: bool) -> list["_Read"]:
    require_file(path)
    there = path.stat()
    state = there.st_size, there.st_mtime_ns, there.st_ino
    key = str(path), *state, subject, repr(layout), hidden
    if key in _KNOWN:
        return _KNOWN[key]
    rows = rows_of(path, layout)
    found = [_question(row, subject, where, layout, hidden) for where, row in rows]
    # another write within a tick of the clock would show nowhere, nor does a file beside this one
    if time.time() > there.st_mtime + SETTLED and not layout.answers_beside:
        _KNOWN[key] = found
    return found


class _Read(NamedTuple):
    """A question as its file has it."""

    question: Question
    numbered: bool  # its answer is a number that counts from 0 or from 1


def _question(row: dict, subject: str | None, where: str, layout: Layout, hidden: bool) -> _Read:
    values, right = layout.plain(row, where)
    values = {str(name).lower(): value for name, value in values.items()}
    choices = _choices(values, where, layout)
    subject = values.get("subject") or subject
    question = values.get("question")
    for name, text in [("subject", subject), ("question", question), *zip(LETTERS, choices)]:
        if not isinstance(text, str):
            there = ", ".join(map(str, row))
            raise ValueError(
                f"{where}: {name} is missing or not text: {text!r:.60}; its fields are {there:.200}"
            )
    assert isinstance(subject, str) and isinstance(question, str)  # seen in the loop
    if not question.strip():
        raise ValueError(f"{where}: question is empty")
    numbered = False
    if right is not None and right[-1] >= len(choices):
        n = len(choices)
        raise ValueError(f"{where}: number {right[-1] + 1} of {n} choices is said to be right")
    if right is not None:
        answer = right[0]
    elif hidden and not _given(values):
        answer = -1
    else:
        answer, numbered = _answer(values, where, len(choices), layout)
    several = tuple(right) if right is not None and len(right) > 1 else ()
    id = None if values.get("id") is None else str(values["id"])
    return _Read(Question(subject, question, tuple(choices), answer, where, several, id), numbered)


def _choices(values: dict, where: str, layout: Layout) -> list:
    """Those of a row: a list, one printed in a field by JSON or by Python, or a field each."""
    low, high = layout.choices
    choices = values.get("choices", values.get("options"))
    if choices is None:
        fields = [values.get(letter) for letter in string.ascii_lowercase[: max(high, 10)]]
        n = next((i for i, x in enumerate(fields) if i >= low and x in (None, "")), high)
        choices = fields[: min(n, high)]
        rest = zip(LETTERS[len(choices) : 10], fields[len(choices) :])
        beyond = [letter for letter, field in rest if field not in (None, "")]
        if beyond:
            raise ValueError(
                f"{where}: {layout.wanted} expected, but there is a choice {beyond[0]}"
            )
    if isinstance(choices, str):
        choices = _printed_list(choices, where)
    if not isinstance(choices, list) or not low <= len(choices) <= high:
        count = f"{len(choices)} in " if isinstance(choices, list) else ""
        raise ValueError(f"{where}: {layout.wanted} expected, not {count}{choices!r:.80}")
    return choices


def _printed_list(text: str, where: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # the latter reads values, and runs nothing
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return read(text)
    raise ValueError(f"{where}: choices {text!r:.60} is not a list as JSON or Python prints it")


def _given(values: dict) -> str:
    """A row's answer as text, or nothing."""
    name = next((name for name in ANSWERS if name in values), "answer")
    answer = str(values.get(name)).strip()
    return "" if answer in ("None", "nan") else answer


def _answer(values: dict, where: str, n: int, layout: Layout) -> tuple[int, bool]:
    """(index of a letter, False) or (number, True) of a row's answer to n choices."""
    name = next((name for name in ANSWERS if name in values), "answer")
    answer = _given(values)
    if not answer:
        columns = ", ".join(map(str, values))
        raise ValueError(
            f"{where}: no answer among its fields {columns:.200} (C-Eval's test split has none: "
            "--split val)"
        )
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]?", answer)
    if letter and LETTERS.index(letter[1].upper()) < n:
        return LETTERS.index(letter[1].upper()), False
    number = re.fullmatch(r"([0-9]{1,3})(\.0+)?", answer)  # pandas makes floats of a column
    if number and layout.answers_from is not None:
        index = int(number[1]) - layout.answers_from
        if 0 <= index < n:
            return index, False
    elif number and int(number[1]) <= n:
        return int(number[1]), True
    raise ValueError(
        f"{where}: {name} {answer!r:.60} is none of A to {LETTERS[n - 1]}, nor "
        + (
            f"0 to {n - 1} or 1 to {n}"
            if layout.answers_from is None
            else f"{layout.answers_from} to {n - 1 + layout.answers_from}"
        )
    )


def _first_number(found: list[_Read]) -> int:
    """What the numbered answers of a data set count from, 0 or 1: all of them decide. ValueError
    where they fit both or neither."""
    zero = last = other = None  # where the first of each is
    for q in (q for q, numbered in found if numbered):
        if q.answer == 0:
            zero = zero or q
        elif q.answer == len(q.choices):
            last = last or q
        other = other or q
    if zero and last:
        n = "four" if last.answer == 4 else last.answer
        raise ValueError(
            f"{last.where}: answer {last.answer} of {n} choices that count from 0 ({zero.where})"
        )
    if other and not (zero or last):
        n = len(other.choices)
        raise ValueError(
            f"{other.where}: the answers are numbers that may count from 0 or from 1: there is "
            f"neither a 0 nor a {n} among them; write A to {LETTERS[n - 1]}"
        )
    return 1 if last else 0


def _numbered_from(first: int, found: list[_Read]) -> list[Question]:
    return [q._replace(answer=q.answer - first) if numbered else q for q, numbered in found]


def subject_table(subjects: Iterable[str]) -> dict:
    """{"categories": {subject: category}, "names": {subject: name}} of the known data set
    (configs/subjects/) that shares most subjects; both empty if none shares any."""
    best, table = 0, {}
    for path in sorted((CONFIGS_DIR / "subjects").glob("*.yaml"), reverse=True):
        candidate = load_yaml(path)
        members = {s: c for c, listed in candidate["categories"].items() for s in listed}
        shared = len(members.keys() & set(subjects))
        if shared > best:
            best, table = shared, {"categories": members, "names": candidate.get("names", {})}
    return table or NO_TABLE

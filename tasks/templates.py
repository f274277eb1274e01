"""Prompt templates: the words around a question, its choices and its answer.

template = load_template("lm_eval")                   # configs/prompts/lm_eval.yaml
template.render_question(q) + template.render_answer(q, q.answer, "letter")
"""

import functools
import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from config import CONFIGS_DIR
from plain_yaml import find_yaml, load_yaml
from tasks.questions import LETTERS, Question

SCORINGS = ("letter", "continuation", "generate")
DEFAULTS = {"description": "", "separator": "\n\n", "strip_question": False}
# fields that the first templates did not have: in a hash only where they say something
LATER = {"listed": "{letter}. {choice}\n", "blank": ""}


@dataclass(frozen=True)
class Template:
    """A prompt: description, then for each example question + answer + separator, then a question.

    Fields in braces: {subject} (underscores as spaces), {subject_name} (its Chinese name, if known)
    in the description; {question}, {a}, {b}, … (one choice each) or {choices} (as many as there
    are, each as `listed` says) in the question; {letter} or {choice} (the right choice's text) in
    the answer. Of a sentence with a `blank`, {before} {choice} in the question and {after} in the
    answer: each choice is put in, and what comes after is scored. strip_question removes white
    space around the question.
    """

    name: str
    description: str
    question: str
    answer: str
    separator: str
    strip_question: bool
    listed: str = "{letter}. {choice}\n"
    blank: str = ""

    @property
    def hash(self) -> str:
        fields = asdict(self) | {"name": None}
        fields = {k: v for k, v in fields.items() if k not in LATER or v != LATER[k]}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scorings(self) -> tuple[str, ...]:
        """What makes sense: letters can only be asked for where the prompt shows them."""
        return SCORINGS if "{letter}" in self.answer else ("continuation",)

    @property
    def fills_in(self) -> bool:
        """Whether each choice has a context of its own, and what comes after is scored."""
        return "{after}" in self.answer

    @functools.cached_property
    def n_shown(self) -> int | None:
        """How many choices its question shows in fields of their own, None if it shows none so."""
        names = {name for _, name, _, _ in string.Formatter().parse(self.question)}
        return len(names & set(LETTERS.lower())) or None

    def check(self, q: Question, scoring: str) -> None:
        """ValueError for a question that it cannot ask."""
        n = len(q.choices)
        if self.n_shown not in (None, n):
            raise ValueError(
                f"{q.where}: template {self.name} shows {self.n_shown} choices, the question has "
                f"{n}: --template letters shows as many as there are"
            )
        if scoring != "continuation" and n > len(LETTERS):
            raise ValueError(f"{q.where}: no letters for {n} choices: --scoring continuation")
        if self.blank and self.blank not in q.question:
            raise ValueError(f"{q.where}: no {self.blank!r} in the question, to put a choice in")

    def render_question(self, q: Question, rotation: int = 0, index: int = 0) -> str:
        """A question with its choices, each moved `rotation` places on; where they are put into the
        text, with the one at place `index`."""
        choices = q.choices[rotation:] + q.choices[:rotation]
        text = q.question.strip() if self.strip_question else q.question
        fields = dict(zip(LETTERS.lower(), choices)) | {"question": text}
        if self.blank:
            fields |= {"before": text.partition(self.blank)[0], "choice": choices[index]}
        else:
            lines = zip(LETTERS, choices)
            listed = [self.listed.format(letter=letter, choice=c) for letter, c in lines]
            fields["choices"] = "".join(listed)
        return self.question.format(**fields)

    def render_answer(self, q: Question, index: int, scoring: str, rotation: int = 0) -> str:
        """The answer at place `index` among the rotated choices. Where whole choices are scored,
        examples are answered with whole choices too."""
        whole = scoring == "continuation"
        answer = self.answer.replace("{letter}", "{choice}") if whole else self.answer
        fields = {"choice": q.choices[(index + rotation) % len(q.choices)]}
        fields["letter"] = LETTERS[index] if index < len(LETTERS) else "?"
        if self.blank:
            fields["after"] = q.question.partition(self.blank)[2].strip()
        return answer.format(**fields)

    def render_head(
        self, subject: str, name: str | None, examples: Sequence[Question], scoring: str
    ) -> str:
        """All that comes before the question that is asked."""
        text = self.render_description(subject, name)
        for q in examples:
            text += "".join(self.render_example(q, scoring)) + self.separator
        return text

    def render_description(self, subject: str, name: str | None) -> str:
        words = subject.replace("_", " ")
        return self.description.format(subject=words, subject_name=name or words)

    def render_example(self, q: Question, scoring: str) -> tuple[str, str]:
        """(a question, its right answer)"""
        return self.render_question(q, index=q.answer), self.render_answer(q, q.answer, scoring)


def load_template(name: str | Path) -> Template:
    """A template of configs/prompts/ by its name, or a YAML file of one's own."""
    path = find_yaml(name, CONFIGS_DIR / "prompts", "--template")
    return make_template(load_yaml(path), path.stem, str(path))


def make_template(values: dict, name: str, where: str) -> Template:
    """The Template of the fields of a YAML mapping; ValueError names `where` and the field."""
    values = DEFAULTS | LATER | values
    fields = set(Template.__dataclass_fields__) - {"name"}
    if values.keys() != fields:
        wrong = sorted(values.keys() ^ fields)
        raise ValueError(f"{where}: field {wrong[0]!r} is unknown or missing; {sorted(fields)}")
    for field in fields:
        kind, what = (bool, "true or false") if field == "strip_question" else (str, "text")
        if type(values[field]) is not kind:
            raise ValueError(f"{where}: {field} must be {what}, not {values[field]!r:.60}")
    template = Template(name, **values)
    probe = Question("subject", f"question {template.blank}", tuple("abcdefghij"), 0, "")
    try:
        template.render_head("subject", None, [probe], "letter")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: a field in braces is unknown: {error}") from None
    ends = [field for field in ("{letter}", "{choice}", "{after}") if field in template.answer]
    if len(ends) != 1:
        raise ValueError(f"{where}: answer must have {{letter}} or {{choice}}, not both")
    if template.blank and not ("{choice}" in template.question and template.fills_in):
        raise ValueError(f"{where}: with a blank, question needs {{choice}} and answer {{after}}")
    if not template.render_question(probe).strip():
        raise ValueError(f"{where}: question is empty")
    return template

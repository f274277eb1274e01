"""The choice sets: how each lies in files, how it is asked, and which of its figures is published.

    choice_set = load_set("arc_challenge")                # configs/choice_sets/arc_challenge.yaml
    choice_set.layout                                     # for tasks.questions.read_data
    choice_set.own.render_question(q)

configs/choice_sets/README.md says what the keys of such a file mean, and with which published
numbers a set's own template and scoring can be compared.
"""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from config import CONFIGS_DIR
from plain_yaml import find_yaml, load_yaml
from tasks.layouts import Layout, read_layout
from tasks.questions import QuestionSet
from tasks.templates import SCORINGS, Template, load_template, make_template

SETS_DIR = CONFIGS_DIR / "choice_sets"
NORMALISATIONS = ("characters", "bytes", "none")
METRICS = ("accuracy", "accuracy_normalised", "right_mass")
KINDS = {  # of a set's keys, beside the template: what each must be
    "choices": (int, list),
    "files": (dict,),
    "rows": (list,),
    "ask": (str,),
    "few_shot": (str,),
    "for_all": (bool,),
    "rewrites": (list,),
    "answers_from": (int,),
    "answers_beside": (str,),
    "hidden": (list,),
    "fetch": (str,),
    "scoring": (str,),
    "normalisation": (str,),
    "metric": (str,),
    "published": (dict,),
}


@dataclass(frozen=True)
class ChoiceSet:
    """own: its template. scoring: how it is asked by default. normalisation: what a choice's length
    is counted in, for accuracy_normalised. metric: the one that is published, which ranks
    checkpoints. published: {number of questions: which release or split that is}."""

    name: str
    layout: Layout
    own: Template
    scoring: str
    normalisation: str
    metric: str
    published: dict[int, str]

    def template(self, name: str) -> Template:
        return self.own if name == self.own.name else load_template(name)

    def scoring_of(self, template: Template) -> str:
        """How a template is scored unless one says how."""
        return self.scoring if template == self.own else template.scorings[0]

    @property
    def protocol(self) -> dict:
        """What a record says of the set beside its questions and its template. MMLU's records are
        older than sets, and stay under their names."""
        if self.name == "mmlu":
            return {}
        decides = [asdict(self.layout), self.normalisation, self.metric]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return {"set": self.name, "set_hash": digest, "normalisation": self.normalisation}

    def release_of(self, data: QuestionSet) -> str | None:
        """Which release or split so many questions are, in words; None where the set does not
        say."""
        n = len(data.questions)
        if n in self.published or not self.published:
            return self.published.get(n)
        known = ", ".join(f"{size:,} of the {words}" for size, words in self.published.items())
        return f"{n:,} questions, unlike the {known}: not a score"


@functools.cache
def load_set(name: str) -> ChoiceSet:
    """A set of configs/choice_sets/ by its name, or a YAML file of one's own. ValueError names the
    file and the key."""
    path = find_yaml(name, SETS_DIR, "--set")
    values = load_yaml(path)
    _check(values, path)
    template = values.pop("template")
    if isinstance(template, str):
        own = load_template(template)
    else:
        own = make_template(template, path.stem, f"{path}: template")
    scoring = values.pop("scoring", own.scorings[0])
    if scoring not in own.scorings:
        allowed = " or ".join(own.scorings)
        raise ValueError(f"{path}: scoring must be {allowed} with its template, not {scoring}")
    published = values.pop("published", {})
    for size, words in published.items():
        if type(size) is not int or not isinstance(words, str):
            raise ValueError(f"{path}: published must have `number of questions: text` lines")
    normalisation = values.pop("normalisation", "characters")
    metric = values.pop("metric", "accuracy")
    layout = read_layout(values, path.stem, str(path))
    return ChoiceSet(path.stem, layout, own, scoring, normalisation, metric, published)


def _check(values: dict, path: Path) -> None:
    """Every key known, and of its kind."""
    unknown = sorted(values.keys() - KINDS.keys() - {"template"})
    if unknown:
        raise ValueError(
            f"{path}: {unknown[0]!r} is unknown; a set has template, {', '.join(KINDS)}"
        )
    if not isinstance(values.get("template"), str | dict):
        raise ValueError(
            f"{path}: template must be a name in configs/prompts, or `question: …` and `answer: …`"
        )
    for key, kinds in KINDS.items():
        if key in values and type(values[key]) not in kinds:
            names = " or ".join(WORDS[kind] for kind in kinds)
            raise ValueError(f"{path}: {key} must be {names}, not {values[key]!r:.60}")
    for key, allowed in (
        ("scoring", SCORINGS),
        ("normalisation", NORMALISATIONS),
        ("metric", METRICS),
    ):
        if key in values and values[key] not in allowed:
            raise ValueError(
                f"{path}: {key} must be one of {', '.join(allowed)}, not {values[key]!r:.60}"
            )


WORDS = {int: "a whole number", list: "a list", dict: "`key: value` lines", str: "text"}
WORDS |= {bool: "true or false"}

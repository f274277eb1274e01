"""Four-choice questions from files, and the prompt templates that ask them.

    from tasks.questions import load_template, read_data
    data = read_data("data/mmlu", num_few_shot=5)         # data.questions, data.examples by subject
    template = load_template("lm_eval")                   # configs/prompts/lm_eval.yaml

Reads MMLU's original layout (headerless CSV in dev/, val/, test/), CSV with a header, CMMLU's and
C-Eval's CSV, and JSON or parquet rows of question, choices, answer, subject. Every field is text
as it stands ("None" and "NA" too); what is wrong is named with its file and line. Whether numbered
answers begin at 0 or at 1 is told by all of them: one off, and every score is wrong.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import CONFIGS_DIR, load_yaml
from inputs import read_jsonl
from packed import open_packed, parquet_rows, suffix_of

LETTERS = "ABCD"
SCORINGS = ("letter", "continuation", "generate")


# ---------------------------------------------------------------------------------------------
# Questions

SPLITS = {"dev": ("dev",), "val": ("val", "validation", "valid"), "test": ("test",)}
JSON = (".jsonl", ".ndjson", ".json")
FORMATS = (".csv", *JSON, ".parquet")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
ANSWERS = ("answer", "target", "label", "gold", "correct_answer", "answer_index", "answer_idx")
LONGEST_FIELD = 2**26  # characters of a field of CSV: what a quotation mark too many may swallow
WHERE_TO_GET = (
    "scripts/fetch_mmlu.sh downloads MMLU; it must lie as {root}/dev/SUBJECT_dev.csv and "
    "{root}/{split}/SUBJECT_{split}.csv (question, A, B, C, D, answer), or as JSONL or parquet "
    "files of question, choices, answer, subject named after their split"
)


class Question(NamedTuple):
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    where: str  # file:line


@dataclass(frozen=True)
class QuestionSet:
    """questions: what is asked, subject by subject. examples: by subject, what comes before."""

    questions: list[Question]
    examples: dict[str, list[Question]]
    files: int
    hash: str
    examples_hash: str

    @functools.cached_property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(q.subject for q in self.questions))


def read_data(
    data_path: str | Path,
    num_few_shot: int = 0,
    split: str = "test",
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
) -> QuestionSet:
    """The questions of a split, and the first `num_few_shot` of each subject's dev split.

    data_path: a directory in MMLU's, CMMLU's, C-Eval's or a Hugging Face data set's layout, or one
    file. limit: so many questions of each subject. Raises ValueError naming file and line.
    """
    root = Path(data_path)
    read, files = _read_split(root, split)
    read_dev, dev_files = ([], []) if root.is_file() else _read_split(root, "dev")
    first = _first_number(read + read_dev)
    asked, dev = _numbered_from(first, read), _numbered_from(first, read_dev)
    if not asked:
        remedy = WHERE_TO_GET.format(root=root, split=split)
        raise ValueError(f"{root}: no {split} questions there; {remedy}")
    by_subject = {}
    for q in asked:
        by_subject.setdefault(q.subject, []).append(q)
    missing = sorted({q.subject for q in dev} - by_subject.keys())
    if missing and not subjects:
        raise ValueError(
            f"{root}: the {split} split has no question of {', '.join(missing)}, which the dev "
            "split has examples of; --subjects names those to ask"
        )
    for name in subjects or ():
        if name not in by_subject:
            raise ValueError(
                f"--subjects: {root} has no {name!r}; it has {', '.join(sorted(by_subject))}"
            )
    chosen = sorted(set(subjects or by_subject))
    questions = [q for name in chosen for q in by_subject[name][:limit]]
    examples = {name: [] for name in chosen}
    if num_few_shot:
        for q in dev:
            if q.subject in examples:
                examples[q.subject].append(q)
        files += dev_files
    for name, found in examples.items():
        if len(found) < num_few_shot:
            remedy = " (one file has no dev split: name its directory)" if root.is_file() else ""
            raise ValueError(
                f"{root}: {num_few_shot} few-shot examples asked for, but the dev split has "
                f"{len(found)} of subject {name!r}{remedy}"
            )
        del found[num_few_shot:]
    shown = itertools.chain.from_iterable(examples.values())
    return QuestionSet(questions, examples, len(files), _digest(questions), _digest(shown))


def _digest(questions) -> str:
    return hashlib.sha256(json.dumps([q[:4] for q in questions]).encode()).hexdigest()


def _read_split(root: Path, split: str) -> tuple[list["_Read"], list]:
    files = _split_files(root, split)
    questions = []
    for path, subject in files:
        kind = suffix_of(path)
        reader = _csv_rows if kind == ".csv" else _json_rows if kind in JSON else parquet_rows
        found = [_question(values, subject, where) for where, values in reader(path)]
        if not found:
            raise ValueError(f"{path}:1: no question in this file")
        questions += found
    return questions, files


def _stem(path: Path) -> str:
    """A file's name without what it is and how it is packed."""
    name = path.name.lower()
    return path.name[: name.rindex(suffix_of(path))] if suffix_of(path) else path.name


def _split_files(root: Path, split: str) -> list[tuple[Path, str | None]]:
    """(file, its subject or None if the rows must name it), in the order of their names."""
    if root.is_file():
        if suffix_of(root) not in FORMATS:
            raise ValueError(f"{root}: not one of {', '.join(FORMATS)}")
        own = suffix_of(root) == ".csv"
        return [(root, _stem(root).removesuffix(f"_{split}") if own else None)]
    for base, name in itertools.product((root, root / "data"), SPLITS[split]):
        is_split = re.compile(rf"{name}([-.].*)?").fullmatch  # test, test-00000-of-00001

        def found_in(folder):
            paths = sorted(folder.glob("*")) if folder.is_dir() else []
            paths = [p for p in paths if not p.name.startswith(".") and p.name not in NO_DATA]
            return [p for p in paths if suffix_of(p) in FORMATS]

        inside = found_in(base / name)
        if inside:
            subjects = [_stem(p).removesuffix(f"_{name}") for p in inside]
            return [(p, None if is_split(s) else s) for p, s in zip(inside, subjects)]
        beside = [p for p in found_in(base) if is_split(_stem(p))]
        if beside:
            return [(p, None) for p in beside]
        folders = [base / "all"] if (base / "all").is_dir() else sorted(base.glob("*/"))
        nested = [(p, f.name) for f in folders for p in found_in(f) if is_split(_stem(p))]
        if nested:
            return [(p, None if folder == "all" else folder) for p, folder in nested]
    return []


def _csv_rows(path: Path):
    """(file:line, fields by name): with a header, or MMLU's six columns without one."""
    names, line = None, 1
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open_packed(path) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not row:
                    continue
                if names is None:
                    names = [re.sub(r"^(choice|option)[ _]", "", n.strip().lower()) for n in row]
                    if "question" in names and {*ANSWERS, "a"} & set(names):
                        continue
                    names = ["question", "a", "b", "c", "d", "answer"]
                if len(row) != len(names):
                    raise ValueError(f"{where}: {len(row)} fields where {len(names)} are expected")
                yield where, dict(zip(names, row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{line}: not CSV in UTF-8: {error}") from None


def _json_rows(path: Path):
    for where, _, values in read_jsonl(path):
        yield where, values


class _Read(NamedTuple):
    """A question as its file has it."""

    question: Question
    numbered: bool  # its answer is a number that counts from 0 or from 1


def _question(values, subject, where) -> _Read:
    values = {str(name).lower(): value for name, value in values.items()}
    choices = _choices(values, where)
    subject = values.get("subject") or subject
    question = values.get("question")
    for name, text in [("subject", subject), ("question", question), *zip(LETTERS, choices)]:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name} is missing or not text: {text!r:.60}")
    if not question.strip():
        raise ValueError(f"{where}: question is empty")
    answer, numbered = _answer(values, where)
    return _Read(Question(subject, question, tuple(choices), answer, where), numbered)


def _choices(values: dict, where: str) -> list:
    """The four of a row: a list, one printed in a field by JSON or by Python, or a field each."""
    choices = values.get("choices", values.get("options"))
    if choices is None:
        choices = [values.get(letter.lower()) for letter in LETTERS]
        beyond = next((x for x in "EFGHIJ" if values.get(x.lower()) not in (None, "")), None)
        if beyond:
            raise ValueError(f"{where}: four choices expected, but there is a choice {beyond}")
    if isinstance(choices, str):
        choices = _printed_list(choices, where)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        count = f"{len(choices)} in " if isinstance(choices, list) else ""
        raise ValueError(f"{where}: four choices expected, not {count}{choices!r:.80}")
    return choices


def _printed_list(text: str, where: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # the latter reads values, and runs nothing
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return read(text)
    raise ValueError(f"{where}: choices {text!r:.60} is not a list as JSON or Python prints it")


def _answer(values: dict, where: str) -> tuple[int, bool]:
    """(index of a letter, False) or (number, True) of a row's answer."""
    name = next((name for name in ANSWERS if name in values), "answer")
    answer = str(values.get(name)).strip()
    if answer in ("", "None", "nan"):
        columns = ", ".join(map(str, values))
        raise ValueError(
            f"{where}: no answer among its fields {columns:.200} (C-Eval's test split has none: "
            "--split val)"
        )
    letter = re.fullmatch(r"\(?([A-Da-d])[).:]?", answer)
    if letter:
        return LETTERS.index(letter[1].upper()), False
    if number := re.fullmatch(r"([0-4])(\.0+)?", answer):  # pandas makes floats of a column
        return int(number[1]), True
    raise ValueError(f"{where}: {name} {answer!r:.60} is none of A to D, nor 0 to 3 or 1 to 4")


def _first_number(found: list[_Read]) -> int:
    """What the numbered answers of a data set count from, 0 or 1: all of them decide. ValueError
    where they fit both or neither."""
    said: dict[int, str] = {}  # number: where it is first
    for question, numbered in found:
        if numbered:
            said.setdefault(question.answer, question.where)
    if 0 in said and 4 in said:
        raise ValueError(f"{said[4]}: answer 4 of four choices that count from 0 ({said[0]})")
    if said and not {0, 4} & said.keys():
        where = next(iter(said.values()))
        raise ValueError(
            f"{where}: the answers are numbers that may count from 0 or from 1: there is neither a "
            "0 nor a 4 among them; write A to D"
        )
    return 1 if 4 in said else 0


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
    return table or {"categories": {}, "names": {}}


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    """A prompt: description, then for each example question + answer + separator, then a question.

    Fields in braces: {subject} (underscores as spaces), {subject_name} (its Chinese name, if known)
    in the description; {question}, {a}, {b}, {c}, {d} in the question; {letter} or {choice} (the
    right choice's text) in the answer. strip_question removes white space around the question.
    """

    name: str
    description: str
    question: str
    answer: str
    separator: str
    strip_question: bool

    @property
    def hash(self) -> str:
        fields = asdict(self) | {"name": None}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scorings(self) -> tuple[str, ...]:
        """What makes sense: letters can only be asked for where the prompt shows them."""
        return SCORINGS if "{letter}" in self.answer else ("continuation",)

    def render_question(self, q: Question, rotation: int = 0) -> str:
        """A question with its choices, each moved `rotation` places on."""
        choices = q.choices[rotation:] + q.choices[:rotation]
        text = q.question.strip() if self.strip_question else q.question
        return self.question.format(question=text, **dict(zip("abcd", choices)))

    def render_answer(self, q: Question, index: int, scoring: str, rotation: int = 0) -> str:
        """The answer at place `index` among the rotated choices. Where whole choices are scored,
        examples are answered with whole choices too."""
        whole = scoring == "continuation"
        answer = self.answer.replace("{letter}", "{choice}") if whole else self.answer
        choice = q.choices[(index + rotation) % len(LETTERS)]
        return answer.format(letter=LETTERS[index], choice=choice)

    def render_head(
        self, subject: str, name: str | None, examples: Sequence[Question], scoring: str
    ) -> str:
        """All that comes before the question that is asked."""
        words = subject.replace("_", " ")
        text = self.description.format(subject=words, subject_name=name or words)
        for q in examples:
            text += self.render_question(q) + self.render_answer(q, q.answer, scoring)
            text += self.separator
        return text


def load_template(name: str | Path) -> Template:
    """A template of configs/prompts/ by its name, or a YAML file of one's own."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS_DIR / "prompts" / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.yaml"))
            raise ValueError(f"--template {name!r} is none of {', '.join(known)}, nor a YAML file")
    values = {"separator": "\n\n", "strip_question": False} | load_yaml(path)
    fields = set(Template.__dataclass_fields__) - {"name"}
    if values.keys() != fields:
        wrong = sorted(values.keys() ^ fields)
        raise ValueError(f"{path}: field {wrong[0]!r} is unknown or missing; {sorted(fields)}")
    for name in fields:
        kind, what = (bool, "true or false") if name == "strip_question" else (str, "text")
        if type(values[name]) is not kind:
            raise ValueError(f"{path}: {name} must be {what}, not {values[name]!r:.60}")
    template = Template(path.stem, **values)
    probe = Question("subject", "question", tuple("wxyz"), 0, "")
    try:
        template.render_head("subject", None, [probe], "letter")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: a field in braces is unknown: {error}") from None
    if ("{letter}" in template.answer) == ("{choice}" in template.answer):
        raise ValueError(f"{path}: answer must have {{letter}} or {{choice}}, not both")
    if not template.render_question(probe).strip():
        raise ValueError(f"{path}: question is empty")
    return template

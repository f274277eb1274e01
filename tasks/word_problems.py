"""Word problems with a number for an answer (GSM8K, MGSM), and the prompts that ask them.

    from tasks.word_problems import load_prompt, read_problems
    problems = read_problems("data/gsm8k")              # test.jsonl there; or a file; or mgsm_*.tsv
    prompt = load_prompt("gsm8k")                       # configs/word_problems/gsm8k.yaml
    text = prompt.render(problems[0], prompt.shots_of("data/gsm8k"))

GSM8K's JSON lines hold `question` and `answer`, the worked solution ending in `#### 72`; MGSM's
mgsm_LANG.tsv a question and its number in a line. What is wrong is named with file and line.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from config import CONFIGS_DIR
from inputs import read_jsonl, text_lines
from plain_yaml import check_fields, find_yaml, load_yaml
from recording.identity import rows_hash
from tasks.answers import number
from tasks.chat import Chat

PROMPTS_DIR = CONFIGS_DIR / "word_problems"
WHERE_TO_GET = (
    "scripts/fetch_gsm8k.sh downloads GSM8K (train.jsonl, test.jsonl, cot_shots.jsonl, "
    "cot_llama_shots.jsonl) and MGSM "
    "(mgsm_LANG.tsv)"
)

# ---------------------------------------------------------------------------------------------
# Problems


class Problem(NamedTuple):
    name: str  # keys its random numbers: the file's stem and line
    question: str
    solution: str  # what an example shows; the bare number where nobody worked it out
    gold: Fraction
    language: str
    where: str  # file:line


def read_problems(
    path: str | Path, languages: Sequence[str] = (), limit: int | None = None
) -> list[Problem]:
    """The problems of a directory or file, the first `limit` of each file; `languages`: of MGSM's
    files only these. ValueError names file and line, or what is not there."""
    root = Path(path)
    files = [root] if root.is_file() else _files_of(root)
    if not files:
        raise ValueError(f"{root}: no test.jsonl and no mgsm_LANG.tsv there; {WHERE_TO_GET}")
    known = {_language(file): file for file in files}
    for language in languages:
        if language not in known:
            there = ", ".join(sorted(known))
            raise ValueError(f"--languages {language}: {root} has {there}")
    problems = []
    for file in files:
        if not languages or _language(file) in languages:
            problems += _read_file(file)[:limit]
    if not problems:
        raise ValueError(f"{root}: no problem in it")
    return problems


def _files_of(root: Path) -> list[Path]:
    if (root / "test.jsonl").is_file():
        return [root / "test.jsonl"]
    return sorted(root.glob("mgsm_*.tsv"))


def _language(path: Path) -> str:
    """Of mgsm_de.tsv: de; of anything else English, GSM8K's."""
    found = re.fullmatch(r"mgsm_([a-z]{2})\.tsv", path.name)
    return found[1] if found else "en"


def _read_file(path: Path) -> list[Problem]:
    rows = _read_tsv(path) if path.suffix == ".tsv" else _read_json(path)
    language, problems = _language(path), []
    for line, where, question, solution in rows:
        gold = number(solution, "en")  # the sets write numbers as English does
        if not question.strip() or gold is None:
            raise ValueError(f"{where}: a question and an answer with a number in it are needed")
        problems.append(Problem(f"{path.stem}/{line}", question, solution, gold, language, where))
    return problems


def _read_json(path: Path):
    for where, _, row in read_jsonl(path, "file of problems"):
        texts = row.get("question"), row.get("answer")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: fields question and answer must be text")
        yield where.rpartition(":")[2], where, *texts


def _read_tsv(path: Path):
    for where, text in text_lines(path):
        row = text.split("\t")
        if len(row) != 2:
            raise ValueError(f"{where}: a question, a tab and a number expected")
        yield where.rpartition(":")[2], where, *row


def data_hash(problems: Sequence[Problem]) -> str:
    """sha256 of what is asked and of what is right."""
    return rows_hash([p.question, p.solution, p.language] for p in problems)


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt as its YAML says.

    question, answer: with {question}, {solution}; languages: {language: {field: text}} where they
    differ. shots: "train" (train.jsonl beside the data), a file's name there, or "none". strict:
    the regular expression of the form in which an answer ends. punctuation: see answers.same_text.
    """

    name: str
    question: str
    answer: str
    separator: str
    shots: str
    num_few_shot: int
    stop: tuple[str, ...]
    strict: str
    punctuation: bool = True
    languages: dict | None = None

    def shots_of(self, data_path: str | Path, wanted: int | None = None) -> list[Problem]:
        """The examples, the same for every question: the first `wanted`, by default the prompt's
        own number. ValueError where there are fewer."""
        wanted = self.num_few_shot if wanted is None else wanted
        if not wanted:
            return []
        if self.shots == "none":
            raise ValueError(f"--num-few-shot {wanted}: prompt {self.name} has no examples")
        root = Path(data_path)
        root = root if root.is_dir() else root.parent
        file = root / ("train.jsonl" if self.shots == "train" else self.shots)
        if not file.is_file():
            raise ValueError(f"{file}: no such file of examples; {WHERE_TO_GET}")
        shots = _read_file(file)[:wanted]
        if len(shots) < wanted:
            raise ValueError(f"{file}: {len(shots)} examples, --num-few-shot {wanted} asked for")
        return shots

    def of_language(self, language: str) -> "Prompt":
        """The same in that language's words."""
        if self.languages is None:
            return self
        if language not in self.languages:
            raise ValueError(f"prompt {self.name} has no words in language {language!r}")
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= self.languages[language]
        return Prompt(**own | {"languages": None, "stop": tuple(own["stop"])})

    def render(self, problem: Problem, shots: Sequence[Problem], chat: Chat | None = None) -> str:
        """What is asked: plain text, or what a chat template makes of it."""
        own = self.of_language(problem.language)
        asked = own.question.replace("{question}", problem.question)
        before = [
            (
                own.question.replace("{question}", shot.question),
                own.answer.replace("{solution}", shot.solution),
            )
            for shot in shots
        ]
        if chat:
            return chat.ask(asked, before, separator=own.separator)
        return own.separator.join([*(q + a for q, a in before), asked])

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def load_prompt(name: str) -> Prompt:
    """A prompt of configs/word_problems by its name, or a YAML file of one's own."""
    path = find_yaml(name, PROMPTS_DIR, "--prompt")
    values = load_yaml(path)
    texts = {f.name: str for f in fields(Prompt) if f.name != "name"}
    others = {"num_few_shot": int, "stop": list, "punctuation": bool, "languages": dict}
    check_fields(path, values, texts | others, optional=("punctuation", "languages"))
    _check_words(path, values)
    return Prompt(path.stem, **values | {"stop": tuple(values["stop"])})


def _check_words(path: Path, values: dict) -> None:
    own = (values.get("languages") or {}).values()
    for words in [values, *(values | words for words in own)]:
        if "{question}" not in words["question"] or "{solution}" not in words["answer"]:
            raise ValueError(f"{path}: question needs {{question}}, answer {{solution}}")
        try:
            re.compile(words["strict"])
        except re.error as error:
            raise ValueError(f"{path}: strict is no regular expression: {error}") from None

"""Texts to be put into other texts (translation and its like), and the prompts that ask for them.

    segments = read_segments("test.jsonl")                    # source and reference, or references
    segments = read_segments("src.txt", ["ref.txt"])          # parallel files, line by line
    segments = read_segments("mgsm_en.tsv", ["mgsm_de.tsv"])  # of a TSV its first column
    prompt = load_prompt("lm_eval")                           # configs/translation/lm_eval.yaml
    text = prompt.render(segments[5], segments[:5], "English", "German")

A TSV alone holds a source, a tab, a reference and further ones behind tabs. What is wrong is named
with file and line.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from config import CONFIGS_DIR
from inputs import read_jsonl, text_lines
from packed import suffix_of
from plain_yaml import check_fields, find_yaml, load_yaml
from recording.identity import rows_hash
from tasks.chat import Chat

PROMPTS_DIR = CONFIGS_DIR / "translation"
FIELDS = ("source", "reference")

# ---------------------------------------------------------------------------------------------
# Segments


class Segment(NamedTuple):
    name: str  # keys its random numbers: the file's stem and line
    source: str
    references: tuple[str, ...]
    where: str  # file:line


def read_segments(
    path: str | Path,
    references: Sequence[str] = (),
    names: Sequence[str] = FIELDS,
    limit: int | None = None,
) -> list[Segment]:
    """The first `limit` segments of JSON lines, of a TSV, or of a text and the texts `references`
    parallel to it. names: the fields of JSON lines, "translation.de" being a field in a field; the
    second may hold several references. An empty reference is none, where there are others.
    ValueError names file and line, or what is not there."""
    if references:
        rows = _parallel(Path(path), [Path(other) for other in references])
    elif suffix_of(path) == ".tsv":
        rows = ((where, text.split("\t")) for where, text in text_lines(Path(path)))
    elif suffix_of(path) in (".jsonl", ".json"):
        rows = _of_json(Path(path), *names)
    else:
        raise ValueError(
            f"{path}: a .jsonl or .tsv file with sources and references, or a text of sources with "
            "--references FILE"
        )
    segments = []
    for where, (source, *found) in islice(rows, limit):
        kept = tuple(text.rstrip() for text in found if text.strip())
        if not source.strip() or not kept:
            raise ValueError(f"{where}: a source and a reference that are not empty are needed")
        name = f"{Path(path).stem}/{where.removeprefix(str(path)).lstrip(': ')}"
        segments.append(Segment(name, source.strip(), kept, where))
    if not segments:
        raise ValueError(f"{path}: no segment in it")
    return segments


def _parallel(source: Path, others: list[Path]):
    files = [text_lines(path) for path in (source, *others)]
    for path, lines in zip(others, files[1:]):
        if len(lines) != len(files[0]):
            raise ValueError(
                f"{path} has {len(lines):,} lines, {source} {len(files[0]):,}: line by line, one "
                "must be the reference of the other"
            )
    tables = [suffix_of(path) == ".tsv" for path in (source, *others)]
    for row in zip(*files):
        texts = [line.partition("\t")[0] if t else line for (_, line), t in zip(row, tables)]
        yield row[0][0], texts


def _of_json(path: Path, source: str, reference: str):
    for where, _, row in read_jsonl(path, "file of segments"):
        asked, wanted = _value(row, source, where), _value(row, reference, where)
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if not isinstance(asked, str) or not all(isinstance(text, str) for text in wanted):
            raise ValueError(f"{where}: {source} must be text, {reference} text or a list of texts")
        yield where, [asked, *wanted]


def _value(row: Any, name: str, where: str) -> Any:
    for part in name.split("."):
        if not isinstance(row, dict) or part not in row:
            raise ValueError(
                f"{where}: no field {name!r}; --fields SOURCE REFERENCE says what they are called"
            )
        row = row[part]
    return row


def data_hash(segments: Sequence[Segment]) -> str:
    """sha256 of what is asked and of what it is compared with."""
    return rows_hash([s.source, *s.references] for s in segments)


# ---------------------------------------------------------------------------------------------
# Languages

LANGUAGES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian",
    "bg": "Bulgarian", "bn": "Bengali", "bo": "Tibetan", "bs": "Bosnian", "ca": "Catalan",
    "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "dz": "Dzongkha", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati",
    "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "jv": "Javanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer",
    "kn": "Kannada", "ko": "Korean", "ky": "Kyrgyz", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch",
    "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian",
    "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili",
    "ta": "Tamil", "te": "Telugu", "tg": "Tajik", "th": "Thai", "tl": "Tagalog", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa",
    "yo": "Yoruba", "yue": "Cantonese", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


class Language(NamedTuple):
    code: str
    name: str  # in English, as prompts have it

    @classmethod
    def of(cls, text: str, flag: str) -> "Language":
        """Of "de", "de-AT" or "gsw=Swiss German"."""
        code, _, name = text.partition("=")
        code = code.replace("_", "-").lower()
        name = name or LANGUAGES.get(code) or LANGUAGES.get(code.partition("-")[0]) or ""
        if not code or not name:
            raise ValueError(f"{flag} {text}: not a code known here; {flag} {text or 'xx'}=NAME")
        return cls(code, name)


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt as its YAML says: {source}, {reference} and, where they are named, the languages
    {source_language} and {target_language}. instruction comes once, before everything."""

    name: str
    question: str
    answer: str
    separator: str
    num_few_shot: int
    stop: tuple[str, ...]
    instruction: str = ""

    @property
    def names_languages(self) -> bool:
        return "_language}" in self.instruction + self.question + self.answer

    def render(
        self,
        asked: Segment,
        shots: Sequence[Segment],
        source: str,
        target: str,
        chat: Chat | None = None,
    ) -> str:
        """The text that asks for a segment after `shots`, which show their first references; source
        and target: the languages' names. Plain, or what a chat template makes of it."""

        def filled(text: str, own: str = "", value: str = "") -> str:
            text = text.replace("{source_language}", source).replace("{target_language}", target)
            return text.replace(own, value) if own else text  # last: it may hold braces of its own

        before = [
            (
                filled(self.question, "{source}", shot.source),
                filled(self.answer, "{reference}", shot.references[0]),
            )
            for shot in shots
        ]
        task, question = filled(self.instruction), filled(self.question, "{source}", asked.source)
        if chat and chat.takes_system:
            return chat.ask(question, before, task.rstrip(), separator=self.separator)
        if chat:  # the task in words is never left out
            return chat.ask(task + question, before, separator=self.separator)
        return task + self.separator.join([*(q + a for q, a in before), question])

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def load_prompt(name: str) -> Prompt:
    """A prompt of configs/translation by its name, or a YAML file of one's own."""
    path = find_yaml(name, PROMPTS_DIR, "--prompt")
    values = {"instruction": ""} | load_yaml(path)
    texts = {f.name: str for f in fields(Prompt) if f.name != "name"}
    check_fields(path, values, texts | {"num_few_shot": int, "stop": list})
    if values["num_few_shot"] < 0:
        raise ValueError(f"{path}: num_few_shot must not be negative")
    for field, own in (("question", "{source}"), ("answer", "{reference}")):
        if values[field].count(own) != 1:
            raise ValueError(f"{path}: {field} needs {own}, once")
    if "{source}" in values["instruction"] or "{reference}" in values["instruction"]:
        raise ValueError(f"{path}: instruction must not hold {{source}} or {{reference}}")
    return Prompt(path.stem, **values | {"stop": tuple(values["stop"])})

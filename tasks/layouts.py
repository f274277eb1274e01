"""How a choice set lies in files: which file is which split, and what its rows call things.

    layout = read_layout({"choices": 4, "rows": [...]}, "arc_easy", where="arc_easy.yaml")
    values, right = layout.plain(row, "test.jsonl:3")      # {"question", "choices", ...}, [2]

A set's YAML says it in a small language, so that no set needs code. A path,
`question.choices.text`, goes through objects, and through each item of a list. A text holds paths
in braces, "{activity_label}: {ctx_b:capitalize}". Where a set is published in several forms, `rows`
lists them, and of a row the first that fits is read. configs/choice_sets/README.md says it all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "dev", "val", "test")
ROW_KEYS = ("question", "choices", "labels", "answer", "right", "subject", "id")
IN_BRACES = re.compile(r"\{([^{}:]+)(?::(\w+))?\}")
FILTERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "upper": str.upper,
    "capitalize": str.capitalize,  # the first letter large, all others small
}


class _Lacking(Exception):
    """A row has no value of the kind wanted at this place."""


@dataclass(frozen=True)
class Layout:
    """name: the set's. choices: how many a question may have, from and to. files: by split, the
    names that its file may have, without suffix; None: MMLU's layout, a file for each subject.
    rows: the forms of a row, each {key of ROW_KEYS: path, text or constant}; none: MMLU's.

    few_shot: the split that examples come from, or none; for_all: whether all questions share the
    first of them, or each subject has its own. rewrites: (pattern, replacement), applied to
    question and choices. answers_from: what numbered answers count from; None: told by the data.
    answers_beside: the end of the name of a file with one answer a line. hidden: splits whose
    answers are not published. fetch: the argument of scripts/fetch_choice_sets.sh.
    """

    name: str = "mmlu"
    choices: tuple[int, int] = (4, 4)
    files: dict[str, tuple[str, ...]] | None = None
    rows: tuple[dict, ...] = ()
    ask: str = "test"
    few_shot: str | None = "dev"
    for_all: bool = False
    rewrites: tuple[tuple[str, str], ...] = ()
    answers_from: int | None = None
    answers_beside: str | None = None
    hidden: tuple[str, ...] = ()
    fetch: str | None = None

    @property
    def wanted(self) -> str:
        """How many choices, in words."""
        low, high = self.choices
        if low == high:
            return f"{'four' if low == 4 else low} choices"
        return f"{low} to {high} choices"

    @property
    def has_subjects(self) -> bool:
        """Whether questions come by subject: in a file for each, or as a row's own field says."""
        return not self.rows or any("subject" in form for form in self.rows)

    def plain(self, row: dict, where: str) -> tuple[dict, list[int] | None]:
        """A row under the names that MMLU's rows have (question, choices, answer, subject, id), and
        which choices are right where the row says so by label, text or mark."""
        if not self.rows:
            return row, None
        lacking, unanswered = None, None
        for form in self.rows:
            try:
                values, right = self._read(form, row, where)
            except _Lacking as error:
                lacking = lacking or str(error)
                continue
            if right is not None or values.get("answer") not in (None, ""):
                return values, right
            unanswered = unanswered or (values, right)
        if unanswered is None:
            there = ", ".join(map(str, row))
            raise ValueError(
                f"{where}: {lacking}, which the rows of {self.name} have; its fields are "
                f"{there:.200}"
            )
        return unanswered

    def _read(self, form: dict, row: dict, where: str) -> tuple[dict, list[int] | None]:
        choices = [self._rewrite(text) for text in _choices_at(row, form["choices"])]
        values: dict[str, Any] = {
            "question": self._rewrite(_text(row, form["question"])),
            "choices": choices,
        }
        for key in ("subject", "id"):
            if key in form:
                values[key] = _text(row, form[key])
        if "right" in form:
            return values, _marked(row, form["right"], choices, where)
        return self._answered(values, row, form, where)

    def _answered(
        self, values: dict, row: dict, form: dict, where: str
    ) -> tuple[dict, list[int] | None]:
        """By a label that the choices have, by the right choice's text, or, left to the reader of
        letters and numbers, as it stands."""
        spec, choices = form["answer"], values["choices"]
        if isinstance(spec, int):
            return values, [spec]
        try:
            answer = self._rewrite(_text(row, spec)) if "{" in spec else _at(row, spec)
        except _Lacking:
            return values, None
        if answer in (None, "") or not ("labels" in form or "{" in spec):
            return values | {"answer": int(answer) if isinstance(answer, bool) else answer}, None
        names = list(map(str, _at(row, form["labels"]))) if "labels" in form else choices
        wanted = [str(one) for one in (answer if isinstance(answer, list) else [answer])]
        wanted = [one.strip() if "labels" in form else one for one in wanted]
        for one in wanted:
            if one not in names:
                raise ValueError(f"{where}: answer {one!r:.60} is none of {', '.join(names):.200}")
        return values, sorted({names.index(one) for one in wanted})

    def _rewrite(self, text: str) -> str:
        for pattern, replacement in self.rewrites:
            text = re.sub(pattern, replacement, text)
        return text


def _at(row: Any, path: str) -> Any:
    """The value at a path; of a list, the value in each of its items. A column may have dots in its
    name."""
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        try:
            inner = [item[part] for item in value] if isinstance(value, list) else value[part]
        except (KeyError, TypeError):
            raise _Lacking(f"there is no {path!r}") from None
        value = inner
    return value


def _text(row: dict, spec: str) -> str:
    """A text with the row's values in the place of what is in braces."""

    def value_of(found):
        value = _at(row, found[1])
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise _Lacking(f"{found[1]!r} is no text")
        return FILTERS[found[2]](str(value)) if found[2] else str(value)

    return IN_BRACES.sub(value_of, spec)


def _choices_at(row: dict, spec: str | list[str]) -> list[str]:
    """A list of texts at a path, the names of an object there that marks each of them by a number,
    or a text for each."""
    if isinstance(spec, list):
        return [_text(row, one) for one in spec]
    found = _at(row, spec)
    if isinstance(found, dict) and all(isinstance(mark, int) for mark in found.values()):
        return list(found)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise _Lacking(f"{spec!r} is no list of texts")
    return found


def _marked(row: dict, path: str, choices: list[str], where: str) -> list[int] | None:
    """Which choices are marked by 1 in a list, or an object, of marks at a path."""
    marks = _at(row, path)
    marks = list(marks.values()) if isinstance(marks, dict) else marks
    if not isinstance(marks, list) or not all(mark in (0, 1) for mark in marks):
        raise _Lacking(f"{path!r} is no list of 0 and 1")
    if len(marks) != len(choices) or 1 not in marks:
        raise ValueError(
            f"{where}: {len(choices)} choices, of which {path!r} marks {marks!r:.60}: a 1 or 0 for "
            "each is needed, and a 1 for one at least"
        )
    return [i for i, mark in enumerate(marks) if mark == 1]


# ---------------------------------------------------------------------------------------------
# From a set's YAML


def read_layout(values: dict, name: str, where: str) -> Layout:
    """The Layout of the keys that a set's YAML has of it. ValueError names `where` and the key."""
    _check_rows(values.get("rows", []), where)
    known = {key: value for key, value in values.items() if value is not None}
    low_high = known.pop("choices", [2, 10])
    low_high = [low_high] * 2 if isinstance(low_high, int) else low_high
    whole = isinstance(low_high, list) and [type(n) for n in low_high] == [int, int]
    if not whole or not 2 <= low_high[0] <= low_high[1]:
        raise ValueError(
            f"{where}: choices must be a number, or the least and the most, [2, 5], not "
            f"{low_high!r:.60}"
        )
    files = known.pop("files", None)
    for split, names in (files or {}).items():
        if split not in SPLITS or not _texts(names):
            raise ValueError(
                f"{where}: files must have lists of names by split ({', '.join(SPLITS)}), not "
                f"{split}: {names!r:.60}"
            )
    for pair in known.get("rewrites", []):
        _check_rewrite(pair, where)
    few_shot = known.pop("few_shot", "none")
    for key, split in (("ask", known.get("ask", "test")), ("few_shot", few_shot)):
        allowed = [*(files or SPLITS), *(["none"] if key == "few_shot" else [])]
        if split not in allowed:
            raise ValueError(f"{where}: {key} must be one of {', '.join(allowed)}, not {split!r}")
    known["rewrites"] = tuple(tuple(pair) for pair in known.get("rewrites", []))
    for key in ("rows", "hidden"):
        known[key] = tuple(known.get(key, []))
    return Layout(
        name=name,
        choices=(low_high[0], low_high[1]),
        files=files and {split: tuple(names) for split, names in files.items()},
        few_shot=None if few_shot == "none" else few_shot,
        **known,
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _check_rewrite(pair: Any, where: str) -> None:
    if not _texts(pair) or len(pair) != 2:
        raise ValueError(
            f"{where}: rewrites must be [pattern, replacement] pairs, not {pair!r:.60}"
        )
    try:
        re.sub(pair[0], pair[1], "")
    except re.error as error:
        raise ValueError(f"{where}: rewrites: {pair!r:.60} cannot be applied: {error}") from None


def _check_rows(rows: Any, where: str) -> None:
    if not isinstance(rows, list) or not all(isinstance(form, dict) for form in rows):
        raise ValueError(f"{where}: rows must be a list of forms, each of `key: path` lines")
    for form in rows:
        for key, spec in form.items():
            if key not in ROW_KEYS:
                raise ValueError(
                    f"{where}: rows: {key!r:.40} is unknown; a form has {', '.join(ROW_KEYS)}"
                )
            good = isinstance(spec, str) or (key == "choices" and _texts(spec))
            if not good and not (key == "answer" and type(spec) is int):
                raise ValueError(f"{where}: rows: {key} must be a path or a text, not {spec!r:.60}")
            for text in [spec] if isinstance(spec, str) else spec if _texts(spec) else []:
                wrong = [f for _, f in IN_BRACES.findall(text) if f and f not in FILTERS]
                if wrong:
                    known = ", ".join(FILTERS)
                    raise ValueError(f"{where}: rows: {key}: {wrong[0]!r} is none of {known}")
        missing = {"question", "choices"} - form.keys()
        if missing or ("answer" in form) == ("right" in form):
            raise ValueError(
                f"{where}: rows: each form needs question, choices and either answer or right; one "
                f"has {', '.join(form)}"
            )

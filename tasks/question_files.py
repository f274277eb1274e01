"""The files of a choice set: which of them are a split, and the rows that they hold.

    for path, subject in split_files(root, "test", layout):
        for where, row in rows_of(path, layout): ...       # where: "test.csv:3"

A set in MMLU's layout has a file for each subject, or rows that name theirs, under the names of
splits; any other has the names that its Layout gives. CSV, TSV, JSON and parquet, packed by gzip or
not.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from inputs import decode_utf8, read_jsonl, read_small
from packed import open_packed, parquet_rows, suffix_of
from tasks.layouts import Layout

SPLITS = {
    "train": ("train",),
    "dev": ("dev",),
    "val": ("val", "validation", "valid"),
    "test": ("test",),
}
ANSWERS = ("answer", "target", "label", "gold", "correct_answer", "answer_index", "answer_idx")
JSON = (".jsonl", ".ndjson", ".json")
FORMATS = (".csv", ".tsv", *JSON, ".parquet")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
ANSWER_BESIDE = "label"  # what a row calls the answer that a file beside its own holds
LONGEST_FIELD = 2**26  # characters of a field of CSV: what a quotation mark too many may swallow
WHERE_TO_GET = (
    "scripts/fetch_mmlu.sh downloads MMLU; it must lie as {root}/dev/SUBJECT_dev.csv and "
    "{root}/{split}/SUBJECT_{split}.csv (question, A, B, C, D, answer), or as JSONL or parquet "
    "files of question, choices, answer, subject named after their split"
)


def _stem(path: Path) -> str:
    """A file's name without what it is and how it is packed."""
    name = path.name.lower()
    return path.name[: name.rindex(suffix_of(path))] if suffix_of(path) else path.name


def split_files(root: Path, split: str, layout: Layout) -> list[tuple[Path, str | None]]:
    """(file, its subject or None if the rows must name it), in the order of their names; none where
    the split is not there."""
    if root.is_file():
        if suffix_of(root) not in FORMATS:
            raise ValueError(f"{root}: not one of {', '.join(FORMATS)}")
        own = suffix_of(root) in (".csv", ".tsv") and layout.files is None
        subject = _stem(root).removesuffix(f"_{split}") if own else None
        return [(root, subject if layout.has_subjects else layout.name)]
    if layout.files is None:
        return _by_subject(root, split)
    if split not in layout.files:
        raise ValueError(f"--split {split}: {layout.name} has {', '.join(layout.files)}")
    subject = None if layout.has_subjects else layout.name
    return [(path, subject) for path in _by_name(root, layout.files[split])]


def where_to_get(layout: Layout, root: Path, split: str) -> str:
    """How a set comes here, for who lacks it."""
    if layout.files is None and layout.name == "mmlu":
        return WHERE_TO_GET.format(root=root, split=split)
    names = (layout.files or {}).get(split, (f"{split}/SUBJECT",))
    fetch = f"scripts/fetch_choice_sets.sh {layout.fetch} downloads it; " if layout.fetch else ""
    suffixes = ", ".join(FORMATS)
    return (
        f"{fetch}{layout.name} must lie as {root}/{' or '.join(names)}, with one of {suffixes} (or "
        "name one file)"
    )


def _by_subject(root: Path, split: str) -> list[tuple[Path, str | None]]:
    """In MMLU's layout."""
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


def _by_name(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The first of these that is there, in one file or in numbered parts."""
    for base, name in itertools.product((root, root / "data"), names):
        folder, stem = (base / name).parent, Path(name).name
        is_split = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?").fullmatch
        paths = sorted(folder.glob("*")) if folder.is_dir() else []
        found = [p for p in paths if suffix_of(p) in FORMATS and is_split(_stem(p))]
        if found:
            return found
    return []


# ---------------------------------------------------------------------------------------------
# Rows


def rows_of(path: Path, layout: Layout) -> Iterator[tuple[str, dict]]:
    """(file:line, fields by name), with the answer that stands in a file beside this one."""
    kind = suffix_of(path)
    if kind in (".csv", ".tsv"):
        rows = _csv_rows(path, "\t" if kind == ".tsv" else ",", bool(layout.rows))
    else:
        rows = _json_rows(path) if kind in JSON else parquet_rows(path)
    beside = path.with_name(_stem(path) + (layout.answers_beside or ""))
    if not layout.answers_beside or not beside.is_file():
        yield from rows
        return
    answers = decode_utf8(read_small(beside), beside).split()
    known = list(rows)
    if len(answers) != len(known):
        raise ValueError(f"{beside}: {len(answers):,} answers to {len(known):,} rows of {path}")
    for (where, values), answer in zip(known, answers):
        yield where, {ANSWER_BESIDE: answer} | values


def _csv_rows(path: Path, delimiter: str = ",", header: bool = False) -> Iterator[tuple[str, dict]]:
    """(file:line, fields by name): with a header, or MMLU's six columns without one. header: the
    first row is one, and its names stand as they are."""
    names, line = None, 1
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open_packed(path) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not row:
                    continue
                if names is None and header:
                    names = row
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


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for where, _, values in read_jsonl(path):
        yield where, values

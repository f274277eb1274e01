"""Files that others wrote, read with a measure: small ones whole, JSON lines one by one. What is
wrong is said in one line that names the file.

    read_object("config.json")                                      # a JSON file's object
    for where, n_bytes, question in read_jsonl("test.jsonl.gz"):    # where: "test.jsonl.gz:3"

Standard library only.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packed import open_packed, require_file

ARRAY_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)")
SMALL_FILE = 8 << 20  # bytes of a config or a manifest; honest ones have a thousandth of it
MAX_BRACKETS = 500_000  # objects and lists of one JSON file: each costs 60 bytes of memory or more
MAX_DEPTH = 64  # of objects in objects: what goes through them is recursive


def read_small(path: str | Path, limit: int = SMALL_FILE) -> bytes:
    """A file that is small if it is what it should be."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes: it is not what its name says")
    return data


def read_object(path: str | Path, limit: int = SMALL_FILE) -> dict[str, Any]:
    """The object of a JSON file that somebody else wrote. ValueError, one line with the file's
    name, for all that is wrong with it; a key that stands there twice is read in two ways by two
    programs."""
    data = read_small(path, limit)
    if not data.strip():
        raise ValueError(
            f"{path} is empty, which is not JSON: it is still to be written, or the copy failed"
        )
    return parse_object(data, path)


def parse_object(data: bytes, where: str | Path) -> dict[str, Any]:
    """The object that JSON of somebody else is. ValueError as read_object, which names `where`."""
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise ValueError(f"{where} has more than {MAX_BRACKETS:,} lists and objects")
    text = decode_utf8(data, where)
    try:
        values = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds {type(values).__name__}, not a JSON object")
    level: list = [values]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
    if level:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
    return values


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:100]!r} stands there twice")
        values[key] = value
    return values


def refuse_impostor(path: str | Path) -> None:
    """ValueError for what is no file, and for what a failed download or copy leaves behind: an
    empty file, a web page, a Git LFS pointer."""
    path = Path(path)
    require_file(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty: it is still to be written, or the copy failed")
    head = head.lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not the file: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: fetch it with `git lfs pull`")


def decode_utf8(data: bytes, where: str | Path, offset: int = 0) -> str:
    """Text of bytes that begin at byte `offset` of a file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {offset + error.start} ({error.reason}); "
            "convert it, for example with `iconv -t utf-8`"
        ) from None


def text_lines(path: str | Path) -> list[tuple[str, str]]:
    """(file:line, text) of a text file, gzipped or not. Only a newline ends a line, with a carriage
    return before it or not: str.splitlines cuts at what may stand in a sentence, as U+2028 may."""
    refuse_impostor(path)
    with open_packed(path) as file:
        text = decode_utf8(file.read(), path).removeprefix("\ufeff")
    lines = text.removesuffix("\n").split("\n")
    return [(f"{path}:{i}", line.removesuffix("\r")) for i, line in enumerate(lines, 1)]


def read_jsonl(path: str | Path, what: str = "file") -> Iterator[tuple[str, int, dict]]:
    """Yield (file:line, bytes of the line, object) of a file of JSON lines, gzipped or not, or of
    one JSON array of objects (then file: item); blank lines are passed over. what: how the file is
    called where it is missing. ValueError in one line that names file and line."""
    path, offset = Path(path), 0
    if not os.path.lexists(path):
        raise ValueError(f"{path}: no such {what}")
    refuse_impostor(path)
    with open_packed(path) as file:
        if ARRAY_OF_OBJECTS.match(file.peek(2**12)):
            yield from _items_of(decode_utf8(file.read(), path), path)
            return
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = decode_utf8(line, where, offset).removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                yield where, len(line), _object_of(text, where)


def _items_of(text: str, path: Path) -> Iterator[tuple[str, int, dict]]:
    """Those of an array; their bytes are not known."""
    try:
        items = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: begins as a JSON array, but is none: {error}") from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(f"{path}: item {number}: an object expected, not {item!r:.40}")
        yield f"{path}: item {number}", 0, item


def _object_of(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object expected, not {text.strip()[:40]!r}")
    return value

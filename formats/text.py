"""Text files: their documents, in pieces that can be encoded one by one.

    for group in text_groups(path, may_split=tokenizer.splits_at_newline):
        for text, n_bytes, ends in group:       # ends: whether a document ends here
            ...

A `.jsonl`, `.ndjson` or `.json` file (lines, or one array) and a `.parquet` file hold a document in
each `text` field; every other file is one document. All but parquet may be gzipped. Bytes
are taken as they are: no newline translation, no stripping, no byte-order mark removed.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from cli import note
from inputs import decode_utf8, read_jsonl
from packed import open_packed, parquet_rows, suffix_of
from tokenizer import SAFE_BREAK, utf8_bytes

CHUNK_BYTES = 2**20  # text is cut into pieces of about this size …
GROUP_BYTES = 2**23  # … and given in groups of about this one, so that threads can share them
JSON = (".jsonl", ".ndjson", ".json")
DOCUMENT_LINE = re.compile(rb'(\xef\xbb\xbf)?\s*\{[^\n]*"text"\s*:\s*"[^\n]*\}\s*\n')

Piece = tuple[str, int, bool]  # text, its bytes, whether a document ends here


def text_groups(path: Path, may_split: bool) -> Iterator[list[Piece]]:
    """The pieces of a file, in order, in lists of about GROUP_BYTES.

    may_split: whether a long text may be cut at SAFE_BREAK. ValueError, in one line that names the
    file (and the line, of JSONL), for what is not UTF-8, no JSON, or no text.
    """
    group, size = [], 0
    for piece in _text_pieces(path, may_split):
        group.append(piece)
        size += piece[1]
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _text_pieces(path: Path, may_split: bool) -> Iterator[Piece]:
    kind = suffix_of(path)
    with open_packed(path) as file:
        head = file.read(2**16)
    if kind in (".npy", ".bin") or head.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path}: holds token ids, not text; use --data-mode fineweb_npy")
    if kind == ".parquet" or head.startswith(b"PAR1"):
        yield from _parquet_documents(path)
    elif kind in JSON:
        yield from _jsonl_documents(path)
    else:
        _doubt_text(path, head)
        yield from _plain_text(path, may_split)


def _plain_text(path: Path, may_split: bool) -> Iterator[Piece]:
    with open_packed(path) as file:
        data = file.read()
    start = 0
    while start < len(data):
        cut = SAFE_BREAK.search(data, start + CHUNK_BYTES) if may_split else None
        end = cut.end() if cut else len(data)
        yield decode_utf8(data[start:end], path, start), end - start, end == len(data)
        start = end


def _doubt_text(path: Path, head: bytes) -> None:
    """What calls itself text and is something else. JSON lines are text too: that is only said."""
    if head.count(0) * 100 > len(head):
        raise ValueError(
            f"{path}: is full of zero bytes: not text in UTF-8, but UTF-16 or a binary file; "
            "convert it, for example with `iconv -f utf-16 -t utf-8`"
        )
    if DOCUMENT_LINE.match(head):
        note(
            f"{path}: its lines look like JSON documents and are scored as they stand: call it "
            ".jsonl to score the text in them"
        )


def _jsonl_documents(path: Path) -> Iterator[Piece]:
    for where, _, record in read_jsonl(path):
        yield _document(record, where)


def _parquet_documents(path: Path) -> Iterator[Piece]:
    for where, row in parquet_rows(path, ["text"]):
        yield _document(row, where)


def _document(record: dict, where: str) -> Piece:
    document = record.get("text")
    if not isinstance(document, str):
        fields = ", ".join(map(str, record)) or "nothing"
        raise ValueError(f'{where}: needs {{"text": "…"}}, a string in that field; it has {fields}')
    valid = utf8_bytes(document)
    return valid.decode(), len(valid), True

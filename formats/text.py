"""Text files: their documents, in pieces that can be encoded one by one.

    for group in text_groups(path, may_split=tokenizer.splits_at_newline):
        for text, n_bytes, ends in group:       # ends: whether a document ends here
            ...

A `.jsonl` file holds one document a line in its `text` field; every other file is one document.
Bytes are taken as they are: no newline translation, no stripping, no byte-order mark removed.
"""

from collections.abc import Iterator
from pathlib import Path

from durable import decode_utf8, read_jsonl
from tokenizer import SAFE_BREAK, utf8_bytes

CHUNK_BYTES = 2**20  # text is cut into pieces of about this size …
GROUP_BYTES = 2**23  # … and given in groups of about this one, so that threads can share them

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
    if path.suffix in (".npy", ".bin"):
        raise ValueError(f"{path}: holds token ids, not text; use --data-mode fineweb_npy")
    if path.suffix == ".jsonl":
        yield from _jsonl_documents(path)
        return
    data = path.read_bytes()
    start = 0
    while start < len(data):
        cut = SAFE_BREAK.search(data, start + CHUNK_BYTES) if may_split else None
        end = cut.end() if cut else len(data)
        yield decode_utf8(data[start:end], path, start), end - start, end == len(data)
        start = end


def _jsonl_documents(path: Path) -> Iterator[Piece]:
    for where, _, record in read_jsonl(path):
        document = record.get("text")
        if not isinstance(document, str):
            raise ValueError(f'{where}: needs {{"text": "…"}}, a string in that field')
        valid = utf8_bytes(document)
        yield valid.decode(), len(valid), True

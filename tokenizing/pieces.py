"""What the tokens of a vocabulary stand for, and which of another vocabulary are the same.

    pieces = pieces_of(tokenizer)              # by id; None where no token has it
    sources = inherited(old, new)              # for each id of the new one: ids of the old one

A token that both have keeps its row; another one's row is made of what the old tokenizer cuts its
text into. Both may be of any kind: a token is the bytes that it stands for.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

from tokenizing.byte_bpe import byte_alphabet

if TYPE_CHECKING:
    from tokenizer import Tokenizer

ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # what SentencePiece falls back to


class Piece(NamedTuple):
    """text: as the vocabulary has it. A special token's bytes are its name's."""

    value: bytes
    special: bool
    text: str = ""


def pieces_of(tokenizer: "Tokenizer") -> list[Piece | None]:
    """The tokens by id, those of a padded vocabulary's gaps None."""
    found: list[Piece | None] = [None] * tokenizer.vocab_size
    for i, piece in _all_pieces(tokenizer):
        found[i] = piece
    return found


def _all_pieces(tokenizer: "Tokenizer"):
    if tokenizer.name == "byte":
        yield from ((i, Piece(bytes([i]), False)) for i in range(256))
        yield tokenizer.eos_token_id, Piece(tokenizer.special_tokens["eos_token"].encode(), True)
    elif hasattr(tokenizer, "encoding"):  # tiktoken's
        ranks, specials = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens
        yield from ((i, Piece(value, False)) for value, i in ranks.items())
        yield from ((i, Piece(name.encode(), True)) for name, i in specials.items())
    else:
        yield from _of_huggingface(tokenizer)


def _of_huggingface(tokenizer):
    special, letters = set(tokenizer.special_ids), byte_alphabet()
    values = {letter: bytes([i]) for i, letter in enumerate(letters)}
    added = {i: token.content for i, token in tokenizer.tok.added_tokens_decoder.items()}
    for text, i in tokenizer.tok.get_vocab().items():
        if i in added or i in special:
            yield i, Piece(added.get(i, text).encode(), i in special, text)
        elif tokenizer.is_byte_level():
            parts = [values.get(letter, letter.encode()) for letter in text]
            yield i, Piece(b"".join(parts), False, text)
        elif one := ONE_BYTE.fullmatch(text):
            yield i, Piece(bytes([int(one[1], 16)]), False, text)
        else:
            yield i, Piece(text.replace("▁", " ").encode(), False, text)


# ---------------------------------------------------------------------------------------------
# From one vocabulary to another


def inherited(old: "Tokenizer", new: "Tokenizer") -> list[tuple[int, ...]]:
    """For each id of `new`, the ids of `old` that its row is made of: one where both have the token
    (special ones by their name, else as BOS or EOS), else the pieces of its text; none for a new
    special token, and for gaps."""
    before, after = pieces_of(old), pieces_of(new)
    by_value: dict[tuple[bytes, bool], int] = {}
    by_text: dict[Piece, int] = {}
    for i, piece in enumerate(before):
        if piece is not None:
            by_text[piece] = i
            one_byte = ONE_BYTE.fullmatch(piece.text)  # a letter's own token comes before it
            if not one_byte or (piece.value, False) not in by_value:
                by_value[piece.value, piece.special] = i
    roles = {new.eos_token_id: old.eos_token_id, new.bos_token_id: old.bos_token_id}
    longest = max((len(value) for value, special in by_value if not special), default=0)

    def source(i: int, piece: Piece | None) -> tuple[int, ...]:
        if piece is None:
            return ()
        same = by_text.get(piece, by_value.get((piece.value, piece.special)))
        if same is None and piece.special:
            same = roles.get(i)
        if same is not None:
            return (same,)
        return () if piece.special else _cut(piece.value, old, before, by_value, longest)

    return [source(i, piece) for i, piece in enumerate(after)]


def _cut(
    value: bytes,
    old: "Tokenizer",
    pieces: list[Piece | None],
    by_value: dict[tuple[bytes, bool], int],
    longest: int,
) -> tuple[int, ...]:
    """The old tokenizer's tokens of a text. Where it puts a space before it, or the bytes are no
    text by themselves, the longest tokens from the left; none where it lacks a byte."""
    try:
        ids = tuple(old.encode(value.decode()))
    except UnicodeDecodeError:
        ids = ()
    found = [pieces[i] for i in ids]
    if found and b"".join(piece.value for piece in found if piece) == value:
        return ids
    at, chosen = 0, []
    while at < len(value):
        ends = range(min(len(value), at + longest), at, -1)
        end = next((end for end in ends if (value[at:end], False) in by_value), None)
        if end is None:
            return ()
        chosen.append(by_value[value[at:end], False])
        at = end
    return tuple(chosen)

"""Where the documents of token streams begin.

    mark = mark_of(stream, tokenizer, "fineweb_npy")        # the token that parts them
    document_starts(stream, mark)                           # int64 [D], the first of them 0
    starts_in_rows(rows, mark)                              # int64 [B, T], in columns

An end-of-text token closes a document, and belongs to it, in text files and in Megatron's shards;
in FineWeb's and llm.c's it opens one. Which of the two shards have is told by their first token.
"""

from dataclasses import dataclass

import numpy as np

from formats.tokens import TokenStream
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Mark:
    """The token that parts documents. opens: it is a document's first token, else its last."""

    token_id: int
    opens: bool

    @property
    def words(self) -> str:
        """For protocols and logs."""
        return f"{'at' if self.opens else 'after'} token {self.token_id}"

    def begins(self, ids: np.ndarray) -> np.ndarray:
        """Whether a document begins at each of ids [..., T]; what comes first begins one."""
        at = ids == self.token_id
        if not self.opens:
            at = np.roll(at, 1, axis=-1)
        at[..., :1] = True
        return at


def mark_of(stream: TokenStream, tokenizer: Tokenizer | None, data_mode: str) -> Mark:
    """What parts a stream's documents: the tokenizer's end of text, or in shards that begin with
    its BOS that one. ValueError for a tokenizer that has none, or where none is known."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if data_mode == "text" and eos is not None:
        return Mark(eos, opens=False)  # where dataset.open_stream puts it
    first = int(stream.read(0, 1)[0])
    for token in (getattr(tokenizer, "bos_token_id", None), eos):
        if token == first:
            return Mark(first, opens=True)
    if eos is None:
        raise ValueError(
            "documents are found by their end-of-text token: name a tokenizer that has one "
            "(--tokenizer-name)"
        )
    return Mark(eos, opens=False)


def document_starts(stream: TokenStream, mark: Mark) -> np.ndarray:
    """Positions [D] int64 of the documents' first tokens, from one scan of the whole stream."""
    found, position = [np.zeros(1, dtype=np.int64)], 0
    for source in stream.sources:
        for block in source.blocks():
            at = np.flatnonzero(block == mark.token_id).astype(np.int64)
            found.append(position + at + (not mark.opens))
            position += len(block)
    starts = np.concatenate(found)
    # an end of text that closes the last document begins no other; a first one that opens is there
    return np.concatenate((starts[:1], starts[1:][(starts[1:] > 0) & (starts[1:] < position)]))


def starts_in_rows(rows: np.ndarray, mark: Mark) -> np.ndarray:
    """The column [B, T] int64 in which the document of each token of rows [B, T] begins."""
    columns = np.arange(rows.shape[-1])
    return np.maximum.accumulate(np.where(mark.begins(rows), columns, 0), axis=-1)

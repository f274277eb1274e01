"""Token ids of several files as one sequence, read-only.

stream = TokenStream([Source("a.npy", ids), Source("b.npy", more)])     # dataset.open_stream
stream.rows(starts, 1025)                                     # int64 [B, 1025]
stream.check_vocab(50257)
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 2**22  # unit of scans over a whole stream
FULL_HASH_TOKENS = 2**28  # streams up to this length are hashed whole: about a second


@dataclass(frozen=True)
class Source:
    """One file's tokens. `offset` is where they start in a mapped file, None if held in memory."""

    name: str
    tokens: np.ndarray
    offset: int | None = None

    def blocks(self) -> Iterator[np.ndarray]:
        """The tokens in order, in blocks. Mapped files are read, not paged in: scanning a shard
        through its mapping would count as the process's memory."""
        for start in range(0, len(self.tokens), BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, len(self.tokens) - start)
            if self.offset is None:
                yield self.tokens[start : start + count]
            else:
                dtype = self.tokens.dtype
                offset = self.offset + start * dtype.itemsize
                yield np.fromfile(self.name, dtype=dtype, count=count, offset=offset)


class TokenStream:
    """Several sources as one read-only sequence of N token ids.

    `file_starts` [files + 1] int64: the position of each file's first token, then N; the file that
    holds position p is `searchsorted(file_starts, p, "right") - 1`. `file_names`: their paths.
    `n_text_bytes`: UTF-8 bytes of the text, None where unknown (shards, or cut by max_tokens).
    `bos_id`: what `Windows(…, bos=True)` puts before the first token.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        max_tokens: int | None = None,
        bos_id: int | None = None,
        n_text_bytes: int | None = None,
    ):
        assert sources, "a stream needs a source"
        self.sources, left = [], float("inf") if max_tokens is None else max_tokens
        for source in sources:
            if left > 0:
                tokens = source.tokens[: int(min(left, len(source.tokens)))]
                self.sources.append(Source(source.name, tokens, source.offset))
                left -= len(tokens)
        lengths = [len(source.tokens) for source in self.sources]
        self.file_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.file_names = [source.name for source in self.sources]
        self.bos_id, self.n_text_bytes = bos_id, n_text_bytes

    def __len__(self) -> int:
        return int(self.file_starts[-1])

    def split(self, ratio: float) -> tuple["TokenStream", "TokenStream"]:
        """(all but the last `ratio` of the tokens, the rest) as two streams. ValueError for a ratio
        outside 0 … 1 and for too few tokens."""
        if not 0 < ratio < 1:
            raise ValueError(f"the share to hold out must lie between 0 and 1, not {ratio}")
        cut = len(self) - max(1, int(len(self) * ratio))
        if cut < 1:
            raise ValueError(f"{len(self)} token(s) are too few to hold some out; give more data")
        head, tail = [], []
        for source, start in zip(self.sources, self.file_starts.tolist()):
            n = min(max(cut - start, 0), len(source.tokens))
            itemsize = source.tokens.dtype.itemsize
            offset = None if source.offset is None else source.offset + n * itemsize
            head += [Source(source.name, source.tokens[:n], source.offset)] if n else []
            if n < len(source.tokens):
                tail.append(Source(source.name, source.tokens[n:], offset))
        return TokenStream(head, bos_id=self.bos_id), TokenStream(tail, bos_id=self.bos_id)

    def read(self, start: int, end: int) -> np.ndarray:
        """Token ids start … end - 1, int64 [end - start]."""
        assert 0 <= start <= end <= len(self), (start, end, len(self))
        return self.rows(np.array([start]), end - start)[0]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Token ids [B, length] int64 from each of the positions `starts` [B]; 0 beyond the end."""
        out = np.zeros((len(starts), length), dtype=np.int64)
        files = np.searchsorted(self.file_starts, starts, side="right") - 1
        offsets = starts - self.file_starts[files]
        for row, file, offset in zip(out, files.tolist(), offsets.tolist()):
            filled = 0
            while filled < length and file < len(self.sources):
                piece = self.sources[file].tokens[offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled, file, offset = filled + len(piece), file + 1, 0
        return out

    @functools.cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        """Each file's smallest and largest id, from one scan of the whole stream."""
        found = []
        for source in self.sources:
            ends = [(int(block.min()), int(block.max())) for block in source.blocks()]
            found.append((min(low for low, _ in ends), max(high for _, high in ends)))
        return found

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ValueError, naming the file, if an id does not fit a vocabulary of `vocab_size`.

        Costs nothing where the files' dtype cannot hold such an id, else one scan."""
        held = [np.iinfo(source.tokens.dtype) for source in self.sources]
        if all(0 <= ids.min and ids.max < vocab_size for ids in held):
            return
        for name, (smallest, largest) in zip(self.file_names, self._ranges):
            if smallest < 0 or largest >= vocab_size:
                raise ValueError(
                    f"{name}: holds token id {smallest if smallest < 0 else largest}, but the "
                    f"vocabulary has {vocab_size} ids (0…{vocab_size - 1}); it was made with "
                    "another tokenizer than the model's"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the token sequence, the same however it is cut into files and stored.

        Up to 2^28 tokens `sha256:…` of them all, as little-endian uint32. Beyond that
        `sampled:…`, over the length and 256 evenly spaced blocks of 2^16 tokens, first and last
        included: it tells other data from this, not one changed token; `full_fingerprint` does.
        """
        if len(self) <= FULL_HASH_TOKENS:
            return self.full_fingerprint()
        digest, size = hashlib.sha256(b"%d" % len(self)), 2**16
        for start in np.linspace(0, len(self) - size, 256).astype(np.int64).tolist():
            digest.update(self.read(start, start + size).astype("<u4").data)
        return "sampled:" + digest.hexdigest()

    def full_fingerprint(self) -> str:
        """`sha256:…` of every token, whatever the length: about a second per 2^28 tokens."""
        digest = hashlib.sha256()
        for source in self.sources:
            for block in source.blocks():
                digest.update(np.ascontiguousarray(block, dtype="<u4").data)
        return "sha256:" + digest.hexdigest()

"""How the documents of one stream come into windows: --packing.

    rows, counts = Packer(options.data, tokenizer, seq_len, seed, dist).pack(stream)

`concat`, `document` and masked `noise` read windows where they lie, so that a stream of any size
begins at once. The ways of options.KEPT make a plan of the whole stream first: rank 0 does, once,
into an index beside the data (packing_index.py), which every rank reads.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli import printable
from dataset import TokenStream
from distributed import Dist, print0
from formats.documents import Mark, document_starts, mark_of
from formats.tokens import FULL_HASH_TOKENS
from tokenizer import Tokenizer
from training import neighbours, packing_index
from training.batches import Chopped, Packed, Rows
from training.best_fit import best_fit
from training.options import KEPT, DataOptions
from training.packing import Counts, Plan, chop, count


@dataclass(frozen=True)
class Packer:
    """seed: of what is drawn. All ranks of dist pack alike."""

    options: DataOptions
    tokenizer: Tokenizer
    seq_len: int
    seed: int
    dist: Dist

    def pack(self, stream: TokenStream) -> tuple[Rows, Counts | None]:
        """A stream's windows, and what became of its documents: where --packing was given, and but
        for kept plans in streams of up to 2^28 tokens, since counting reads them whole."""
        way, inside = self.options.packing or "concat", self.options.within_documents
        if not self.options.packing and not inside:
            return Chopped(stream, self.seq_len), None
        mark = mark_of(stream, self.tokenizer, self.options.data_mode)
        if way in KEPT:
            plan, counts = self.kept_plan(stream, mark)
            return Packed(stream, plan, mark.token_id, inside), counts
        kind, n = self.options.noise
        separator = n if (way, kind) == ("noise", "separator") else 0
        known = self.options.packing and len(stream) <= FULL_HASH_TOKENS
        if separator or known:
            starts = document_starts(stream, mark)
            plan = chop(starts, len(stream), self.seq_len, separator=separator)
            counts = count(plan, starts, len(stream))
        if separator:
            return Packed(stream, plan, mark.token_id, inside), counts
        joint = (mark, n) if way == "noise" else None
        rows = Chopped(stream, self.seq_len, mark if inside else None, joint)
        return rows, counts if known else None

    def kept_plan(self, stream: TokenStream, mark: Mark) -> tuple[Plan, Counts]:
        """From the index where there is one, else made by rank 0 and written there. ValueError for
        an index that is damaged, or of other data or settings."""
        found = None
        if self.dist.is_main:
            settings = self._settings(mark)
            path = Path(self.options.packing_index or default_index(stream, settings))
            about = settings | {"data": stream.fingerprint, "tokens": len(stream)}
            if not path.exists():
                packing_index.write(path, *self.make_plan(stream, mark), about)
            print0(f"packing index: {printable(path)}")
            found = path, about
        return packing_index.read(*self.dist.broadcast(found))

    def _settings(self, mark: Mark) -> dict[str, Any]:
        """What decides a plan beside the data, in plain values."""
        given = self.options
        settings: dict[str, Any] = {"packing": given.packing, "seq_len": self.seq_len}
        settings |= {"documents": mark.words, "max_tokens": given.max_tokens}
        if given.packing != "in-context":  # which draws nothing
            settings["seed"] = self.seed
        if given.packing_vectors:
            settings["vectors"] = hash_of(given.packing_vectors)
        elif given.packing != "best-fit":
            settings["scikit-learn"] = neighbours.require_sklearn()
            settings["tokenizer"] = self.tokenizer.fingerprint
        return settings

    def make_plan(self, stream: TokenStream, mark: Mark) -> tuple[Plan, Counts]:
        """That of a way of KEPT, and what becomes of the documents."""
        starts, n_tokens = document_starts(stream, mark), len(stream)
        if self.options.packing == "best-fit":
            plan = best_fit(starts, n_tokens, self.seq_len, self.seed)
        else:
            order = self._order(stream, starts)
            plan = chop(starts, n_tokens, self.seq_len, order=order)
        return plan, count(plan, starts, n_tokens)

    def _order(self, stream: TokenStream, starts: np.ndarray) -> np.ndarray:
        """Of documents, alike ones side by side."""
        if self.options.packing_vectors:
            vectors = neighbours.read_vectors(self.options.packing_vectors, len(starts))
        else:
            ends = np.append(starts[1:], len(stream)).tolist()
            tokens = (stream.read(start, end) for start, end in zip(starts.tolist(), ends))
            vectors = neighbours.tfidf([self.tokenizer.decode(ids) for ids in tokens])
        if self.options.packing == "cluster":
            return neighbours.by_cluster(vectors, self.seed)
        return neighbours.greedy_path(*neighbours.nearest(vectors))


def hash_of(path: str) -> str:
    """Of --packing-vectors' file. ValueError where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"--packing-vectors {path}: {error.strerror}") from None


def default_index(stream: TokenStream, settings: dict[str, Any]) -> Path:
    """Beside the stream's first file, hidden, so that no glob takes it for data; another one for
    other settings or files."""
    first, *others = map(Path, stream.file_names)
    known = json.dumps([settings, [path.name for path in others]], sort_keys=True)
    digest = hashlib.sha256(known.encode()).hexdigest()[:8]
    return first.with_name(f".{first.name}.{settings['packing']}-{digest}.packing")

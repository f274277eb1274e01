"""Which tokens of a stream lie in which window of training, when not simply the next T.

    plan = chop(starts, n_tokens, seq_len)                  # documents in a row, cut every T tokens
    plan = chop(starts, n_tokens, seq_len, order=order)     # in another order than the stream's
    counts = count(plan, starts, n_tokens)                  # what was cut, padded, left out

A plan's pieces are stretches of the stream, and fillers: separators between documents, padding.
Every token of the stream lies in one piece at most, so that an epoch shows it once at most.
"""

from dataclasses import dataclass

import numpy as np

SEPARATOR, PADDING = -1, -2  # starts of pieces that are fillers
NOTHING = -1  # the position of no token


@dataclass(frozen=True)
class Plan:
    """Windows of T tokens or fewer, as pieces of a stream.

    starts, lengths [P] int64: of the pieces, as positions of the stream, or SEPARATOR or PADDING.
    first [W + 1] int64: window w has the pieces first[w] … first[w + 1] - 1. after [W] int64: the
    position of the token that its last one predicts, or NOTHING.
    """

    seq_len: int
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    after: np.ndarray

    def __len__(self) -> int:
        return len(self.after)

    def sizes(self) -> np.ndarray:
        """[W] int64: tokens of the stream in each window."""
        real = np.where(self.starts >= 0, self.lengths, 0)
        return np.diff(np.concatenate(([0], np.cumsum(real)))[self.first])


def chop(
    starts: np.ndarray,
    n_tokens: int,
    seq_len: int,
    order: np.ndarray | None = None,
    separator: int = 0,
) -> Plan:
    """Documents one after the other, cut into windows of T; what fills no window at the end is left
    out. Document d has the positions starts[d] … starts[d + 1] - 1. order [D]: which comes when, as
    in the stream unless given. separator: fillers between two documents. ValueError for data
    shorter than a window and the token after it."""
    lengths = np.diff(np.append(starts, n_tokens))
    if order is not None:
        starts, lengths = starts[order], lengths[order]
    if separator:  # after each document but the last
        starts = np.stack((starts, np.full_like(starts, SEPARATOR)), axis=1).ravel()[:-1]
        lengths = np.stack((lengths, np.full_like(lengths, separator)), axis=1).ravel()[:-1]
    ends = np.cumsum(lengths)  # in the sequence that is chopped
    n_windows = (int(ends[-1]) - 1) // seq_len
    if n_windows < 1:
        raise ValueError(too_short(n_tokens, seq_len))
    borders = np.arange(n_windows + 1) * seq_len
    begins = np.union1d(ends - lengths, borders)
    begins = begins[begins < borders[-1]]

    def place(at):
        """Where in the stream what lies at these places of the sequence is."""
        piece = np.searchsorted(ends, at, side="right")
        inside = at - (ends[piece] - lengths[piece])
        return np.where(starts[piece] < 0, SEPARATOR, starts[piece] + inside)

    return Plan(
        seq_len,
        place(begins),
        np.diff(np.append(begins, borders[-1])),
        np.searchsorted(begins, borders),
        place(borders[1:]),
    )


def too_short(n_tokens: int, seq_len: int) -> str:
    return (
        f"the training data has {n_tokens} tokens, but one window needs seq_len + 1 = "
        f"{seq_len + 1}; lower --seq-len or give more data"
    )


@dataclass(frozen=True)
class Counts:
    """What a plan makes of documents. cut: documents of which not all lies in one window.
    tokens_cut_off: in another window than their document's first. tokens_left_out: in none.
    padding, separators: fillers. documents_per_window: pieces of them in a window, as a mean."""

    documents: int
    windows: int
    cut: int
    tokens: int
    tokens_cut_off: int
    tokens_left_out: int
    padding: int
    separators: int
    documents_per_window: float

    @property
    def words(self) -> str:
        """A line for people."""
        size = self.tokens + self.padding + self.separators
        return (
            f"{self.documents:,} documents in {self.windows:,} windows, "
            f"{self.documents_per_window:.2f} in each; {self.cut:,} "
            f"({self.cut / self.documents:.1%}) are cut, {self.tokens_cut_off:,} tokens "
            f"({self.tokens_cut_off / max(1, self.tokens):.1%}) cut off; "
            f"{self.padding:,} of padding ({self.padding / size:.2%}), "
            f"{self.separators:,} of separators, {self.tokens_left_out:,} tokens left out"
        )


def count(plan: Plan, starts: np.ndarray, n_tokens: int) -> Counts:
    """starts [D]: of all documents of a stream of n_tokens."""
    real = plan.starts >= 0
    document = np.searchsorted(starts, plan.starts[real], side="right") - 1
    lengths = plan.lengths[real]
    whole = (plan.starts[real] == starts[document]) & (
        lengths == np.diff(np.append(starts, n_tokens))[document]
    )
    tokens = int(lengths.sum())
    return Counts(
        documents=len(starts),
        windows=len(plan),
        cut=len(starts) - int(whole.sum()),
        tokens=tokens,
        tokens_cut_off=int(lengths[plan.starts[real] != starts[document]].sum()),
        tokens_left_out=n_tokens - tokens,
        padding=int(plan.lengths[plan.starts == PADDING].sum()),
        separators=int(plan.lengths[plan.starts == SEPARATOR].sum()),
        documents_per_window=len(lengths) / len(plan),
    )

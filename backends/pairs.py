"""Log-probabilities of continuations after contexts, in any order and number, what repeats once.

    found = score_pairs(backend, [(context, continuation), …], batch_tokens=32768)
    found.logprobs, found.greedy           # [N] in nats, [N] bool

The choices of a question repeat its context, and the questions of a task its examples. Pairs that
differ in their last token only become one row with alternatives; rows that begin alike share a
prefix, wherever that saves more than one more batch costs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backends import Backend
from backends.continuations import MIN_PREFIX, Continuations

BATCH_COST = 512  # tokens: what one more prefix, and the batch that it ends, are worth
Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PairScores:
    """logprobs [N]: of each whole continuation, in nats. greedy [N]: whether each of its tokens is
    the likeliest in its place. tokens: how many were run."""

    logprobs: np.ndarray
    greedy: np.ndarray
    tokens: int


def score_pairs(
    backend: Backend, pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int
) -> PairScores:
    """Of each pair (context, continuation), of a token at least each. All ranks ask alike.

    What is longer than the model's context loses its first tokens. ValueError for a continuation
    that is longer still.
    """
    if not pairs:
        return PairScores(np.zeros(0), np.zeros(0, dtype=bool), 0)
    context = backend.facts.context
    cut = [_cut(before, after, context) for before, after in pairs]
    # a row: what is read, and how many of its last places are scored
    places: dict[tuple[bytes, int], list[int]] = {}
    for i, (read, after) in enumerate(cut):
        places.setdefault((read.tobytes(), len(after)), []).append(i)
    members = list(places.values())
    rows = _rows(
        [cut[own[0]] for own in members], [[cut[i][1][-1] for i in own] for own in members]
    )
    scores = backend.score_rows(rows, batch_tokens, greedy=True)
    assert scores.likeliest is not None, "asked for with greedy"
    logprobs, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    for own, start, stop in zip(members, *_ends(rows)):
        last = stop - len(own)  # the alternatives lie from here on
        head, like = scores.tokens[start:last].sum(), scores.likeliest[start:last].all()
        logprobs[own] = head + scores.tokens[last:stop]
        greedy[own] = like & scores.likeliest[last:stop]
    return PairScores(logprobs, greedy, rows.unique_tokens())


def _cut(before: Ids, after: Ids, context: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that are read, tokens that are scored at the last so many of their places)."""
    assert len(before) and len(after), f"{len(before)} tokens of context, {len(after)} to score"
    whole = np.concatenate([np.asarray(before, np.int64), np.asarray(after, np.int64)])[:-1]
    if context is not None and len(after) > context:
        raise ValueError(f"a continuation of {len(after):,} tokens is longer than the context")
    return whole[-context:] if context else whole, np.asarray(after, np.int64)


def _rows(read: list[tuple[np.ndarray, np.ndarray]], last: list[list[int]]) -> Continuations:
    """Rows that share prefixes. last: the alternatives of each row's last place."""
    prefixes, prefix = share_prefixes([ids for ids, _ in read], [len(after) for _, after in read])
    own = [ids[len(prefixes[g]) :] for (ids, _), g in zip(read, prefix)]
    targets = [np.array([*after[:-1], *others]) for (_, after), others in zip(read, last)]
    alternatives = np.array([len(others) for others in last])
    return Continuations(prefixes, prefix, own, targets, alternatives=alternatives)


def _ends(rows: Continuations) -> tuple[list[int], list[int]]:
    offsets = rows.target_offsets.tolist()
    return offsets[:-1], offsets[1:]


# ---------------------------------------------------------------------------------------------
# What rows have in common


def share_prefixes(
    rows: Sequence[np.ndarray], scored: Sequence[int], cost: int = BATCH_COST
) -> tuple[list[np.ndarray], np.ndarray]:
    """(prefixes, which of them each row [R] goes on from); the first one is empty.

    Chosen so that the tokens that rows need not run, less those of each prefix and `cost` for each,
    are the most. The last `scored` tokens of a row are its own always.
    """
    # big-endian bytes are ordered as the numbers are
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
    room = [len(rows[i]) - scored[i] for i in order]
    common = [
        min(in_common(rows[order[i]], rows[order[i + 1]]), room[i], room[i + 1])
        for i in range(len(rows) - 1)
    ]
    prefixes, prefix = [np.zeros(0, dtype=np.int64)], np.zeros(len(rows), dtype=np.int64)
    # what lies inside comes after what holds it, and so has the last word
    for start, stop, length in _best_groups(np.array(common, dtype=np.int64), cost):
        prefix[order[start:stop]] = len(prefixes)
        prefixes.append(rows[order[start]][:length])
    return prefixes, prefix


def in_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@dataclass
class _Node:
    """Rows start..stop of the ordered ones, which have `length` tokens in common. above: lengths
    of the nodes that hold it, the root's 0 first. saved: the most tokens that its rows need not
    run, if the last of those that shares is the one of each place in `above`; shares: whether it
    shares itself then. below: the same sums without it, and for itself as the last."""

    start: int
    stop: int
    length: int
    above: list[int]
    parent: int
    below: np.ndarray = field(default_factory=lambda: np.zeros(0))
    saved: np.ndarray = field(default_factory=lambda: np.zeros(0))
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


def _best_groups(common: np.ndarray, cost: int) -> list[tuple[int, int, int]]:
    """(start, stop, length) of the nodes that share, of the tree that ordered rows are by what
    neighbours have in common."""
    nodes = [_Node(0, len(common) + 1, 0, [], -1)]
    for at, node in enumerate(nodes):  # it grows while it is walked
        inside = common[node.start : node.stop - 1]
        above = [*node.above, node.length]
        alone = node.stop - node.start
        # nothing in here can save more than the sum of what neighbours have in common
        if inside.sum() > cost:
            cuts = np.flatnonzero(inside == node.length) + node.start + 1
            for a, b in itertools.pairwise([node.start, *cuts.tolist(), node.stop]):
                if b - a > 1:
                    nodes.append(_Node(a, b, int(common[a : b - 1].min()), above, at))
                    alone -= b - a
        node.below = alone * np.array(above, dtype=np.int64)
    for node in reversed(nodes):  # children come after what holds them
        kept, shared = np.split(node.below, [-1])
        shared = shared - node.length - cost if node.length >= MIN_PREFIX else shared - np.inf
        node.shares = shared > kept
        node.saved = np.maximum(kept, shared)
        if node.parent >= 0:
            nodes[node.parent].below = nodes[node.parent].below + node.saved
    found, last = [], [0] * len(nodes)  # last: place in `above` of what shares around a node
    for at, node in enumerate(nodes[1:], 1):
        last[at] = last[node.parent]
        if node.shares[last[at]]:
            found.append((node.start, node.stop, node.length))
            last[at] = len(node.above)
    return found

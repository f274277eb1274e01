"""Log-probabilities of rows of tokens that go on from a few shared prefixes.

    rows = Continuations(prefixes, prefix, ids, targets, choice_ids)
    batches = plan_batches(rows, max_tokens=32768)          # the same for any number of ranks
    scores = score_continuations(model, rows, batches, dist)
    scores.choices, scores.targets                          # [R, K], [R] in nats

A prefix's keys and values are computed once and shared by all rows that go on from it, and only
scored positions meet the head. A batch gives the same bits wherever it runs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from backends.kvcache import PrefixCache, pad_rows
from backends.scoring import Consumer, agree_on_memory, prefetch, token_nll
from config import GPTConfig
from costs.flops import estimate_flops
from distributed import Dist
from model import GPTModel
from modeling.attention import attention_without_plans
from transformers_model import Model

if TYPE_CHECKING:
    from tqdm import tqdm

MIN_PREFIX = 32  # a shorter shared prefix saves less than merging two attentions costs
HEAD_ROWS = 2048  # rows of [V] logits alive at once
TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Continuations:
    """R rows of tokens, each going on from one of a few shared prefixes.

    prefixes: token ids [P] of each, possibly none. prefix [R]: which one a row goes on from.
    ids: each row's own tokens [T], at least one. targets: the tokens [S] scored after the last S
    positions of the row; all S are 0 where only choices are asked for. choice_ids [K]: tokens
    scored after the last position of every row, or None. alternatives [R]: how many of a row's
    last targets are scored in each other's place, after the last position; one of each unless
    given.
    """

    prefixes: Sequence[TokenIds]
    prefix: np.ndarray
    ids: Sequence[np.ndarray]
    targets: Sequence[TokenIds]
    choice_ids: list[int] | None = None
    alternatives: np.ndarray | None = None

    @property
    def highest_token(self) -> int:
        """Of all that a model would read or be asked about."""
        tokens = (*self.prefixes, *self.ids, *self.targets, np.array(self.choice_ids or [0]))
        return max(int(np.maximum.reduce(ids, initial=0)) for ids in tokens)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @functools.cached_property
    def target_offsets(self) -> np.ndarray:
        """[R + 1]: where each row's targets lie among all of them."""
        return np.cumsum([0, *map(len, self.targets)])

    def unique_tokens(self) -> int:
        used = np.unique(self.prefix)
        return int(self.lengths.sum()) + sum(len(self.prefixes[g]) for g in used)


class Portion(Protocol):
    """Rows that are scored in one pass: those of a Batch, or of a Strip (backends/strips.py).

    prefix: what is run before it, once for portions that follow each other and share it. tokens: of
    the pass, padding included. overhead: what one more costs, in tokens.
    """

    @property
    def prefix(self) -> int: ...

    @property
    def rows(self) -> np.ndarray: ...

    @property
    def overhead(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def before(self, rows: Continuations) -> int:
        """Tokens of what is run before it."""

    def open(self, model: Any, rows: Continuations, dist: Dist) -> Any:
        """The cache that this runs, and portions of the same prefix after it."""

    def lay(self, rows: Continuations) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """input_ids, the places [B] after each row's last token among them, counted through, and
        what `seen` needs on the device."""

    def seen(self, cache: Any, more: Sequence[torch.Tensor]) -> Any:
        """What `hidden` is given as its cache. more: of `lay`."""


@dataclass(frozen=True)
class Batch:
    """Rows [B] of one prefix, right-padded to `length` tokens: a Portion."""

    prefix: int
    rows: np.ndarray
    length: int
    overhead: int

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.length

    def before(self, rows: Continuations) -> int:
        return len(rows.prefixes[self.prefix])

    def open(self, model: Any, rows: Continuations, dist: Dist) -> "PrefixCache | None":
        longest = int(rows.lengths[rows.prefix == self.prefix].max())
        ids = rows.prefixes[self.prefix]
        return make_prefix_cache(model, ids, dist.device, longest, dist.attempt)

    def lay(self, rows: Continuations) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        ids = pad_rows([rows.ids[r] for r in self.rows], self.length)
        return ids, np.arange(len(ids)) * self.length + rows.lengths[self.rows], []

    def seen(self, cache: "PrefixCache | None", more: Sequence[torch.Tensor]) -> Any:
        return cache


def plan_batches(
    rows: Continuations, max_tokens: int, max_rows: int | None = None, overhead: int = 512
) -> list[Batch]:
    """Batches of at most max_tokens padded tokens, prefix by prefix, longest rows first.

    Lengths are padded to a multiple of 8, never beyond the prefix's longest row, so that padding
    has positions wherever that row has. Which lengths share a batch minimises padding plus
    `overhead` tokens a batch. The result depends on the rows alone, never on the world size.
    """
    lengths = rows.lengths
    padded = -(-lengths // 8) * 8
    batches = []
    for g in range(len(rows.prefixes)):
        members = np.flatnonzero(rows.prefix == g)
        members = members[np.lexsort((members, -lengths[members]))]
        if not len(members):
            continue
        padded[members] = np.minimum(padded[members], lengths[members].max())
        for start, stop in _length_classes(padded[members], max_tokens, overhead):
            T = int(padded[members[start]])
            most = min(max(max_tokens // T, 1), max_rows or len(members))
            n_batches = -(-(stop - start) // most)
            for part in np.array_split(members[start:stop], n_batches):
                batches.append(Batch(g, part, T, overhead))
    return batches


def _length_classes(lengths, max_tokens, overhead):
    """Cut descending lengths [n] into runs padded to their first, at the least total cost."""
    starts = np.flatnonzero(np.diff(lengths, prepend=-1)).tolist()  # of each distinct length
    ends = [*starts[1:], len(lengths)]
    best = [(0, None)]  # cost of the first j distinct lengths, and where their last run starts
    for j, end in enumerate(ends):
        options = []
        for i in range(j + 1):
            tokens = (end - starts[i]) * int(lengths[starts[i]])
            cost = tokens + overhead * -(-tokens // max_tokens)
            options.append((best[i][0] + cost, i))
        best.append(min(options))
    runs, j = [], len(ends)
    while j:
        i = best[j][1]
        runs.append((starts[i], ends[j - 1]))
        j = i
    return runs[::-1]


def deal_batches(rows: Continuations, batches: Sequence[Portion], world_size: int) -> list[range]:
    """One contiguous run of batches for each rank, the largest run's cost being the least possible.

    Contiguous, so that at most world_size - 1 prefixes are computed twice; a prefix's batches give
    the same values wherever they run.
    """
    costs = [batch.tokens + batch.overhead for batch in batches]
    prefix_costs = [batch.before(rows) + batch.overhead for batch in batches]

    def cut(capacity):
        """Where runs of at most `capacity` start, each as long as can be."""
        starts, load = [], capacity + 1
        for i, cost in enumerate(costs):
            new_prefix = i == 0 or batches[i].prefix != batches[i - 1].prefix
            load += cost + prefix_costs[i] * new_prefix
            if load > capacity:
                starts.append(i)
                load = cost + prefix_costs[i]
        return starts

    low = max((a + b for a, b in zip(costs, prefix_costs)), default=0)
    high = sum(costs) + sum(prefix_costs)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= world_size:
            high = middle
        else:
            low = middle + 1
    starts = cut(low)
    starts += [len(batches)] * (world_size + 1 - len(starts))
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def make_prefix_cache(
    model: GPTModel,
    prefix: TokenIds,
    device: torch.device,
    longest_row: int | None = None,
    attempt: Callable[..., PrefixCache | None] = lambda make, *args: make(*args),
) -> PrefixCache | None:
    """A PrefixCache that holds `prefix` (token ids [P]) for any number of rows, of at most
    `longest_row` tokens if that is known; None if P is 0. attempt: see Dist.attempt."""
    if len(prefix) == 0:
        return None
    longest = None if longest_row is None else len(prefix) + longest_row
    cache = attempt(PrefixCache, model, len(prefix), longest)
    ids = torch.as_tensor(np.asarray(prefix, np.int64), device=device)[None]
    model.hidden(ids, cache=cache and cache.filling())
    return cache


def _pack(rows: Continuations, batch: Portion) -> list[np.ndarray]:
    """What a portion needs on the device: input_ids, the last position of each row [B], row ids
    [B], and for all targets: position, token, slot in the result; then what it adds itself."""
    ids, ends, more = batch.lay(rows)
    first = rows.target_offsets[batch.rows]
    counts = rows.target_offsets[batch.rows + 1] - first
    spare = np.zeros_like(counts)  # targets beyond the first in one place
    if rows.alternatives is not None:
        spare = rows.alternatives[batch.rows] - 1

    def of_each(values):
        return np.repeat(values, counts)

    nth = np.arange(counts.sum()) - of_each(np.cumsum(counts) - counts)  # of its row's targets
    # the last ones share the last position
    positions = np.minimum(of_each(ends - counts + spare) + nth, of_each(ends) - 1)
    own = [np.asarray(rows.targets[r], np.int64) for r in batch.rows]
    return [ids, ends - 1, batch.rows, positions, np.concatenate(own), of_each(first) + nth, *more]


def choice_logprobs(model: Model, hidden: torch.Tensor, choice_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, K], float32, over the vocabulary, of K tokens after hidden [B, C]."""
    logits = model.logits(hidden).float()
    return logits[:, choice_ids] - logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class RowScores:
    """Log-probabilities in nats, float64, over the full vocabulary, of R rows.

    choices [R, K]: of the choice_ids after each row. targets [R]: of each row's scored tokens,
    summed; tokens [sum of S]: of each of them, row after row (Continuations.target_offsets).
    greedy [R]: whether every scored token of a row is the likeliest one, likeliest [sum of S]:
    whether each is; None unless asked for. bounded [R, K]: whether a choice's value is not its own,
    but one that it does not exceed, as some servers tell no more; None where all are known.
    """

    choices: np.ndarray
    targets: np.ndarray
    tokens: np.ndarray
    greedy: np.ndarray | None = None
    likeliest: np.ndarray | None = None
    bounded: np.ndarray | None = None


@torch.no_grad()
def score_continuations(
    model: Model,
    rows: Continuations,
    batches: Sequence[Portion],
    dist: Dist,
    progress: "tqdm | None" = None,
    greedy: bool = False,
    consumer: Consumer | None = None,
) -> RowScores:
    """Score every row once. Every rank returns everything, the same bits on any number of ranks.

    greedy: also find out whether each scored token is the likeliest. consumer: called with the
    logits [N, V] of scored positions, their targets [N] and the targets' places [N] among all of
    them, in chunks of at most HEAD_ROWS. Raises BatchTooLarge on every rank if any runs out of
    memory.
    """
    device, K = dist.device, len(rows.choice_ids or ())
    choice_ids = torch.tensor(rows.choice_ids or [], dtype=torch.int64, device=device)
    choices = torch.zeros(len(rows.ids), K, dtype=torch.float64, device=device)
    scored = torch.zeros(int(rows.target_offsets[-1]), dtype=torch.float64, device=device)
    likeliest = torch.zeros(len(scored) if greedy else 0, dtype=torch.float64, device=device)
    mine = deal_batches(rows, batches, dist.n_groups)[dist.group]

    def score_mine():
        prefix, cache = None, None
        packed = prefetch(lambda i: _pack(rows, batches[i]), mine, device)
        for i, (ids, last, row_ids, positions, targets, slots, *more) in zip(mine, packed):
            if batches[i].prefix != prefix:
                prefix, cache = batches[i].prefix, None  # nothing holds two
                cache = batches[i].open(model, rows, dist)
            seen = batches[i].seen(cache, more)
            dist.attempt(score, seen, ids, last, row_ids, positions, targets, slots)
            dist.bump()
            if progress is not None:
                progress.update(min(len(row_ids) * dist.n_groups, progress.total - progress.n))

    def score(cache, ids, last, row_ids, positions, targets, slots):
        hidden = model.hidden(ids, cache=cache)
        if hidden is None:  # another rank has it
            return
        hidden = hidden.flatten(0, 1)
        if K:
            parts = hidden[last].split(HEAD_ROWS)
            values = [choice_logprobs(model, part, choice_ids) for part in parts]
            choices[row_ids] = torch.cat(values).double()
        if len(slots):
            scored[slots] = -token_nll(model, hidden[positions], targets).double()
        if len(slots) and (greedy or consumer):
            rows_of = hidden[positions], targets, slots
            _see_logits(model, rows_of, likeliest if greedy else None, consumer)

    with attention_without_plans():
        agree_on_memory(score_mine, dist)
    summed = dist.sum(torch.cat((choices.flatten(), scored, likeliest)))
    return by_row(rows, np.split(summed, np.cumsum([choices.numel(), len(scored)])), greedy)


def _see_logits(model, rows, likeliest: torch.Tensor | None, consumer: Consumer | None) -> None:
    """rows: hidden states [N, C], their targets and places [N]."""
    for h, t, at in zip(*(x.split(HEAD_ROWS) for x in rows)):
        logits = model.logits(h)
        if likeliest is not None:
            likeliest[at] = (logits.argmax(-1) == t).double()
        if consumer is not None:
            consumer(logits, t, at)


def by_row(rows: Continuations, parts: Sequence[np.ndarray], greedy: bool) -> RowScores:
    """parts: choices [R * K], tokens and likeliest [sum of S], float64: what was found of all."""
    choices, tokens, likeliest = parts
    n = len(rows.ids)
    row_of_target = np.repeat(np.arange(n), np.diff(rows.target_offsets))
    found = choices.reshape(n, len(rows.choice_ids or ()))
    sums = np.bincount(row_of_target, tokens, n)
    if not greedy:
        return RowScores(found, sums, tokens)
    missed = np.bincount(row_of_target, 1 - likeliest, n)
    return RowScores(found, sums, tokens, missed == 0, likeliest == 1)


def unique_flops(config: GPTConfig, rows: Continuations) -> float:
    """FLOPs of a forward over each prefix and each row once, the head at scored positions only."""
    per_token = estimate_flops(config, 1, 1)["parts"]
    P = np.array([len(prefix) for prefix in rows.prefixes], dtype=np.float64)
    P = np.where(np.isin(np.arange(len(P)), rows.prefix), P, 0)
    T, before = rows.lengths.astype(np.float64), P[rows.prefix]
    pairs = (P * (P + 1) / 2).sum() + (T * before + T * (T + 1) / 2).sum()
    heads = sum(map(len, rows.targets)) + (len(rows.ids) if rows.choice_ids else 0)
    linear = per_token["linear"] * rows.unique_tokens()
    return linear + per_token["attention_causal"] * pairs + per_token["head"] * heads

"""Log-probabilities of the tokens of prompts, and the likeliest next one, in one pass.

    (scores,) = score_prompts(model, [prompt], k=20, max_tokens=4096, dist=dist)
    scores.ids[i], scores.logprobs[i]       # after prompt[: i + 1]: the token that follows, then
                                            # the k likeliest, in nats

What follows the last token is the likeliest one: a client that scores text asks for one token more,
and drawing it would be a second pass. A token's value and those of the likeliest come from one
array, so that the likeliest one's are the same number. What prompts begin with alike, as the
choices of a question and the questions of a task do, is run twice for all of them: once for its
keys and values, and once as a row, for the scores of its own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from backends.continuations import Continuations, plan_batches, score_continuations
from backends.local import batch_overhead, halve_until_it_fits
from backends.pairs import BATCH_COST, share_prefixes
from backends.sampling import top_logprobs
from distributed import Dist
from transformers_model import Model


class Ending(NamedTuple):
    """The token that ended a sample and is no part of it; logprobs: as engine.Token's."""

    sample_index: int
    logprobs: tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """Of a prompt of N tokens. ids, logprobs [N, 1 + k]: what follows each of them, the token and
    then the k likeliest."""

    ids: list[list[int]]
    logprobs: list[list[float]]


def score_prompts(
    model: Model, prompts: Sequence[Sequence[int]], k: int, max_tokens: int, dist: Dist
) -> list[Scores]:
    """Scores of prompts of a token at least, run as rows of batches of max_tokens padded tokens.
    dist: the ranks that hold the model, one group at most, which all have them then. ValueError
    where the model gives NaN."""
    device = dist.device
    rows, parts = shared_rows(prompts, model.supports_cache)
    offsets = rows.target_offsets
    is_next = torch.zeros(int(offsets[-1]), dtype=torch.bool, device=device)
    is_next[torch.as_tensor(offsets[1 : len(prompts) + 1] - 1, device=device)] = True
    ids = torch.zeros(len(is_next), 1 + k, dtype=torch.int64, device=device)
    values = torch.zeros(len(is_next), 1 + k, dtype=torch.float64, device=device)

    def see(logits, targets, at):
        targets = torch.where(is_next[at], logits.argmax(-1), targets)
        ids[at], told = top_logprobs(logits, targets, k)
        values[at] = told.double()

    def score(most):
        batches = plan_batches(rows, most, None, batch_overhead(model, device))
        return score_continuations(model, rows, batches, dist, consumer=see)

    halve_until_it_fits(score, max_tokens)
    found = dist.sum(ids), dist.sum(values)  # of the rank that has the head
    if np.isnan(found[1]).any():
        raise ValueError("the model gives NaN: no score can be had")
    every_id, every_value = (array.tolist() for array in found)

    def gathered(of: list) -> list[list]:
        return [[x for r in own for x in of[offsets[r] : offsets[r + 1]]] for own in parts]

    return [Scores(i, v) for i, v in zip(gathered(every_id), gathered(every_value))]


def shared_rows(
    prompts: Sequence[Sequence[int]], share: bool = True
) -> tuple[Continuations, list[list[int]]]:
    """Rows of prompts, and which of them, one after the other, score each prompt's tokens. What
    three prompts or more begin with, if it is worth it, is a prefix, and a row of its own."""
    whole = [np.array(prompt, dtype=np.int64) for prompt in prompts]
    prefixes, prefix = [np.zeros(0, dtype=np.int64)], np.zeros(len(whole), dtype=np.int64)
    if share:
        prefixes, prefix = share_prefixes(whole, [1] * len(whole))
    counts = np.bincount(prefix, minlength=len(prefixes))
    worth = [g for g, own in enumerate(prefixes) if (counts[g] - 2) * len(own) > BATCH_COST]
    # a prefix's last token is read by each row: what follows it is the row's own
    kept = [np.zeros(0, dtype=np.int64), *(prefixes[g][:-1] for g in worth)]
    heads = {g: len(whole) + i for i, g in enumerate(worth)}
    place = {g: 1 + i for i, g in enumerate(worth)}
    groups = prefix.tolist()
    own = [ids[len(kept[place.get(g, 0)]) :] for ids, g in zip(whole, groups)]
    rows = Continuations(
        prefixes=kept,
        prefix=np.array([*(place.get(g, 0) for g in groups), *(0 for _ in worth)]),
        ids=[*own, *kept[1:]],
        targets=[*([*ids[1:], 0] for ids in own), *(prefixes[g][1:] for g in worth)],
    )
    return rows, [[heads[g], i] if g in heads else [i] for i, g in enumerate(groups)]

"""Log-probabilities of the tokens of prompts, and the likeliest next one, in one pass.

    (scores,) = score_prompts(model, [prompt], k=20, max_tokens=4096)
    scores.ids[i], scores.logprobs[i]       # after prompt[: i + 1]: the token that follows, then
                                            # the k likeliest, in nats

What follows the last token is the likeliest one: a client that scores text asks for one token more,
and drawing it would be a second pass. A token's value and those of the likeliest come from one
array, so that the likeliest one's are the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backends.continuations import Continuations, plan_batches, score_continuations
from backends.local import batch_overhead, halve_until_it_fits
from backends.sampling import top_logprobs
from distributed import Dist
from transformers_model import Model


@dataclass(frozen=True)
class Scores:
    """Of a prompt of N tokens. ids, logprobs [N, 1 + k]: what follows each of them, the token and
    then the k likeliest."""

    ids: list[list[int]]
    logprobs: list[list[float]]


def score_prompts(
    model: Model, prompts: Sequence[Sequence[int]], k: int, max_tokens: int
) -> list[Scores]:
    """Scores of prompts of a token at least, run as rows of batches of max_tokens padded tokens.
    ValueError where the model gives NaN."""
    device = next(model.parameters()).device
    rows = Continuations(
        prefixes=[[]],
        prefix=np.zeros(len(prompts), dtype=np.int64),
        ids=[np.array(prompt, dtype=np.int64) for prompt in prompts],
        targets=[[*prompt[1:], 0] for prompt in prompts],
    )
    offsets = rows.target_offsets
    is_next = torch.zeros(int(offsets[-1]), dtype=torch.bool, device=device)
    is_next[torch.as_tensor(offsets[1:] - 1, device=device)] = True
    ids = torch.zeros(len(is_next), 1 + k, dtype=torch.int64, device=device)
    values = torch.zeros(len(is_next), 1 + k, dtype=torch.float32, device=device)

    def see(logits, targets, at):
        targets = torch.where(is_next[at], logits.argmax(-1), targets)
        ids[at], values[at] = top_logprobs(logits, targets, k)

    def score(most):
        batches = plan_batches(rows, most, None, batch_overhead(model, device))
        return score_continuations(model, rows, batches, Dist(0, 1, 0, device), consumer=see)

    halve_until_it_fits(score, max_tokens)
    if values.isnan().any():
        raise ValueError("the model gives NaN: no score can be had")
    cuts = offsets[1:-1].tolist()
    return [
        Scores(i.tolist(), v.tolist())
        for i, v in zip(ids.cpu().tensor_split(cuts), values.cpu().tensor_split(cuts))
    ]

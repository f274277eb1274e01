"""How models that others serve are asked: what each kind of server is sent, what must come back.

    client = Client("http://host:8000")
    route = route_of("vllm", client, "the-model", tokenizer)        # routes.py
    route.draw(prompt, sampling, seed)           # a sample
    route.score(prompt, ids)                     # log-probabilities of a prompt's own tokens
    route.tops(prompt, letters)                  # of tokens that may follow it

One prompt and one sample a request: servers batch by themselves, and what several come back as
differs. Every sampling parameter is sent, since what is left out comes from the server's defaults
or from the model's generation_config.json. An answer that is not what was asked for is an error,
never a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from backends import Sampling


@dataclass(frozen=True)
class Scores:
    """values [N]: nats of each token of a prompt after those before it; NaN where they are not
    told: for the first, and for those before `start`. likeliest [N]: whether none has more, or None
    where the server does not say. next_id, next_logprob: of the one token that was generated after
    them, None where it is not told."""

    values: np.ndarray
    likeliest: np.ndarray | None = None
    next_id: int | None = None
    next_logprob: float | None = None


@dataclass(frozen=True)
class Tops:
    """Nats of tokens after a prompt: known, by token id; bound: no other token has more."""

    known: dict[int, float]
    bound: float


@dataclass(frozen=True)
class Drawn:
    """text, as it came; finish: "stop" or "length"; prompt_tokens, tokens: as the server counted
    them, or None."""

    text: str
    finish: str
    prompt_tokens: int | None = None
    tokens: int | None = None


class Lacks(ValueError):
    """What a route gives to nobody: asking again, or for another prompt, is of no use."""


class Route(Protocol):
    """A way of asking one kind of server. prompt: token ids, or a text where `token_ids` is False.
    path: of its requests. streams: whether samples are asked for piece by piece; false until it is
    known that they come out the same. Refused for a prompt that is not answered, ValueError for an
    answer that cannot be true."""

    path: str
    streams: bool

    def draw(self, prompt: list[int] | str, sampling: Sampling, seed: int | None = None) -> Drawn:
        """One sample."""

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        """Of a prompt whose tokens are `ids`, of those from `start` on at least."""

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        """Of tokens that may follow a prompt, of those that are wanted as many as there are."""

    def plain(self, prompt: str) -> dict:
        """The body of a request that any server of this kind answers."""

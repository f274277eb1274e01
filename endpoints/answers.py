"""What came back, read strictly: a choice, counts, log-probabilities. ValueError for what cannot be
true, Refused for a prompt that is not answered."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from endpoints.client import Refused

# why a sample ended, in the words of all servers; anything else is no sample
ENDS = {
    "length": "length",
    "limit": "length",
    "stop": "stop",
    "eos": "stop",
    "word": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
}


def an_object(value: Any, what: str = "an answer") -> dict:
    """It, if it is one that tells of no error."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {type(value).__name__}, not an object")
    if value.get("error"):
        raise Refused(f"{value['error']!r:.200}")
    return value


def only_choice(answer: dict) -> dict:
    """Of `choices`, of which one was asked for."""
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        n = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"{n} choices come back where one was asked for")
    if choices[0].get("index", 0) != 0:
        raise ValueError(f"choice {choices[0]['index']!r:.40} comes back where there is one")
    return choices[0]


def finish_of(word: Any) -> str:
    """ "stop" or "length"."""
    finish = ENDS.get(word) if isinstance(word, str) else None
    if finish is None:
        raise Refused(f"it ended with {word!r:.40}")
    return finish


def a_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} comes back where a text should stand")
    return value


def count_of(counts: Any, name: str) -> int | None:
    """A count of tokens, if it is told."""
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if type(count) is int else None


def check_read(count: int | None, ids: Sequence[int]) -> None:
    """That as many tokens were read as were meant."""
    if count is not None and count != len(ids):
        raise ValueError(f"{count} tokens were read where {len(ids)} were sent")


def is_logprob(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= 1e-3


def logprobs(values: Iterable[Any]) -> list[float]:
    """Them, each a number that can be one."""
    values = list(values)
    for value in values:
        if not is_logprob(value):
            raise ValueError(f"{value!r:.40} comes back where a log-probability should stand")
    return [float(value) for value in values]


def likeliest(tops: Any, values: np.ndarray) -> np.ndarray | None:
    """[N]: whether a token's value is the highest of those named in its place; tops: those values
    [N], the first being nobody's."""
    if not isinstance(tops, list) or len(tops) != len(values):
        return None
    if not all(isinstance(top, list) and top for top in tops[1:]):
        return None
    if not all(is_logprob(value) for top in tops[1:] for value in top):
        return None
    best = np.array([max(top) for top in tops[1:]])
    return np.concatenate([[False], values[1:] >= best])

"""/v1/completions of OpenAI's form: what is sent to each kind of server, and what must come back.

    completions = Completions(client, "the-model", "vllm")
    scores = completions.score([5, 7, 5, 9])      # log-probabilities of a prompt's own tokens
    drawn = completions.draw([5, 7, 5], Sampling(max_new_tokens=16), seed=1)

One prompt and one sample a request: servers batch by themselves, and what several come back as
differs. Every sampling parameter is sent, since what is left out comes from the server's defaults
or from the model's generation_config.json. An answer that is not what was asked for is an error
here, never a number.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends import SERVERS, Sampling
from backends.client import Client, Refused

PATH = "/v1/completions"
# what turns off, on each kind of server, what OpenAI's parameters do not reach; who keeps the stop
# string tells thereby why a sample ended
NEUTRAL: dict[str, dict[str, Any]] = {
    "openai": {},
    "roseval": {"top_k": 0},
    "vllm": {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "include_stop_str_in_output": True,
    },
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "no_stop_trim": True},
    "llama.cpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "cache_prompt": False},
    "llama-cpp-python": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
assert tuple(NEUTRAL) == SERVERS, (*NEUTRAL, SERVERS)
OWNERS = {"llamacpp": "llama.cpp", "me": "llama-cpp-python"}  # of a model, as /v1/models says
FINISHED = ("stop", "length", "eos", "eos_token", "stop_sequence")
GREEDY = Sampling(max_new_tokens=1)


@dataclass(frozen=True)
class Scores:
    """values [N]: nats of each token of a prompt after those before it; NaN for the first.
    likeliest [N]: whether none has more, or None where the server does not say. next_logprob,
    next_text: of the one token that was generated after them."""

    values: np.ndarray
    likeliest: np.ndarray | None
    next_logprob: float
    next_text: str


@dataclass(frozen=True)
class Drawn:
    """text, as it came; finish: "stop" or "length"; prompt_tokens, tokens: as the server counted
    them, or None."""

    text: str
    finish: str
    prompt_tokens: int | None
    tokens: int | None


class Completions:
    """See the file's docstring. ValueError for an answer that cannot be true; Refused for a prompt
    that is not answered."""

    def __init__(self, client: Client, model: str, kind: str):
        self.client, self.model, self.kind = client, model, kind

    def score(self, ids: list[int]) -> Scores:
        """Of a prompt of token ids, through echo. A token is generated too, since some servers give
        no prompt log-probabilities without one."""
        body = self.body(ids, GREEDY, None) | {"logprobs": 1, "echo": True}
        choice, usage = self._one(body)
        count = _count(usage, "prompt_tokens")
        if count is not None and count != len(ids):
            raise ValueError(f"{count} tokens were read where {len(ids)} were sent")
        about = choice.get("logprobs")
        about = about if isinstance(about, dict) else {}
        given = about.get("token_logprobs")
        if not isinstance(given, list):
            raise ValueError("no log-probabilities of the prompt come back")
        if len(given) != len(ids) + 1:
            raise ValueError(
                f"{len(given)} log-probabilities come back for {len(ids)} tokens and one more"
            )
        if given[0] is not None:
            raise ValueError("the first token of a prompt, after nothing, is given a probability")
        if not all(_is_logprob(value) for value in given[1:]):
            bad = next(value for value in given[1:] if not _is_logprob(value))
            raise ValueError(f"{bad!r:.40} comes back where a log-probability should stand")
        values = np.array([math.nan, *given[1:]], dtype=np.float64)
        likeliest = _likeliest(about.get("top_logprobs"), values)
        texts = about.get("tokens")
        last = texts[-1] if isinstance(texts, list) and len(texts) == len(given) else ""
        return Scores(
            values[:-1],
            None if likeliest is None else likeliest[:-1],
            float(values[-1]),
            last if isinstance(last, str) else "",
        )

    def draw(self, prompt: list[int] | str, sampling: Sampling, seed: int | None = None) -> Drawn:
        """One sample after a prompt, token ids or text."""
        choice, usage = self._one(self.body(prompt, sampling, seed))
        text, finish = choice.get("text"), choice.get("finish_reason")
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.40} comes back where a text should stand")
        if finish not in FINISHED:
            raise Refused(f"it ended with {finish!r:.40}")
        finish = "length" if finish == "length" else "stop"
        counts = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        return Drawn(text, finish, *counts)

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        """What is sent. ValueError for a parameter that this kind of server does not know."""
        greedy = not sampling.temperature
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "n": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "stream": False,
        } | NEUTRAL[self.kind]
        if sampling.top_k and not greedy:
            if "top_k" not in asked:
                raise ValueError(f"--top-k: a server of the kind {self.kind} knows none (--server)")
            asked["top_k"] = sampling.top_k
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        if seed is not None:
            asked["seed"] = seed
        return asked

    def _one(self, body: dict) -> tuple[dict, Any]:
        """(the only choice, usage)"""
        answer = self.client.ask("POST", PATH, body)
        if not isinstance(answer, dict):
            raise ValueError(f"an answer is {type(answer).__name__}, not an object")
        if answer.get("error"):
            raise Refused(f"{answer['error']!r:.200}")
        choices = answer.get("choices")
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            n = len(choices) if isinstance(choices, list) else "no"
            raise ValueError(f"{n} choices come back where one was asked for")
        if choices[0].get("index", 0) != 0:
            raise ValueError(f"choice {choices[0]['index']!r:.40} comes back where there is one")
        return choices[0], answer.get("usage")


def _count(usage: Any, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _is_logprob(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= 1e-3


def _likeliest(tops: Any, values: np.ndarray) -> np.ndarray | None:
    """[N + 1]: whether a token's value is the highest of those named in its place."""
    if not isinstance(tops, list) or len(tops) != len(values):
        return None
    if not all(isinstance(top, dict) and top for top in tops[1:]):
        return None
    if not all(_is_logprob(value) for top in tops[1:] for value in top.values()):
        return None
    best = np.array([max(top.values()) for top in tops[1:]])
    return np.concatenate([[False], values[1:] >= best])

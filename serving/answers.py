"""What a request has come to, and OpenAI's words for it.

    answer = Answer(served, asked, "text_completion")
    answer.take(prompt, event)             # a Token, a Sample, Scores
    answer.whole()                         # once all has come
    answer.chunks(prompt, event)           # or as it comes

`logprobs` of a completion has an entry for each token of the prompt, the first one null, where it
is echoed with them, and for each that was drawn, the one that ended the text too. Every entry of
top_logprobs holds the token itself and the likeliest, each under its own text, or as `token_id:7`
where that text is another's.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends import Sample
from backends.engine import Token
from serving.asked import Asked, Served
from serving.scores import Ending, Scores
from serving.texts import REPLACEMENT, Unfolding

COMPLETION, CHAT = "text_completion", "chat.completion"
LOWEST = -9999.0  # JSON has no infinity
FINISHED = {"eos": "stop", "stop": "stop", "length": "length"}
Told = tuple[Sequence[int], Sequence[float]]  # a token and the likeliest in its place, their nats


@dataclass
class Choice:
    """A sample of a prompt, as far as it is known."""

    unfolding: Unfolding
    tokens: list[Told] = field(default_factory=list)
    ending: list[Told] = field(default_factory=list)  # the token that ended it, if it was told
    sample: Sample | None = None

    @property
    def text(self) -> str:
        return (self.sample and self.sample.text) or ""

    @property
    def finish_reason(self) -> str:
        return FINISHED[self.sample.finish_reason] if self.sample else "length"


class Answer:
    """What is known of a request's samples, by prompt and index. kind: COMPLETION or CHAT."""

    def __init__(self, served: Served, asked: Asked, kind: str):
        self.served, self.asked, self.kind = served, asked, kind
        stop = asked.sampling.stop
        self.scores: dict[int, Scores] = {}
        self.choices = {
            (p, s): Choice(served.texts.unfolding(prompt, stop))
            for p, prompt in enumerate(asked.prompts)
            for s in range(asked.n)
        }
        name = "chatcmpl" if kind == CHAT else "cmpl"
        self.id, self.created = f"{name}-{secrets.token_hex(12)}", int(time.time())

    def take(self, prompt: int, event: Any) -> None:
        if isinstance(event, Scores):
            self.scores[prompt] = event
        elif isinstance(event, Ending):
            self.choices[prompt, event.sample_index].ending = [event.logprobs]
        elif isinstance(event, Token):
            assert event.logprobs is not None, "the engine tells them"
            self.choices[prompt, event.sample_index].tokens.append(event.logprobs)
        else:
            self.choices[prompt, event.sample_index].sample = event

    def usage(self) -> dict[str, int]:
        read = sum(map(len, self.asked.prompts))
        drawn = sum(len(choice.tokens) for choice in self.choices.values())
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return dict(zip(names, (read, drawn, read + drawn)))

    # -- Whole --------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, ((prompt, _), choice) in enumerate(self.choices.items()):
            said: dict[str, Any] = {"index": i, "finish_reason": choice.finish_reason}
            if self.kind == CHAT:
                said["message"] = {"role": "assistant", "content": choice.text}
                said["logprobs"] = self._logprobs(choice.tokens + choice.ending)
            else:
                echoed = self.asked.echoed[prompt] if self.asked.echoed else ""
                said["text"] = echoed + choice.text
                said["logprobs"] = self._completion_logprobs(prompt, choice)
            choices.append(said)
        return self._frame(self.kind) | {"choices": choices, "usage": self.usage()}

    def _frame(self, kind: str) -> dict[str, Any]:
        names = {"id": self.id, "object": kind, "created": self.created}
        return names | {"model": self.served.name}

    def _completion_logprobs(self, prompt: int, choice: Choice) -> dict[str, list] | None:
        """Of the prompt's tokens too, where they were scored."""
        if prompt not in self.scores or self.asked.logprobs is None:
            return self._logprobs(choice.tokens + choice.ending)
        scores = self.scores[prompt]
        told = [*zip(scores.ids[:-1], scores.logprobs[:-1]), *choice.tokens, *choice.ending]
        found = self._logprobs(told)
        assert isinstance(found, dict), "asked for"
        first = self._name(self.asked.prompts[prompt][0])
        for name, value in (("tokens", first), ("token_logprobs", None), ("top_logprobs", None)):
            found[name].insert(0, value)
        found["text_offset"] = _offsets(found["tokens"])
        return found

    # -- As it comes --------------------------------------------------------------------------

    def chunks(self, prompt: int, event: Any) -> Iterator[dict[str, Any]]:
        """A chunk for every token, whose text may be held back, and one that says the end."""
        self.take(prompt, event)
        choice = self.choices[prompt, event.sample_index]
        index = prompt * self.asked.n + event.sample_index
        if isinstance(event, Token):
            if self.kind == CHAT and len(choice.tokens) == 1:
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)
            text = choice.unfolding.add(event.token_id)
            yield self._chunk(index, text, self._logprobs(choice.tokens[-1:]), None)
        elif not isinstance(event, Ending):
            text = choice.unfolding.rest(choice.text)
            told = self._logprobs(choice.ending) if choice.ending else None
            yield self._chunk(index, text, told, choice.finish_reason)

    def last_chunk(self) -> dict[str, Any]:
        """The usage, where it was asked for."""
        return self._chunk_frame() | {"choices": [], "usage": self.usage()}

    def _chunk_frame(self) -> dict[str, Any]:
        return self._frame("chat.completion.chunk" if self.kind == CHAT else COMPLETION)

    def _chunk(self, index: int, said: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        if self.kind == CHAT:
            delta = said if isinstance(said, dict) else {"content": said} if said else {}
            own = {"delta": delta}
        else:
            own = {"text": said}
        choice = {"index": index, **own, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk_frame() | {"choices": [choice]}

    # -- Log-probabilities --------------------------------------------------------------------

    def _logprobs(self, told: Sequence[Told]) -> dict[str, list] | None:
        if self.asked.logprobs is None:
            return None
        if self.kind == CHAT:
            return {"content": [self._chat_entry(*one) for one in told]}
        tokens = [self._name(ids[0]) for ids, _ in told]
        return {
            "tokens": tokens,
            "token_logprobs": [max(values[0], LOWEST) for _, values in told],
            "top_logprobs": [self._likeliest(*one) for one in told],
            "text_offset": _offsets(tokens),
        }

    def _likeliest(self, ids: Sequence[int], values: Sequence[float]) -> dict[str, float]:
        found, seen = {}, set()
        for i, value in zip(ids[: 1 + (self.asked.logprobs or 0)], values):
            if i not in seen:
                seen.add(i)
                name = self._name(i)
                found[f"token_id:{i}" if name in found else name] = max(value, LOWEST)
        return found

    def _chat_entry(self, ids: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
        entries = []
        for i, value in zip(ids[: 1 + (self.asked.logprobs or 0)], values):
            text = self._name(i)
            raw = None if REPLACEMENT in text else list(text.encode("utf-8", "replace"))
            entries.append({"token": text, "logprob": max(value, LOWEST), "bytes": raw})
        return entries[0] | {"top_logprobs": entries[1:]}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.ids_as_tokens else self.served.texts.piece(token)


def _offsets(tokens: Sequence[str]) -> list[int]:
    """Where each token's text begins, as they stand end to end."""
    offsets, at = [], 0
    for text in tokens:
        offsets.append(at)
        at += len(text)
    return offsets

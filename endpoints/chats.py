"""/v1/chat/completions of OpenAI's form: each prompt is what a user says, in the server's own
template, so its numbers are of another protocol than those of texts."""

from collections.abc import Sequence
from typing import Any

from backends import Sampling
from endpoints import Drawn, Lacks, Scores, Tops
from endpoints import answers as read
from endpoints.client import Refused
from endpoints.completions import Completions

PATH = "/v1/chat/completions"


class Chats(Completions):
    """Samples alone. A prompt is a text, one message of a user."""

    def __init__(self, *about: Any):
        super().__init__(*about)
        self.path, self.length = PATH, "max_tokens"

    def body(self, prompt: list[int] | str, sampling: Sampling, seed: int | None) -> dict:
        body = super().body(prompt, sampling, seed)
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        body[self.length] = body.pop("max_tokens")
        return body

    def draw(self, prompt: list[int] | str, sampling: Sampling, seed: int | None = None) -> Drawn:
        assert isinstance(prompt, str), "a chat is of texts"
        try:
            return super().draw(prompt, sampling, seed)
        except Refused as error:
            if self.length == "max_tokens" and "max_completion_tokens" in str(error):
                self.length = "max_completion_tokens"  # OpenAI's newer models
                return super().draw(prompt, sampling, seed)
            raise

    def score(self, prompt: list[int] | str, ids: Sequence[int], start: int = 1) -> Scores:
        raise Lacks("chats give none of what a user says")

    def tops(self, prompt: list[int] | str, wanted: Sequence[int]) -> Tops:
        raise Lacks("an answer in a chat need not begin with the letter")

    def text_of(self, choice: dict) -> str:
        message = choice.get("message")
        if not isinstance(message, dict):
            raise ValueError(f"{message!r:.40} comes back where a message should stand")
        content = message.get("content")
        return read.a_text("" if content is None else content)

    def piece_of(self, choice: dict) -> str:
        delta = choice.get("delta")
        return read.a_text((delta.get("content") if isinstance(delta, dict) else None) or "")

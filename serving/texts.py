"""Text on its way in and out of a served model: prompts to tokens, tokens to text as they come.

texts = Texts(tokenizer, vocab_size, bos=True)
ids = texts.encode("Once upon")                  # BOS first, special tokens recognised
unfolding = texts.unfolding(ids)
unfolding.add(token)                             # the text that became certain with it
"""

import os
from collections.abc import Sequence
from typing import Any

from backends.endings import text_of_tokens
from serving.fields import Refused

REPLACEMENT = "\ufffd"  # where a character is not whole yet
ANCHOR = 16  # tokens of a prompt that decide how its continuation is decoded


class Texts:
    """A tokenizer as a server uses it. Text that looks like a special token is one, as with other
    servers: chats are sent as text, and clients ask for the id of "</s>". bos: whether BOS comes
    first, once, before a text."""

    def __init__(self, tokenizer: Any, vocab_size: int, bos: bool):
        self.tokenizer, self.vocab_size, self.bos = tokenizer, vocab_size, bos
        self.piece = text_of_tokens(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Refused for a text whose tokens the model does not have."""
        ids = self.tokenizer.encode_batch([text], specials=True)[0].tolist()
        start = self.tokenizer.bos_token_id
        if add_special_tokens and self.bos and ids[:1] != [start]:
            ids = [start, *ids]
        return self.checked(ids)

    def checked(self, ids: list[int]) -> list[int]:
        """Token ids that the model has; Refused for others."""
        if any(type(i) is not int or not 0 <= i < self.vocab_size for i in ids):
            raise Refused(f"token ids are whole numbers from 0 to {self.vocab_size - 1}", "prompt")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids as they go on from a prompt."""
        tail = list(prompt[-ANCHOR:])
        before, whole = self.decode(tail), self.decode([*tail, *ids])
        return whole[len(_in_common(before, whole)) :]

    def unfolding(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> "Unfolding":
        """The text after a prompt, as it becomes known."""
        return Unfolding(self, prompt, stop)


class Unfolding:
    """What of a text is certain: whole characters, and nothing that may begin a stop string."""

    def __init__(self, texts: Texts, prompt: Sequence[int], stop: Sequence[str]):
        self.texts, self.stop = texts, stop
        self.settled, self.open = list(prompt[-ANCHOR:]), []  # tokens whose text is certain, or not
        self.before = texts.decode(self.settled)
        self.held, self.sent = "", 0

    def add(self, token: int) -> str:
        """The text that may be shown now that this token came."""
        self.open.append(token)
        whole = self.texts.decode(self.settled + self.open)
        new = whole[len(_in_common(self.before, whole)) :]
        if new.endswith(REPLACEMENT):
            return ""
        self.settled, self.open, self.before = self.settled + self.open, [], whole
        if len(self.settled) > 2 * ANCHOR:
            self.settled = self.settled[-ANCHOR:]
            self.before = self.texts.decode(self.settled)
        return self._show(new)

    def _show(self, new: str) -> str:
        self.held += new
        kept = max((_begun(self.held, text) for text in self.stop), default=0)
        shown = self.held[: len(self.held) - kept]
        cuts = [at for text in self.stop if (at := shown.find(text)) >= 0]
        shown = shown[: min(cuts, default=len(shown))]
        self.held = self.held[len(shown) :]
        self.sent += len(shown)
        return shown

    def rest(self, text: str) -> str:
        """What is missing of the whole text."""
        return text[self.sent :]


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of a text could begin `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )


def _in_common(a: str, b: str) -> str:
    return os.path.commonprefix((a, b))  # noqa: RUF071

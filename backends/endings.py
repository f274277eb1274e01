"""When a sequence is finished, and what its text is.

endings = Endings(tokenizer, stop=("\\ndef",), eos_ids=(2,))
endings.add(sequence, token)             # "eos", "stop", "length", or None: it goes on
endings.sample(sequence)                 # once it has ended
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

from backends import Sample
from backends.rows import Sequence
from tokenizer import Tokenizer


def text_of_tokens(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What tells a token's own text: decoded after another one, for alone it may lose a leading
    space."""
    anchor = list(tokenizer.encode("a"))
    before = len(tokenizer.decode(anchor))
    return functools.cache(lambda token: tokenizer.decode([*anchor, token])[before:])


class Endings:
    """Decides when a sequence is finished, and what its text is."""

    def __init__(self, tokenizer, stop: Iterable[str], eos_ids: Iterable[int]):
        self.tokenizer, self.stop, self.eos_ids = tokenizer, tuple(stop), frozenset(eos_ids)
        self.longest = max(map(len, self.stop), default=0)
        # A stop string of ASCII characters shows in the tokens' own texts laid end to end; other
        # characters can be split between tokens
        self.by_piece = all(s.isascii() for s in self.stop)
        if self.stop:
            self.piece = text_of_tokens(tokenizer)

    def add(self, sequence: Sequence, token: int) -> str | None:
        """Take one more token; returns the reason if the sequence ends with it."""
        if token in self.eos_ids:
            sequence.reason = "eos"
            return "eos"
        sequence.tokens.append(token)
        if self.stop and self._may_stop(sequence, token):
            text = self.completion(sequence)
            if any(s in text for s in self.stop):
                sequence.reason = "stop"
        if sequence.reason is None and len(sequence.tokens) >= sequence.limit:
            sequence.reason = "length"
        return sequence.reason

    def _may_stop(self, sequence: Sequence, token: int) -> bool:
        if not self.by_piece:
            return True
        text = sequence.tail + self.piece(token)
        sequence.tail = text[max(0, len(text) - self.longest + 1) :]
        return any(s in text for s in self.stop)

    def completion(self, sequence: Sequence) -> str:
        """Decoded jointly with the prompt, then cut: SentencePiece drops a text's first space."""
        ids = sequence.request.prompt
        prompt, text = self.tokenizer.decode(ids), self.tokenizer.decode(ids + sequence.tokens)
        # not len(prompt): a prompt may end, and the first token go on, in the middle of a character
        return text[len(os.path.commonprefix((prompt, text))) :]  # noqa: RUF071

    def sample(self, sequence: Sequence) -> Sample:
        text = None
        if self.tokenizer is not None:
            text = self.completion(sequence)
            if sequence.reason == "length":  # cut off in the middle of a character
                text = text.rstrip("\ufffd")
            cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
            text = text[: min(cuts, default=len(text))]
        assert sequence.reason is not None, "it has ended"
        name: Any = sequence.request.name  # of a job's requests: the prompt's index
        return Sample(name, sequence.index, sequence.tokens, text, sequence.reason)

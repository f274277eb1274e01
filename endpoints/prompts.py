"""A prompt of token ids as a server takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """where: the server, for messages. token_ids: whether prompts can be token ids. adds_bos:
    whether a token is put before a text, None where nobody knows. in_template: whether a text is
    put into the server's own template, which then begins as it likes."""

    where: str
    tokenizer: Tokenizer
    token_ids: bool = False
    adds_bos: bool | None = False
    in_template: bool = False

    def of(self, ids: Sequence[int]) -> list[int] | str:
        """Token ids, or where the server takes none, the text that it reads as these. ValueError
        where there is no such text."""
        ids = list(map(int, ids))
        if self.token_ids:
            return ids
        starts = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        adds = self.adds_bos or self.in_template
        own = ids[1:] if starts and adds else ids
        text = self.tokenizer.decode(own)
        specials = not self.in_template
        same = self.tokenizer.encode_batch([text], specials=specials)[0].tolist() == own
        if same and (starts or not self.adds_bos):
            return text
        if self.in_template:
            raise ValueError(
                f"{self.where} is asked in its own chat template, and a prompt has special tokens: "
                "leave out the options of chats, or ask without --server chat"
            )
        raise ValueError(
            f"{self.where} takes no token ids, and no text stands for a prompt of {len(ids):,} of "
            f"them (it {'adds' if self.adds_bos else 'adds no'} BOS)"
        )

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether there is such a text, or none is needed."""
        try:
            self.of(ids)
        except ValueError:
            return False
        return True

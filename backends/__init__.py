"""Who answers: a model as three verbs, wherever it runs. No torch here.

    totals = backend.score_windows(stream, windows, batch_size)         # nats of every token
    scores = backend.score_rows(rows, max_tokens)       # log-probabilities after shared prefixes
    for sample in backend.generate(prompts, sampling, n_samples):       # as they are finished
        ...

local.py is a torch model on these ranks, whatever module is inside; an endpoint is the same over
HTTP. An evaluation asks a backend for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import cli
from quantisation.names import KV_DTYPES, Quantisation

if TYPE_CHECKING:  # the verbs' types are those of rooms that load torch
    import numpy as np

    from backends.continuations import Continuations, RowScores
    from backends.scoring import Consumers, WindowTotals
    from dataset import TokenStream
    from distributed import Dist
    from formats.documents import Mark


# kinds of servers; openai: any other that answers in this form, chat: any, in its own template
SERVERS = (
    *("openai", "roseval", "vllm", "sglang", "lightllm", "tgi", "llama.cpp", "llama-cpp-python"),
    *("transformers", "chat"),
)
BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}  # padded tokens of a batch of rows, unless asked for


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it runs, from a checkpoint's headers or a server's answers.

    context: positions it can hold, None if nobody says. dtype: by name. tokenizer: an object of
    tokenizer.py, None where shards are scored that need none. shares_prefixes: whether a prefix is
    run once for all rows that go on from it. lacks: {verb: why it cannot be had and the remedy}.
    quantisation: how the weights are rounded after they are loaded; a plan that many models share
    is made without it, and then says so (evaluation.py).
    """

    name: str
    vocab_size: int
    context: int | None
    dtype: str
    device: str = "cpu"
    tokenizer: Any = None
    shares_prefixes: bool = True
    lacks: tuple[tuple[str, str], ...] = ()
    quantisation: Quantisation | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a plan depends on: models of one kind share it."""
        tokenizer = self.tokenizer and (
            self.tokenizer.fingerprint,
            tuple(sorted(self.tokenizer.chat_templates.items())),
        )
        rest = self.vocab_size, self.context, self.dtype, self.device, self.shares_prefixes
        return (tokenizer, *rest, self.lacks)

    @property
    def protocol(self) -> dict[str, Any]:
        """What of it decides the numbers of texts that it is asked."""
        return {
            "context": self.context,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.name,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
        }


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Flags of every script that draws, and columns on the device
    (sampling.py). ValueError for a value out of range."""

    max_new_tokens: int = cli.option(256, "tokens of a sample at most", type=cli.positive_int)
    temperature: float = cli.option(
        0.0,
        "0: greedy, the likeliest token; --top-p, --top-k and --seed say nothing then",
        type=float,
    )
    top_p: float = cli.option(1.0, "the fewest likeliest tokens of this share; 1: off", type=float)
    top_k: int = cli.option(0, "the k likeliest tokens; 0: off", type=int)
    stop: tuple[str, ...] = cli.option(
        (),
        "a sample ends before the first of these, \\n being a newline",
        nargs="*",
        metavar="TEXT",
        type=lambda text: text.replace("\\n", "\n"),
    )
    seed: int = cli.option(42, "of the random numbers", type=int)

    def __post_init__(self):
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("stop", all(self.stop), "texts of a character or more"),
        ):
            if not right:
                flag, value = cli.flag_of(name), getattr(self, name)
                raise ValueError(f"{flag} must be {wanted}, not {value}")

    @property
    def protocol(self) -> dict[str, Any]:
        """What of it decides what is drawn, but for the stop strings: the likeliest token is the
        same whatever the others say."""
        greedy = not self.temperature
        return {
            "temperature": self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": 0 if greedy else self.top_k,
            "max_new_tokens": self.max_new_tokens,
            "seed": None if greedy else self.seed,
        }


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values are kept while tokens are drawn: flags of every script that draws."""

    kv_dtype: str | None = cli.option(
        None,
        "keys and values of what is drawn in 8 bits, so that about twice the rows fit: int8 (scale "
        "absmax/127) or fp8 (e4m3, absmax/448), a float32 scale for each token and head; every "
        "query sees them so, which changes numbers. What is scored keeps the model's own (default)",
        choices=tuple(KV_DTYPES),
    )

    @property
    def protocol(self) -> dict[str, Any]:
        """What of it decides what is drawn; records without any of it keep their names."""
        return {} if self.kv_dtype is None else {"kv_dtype": KV_DTYPES[self.kv_dtype]}


@dataclass(frozen=True)
class Sample:
    """text: what follows the prompt, cut before a stop string. token_ids: all that was generated,
    end-of-sequence token excepted. finish_reason: "eos", "stop", or "length"."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str | None
    finish_reason: str


class AnyWindows(Protocol):
    """Windows over a token stream: dataset.py has ours, tasks/windows.py those of others. mark:
    what parts documents (formats/documents.py), where no token is to see another one than its own.
    """

    seq_len: int

    @property
    def mark(self) -> Mark | None: ...

    def __len__(self) -> int: ...

    def target_span(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def batch(
        self, stream: TokenStream, ids: Sequence[int] | np.ndarray
    ) -> dict[str, np.ndarray]: ...


class Backend(Protocol):
    """A model on all ranks of `dist`; every rank calls a verb alike and gets the same from it, but
    for `generate`, which gives a rank its own share."""

    facts: Facts
    dist: Dist

    def score_windows(
        self,
        stream: TokenStream,
        windows: AnyWindows,
        batch_size: int = 8,
        *,
        per_token: bool = False,
        consumer: Consumers | None = None,
    ) -> WindowTotals:
        """scoring.WindowTotals of windows over a token stream."""

    def score_rows(
        self,
        rows: Continuations,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        *,
        greedy: bool = False,
        consumer: Consumers | None = None,
    ) -> RowScores:
        """continuations.RowScores of rows that go on from shared prefixes. max_tokens: padded ones
        of a batch, BATCH_TOKENS unless given; a server has its own."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling | Sequence[Sampling] | Sequence[Sequence[Sampling]],
        n_samples: int = 1,
        *,
        keys: Sequence[str] | None = None,
        end_ids: Collection[int] | None = None,
        done: Collection[tuple[int, int]] = frozenset(),
        batch_size: int | None = None,
    ) -> Iterator[Sample]:
        """This rank's samples, each when it is finished."""

    def cost(self) -> dict:
        """Of the last verb: seconds, peak memory, GPU, ranks, and model FLOPs utilisation."""

    def ran(self) -> dict:
        """How the last verb ran: the batch that memory held, compiled or not."""

"""What is done for the prompts of all requests, in turns: scores, and samples, of one engine.

    work = Work(model, texts, capacity, end_ids, logprobs=20, batch_tokens=4096, dist=dist)
    work.take([Prompt(7, asked)])           # under a name that nothing else has
    work.score(), work.step()               # [(7, event)]: what became known
    work.take([Drop(7)])                    # nothing more comes of it, and its rows are free

An event is a Token, an Ending, a Sample, Scores, or Failed. Prompts join the rows that are running.
Between two steps of those at most one batch of prompts to be scored is run. What a turn does
follows from what was taken in before, not from the time it takes: ranks that hold the model between
them take the same and go on alike (serving/ranks.py).
"""

import functools
import gc
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

import cli
from backends import Sample
from backends.engine import Engine, Token
from backends.pairs import in_common
from backends.pipe import GroupOutOfMemory
from backends.rows import Capacity
from distributed import Dist
from serving.asked import Asked
from serving.scores import Ending, Scores, score_prompts
from serving.texts import REPLACEMENT, Texts
from transformers_model import Model

SHORTAGES = 5  # of memory in a row
NAN = "the model gives NaN: no answer can be had"


@dataclass(eq=False)
class Prompt:
    """What is asked of one prompt, alone in `asked`. name: what it is called from now on."""

    name: int
    asked: Asked

    @property
    def tokens(self) -> list[int]:
        return self.asked.prompts[0]

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return np.array(self.tokens, dtype="<u4")

    @property
    def key(self) -> str:
        """Names it in the random streams."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


@dataclass(frozen=True)
class Drop:
    """Nobody waits for a prompt any more; one that is over is no error."""

    name: int


News = Sequence[Prompt | Drop]


class Failed(NamedTuple):
    """Why a prompt gets no answer; status: HTTP's, 503 where it may be asked again."""

    reason: str
    status: int = 500


Event = Token | Ending | Sample | Scores | Failed
Told = list[tuple[int, Event]]


class Work:
    """See the file's docstring. capacity: its prompt_tokens are the context, which a prompt and its
    answer share. logprobs: of the likeliest, told of each token. batch_tokens: of prompts scored at
    once. dist: the ranks that hold the model. ValueError where the model gives NaN."""

    def __init__(
        self,
        model: Model,
        texts: Texts,
        capacity: Capacity,
        end_ids: Collection[int],
        *,
        logprobs: int,
        batch_tokens: int,
        compiled: bool = False,
        dist: Dist,
    ):
        self.model, self.texts, self.capacity, self.dist = model, texts, capacity, dist
        self.logprobs, self.batch_tokens = logprobs, batch_tokens
        score_prompts(model, [[0]], logprobs, batch_tokens, dist)  # it runs, and gives numbers
        self.end_ids, self.compiled = frozenset(end_ids), compiled
        self.engine, self._shortages = self.make_engine(), 0
        self._scoring: deque[Prompt] = deque()
        self._drawing: dict[int, Prompt] = {}

    def make_engine(self) -> Engine:
        with self.dist.waiting():  # a compilation may take as long as it likes
            return Engine(
                *(self.model, self.capacity, self.texts.tokenizer),
                eos_ids=self.end_ids,
                compiled=self.compiled,
                logprobs=self.logprobs,
                on_launch=self.dist.bump,
            )

    @property
    def busy(self) -> bool:
        return bool(self._scoring or self.engine.busy)

    def take(self, news: News) -> None:
        for one in news:
            if isinstance(one, Prompt):
                self._begin(one)
            else:
                self._drop(one.name)

    def _begin(self, prompt: Prompt) -> None:
        asked = prompt.asked
        if asked.scores:
            self._scoring.append(prompt)
        if asked.draws and not asked.one_pass:
            room = self.capacity.prompt_tokens + 1 - len(prompt.tokens)
            new_tokens = min(asked.sampling.max_new_tokens, room)
            sampling = replace(asked.sampling, max_new_tokens=new_tokens)
            told = bool(asked.logprobs)  # beside the drawn token, whose own is always known
            self.engine.submit(
                *(prompt.name, prompt.tokens, sampling, range(asked.n), prompt.key),
                ends=asked.ends,
                told=told,
            )
            self._drawing[prompt.name] = prompt

    def _drop(self, name: int) -> None:
        self._scoring = deque(prompt for prompt in self._scoring if prompt.name != name)
        self.engine.cancel(name)
        self._drawing.pop(name, None)

    # -- Where memory runs out ----------------------------------------------------------------

    def _with_memory(self, work: Callable[[], Told], drop: Callable[[], list[int]]) -> Told:
        """What work tells; where memory runs out, that those whose work it was may ask again. An
        engine that has none time after time is at its end, and so is a rank that has none where
        the others of its group do not learn of it."""
        try:
            events, self._shortages = work(), 0
            return events
        except torch.OutOfMemoryError as error:
            self._shortages += 1
            alone = self.dist.pipe is not None and not isinstance(error, GroupOutOfMemory)
            if alone or self._shortages == SHORTAGES:
                raise
        cli.note("out of memory: what was under way is told to come again")
        return [(name, Failed("out of memory: try again", 503)) for name in drop()]

    def _drop_scoring(self) -> list[int]:
        return [self._scoring.popleft().name for _ in range(self._batch())]

    def _drop_drawing(self) -> list[int]:
        """With a new engine: what a step that failed left behind is not to be trusted."""
        left, self._drawing = list(self._drawing), {}
        if self.dist.pipe is not None:
            self.dist.pipe.settle()
        del self.engine
        gc.collect()
        torch.cuda.empty_cache()
        self.engine = self.make_engine()
        return left

    # -- Scores -------------------------------------------------------------------------------

    def score(self) -> Told:
        """One batch of those that wait for scores, if any."""
        return self._with_memory(self._score, self._drop_scoring) if self._scoring else []

    def _batch(self) -> int:
        """How many of those that wait for scores are run at once."""
        n, tokens, before = 0, 0, np.zeros(0, dtype=np.int64)
        for prompt in self._scoring:
            tokens += len(prompt.ids) - in_common(before, prompt.ids)  # those run once
            if n and tokens > self.batch_tokens:
                break
            n, before = n + 1, prompt.ids
        return n

    def _score(self) -> Told:
        """They wait until it is done."""
        prompts = list(itertools.islice(self._scoring, self._batch()))
        ids = [prompt.tokens for prompt in prompts]
        try:
            found = score_prompts(self.model, ids, self.logprobs, self.batch_tokens, self.dist)
        except ValueError as error:
            return [(name, Failed(cli.reason_of(error))) for name in self._drop_scoring()]
        self._drop_scoring()
        events: Told = []
        for prompt, scores in zip(prompts, found):
            events.append((prompt.name, scores))
            events += self._next_token(prompt, scores)
        return events

    def _next_token(self, prompt: Prompt, scores: Scores) -> Told:
        """The samples of a prompt that needs no drawing: the likeliest token, whatever it is."""
        events: Told = []
        name, asked, token = prompt.name, prompt.asked, scores.ids[-1][0]
        if not (asked.one_pass and asked.draws):
            return []
        ends = asked.ends and token in self.end_ids
        text = self.texts.continuation(prompt.tokens, [token])
        cuts = [at for stop in asked.sampling.stop if (at := text.find(stop)) >= 0]
        reason = "eos" if ends else "stop" if cuts else "length"
        text = "" if ends else text[: min(cuts, default=len(text))].rstrip(REPLACEMENT)
        for s in range(asked.n):
            told = scores.ids[-1], scores.logprobs[-1]
            events.append((name, Token(name, s, token, told)))
            events.append((name, Sample(name, s, [] if ends else [token], text, reason)))
        return events

    # -- Samples ------------------------------------------------------------------------------

    def step(self) -> Told:
        """One step of the rows, if any is under way."""
        return self._with_memory(self._step, self._drop_drawing) if self.engine.busy else []

    def _step(self) -> Told:
        events: Told = []
        progress = self.engine.step()
        for token in progress.tokens:
            name: Any = token.request
            prompt = self._drawing.get(name)
            if prompt is None:
                continue
            assert token.logprobs is not None, "asked for"
            if math.isnan(token.logprobs[1][0]):
                self._drop(name)
                events.append((name, Failed(NAN)))
            elif not (prompt.asked.ends and token.token_id in self.end_ids):
                events.append((name, token))
            elif prompt.asked.logprobs is not None:
                events.append((name, Ending(token.sample_index, token.logprobs)))
        for sample in progress.finished:
            if sample.prompt_index in self._drawing:  # a request's name
                events.append((sample.prompt_index, sample))
        # only now: several samples of a request may end in one step
        for name in self._drawing.keys() - self.engine.requests.keys():
            del self._drawing[name]
        return events

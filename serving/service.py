"""The thread that has the model: prompts of all requests on their way through one engine.

    service = Service(model, texts, capacity, end_ids, queue=1024, ...)
    service.start(loop)                          # asyncio's, whose thread calls what follows
    jobs = service.submit(asked, put)            # put((job, event)) in the loop, as things happen
    service.cancel(jobs)                         # their rows are free

An event is a Token, an Ending, a Sample, Scores, or Failed. Prompts join the rows that are running.
Between two steps of those at most one batch of prompts to be scored is run. A sample is drawn by
(seed, tokens of its prompt, its index), so its neighbours do not change it.
"""

import asyncio
import functools
import gc
import hashlib
import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

import cli
from backends import Sample
from backends.engine import Engine, Token
from backends.pairs import in_common
from backends.rows import Capacity
from serving.asked import Asked
from serving.fields import Refused
from serving.scores import Ending, Scores, score_prompts
from serving.texts import REPLACEMENT, Texts
from transformers_model import Model

SHORTAGES = 5  # of memory in a row
NAN = "the model gives NaN: no answer can be had"


class Failed(NamedTuple):
    """Why a prompt gets no answer; status: HTTP's, 503 where it may be asked again."""

    reason: str
    status: int = 500


Event = Token | Ending | Sample | Scores | Failed
Told = list[tuple["Job", Event]]


@dataclass(eq=False)
class Job:
    """A prompt of a request, the `index`th of it. awaited: events that end it and did not come: its
    samples and its scores; sequences: how many places it takes."""

    asked: Asked
    index: int
    put: Callable[[tuple["Job", Event]], None]
    awaited: int = 0
    sequences: int = 0

    def __post_init__(self):
        drawn = self.asked.n if self.asked.draws else 0
        self.awaited = self.sequences = drawn + self.asked.scores

    @property
    def prompt(self) -> list[int]:
        return self.asked.prompts[self.index]

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return np.array(self.prompt, dtype="<u4")

    @property
    def key(self) -> str:
        """Names the prompt in the random streams."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


class Service:
    """See the file's docstring. capacity: its prompt_tokens are the context, which a prompt and its
    answer share. queue_size: sequences that may wait beside those in rows. logprobs: of the
    likeliest, told of each token. batch_tokens: of prompts scored at once. ValueError where the
    model gives NaN."""

    def __init__(
        self,
        model: Model,
        texts: Texts,
        capacity: Capacity,
        end_ids: Collection[int],
        *,
        queue_size: int,
        logprobs: int,
        batch_tokens: int,
        compiled: bool = False,
    ):
        self.model, self.texts, self.capacity = model, texts, capacity
        self.logprobs, self.batch_tokens = logprobs, batch_tokens
        score_prompts(model, [[0]], logprobs, batch_tokens)  # it runs, and gives numbers
        self.end_ids, self.compiled = frozenset(end_ids), compiled
        self.engine, self._shortages = self._make_engine(), 0
        self.most = capacity.rows + queue_size
        self.unfinished = 0  # sequences; this and `counts` are the loop's
        self.counts = dict.fromkeys(("prompt_tokens", "drawn_tokens", "scored_tokens"), 0)
        self.error: Exception | None = None  # what ended the thread
        self.on_error: Callable[[], object] = lambda: None
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._scoring: deque[Job] = deque()
        self._drawing: set[Job] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _make_engine(self) -> Engine:
        return Engine(
            *(self.model, self.capacity, self.texts.tokenizer),
            eos_ids=self.end_ids,
            compiled=self.compiled,
            logprobs=self.logprobs,
        )

    # -- The loop's side ----------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread; what is on its way is dropped."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, asked: Asked, put: Callable[[tuple[Job, Event]], None]) -> list[Job]:
        """Jobs of a request. Refused, with 429, where too many wait already."""
        if self.error is not None:
            raise Refused("the engine has ended", status=503)
        jobs = [Job(asked, i, put) for i in range(len(asked.prompts))]
        wanted = sum(job.sequences for job in jobs)
        if wanted > self.most:
            raise Refused(f"{wanted} sequences in one request: {self.most} at most", "n")
        if self.unfinished + wanted > self.most:
            raise Refused("too many requests wait: try again later", status=429)
        self.unfinished += wanted
        self.counts["prompt_tokens"] += sum(map(len, asked.prompts))
        for job in jobs:
            self._inbox.put((self._begin, job))
        return jobs

    def cancel(self, jobs: Collection[Job]) -> None:
        """Nothing more comes of jobs; those that are over are no error."""
        for job in jobs:
            if job.awaited:
                self._end(job)
                self._inbox.put((self._drop, job))

    def _end(self, job: Job) -> None:
        self.unfinished -= job.awaited
        job.awaited = 0

    def _deliver(self, events: Told) -> None:
        for job, event in events:
            if not job.awaited:  # cancelled meanwhile
                continue
            if isinstance(event, Failed):
                self._end(job)
            elif isinstance(event, Token):
                self.counts["drawn_tokens"] += 1
            elif not isinstance(event, Ending):
                if isinstance(event, Scores):
                    self.counts["scored_tokens"] += len(job.prompt)
                job.awaited -= 1
                self.unfinished -= 1
            job.put((job, event))

    # -- The thread's side --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                if self._scoring:
                    self._send(self._with_memory(self._score, self._drop_scoring))
                if self.engine.busy:
                    self._send(self._with_memory(self._step, self._drop_drawing))
        except Exception as error:
            self.error = error
            left = [*self._scoring, *self._drawing]
            self._send([(job, Failed("the engine has ended")) for job in left])
            self._loop.call_soon_threadsafe(self.on_error)

    def _with_memory(self, work: Callable[[], Told], drop: Callable[[], list[Job]]) -> Told:
        """What work tells; where memory runs out, that those whose work it was may ask again. An
        engine that has none time after time is at its end."""
        try:
            events, self._shortages = work(), 0
            return events
        except torch.OutOfMemoryError:
            self._shortages += 1
            if self._shortages == SHORTAGES:
                raise
        cli.note("out of memory: what was under way is told to come again")
        return [(job, Failed("out of memory: try again", 503)) for job in drop()]

    def _drop_scoring(self) -> list[Job]:
        return [self._scoring.popleft() for _ in range(self._batch())]

    def _drop_drawing(self) -> list[Job]:
        """With a new engine: what a step that failed left behind is not to be trusted."""
        left, self._drawing = list(self._drawing), set()
        del self.engine
        gc.collect()
        torch.cuda.empty_cache()
        self.engine = self._make_engine()
        return left

    def _send(self, events: Told) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _take(self) -> bool:
        """What came in; waits where there is nothing to do. False: it is time to end."""
        while True:
            idle = not (self._scoring or self.engine.busy)
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            do, job = item
            do(job)

    def _begin(self, job: Job) -> None:
        asked = job.asked
        if asked.scores:
            self._scoring.append(job)
        if asked.draws and not asked.one_pass:
            room = self.capacity.prompt_tokens + 1 - len(job.prompt)
            new_tokens = min(asked.sampling.max_new_tokens, room)
            sampling = replace(asked.sampling, max_new_tokens=new_tokens)
            told = bool(asked.logprobs)  # beside the drawn token, whose own is always known
            self.engine.submit(
                *(job, job.prompt, sampling, range(asked.n), job.key), ends=asked.ends, told=told
            )
            self._drawing.add(job)

    def _drop(self, job: Job) -> None:
        if job in self._scoring:
            self._scoring.remove(job)
        self.engine.cancel(job)
        self._drawing.discard(job)

    def _batch(self) -> int:
        """How many of those that wait for scores are run at once."""
        n, tokens, before = 0, 0, np.zeros(0, dtype=np.int64)
        for job in self._scoring:
            tokens += len(job.ids) - in_common(before, job.ids)  # those run once
            if n and tokens > self.batch_tokens:
                break
            n, before = n + 1, job.ids
        return n

    def _score(self) -> Told:
        """One batch of those that wait; they wait until it is done."""
        jobs = list(itertools.islice(self._scoring, self._batch()))
        prompts = [job.prompt for job in jobs]
        try:
            found = score_prompts(self.model, prompts, self.logprobs, self.batch_tokens)
        except ValueError as error:
            return [(job, Failed(cli.reason_of(error))) for job in self._drop_scoring()]
        self._drop_scoring()
        events: Told = []
        for job, scores in zip(jobs, found):
            events.append((job, scores))
            events += self._next_token(job, scores)
        return events

    def _next_token(self, job: Job, scores: Scores) -> Told:
        """The samples of a job that needs no drawing: the likeliest token, whatever it is."""
        events: Told = []
        asked, token = job.asked, scores.ids[-1][0]
        if not (asked.one_pass and asked.draws):
            return []
        ends = asked.ends and token in self.end_ids
        text = self.texts.continuation(job.prompt, [token])
        cuts = [at for stop in asked.sampling.stop if (at := text.find(stop)) >= 0]
        reason = "eos" if ends else "stop" if cuts else "length"
        text = "" if ends else text[: min(cuts, default=len(text))].rstrip(REPLACEMENT)
        name: Any = job  # of the request, where a sample has its prompt's index
        for s in range(asked.n):
            told = scores.ids[-1], scores.logprobs[-1]
            events.append((job, Token(job, s, token, told)))
            events.append((job, Sample(name, s, [] if ends else [token], text, reason)))
        return events

    def _step(self) -> Told:
        events: Told = []
        progress = self.engine.step()
        for token in progress.tokens:
            job: Any = token.request
            if job not in self._drawing:
                continue
            assert token.logprobs is not None, "asked for"
            if math.isnan(token.logprobs[1][0]):
                self._drop(job)
                events.append((job, Failed(NAN)))
            elif not (job.asked.ends and token.token_id in self.end_ids):
                events.append((job, token))
            elif job.asked.logprobs is not None:
                events.append((job, Ending(token.sample_index, token.logprobs)))
        for sample in progress.finished:
            job = sample.prompt_index  # the request's name
            if job in self._drawing:
                events.append((job, sample))
        # only now: several samples of a request may end in one step
        self._drawing &= self.engine.requests.keys()
        return events

"""The thread that has the model: requests of all clients on their way through one engine.

    service = Service(work, queue_size=1024)
    service.start(loop)                          # asyncio's, whose thread calls what follows
    jobs = service.submit(asked, put)            # put((job, event)) in the loop, as things happen
    service.cancel(jobs)                         # their rows are free

Where several ranks hold the model, this is the first one's, and before each turn of its work
(serving/work.py) the others are told what came in (serving/ranks.py).
"""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from backends.engine import Token
from serving.asked import Asked
from serving.fields import Refused
from serving.ranks import Leader
from serving.scores import Ending, Scores
from serving.work import Drop, Event, Failed, News, Prompt, Told, Work

LOOK = 5.0  # seconds; as often is it asked whether torchrun is still there
ENDED = Failed("the engine has ended")


@dataclass(eq=False)
class Job:
    """A prompt of a request, the `index`th of it. awaited: events that end it and did not come: its
    samples and its scores; sequences: how many places it takes."""

    name: int
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


class Service:
    """See the file's docstring. queue_size: sequences that may wait beside those in rows. leader:
    of the other ranks, if any."""

    def __init__(self, work: Work, queue_size: int, leader: Leader | None = None):
        self.work, self.leader = work, leader
        self.most = work.capacity.rows + queue_size
        # what follows is the loop's, as all but the thread's side
        self.jobs: dict[int, Job] = {}  # those of which something is awaited
        self.unfinished = 0  # sequences
        self.counts = dict.fromkeys(("prompt_tokens", "drawn_tokens", "scored_tokens"), 0)
        self.error: Exception | None = None  # what ended the engine
        self.on_error: Callable[[], object] = lambda: None
        self._names = itertools.count()
        self._inbox: queue.SimpleQueue[Prompt | Drop | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- The loop's side ----------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        if self.leader is not None:
            self.leader.watch(lambda error: loop.call_soon_threadsafe(self._fail, error))
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread; what is on its way is dropped."""
        self._inbox.put(None)
        while self._thread.is_alive() and self.error is None:  # else it may wait for a dead rank
            self._thread.join(0.1)

    @property
    def ended(self) -> bool:
        """Whether all has gone well, to its end."""
        begun = self._thread.ident is not None
        return begun and self.error is None and not self._thread.is_alive()

    def submit(self, asked: Asked, put: Callable[[tuple[Job, Event]], None]) -> list[Job]:
        """Jobs of a request. Refused, with 429, where too many wait already."""
        if self.error is not None:
            raise Refused(ENDED.reason, status=503)
        jobs = [Job(next(self._names), asked, i, put) for i in range(len(asked.prompts))]
        wanted = sum(job.sequences for job in jobs)
        if wanted > self.most:
            raise Refused(f"{wanted} sequences in one request: {self.most} at most", "n")
        if self.unfinished + wanted > self.most:
            raise Refused("too many requests wait: try again later", status=429)
        self.unfinished += wanted
        self.counts["prompt_tokens"] += sum(map(len, asked.prompts))
        for job in jobs:
            self.jobs[job.name] = job
            self._inbox.put(Prompt(job.name, replace(asked, prompts=[job.prompt], echoed=None)))
        return jobs

    def cancel(self, jobs: Collection[Job]) -> None:
        """Nothing more comes of jobs; those that are over are no error."""
        for job in jobs:
            if job.awaited:
                self._end(job)
                self._inbox.put(Drop(job.name))

    def _end(self, job: Job, events: int | None = None) -> None:
        """So many of the events that it awaits have come, or none will."""
        events = job.awaited if events is None else events
        self.unfinished -= events
        job.awaited -= events
        if not job.awaited:
            del self.jobs[job.name]

    def _deliver(self, events: Told) -> None:
        for name, event in events:
            job = self.jobs.get(name)
            if job is None:  # cancelled meanwhile
                continue
            if isinstance(event, Failed):
                self._end(job)
            elif isinstance(event, Token):
                self.counts["drawn_tokens"] += 1
            elif not isinstance(event, Ending):
                if isinstance(event, Scores):
                    self.counts["scored_tokens"] += len(job.prompt)
                self._end(job, 1)
            job.put((job, event))

    def _fail(self, error: Exception) -> None:
        """The engine has ended: whoever waits is told, and who asks later."""
        if self.error is None:
            self.error = error
            self._deliver([(name, ENDED) for name in self.jobs])
            self.on_error()

    # -- The thread's side --------------------------------------------------------------------

    def _run(self) -> None:
        work, leader = self.work, self.leader
        try:
            if work.dist.device.type == "cuda":
                torch.cuda.set_device(work.dist.device)  # a new thread is on GPU 0
            while (news := self._take()) is not None:
                if leader is not None:
                    leader.tell(news)
                work.take(news)
                self._send(work.score())
                self._send(work.step())
            if leader is not None:
                leader.end()
        except Exception as error:
            error = error if leader is None else leader.cause_of(error)
            self._loop.call_soon_threadsafe(self._fail, error)

    def _send(self, events: Told) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _take(self) -> News | None:
        """What came in; waits where there is nothing to do. None: it is time to end."""
        news: list[Prompt | Drop] = []
        while not (news or self.work.busy) or not self._inbox.empty():
            one = self._wait()
            if one is None:
                return None
            news.append(one)
        return news

    def _wait(self) -> Prompt | Drop | None:
        dist = self.work.dist
        while not dist.is_orphan:
            with dist.waiting(), contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=LOOK)
        raise ConnectionError("torchrun has ended, and the server with it")

"""What somebody serves, as the three verbs, over HTTP.

    backend = connect("http://host:8000", "the-model", tokenizer)
    backend.probed.scores            # "", or why it cannot score

The server is probed first (endpoints/probing.py): a verb that it cannot do truthfully is one line,
never a number. Scores are log-probabilities of prompts, one request a sequence; those of letters
come from one generated token, where the server tells them. A sample is a request of its own, its
seed made of (seed, the prompt's key, sample index). A prompt that is refused is a sample whose
finish is "refused"; a score cannot do without any of them.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cli
from backends import Facts, Sample, Sampling, continuations, scoring
from backends.engine import by_sample
from backends.wanted import Wanted
from distributed import Dist
from endpoints import Route, Scores
from endpoints.client import Client, Gone, Refused, in_flight
from endpoints.kinds import only_model
from endpoints.probing import CHAT, QUESTIONS, Probed, probe
from endpoints.timing import measures
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from tqdm import tqdm

    from backends import AnyWindows
    from dataset import TokenStream

Job = TypeVar("Job")
REFUSED = "refused"
# of a context: the token that is scored after the last one read, and the one that is generated
BEYOND = 2


def connect(
    url: str,
    model: str | None,
    tokenizer: Tokenizer,
    *,
    kind: str | None = None,
    concurrency: int = 16,
    timeout: float = 600.0,
    dist: Dist | None = None,
) -> "Endpoint":
    """The backend of a served model, probed. model: None for the only one there. kind: of the
    server, found by asking unless given. timeout: seconds that an answer may take. ValueError and
    OSError for what cannot be evaluated, in one line."""
    client = Client(url, concurrency, timeout)
    cli.note(
        f"{client.root} is probed first: up to {QUESTIONS} short questions, one after the other, "
        f"for each of which it may take {timeout:g} s (--request-timeout)"
    )
    model = model or only_model(client)
    probed, route = probe(client, model, tokenizer, kind)
    return Endpoint(client, route, model, tokenizer, probed, concurrency, dist)


def facts_of(model: str, tokenizer: Tokenizer, probed: Probed) -> Facts:
    """What the probe tells of a model. Its vocabulary is the tokenizer's, for servers name none."""
    verbs = ("score_windows",) if probed.letters else ("score_windows", "score_rows")
    lacks = {verb: probed.scores for verb in verbs if probed.scores}
    return Facts(
        name=model,
        vocab_size=tokenizer.vocab_size,
        context=None if probed.context is None else probed.context - BEYOND,
        dtype="served chats" if probed.server == CHAT else "served",
        device="server",
        tokenizer=tokenizer,
        shares_prefixes=False,
        lacks=tuple(lacks.items()),
    )


class Endpoint:
    """See the file's docstring; the verbs are those of backends.Backend, in one process."""

    def __init__(
        self,
        client: Client,
        route: Route,
        model: str,
        tokenizer: Tokenizer,
        probed: Probed,
        concurrency: int = 16,
        dist: Dist | None = None,
    ):
        self.client, self.probed, self.concurrency = client, probed, concurrency
        self.route, self.prompts = route, probed.prompts(client.root, tokenizer)
        self.facts = facts_of(model, tokenizer, probed)
        self.dist = dist or Dist(0, 1, 0, torch.device("cpu"))
        assert self.dist.world_size == 1, "an endpoint is asked by one process"
        self._breaks = client.breaks
        self._cost: dict = {}
        self._ran: dict = {}

    @property
    def info(self) -> dict:
        """What a record says of its checkpoint."""
        return {
            "path": self.client.root,
            "name": self.facts.name,
            "fingerprint": self.probed.fingerprint,
            "module": f"endpoint:{self.probed.server}",
        }

    # -- The verbs ----------------------------------------------------------------------------

    def score_windows(
        self,
        stream: "TokenStream",
        windows: "AnyWindows",
        batch_size: int = 8,
        *,
        per_token: bool = False,
        consumer: scoring.Consumers | None = None,
    ) -> scoring.WindowTotals:
        """As Local.score_windows; batch_size says nothing here: `concurrency` requests are under
        way at any time."""
        self._check("score_windows", consumer)
        if windows.mark is not None:
            raise ValueError(
                "--documents: a server cannot be told where documents end; score a checkpoint, or "
                "without"
            )

        def sequence(w):
            row = windows.batch(stream, [w])
            targets = row["targets"][0]
            last = int(np.flatnonzero(targets != scoring.IGNORE)[-1])
            return [*row["input_ids"][0, : last + 1].tolist(), int(targets[last])]

        with cli.progress(len(windows), "windows", "window") as bar, self._timed() as cost:
            found = self._score(range(len(windows)), sequence, bar)

            def nll_fn(input_ids, targets, ids):
                nats = torch.zeros(targets.shape, dtype=torch.float64)
                for row, w in enumerate(ids.tolist()):
                    if w >= 0:
                        values = torch.from_numpy(-found[w].values[1:])
                        nats[row, : len(values)] = values
                return nats * (targets != scoring.IGNORE)

            about = scoring.bytes_of_tokens(self.facts)
            batch_size = min(64, len(windows))
            totals = scoring.score_windows(
                *(nll_fn, stream, windows, batch_size, self.dist, *about), per_token=per_token
            )
            cost["tokens"] = int(totals.tokens.sum())
        self._ran |= {"batch_size": None}
        return totals

    def score_rows(
        self,
        rows: continuations.Continuations,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        *,
        greedy: bool = False,
        consumer: scoring.Consumers | None = None,
    ) -> continuations.RowScores:
        """As Local.score_rows; max_tokens and max_rows say nothing here. greedy: ValueError where
        the server does not tell."""
        self._check("score_rows", consumer)
        if greedy and self.probed.greedy:
            raise ValueError(self._cannot("whether a token is the likeliest", self.probed.greedy))
        wanted = Wanted(rows, by_letters=bool(self.probed.letters))
        if self.probed.scores and wanted.places:
            raise ValueError(self._cannot("log-probabilities of prompts", self.probed.scores))
        n_asked = len(wanted.places) + len(wanted.letters)
        with cli.progress(n_asked, "rows", "request") as bar, self._timed() as cost:
            self._tell_letters(wanted, bar)
            starts = wanted.starts()
            found = self._score(wanted.places, list, bar, starts)
            cost["tokens"] = rows.unique_tokens()
        wanted.fill_in(found)
        self._ran |= {"batch_tokens": None, "batch_size": None}
        self._ran |= {"letters_not_told": wanted.n_bounded} if wanted.by_letters else {}
        return wanted.by_row(greedy)

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
        """Samples as they arrive. What ends one beside the stop strings is the server's business:
        end_ids and batch_size say nothing here. ValueError where sampling has no effect on the
        server, and where it refuses every prompt."""
        samplings = by_sample(sampling, len(prompts), n_samples)
        if any(s.temperature for own in samplings for s in own) and not self.probed.samples:
            raise ValueError(self._cannot("sampling", "its samples do not depend on --temperature"))
        jobs = [(p, s) for p in range(len(prompts)) for s in range(n_samples) if (p, s) not in done]
        inputs = [self.prompts.of(prompt) for prompt in prompts]

        def draw(job):
            p, s = job
            key = str(p) if keys is None else keys[p]
            return self._draw(job, (prompts[p], inputs[p]), samplings[p][s], key)

        n_drawn, n_refused, waiting = 0, 0, []
        with self._timed() as cost:
            try:
                for job, answer in self._answers(draw, jobs):
                    if isinstance(answer, str):
                        cli.note(f"the server refuses a prompt: {answer}")
                        n_refused += 1
                        waiting.append((Sample(job[0], job[1], [], "", REFUSED), 0, answer))
                    else:
                        n_drawn += 1
                        cost["tokens"] += answer[1]
                        yield answer[0]
                    while n_drawn and waiting:
                        yield waiting.pop()[0]
            except Gone as error:
                raise Gone(
                    f"{error}; {n_drawn + len(done):,} of {len(prompts) * n_samples:,} samples are "
                    "there: the same command goes on from them, where it keeps records"
                ) from None
            if waiting:
                raise ValueError(f"{self.client.root} refuses every prompt: {waiting[0][2]}")
            self._ran |= {"batch_size": None, "compile": None, "refused": n_refused}

    def cost(self) -> dict:
        """Of the last verb: seconds, requests and their seconds, tokens; no GPU of ours."""
        none = {"gpu": None, "peak_memory_bytes": None, "mfu": None}
        return self._cost | {"world_size": 1} | none

    def ran(self) -> dict:
        """The server, what was found out about it, and how it was asked."""
        return {"endpoint": self.probed.shown, "concurrency": self.concurrency} | self._ran

    # -- Inside -------------------------------------------------------------------------------

    def _check(self, verb: str, consumer) -> None:
        assert consumer is None, "no server gives whole logits"
        why = dict(self.facts.lacks).get(verb)
        if why:
            raise ValueError(self._cannot("log-probabilities of prompts", why))

    def _cannot(self, what: str, why: str) -> str:
        return (
            f"{self.client.root} cannot be asked for {what}: {why} (vLLM and SGLang give them; "
            "evaluations that generate, --scoring generate too, need no log-probabilities)"
        )

    def _score(
        self,
        jobs: Collection[Job],
        ids_of: Callable[[Job], list[int]],
        bar: "tqdm",
        starts: Mapping[Job, int] | None = None,
    ) -> dict[Job, Scores]:
        """Of the token ids of each job, of those from its start on at least."""

        def score(job):
            ids = ids_of(job)
            with self._no_score_without(ids):
                return self.route.score(self.prompts.of(ids), ids, starts[job] if starts else 1)

        found = {}
        for job, scores in self._answers(score, jobs):
            found[job] = scores
            bar.update(1)
        return found

    def _tell_letters(self, wanted: Wanted, bar: "tqdm") -> None:
        """One generated token's log-probabilities of each prompt. Letters that are not told are
        scored as continuations, or where that cannot be had, known to have no more than a bound."""

        def ask(ids):
            with self._no_score_without(ids):
                return self.route.tops(self.prompts.of(ids), wanted.choice_ids)

        for ids, tops in self._answers(ask, wanted.letters):
            wanted.tell(ids, tops, bounded=bool(self.probed.scores))
            bar.update(1)

    def _answers(self, ask: Callable[[Job], Any], jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """in_flight's. ValueError where the server came back with another model, before what that
        one said is used, and after all that had arrived before is."""

        def asked(job: Job) -> tuple[Any, int]:
            return ask(job), self.client.breaks

        for job, (answer, breaks) in in_flight(asked, jobs, self.concurrency):
            if breaks > self._breaks:
                self._breaks = self.client.breaks
                if not self.probed.still_holds(self.route):
                    raise ValueError(
                        f"{self.client.root} was away and answers its probe otherwise now: another "
                        "model is served there (what had arrived before is kept, where records are)"
                    )
            yield job, answer

    @contextlib.contextmanager
    def _no_score_without(self, ids: Collection[int]) -> Iterator[None]:
        """Of a prompt that is not answered, or not truthfully."""
        try:
            yield
        except (Refused, ValueError) as error:
            raise ValueError(
                f"{self.client.root}: a prompt of {len(ids):,} tokens: {error}; no score is written"
            ) from None

    def _draw(
        self, job: tuple[int, int], prompt: tuple[list[int], list[int] | str], wanted, key: str
    ) -> tuple[Sample, int] | str:
        """_sample of one, or why it is refused. prompt: its tokens, and what is sent for them."""
        ids, sent = prompt
        room = (self.probed.context or 2**31) - len(ids)
        limited = replace(wanted, max_new_tokens=max(1, min(wanted.max_new_tokens, room)))
        seed = seed_of(wanted.seed, key, job[1]) if wanted.temperature else None
        try:
            drawn = self.route.draw(sent, limited, seed)
        except Refused as error:
            return str(error)
        if self.probed.server != CHAT and drawn.prompt_tokens not in (None, len(ids)):
            raise ValueError(
                f"{self.client.root} read prompt {key} as {drawn.prompt_tokens} tokens where "
                f"{self.facts.tokenizer.name} gives {len(ids)} (--tokenizer-name, --bos)"
            )
        return self._sample(job, wanted, drawn)

    def _sample(self, job, sampling: Sampling, drawn) -> tuple[Sample, int]:
        """(the sample cut before its first stop string, tokens)"""
        ends = [at for stop in sampling.stop if (at := drawn.text.find(stop)) >= 0]
        by_text = sampling.stop and drawn.finish == "stop" and self.probed.stop == "cut"
        finish = "stop" if ends or by_text else "eos" if drawn.finish == "stop" else "length"
        ids = list(map(int, self.facts.tokenizer.encode(drawn.text)))
        text = drawn.text[: min(ends)] if ends else drawn.text
        return Sample(job[0], job[1], ids, text, finish), len(
            ids
        ) if drawn.tokens is None else drawn.tokens

    def _timed(self) -> "Timed":
        self._cost, self._ran = {}, {}
        return Timed(self.client, self._cost)


class Timed:
    """Fills in, at the end, what a verb cost: seconds, tokens and requests a second, and how long
    answers took (endpoints/timing.py), without the waiting before they were asked for."""

    def __init__(self, client: Client, cost: dict, clock: Callable[[], float] = time.perf_counter):
        self.client, self.cost, self.clock = client, cost, clock

    def __enter__(self) -> dict:
        self.start, self.before = self.clock(), (len(self.client.timings), self.client.retries)
        self.cost["tokens"] = 0
        return self.cost

    def __exit__(self, *exc) -> None:
        seconds = self.clock() - self.start
        taken = self.client.timings[self.before[0] :]
        self.cost |= {
            "seconds": seconds,
            "tokens_per_second": self.cost["tokens"] / seconds,
            "requests": len(taken),
            "requests_per_second": len(taken) / seconds,
            "retries": self.client.retries - self.before[1],
            **measures(taken),
        }


def seed_of(seed: int, key: str, sample: int) -> int:
    """Of one sample, whatever else is asked for: 31 bits, which every server takes."""
    digest = hashlib.sha256(f"{seed}\n{key}\n{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

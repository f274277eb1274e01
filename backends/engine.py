"""Batched generation: many samples of many prompts through a batch of rows that stays full.

    sampling = Sampling(temperature=0.8, top_p=0.95, stop=("\\ndef",), max_new_tokens=512, seed=0)
    for sample in generate(model, prompts, sampling, tokenizer=tokenizer, n_samples=200, dist=dist):
        ...                          # a Sample as soon as it is finished, while the GPU goes on

    engine = Engine(model, Capacity(rows=64, prompt_tokens=2000, new_tokens=512), tokenizer)
    engine.submit("a request's name", prompt, sampling)       # at any time: it joins those running
    progress = engine.step()         # tokens that became known, and samples that are finished

A prompt's keys and values are computed once and shared by its samples, and what many prompts begin
with (the examples of a few-shot task) by all of theirs; a row that finishes takes the next sample.
On CUDA a decode step, from embedding to sampled token, is one CUDA graph
(rows.py). The host looks at sampled tokens `rows.LAG` steps late, so it never waits for the step
that is running.

A sample is a function of (seed, key of its prompt, sample index), whoever its neighbours are: its
random numbers come from a counter-based generator keyed by these, and batch shapes are fixed. Work
is cut into units of prompts, the same for any number of ranks, and rows refill inside a unit only,
so that even the last bits do not depend on the world size.

Shapes: B rows, V vocabulary, P longest prompt, S most new tokens
"""

import functools
from collections import abc, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from backends import Sample, Sampling
from backends.endings import Endings
from backends.kvcache import check_kv_dtype, token_bytes
from backends.pairs import share_prefixes
from backends.parallel import Stage
from backends.rows import CachedRows, Capacity, PlainRows, Request, Sequence
from backends.sampling import COLUMNS, features_of, stream_key
from backends.stages import StageRows, draw_by_turns
from backends.steady import SteadyRows, SteadyStageRows
from distributed import Dist
from tokenizer import Tokenizer
from transformers_model import Model

UNIT_BATCHES = 8  # a unit refills each row so often on average: its last rows wait for few others
MIN_UNITS = 8  # a job has at least so many units where it has the prompts: work for as many ranks
# torch.compile costs up to a minute and saves milliseconds a step, or a tenth of one where our own
# kernels hold all between the products (gpu_kernels/elementwise.py)
COMPILE_STEPS, COMPILE_STEPS_FUSED = 2**13, 2**18

# ---------------------------------------------------------------------------------------------
# The engine: requests in, tokens and samples out


class Token(NamedTuple):
    """A token that became known. logprobs, where wanted: (ids, nats) of this token, then of the k
    likeliest, under the model's own distribution."""

    request: Hashable
    sample_index: int
    token_id: int
    logprobs: tuple[list[int], list[float]] | None


class Progress(NamedTuple):
    """What a look at the device showed. A Sample's prompt_index is its request's name; the token
    that ends a text (`eos_ids`) is among the tokens of a steady engine alone, and of no sample."""

    tokens: list[Token]
    finished: list[Sample]


class Engine:
    """Requests on their way through a batch of rows: `submit` and `cancel` at any time, `step` as
    long as it is `busy`.

    tokenizer: for texts and stop strings. eos_ids: tokens that end a sequence. features: what any
    request will need (sampling.features_of). compiled: the decode step through torch.compile.
    logprobs: how many of the likeliest tokens come with each token (0: its own log-probability
    alone; None: nothing, which costs nothing). on_launch: called after each step's launch.
    """

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        tokenizer: Tokenizer | None = None,
        *,
        eos_ids: Collection[int] = (),
        features: frozenset[str] = frozenset(COLUMNS),
        compiled: bool = False,
        logprobs: int | None = None,
        on_launch: Callable[[], None] = lambda: None,
    ):
        self.capacity, self.tokenizer, self.features = capacity, tokenizer, features
        self.longest, self.on_launch = model.max_positions, on_launch
        check_kv_dtype(model, capacity.kv_dtype)
        self.rows: CachedRows | PlainRows
        if model.supports_cache:
            kinds: Any = (CachedRows, SteadyRows)
            if isinstance(model, Stage):
                kinds = StageRows, SteadyStageRows
            self.rows = kinds[capacity.steady](model, capacity, features, compiled, logprobs)
        else:
            self.rows = PlainRows(model, capacity, features, logprobs)
        self.requests: dict[Hashable, Request] = {}
        self.waiting: deque[Sequence] = deque()
        self.at: list[Sequence | None] = [None] * capacity.rows
        self.flight: deque[tuple[int, list[Sequence | None]]] = deque()  # steps not looked at
        # a server's clients bring stop strings without end: the latest are kept
        self._endings = functools.lru_cache(64)(
            lambda stop, ends: Endings(tokenizer, stop, eos_ids if ends else ())
        )

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.flight or any(self.at))

    def submit(
        self,
        name: Hashable,
        prompt: list[int],
        sampling: Sampling | abc.Sequence[Sampling],
        samples: Iterable[int] = (0,),
        key: object = None,
        shared: int | None = None,
        ends: bool = True,
        told: bool = True,
    ) -> None:
        """Ask for samples of a prompt: of these indices, drawn as `sampling` says, one for all or
        one for each index. key: what names the prompt in the random streams, `name` unless given.
        shared: how many of the first tokens other prompts have too (all but the last: only this
        prompt's samples share). ends: whether tokens that end a text end these (else they are like
        any other). told: whether anybody reads the likeliest tokens. ValueError for a name in use
        and for what the model or the capacity cannot hold."""
        check_prompt(prompt, self.longest, f"prompt {name}")
        if name in self.requests:
            raise ValueError(f"request {name} is already on its way")
        if len(prompt) > self.capacity.prompt_tokens:
            raise ValueError(
                f"prompt {name} has {len(prompt)} tokens, more than the"
                f" {self.capacity.prompt_tokens} that there is room for"
            )
        shared = min(len(prompt) - 1, self.capacity.kept) if shared is None else shared
        own = len(prompt) - 1 - shared  # tokens in front of the new ones
        sequences, request = [], Request(name, list(prompt), 0, shared, ends, told)
        for s in samples:
            one = sampling if isinstance(sampling, Sampling) else sampling[s]
            limit = token_limit(one, prompt, self.longest)
            if own + limit > self.capacity.row_tokens:
                raise ValueError(
                    f"prompt {name}: {limit} new tokens, more than the"
                    f" {self.capacity.row_tokens - own} that there is room for"
                )
            check_stop(one, self.tokenizer)
            assert features_of([one]) <= self.features, (one, self.features)
            stream = stream_key(one.seed, name if key is None else key, s)
            sequences.append(Sequence(request, s, one, limit, stream))
        if sequences:
            request.unfinished = len(sequences)
            self.requests[name] = request
            self.waiting += sequences

    def cancel(self, name: Hashable) -> None:
        """Nothing more comes of a request, and its rows are free. One that is over is no error."""
        request = self.requests.pop(name, None)
        if request is None:
            return
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        for rows in (self.at, *(occupants for _, occupants in self.flight)):
            for i, sequence in enumerate(rows):
                if sequence is not None and sequence.request is request:
                    rows[i] = None

    def step(self) -> Progress:
        """Launch a step, and look at the one launched `lag` steps before. Which row starts what and
        when follows from the tokens alone, however fast the device is."""
        at, flight = self.at, self.flight
        self.rows.admit(at, self.waiting)
        if any(at):
            flight.append((self.rows.step(at), list(at)))
            for i, sequence in enumerate(at):
                if sequence is not None:
                    sequence.launched += 1
                    if sequence.launched == sequence.limit:  # its last token is on its way
                        at[i] = None
            self.on_launch()
            if len(flight) <= self.rows.lag:
                return Progress([], [])
        return self._look(*flight.popleft()) if flight else Progress([], [])

    def _look(self, ticket: int, occupants: list[Sequence | None]) -> Progress:
        progress, seen = Progress([], []), self.rows.look(ticket)
        for i, sequence in enumerate(occupants):
            if sequence is None or sequence.reason is not None:
                continue
            request, token, top = sequence.request, seen["token"][i], None
            endings = self._endings(tuple(sequence.sampling.stop), request.ends)
            reason = endings.add(sequence, token)
            if "logprobs" in seen:
                top = seen["likeliest"][i], seen["logprobs"][i]
            if reason != "eos" or self.capacity.steady:
                progress.tokens.append(Token(request.name, sequence.index, token, top))
            if reason:
                if self.at[i] is sequence:
                    self.at[i] = None
                request.unfinished -= 1
                if not request.unfinished:
                    del self.requests[request.name]
                progress.finished.append(endings.sample(sequence))
        return progress


def check_prompt(prompt: list[int], longest: int | None, name: str) -> None:
    if len(prompt) == 0:
        raise ValueError(f"{name} has no tokens: start it with a BOS or end-of-text token")
    if longest is not None and len(prompt) > longest:
        raise ValueError(
            f"{name} has {len(prompt)} tokens, more than the model's context of {longest}; "
            "shorten it, by fewer examples say"
        )


def check_stop(sampling: Sampling, tokenizer: Tokenizer | None) -> None:
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings are found in text: pass a tokenizer")


def token_limit(sampling: Sampling, prompt: list[int], longest: int | None) -> int:
    """New tokens that a sample may have: as many as are wanted, up to the end of the context."""
    wanted = sampling.max_new_tokens
    return wanted if longest is None else min(wanted, longest + 1 - len(prompt))


# ---------------------------------------------------------------------------------------------
# A job: many prompts, cut into units, on any number of ranks


def plan_units(n_prompts: int, n_samples: int, batch_size: int) -> list[range]:
    """Cut prompts into units, each large enough to keep a batch of rows busy. Units are dealt to
    ranks whole; how they are cut depends on the job alone, never on the world size."""
    busy = -(-UNIT_BATCHES * batch_size // n_samples)
    size = max(1, min(busy, -(-n_prompts // MIN_UNITS)))
    return [range(i, min(i + size, n_prompts)) for i in range(0, n_prompts, size)]


def default_batch_size(
    model: Model,
    prompt_tokens: int,
    max_new_tokens: int,
    kept: Callable[[int], int] = lambda rows: 0,
    kv_dtype: str | None = None,
    by_turns: bool = True,
) -> int:
    """Rows whose cache fits beside the model, at most 256; 16 on a CPU or without a cache.
    prompt_tokens: that a row needs room for; kept: tokens that lie there once for so many rows.
    by_turns: ranks that hold a model together have as many batches of rows.

    Computed from the device's size, not from what happens to be free, so that ranks agree."""
    if model.device.type != "cuda" or not model.supports_cache:
        return 16
    n_layers, weights = model.largest_share
    token = n_layers * token_bytes(model.config, model.dtype, kv_dtype)
    total = torch.cuda.get_device_properties(model.device).total_memory
    room = 0.85 * total - weights - 4e9  # logits, activations of a prefill
    if isinstance(model, Stage):  # whose weights may leave little
        room = (0.92 * total - weights - 2e9) / (model.pipe.size if by_turns else 1)
    tokens, own = room // token, prompt_tokens + max_new_tokens
    sizes = (*range(256, 0, -8), *range(7, 1, -1))
    return next((rows for rows in sizes if rows * own + kept(rows) <= tokens), 1)


def compiling_pays(model: Model, steps: float) -> bool:
    """Whether so many decode steps repay what torch.compile takes, by what a step is made of."""
    if not model.supports_cache:
        return False
    c = model.config
    many = c.n_experts, c.kv_lora_rank, c.qk_norm, c.post_norm, model.quantisation, model.packing
    return steps >= (COMPILE_STEPS if any(many) else COMPILE_STEPS_FUSED)


def prompts_at_once(kept: int, n_samples: int, rows: int) -> int:
    """Of so many that are kept, those of whose samples rows are full, stragglers' included."""
    return min(rows, -(-2 * rows // n_samples) + 6, kept)


def shared_tokens(model: Model, prompts: list[list[int]], n_samples: int) -> list[int]:
    """How many of each prompt's first tokens are kept once for all prompts that have them too.

    All but its last, for samples of that prompt alone, unless rows then need less room: where many
    prompts begin alike, and samples of each are few.
    """
    alone = [len(prompt) - 1 for prompt in prompts]
    if not model.supports_cache or model.config.kv_lora_rank is not None:
        return alone
    prefixes, prefix = share_prefixes([np.array(p) for p in prompts], [1] * len(prompts))
    lengths = [len(prefixes[g]) for g in prefix]
    own = max((len(p) - n for p, n in zip(prompts, lengths) if n), default=max(alone) + 1)
    if own < max(alone) * min(1, 2 / n_samples):
        return [shared or whole for shared, whole in zip(lengths, alone)]
    return alone


class Generation:
    """Samples, each when it is finished; the rows of a batch, and whether the step that draws them
    is compiled."""

    def __init__(self, samples: Iterator[Sample], batch_size: int = 0, compiled: bool = False):
        self._samples, self.batch_size, self.compiled = samples, batch_size, compiled

    def __iter__(self) -> Iterator[Sample]:
        return self._samples

    def __next__(self) -> Sample:
        return next(self._samples)


def generate(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling | abc.Sequence[Sampling] | abc.Sequence[abc.Sequence[Sampling]],
    *,  # a job's terms, each with a default: callers name the two or three that they need
    tokenizer: Tokenizer | None = None,
    n_samples: int = 1,
    eos_ids: Collection[int] = (),
    keys: abc.Sequence[object] | None = None,
    done: Collection[tuple[int, int]] = frozenset(),
    batch_size: int | None = None,
    units: abc.Sequence[Collection[int]] | None = None,
    compile: bool | str = "auto",
    kv_dtype: str | None = None,
    dist: Dist | None = None,
) -> Generation:
    """This rank's Samples, each when it is finished (so in no fixed order).

    prompts: token ids, at least one each. n_samples of each, drawn as `sampling` says: one for all,
    one a prompt [n], or one a sample [n, n_samples]; its stop strings are found with `tokenizer`
    also across tokens. eos_ids: tokens that end a sequence. keys: what names each prompt in the
    random streams, its index unless given. done: (prompt_index, sample_index) pairs not wanted
    again. units: lists of prompt indices instead of plan_units'; with `dist` they are dealt
    round-robin. compile: the decode step through torch.compile; "auto" where the whole job is worth
    it, on CUDA only. kv_dtype: see Capacity. A model without a cache begins every step anew.
    ValueError for a prompt beyond the context; a sequence that reaches its end finishes there.
    """
    longest = model.max_positions
    samplings = by_sample(sampling, len(prompts), n_samples)
    distinct = list({id(s): s for own in samplings for s in own}.values())
    _check_job(prompts, longest, keys, distinct, tokenizer, batch_size)
    check_kv_dtype(model, kv_dtype)
    if not prompts:
        return Generation(iter(()), batch_size or 1)
    limits = [token_limit(s, p, longest) for p, own in zip(prompts, samplings) for s in own]
    P, S = max(map(len, prompts)), max(limits)
    shared = shared_tokens(model, prompts, n_samples)
    kept = len({tuple(p[:n]) for p, n in zip(prompts, shared)})
    own = max(len(p) - n for p, n in zip(prompts, shared))
    alive = functools.partial(prompts_at_once, kept, n_samples)
    if batch_size is None:
        batch_size = default_batch_size(model, own - 1, S, lambda rows: alive(rows) * P, kv_dtype)
    units = plan_units(len(prompts), n_samples, batch_size) if units is None else units
    B = min(batch_size, n_samples * max(map(len, units)))
    if compile == "auto":
        compile = model.device.type == "cuda" and compiling_pays(model, sum(limits) / B)
    options: dict[str, Any] = {"eos_ids": eos_ids, "compiled": bool(compile)}
    options |= {"features": features_of(distinct), "on_launch": dist.bump if dist else lambda: None}
    capacity = Capacity(B, P, S, alive(B), own, kv_dtype)
    engine = functools.partial(Engine, model, capacity, tokenizer, **options)

    def submit(to: Engine, unit: Collection[int]) -> None:
        to.rows.forget()  # or prompts of earlier units would shape this one's prefills
        for p in unit:
            wanted = [s for s in range(n_samples) if (p, s) not in done]
            to.submit(p, prompts[p], samplings[p], wanted, keys and keys[p], shared[p])

    samples = draw_by_turns(engine, submit, units, dist)
    return Generation(samples, batch_size, bool(compile))


def by_sample(
    sampling: Sampling | abc.Sequence[Sampling] | abc.Sequence[abc.Sequence[Sampling]],
    n_prompts: int,
    n_samples: int,
) -> list[list[Sampling]]:
    """[n_prompts, n_samples] of one for all, one for each prompt, or one for each sample."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, not {n_samples}")
    if isinstance(sampling, Sampling):
        return [[sampling] * n_samples] * n_prompts
    given = [[s] * n_samples if isinstance(s, Sampling) else list(s) for s in sampling]
    if len(given) != n_prompts or any(len(own) != n_samples for own in given):
        raise ValueError(f"sampling must be one, {n_prompts}, or {n_prompts} of {n_samples} each")
    return given


def _check_job(prompts, longest, keys, samplings, tokenizer, batch_size) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size must be at least 1, not {batch_size}")
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, longest, f"prompt {i if keys is None else keys[i]}")
    if keys is not None and len(set(map(str, keys))) != len(prompts):
        raise ValueError(f"keys must name each of {len(prompts)} prompts once")
    for sampling in samplings:
        check_stop(sampling, tokenizer)

"""The rows of a batch on the device: their state, and the step that gives each its next token.

    rows = CachedRows(model, capacity, features, compiled, logprobs)
    rows.admit(at, waiting)                  # free places of `at` take sequences that wait
    ticket = rows.step(at)                   # launched, not waited for
    rows.look(ticket)["token"]               # what that step gave each row

A step reads lengths, parameters and new sequences from device memory, where the host stages what
changed: on CUDA one graph, captured once, serves the whole job. PlainRows is the same for a model
without a cache.

Shapes: B rows, V vocabulary, P longest prompt
"""

import functools
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from backends import Sampling
from backends.kvcache import DecodeCache, Filling, GoingOnIn, pad_rows
from backends.sampling import COLUMNS, sample_tokens, top_logprobs
from model import GPTModel, inductor_options
from modeling.attention import attention_without_plans
from transformers_model import Model

LAG = 2  # steps launched before the host looks at a token: a finished row runs on for so many
PREFILL_TOKENS = 8192  # padded tokens of prompts computed in one call


@dataclass(frozen=True)
class Capacity:
    """What an engine has room for: rows at a time, tokens of a prompt and new ones of a sample,
    prompts kept at a time (0: one a row), and how many tokens of its prompt a row keeps itself, the
    others being those that several prompts begin with (1: the last, the first step's input).
    prompt_room: tokens of a prompt that are kept once (0: all but the last of the longest). steady:
    prompts are anybody's and come at any time (backends/steady.py). kv_dtype: in which keys and
    values are kept (kvcache.py), the model's own unless given."""

    rows: int
    prompt_tokens: int
    new_tokens: int
    prompts: int = 0
    own_prompt_tokens: int = 1
    kv_dtype: str | None = None
    prompt_room: int = 0
    steady: bool = False

    @property
    def kept(self) -> int:
        """Tokens of a prompt that are kept once, at most."""
        return self.prompt_room or self.prompt_tokens - 1

    @property
    def row_tokens(self) -> int:
        """Tokens that a row keeps itself, at most."""
        return self.own_prompt_tokens - 1 + self.new_tokens


def name_of(ids: list[int]) -> bytes:
    """Token ids as a key, whose hash is computed once."""
    return np.array(ids, dtype=np.int64).tobytes()


@dataclass(eq=False)
class Request:
    """A prompt whose samples are wanted, and how many of them are not finished. shared: how many of
    its tokens are kept once for all rows whose prompts begin with them; the last one never is.
    ends: whether a token that ends a text ends them. told: whether the likeliest tokens are."""

    name: Hashable
    prompt: list[int]
    unfinished: int
    shared: int
    ends: bool = True
    told: bool = True

    @functools.cached_property
    def prefix(self) -> bytes:
        """Names the tokens that are kept once."""
        return name_of(self.prompt[: self.shared])

    @property
    def own(self) -> list[int]:
        """What its rows keep themselves before their first step."""
        return self.prompt[self.shared : -1]


@dataclass(eq=False)
class Sequence:
    """One sample on its way. limit: tokens it may have; key: of its random stream; launched: steps
    sent to the device; reason: why it ended, once it has."""

    request: Request
    index: int
    sampling: Sampling
    limit: int
    key: tuple[int, int]
    tokens: list[int] = field(default_factory=list)
    tail: str = ""
    launched: int = 0
    reason: str | None = None


# ---------------------------------------------------------------------------------------------
# Rows on the device

# what the device knows of each row: its last token, tokens sampled, its random stream, whether it
# has a sequence, and its parameters; the cache knows its prompt and its length
STATE = {"token": torch.int64} | dict.fromkeys(("position", "key0", "key1", "active"), torch.int32)
STATE |= {name: dtype for name, (dtype, _) in COLUMNS.items()}
STAGED = ("new", "prompt", "own", *STATE)  # what the host sends of a row that changed


def _decode_step(model, cache, state, staged, features):
    """One token for every row: take new sequences in, run the model, sample, store, go on.

    state: STATE's tensors [B], and logprobs' [B, 1 + k] where they are wanted; staged
    [len(STAGED), B] float64: which rows start anew, and with what. All in place, without a look at
    any value: this is what the CUDA graph captures.
    """
    sent = dict(zip(STAGED, staged))
    new = sent["new"] > 0
    for name in STATE:
        state[name].copy_(torch.where(new, sent[name].to(state[name].dtype), state[name]))
    cache.start(new, sent["prompt"], sent["own"])
    staged[0].zero_()  # nothing is new in the next step, unless the host says so
    hidden = model.hidden(state["token"][:, None], cache=cache)
    if hidden is not None:  # else another rank draws
        _draw(model, hidden[:, 0], state, features)
    state["position"].add_(state["active"])
    cache.advance(state["active"])


def _draw(model, hidden, state, features):
    keys = torch.stack((state["key0"], state["key1"]), dim=1)
    logits = model.logits(hidden)
    tokens = sample_tokens(logits, keys, state["position"], state, features)
    state["token"].copy_(tokens)
    if "logprobs" in state:
        ids, values = top_logprobs(logits, tokens, state["logprobs"].shape[1] - 1)
        state["likeliest"].copy_(ids)
        state["logprobs"].copy_(values)


@functools.cache
def _compiled_step():
    import torch._dynamo.config as dynamo_config

    # every batch size, cache size and model is a compilation of its own, and a sweep has many
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 64)
    return torch.compile(_decode_step, fullgraph=True, dynamic=False, options=inductor_options())


class CachedRows:
    """B rows of a DecodeCache, their state on the device, and the step that moves them all."""

    def __init__(
        self,
        model: GPTModel,
        capacity: Capacity,
        features: frozenset[str],
        compiled: bool,
        logprobs: int | None,
    ):
        self.model, self.device = model, model.device
        self.cuda, self.compiled = self.device.type == "cuda", compiled
        self.bucket = 64 if self.cuda else 1
        B, P = capacity.rows, capacity.kept
        P = min(-(-P // self.bucket) * self.bucket, model.max_positions)
        # the last token of a prompt is the first step's input; the bucket apart
        longest = capacity.prompt_tokens - 1 + capacity.new_tokens
        slots, S = capacity.prompts or B, capacity.row_tokens
        self.cache = DecodeCache(model, slots, P, B, S, longest, capacity.kv_dtype)
        self.lag, self.patience = LAG if self.cuda else 0, max(1, B // 16)
        self.slot_of: dict[bytes, int] = {}  # by what is kept there
        self.running: list[Sequence | None] = [None] * B  # on the device
        self.row_prompt = np.zeros(B, dtype=np.int64)
        self.state = {n: torch.zeros(B, dtype=d, device=self.device) for n, d in STATE.items()}
        if logprobs is not None:
            for name, dtype in (("likeliest", torch.int64), ("logprobs", torch.float32)):
                self.state[name] = torch.zeros(B, 1 + logprobs, dtype=dtype, device=self.device)
        self.staged = torch.zeros(len(STAGED), B, dtype=torch.float64, device=self.device)
        self.make_buffers(self.lag + 2)
        self.n_steps = 0
        step = _compiled_step() if compiled else _decode_step
        self._advance = lambda: step(model, self.cache, self.state, self.staged, features)
        self.prepare()
        if self.cuda:
            self._capture()

    def prepare(self) -> None:
        """Before the step is captured."""

    def make_buffers(self, n: int) -> None:
        """The host's side of n steps in flight: those of this step are free again once the step
        `lag` before it was looked at."""
        pin = {"pin_memory": self.cuda}
        read = [name for name in ("token", "likeliest", "logprobs") if name in self.state]

        def like(tensor):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, **pin)

        self.staged_ring = [like(self.staged) for _ in range(n)]
        self.tiles_ring = [self.cache.new_staging(**pin) for _ in range(n)]
        self.read_ring = [{name: like(self.state[name]) for name in read} for _ in range(n)]
        self.done = [torch.cuda.Event() for _ in range(n if self.cuda else 0)]

    def _capture(self) -> None:
        self._advance = self.captured(self._advance)

    @torch.no_grad()
    def captured(self, step: Callable[[], None], pool: Any = None) -> Callable[[], None]:
        """A step as a CUDA graph. All rows are idle, so running it changes nothing. pool: memory of
        graphs that are never under way together."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    def admit(self, rows: list[Sequence | None], waiting: deque[Sequence]) -> None:
        """Give free rows (None) to waiting sequences; computes what of their prompts is not yet in
        the cache."""
        free = deque(i for i, sequence in enumerate(rows) if sequence is None)
        busy, prefixes, own = len(free) < len(rows), [], []
        while free and waiting:
            request = waiting[0].request
            known = request.prefix in self.slot_of
            waits = busy and not (prefixes or own) and len(free) < self.patience
            if waits and (request.own or not known):
                break  # several prompts at once, or for several rows, cost little more than one
            if not known:
                slot = self._free_slot(rows)
                if slot is None:
                    break
                self.slot_of[request.prefix] = slot
                prefixes.append((slot, request.prompt[: request.shared]))
            if request.own:
                own.append((free[0], request))
            rows[free.popleft()] = waiting.popleft()
        if prefixes:
            slots, texts = zip(*prefixes)
            self.cache.set_lengths(list(slots), list(map(len, texts)))
            self.fill([(slot, ids) for slot, ids in prefixes if ids])
        self.fill_rows(own)

    def fill(self, prompts: list[tuple[int, list[int]]]) -> None:
        """Keys and values of prompts (slot, ids)."""
        self._prefill(prompts, self.cache.prompt_len)

    def fill_rows(self, own: list[tuple[int, Request]]) -> None:
        """Those of what rows (row, request) keep of their prompts themselves."""
        for prefix in dict.fromkeys(request.prefix for _, request in own):
            some = [(row, request) for row, request in own if request.prefix == prefix]
            going_on = [(row, request.own) for row, request in some]
            self._prefill(going_on, self.cache.max_len, some[0][1])

    def forget(self) -> None:
        """What was computed of prompts: no row goes on from any."""
        self.slot_of.clear()

    def _free_slot(self, rows):
        """A slot that nothing is in, or else what no row goes on from."""
        free = set(range(self.cache.n_prompts)) - set(self.slot_of.values())
        if free:
            return min(free)
        used = {sequence.request.prefix for sequence in rows if sequence is not None}
        unused = next((prefix for prefix in self.slot_of if prefix not in used), None)
        return None if unused is None else self.slot_of.pop(unused)

    @torch.no_grad()
    def _prefill(self, texts, room: int, before: Request | None = None) -> None:
        """Keys and values of texts [(place, ids)], as many a call as PREFILL_TOKENS allow, for a
        place of so much room: a slot, or a row that goes on from what is kept of `before`."""
        texts = sorted(texts, key=lambda text: len(text[1]))  # by length: little padding
        while texts:
            n, T = 0, 0
            for _, ids in texts:
                longer = max(T, -(-len(ids) // self.bucket) * self.bucket)
                if n and longer * (n + 1) > PREFILL_TOKENS:
                    break
                n, T = n + 1, min(longer, room)
            places, ids = zip(*texts[:n])
            texts = texts[n:]
            padded = torch.from_numpy(pad_rows(ids, T)).to(self.device)
            filling: Filling | GoingOnIn
            if before is None:
                filling = self.cache.filling(list(places), list(map(len, ids)))
            else:
                slot = self.slot_of[before.prefix]
                filling = self.cache.going_on(slot, before.shared, list(places))
            with attention_without_plans():
                self.model.hidden(padded, cache=filling)

    def _stage(self, rows, i: int) -> None:
        """Send the device what changed: rows that start a sequence, and rows that became idle."""
        changed = [r for r, s in enumerate(rows) if s is not self.running[r]]
        if not changed:
            return
        staged = self.staged_ring[i].numpy()
        staged[:] = 0
        before = self.row_prompt.copy()
        for r in changed:
            self.running[r] = s = rows[r]
            values = {"new": 1}
            self.row_prompt[r] = self.place_of(s, r)
            if s is not None:
                values["own"] = len(s.request.own)
                values |= {"token": s.request.prompt[-1], "active": 1}
                values |= {"key0": s.key[0], "key1": s.key[1]}
                values |= {name: getattr(s.sampling, name) for name in COLUMNS}
            values["prompt"] = self.row_prompt[r]
            for name, value in values.items():
                staged[STAGED.index(name), r] = value
        self.staged.copy_(self.staged_ring[i], non_blocking=True)
        if (before != self.row_prompt).any():
            self.cache.group_rows(self.row_prompt, self.tiles_ring[i])

    def place_of(self, sequence: Sequence | None, row: int) -> int:
        """The slot of a row from now on: an idle one stays where it was."""
        return int(
            self.row_prompt[row] if sequence is None else self.slot_of[sequence.request.prefix]
        )

    @torch.no_grad()
    def step(self, rows: list[Sequence | None]) -> int:
        """Launch one step for these sequences; returns a ticket for `look`."""
        i = self.n_steps % len(self.read_ring)
        self._stage(rows, i)
        if not (self.cuda or self.compiled):
            own = (s.launched + len(s.request.own) for s in self.running if s)
            self.cache.read_at_most(self.reach(1 + max(own, default=0)))
        self.launch(i)
        self.n_steps += 1
        return i

    def reach(self, tokens: int) -> int:
        """How many own tokens a step in plain torch reads of each row, of which so many are."""
        return tokens

    def launch(self, i: int) -> None:
        """The step that goes by this ticket."""
        self._advance()
        self.fetch(i)

    def fetch(self, i: int) -> None:
        """What it gave each row, to the host."""
        for name, buffer in self.read_ring[i].items():
            buffer.copy_(self.state[name], non_blocking=True)
        if self.cuda:
            self.done[i].record()

    def look(self, ticket: int) -> dict[str, list]:
        """What that step made of each row, waiting for it if it still runs: "token", and where
        wanted "likeliest" and "logprobs"."""
        if self.cuda:
            self.done[ticket].synchronize()
        return {name: buffer.tolist() for name, buffer in self.read_ring[ticket].items()}


class PlainRows:
    """The same for a model without a cache: every step runs every row from its first token."""

    lag = 0

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        features: frozenset[str],
        logprobs: int | None,
    ):
        self.model, self.features, self.n_logprobs = model, features, logprobs
        self.result = {}

    def admit(self, rows: list[Sequence | None], waiting: deque[Sequence]) -> None:
        for i, sequence in enumerate(rows):
            if sequence is None and waiting:
                rows[i] = waiting.popleft()

    def forget(self) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def step(self, rows: list[Sequence | None]) -> int:
        device = self.model.device

        def column(value, idle, dtype):
            values = [idle if s is None else value(s) for s in rows]
            return torch.tensor(values, dtype=dtype).to(device)

        ids = [s.request.prompt + s.tokens if s else [0] for s in rows]
        hidden = self.model.hidden(torch.from_numpy(pad_rows(ids)).to(device))
        last = torch.tensor([len(own) - 1 for own in ids], device=device)
        logits = self.model.logits(hidden[torch.arange(len(rows), device=device), last])
        keys = column(lambda s: s.key, (0, 0), torch.int32)
        position = column(lambda s: len(s.tokens), 0, torch.int32)
        columns = {
            name: column(lambda s, name=name: getattr(s.sampling, name), 0, dtype)
            for name, (dtype, _) in COLUMNS.items()
        }
        tokens = sample_tokens(logits, keys, position, columns, self.features)
        self.result = {"token": tokens}
        if self.n_logprobs is not None:
            likeliest, logprobs = top_logprobs(logits, tokens, self.n_logprobs)
            self.result |= {"likeliest": likeliest, "logprobs": logprobs}
        return 0

    def look(self, ticket: int) -> dict[str, list]:
        return {name: tensor.tolist() for name, tensor in self.result.items()}

"""Rows for prompts of anybody, at any time: what runs beside a request changes no bit of its
answer, and what prompts begin with alike is computed once.

    rows = SteadyRows(model, capacity, features, compiled, logprobs)     # as CachedRows

A prompt is computed in pieces of PIECE tokens, and one of what remains. A call has a shape that its
piece alone decides: where it begins, its length filled up to a bucket, and as many places for other
prompts as make CALL tokens, idle ones where nobody waits. So the same kernels run whoever else is
there. A whole piece that lies in any prompt's place already, of a request that runs or of one that
is over, is copied from there instead, the same bits: few-shot examples and system prompts are
computed for the first request alone. Places are given away when room is needed, those that nobody
had use of for longest first.

A step is a graph of its own where all rows are greedy and nobody reads the likeliest tokens, and so
is each kind of call, from its first use on.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from backends import rows
from backends.kvcache import DecodeCache, merge_attention, pad_rows
from backends.rows import Capacity, Request
from backends.stages import StageRows
from gpu_kernels.kv_codes import Codes, read, store
from model import GPTModel
from modeling.attention import attend, attention_without_plans

PIECE = 256
CALL = 512  # tokens of a call on a GPU
BLOCK = 512  # keys that attention on a CPU takes at a time
SINGLE = ("likeliest", "logprobs")  # of which a lean step tells the drawn token's alone


# a call's input_ids, its slots, and what runs it
Call = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]


class Kept:
    """What lies in slots: beginnings of prompts, each in one slot or several, by their tokens as
    bytes; and which slots were of use last."""

    def __init__(self, slots: int):
        self.slots: dict[bytes, dict[int, None]] = {}
        self.keys: dict[int, list[bytes]] = {}
        self.order = dict.fromkeys(range(slots))  # those of use last come last

    def find(self, key: bytes) -> int | None:
        """A slot that holds a beginning; it is of use now."""
        found = next(reversed(self.slots.get(key, {})), None)
        if found is not None:
            self.touch(found)
        return found

    def touch(self, slot: int) -> None:
        self.order[slot] = self.order.pop(slot)

    def add(self, slot: int, key: bytes) -> None:
        self.slots.setdefault(key, {})[slot] = None
        self.keys.setdefault(slot, []).append(key)

    def take(self, used: Collection[int]) -> int | None:
        """The slot without use for longest, whose content is forgotten; None where all are used."""
        slot = next((slot for slot in self.order if slot not in used), None)
        if slot is not None:
            for key in self.keys.pop(slot, []):
                del self.slots[key][slot]
                if not self.slots[key]:
                    del self.slots[key]
            self.touch(slot)
        return slot


class Piece:
    """What one call of `hidden` needs for tokens `start` and on of the prompts in these slots [n],
    which hold the tokens before."""

    of_latents = False

    def __init__(self, cache: DecodeCache, slots: torch.Tensor, start: int):
        self.k, self.v, self.longest = cache.prompt_k, cache.prompt_v, cache.longest
        self.slots, self.start = slots, start

    def positions(self, T: int) -> torch.Tensor:
        return self.start + torch.arange(T, device=self.slots.device)[None]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window: int | None = None,
        latent: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """q [n, H, T, D] over what the slots hold and k, v [n, G, T, D], which are stored there;
        latent: as Filling's."""
        start, T = self.start, q.shape[2]
        keys, values = self.k[layer], self.v[layer]
        at = self.slots, slice(None), slice(start, start + T)
        if values is None:
            assert latent is not None and not start, "latents are filled whole"
            store(keys, at, latent)
        else:
            k, v = store(keys, at, k), store(values, at, v)
        if not start:
            return attend(q, k, v, causal=True, window=window, **options)
        at = self.slots, slice(None), slice(start)
        before = read(keys[at], q.dtype), read(values[at], q.dtype)
        if window is not None and window < start + T:
            key = torch.arange(start + T, device=q.device)
            ahead = key[start:, None] - key
            seen = (ahead >= 0) & (ahead < window)
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v)))
            return attend(q, k, v, causal=False, mask=seen, **options)
        own = attend(q, k, v, causal=True, lse=True, **options)
        return merge_attention(*attend(q, *before, causal=False, lse=True, **options), *own)


class SteadyRows(rows.CachedRows):
    """See the file's docstring."""

    def __init__(
        self,
        model: GPTModel,
        capacity: Capacity,
        features: frozenset[str],
        compiled: bool,
        logprobs: int | None,
    ):
        slots = capacity.prompts or capacity.rows
        self.kept, self.idle_slot = Kept(slots), slots  # the last one: of idle places of a call
        self.lean: dict[int, bool] = {}  # steps, by ticket
        self.calls: dict[tuple[int, int], Call] = {}  # by their start and their length
        super().__init__(model, replace(capacity, prompts=slots + 1), features, compiled, logprobs)

    # -- Steps --------------------------------------------------------------------------------

    def prepare(self) -> None:
        step = rows._compiled_step() if self.compiled else rows._decode_step
        state = self.state | {
            name: self.state[name][:, :1] for name in SINGLE if name in self.state
        }
        self._full = self._advance
        self._lean = lambda: step(self.model, self.cache, state, self.staged, frozenset())

    def _capture(self) -> None:
        self._full, self._lean = self.captured(self._full), self.captured(self._lean)
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def captures(self) -> bool:
        """Whether calls become graphs: not where attention is compiled for each shape, nor where
        the host asks how many tokens an expert has."""
        c = self.model.config
        compiled = c.sliding_window, c.attention_softcap
        return self.cuda and not any((*compiled, c.n_experts, c.kv_lora_rank))

    def place_of(self, sequence: rows.Sequence | None, row: int) -> int:
        """An idle row is on nobody's prompt."""
        return self.idle_slot if sequence is None else super().place_of(sequence, row)

    def step(self, at: list[rows.Sequence | None]) -> int:
        lean = not any(s and (s.sampling.temperature or s.request.told) for s in at)
        self._advance = self._lean if lean else self._full
        ticket = super().step(at)
        self.lean[ticket] = lean
        return ticket

    def reach(self, tokens: int) -> int:
        """Whole blocks of keys: where a row's neighbours are longer, more that it does not see."""
        before = self.cache.prompt_len
        return min(-(-(before + tokens) // BLOCK) * BLOCK - before, self.cache.max_len)

    def look(self, ticket: int) -> dict[str, list]:
        if self.cuda:
            self.done[ticket].synchronize()
        buffers = self.read_ring[ticket]
        if self.lean[ticket]:
            buffers = buffers | {name: buffers[name][:, :1] for name in SINGLE if name in buffers}
        return {name: buffer.tolist() for name, buffer in buffers.items()}

    # -- Prompts ------------------------------------------------------------------------------

    @property
    def piece(self) -> int:
        """Latents go on from nothing: their prompts are one piece."""
        return max(1, self.cache.prompt_len) if self.cache.of_latents else PIECE

    def admit(self, at: list[rows.Sequence | None], waiting: deque[rows.Sequence]) -> None:
        for sequence in itertools.islice(waiting, at.count(None)):
            self._touch(sequence.request)  # so that no other takes the place of what it begins with
        super().admit(at, waiting)

    def _touch(self, request: Request) -> None:
        ids = request.prompt[: request.shared]
        for stop in range(self.piece, len(ids) + 1, self.piece):
            self.kept.find(rows.name_of(ids[:stop]))
        if request.prefix in self.slot_of:
            self.kept.touch(self.slot_of[request.prefix])

    def _free_slot(self, at: list[rows.Sequence | None]) -> int | None:
        slot = self.kept.take({self.slot_of[s.request.prefix] for s in at if s is not None})
        if slot is not None:
            self.slot_of = {prefix: of for prefix, of in self.slot_of.items() if of != slot}
        return slot

    def fill(self, prompts: list[tuple[int, list[int]]]) -> None:
        for start in range(0, max((len(ids) for _, ids in prompts), default=0), self.piece):
            self._fill_from(start, [(slot, ids) for slot, ids in prompts if len(ids) > start])

    def _fill_from(self, start: int, prompts: list[tuple[int, list[int]]]) -> None:
        stop = start + self.piece
        alike: dict[bytes, list[tuple[int, list[int]]]] = {}
        for slot, ids in prompts:
            alike.setdefault(rows.name_of(ids[:stop]), []).append((slot, ids[start:stop]))
        copied, computed = [], {}
        for key, members in alike.items():
            slot, ids = members[0]
            whole = len(ids) == self.piece
            source = self.kept.find(key) if whole else None
            if source is None:
                source = slot
                computed.setdefault(-(-len(ids) // self.bucket) * self.bucket, []).append(
                    members[0]
                )
            copied += [(source, slot) for slot, _ in members if slot != source]
            for slot, _ in members if whole else ():
                self.kept.add(slot, key)
        for T, some in computed.items():
            n = max(1, CALL // T) if self.cuda else 1
            for i in range(0, len(some), n):
                self._compute(start, T, some[i : i + n], n)
        if copied:
            self._copy(copied, start)

    @torch.no_grad()
    def _compute(self, start: int, T: int, some: list[tuple[int, list[int]]], places: int) -> None:
        own, idle = [ids for _, ids in some], places - len(some)
        padded = pad_rows([*own, *[[0]] * idle], min(T, self.cache.prompt_len - start))
        ids, slots, run = self.calls.get((start, T)) or self._make_call(start, padded.shape)
        if self.captures:
            self.calls[start, T] = ids, slots, run
        ids.copy_(torch.from_numpy(padded))
        slots.copy_(torch.tensor([slot for slot, _ in some] + [self.idle_slot] * idle))
        run()

    def _make_call(self, start: int, shape: tuple[int, ...]) -> Call:
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        slots = torch.full(shape[:1], self.idle_slot, device=self.device)
        view = Piece(self.cache, slots, start)

        def run():
            with attention_without_plans():
                self.model.hidden(ids, cache=view)

        return ids, slots, self.captured(run, self.pool) if self.captures else run

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[int, int]], start: int) -> None:
        """(from, to): a whole piece."""
        of, to = torch.tensor(pairs, device=self.device).T
        piece = slice(start, start + self.piece)
        rooms = (*self.cache.prompt_k.values(), *self.cache.prompt_v.values())
        for room in filter(lambda room: room is not None, rooms):
            parts = (room.codes, room.scales) if isinstance(room, Codes) else (room,)
            for part in parts:
                part[to, :, piece] = part[of, :, piece]

    def fill_rows(self, own: list[tuple[int, Request]]) -> None:
        for row, request in own:  # one a call: n samples of a request do not shape it
            self._prefill([(row, request.own)], self.cache.max_len, request)


class SteadyStageRows(StageRows, SteadyRows):
    """The same where the model lies on several ranks. Calls follow each other from rank to rank,
    and none is a graph: what another rank sends does not come into one."""

    @property
    def captures(self) -> bool:
        return False

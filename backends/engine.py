"""Batched generation: many samples of many prompts through a batch of rows that stays full.

    for sample in generate(model, prompts, tokenizer=tokenizer, n_samples=200, temperature=0.8,
                           top_p=0.95, stop=("\\ndef",), max_new_tokens=512, seed=0, dist=dist):
        ...                          # a Sample as soon as it is finished, while the GPU goes on

A prompt's keys and values are computed once and shared by its samples; a row that finishes takes
the next sample. On CUDA a decode step, from embedding to sampled token, is one CUDA graph that
serves the whole job: lengths, parameters and new sequences are read from device memory. The host
looks at sampled tokens `LAG` steps late, so it never waits for the step that is running.

A sample is a function of (seed, key of its prompt, sample index), whoever its neighbours are: its
random numbers come from a counter-based generator keyed by these, and batch shapes are fixed. Work
is cut into units of prompts, the same for any number of ranks, and rows refill inside a unit only,
so that even the last bits do not depend on the world size.

Shapes: B rows, V vocabulary, P longest prompt, S most new tokens
"""

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from model import KVCache, attention_without_plans

LAG = 2  # steps launched before the host looks at a token: a finished row runs on for so many
UNIT_BATCHES = 8  # a unit refills each row so often on average: its last rows wait for few others
MIN_UNITS = 8  # a job has at least so many units where it has the prompts: work for as many ranks
COMPILE_STEPS = 8192  # torch.compile costs up to a minute and saves milliseconds a step
PREFILL_TOKENS = 8192  # padded tokens of prompts computed in one call


@dataclass(frozen=True)
class Sample:
    """text: what follows the prompt, cut before a stop string. token_ids: all that was generated,
    end-of-sequence token excepted. finish_reason: "eos", "stop", or "length"."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str | None
    finish_reason: str


# ---------------------------------------------------------------------------------------------
# Random numbers and sampling


def threefry(key, counter, rounds=13):
    """Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    key, counter: pairs of int32 tensors that broadcast. Returns two int32 tensors of random bits;
    13 rounds are the fewest that pass every test of the paper. Integer arithmetic wraps, so the
    bits are the same on every device.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(rounds):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        a = a + b
        b = ((b << turn) | ((b >> (32 - turn)) & ((1 << turn) - 1))) ^ a
        if i % 4 == 3:
            n = i // 4 + 1
            a, b = a + keys[n % 3], b + keys[(n + 1) % 3] + n
    return a, b


def gumbel_noise(keys, position, V: int):
    """Standard Gumbel noise [B, V] of token `position` [B] in the streams with keys [B, 2]."""
    token = torch.arange((V + 1) // 2, dtype=torch.int32, device=keys.device)
    bits = torch.cat(threefry((keys[:, :1], keys[:, 1:]), (position[:, None], token[None])), dim=1)
    uniform = ((bits[:, :V].long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    # the largest noise comes from the smallest numbers, of which float32 has plenty
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def sample_tokens(logits, keys, position, temperature, top_p, top_k, features=frozenset("nkp")):
    """The next token [B] of each row of logits [B, V].

    keys [B, 2] int32 and position [B] int32: where in which random stream. temperature [B]: 0 takes
    the likeliest token, the first of equals. top_k [B] (0: off) keeps the k likeliest; top_p [B]
    (1: off) then keeps the fewest likeliest tokens whose share reaches it. Tokens equal to the last
    one kept are kept too. features: which of noise "n", top-k "k" and top-p "p" any row uses.
    """
    values = logits.float()
    if "n" not in features:
        return values.argmax(dim=-1)
    greedy = (temperature == 0)[:, None]
    scaled = (values - values.amax(dim=-1, keepdim=True)) / torch.where(
        greedy, 1.0, temperature[:, None]
    )
    bits = values.view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # sorts as the values do
    precision = {torch.bfloat16: 16, torch.float16: 19}.get(logits.dtype, 32)
    lowest = torch.full_like(top_k, -(2**31))[:, None]
    kept = lowest
    if "k" in features:
        cut = _tail_cut(order, torch.ones_like(scaled), top_k[:, None].float(), precision)
        kept = torch.where(top_k[:, None] > 0, cut, lowest)
    if "p" in features:
        weight = torch.where(order >= kept, scaled.exp(), 0.0)
        share = weight.sum(dim=-1, keepdim=True) * top_p[:, None]
        cut = _tail_cut(order, weight, share, precision)
        kept = torch.where(top_p[:, None] < 1, torch.maximum(cut, kept), kept)
    noisy = scaled + gumbel_noise(keys, position, logits.shape[1])
    noisy = torch.where(order >= kept, noisy, float("-inf"))
    return torch.where(greedy, values, noisy).argmax(dim=-1)


def _tail_cut(order, weight, target, precision: int):
    """The largest threshold [B, 1] such that elements at or above it weigh at least `target`.

    Found bit by bit: a pass over the row for each significant bit, where sorting a row of 32,000
    would cost more than the rest of the step's sampling.
    """

    def enough(threshold):
        return torch.where(order >= threshold, weight, 0.0).sum(dim=-1, keepdim=True) >= target

    zero = torch.zeros_like(order[:, :1])
    threshold = torch.where(enough(zero), zero, torch.full_like(zero, -(2**31)))
    for bit in range(30, 31 - precision, -1):
        higher = threshold + (1 << bit)
        threshold = torch.where(enough(higher), higher, threshold)
    return threshold


def stream_key(seed: int, key, sample_index: int) -> tuple[int, int]:
    """Two int32: the key of one sample's random stream. key: what names the prompt, as text."""
    name = repr((seed, str(key), sample_index)).encode()
    words = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<i4")
    return int(words[0]), int(words[1])


# ---------------------------------------------------------------------------------------------
# The job: sequences, units, and what ends a sequence


@dataclass(eq=False)
class Sequence:
    """One sample on its way. limit: tokens it may have; launched: steps sent to the device."""

    prompt_index: int
    sample_index: int
    prompt: list[int]
    limit: int
    temperature: float
    top_p: float
    top_k: int
    key: tuple[int, int]
    tokens: list[int] = field(default_factory=list)
    tail: str = ""
    launched: int = 0
    reason: str | None = None


def plan_units(n_prompts: int, n_samples: int, batch_size: int) -> list[range]:
    """Cut prompts into units, each large enough to keep a batch of rows busy. Units are dealt to
    ranks whole; how they are cut depends on the job alone, never on the world size."""
    busy = -(-UNIT_BATCHES * batch_size // n_samples)
    size = max(1, min(busy, -(-n_prompts // MIN_UNITS)))
    return [range(i, min(i + size, n_prompts)) for i in range(0, n_prompts, size)]


def default_batch_size(model, longest_prompt: int, max_new_tokens: int) -> int:
    """Rows whose cache fits beside the model, at most 256; 16 on a CPU or without a cache.

    Computed from the device's size, not from what happens to be free, so that ranks agree."""
    weight = next(model.parameters())
    if not weight.is_cuda or not getattr(model, "supports_cache", True):
        return 16
    c = model.config
    token = 2 * c.n_layers * c.n_kv_heads * c.head_dim * weight.element_size()
    total = torch.cuda.get_device_properties(weight.device).total_memory
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = 0.85 * total - weights - 4e9  # logits, activations of a prefill
    rows = int(room // (token * (longest_prompt + max_new_tokens)))
    return max(1, min(256, rows // 8 * 8 or rows))


class Endings:
    """Decides when a sequence is finished, and what its text is."""

    def __init__(self, tokenizer, stop, eos_ids):
        self.tokenizer, self.stop, self.eos_ids = tokenizer, tuple(stop), frozenset(eos_ids)
        self.longest = max(map(len, self.stop), default=0)
        # A stop string of ASCII characters shows in the tokens' own texts laid end to end; other
        # characters can be split between tokens
        self.by_piece = all(s.isascii() for s in self.stop)
        if self.stop:  # a token alone may lose a leading space: pieces are decoded after an anchor
            self.anchor = list(tokenizer.encode("a"))
            self.anchor_text = tokenizer.decode(self.anchor)
            self.piece = functools.cache(self._piece)

    def _piece(self, token):
        return self.tokenizer.decode([*self.anchor, token])[len(self.anchor_text) :]

    def add(self, sequence, token: int) -> str | None:
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

    def _may_stop(self, sequence, token) -> bool:
        if not self.by_piece:
            return True
        text = sequence.tail + self.piece(token)
        sequence.tail = text[max(0, len(text) - self.longest + 1) :]
        return any(s in text for s in self.stop)

    def completion(self, sequence) -> str:
        """Decoded jointly with the prompt, then cut: SentencePiece drops a text's first space."""
        prompt = self.tokenizer.decode(sequence.prompt)
        text = self.tokenizer.decode(sequence.prompt + sequence.tokens)
        # not len(prompt): a prompt may end, and the first token go on, in the middle of a character
        return text[len(os.path.commonprefix((prompt, text))) :]  # noqa: RUF071

    def sample(self, sequence) -> Sample:
        text = None
        if self.tokenizer is not None:
            text = self.completion(sequence)
            if sequence.reason == "length":  # cut off in the middle of a character
                text = text.rstrip("\ufffd")
            cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
            text = text[: min(cuts, default=len(text))]
        s = sequence
        return Sample(s.prompt_index, s.sample_index, s.tokens, text, s.reason)


# ---------------------------------------------------------------------------------------------
# Rows on the device


# what the device knows of each row: its last token, tokens in the cache, tokens sampled, its random
# stream, its parameters, whether it has a sequence, and the slot of its prompt
FIELDS = ("token", "length", "position", "key0", "key1", "temperature", "top_p", "top_k")
FIELDS += ("active", "prefix")


def _decode_step(model, cache, state, fresh, features):
    """One token for every row: take new sequences in, run the model, sample, store, go on.

    state: FIELDS' tensors [B]; fresh [1 + len(FIELDS), B] float64: which rows start anew, and
    with what. All in place, without a look at any value: this is what the CUDA graph captures.
    """
    new = fresh[0] > 0
    for name, values in zip(FIELDS, fresh[1:]):
        tensor = state[name]
        tensor.copy_(torch.where(new, values.to(tensor.dtype), tensor))
    fresh[0].zero_()
    hidden = model.hidden(state["token"][:, None], cache=cache)
    keys = torch.stack((state["key0"], state["key1"]), dim=1)
    parameters = state["temperature"], state["top_p"], state["top_k"]
    logits = model.logits(hidden[:, 0])
    state["token"].copy_(sample_tokens(logits, keys, state["position"], *parameters, features))
    state["position"].add_(state["active"])
    # a finished row writes on in its last slot until the host gives it away
    cache.lengths.copy_((cache.lengths + state["active"]).clamp(max=cache.max_len - 1))


@functools.cache
def _compiled_step():
    import torch._dynamo.config as dynamo_config
    import torch._inductor.config as inductor_config

    # every batch size, cache size and model is a compilation of its own, and a sweep has many
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 64)
    # kernels chosen by rule, not by timing them on this run
    options = {"deterministic": True} if hasattr(inductor_config, "deterministic") else {}
    return torch.compile(_decode_step, fullgraph=True, dynamic=False, options=options)


class CachedRows:
    """B rows of a KVCache, their state on the device, and the step that moves them all."""

    def __init__(self, model, B: int, P: int, S: int, N: int, features, compiled: bool):
        self.model, self.device = model, model.lm_head.weight.device
        self.cuda, self.compiled = self.device.type == "cuda", compiled
        longest = model.config.max_position_embeddings
        self.bucket = 64 if self.cuda else 1
        P = min(-(-P // self.bucket) * self.bucket, longest)
        self.cache = KVCache(model, prefix_len=P, batch_size=B, max_len=S, n_prefixes=N)
        self.cache.filling = None
        self.lag, self.patience = LAG if self.cuda else 0, max(1, B // 16)
        self.slot_of, self.running = {}, [None] * B  # prompt index -> slot; sequence on the device
        self.row_prefix = np.zeros(B, dtype=np.int64)
        dtypes = dict.fromkeys(FIELDS, torch.int32) | {"token": torch.int64}
        dtypes |= {"temperature": torch.float32, "top_p": torch.float32}
        self.state = {n: torch.zeros(B, dtype=d, device=self.device) for n, d in dtypes.items()}
        self.state |= {"length": self.cache.lengths, "prefix": self.cache.row_prefix}
        self.fresh = torch.zeros(1 + len(FIELDS), B, dtype=torch.float64, device=self.device)
        # staging buffers of this step are free again once the step `lag` before it was looked at
        ring = range(self.lag + 2)
        pin = {"pin_memory": self.cuda}
        self.fresh_ring = [torch.zeros(self.fresh.shape, dtype=torch.float64, **pin) for _ in ring]
        tiles = self.cache.tiles
        self.tiles_ring = [torch.zeros(tiles.shape, dtype=tiles.dtype, **pin) for _ in ring]
        self.token_ring = [torch.zeros(B, dtype=torch.int64, **pin) for _ in ring]
        self.done = [torch.cuda.Event() for _ in ring] if self.cuda else None
        self.n_steps = 0
        step = _compiled_step() if compiled else _decode_step
        self._advance = lambda: step(model, self.cache, self.state, self.fresh, features)
        if self.cuda:
            self._capture()

    @torch.no_grad()
    def _capture(self):
        """The step as a CUDA graph. All rows are idle, so running it changes nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._advance()
        self._advance = self.graph.replay

    def admit(self, rows, waiting) -> None:
        """Give free rows (None) to waiting sequences; computes prompts not yet in the cache."""
        free = deque(i for i, sequence in enumerate(rows) if sequence is None)
        busy, prompts = len(free) < len(rows), []
        while free and waiting:
            prompt = waiting[0].prompt_index
            if prompt not in self.slot_of:
                if busy and not prompts and len(free) < self.patience:
                    break  # several prompts at once, or for several rows, cost little more than one
                slot = self._free_slot(rows, prompt)
                if slot is None:
                    break
                self.slot_of[prompt] = slot
                prompts.append((slot, waiting[0].prompt))
            rows[free.popleft()] = waiting.popleft()
        self._prefill([(slot, ids[:-1]) for slot, ids in prompts if len(ids) > 1])
        short = [slot for slot, ids in prompts if len(ids) == 1]
        if short:
            self.cache.fill(short, [0] * len(short))
            self.cache.filling = None

    def _free_slot(self, rows, prompt):
        used = {sequence.prompt_index for sequence in rows if sequence is not None} | {prompt}
        self.slot_of = {p: slot for p, slot in self.slot_of.items() if p in used}
        taken = set(self.slot_of.values())
        return next((i for i in range(len(self.cache.prefix_lengths)) if i not in taken), None)

    @torch.no_grad()
    def _prefill(self, prompts) -> None:
        """Keys and values of prompts [(slot, ids)], as many a call as PREFILL_TOKENS allow."""
        while prompts:
            n, T = 0, 0
            for _, ids in prompts:
                longer = max(T, -(-len(ids) // self.bucket) * self.bucket)
                if n and longer * (n + 1) > PREFILL_TOKENS:
                    break
                n, T = n + 1, min(longer, self.cache.prefix_len)
            part, prompts = prompts[:n], prompts[n:]
            padded = np.zeros((n, T), dtype=np.int64)
            for row, (_, ids) in zip(padded, part):
                row[: len(ids)] = ids
            self.cache.fill([slot for slot, _ in part], [len(ids) for _, ids in part])
            with attention_without_plans():
                self.model.hidden(torch.from_numpy(padded).to(self.device), cache=self.cache)

    def _stage(self, rows, i: int) -> None:
        """Send the device what changed: rows that start a sequence, and rows that became idle."""
        changed = [r for r, s in enumerate(rows) if s is not self.running[r]]
        if not changed:
            return
        fresh = self.fresh_ring[i].numpy()
        fresh[:] = 0
        before = self.row_prefix.copy()
        for r in changed:
            self.running[r] = s = rows[r]
            values = (0,) * (len(FIELDS) - 1)
            if s is not None:
                values = s.prompt[-1], 0, 0, *s.key, s.temperature, s.top_p, s.top_k, 1
                self.row_prefix[r] = self.slot_of[s.prompt_index]
            fresh[0, r], fresh[1:, r] = 1, (*values, self.row_prefix[r])
        self.fresh.copy_(self.fresh_ring[i], non_blocking=True)
        if (before != self.row_prefix).any():
            self.tiles_ring[i].copy_(self.cache.plan_tiles(self.row_prefix))
            self.cache.tiles.copy_(self.tiles_ring[i], non_blocking=True)

    @torch.no_grad()
    def step(self, rows) -> int:
        """Launch one step for these sequences; returns a ticket for `tokens`."""
        i = self.n_steps % len(self.token_ring)
        self._stage(rows, i)
        if not (self.cuda or self.compiled):  # read no more of the cache than is filled
            self.cache.span = 1 + max((s.launched for s in self.running if s), default=0)
        self._advance()
        self.token_ring[i].copy_(self.state["token"], non_blocking=True)
        if self.cuda:
            self.done[i].record()
        self.n_steps += 1
        return i

    def tokens(self, ticket: int) -> list[int]:
        """The tokens sampled by that step, waiting for it if it still runs."""
        if self.cuda:
            self.done[ticket].synchronize()
        return self.token_ring[ticket].tolist()


class PlainRows:
    """The same for a model without a cache: every step runs every row from its first token."""

    lag = 0

    def __init__(self, model, B: int, features):
        self.model, self.B, self.features = model, B, features
        self.device = next(model.parameters()).device
        self.result = None

    def admit(self, rows, waiting) -> None:
        for i, sequence in enumerate(rows):
            if sequence is None and waiting:
                rows[i] = waiting.popleft()

    @torch.no_grad()
    def step(self, rows) -> int:
        ids = [s.prompt + s.tokens if s else [0] for s in rows]
        padded = np.zeros((self.B, max(map(len, ids))), dtype=np.int64)
        for row, own in zip(padded, ids):
            row[: len(own)] = own
        hidden = self.model.hidden(torch.from_numpy(padded).to(self.device))
        last = torch.tensor([len(own) - 1 for own in ids], device=self.device)
        logits = self.model.logits(hidden[torch.arange(self.B, device=self.device), last])

        def column(values, dtype):
            return torch.tensor([v(s) if s else 0 for s in rows for v in values], dtype=dtype)

        keys = column((lambda s: s.key[0], lambda s: s.key[1]), torch.int32).view(-1, 2)
        position = column((lambda s: len(s.tokens),), torch.int32)
        temperature = column((lambda s: s.temperature,), torch.float32)
        top_p = column((lambda s: s.top_p,), torch.float32)
        top_k = column((lambda s: s.top_k,), torch.int32)
        vectors = (x.to(self.device) for x in (keys, position, temperature, top_p, top_k))
        self.result = sample_tokens(logits, *vectors, self.features)
        return 0

    def tokens(self, ticket: int) -> list[int]:
        return self.result.tolist()


def _run_unit(rows, n_rows: int, sequences, endings: Endings, bump) -> Iterator[Sample]:
    """All sequences of a unit through the rows. Which row starts what and when follows from the
    tokens alone: the host always looks exactly `lag` steps back, however fast the device is."""
    waiting, at, flight = deque(sequences), [None] * n_rows, deque()
    while True:
        rows.admit(at, waiting)
        if any(at):
            flight.append((rows.step(at), list(at)))
            for i, sequence in enumerate(at):
                if sequence is not None:
                    sequence.launched += 1
                    if sequence.launched == sequence.limit:  # its last token is on its way
                        at[i] = None
            bump()
            if len(flight) <= rows.lag:
                continue
        elif not flight:
            return
        ticket, occupants = flight.popleft()
        for i, (sequence, token) in enumerate(zip(occupants, rows.tokens(ticket))):
            if sequence is None or sequence.reason is not None:
                continue
            if endings.add(sequence, token):
                if at[i] is sequence:
                    at[i] = None
                yield endings.sample(sequence)


# ---------------------------------------------------------------------------------------------
# The whole job


def generate(
    model,
    prompts: list[list[int]],
    *,
    tokenizer=None,
    n_samples: int = 1,
    max_new_tokens=256,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    stop=(),
    eos_ids=(),
    seed: int = 0,
    keys=None,
    done=frozenset(),
    batch_size: int | None = None,
    units: list | None = None,
    compile: bool | str = "auto",
    dist=None,
) -> Iterator[Sample]:
    """Yield this rank's Samples, each when it is finished (so in no fixed order).

    prompts: token ids, at least one each. n_samples of each; max_new_tokens, temperature (0: the
    likeliest token), top_p (1: off) and top_k (0: off) are one value, one a prompt [n], or one a
    sample [n, n_samples]. stop: strings that end a text, found with `tokenizer` also across tokens;
    eos_ids: tokens that end a sequence. keys: what names each prompt in the random streams, its
    index unless given. done: (prompt_index, sample_index) pairs not wanted again. units: lists of
    prompt indices instead of plan_units'; with `dist` they are dealt round-robin. compile: the
    decode step through torch.compile; "auto" where the whole job is worth it, on CUDA only.
    A model with `supports_cache` False runs without a cache. Raises ValueError for parameters out
    of range and for a prompt beyond the context; a sequence that reaches its end finishes there.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    longest = getattr(model, "max_positions", longest)  # of a model that transformers runs
    _check_prompts(prompts, longest, keys, stop, tokenizer)
    shape = (len(prompts), n_samples)
    values = _parameters(shape, max_new_tokens, temperature, top_p, top_k)
    if not prompts:
        return iter(())
    limits = np.array([[len(p)] for p in prompts])
    limits = (
        values["max_new_tokens"]
        if longest is None
        else np.minimum(values["max_new_tokens"], longest + 1 - limits)
    )
    if batch_size is None:
        batch_size = default_batch_size(model, max(map(len, prompts)), int(limits.max()))
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, not {batch_size}")
    units = plan_units(len(prompts), n_samples, batch_size) if units is None else units
    B = min(batch_size, n_samples * max(map(len, units)))
    features = _features(values)
    endings = Endings(tokenizer, stop, eos_ids)

    def sequences(unit):
        for p in unit:
            for s in range(n_samples):
                if (p, s) not in done:
                    key = stream_key(seed, p if keys is None else keys[p], s)
                    own = (values[name][p, s].item() for name in ("temperature", "top_p", "top_k"))
                    yield Sequence(p, s, list(prompts[p]), int(limits[p, s]), *own, key)

    def stream():
        if getattr(model, "supports_cache", True):
            N = min(B, -(-2 * B // n_samples) + 6)  # prompts alive at once, stragglers' included
            cuda = model.lm_head.weight.is_cuda
            worthwhile = cuda and limits.sum() / B >= COMPILE_STEPS
            compiled = worthwhile if compile == "auto" else bool(compile)
            P, S = max(map(len, prompts)) - 1, int(limits.max())
            rows = CachedRows(model, B, P, S, N, features, compiled)
        else:
            rows = PlainRows(model, B, features)
        bump = dist.bump if dist else lambda: None
        for u in dist.shard(len(units)) if dist else range(len(units)):
            yield from _run_unit(rows, B, sequences(units[u]), endings, bump)

    return stream()


def _check_prompts(prompts, longest, keys, stop, tokenizer) -> None:
    for i, prompt in enumerate(prompts):
        name = f"prompt {i}" if keys is None else f"prompt {keys[i]}"
        if len(prompt) == 0:
            raise ValueError(f"{name} has no tokens: start it with a BOS or end-of-text token")
        if longest is not None and len(prompt) > longest:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, more than the model's context of {longest}; "
                "shorten it"
            )
    if keys is not None and len(set(map(str, keys))) != len(prompts):
        raise ValueError(f"keys must name each of {len(prompts)} prompts once")
    if stop and tokenizer is None:
        raise ValueError("stop strings are found in text: pass a tokenizer")
    if any(not s for s in stop):
        raise ValueError("an empty stop string would end every text at once")


def _parameters(shape, max_new_tokens, temperature, top_p, top_k) -> dict[str, np.ndarray]:
    """Each as [prompts, samples]."""
    given = {
        "max_new_tokens": (max_new_tokens, np.int64, lambda x: x >= 1, "at least 1"),
        "temperature": (temperature, np.float64, lambda x: (x >= 0) & (x < np.inf), "0 or more"),
        "top_p": (top_p, np.float64, lambda x: (x > 0) & (x <= 1), "above 0 and at most 1"),
        "top_k": (top_k, np.int64, lambda x: x >= 0, "0 (off) or more"),
    }
    if shape[1] < 1:
        raise ValueError(f"n_samples must be at least 1, not {shape[1]}")
    result = {}
    for name, (value, dtype, allowed, wanted) in given.items():
        array = np.asarray(value, dtype=dtype)
        array = array[:, None] if array.ndim == 1 else array
        if not allowed(array).all():
            raise ValueError(f"{name} must be {wanted}, not {array[~allowed(array)].flat[0]}")
        result[name] = np.broadcast_to(array, shape)
    return result


def _features(values) -> frozenset:
    """What sampling any sequence of the whole job needs: see sample_tokens."""
    noisy = values["temperature"] > 0
    used = {"n": noisy, "k": noisy & (values["top_k"] > 0), "p": noisy & (values["top_p"] < 1)}
    return frozenset(name for name, where in used.items() if where.any())


_generate = generate


def generate(model, prompts, sampling, **options):
    s = sampling
    return _generate(
        model,
        prompts,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        stop=s.stop,
        seed=s.seed,
        **options,
    )

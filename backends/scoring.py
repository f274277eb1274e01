"""Log-likelihoods of tokens, without ever holding the logits of a whole batch.

    totals = score_windows(model, stream, windows, batch_size=8, dist=dist, ...)
    totals.loss, totals.perplexity, totals.bits_per_byte

Hidden states go through the LM head in chunks, straight to the target's log-probability. Losses are
kept by (window, file, ordinary or special token) as float64 sums with their token and byte counts,
so any mean over files, windows or bytes can be formed afterwards without approximation.
"""

import itertools
import math
import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from costs import gpus
from costs.formulas import CHUNK_TOKENS
from distributed import print0
from gpu_kernels.cross_entropy import IGNORE
from model import KVCache, attention_without_plans

# ---------------------------------------------------------------------------------------------
# Tokens


def token_nll(model, hidden, targets):
    """Negative log-likelihood [N], nats, float32, of targets [N] after hidden [N, C]; 0 at -100.

    The logits of CHUNK_TOKENS rows are alive at a time.
    """
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS))
    return torch.cat([model.nll(h, t) for h, t in chunks])


def choice_logprobs(model, hidden, choice_ids):
    """Log-probabilities [B, K], float32, over the vocabulary, of K tokens after hidden [B, C]."""
    logits = model.logits(hidden).float()
    return logits[:, choice_ids] - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def compute_perplexity(model, dataloader, device) -> dict:
    """rosetrainer's function: loss and perplexity over a DataLoader of rosetrainer-style items.

    Each batch has `input_ids` [B, T], `labels` [B, T] (shifted here; -100 left out) and, if padded,
    `attention_mask` [B, T] (0 left out). Returns avg_loss (nats per scored token), ppl and tokens.
    """
    nll, tokens = 0.0, 0
    for batch in dataloader:
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"].to(device) == 0, IGNORE)
        targets = torch.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        losses = token_nll(model, model.hidden(ids).flatten(0, 1), targets.flatten())
        nll += losses.double().sum()
        tokens += (targets != IGNORE).sum()
    if not int(tokens):
        raise ValueError("the data has no token to score: a window needs at least two tokens")
    loss = float(nll) / int(tokens)
    return {"avg_loss": loss, "ppl": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


# ---------------------------------------------------------------------------------------------
# Compiled or eager. Decided from the whole job, so that every rank and every world size agree


def should_compile(mode: str, device: torch.device, config, n_tokens: int) -> bool:
    """True if torch.compile pays for itself over n_tokens of scoring.

    What compiling saves is memory traffic between layers, in proportion to layers x width; what it
    costs was measured as COMPILE_SECONDS, nearly the same for every size since all blocks share
    one compilation.
    """
    if mode != "auto" or config is None:
        return mode == "on" and config is not None
    saved = n_tokens * config.n_layers * config.d_model * SAVED_SECONDS_PER_UNIT
    return device.type == "cuda" and saved > COMPILE_SECONDS


SAVED_SECONDS_PER_UNIT = 4e-11  # a token, a layer, a channel: H200, bfloat16, 124M to 7B
COMPILE_SECONDS = 8.0


def inductor_options() -> dict:
    """Kernels chosen by rule: left alone, inductor picks reductions by timing them, so that two
    processes, and with them two world sizes, could sum in another order."""
    import torch._inductor.config as inductor  # half of the start-up, needed to compile only

    options = {"triton.autotune_pointwise": False}
    return options | ({"deterministic": True} if hasattr(inductor, "deterministic") else {})


def nll_function(model, compiled: bool):
    """f(input_ids [B, T], targets [B, T]) -> nats [B, T] float32.

    Compiled block by block: all layers share one compilation of seconds, and the whole model's,
    of up to half a minute, is no faster (H200: 124M 1% faster, XL 1%, 7B 2% slower).
    """
    for block in model.blocks if model.is_native else ():
        block._compiled_call_impl = None  # whoever scored with this model before
        if compiled:
            block.compile(dynamic=False, options=inductor_options())

    def nll(input_ids, targets):
        hidden = model.hidden(input_ids).flatten(0, 1)
        return token_nll(model, hidden, targets.flatten()).view_as(targets)

    return nll


# ---------------------------------------------------------------------------------------------
# Windows


@dataclass(frozen=True)
class WindowTotals:
    """Sums by entry. An entry is one (window, file, special or not): arrays of equal length.

    nll: nats, float64. tokens, bytes: int64. window, file: int64. special: bool.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    window: np.ndarray
    file: np.ndarray
    special: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per scored token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the scored text; special tokens have no bytes and stay out."""
        n_bytes = self.bytes.sum()
        nats = self.nll[~self.special].sum()
        return float(nats / math.log(2) / n_bytes) if n_bytes else None

    def by_window(self) -> tuple[np.ndarray, np.ndarray]:
        """(nats, tokens) of every window."""
        n = int(self.window.max()) + 1
        return np.bincount(self.window, self.nll, n), np.bincount(self.window, self.tokens, n)

    def of_file(self, index: int) -> "WindowTotals":
        keep = self.file == index
        return WindowTotals(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


class WindowLayout:
    """Where the sums of each window go: a window that touches F files has 2F entries, in order of
    file, ordinary before special tokens. Known from the file boundaries alone."""

    def __init__(self, stream, windows):
        self.windows, self.file_starts = windows, np.asarray(stream.file_starts)
        first, last = windows.target_span(np.arange(len(windows)))  # stream positions, inclusive
        self.first_file = self._file_of(first)
        self.n_files = self._file_of(last) - self.first_file + 1
        self.offset = np.concatenate(([0], np.cumsum(2 * self.n_files)))
        self.n_entries = int(self.offset[-1])

    def _file_of(self, position):
        return np.searchsorted(self.file_starts[1:-1], position, side="right")

    def of_batch(self, ids, first_target, T):
        """(slots [B, F, 2] into the entries, file offset of each target [B, T]; None if F is 1).

        Slots beyond a window's own entries, and those of dummy rows (id -1), are one past the end.
        """
        real = ids >= 0
        n_files = np.where(real, self.n_files[ids], 0)
        F = max(int(n_files.max()), 1)
        j = np.arange(2 * F)
        slots = np.where(j < 2 * n_files[:, None], self.offset[ids][:, None] + j, self.n_entries)
        if F == 1:
            return slots.reshape(-1, F, 2), None
        positions = np.asarray(first_target)[:, None] + np.arange(T)
        offsets = self._file_of(positions) - self.first_file[ids][:, None]
        return slots.reshape(-1, F, 2), np.clip(offsets, 0, F - 1)

    def describe(self):
        """(window, file, special) of every entry."""
        n = self.n_files
        window = np.repeat(np.arange(len(n)), 2 * n)
        index = np.arange(self.n_entries) - self.offset[window]
        return window, self.first_file[window] + index // 2, index % 2 == 1


def batch_sums(nll, targets, file_offset, n_files, special, token_bytes):
    """[B, F, 2, 3] float64: nats, tokens and bytes of each row by file and ordinary/special.

    nll, targets [B, T]; special [V] bool; token_bytes [V]. Whole counts are exact in float64.
    """
    scored = targets != IGNORE
    ids = targets.clamp(min=0)
    is_special = special[ids]
    values = torch.stack((nll.double(), scored.double(), token_bytes[ids].double()))  # [3, B, T]
    sums = []
    for f in range(n_files):
        inside = scored if file_offset is None else scored & (file_offset == f)
        for kind in (inside & ~is_special, inside & is_special):
            sums.append((values * kind).sum(-1))  # [3, B]
    return torch.stack(sums).permute(2, 0, 1).unflatten(1, (n_files, 2))


@torch.no_grad()
def score_windows(
    nll_fn, stream, windows, batch_size, dist, token_bytes, special, progress=None
) -> WindowTotals:
    """Score every window once and return the sums of all ranks, the same bits on any number.

    nll_fn: from nll_function. stream, windows: dataset.py's. token_bytes [V] int, special [V] bool:
    by token id. Batch b holds windows b*batch_size.. whatever the world size; the last one is
    filled up with dummy rows, so that shapes never change.
    """
    layout = WindowLayout(stream, windows)
    n_batches = -(-len(windows) // batch_size)
    totals = torch.zeros(layout.n_entries + 1, 3, dtype=torch.float64, device=dist.device)
    token_bytes = torch.as_tensor(token_bytes, device=dist.device)
    special = torch.as_tensor(special, device=dist.device)

    def make(b):
        ids = np.arange(b * batch_size, (b + 1) * batch_size)
        ids[ids >= len(windows)] = -1
        batch = windows.batch(stream, ids)
        slots, offsets = layout.of_batch(ids, batch["first_target"], batch["targets"].shape[1])
        return batch["input_ids"], batch["targets"], slots, offsets

    def run():
        for input_ids, targets, slots, offsets in prefetch(
            make, dist.shard(n_batches), dist.device
        ):
            nll = nll_fn(input_ids, targets)
            sums = batch_sums(nll, targets, offsets, slots.shape[1], special, token_bytes)
            totals[slots.flatten()] = sums.flatten(0, 2)
            dist.bump()
            if progress is not None:
                progress.update(min(dist.world_size, n_batches - progress.n))

    agree_on_memory(run, dist)
    totals = dist.sum(totals[:-1].contiguous())
    counts = np.rint(totals[:, 1:]).astype(np.int64)
    nll = totals[:, 0]
    return WindowTotals(nll, counts[:, 0], counts[:, 1], *layout.describe())


class BatchTooLarge(Exception):
    """Some rank ran out of memory; raised on all ranks alike, so that all can take less at once."""


def agree_on_memory(run, dist) -> None:
    """run(), then one word from every rank: BatchTooLarge on all if any ran out of memory."""
    try:
        run()
        enough = True
    except torch.OutOfMemoryError:
        enough = False
    if not all(dist.gather(enough)):
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BatchTooLarge


def halve_until_it_fits(score, batch_size: int):
    """(score(b), b) for the first b of batch_size, batch_size // 2, … that memory holds.

    Batches of another size may round differently, so the size belongs in the record.
    """
    while True:
        try:
            return score(batch_size), batch_size
        except BatchTooLarge:
            if batch_size == 1:
                raise ValueError(
                    "out of memory with a batch of one: shorter sequences or a smaller --dtype help"
                ) from None
            batch_size //= 2
            print0(f"out of memory: going on with a batch of {batch_size}")


def device_cost(dist, flops: float | None, seconds: float) -> dict:
    """The part of a record's cost that the device knows: its name, the highest peak of memory on
    any rank, and the model FLOPs utilisation of `flops` done by all ranks in `seconds`."""
    cost = {"world_size": dist.world_size, "gpu": None, "peak_memory_bytes": None, "mfu": None}
    if dist.device.type == "cuda":
        cost["gpu"] = torch.cuda.get_device_name(dist.device)
        cost["peak_memory_bytes"] = max(dist.gather(torch.cuda.max_memory_allocated(dist.device)))
        gpu = gpus.find_gpu(cost["gpu"])
        if gpu is not None and flops is not None:
            cost["mfu"] = gpus.mfu(flops, seconds, dist.world_size, gpu)
    return cost


def prefetch(make, indices, device, depth=4):
    """Yield make(i) for each index, arrays made in a background thread, pinned and on `device`."""
    ready, stop = queue.Queue(depth), threading.Event()
    pin = device.type == "cuda"

    def to_tensor(array):
        if array is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if pin else tensor

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def produce():
        try:
            if pin:  # a new thread is on GPU 0, where pinning would open a context for every rank
                torch.cuda.set_device(device)
            for i in indices:
                put([to_tensor(array) for array in make(i)])
                if stop.is_set():
                    return
            put(None)
        except Exception as error:  # an unreadable shard: raised where the batches are used
            put(error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield [t if t is None else t.to(device, non_blocking=True) for t in item]
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------------------------------------
# Continuations of shared prefixes: multiple-choice questions after their few-shot examples

MIN_PREFIX = 32  # a shorter shared prefix saves less than merging two attentions costs
HEAD_ROWS = 2048  # rows of [V] logits alive at once


@dataclass(frozen=True)
class Continuations:
    """R rows of tokens, each going on from one of a few shared prefixes.

    prefixes: token ids [P] of each, possibly none. prefix [R]: which one a row goes on from.
    ids: each row's own tokens [T], at least one. targets: the tokens [S] scored after the last S
    positions of the row; all S are 0 where only choices are asked for. choice_ids [K]: tokens
    scored after the last position of every row, or None.
    """

    prefixes: list
    prefix: np.ndarray
    ids: list
    targets: list
    choice_ids: list | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @property
    def target_offsets(self) -> np.ndarray:
        """[R + 1]: where each row's targets lie among all of them."""
        return np.cumsum([0, *map(len, self.targets)])

    def unique_tokens(self) -> int:
        used = np.unique(self.prefix)
        return int(self.lengths.sum()) + sum(len(self.prefixes[g]) for g in used)


@dataclass(frozen=True)
class Batch:
    """Rows [B] of one prefix, right-padded to `length` tokens; `overhead`: see batch_overhead."""

    prefix: int
    rows: np.ndarray
    length: int
    overhead: int

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.length


def batch_overhead(model, device) -> int:
    """How many tokens one more batch costs, launches and half-filled kernels, next to padding.

    A block's launches take 0.2 ms or so, in which a GPU at 200 TFLOP/s gets through 2e10 weights.
    """
    if device.type == "cpu" or not model.is_native:
        return 128
    weights = sum(p.numel() for p in model.blocks[0].parameters())
    return int(min(max(2e10 / weights, 512), 8192))


def plan_batches(rows: Continuations, max_tokens: int, max_rows=None, overhead=512) -> list[Batch]:
    """Batches of at most max_tokens padded tokens, prefix by prefix, longest rows first.

    Lengths are padded to a multiple of 8, never beyond the prefix's longest row, so that padding
    has positions wherever that row has. Which lengths share a batch minimises padding plus
    `overhead` tokens a batch. The result depends on the rows alone, never on the world size.
    """
    lengths = rows.lengths
    padded = -(-lengths // 8) * 8
    batches = []
    for g in range(len(rows.prefixes)):
        members = np.flatnonzero(rows.prefix == g)
        members = members[np.lexsort((members, -lengths[members]))]
        if not len(members):
            continue
        padded[members] = np.minimum(padded[members], lengths[members].max())
        for start, stop in _length_classes(padded[members], max_tokens, overhead):
            T = int(padded[members[start]])
            most = min(max(max_tokens // T, 1), max_rows or len(members))
            n_batches = -(-(stop - start) // most)
            for part in np.array_split(members[start:stop], n_batches):
                batches.append(Batch(g, part, T, overhead))
    return batches


def _length_classes(lengths, max_tokens, overhead):
    """Cut descending lengths [n] into runs padded to their first, at the least total cost."""
    starts = np.flatnonzero(np.diff(lengths, prepend=-1)).tolist()  # of each distinct length
    ends = [*starts[1:], len(lengths)]
    best = [(0, None)]  # cost of the first j distinct lengths, and where their last run starts
    for j, end in enumerate(ends):
        options = []
        for i in range(j + 1):
            tokens = (end - starts[i]) * int(lengths[starts[i]])
            cost = tokens + overhead * -(-tokens // max_tokens)
            options.append((best[i][0] + cost, i))
        best.append(min(options))
    runs, j = [], len(ends)
    while j:
        i = best[j][1]
        runs.append((starts[i], ends[j - 1]))
        j = i
    return runs[::-1]


def deal_batches(rows: Continuations, batches: list[Batch], world_size: int) -> list[range]:
    """One contiguous run of batches for each rank, the largest run's cost being the least possible.

    Contiguous, so that at most world_size - 1 prefixes are computed twice; a prefix's batches give
    the same values wherever they run.
    """
    costs = [batch.tokens + batch.overhead for batch in batches]
    prefix_costs = [len(rows.prefixes[batch.prefix]) + batch.overhead for batch in batches]

    def cut(capacity):
        """Where runs of at most `capacity` start, each as long as can be."""
        starts, load = [], capacity + 1
        for i, cost in enumerate(costs):
            new_prefix = i == 0 or batches[i].prefix != batches[i - 1].prefix
            load += cost + prefix_costs[i] * new_prefix
            if load > capacity:
                starts.append(i)
                load = cost + prefix_costs[i]
        return starts

    low = max((a + b for a, b in zip(costs, prefix_costs)), default=0)
    high = sum(costs) + sum(prefix_costs)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= world_size:
            high = middle
        else:
            low = middle + 1
    starts = cut(low)
    starts += [len(batches)] * (world_size + 1 - len(starts))
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def make_prefix_cache(model, prefix, device):
    """A KVCache that holds `prefix` (token ids [P]) for any number of rows; None if P is 0."""
    if len(prefix) == 0:
        return None
    cache = KVCache(model, prefix_len=len(prefix))
    model.hidden(torch.as_tensor(np.asarray(prefix, np.int64), device=device)[None], cache=cache)
    return cache


def pad_rows(rows: Continuations, batch: Batch):
    """input_ids [B, T] right-padded with 0, and the row lengths [B]."""
    ids = np.zeros((len(batch.rows), batch.length), dtype=np.int64)
    for i, r in enumerate(batch.rows):
        ids[i, : len(rows.ids[r])] = rows.ids[r]
    return ids, np.array([len(rows.ids[r]) for r in batch.rows], dtype=np.int64)


def _pack(rows: Continuations, batch: Batch, offsets):
    """What a batch needs on the device: input_ids [B, T], the last position of each row in B*T,
    row ids [B], and for all targets: position in B*T, token, slot in the result."""
    ids, lengths = pad_rows(rows, batch)
    ends = np.arange(len(lengths)) * batch.length + lengths
    counts = [len(rows.targets[r]) for r in batch.rows]
    positions = [np.arange(end - n, end) for end, n in zip(ends, counts)]
    slots = [np.arange(offsets[r], offsets[r] + n) for r, n in zip(batch.rows, counts)]
    targets = np.concatenate([np.asarray(rows.targets[r], np.int64) for r in batch.rows])
    return ids, ends - 1, batch.rows, np.concatenate(positions), targets, np.concatenate(slots)


@torch.no_grad()
def score_continuations(model, rows: Continuations, batches, dist, progress=None):
    """(choices [R, K], targets [R]): log-probabilities in nats, float64, over the full vocabulary.

    targets: summed over each row's scored tokens. Every rank returns everything, and the same bits
    on any number of ranks: a batch is the same wherever it runs. Only scored positions meet the
    head. One prefix is computed once (per rank that has batches of it) and shared by its rows.
    Raises BatchTooLarge on every rank if any runs out of memory.
    """
    device, K = dist.device, len(rows.choice_ids or ())
    choice_ids = torch.tensor(rows.choice_ids or [], dtype=torch.int64, device=device)
    offsets = rows.target_offsets
    choices = torch.zeros(len(rows.ids), K, dtype=torch.float64, device=device)
    scored = torch.zeros(int(offsets[-1]), dtype=torch.float64, device=device)
    mine = deal_batches(rows, batches, dist.world_size)[dist.rank]

    def score_mine():
        prefix, cache = None, None
        packed = prefetch(lambda i: _pack(rows, batches[i], offsets), mine, device)
        for i, (ids, last, row_ids, positions, targets, slots) in zip(mine, packed):
            if batches[i].prefix != prefix:
                prefix = batches[i].prefix
                cache = make_prefix_cache(model, rows.prefixes[prefix], device)
            hidden = model.hidden(ids, cache=cache).flatten(0, 1)
            if K:
                parts = hidden[last].split(HEAD_ROWS)
                values = [choice_logprobs(model, part, choice_ids) for part in parts]
                choices[row_ids] = torch.cat(values).double()
            if len(slots):
                scored[slots] = -token_nll(model, hidden[positions], targets).double()
            dist.bump()
            if progress is not None:
                progress.update(min(len(row_ids) * dist.world_size, progress.total - progress.n))

    with attention_without_plans():
        agree_on_memory(score_mine, dist)
    summed = dist.sum(torch.cat((choices.flatten(), scored)))
    choices = summed[: choices.numel()].reshape(len(rows.ids), K)
    scored = summed[choices.size :]
    row_of_target = np.repeat(np.arange(len(rows.ids)), np.diff(offsets))
    return choices, np.bincount(row_of_target, scored, len(rows.ids))

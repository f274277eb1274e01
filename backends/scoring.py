"""Log-likelihoods of tokens, without ever holding the logits of a whole batch.

    totals = score_windows(model, stream, windows, batch_size=8, dist=dist, ...)
    totals.loss, totals.perplexity, totals.bits_per_byte

Hidden states go through the LM head in chunks, straight to the target's log-probability. Losses are
kept by (window, file, ordinary or special token) as float64 sums with their token and byte counts,
so any mean over files, windows or bytes can be formed afterwards without approximation.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from costs.symbols import CHUNK_TOKENS
from gpu_kernels.cross_entropy import IGNORE
from model import HEAD_ROWS, GPTModel, inductor_options
from transformers_model import Model

if TYPE_CHECKING:
    from tqdm import tqdm

    from backends import AnyWindows, Facts
    from dataset import TokenStream
    from distributed import Dist

# ---------------------------------------------------------------------------------------------
# Tokens


# What sees logits: called with logits [N, V], their targets [N], and the targets' places [N]
Consumer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
# What makes one, whenever all begins anew: what others saw until then counts no more, for it may be
# dealt to another rank now, and would be in the sums twice
Consumers = Callable[[], Consumer]
# What keeps final hidden states: called with those of a batch [B, T, C], targets and window_ids
StatesConsumer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
# (input_ids [B, T], targets [B, T], window_ids [B] or None; where no token is to see another
# document than its own: starts [B, T], see GPTModel.within_documents) -> nats [B, T], or None where
# another rank has them (backends/parallel.py)
NllFunction = Callable[..., torch.Tensor | None]


def token_nll(model: Model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [N], nats, float32, of targets [N] after hidden [N, C]; 0 at -100.

    The logits of CHUNK_TOKENS rows are alive at a time.
    """
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS))
    return torch.cat([model.nll(h, t) for h, t in chunks])


# ---------------------------------------------------------------------------------------------
# The loss of each token, compiled or eager


def compile_blocks(model: GPTModel, compiled: bool) -> None:
    """Compile each block, or leave it as it was written: what was compiled before is forgotten."""
    for block in [model.blocks[layer] for layer in model.layers]:
        block._compiled_call_impl = None
        if compiled:
            block.compile(dynamic=False, options=inductor_options())


def nll_function(
    model: Model,
    compiled: bool,
    consumer: Consumer | None = None,
    keep_states: StatesConsumer | None = None,
) -> NllFunction:
    """An NllFunction of the model, nats in float32.

    Compiled block by block: all layers share one compilation of seconds, and the whole model's,
    of up to half a minute, is no faster (H200: 124M 1% faster, XL 1%, 7B 2% slower).
    consumer: called with the logits [N, V] of each scored position, exact (model.logits), the
    targets [N] and their places [N], window * T + column, in chunks of at most HEAD_ROWS.
    keep_states: called once a batch with hidden [B, T, C], what `model.logits` takes, and with
    targets and window_ids as above; -1 is no window.
    """
    if model.is_native:
        compile_blocks(model, compiled)

    def nll(input_ids, targets, window_ids=None, starts=None):
        terms = {} if starts is None else model.within_documents(starts)
        hidden = model.hidden(input_ids, **terms)
        if hidden is None:
            return None
        if keep_states is not None and window_ids is not None:
            keep_states(hidden, targets, window_ids)
        hidden = hidden.flatten(0, 1)
        if consumer is not None and window_ids is not None:
            _hand_on_logits(model, hidden, targets, window_ids, consumer)
        return token_nll(model, hidden, targets.flatten()).view_as(targets)

    return nll


def _hand_on_logits(model, hidden, targets, window_ids, consumer) -> None:
    T = targets.shape[1]
    places = window_ids[:, None] * T + torch.arange(T, device=targets.device)
    scored = (targets != IGNORE).flatten()
    rows = hidden[scored], targets.flatten()[scored], places.flatten()[scored]
    for h, t, place in zip(*(x.split(HEAD_ROWS) for x in rows)):
        consumer(model.logits(h, exact=True), t, place)


# ---------------------------------------------------------------------------------------------
# Windows


@dataclass(frozen=True)
class WindowTotals:
    """Sums by entry. An entry is one (window, file, special or not): arrays of equal length.

    nll: nats, float64. tokens, bytes: int64. window, file: int64. special: bool.
    token_nll [windows, T], float64: of every target, 0 where not scored; None unless asked for.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    window: np.ndarray
    file: np.ndarray
    special: np.ndarray
    token_nll: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums by entry, by name."""
        return {name: getattr(self, name) for name in ENTRY}

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

    def of_text(self) -> dict[str, np.ndarray]:
        """Nats and bytes of every window without its special tokens, which have no bytes."""
        n, keep = int(self.window.max()) + 1, ~self.special
        values = {"text_nll": self.nll, "text_bytes": self.bytes}
        return {k: np.bincount(self.window[keep], v[keep], n) for k, v in values.items()}

    def of_file(self, index: int) -> "WindowTotals":
        keep = self.file == index
        return WindowTotals(**{name: array[keep] for name, array in self.arrays().items()})


ENTRY = ("nll", "tokens", "bytes", "window", "file", "special")


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

    def of_batch(
        self, ids: np.ndarray, first_target: np.ndarray, T: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
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

    def describe(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(window, file, special) of every entry."""
        n = self.n_files
        window = np.repeat(np.arange(len(n)), 2 * n)
        index = np.arange(self.n_entries) - self.offset[window]
        return window, self.first_file[window] + index // 2, index % 2 == 1


def batch_sums(
    nll: torch.Tensor,
    targets: torch.Tensor,
    file_offset: torch.Tensor | None,
    n_files: int,
    special: torch.Tensor,
    token_bytes: torch.Tensor,
) -> torch.Tensor:
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
    nll_fn: NllFunction,
    stream: "TokenStream",
    windows: "AnyWindows",
    batch_size: int,
    dist: "Dist",
    token_bytes: np.ndarray | torch.Tensor,
    special: np.ndarray | torch.Tensor,
    progress: "tqdm | None" = None,
    per_token: bool = False,
) -> WindowTotals:
    """Score every window once and return the sums of all ranks, the same bits on any number.

    nll_fn: from nll_function. stream, windows: dataset.py's. token_bytes [V] int, special [V] bool:
    by token id. per_token: keep every target's nats as well. Batch b holds windows b*batch_size..
    whatever the world size; the last one is filled up with dummy rows, so that shapes never change.
    """
    layout = WindowLayout(stream, windows)
    n_batches = -(-len(windows) // batch_size)
    totals = torch.zeros(layout.n_entries + 1, 3, dtype=torch.float64, device=dist.device)
    # dummy rows (id -1) end up in a last row of their own
    shape = (len(windows) + 1, windows.seq_len) if per_token else (0, 0)
    tokens = torch.zeros(shape, dtype=torch.float64, device=dist.device)
    token_bytes = torch.as_tensor(token_bytes, device=dist.device)
    special = torch.as_tensor(special, device=dist.device)

    def make(b):
        ids = np.arange(b * batch_size, (b + 1) * batch_size)
        ids[ids >= len(windows)] = -1
        batch = windows.batch(stream, ids)
        slots, offsets = layout.of_batch(ids, batch["first_target"], batch["targets"].shape[1])
        return batch["input_ids"], batch["targets"], slots, offsets, ids, batch.get("starts")

    def score(input_ids, targets, slots, offsets, ids, starts):
        nll = nll_fn(input_ids, targets, ids, *([] if starts is None else [starts]))
        if nll is None:
            return
        sums = batch_sums(nll, targets, offsets, slots.shape[1], special, token_bytes)
        totals[slots.flatten()] = sums.flatten(0, 2)
        if per_token:
            tokens[ids] = nll.double()

    def run():
        for batch in prefetch(make, dist.shard(n_batches), dist.device):
            dist.attempt(score, *batch)
            dist.bump()
            if progress is not None:
                progress.update(min(dist.n_groups, n_batches - progress.n))

    agree_on_memory(run, dist)
    sums = dist.sum(totals[:-1].contiguous())
    counts = np.rint(sums[:, 1:]).astype(np.int64)
    every = dist.sum(tokens[:-1].contiguous()) if per_token else None
    return WindowTotals(sums[:, 0], counts[:, 0], counts[:, 1], *layout.describe(), every)


def bytes_of_tokens(facts: "Facts") -> tuple[np.ndarray, np.ndarray]:
    """(bytes of text [V] int64, special or not [V] bool) by token id; zeros without a tokenizer."""
    V, tokenizer = facts.vocab_size, facts.tokenizer
    n_bytes, special = np.zeros(V, dtype=np.int64), np.zeros(V, dtype=bool)
    if tokenizer is not None:
        known = tokenizer.token_bytes()[:V]
        n_bytes[: len(known)] = known
        special[[i for i in tokenizer.special_ids if i < V]] = True
    return n_bytes, special


class BatchTooLarge(Exception):
    """Some rank ran out of memory; raised on all ranks alike, so that all can take less at once."""


def agree_on_memory(run: Callable[[], object], dist: "Dist") -> None:
    """run(), then one word from every rank: BatchTooLarge on all if any ran out of memory."""
    try:
        run()
        enough = dist.pipe is None or dist.pipe.settle()
    except torch.OutOfMemoryError:
        if dist.pipe is not None:  # others of its group wait for what it will not send
            raise
        enough = False
    if not all(dist.gather(enough)):
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BatchTooLarge


def prefetch(
    make: Callable[[int], Iterable[np.ndarray | None]],
    indices: Iterable[int],
    device: torch.device,
    depth: int = 4,
) -> Iterator[Sequence[torch.Tensor | Any]]:
    """Yield make(i) for each index, arrays made in a background thread, pinned and on `device`.

    A None stays None (`| Any`: who makes none need not ask)."""
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

"""Rows of many prefixes laid end to end, in passes of one size: where attention takes them so.

    if strips.apply(model, rows, dist):
        portions = plan_strips(rows, max_tokens=32768)      # the same for any number of ranks
        scores = continuations.score_continuations(model, rows, portions, dist)

Next to padded batches of one prefix (continuations.plan_batches) nothing is padded but the end of a
strip, prefixes are run many at a time, and nearly all passes have one shape: their products are
large, their kernels few, and memory is asked for once. A section's prefixes are run first, end to
end as well; then strips of the rows that go on from any of them. A row sees what is before it in
its own prefix and in itself, in two attentions that are merged by the log-sum-exp of their scores;
so its bits depend on where it lies, which the plan says, and on no neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backends.continuations import Continuations
from backends.kvcache import merge_attention
from distributed import Dist
from model import GPTModel
from modeling.attention import Segments, attend_segments
from transformers_model import Model

SECTION = 8  # a section's prefixes have this part of a strip's tokens at most: they are held
STEP = 512  # the length of a strip that is not full is a multiple of it
HEAD_DIM = 256  # the widest that the kernel knows


def apply(model: Model, rows: Continuations, dist: Dist) -> bool:
    """Whether this layout can be had: decided from the model and the whole job."""
    if not model.is_native or dist.pipe is not None:
        return False
    on_gpu = dist.device.type == "cuda" and model.dtype != torch.float32
    return on_gpu and attention_is_plain(model, rows)


def attention_is_plain(model: GPTModel, rows: Continuations) -> bool:
    """No row reaches beyond a window, and all layers have one width of head and uncapped scores.
    LongRoPE's frequencies go by the length of a row: other rows have others."""
    c = model.config
    prefixes = np.array([len(prefix) for prefix in rows.prefixes])
    longest = int((prefixes[rows.prefix] + rows.lengths).max(initial=0))
    windows = [c.layer_window(layer) for layer in range(c.n_layers)]
    one_width = c.kv_lora_rank is None and c.head_dim % 8 == 0 and c.head_dim <= HEAD_DIM
    one_rope = (c.rope_scaling or {}).get("rope_type") != "longrope"
    within = all(window is None or window >= longest for window in windows)
    return one_width and one_rope and within and c.attention_softcap is None


# ---------------------------------------------------------------------------------------------
# Which rows lie in which strip


@dataclass(frozen=True)
class Section:
    """Prefixes that are run in one pass. which: their numbers. starts [S + 1]: where each begins
    among their tokens; all of them are empty, or none is."""

    which: np.ndarray
    starts: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])


@dataclass(frozen=True)
class Strip:
    """A Portion: rows [B] of one section, prefix by prefix, laid end to end. prefix: the section's
    number. own [B + 1, one more where there is padding]: where each row begins, padding being the
    last. groups, keys: where the rows of each prefix begin, padding being of the last, and where
    its prefix does among the section's tokens."""

    prefix: int
    section: Section
    rows: np.ndarray
    own: np.ndarray
    groups: np.ndarray
    keys: np.ndarray
    overhead: int

    @property
    def tokens(self) -> int:
        return int(self.own[-1])

    def before(self, rows: Continuations) -> int:
        return self.section.tokens

    def open(self, model: GPTModel, rows: Continuations, dist: Dist) -> "Held | None":
        if not self.section.tokens:
            return None
        every = [np.asarray(rows.prefixes[g], np.int64) for g in self.section.which]
        starts, sizes = self.section.starts, np.diff(self.section.starts)
        within = np.arange(self.section.tokens) - np.repeat(starts[:-1], sizes)
        arrays = np.concatenate(every)[None], within[None], int32(starts)
        ids, places, begins = (torch.as_tensor(x, device=dist.device) for x in arrays)
        held = Held(places, Segments(begins, int(sizes.max())))
        model.hidden(ids, cache=held)
        return held

    def lay(self, rows: Continuations) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        lengths = rows.lengths[self.rows]
        ends = np.cumsum(lengths)
        ids, places = np.zeros((2, 1, self.tokens), np.int64)
        ids[0, : ends[-1]] = np.concatenate([rows.ids[r] for r in self.rows])
        prefixes = np.array([len(prefix) for prefix in rows.prefixes])
        first = prefixes[rows.prefix[self.rows]] - (ends - lengths)
        places[0, : ends[-1]] = np.arange(ends[-1]) + np.repeat(first, lengths)
        return ids, ends, [places, *map(int32, (self.own, self.groups, self.keys))]

    def seen(self, cache: "Held | None", more: Sequence[torch.Tensor]) -> "EndToEnd":
        places, *starts = more
        longest = (int(np.diff(part).max()) for part in (self.own, self.groups, self.keys))
        own, groups, keys = (Segments(*pair) for pair in zip(starts, longest))
        return EndToEnd(places, own, cache, groups, keys)


def int32(starts: np.ndarray) -> np.ndarray:
    return starts.astype(np.int32)


def plan_strips(
    rows: Continuations, max_tokens: int, max_rows: int | None = None, overhead: int = 512
) -> list[Strip]:
    """Strips of max_tokens tokens, and of no more rows than max_rows; only a row that alone is
    longer makes a longer one. The result depends on the rows alone, never on the world size."""
    strips: list[Strip] = []
    for number, section in enumerate(_sections(rows, max_tokens // SECTION)):
        members = np.concatenate([np.flatnonzero(rows.prefix == g) for g in section.which])
        cuts = _cuts(rows.lengths[members], max_tokens, max_rows or len(members))
        for part in np.split(members, cuts):
            tokens = int(rows.lengths[part].sum())
            is_last = part[-1] == members[-1] or max_rows is not None
            wanted = -(-tokens // STEP) * STEP if is_last else max_tokens
            tokens = max(tokens, min(wanted, max_tokens))
            strips.append(_strip(rows, number, section, part, tokens, overhead))
    return strips


def _sections(rows: Continuations, most: int) -> list[Section]:
    """Prefixes that some row goes on from, in order: empty ones apart, others as many as have
    `most` tokens together, or one that has more."""
    sizes = np.array([len(prefix) for prefix in rows.prefixes])
    used = np.flatnonzero(np.bincount(rows.prefix, minlength=len(sizes)))
    found: list[list[int]] = []
    for kind in (used[sizes[used] == 0], used[sizes[used] > 0]):
        room = -1
        for g in kind.tolist():
            if room < sizes[g]:
                found.append([])
                room = most
            found[-1].append(g)
            room -= sizes[g]
    return [Section(np.array(g), np.cumsum([0, *sizes[g]])) for g in found]


def _cuts(lengths: np.ndarray, max_tokens: int, max_rows: int) -> list[int]:
    """Where strips begin, but for the first: each is as full as can be."""
    ends, cuts, start = np.cumsum(lengths), [], 0
    while True:
        before = ends[start] - lengths[start]
        stop = int(np.searchsorted(ends, before + max_tokens, side="right"))
        stop = min(max(stop, start + 1), start + max_rows)
        if stop >= len(lengths):
            return cuts
        cuts.append(start := stop)


def _strip(rows, number, section, members, end, overhead) -> Strip:
    """Padded to `end` tokens."""
    lengths, prefix = rows.lengths[members], rows.prefix[members]
    own = np.cumsum([0, *lengths])
    first = np.flatnonzero(np.diff(prefix, prepend=-1))  # row of each prefix
    groups = np.append(own[first], end)
    at = np.searchsorted(section.which, prefix[first[0]])
    keys = section.starts[at : at + len(first) + 1]
    own = np.append(own, end) if end > own[-1] else own
    return Strip(number, section, members, own, groups, keys, overhead)


# ---------------------------------------------------------------------------------------------
# What the model asks of them


class EndToEnd:
    """What one call of `hidden` needs for sequences laid end to end, [1, N]. places [1, N]: their
    tokens' positions. own: where each begins. held: prefixes that come before, if any do; groups,
    keys: the queries that see each of them, and where its keys lie."""

    of_latents = False
    longest = 0  # which decides nothing: see attention_is_plain

    def __init__(
        self,
        places: torch.Tensor,
        own: Segments,
        held: "Held | None" = None,
        groups: Segments | None = None,
        keys: Segments | None = None,
    ):
        self.places, self.own, self.held, self.groups, self.keys = places, own, held, groups, keys

    def positions(self, T: int) -> torch.Tensor:
        assert self.places.shape[1] == T, (self.places.shape, T)
        return self.places

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """q [1, H, N, D] over their own k, v [1, G, N, D], causally, and over the prefix before."""
        own = attend_segments(q, k, v, self.own, self.own, causal=True, scale=scale)
        if self.held is None:
            return own[0]
        assert self.groups is not None and self.keys is not None
        k, v = self.held.k[layer], self.held.v[layer]
        before = attend_segments(q, k, v, self.groups, self.keys, causal=False, scale=scale)
        return merge_attention(*before, *own)


class Held(EndToEnd):
    """Prefixes, whose keys and values [1, G, N, D] of each layer stay as they are computed."""

    def __init__(self, places: torch.Tensor, own: Segments):
        super().__init__(places, own)
        self.k: dict[int, torch.Tensor] = {}
        self.v: dict[int, torch.Tensor] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        for kept, x in ((self.k, k), (self.v, v)):  # copies: q, k and v were one product
            kept[layer] = x.transpose(1, 2).contiguous().transpose(1, 2)
        return super().attend(layer, q, k, v, **options)

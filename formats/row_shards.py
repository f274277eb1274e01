"""Weights straight from files to the ranks of a sharded model, each of which has rows of every
parameter (training/fsdp.py): nobody reads, or holds, what is others'.

fill(model, table)      # as filling.fill, of a model of DTensors too

A tensor of theirs is a view of our parameter, which may be turned or in another order
(formats/layouts.py). What of it lies in this rank's rows is a view of these, and the rest of the
file is left unread, but for matrices of [in, out], which are read whole and dropped in part.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats import filling, layouts
from formats.filling import Table
from formats.layouts import Part
from formats.stored import Stored, rows
from model import GPTModel


def dim_of(shape: Sequence[int], world_size: int) -> int:
    """The dimension along which a parameter is dealt: its first; of stacked experts the rows of
    each, where the ranks do not divide the experts' number, but do that of their rows."""
    stacked = len(shape) == 3 and shape[0] % world_size and shape[1] % world_size == 0
    return 1 if stacked else 0


def rows_of_rank(n: int, rank: int, world_size: int) -> range:
    """The rows of n that are a rank's, as DTensor's Shard deals them."""
    each = -(-n // world_size)
    return range(min(rank * each, n), min((rank + 1) * each, n))


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are DTensors."""
    return any(hasattr(p, "to_local") for p in model.parameters())


def own_rows(p: Tensor) -> tuple[int, range]:
    """(dimension, places along it) of a DTensor that are this rank's."""
    mesh, dim = p.device_mesh, p.placements[0].dim  # type: ignore[attr-defined]
    return dim, rows_of_rank(p.shape[dim], mesh.get_local_rank(), mesh.size())


@torch.no_grad()
def fill(model: GPTModel, table: Table) -> None:
    """From files into a model: all of it, or where it is sharded this rank's rows. ValueError as
    filling.fill, on the rank that finds it."""
    if not is_sharded(model):
        filling.fill(model, table)
        return
    parameters: dict[str, Part | Picked] = {}
    tensors: dict[str, Stored] = {}
    small: list[tuple[Tensor, Tensor]] = []
    for name, p in model.named_parameters():
        mine, (dim, own) = p.to_local(), own_rows(p)  # type: ignore[attr-defined]
        if p.dim() < 2 or p.shape[1:].numel() == 1:  # read whole: norms and biases
            whole = torch.empty(p.shape, dtype=p.dtype, device=mine.device)
            small.append((mine, whole[own.start : own.stop]))
            for theirs, part in layouts.parts_of(model.config, table.layout, name, whole):
                parameters[theirs], tensors[theirs] = part, table.tensors[theirs]
            continue
        whole = torch.empty(p.shape, dtype=p.dtype, device="meta")
        for theirs, part in layouts.parts_of(model.config, table.layout, name, whole):
            for found in _within(part, table.tensors[theirs], whole, mine, (dim, own)):
                parameters[theirs], tensors[theirs] = found
    filling.put(parameters, table._replace(tensors=tensors), model.device)
    for mine, values in small:
        mine.copy_(values)


class Picked(NamedTuple):
    """A Part of those of their places along `dim` that are this rank's, in ascending order."""

    part: Part
    dim: int
    places: Tensor

    @property
    def tensor(self) -> Tensor:
        return self.part.tensor

    def put(self, where: tuple[slice, ...], values: Tensor) -> None:
        """Their numbers at `where` of their whole tensor: those that are ours, into ours."""
        span, at = where[self.dim], list(where)
        inside = (self.places >= span.start) & (self.places < span.stop)
        begin, count = int((self.places < span.start).sum()), int(inside.sum())
        if count:
            at[self.dim] = slice(begin, begin + count)
            chosen = self.places[inside] - span.start
            self.part.put(tuple(at), values.index_select(self.dim, chosen))


def _within(
    part: Part, stored: Stored, whole: Tensor, mine: Tensor, where: tuple[int, range]
) -> Iterator[tuple[Part | Picked, Stored]]:
    """What of `part`, a view of a whole parameter, lies in the rows that are `mine`, with what is
    to be read for it; nothing if nothing does. where: own_rows."""
    (dim, own), view, order = where, part.tensor, part.order
    row, stack = whole.stride(dim), whole.stride(0) if dim else whole.numel()
    expert, rest = divmod(int(view.storage_offset()), stack)
    first, within_row = divmod(rest, row)
    along = next((d for d in range(view.dim()) if view.stride(d) == row), None)
    count = 1 if along is None else view.shape[along]
    begin, end = max(own.start, first), min(own.stop, first + count)
    if begin >= end:
        return
    shape = list(view.shape)
    if along is not None:
        shape[along] = end - begin
    strides = [mine.stride(0) if dim and stride == stack else stride for stride in view.stride()]
    at = expert * mine.stride(0) + within_row + (begin - own.start) * row
    ours = mine.as_strided(shape, strides, at)
    if along is None:
        yield Part(ours, order, part.dim), stored
        return
    places = torch.arange(begin - first, end - first)
    if order is not None and part.dim == along:
        places = ((order >= begin - first) & (order < end - first)).nonzero().flatten()
        order = order[places] - (begin - first)
    found = Part(ours, order, part.dim)
    if along == 0 and stored.packed is None:
        yield found, rows(stored, _runs(places))
    else:
        yield Picked(found, along, places), stored


def _runs(places: Tensor) -> list[range]:
    """Ascending whole numbers as ranges of neighbours."""
    starts = torch.cat((torch.ones(1, dtype=torch.bool), places.diff() != 1)).nonzero().flatten()
    ends = [*starts[1:].tolist(), len(places)]
    return [range(int(places[a]), int(places[b - 1]) + 1) for a, b in zip(starts.tolist(), ends)]

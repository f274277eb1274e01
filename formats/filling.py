"""From a checkpoint's table into a model: dense, in the codes that a file has, or layer by layer.

    table = Table(tensors, layout, path)
    load(model, table, torch.bfloat16, "cuda")      # of a model on meta, which `check_fits`
    fill(model, table)                              # of one that has its memory
    tell(model, table)                              # what became of what the file has quantised

Several tensors are read at a time: reading and copying leave Python alone meanwhile, and one thread
alone is far from the speed of a disk, of a page cache, or of the bus to a GPU. What needs memory of
the device beside a layer's own is done one layer at a time.
"""

import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import cli
from costs.quantised import matrix_shapes
from formats import layouts, quantised, shown, tensorfiles
from formats.layouts import Place
from formats.naming import LAYOUTS
from formats.stored import Staging, Stored, check_sums, read
from model import GPTModel
from quantisation.apply import Rounding
from quantisation.codes import Codes
from quantisation.linear import PackedLinear, can_pack, pack_model, weight_bytes

if TYPE_CHECKING:
    from checkpoint import Checkpoint

READERS = min(8, os.cpu_count() or 1)  # of one checkpoint's files, side by side
Extremes = dict[str, torch.Tensor]  # smallest and largest number of each tensor


class Table(NamedTuple):
    """Where the tensors of a checkpoint lie, under the names of a layout."""

    tensors: dict[str, Stored]
    layout: str
    path: Path


def load(
    model: GPTModel,
    table: Table,
    dtype: torch.dtype,
    device: torch.device | str,
    packed: bool | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Into a model on meta, which lies on `device` then. packed: whether linear layers keep the
    codes of a file; None: on a GPU. rounding: takes what it can as soon as it is read."""
    device = torch.empty(0, device=device).device  # with its index
    if rounding is None and (packed or (packed is None and device.type == "cuda")):
        pack(model, table, dtype, device)
    later = rounding.begin(model, device) if rounding else ()
    model.allocate(dtype, device, later)
    fill(model, table, later, rounding.take if rounding else lambda name: None)


@torch.no_grad()
def fill(
    model: GPTModel,
    table: Table,
    later: Collection[str] = (),
    take: Callable[[str], None] = lambda name: None,
) -> None:
    """Into a GPTModel, in its dtypes and on its device. later: layers whose weights have no room
    yet. Each gets it, is filled, and goes to `take`, which puts in its place what needs less.
    ValueError for a wrong checksum, NaN and Inf."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in later}
    of_layers = {name: f"{name}.weight" for name in layers}
    dense = dict(layouts.parts(model, table.layout, without=set(of_layers.values())))
    theirs = [*dense]
    for name, ours in of_layers.items():
        its = layouts.parts_of(model.config, table.layout, ours, layers[name].weight.data)
        theirs += [their for their, _ in its]
    lock = threading.Lock()

    def put_layer(name: str, staging: Staging) -> int:
        layer = layers.pop(name)
        place = torch.empty_like(layer.weight, device=model.device)
        layer.weight = nn.Parameter(place, requires_grad=False)
        its = dict(layouts.parts_of(model.config, table.layout, of_layers[name], place))
        found = _read_into(its, table, staging)
        with lock:
            refuse_unsound(found, table, dict.fromkeys(found, place.dtype))
            take(name)
        return len(its)

    check_bytes(table.tensors[their] for their in theirs)
    with cli.progress(len(theirs), f"loading {table.path.name}", "tensor") as bar:
        _put(dense, table, model.device, bar)
        for count in _side_by_side(put_layer, later, model.device):
            bar.update(count)


@torch.no_grad()
def put(parameters: Mapping[str, Place], table: Table, device: torch.device) -> None:
    """`fill` of these parts, by their names: what of a model is here."""
    check_bytes(table.tensors[their] for their in parameters)
    with cli.progress(len(parameters), f"loading {table.path.name}", "tensor") as bar:
        _put(parameters, table, device, bar)


@torch.no_grad()
def pack(model: GPTModel, table: Table, dtype: torch.dtype, device: torch.device) -> None:
    """PackedLinear in the place of the linear layers of a model on meta whose matrices are codes in
    the file, of which the device then has nothing else. Checks as `fill`'s."""
    tensors, path = table.tensors, table.path
    layers = _with_codes(model, table)
    check_bytes(tensors[their] for its in layers.values() for their, _ in its)
    lock = threading.Lock()

    def pack_layer(ours: str, staging: Staging) -> int:
        parts = {their: _in_our_order(tensors[their], rows) for their, rows in layers[ours]}
        if all(can_pack(codes) for own in parts.values() for codes in own):
            with lock:
                own = {their: [c.to(device) for c in codes] for their, codes in parts.items()}
                found = {their: _extremes(codes, dtype) for their, codes in own.items()}
                refuse_unsound(found, table, dict.fromkeys(found, dtype))
                pack_model(model, {ours: [c for codes in own.values() for c in codes]}, dtype)
        return len(parts)

    if layers:
        n = sum(map(len, layers.values()))
        with cli.progress(n, f"packing {path.name}", "tensor") as bar:
            for count in _side_by_side(pack_layer, layers, device):
                bar.update(count)


def _with_codes(model: GPTModel, table: Table) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Our linear layers whose matrices are codes in the file: (their name, the rows of ours that
    theirs are) of each."""
    tensors, layout, _ = table
    layers: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for their, ours, rows in layouts.modules(model, layout):
        layers.setdefault(ours, []).append((f"{their}.weight", rows))
    return {
        ours: its
        for ours, its in layers.items()
        if not LAYOUTS[layout].conv1d and all(quantised.has_codes(tensors[t]) for t, _ in its)
    }


def block_bytes(ckpt: "Checkpoint", dtype: str) -> float | None:
    """Of a weight of the blocks' matrices, on average, in a model whose codes `pack` leaves as they
    are, all else in `dtype`; None where that is nothing. A few codes of each kind are read; groups
    of unequal sizes, which no quantiser makes, are not told from others."""
    if not ckpt.native or ckpt.base or ckpt.config is None or ckpt.layout is None:
        return None
    table = Table(ckpt.tensors, ckpt.layout, ckpt.path)
    sizes: dict[Any, int] = {}
    n_packed = size = 0
    for its in _with_codes(GPTModel.on_meta(ckpt.config), table).values():
        for their, _ in its:
            stored = table.tensors[their]
            how = stored.packed or tuple((piece.blocks, piece.shape) for piece in stored.pieces)
            kind = getattr(how, "rule", how), stored.shape
            if kind not in sizes:
                sizes[kind] = quantised.held_bytes(stored)
            size, n_packed = size + sizes[kind], n_packed + math.prod(stored.shape)
    numbers = sum(math.prod(shape) for shape in matrix_shapes(ckpt.config))
    dense = (numbers - n_packed) * layouts.as_dtype(dtype).itemsize
    return (size + dense) / numbers if n_packed else None


def tell(model: GPTModel, table: Table) -> None:
    """`model.packing`, and to people: how many of our matrices, fused ones as one, lie in memory as
    codes, how many as the numbers that codes of the file stand for, and bytes of all weights."""
    again = model.config.tie_embeddings and model.is_last and not model.is_first
    copy = {"token_embedding.weight"} if again else set()  # of the first rank's, which counts it
    dense = {
        name
        for name, p in model.named_parameters()
        for their, _ in layouts.parts_of(model.config, table.layout, name, p.data)
        if name not in copy and quantised.is_quantised(table.tensors[their])
    }
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    size = weight_bytes(model) - sum(model.get_parameter(name).nbytes for name in copy)
    model.packing = {"packed": packed, "dequantised": len(dense), "memory_bytes": size}
    cli.note(
        f"{table.path.name}: of its quantised matrices {packed:,} stay packed, {len(dense):,} are "
        f"dequantised; weights take {size / 1e6:,.1f} MB"
    )


# ---------------------------------------------------------------------------------------------
# What they share


def _put(parameters: Mapping[str, Place], table: Table, device: torch.device, bar: Any) -> None:
    def one(their: str, staging: Staging) -> Extremes:
        return _read_into({their: parameters[their]}, table, staging)

    extremes: Extremes = {}
    for found in _side_by_side(one, parameters, device):
        extremes |= found
        bar.update(1)
    refuse_unsound(extremes, table, {their: p.tensor.dtype for their, p in parameters.items()})


def _read_into(parts: Mapping[str, Place], table: Table, staging: Staging) -> Extremes:
    for their, part in parts.items():
        for where, values in read(table.tensors[their], staging):
            part.put(where, values)
    return {their: tensorfiles.extremes(part.tensor) for their, part in parts.items()}


def check_bytes(stored: Iterable[Stored]) -> None:
    """ValueError where the bytes of a tensor are not those of its file's checksums."""
    records: dict[Path, set[str]] = {}
    pieces = [piece for each in stored for piece in each.pieces]
    for piece in pieces:
        if piece.record:
            records.setdefault(piece.file, set()).add(piece.record)
    for file, names in records.items():
        tensorfiles.check_crc(file, names)
    check_sums(pieces)


def _side_by_side(
    function: Callable[[str, Staging], Any], names: Iterable[str], device: torch.device
) -> Iterator[Any]:
    """function(name, staging) of each, some at a time, in their order."""
    own, on_gpu = threading.local(), device.type == "cuda"

    @torch.no_grad()
    def run(name: str) -> Any:
        if not hasattr(own, "staging"):
            if on_gpu:  # a new thread's GPU is the first, whichever this rank's is
                torch.cuda.set_device(device)
            own.staging = Staging(pinned=on_gpu)
        return function(name, own.staging)

    threads = ThreadPoolExecutor(READERS)
    try:
        yield from threads.map(run, list(names))
    finally:  # after an error nobody waits for the rest
        threads.shutdown(cancel_futures=True)


def _in_our_order(stored: Stored, rows: torch.Tensor) -> list[Codes]:
    """The codes of a matrix whose rows are those of ours, in its order."""
    codes, order = quantised.codes_of(stored), rows.argsort()
    assert codes, "only those are asked for"
    if torch.equal(order, torch.arange(len(order))):
        return codes
    (whole,) = codes
    return [whole.rows(order)]


def _extremes(codes: list[Codes], dtype: torch.dtype) -> torch.Tensor:
    """tensorfiles.extremes of the matrix that they stand for."""
    found = [tensorfiles.extremes(part.dequantise(dtype)) for part in codes]
    return torch.stack((torch.stack(found).amin(0)[0], torch.stack(found).amax(0)[1]))


def refuse_unsound(extremes: Extremes, table: Table, dtypes: Mapping[str, torch.dtype]) -> None:
    """ValueError that names the tensors with NaN and Inf; where the file's numbers are finite, it
    is not the file that is damaged."""
    path = table.path
    for name in tensorfiles.nonfinite(extremes):
        stored, dtype = table.tensors[name], dtypes[name]
        largest = max(values.abs().amax().item() for _, values in read(stored))
        if math.isfinite(largest):
            names = [str(d).removeprefix("torch.") for d in (dtype, stored.dtype)]
            raise ValueError(
                f"{path}: {shown(name)} holds {largest:g}, which overflows {names[0]}; the file "
                f"has it in {names[1]}: load it as that or as bfloat16"
            )
    tensorfiles.refuse_nonfinite(extremes, path)

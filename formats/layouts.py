"""Where the weights of others lie in our parameters, by the tables of formats/naming.py.

    for name, view in views(model, "gpt2"):      # a key of naming.LAYOUTS
        view.copy_(theirs[name])                 # loads
        theirs[name] = view                      # saves
    check_fits(model, tensors, layout, path)     # then, of a file's table:
    fill(model, tensors, layout, path)

A fused projection of ours can be several modules of theirs, and GPT-2's Conv1D keeps matrices as
[in, out]: both are views of our parameter, so neither direction needs a second copy of the model.
Rows can lie in another order: GPT-NeoX fuses head by head, and rotary pairs can be neighbours. They
are permuted as they are read and written, which changes scores by their order of summation alone.
"""

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

import cli
from config import GPTConfig
from formats import foreign, shown, tensorfiles
from formats.naming import LAYOUTS, Layout, head_name, theirs_of, whose
from formats.stored import FLOATS, Staging, Stored, check_sums, read
from model import GPTModel
from modeling.mlp import Linear

READERS = min(8, os.cpu_count() or 1)  # of one checkpoint's files, side by side

# Ours of their R rotary channels: pairs (2i, 2i + 1), or (i + R/2, i), which turn the other way
PAIRS = {
    "neighbours": lambda R: torch.arange(R).view(2, -1).t().flatten(),
    "backwards": lambda R: torch.arange(R).view(2, -1).flip(0).flatten(),
}

LATENTS = ("attn.q_proj", "attn.q_up_proj", "attn.kv_down_proj")  # with rotary channels


class Part(NamedTuple):
    """The part of our parameter that one tensor of theirs is."""

    tensor: torch.Tensor  # of their shape
    order: torch.Tensor | None  # their i-th number along `dim` is our order[i]-th; None: as it is
    dim: int

    def put(self, where: tuple[slice, ...], values: torch.Tensor) -> None:
        """Their numbers at `where` of their tensor, into ours."""
        if self.order is None:
            self.tensor[where].copy_(values)
            return
        at: list = list(where)
        at[self.dim] = self.order[where[self.dim]].to(self.tensor.device)
        self.tensor[tuple(at)] = values.to(self.tensor.device, self.tensor.dtype)

    def get(self) -> torch.Tensor:
        """Their tensor: a view of ours, or where the order is another, a copy."""
        if self.order is None:
            return self.tensor
        return self.tensor.index_select(self.dim, self.order.to(self.tensor.device))


class Place(Protocol):
    """What their numbers can be put into: a Part, or what of one is here."""

    @property
    def tensor(self) -> torch.Tensor: ...

    def put(self, where: tuple[slice, ...], values: torch.Tensor) -> None: ...


def parts(model: GPTModel, layout: str) -> Iterator[tuple[str, Part]]:
    """(their name, the part of our parameter that it is), over the whole GPTModel."""
    for name, p in model.named_parameters():
        sharded = hasattr(p, "to_local")  # whose shapes can be asked for, and no more
        whole = torch.empty(p.shape, dtype=p.dtype, device="meta") if sharded else p.data
        yield from parts_of(model.config, layout, name, whole)


def parts_of(c: GPTConfig, layout: str, name: str, p: torch.Tensor) -> Iterator[tuple[str, Part]]:
    """`parts` of one parameter, of our name and shape."""
    spec = LAYOUTS[layout]
    module, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    inner = block[2] if block else ""
    theirs = spec.names(f"blocks.{{i}}.{inner}" if block else module)
    leaf = spec.choice_bias if leaf == "choice_bias" else leaf
    for i, (their, tensor) in enumerate(_shares(c, inner, theirs, p)):
        if spec.conv1d and block and tensor.dim() == 2:
            tensor = tensor.t()
        order, dim = _order(c, spec, inner, i, tensor)
        yield f"{their.format(i=block and block[1])}.{leaf}", Part(tensor, order, dim)


def _shares(
    c: GPTConfig, inner: str, theirs: list[str], p: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """(a name of theirs, its part) of a parameter, which several modules of theirs can share."""
    heads = {"attn.q_norm": c.n_heads, "attn.k_norm": c.n_kv_heads}
    if "{e}" in theirs[0]:  # modules for each expert
        for e, own in enumerate(p):
            yield from _shares(c, inner, [name.replace("{e}", str(e)) for name in theirs], own)
    elif "{h}" in theirs[0]:  # a module for each head
        own = p.view(heads[inner], c.head_dim) if c.qk_norm_over == "heads" else p[None]
        yield from ((theirs[0].replace("{h}", str(h)), head) for h, head in enumerate(own))
    elif inner == "attn.qkv_proj" and len(theirs) > 1:
        rows = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
        yield from zip(theirs, p.split(rows), strict=True)
    elif inner in heads and c.qk_norm_over == "heads":
        yield theirs[0], p.view(heads[inner], c.head_dim)
    else:  # gate and up, where they are two
        yield from zip(theirs, p.chunk(len(theirs), dim=-2 if p.dim() > 1 else 0), strict=True)


def _order(
    c: GPTConfig, spec: Layout, inner: str, i: int, tensor: torch.Tensor
) -> tuple[torch.Tensor | None, int]:
    """(order, dim) of a Part, the i-th of a block's module."""
    if spec.by_head and inner == "attn.qkv_proj":
        rows = torch.arange(3 * c.n_heads * c.head_dim)
        return rows.view(3, c.n_heads, c.head_dim).transpose(0, 1).flatten(), 0
    if spec.turned_last and inner in LATENTS:
        return _latent_order(c, spec, inner), 0
    turned = inner in ("attn.q_norm", "attn.k_norm") or (inner == "attn.qkv_proj" and i < 2)
    if not (spec.pairs and turned and c.position == "rope"):
        return None, 0
    head = torch.cat((PAIRS[spec.pairs](c.rotary_dim), torch.arange(c.rotary_dim, c.head_dim)))
    dim = tensor.dim() - 1 if inner != "attn.qkv_proj" else 0
    starts = torch.arange(0, tensor.shape[dim], c.head_dim)
    return (starts[:, None] + head).flatten(), dim


def _latent_order(c: GPTConfig, spec: Layout, inner: str) -> torch.Tensor:
    """Of rows whose rotary channels are first with us and last with them: of each head's queries,
    or of a latent."""
    assert c.qk_nope_head_dim and c.kv_lora_rank
    R = c.rotary_dim
    others = c.kv_lora_rank if inner == "attn.kv_down_proj" else c.qk_nope_head_dim
    turned = PAIRS[spec.pairs](R) if spec.pairs else torch.arange(R)
    one = torch.cat((R + torch.arange(others), turned))
    heads = 1 if inner == "attn.kv_down_proj" else c.n_heads
    return (torch.arange(heads)[:, None] * (R + others) + one).flatten()


def modules(model: GPTModel, layout: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(their name, ours, the rows of ours that theirs are, in their order) of each linear layer in
    the blocks."""
    c, spec = model.config, LAYOUTS[layout]
    for name, module in model.named_modules():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if not (block and isinstance(module, Linear)):
            continue
        theirs, rows = spec.names(f"blocks.{{i}}.{block[2]}"), torch.arange(module.out_features)
        for i, (their, share) in enumerate(_shares(c, block[2], theirs, rows[:, None])):
            order, own = _order(c, spec, block[2], i, share)[0], share[:, 0]
            yield their.format(i=block[1]), name, own if order is None else own[order]


def views(model: GPTModel, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(their name, their tensor), over the whole GPTModel: views of our parameters, in which they
    can be read and written; copies where their order is another."""
    return ((name, part.get()) for name, part in parts(model, layout))


def never_rounded(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.dtype]:
    """The dtypes of those that are written as they are, whatever the others become: what a router
    chooses by, of which a rounded one would choose other experts."""
    bias = f".{LAYOUTS[layout].choice_bias}"
    return {name: t.dtype for name, t in tensors.items() if name.endswith(bias)}


# ---------------------------------------------------------------------------------------------
# Whether a table fits a config, and a model


def sizes(tensors: dict[str, Stored], layout: str | None) -> dict[str, int]:
    """The fields of GPTConfig that the shapes of weights fix."""
    if layout is None:
        return {}
    fields = {}
    for module, of_shape in {
        "token_embedding": ("vocab_size", "d_model"),
        "position_embedding": ("max_position_embeddings", "d_model"),
        "blocks.{i}.mlp.fc2": ("d_model", "d_ff"),
    }.items():
        stored = tensors.get(theirs_of(layout, module)[0])
        if stored and len(stored.shape) == 2:
            turned = LAYOUTS[layout].conv1d and module.startswith("blocks")
            fields |= dict(zip(of_shape, stored.shape[:: -1 if turned else 1]))
    block = theirs_of(layout, "blocks.{i}.mlp.fc2")[0].partition("0")[0]
    layers = {m[1] for name in tensors if (m := re.match(rf"{re.escape(block)}(\d+)\.", name))}
    return fields | ({"n_layers": len(layers)} if layers else {})


def check_sizes(
    config: GPTConfig, tensors: dict[str, Stored], layout: str, path: Path, hint: str = ""
) -> None:
    """ValueError with the fields of a config that the tensors contradict. A model of a million
    layers is not even begun."""
    _refuse_quantised(tensors, path)
    found: dict[str, int] = sizes(tensors, layout)
    if config.position != "learned":
        found.pop("max_position_embeddings", None)
    said = {name: getattr(config, name) for name in found}
    fused = [tensors.get(name) for name in theirs_of(layout, "blocks.{i}.attn.qkv_proj")]
    if all(stored is not None and len(stored.shape) == 2 for stored in fused):
        side = 1 if LAYOUTS[layout].conv1d else 0
        rows = "(n_heads + 2 n_kv_heads) x head_dim"
        found[rows] = sum(stored.shape[side] for stored in fused if stored)
        said[rows] = config.qkv_dim
    if len(theirs_of(layout, "blocks.{i}.mlp.fc1")) > 1:
        said["gated_mlp"], found["gated_mlp"] = config.gated_mlp, True
    if LAYOUTS[layout].by_head:
        said["n_kv_heads"], found["n_kv_heads"] = config.n_kv_heads, config.n_heads
    wrong = [
        f"{name} is {said[name]:,} in the config, {n:,} in the tensors"
        for name, n in found.items()
        if said[name] != n
    ]
    if wrong:
        raise ValueError(f"{path}: {'; '.join([*wrong, hint] if hint else wrong)}")


def _refuse_quantised(tensors: dict[str, Stored], path: Path) -> None:
    if how := foreign.quantised(tensors):
        raise ValueError(f"{path} holds weights quantised by {how}")


def check_fits(
    model: GPTModel, tensors: dict[str, Stored], layout: str | None, path: Path, hint: str = ""
) -> None:
    """Every tensor of a GPTModel, of its shape and a float type, and no others; ValueError says
    which, and `hint`. Before anything is allocated on the word of a config."""
    _refuse_quantised(tensors, path)
    if layout is not None:
        check_sizes(model.config, tensors, layout, path, hint)
    layout = layout or "native"
    wanted = {name: list(part.tensor.shape) for name, part in parts(model, layout)}
    spare = {head_name(layout)} if model.config.tie_embeddings else set()
    found = {name: tensors[name] for name in wanted if name in tensors}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and name not in spare],
        "of another shape": [
            f"{name} (file {list(t.shape)}, model {wanted[name]})"
            for name, t in found.items()
            if list(t.shape) != wanted[name]
        ],
        "of a type that is not float32, bfloat16, float16 or float64": [
            f"{name} ({str(t.dtype).removeprefix('torch.')})"
            for name, t in found.items()
            if t.dtype not in FLOATS
        ],
    }
    said = [f"{len(names)} {what}: {shown(names)}" for what, names in problems.items() if names]
    if said:
        owner = whose(tensors, layout)
        said += [f"names like {owner}"] if owner else []
        said += [hint] if hint else []
        raise ValueError(f"{path}: of {len(wanted)} tensors, {'; '.join(said)}")


# ---------------------------------------------------------------------------------------------
# From a table into a model


def bare(model: nn.Module) -> GPTModel:
    """The GPTModel inside DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return cast(GPTModel, model)
        model = inner


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, by torch's name, a short name (bf16) or itself."""
    if isinstance(dtype, str):
        dtype = getattr(torch, cli.DTYPES.get(dtype, ""), dtype)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(cli.DTYPES)}, not {dtype!r}")
    return dtype


def fill(model: GPTModel, tensors: dict[str, Stored], layout: str, path: Path) -> None:
    """From files into a GPTModel, in its dtypes and on its device. ValueError for a wrong checksum,
    NaN and Inf."""
    put(dict(parts(model, layout)), tensors, path)


@torch.no_grad()
def put(parameters: Mapping[str, Place], tensors: dict[str, Stored], path: Path) -> None:
    """`fill` of these parts, by their names."""
    records: dict[Path, set[str]] = {}
    for piece in (piece for name in parameters for piece in tensors[name].pieces):
        if piece.record:
            records.setdefault(piece.file, set()).add(piece.record)
    for file, names in records.items():
        tensorfiles.check_crc(file, names)
    check_sums(piece for name in parameters for piece in tensors[name].pieces)
    extremes = {}
    with cli.progress(len(parameters), f"loading {path.name}", "tensor") as bar:
        for name, found in _put_all(parameters, tensors):
            extremes[name] = found
            bar.update(1)
    for name in tensorfiles.nonfinite(extremes):
        _refuse_overflow(name, tensors[name], parameters[name].tensor.dtype, path)
    tensorfiles.refuse_nonfinite(extremes, path)


def _put_all(
    parts: Mapping[str, Place], tensors: dict[str, Stored]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Fill each part from its tensor, several at a time: (name, its extremes) of each. Reading and
    copying leave Python alone meanwhile, and one thread alone is far from the speed of a disk, of
    a page cache, or of the bus to a GPU."""
    own = threading.local()

    @torch.no_grad()
    def put(name):
        part = parts[name]
        if not hasattr(own, "staging"):
            if part.tensor.is_cuda:  # a new thread's GPU is the first, whichever this rank's is
                torch.cuda.set_device(part.tensor.device)
            own.staging = Staging(pinned=part.tensor.is_cuda)
        for where, values in read(tensors[name], own.staging):
            part.put(where, values)
        return tensorfiles.extremes(part.tensor)

    threads = ThreadPoolExecutor(READERS)
    try:
        yield from zip(parts, threads.map(put, parts), strict=True)
    finally:  # after an error nobody waits for the rest
        threads.shutdown(cancel_futures=True)


def _refuse_overflow(name: str, stored: Stored, dtype: torch.dtype, path: Path) -> None:
    """Where the file's numbers are finite, it is not the file that is damaged."""
    largest = max(values.abs().amax().item() for _, values in read(stored))
    if math.isfinite(largest):
        dtypes = [str(d).removeprefix("torch.") for d in (dtype, stored.dtype)]
        raise ValueError(
            f"{path}: {shown(name)} holds {largest:g}, which overflows {dtypes[0]}; the file has "
            f"it in {dtypes[1]}: load it as that or as bfloat16"
        )

"""Linear layers whose weights stay packed, in memory and on the card.

    pack_model(model, {"blocks.0.mlp.fc1": [gate, up], ...})    # Codes, or those of fused parts
    layer = PackedLinear([codes], torch.bfloat16)                # alone; then as any other Linear

A model never has to be whole: built on meta, it takes one matrix after the other, and only what
stays dense is allocated afterwards.

    model = GPTModel.on_meta(config)
    pack_model(model, ((name, codes_of(name)) for name in names), dtype=torch.bfloat16)
    model.allocate(torch.bfloat16, "cuda")                       # embeddings, norms, head

Few rows (a decode step) are multiplied by the codes as they lie; many (scoring, prefill) by the
weight in the dtype of the products, which is made anew each time, in memory that the next layer
uses again. In float32 and on a CPU all products go the second way, which has the bits of a dense
layer with that weight; the first adds up in another order, and does not round the weight.

With activations "e4m3", weights that are e4m3 with one scale a row meet activations that are
rounded alike, a scale a token, and the tensor cores multiply 8-bit floats.

Shapes: M rows, N outputs, K inputs, G groups
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_kernels.float8_matmul import E4M3, aligned, float8_matmul, padded
from gpu_kernels.low_bit_matmul import arrivals_of, dequantise, low_bit_matmul, multiplies
from gpu_kernels.packed_weights import BITS, OFFSET, ROWS, SPAN, Packed, pack
from quantisation.codes import Codes

PartsByName = Mapping[str, Sequence[Codes]] | Iterable[tuple[str, Sequence[Codes]]]


class PackedLinear(nn.Module):
    """A Linear [N, K] of the Codes of its parts, which lie one below the other, whatever each
    has been rounded by. dtype: of its products. activations: None or "e4m3"."""

    def __init__(
        self,
        parts: Sequence[Codes],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        activations: str | None = None,
    ):
        super().__init__()
        assert activations in (None, "e4m3"), activations
        self.bias: nn.Parameter | None
        self.dtype = dtype
        kind = PackedWeight if activations is None else Float8Weight
        self.weights = nn.ModuleList(kind(codes) for codes in joined(parts))
        self.in_features = parts[0].codes.shape[1]
        self.out_features = sum(len(codes.codes) for codes in parts)
        assert bias is None or bias.shape == (self.out_features,), (bias, self.out_features)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(self.dtype).reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if not all(weight.multiplies(rows) for weight in self._parts):
            y = F.linear(rows, self.weight, bias)  # the very product of a dense layer
        elif len(self._parts) == 1:
            y = self._parts[0](rows, bias)
        else:
            y = torch.cat([weight(rows, None) for weight in self._parts], dim=1)
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def _parts(self) -> "Sequence[PackedWeight | Float8Weight]":
        return cast("Sequence[PackedWeight | Float8Weight]", self.weights)

    @property
    def weight(self) -> Tensor:
        """[N, K] in the dtype of its products, made anew."""
        parts = [weight.dense(self.dtype) for weight in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


class PackedWeight(nn.Module):
    """Codes of 4 bits or fewer two a byte, others one a byte."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    arrivals: Tensor
    order: Tensor | None

    def __init__(self, codes: Codes):
        super().__init__()
        packed, order = packed_of(codes)
        self.kind, self.group, self.K, self.added = packed[3:]
        for name in ("words", "scales", "zeros"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("order", order)
        self.register_buffer("arrivals", arrivals_of(packed), persistent=False)

    @property
    def packed(self) -> Packed:
        how = self.kind, self.group, self.K, self.added
        return Packed(self.words, self.scales, self.zeros, *how)

    def multiplies(self, rows: Tensor) -> bool:
        """Whether the kernel takes rows [M, K], and the weight need not be made."""
        return multiplies(rows, self.packed)

    def forward(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[M, N] of rows [M, K] that it multiplies."""
        rows = rows if self.order is None else rows[:, self.order]
        return low_bit_matmul(rows, self.packed, self.arrivals, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K], its columns as they were."""
        weight = dequantise(self.packed, dtype)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)


class Float8Weight(nn.Module):
    """e4m3 with one scale a row, for activations that are rounded as they come."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Codes):
        super().__init__()
        (self.N, self.K), G = codes.codes.shape, codes.scales.shape[1]
        if codes.codes.dtype != E4M3 or G != 1 or codes.zeros is not None:
            raise ValueError(
                f"{codes.rule}: activations are rounded to e4m3 where weights are, with one scale "
                "a row"
            )
        rows, columns = aligned(self.N), aligned(self.K)
        self.register_buffer("codes", padded(codes.codes, rows, columns))
        scales = F.pad(codes.scales.float(), (0, 0, 0, rows - self.N))
        self.register_buffer("scales", scales.t().contiguous())  # [1, N]

    def multiplies(self, rows: Tensor) -> bool:
        """Whatever they are."""
        return True

    def forward(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[M, N] of rows [M, K]."""
        y = float8_matmul(rows, self.codes, self.scales)[:, : self.N]
        return y if bias is None else y + bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K]"""
        weight = self.codes[: self.N, : self.K].float() * self.scales.t()[: self.N]
        return weight.to(dtype)


# ---------------------------------------------------------------------------------------------
# From codes


def joined(parts: Iterable[Codes]) -> list[Codes]:
    """Parts that follow each other and are of one form, as one."""
    found: list[Codes] = []
    for part in parts:
        if found and _alike(found[-1], part):
            found[-1] = _below(found[-1], part)
        else:
            found.append(part)
    return found


def _alike(a: Codes, b: Codes) -> bool:
    same = (a.bits, a.codes.dtype, a.codes.shape[1]) == (b.bits, b.codes.dtype, b.codes.shape[1])
    same = same and (a.scales.shape[1], a.scales.dtype) == (b.scales.shape[1], b.scales.dtype)
    if (a.zeros is None) != (b.zeros is None) or (a.groups is None) != (b.groups is None):
        return False
    same = same and a.added == b.added
    if a.zeros is not None and b.zeros is not None:
        same = same and a.zeros.dtype == b.zeros.dtype
    return same and (a.groups is None or b.groups is None or torch.equal(a.groups, b.groups))


def _below(a: Codes, b: Codes) -> Codes:
    codes = torch.cat([part.codes.view(torch.uint8) for part in (a, b)]).view(a.codes.dtype)
    zeros = None
    if a.zeros is not None and b.zeros is not None:
        zeros = torch.cat((a.zeros, b.zeros))
    scales = torch.cat((a.scales, b.scales))
    return Codes(a.rule, a.bits, codes, scales, zeros, a.groups, a.added)


def packed_of(codes: Codes) -> tuple[Packed, Tensor | None]:
    """(the weight as the kernels read it, the order of its columns where their groups do not lie
    side by side). ValueError for groups of unequal sizes."""
    q, K = codes.codes, codes.codes.shape[1]
    group, order = _grouped(codes, K)
    if order is not None:
        q = q.view(torch.uint8)[:, order].view(q.dtype)
    kind = "e4m3"
    if q.dtype != E4M3:
        kind = "int" if q.dtype == torch.int8 else "uint"
        kind += "4" if codes.bits <= 4 else "8"
    zeros = None if codes.zeros is None else codes.zeros.t().contiguous()
    if zeros is not None and not codes.added:
        zeros = _zeros(zeros.float(), kind)
    words, scales = pack(q, kind), codes.scales.t().contiguous()
    return Packed(words, scales, zeros, kind, group, K, codes.added), order


def held_bytes(some: Codes, N: int, K: int, G: int) -> int:
    """What PackedWeight takes of a matrix [N, K] of G groups of which only some rows or columns are
    at hand."""
    packed, _ = packed_of(replace(some, groups=None))
    blocks, tiles = -(-N // ROWS), -(-K // (16 // BITS[packed.kind] * SPAN))
    size = blocks * (tiles * ROWS * SPAN * packed.words.element_size() + 4)  # and its counter
    size += sum(N * G * t.element_size() for t in (packed.scales, packed.zeros) if t is not None)
    shuffled = some.groups is not None and bool((some.groups.diff() < 0).any())
    return size + (8 * K if shuffled else 0)


def can_pack(codes: Codes) -> bool:
    """Whether every group has as many columns as the others, the last one fewer perhaps."""
    return codes.groups is None or _in_rows(codes.groups) is not None


def _in_rows(groups: Tensor) -> tuple[int, Tensor] | None:
    """(columns of a group, the order in which those of each lie together); None where sizes
    differ."""
    sorted_groups, order = groups.to(torch.int64).sort(stable=True)
    size = int(torch.bincount(sorted_groups).max())
    usual = torch.arange(len(groups), device=groups.device) // size
    return (size, order) if torch.equal(sorted_groups, usual) else None


def _grouped(codes: Codes, K: int) -> tuple[int, Tensor | None]:
    """(columns that share a scale, the order in which the columns of a group lie together)."""
    if codes.groups is None:
        return codes.group_size, None
    found = _in_rows(codes.groups)
    if found is None:
        raise ValueError(f"{codes.rule}: groups of columns of unequal sizes")
    size, order = found
    return size, None if torch.equal(order, torch.arange(K, device=order.device)) else order


def _zeros(zeros: Tensor, kind: str) -> Tensor:
    """zeros [G, N] as Packed has them."""
    least, most = {"4": (128, 143), "8": (-128, 127)}.get(kind[-1], (0, 0))
    if kind != "e4m3":
        shifted = zeros + OFFSET[kind]
        whole = (shifted == shifted.round()) & (shifted == zeros.round() + OFFSET[kind])
        if (whole & (most - shifted <= 256) & (shifted - least <= 256)).all():
            return shifted.to(torch.bfloat16).contiguous()
    return zeros.contiguous()


# ---------------------------------------------------------------------------------------------
# Into a model


def pack_model(
    model: nn.Module,
    codes_by_name: PartsByName,
    dtype: torch.dtype | None = None,
    activations: str | None = None,
) -> None:
    """Put PackedLinear in the place of the linear layers of these names, one after the other: of
    pairs that a generator makes, one is in memory at a time. dtype: of the products, that of each
    layer's weight unless given."""
    pairs = codes_by_name.items() if isinstance(codes_by_name, Mapping) else codes_by_name
    for name, parts in pairs:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name}: {type(layer).__name__} cannot be packed, Linear can")
        packed = PackedLinear(parts, dtype or layer.weight.dtype, layer.bias, activations)
        shape = packed.out_features, packed.in_features
        assert shape == layer.weight.shape, (name, shape, tuple(layer.weight.shape))
        packed._forward_pre_hooks = layer._forward_pre_hooks  # of rules that round activations
        put(model, name, packed.train(layer.training))


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """In the place of the module of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def weight_bytes(model: nn.Module) -> int:
    """Of all weights, packed ones as they lie."""
    packed = (m for m in model.modules() if isinstance(m, PackedWeight | Float8Weight))
    tensors = (*model.parameters(), *(buffer for m in packed for buffer in m.buffers()))
    return sum(t.numel() * t.element_size() for t in tensors)


def n_weights(module: nn.Module) -> int:
    """Numbers that a module multiplies by, packed ones too."""
    packed = (m for m in module.modules() if isinstance(m, PackedLinear))
    dense = sum(p.numel() for p in module.parameters())
    return dense + sum(m.in_features * m.out_features for m in packed)

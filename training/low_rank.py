"""A frozen linear layer, dense or packed, and the low-rank pairs that are trained beside it.

    layer = LowRank(base, [range(0, 64)], rank=8, scale=2.0, drop=0.0)    # base: Linear
    layer = LowRank(packed, [], 0, 1.0, 0.0)            # PackedLinear: frozen, with nothing beside

Corrections are added where the product lies, forward and backward, so that nothing of its size is
made a second time. A packed weight is dequantised for each product and let go: no dense copy of it
waits for the backward pass, which makes it anew. Compiled, both products are operators that
torch.compile leaves whole: it would copy the rows that are added to, and keep the dense weight.

Shapes: N tokens, P parts of r rows of A each
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_kernels.low_bit_matmul import Packed, dequantise
from modeling.mlp import Linear
from quantisation.linear import PackedLinear, PackedWeight


class LowRank(Linear):
    """A frozen linear layer with a pair (A, B) for some of its parts, which are rows in one piece.

    A [P, r, in]. B: the parts' rows below each other, [rows, r]. ValueError for a packed weight
    that is not of one form.
    """

    def __init__(
        self,
        base: Linear | PackedLinear,
        spans: Sequence[range],
        rank: int,
        scale: float,
        drop: float,
    ):
        nn.Module.__init__(self)  # nn.Linear's would make other weights
        self.in_features, self.out_features = base.in_features, base.out_features
        self.product_dtype = base.dtype
        self.register_parameter("bias", base.bias)
        if isinstance(base, PackedLinear):
            self.packed = _in_one_piece(base)
        else:
            self.weight = base.weight
        self.spans = [(span.start, span.stop) for span in spans]
        self.scale, self.drop = scale, drop
        bound = base.in_features**-0.5  # PEFT's kaiming_uniform_(a=sqrt(5)), on the host
        A = torch.empty(len(spans), rank, base.in_features, device="cpu").uniform_(-bound, bound)
        B = torch.zeros(sum(map(len, spans)), rank)
        device = self.held()[1][0].device
        self.A = nn.Parameter(A.to(device), requires_grad=bool(spans))
        self.B = nn.Parameter(B.to(device), requires_grad=bool(spans))

    @property
    def dtype(self) -> torch.dtype:
        return self.product_dtype

    def held(self) -> tuple[tuple[str, list[int]], tuple[Tensor, Tensor | None, Tensor | None]]:
        """(form, tensors) of the frozen weight: of `Packed` the kind and the numbers, and words,
        scales and zeros; or "" and itself."""
        if "weight" in self._parameters:
            return ("", []), (self.weight, None, None)
        words, scales, zeros, kind, *numbers = self.packed.packed
        return (kind, numbers), (words, scales, zeros)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.product_dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        dropped = F.dropout(x, self.drop) if self.drop and self.training else None
        A, B = self.A.flatten(0, 1).to(dtype), self.B.to(dtype)
        form, (weight, scales, zeros) = self.held()
        weight = weight.to(dtype) if form[0] == "" else weight
        how = form, self.spans, self.scale
        return _WithLowRank.apply(x, dropped, bias, A, B, how, weight, scales, zeros)

    def part(self, i: int) -> tuple[Tensor, Tensor]:
        """A and B of a part: views."""
        sizes = [stop - start for start, stop in self.spans]
        return self.A.data[i], self.B.data.split(sizes)[i]


def _in_one_piece(base: PackedLinear) -> PackedWeight:
    (weight, *more) = base.weights
    if more or not isinstance(weight, PackedWeight) or weight.order is not None:
        raise ValueError("adapters need packed weights of one form, their columns in order")
    return weight


class _WithLowRank(torch.autograd.Function):
    """y = W x + b with s B_i A_i x' added to the rows of each part; x' is x, or x after dropout.
    W and b get no gradient."""

    @staticmethod
    def forward(ctx, x, dropped, bias, A, B, how, weight, scales, zeros):
        form, spans, scale = how
        held = [tensor for tensor in (weight, scales, zeros) if tensor is not None]
        seen = (x if dropped is None else dropped).flatten(0, -2)
        h = seen @ A.t()  # [N, P r]
        ends = [end for span in spans for end in span]
        to_y = _to_y_operator if torch.compiler.is_compiling() else _to_y
        y = to_y(x.flatten(0, -2), held, *form, bias, h, B, ends, scale)
        seen = seen if spans else seen[:0]  # which A's gradient alone asks for
        ctx.save_for_backward(seen, A, B, h, *held)
        ctx.how, ctx.shape, ctx.dropped = how, x.shape, dropped is not None
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        form, spans, scale = ctx.how
        seen, A, B, h, *held = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_h, grad_B = torch.empty_like(h), torch.empty_like(B)
        for ((start, stop), part, own), to_h, to_B in zip(
            _parts(h, B, spans), grad_h.chunk(max(1, len(spans)), 1), _rows(grad_B, spans)
        ):
            rows = grad[:, start:stop]
            to_h.copy_(rows @ own).mul_(scale)
            to_B.copy_(rows.t() @ part).mul_(scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = _to_x_operator if torch.compiler.is_compiling() else _to_x
            low = None if ctx.dropped else grad_h
            grad_x = to_x(grad, held, *form, low, A).view(ctx.shape)
        if ctx.dropped and ctx.needs_input_grad[1]:
            grad_dropped = (grad_h @ A).view(ctx.shape)
        grad_A = grad_h.t() @ seen if spans else None
        return grad_x, grad_dropped, None, grad_A, grad_B, None, None, None, None


def _rows(B: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    return B.split([stop - start for start, stop in spans])


def _parts(h: Tensor, B: Tensor, spans: Sequence[tuple[int, int]]):
    """((start, stop), h of it [N, r], B of it) of each part."""
    return zip(spans, h.chunk(max(1, len(spans)), dim=1), _rows(B, spans))


# ---------------------------------------------------------------------------------------------
# The two products of the frozen weight, and what is added to each


def _dense(held: Sequence[Tensor], kind: str, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The frozen weight [out, in]."""
    if kind == "":
        return held[0]
    words, scales, *zeros = held
    fields = words, scales, zeros[0] if zeros else None, kind, *numbers
    return dequantise(Packed._make(fields), dtype)


def _to_y(
    x: Tensor,
    held: Sequence[Tensor],
    kind: str,
    numbers: Sequence[int],
    bias: Tensor | None,
    h: Tensor,
    B: Tensor,
    ends: Sequence[int],
    scale: float,
) -> Tensor:
    """[N, out] of x [N, in] and h [N, P r]. ends: of the parts' rows, first and last in turn."""
    y = F.linear(x, _dense(held, kind, numbers, x.dtype), bias)
    spans = list(zip(ends[::2], ends[1::2]))
    for (start, stop), part, own in _parts(h, B, spans):
        y[:, start:stop].addmm_(part, own.t(), alpha=scale)
    return y


def _to_x(
    grad: Tensor,
    held: Sequence[Tensor],
    kind: str,
    numbers: Sequence[int],
    grad_h: Tensor | None,
    A: Tensor,
) -> Tensor:
    """[N, in] of the gradients grad [N, out] and grad_h [N, P r]."""
    grad_x = grad @ _dense(held, kind, numbers, grad.dtype)
    return grad_x if grad_h is None else grad_x.addmm_(grad_h, A)


_to_y_operator = torch.library.custom_op("roseval::low_rank_to_y", mutates_args=())(_to_y)
_to_x_operator = torch.library.custom_op("roseval::low_rank_to_x", mutates_args=())(_to_x)


@_to_y_operator.register_fake
def _(x, held, kind, numbers, bias, h, B, ends, scale):
    return x.new_empty(x.shape[0], (held[0] if kind == "" else held[1].t()).shape[0])


@_to_x_operator.register_fake
def _(grad, held, kind, numbers, grad_h, A):
    return grad.new_empty(grad.shape[0], A.shape[1])

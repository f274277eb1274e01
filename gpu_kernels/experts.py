"""What experts make of the tokens that chose them.

    y, place = through_experts(x, fc1, fc2, chosen, "silu", gated=True)
    y[place[n, k]]          # [C]: what expert chosen[n, k] makes of x[n], not yet weighed

Three ways to the same numbers, and a rule of shapes and devices alone that picks one. In bfloat16
on Hopper and Blackwell, tokens are sorted by expert and all products are one grouped kernel, which
reads where a group ends on the device: the host waits for nothing, so that a decode step can be
captured. Elsewhere FEW tokens go through every expert in one batched product, of a shape that
depends on no choice; more of them go expert by expert, where the host has to know how many chose
each. That loop is the plain twin that the others are compared with.

Nothing is added up here, and no two tokens write to one place: what a token gets depends on its
neighbours through the sizes of products at most. benchmarks/experts.py has the times.

Shapes: N tokens, C d_model, F width of an expert, E experts, K of them a token
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.elementwise import activate

FEW = 256  # tokens that all experts take, rather than ask the host who chose whom
ALIGNED = 8  # tokens of a group in training: gradients of weights are products along them


def through_experts(
    x: Tensor, fc1: Tensor, fc2: Tensor, chosen: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """(y [S, C] in x's dtype, place [N, K] int64) of x [N, C], chosen [N, K] int64 and the weights
    fc1 [E, 2F or F, C], [gate; up] where gated, and fc2 [E, C, F], all in one dtype."""
    if torch.is_grad_enabled():
        way = functools.partial(by_groups, align=ALIGNED) if groups(x, fc2) else by_loop
        return way(x, fc1, fc2, chosen, activation, gated)
    if torch.compiler.is_compiling():  # which would stumble over the host's part
        return _operator(x, fc1, fc2, chosen, activation, gated)
    return _without_gradients(x, fc1, fc2, chosen, activation, gated)


def _without_gradients(
    x: Tensor, fc1: Tensor, fc2: Tensor, chosen: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    if groups(x, fc2):
        return by_groups(x, fc1, fc2, chosen, activation, gated)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    way = by_all if len(x) <= FEW or capturing else by_loop
    return way(x, fc1, fc2, chosen, activation, gated)


_operator = torch.library.custom_op("roseval::through_experts", mutates_args=())(_without_gradients)


@_operator.register_fake
def _(x, fc1, fc2, chosen, activation, gated):
    all_of_them = not groups(x, fc2) and len(x) <= FEW
    rows = len(x) * (len(fc1) if all_of_them else chosen.shape[1])
    return x.new_empty(rows, x.shape[1]), torch.empty_like(chosen)


def groups(x: Tensor, fc2: Tensor) -> bool:
    """Whether a grouped kernel takes these without asking the host: rows of 16 bytes, and fewer
    than 1024 experts. On other GPUs and in other dtypes PyTorch's waits for the host."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and len(fc2) < 1024):
        return False
    return x.shape[1] % 8 == 0 and fc2.shape[2] % 8 == 0 and _has_groups(x.device.index)


def _has_groups(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


# torch.compiler.assume_constant_result would import all of dynamo here, seconds of every start
vars(_has_groups)["_dynamo_marked_constant"] = True


def by_expert(chosen: Tensor, n_experts: int, align: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [S], ends [E], place [N, K]): the token in each row once they are sorted by expert,
    where each expert's rows end, and the row of each choice. align: each has a multiple of so many
    rows; those added hold token 0, and nothing looks at them."""
    K = chosen.shape[1]
    narrow = torch.uint8 if n_experts <= 256 else torch.int16  # sorted in one pass over them
    experts, choices = chosen.flatten().to(narrow).sort(stable=True)
    every = torch.arange(n_experts, dtype=narrow, device=chosen.device)
    ends = torch.searchsorted(experts, every, right=True)
    rows, tokens = torch.arange(len(choices), device=chosen.device), choices // K
    if align > 1:
        counts = ends.diff(prepend=ends.new_zeros(1))
        room = -(-counts // align) * align
        begins = room.cumsum(0) - room
        rows = rows + (begins - (ends - counts))[experts.long()]
        most = -(-(len(choices) + n_experts * (align - 1)) // align) * align
        tokens = tokens.new_zeros(most).scatter(0, rows, tokens)
        ends = torch.cat((begins[1:], ends.new_full((1,), most)))  # the last takes what is left
    place = torch.empty_like(choices).scatter(0, choices, rows)
    return tokens, ends, place.view_as(chosen)


@functools.cache
def _spread_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def spread(x, place, out, C, K: tl.constexpr, BLOCK: tl.constexpr):
        """One program BLOCK channels of a token: read once, written to each of its K places."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < C
        values = tl.load(x + token * C + column, mask=inside)
        for k in range(K):
            row = tl.load(place + token * K + k)
            tl.store(out + row * C + column, values, mask=inside)

    return spread


def spread(x: Tensor, place: Tensor) -> Tensor:
    """[N * K, C] on CUDA, in which x[n] of x [N, C] stands at each place[n] of place [N, K]."""
    (N, C), K = x.shape, place.shape[1]
    x, out = x.contiguous(), x.new_empty(N * K, C)
    if N:
        block = min(2048, 1 << (C - 1).bit_length())
        _spread_kernel()[(N, -(-C // block))](x, place, out, C, K=K, BLOCK=block, num_warps=4)
    return out


def by_groups(
    x: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    chosen: Tensor,
    activation: str,
    gated: bool,
    align: int = 1,
) -> tuple[Tensor, Tensor]:
    """`through_experts` in two grouped products."""
    tokens, ends, place = by_expert(chosen, len(fc1), align)
    ends = ends.int()
    rows = x[tokens] if align > 1 or not x.is_cuda else spread(x, place)
    h = F.grouped_mm(rows, fc1.transpose(-2, -1), offs=ends)
    y = F.grouped_mm(activate(h, activation, gated), fc2.transpose(-2, -1), offs=ends)
    return y, place


def by_all(
    x: Tensor, fc1: Tensor, fc2: Tensor, chosen: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """`through_experts` with every token through every expert: the bits of a token are those it has
    whatever its neighbours choose."""
    h = torch.bmm(x.expand(len(fc1), -1, -1), fc1.transpose(-2, -1))  # [E, N, 2F]
    y = torch.bmm(activate(h, activation, gated), fc2.transpose(-2, -1))
    return y.flatten(0, 1), chosen * len(x) + torch.arange(len(x), device=x.device)[:, None]


def by_loop(
    x: Tensor, fc1: Tensor, fc2: Tensor, chosen: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """`through_experts`, one expert after the other."""
    tokens, ends, place = by_expert(chosen, len(fc1))
    sorted_x, outputs, begin = x[tokens], [x.new_empty(0, x.shape[1])], 0
    for end, up, down in zip(ends.tolist(), fc1.unbind(), fc2.unbind(), strict=True):
        if end > begin:
            h = F.linear(sorted_x[begin:end], up)
            outputs.append(F.linear(activate(h, activation, gated), down))
        begin = end
    return torch.cat(outputs), place

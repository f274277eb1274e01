"""Cross-entropy of a large vocabulary in one pass over the logits, forward and backward.

    nll = cross_entropy(logits, targets, vocab_size)        # [N] float32, 0 where target is -100

On CUDA two Triton kernels, behind operators that torch.compile leaves whole; elsewhere plain torch.
Inductor's own log-softmax kernels ran at a third of the memory's speed, and sliced off the padding
columns of the head in a pass of their own. Here columns from vocab_size on are never read, and get
a zero gradient. The order of summation is fixed: the same logits give the same bits.

Shapes: N rows, W columns of logits of which the first vocab_size count
"""

import functools

import torch
import torch.nn.functional as F

IGNORE = -100  # the target that is not scored, as in PyTorch's own
BLOCK = 4096  # columns that one program holds at a time
WARPS = 8
LOG2_E = 1.4426950408889634


@functools.cache
def _kernels():
    """The Triton kernels, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def forward(
        logits, targets, nll, lse, stride, V,
        BLOCK: tl.constexpr, IGNORE: tl.constexpr, LOG2_E: tl.constexpr,
    ):  # fmt: skip
        """One program a row: a running maximum and sum for each of BLOCK lanes, merged last."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], -1e30, tl.float32)  # finite, so that nothing is inf - inf
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            at = logits + row * stride + start + column
            x = tl.load(at, mask=start + column < V, other=-1e30).to(tl.float32)
            new_top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp2((top - new_top) * LOG2_E) + tl.exp2((x - new_top) * LOG2_E)
            top = new_top
        highest = tl.max(top, axis=0)
        total = tl.sum(total * tl.exp2((top - highest) * LOG2_E), axis=0)
        log_sum = highest + tl.log2(total) / LOG2_E
        target = tl.load(targets + row)
        scored = target != IGNORE
        picked = tl.load(logits + row * stride + target, mask=scored, other=0.0).to(tl.float32)
        tl.store(lse + row, log_sum)
        tl.store(nll + row, tl.where(scored, log_sum - picked, 0.0))

    @triton.jit
    def backward(
        grad, logits, targets, lse, out, stride, V, W,
        BLOCK: tl.constexpr, IGNORE: tl.constexpr, LOG2_E: tl.constexpr,
    ):  # fmt: skip
        """out = grad * (softmax - one hot), a block of columns of a row a program."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        target = tl.load(targets + row)
        scale = tl.where(target == IGNORE, 0.0, tl.load(grad + row))
        log_sum = tl.load(lse + row)
        x = tl.load(logits + row * stride + column, mask=column < V, other=0.0).to(tl.float32)
        p = tl.exp2((x - log_sum) * LOG2_E) - tl.where(column == target, 1.0, 0.0)
        p = tl.where(column < V, p * scale, 0.0)
        tl.store(out + row * W + column, p.to(out.dtype.element_ty), mask=column < W)

    return triton, forward, backward


@torch.library.custom_op("roseval::cross_entropy", mutates_args=(), device_types="cuda")
def _fused(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    if len(nll):
        _, forward, _ = _kernels()
        forward[(len(nll),)](
            logits, targets, nll, lse, logits.stride(0), vocab_size,
            BLOCK=BLOCK, IGNORE=IGNORE, LOG2_E=LOG2_E, num_warps=WARPS,
        )  # fmt: skip
    return nll, lse


@_fused.register_fake
def _(logits, targets, vocab_size):
    nll = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return nll, torch.empty_like(nll)


@torch.library.custom_op("roseval::cross_entropy_backward", mutates_args=(), device_types="cuda")
def _fused_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    N, W = logits.shape
    out = torch.empty((N, W), dtype=logits.dtype, device=logits.device)
    if N:
        triton, _, backward = _kernels()
        backward[(N, triton.cdiv(W, BLOCK))](
            grad.contiguous(), logits, targets, lse, out, logits.stride(0), vocab_size, W,
            BLOCK=BLOCK, IGNORE=IGNORE, LOG2_E=LOG2_E, num_warps=WARPS,
        )  # fmt: skip
    return out


@_fused_backward.register_fake
def _(grad, logits, targets, lse, vocab_size):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output):
    logits, targets, ctx.vocab_size = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx, grad_nll, grad_lse):
    logits, targets, lse = ctx.saved_tensors
    return _fused_backward(grad_nll, logits, targets, lse, ctx.vocab_size), None, None


_fused.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(logits, targets, vocab_size: int) -> torch.Tensor:
    """Nats [N], float32, of targets [N] int64 under logits [N, W], any float dtype."""
    assert logits.stride(-1) == 1, logits.stride()
    if logits.is_cuda:
        return _fused(logits, targets, vocab_size)[0]
    rows = logits[:, :vocab_size].float()
    return F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="none")

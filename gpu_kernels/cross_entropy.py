"""Cross-entropy of a large vocabulary: each logit is read from memory once, and its gradient takes
its place.

    nll = cross_entropy(logits, targets, vocab_size)            # scoring: [N] float32, 0 at -100
    nll = head_cross_entropy(hidden, weight, targets, vocab_size)   # training: through the LM head

On CUDA one Triton kernel, behind an operator that torch.compile leaves whole; elsewhere plain
torch. In training the kernel runs over a row twice, the second time out of the L2 cache, and leaves
softmax - one hot where the logits were, so the backward pass is two matrix products. Inductor's own
log-softmax ran at a third of the memory's speed and kept several copies. Columns from vocab_size on
(the head's padding) are never read and get a zero gradient. The order of summation is fixed: the
same logits give the same bits.

Shapes: N rows, C channels, W columns of logits of which the first vocab_size count
Reference: the gradient in place of the logits is the idea of Liger-Kernel (Hsu et al. 2024).
"""

import functools

import torch
import torch.nn.functional as F

IGNORE = -100  # the target that is not scored, as in PyTorch's own
# Lanes that one program holds at a time, the neighbouring columns of each, which one thread reads
# at once, and its warps: the fastest of a dozen on an H100, 2.8 TB/s and with the gradient 2.3 on
# 32768 x 50304 bfloat16. With the gradient few rows should be in flight, so that the second reading
# of each finds it in the L2 cache.
SCORING = {"LANES": 512, "WIDTH": 8, "num_warps": 8}
TRAINING = {"LANES": 1024, "WIDTH": 8, "num_warps": 32}
LOG2_E = 1.4426950408889634


@functools.cache
def _kernel():
    """The Triton kernel, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(
        logits, targets, nll, stride, V, W, cap,
        CAP: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
        IGNORE: tl.constexpr, LOG2_E: tl.constexpr,
    ):  # fmt: skip
        """One program a row: a running maximum and sum for each lane of WIDTH neighbouring columns,
        which one thread holds; the lanes are merged last. CAP: a logit x is cap * tanh(x / cap),
        without a gradient."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        column = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        target = tl.load(targets + row)
        scored = target != IGNORE
        picked = tl.load(logits + target, mask=scored, other=0.0).to(tl.float32)
        if CAP:
            picked = cap * (2.0 * tl.sigmoid(2.0 * picked / cap) - 1.0)
        top = tl.full([LANES], -1e30, tl.float32)  # finite, so that nothing is inf - inf
        total = tl.zeros([LANES], tl.float32)
        for start in range(0, V, LANES * WIDTH):
            at = start + column
            x = tl.load(logits + at, mask=at < V, other=-1e30).to(tl.float32)
            if CAP:
                x = tl.where(at < V, cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0), -1e30)
            new_top = tl.maximum(top, tl.max(x, axis=1))
            parts = tl.exp2((x - new_top[:, None]) * LOG2_E)
            total = total * tl.exp2((top - new_top) * LOG2_E) + tl.sum(parts, axis=1)
            top = new_top
        highest = tl.max(top, axis=0)
        total = tl.sum(total * tl.exp2((top - highest) * LOG2_E), axis=0)
        log_sum = highest + tl.log2(total) / LOG2_E
        tl.store(nll + row, tl.where(scored, log_sum - picked, 0.0))
        if GRADIENT:
            tl.debug_barrier()  # all threads have picked the target's logit
            for start in range(0, W, LANES * WIDTH):
                at = start + column
                x = tl.load(logits + at, mask=at < V, other=0.0).to(tl.float32)
                p = tl.exp2((x - log_sum) * LOG2_E) - tl.where(at == target, 1.0, 0.0)
                p = tl.where((at < V) & scored, p, 0.0)
                tl.store(logits + at, p.to(logits.dtype.element_ty), mask=at < W)

    return kernel


def _run_kernel(logits, targets, vocab_size, gradient: bool, softcap=None) -> torch.Tensor:
    N, W = logits.shape
    nll = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N:
        _kernel()[(N,)](
            logits, targets, nll, logits.stride(0), vocab_size, W, softcap or 1.0,
            CAP=softcap is not None, GRADIENT=gradient, IGNORE=IGNORE, LOG2_E=LOG2_E,
            **(TRAINING if gradient else SCORING),
        )  # fmt: skip
    return nll


@torch.library.custom_op("roseval::cross_entropy", mutates_args=(), device_types="cuda")
def _score(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float | None
) -> torch.Tensor:
    return _run_kernel(logits, targets, vocab_size, gradient=False, softcap=softcap)


@_score.register_fake
def _(logits, targets, vocab_size, softcap):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("roseval::head_cross_entropy", mutates_args=(), device_types="cuda")
def _score_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats [N], their gradients by the logits [N, W])."""
    logits = hidden @ weight.t()
    return _run_kernel(logits, targets, vocab_size, gradient=True), logits


@_score_head.register_fake
def _(hidden, weight, targets, vocab_size):
    N, W = hidden.shape[0], weight.shape[0]
    return hidden.new_empty(N, dtype=torch.float32), hidden.new_empty(N, W)


def _save(ctx, inputs, output):
    hidden, weight, _, _ = inputs
    ctx.save_for_backward(hidden, weight, output[1])
    ctx.set_materialize_grads(False)  # no zeros [N, W] for the output that nobody differentiates


def _differentiate(ctx, grad_nll, _):
    """What comes from above is one factor a row: it multiplies the narrow side of each product."""
    hidden, weight, grad_logits = ctx.saved_tensors
    factor, grad_weight = grad_nll[:, None], None
    grad_hidden = ((grad_logits @ weight) * factor).to(hidden.dtype)
    if ctx.needs_input_grad[1]:  # not of a frozen head: a third of its products
        grad_weight = grad_logits.t() @ (hidden * factor).to(hidden.dtype)
    return grad_hidden, grad_weight, None, None


_score_head.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float | None = None
) -> torch.Tensor:
    """Nats [N], float32, of targets [N] int64 under logits [N, W], any float dtype; with a soft cap
    under softcap * tanh(logits / softcap), in float32.

    On CUDA no gradient flows: `head_cross_entropy` has one.
    """
    assert logits.stride(-1) == 1, logits.stride()
    if logits.is_cuda and torch.compiler.is_compiling():
        return _score(logits, targets, vocab_size, softcap)
    if logits.is_cuda:  # the operator would first import torch's compiler, which takes seconds
        return _run_kernel(logits, targets, vocab_size, gradient=False, softcap=softcap)
    rows = logits[:, :vocab_size].float()
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)
    return F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="none")


def head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Nats [N], float32, of targets [N] under hidden [N, C] @ weight.T, weight [W, C]."""
    if hidden.is_cuda and torch.is_grad_enabled():
        return _score_head(hidden, weight, targets, vocab_size)[0]
    return cross_entropy(F.linear(hidden, weight), targets, vocab_size)

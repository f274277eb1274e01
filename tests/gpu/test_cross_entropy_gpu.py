"""The Triton cross-entropy against PyTorch's own: values, gradients, compiled and not.

python -m pytest tests/gpu/test_cross_entropy_gpu.py
"""

import math

import pytest
import torch
import torch.nn.functional as F

from gpu_kernels.cross_entropy import cross_entropy, head_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPES = [(7, 50304, 50257), (33, 4096, 4096), (5, 64, 50), (1, 8192, 4097)]
C = 64


def targets_of(N, V):
    targets = torch.randint(V, (N,), device="cuda")
    if N > 1:
        targets[N // 2] = -100
    return targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, W, V", SHAPES)
def test_values(dtype, N, W, V):
    torch.manual_seed(0)
    logits, targets = (torch.randn(N, W, device="cuda") * 4).to(dtype), targets_of(N, V)
    before = logits.clone()
    wanted = F.cross_entropy(logits[:, :V].double(), targets, ignore_index=-100, reduction="none")
    nll = cross_entropy(logits, targets, V)
    torch.testing.assert_close(nll.double(), wanted, rtol=2e-6, atol=2e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, W, V", SHAPES)
@pytest.mark.parametrize("cap", [30.0, 2.0])
def test_values_under_a_soft_cap(dtype, N, W, V, cap):
    torch.manual_seed(0)
    logits, targets = (torch.randn(N, W, device="cuda") * 40).to(dtype), targets_of(N, V)
    capped = cap * torch.tanh(logits[:, :V].double() / cap)
    wanted = F.cross_entropy(capped, targets, ignore_index=-100, reduction="none")
    nll = cross_entropy(logits, targets, V, cap)
    torch.testing.assert_close(nll.double(), wanted, rtol=3e-6, atol=2e-5)
    compiled = torch.compile(lambda *given: cross_entropy(*given), dynamic=False)
    assert torch.equal(compiled(logits, targets, V, cap), nll)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, W, V", SHAPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_through_the_head(dtype, N, W, V, compiled):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, C, device="cuda", dtype=dtype) for n in (N, W))
    weight *= 0.5
    hidden.requires_grad_(), weight.requires_grad_()
    targets, factors = targets_of(N, V), torch.randn(N, device="cuda")

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (exact[0] @ exact[1].t())[:, :V]
    wanted = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (wanted * factors).sum().backward()

    fn = torch.compile(head_cross_entropy, dynamic=False) if compiled else head_cross_entropy
    nll = fn(hidden, weight, targets, V)
    (nll * factors).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(nll.double(), wanted, rtol=tolerance, atol=2 * tolerance)
    for ours, theirs in ((hidden, exact[0]), (weight, exact[1])):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < tolerance, float(error)
        assert ours.grad.dtype == dtype
    assert not weight.grad[V:].any()
    with torch.no_grad():  # scoring takes the other way
        torch.testing.assert_close(
            head_cross_entropy(hidden, weight, targets, V), nll.detach(), rtol=1e-6, atol=1e-6
        )


def test_the_same_logits_give_the_same_bits():
    logits = torch.randn(64, 50304, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(50257, (64,), device="cuda")
    first = cross_entropy(logits, targets, 50257)
    assert all(torch.equal(cross_entropy(logits, targets, 50257), first) for _ in range(5))
    assert torch.equal(cross_entropy(logits[40:], targets[40:], 50257), first[40:])


def test_nan_stays_nan_and_large_logits_do_not_overflow():
    logits = torch.zeros(3, 128, device="cuda")
    logits[0, 5] = float("nan")
    logits[1, 7] = 1e20
    logits[2] -= 1e5
    nll = cross_entropy(logits, torch.tensor([1, 7, 3], device="cuda"), 128)
    assert torch.isnan(nll[0])
    assert nll[1] == 0.0
    assert nll[2].item() == pytest.approx(math.log(128), abs=0.02)  # an ulp of 1e5 is 0.008

"""The Triton cross-entropy against PyTorch's own: values, gradients, compiled and not."""

import math

import pytest
import torch
import torch.nn.functional as F

from cross_entropy import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "N, W, V", [(7, 50304, 50257), (33, 4096, 4096), (5, 64, 50), (1, 8192, 4097)]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(dtype, N, W, V, compiled):
    torch.manual_seed(0)
    logits = (torch.randn(N, W, device="cuda") * 4).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    targets[N // 2] = -100 if N > 1 else targets[0]
    weights = torch.randn(N, device="cuda")

    exact = logits.detach()[:, :V].double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    (wanted * weights).sum().backward()

    fn = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy
    nll = fn(logits, targets, V)
    (nll * weights).sum().backward()
    torch.testing.assert_close(nll.double(), wanted, rtol=2e-6, atol=2e-6)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    )
    torch.testing.assert_close(logits.grad[:, :V].double(), exact.grad, **tolerance)
    assert not logits.grad[:, V:].any()


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

"""cross_entropy.py without a GPU: plain torch against float64, and the Triton kernel's own lines in
Triton's interpreter, where Triton is installed. On CUDA: tests/gpu/test_cross_entropy_gpu.py."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import PATIENCE

from gpu_kernels.cross_entropy import cross_entropy, head_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(7, 640, 601), (33, 256, 256), (5, 64, 50), (1, 8192, 4097)]  # N, W, V


def case(N, W, V, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 16, dtype=dtype), torch.randn(W, 16, dtype=dtype)
    targets = torch.randint(V, (N,))
    if N > 1:
        targets[N // 2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, W, V", SHAPES)
def test_values_and_gradients(N, W, V, dtype):
    hidden, weight, targets = case(N, W, V, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (exact[0] @ exact[1].t())[:, :V]
    wanted = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    factors = torch.randn(N)
    nll = head_cross_entropy(hidden, weight, targets, V)
    (nll * factors).sum().backward()
    (wanted * factors).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(nll.double(), wanted, rtol=tolerance, atol=2 * tolerance)
    for ours, theirs in ((hidden, exact[0]), (weight, exact[1])):
        assert (ours.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()
    assert not weight.grad[V:].any()
    plain = cross_entropy((hidden @ weight.t()).detach(), targets, V)
    assert torch.equal(plain, nll.detach())


INTERPRETED = """
import torch, torch.nn.functional as F
from gpu_kernels import cross_entropy
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for N, W, V in ((3, 9000, 8999), (5, 64, 50), (2, 8192, 4097)):
        logits, targets = (torch.randn(N, W) * 4).to(dtype), torch.randint(V, (N,))
        targets[1] = -100
        exact = logits[:, :V].double().requires_grad_()
        wanted = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
        wanted.sum().backward()
        kept = logits.clone()
        for gradient in (False, True):
            nll = cross_entropy._run_kernel(logits, targets, V, gradient)
            assert (nll - wanted).abs().max() < 5e-6, (N, W, V, nll, wanted)
            assert gradient or torch.equal(logits, kept)
        error = (logits[:, :V] - exact.grad).abs().max()
        assert error < (1e-6 if dtype == torch.float32 else 4e-3), error
        assert not logits[:, V:].any() and not logits[1].any()
odd = torch.zeros(3, 128)
odd[0, 5], odd[1, 7], odd[2] = float("nan"), 1e20, -1e5
nll = cross_entropy._run_kernel(odd, torch.tensor([1, 7, 3]), 128, False)
assert nll[0].isnan() and nll[1] == 0 and abs(nll[2] - 4.852) < 0.01, nll
"""


def triton_version() -> tuple:
    """(0, 0) without Triton. Before 3.7 its interpreter cannot loop where NumPy is 2.4 or newer."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return tuple(map(int, version.split(".")[:2]))


@pytest.mark.skipif(triton_version() < (3, 7), reason="needs Triton 3.7 for its interpreter")
def test_the_kernel_in_the_interpreter():
    out = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert out.returncode == 0, out.stderr

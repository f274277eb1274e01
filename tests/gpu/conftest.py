"""What all tests on CUDA share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_float32():
    """Products of float32 in float32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before

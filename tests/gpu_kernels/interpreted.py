"""For tests of kernels in Triton's interpreter, which looks for names among a module's own."""

import inspect
import os

import pytest

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton and TRITON_INTERPRET=1"
)


def expose(monkeypatch, module, *kernels) -> None:
    """What kernels, made within functions of the module, see of these, and what that sees."""
    for kernel in kernels:
        for name, value in inspect.getclosurevars(kernel.fn).nonlocals.items():
            monkeypatch.setattr(module, name, value, raising=False)
            if hasattr(value, "fn"):
                expose(monkeypatch, module, value)

"""What every start waits seconds for, side by side: torch, and the GPU.

    with headstart.loading(options.device):      # once the flags are read
        ...                                      # what needs no torch
        import torch

`import torch` links a gigabyte of libraries, then runs a thousand modules of Python. Meanwhile,
in threads that need no Python, the linker begins, and the driver makes the context that the first
tensor on the GPU would wait for. What fails here is left for torch to say.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import launcher

LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so")  # with all they need


@contextlib.contextmanager
def loading(device: str | None = None) -> Iterator[None]:
    """Within it modules are imported. device: as of distributed.setup."""
    jobs = [_link] if device == "cpu" else [_make_context, _link]
    for job in jobs if sys.platform == "linux" else []:
        threading.Thread(target=job).start()
    gc.disable()  # what is imported stays: the collector would look through it a dozen times
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def _make_context() -> None:
    """The primary context of this rank's GPU, which is the one that torch works in."""
    with contextlib.suppress(OSError, AttributeError):  # no driver, or not NVIDIA's
        cuda = ctypes.CDLL("libcuda.so.1")
        gpu, context = ctypes.c_int(), ctypes.c_void_p()
        local_rank = launcher.launch().local_rank
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(gpu), local_rank) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)


def _link() -> None:
    """Torch's libraries, as its import will open them; those that are not there are passed over."""
    found = importlib.util.find_spec("torch")
    if found and found.origin:
        linker = ctypes.CDLL(None)  # ctypes.CDLL(path) would hold on to Python meanwhile
        for name in LIBRARIES:
            path = Path(found.origin).with_name("lib") / name
            linker.dlopen(os.fsencode(path), sys.getdlopenflags())

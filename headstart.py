"""What every start waits seconds for, side by side: torch, and the GPU.

    with headstart.loading(options.device):      # once the flags are read
        import torch

`import torch` runs a thousand modules of Python. Meanwhile the driver, in C, makes the context that
the first tensor on the GPU would wait for, and Triton, which the first kernels of ours wait for, is
imported and hashes its compiler, by which it finds compiled kernels. What fails here is left for
torch to say.
"""

import contextlib
import ctypes
import gc
import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import launcher


@contextlib.contextmanager
def loading(device: str | None = None) -> Iterator[None]:
    """Within it modules are imported. device: as of distributed.setup."""
    beside = ThreadPoolExecutor(1)
    if device != "cpu":
        beside.submit(_make_ready)
    gc.disable()  # what is imported stays: the collector would look through it a dozen times
    try:
        yield
    finally:
        gc.enable()
        beside.shutdown(wait=False)
    gc.freeze()


def _make_ready() -> None:
    if _make_context():
        # half a second of sha256 over libtriton.so, which the first kernel would wait for; neither
        # Triton nor torch imports the other, so no two imports wait for each other
        with contextlib.suppress(ImportError, AttributeError, TypeError, OSError):
            importlib.import_module("triton.runtime.cache").triton_key()


def _make_context() -> bool:
    """The primary context of this rank's GPU, which is the one that torch works in: whether there
    is one."""
    with contextlib.suppress(OSError, AttributeError):  # no driver, or not NVIDIA's
        cuda = ctypes.CDLL("libcuda.so.1")
        gpu, context = ctypes.c_int(), ctypes.c_void_p()
        local_rank = launcher.launch().local_rank
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(gpu), local_rank) == 0:
            return cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu) == 0
    return False

"""What every start waits seconds for, side by side: torch, and the GPU.

    with headstart.loading(options.device):      # once the flags are read
        import torch

`import torch` runs a thousand modules of Python. Meanwhile the driver, in C, makes the context that
the first tensor on the GPU would wait for. What fails here is left for torch to say.
"""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator

import launcher


@contextlib.contextmanager
def loading(device: str | None = None) -> Iterator[None]:
    """Within it modules are imported. device: as of distributed.setup."""
    if device != "cpu":
        threading.Thread(target=_make_context).start()
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

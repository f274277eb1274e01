"""Token shards: one file of token ids, memory-mapped.

    tokens, offset = open_shard(path)       # uint16 or uint32 [N], mapped; where they start

`.npy`: 1-D uint16 or uint32, FineWeb's layout. `.bin`: llm.c's, known by its header, else nanoGPT's
raw uint16.
"""

import tokenize
from pathlib import Path

import numpy as np

from durable import refuse_impostor

# llm.c's headers: magic number -> (version, dtype)
LLMC_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
HOW_TO_SAVE = "save it with np.save(path, ids.astype(np.uint16).ravel())"


def open_shard(path: Path) -> tuple[np.ndarray, int]:
    """(token ids [N], mapped; the byte of the file where they start). Reads the header alone.

    ValueError, in one line that names the file and the remedy, for what is no such shard.
    """
    refuse_impostor(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(6)
    if path.suffix == ".bin":
        dtype, n, offset = _bin_layout(path, size)
    elif path.suffix == ".npy" or start.startswith(b"\x93NUMPY"):
        dtype, n, offset = _npy_layout(path)
    else:
        raise ValueError(f"{path}: is neither .npy nor .bin; for text files use --data-mode text")
    expected = offset + n * dtype.itemsize
    if size != expected:
        state = "truncated or still being written" if size < expected else "damaged"
        raise ValueError(
            f"{path}: {state}: its header promises {n} tokens, {expected} bytes in all, but the "
            f"file has {size}"
        )
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(n,))), offset


def _npy_layout(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, tokens, offset of the first) from a .npy header. Never unpickles."""
    form = np.lib.format
    with path.open("rb") as file:
        try:
            version = form.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"format version {version} is not 1.0 or 2.0")
            read_header = {1: form.read_array_header_1_0, 2: form.read_array_header_2_0}[version[0]]
            shape, _, dtype = read_header(file)
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: not a .npy array ({reason}); save one with np.save(path, ids)"
            ) from None
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: holds pickled objects, which are never loaded; {HOW_TO_SAVE}")
    if len(shape) != 1:
        raise ValueError(f"{path}: has shape {shape}, but token ids are 1-D; {HOW_TO_SAVE}")
    if dtype.kind != "u" or dtype.itemsize not in (2, 4):
        raise ValueError(f"{path}: has dtype {dtype}, not uint16 or uint32; {HOW_TO_SAVE}")
    if shape[0] < 1:
        raise ValueError(f"{path}: holds no tokens")
    return dtype, shape[0], offset


def _bin_layout(path: Path, size: int) -> tuple[np.dtype, int, int]:
    """(dtype, tokens, offset of the first): llm.c's by its magic number, else nanoGPT's."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and int(header[0]) in LLMC_HEADERS:
        version, dtype = LLMC_HEADERS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: llm.c data of version {header[1]}, known is {version}")
        if header[2] < 1:
            raise ValueError(f"{path}: its header promises {header[2]} tokens")
        return np.dtype(dtype), int(header[2]), 1024
    if size % 2:
        raise ValueError(f"{path}: truncated or not raw uint16: it has {size} bytes, an odd number")
    return np.dtype("<u2"), size // 2, 0

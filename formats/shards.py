"""Token shards: one file of token ids, memory-mapped.

    tokens, offset = open_shard(path)       # integers [N], mapped; where they start

`.npy`: 1-D, any integers; FineWeb's are uint16. `.bin`: llm.c's, known by its header, Megatron's,
whose .idx beside it states the width, else raw ids as nanoGPT writes them. Raw ids of two widths
look alike to a reader: the wrong one gives twice as many tokens, or half, and a loss that means
nothing. So their width is found from the ids themselves, and asked for where that leaves a doubt.
"""

import tokenize
from pathlib import Path

import numpy as np

from inputs import refuse_impostor

# llm.c's headers: magic number -> (version, dtype)
LLMC_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
HOW_TO_SAVE = "save it with np.save(path, np.asarray(ids, dtype=np.uint32).ravel())"
# What --token-dtype may say of ids without a header
RAW = {"uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8"}
WIDEST_ID = 2**20  # no vocabulary has as many ids
SAMPLE = 2**20  # bytes that are looked at, at 16 places of a raw file


def open_shard(path: Path, token_dtype: str | None = None) -> tuple[np.ndarray, int]:
    """(token ids [N], mapped; the byte of the file where they start). Reads the header, and of raw
    ids some MB. token_dtype: of RAW, what the caller knows of a file that has no header.

    ValueError, in one line that names the file and the remedy, for what is no such shard.
    """
    refuse_impostor(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(6)
    suffix = path.suffix.lower()
    if start.startswith(b"\x93NUMPY"):
        dtype, n, offset = _npy_layout(path)
        _check_agree(path, dtype, token_dtype)
    elif suffix == ".bin" or (suffix == ".npy" and token_dtype):
        dtype, n, offset = _bin_layout(path, size, token_dtype)
    elif suffix == ".npy":
        dtype, n, offset = _npy_layout(path)  # says why it is none
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
                f"{path}: not a .npy array ({reason}); save one with np.save(path, ids), or say "
                "what raw ids it holds with --token-dtype"
            ) from None
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: holds pickled objects, which are never loaded; {HOW_TO_SAVE}")
    if len(shape) != 1:
        raise ValueError(f"{path}: has shape {shape}, but token ids are 1-D; {HOW_TO_SAVE}")
    if dtype.kind not in "ui":
        raise ValueError(f"{path}: has dtype {dtype}, not integers; {HOW_TO_SAVE}")
    if shape[0] < 1:
        raise ValueError(f"{path}: holds no tokens")
    return dtype, shape[0], offset


def _check_agree(path: Path, dtype: np.dtype, token_dtype: str | None) -> None:
    if token_dtype and RAW[token_dtype] != dtype:
        raise ValueError(f"{path}: its header says {dtype}, not {token_dtype}")


def _bin_layout(path: Path, size: int, token_dtype: str | None) -> tuple[np.dtype, int, int]:
    """(dtype, tokens, offset of the first): llm.c's by its magic number, Megatron's by the index
    beside it, else raw ids."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and int(header[0]) in LLMC_HEADERS:
        version, dtype = LLMC_HEADERS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: llm.c data of version {header[1]}, known is {version}")
        if header[2] < 1:
            raise ValueError(f"{path}: its header promises {header[2]} tokens")
        _check_agree(path, np.dtype(dtype), token_dtype)
        return np.dtype(dtype), int(header[2]), 1024
    raw = np.dtype(
        _megatron_dtype(path) or (token_dtype and RAW[token_dtype]) or _width(path, size)
    )
    if size % raw.itemsize:
        raise ValueError(
            f"{path}: truncated or not raw {raw}: it has {size} bytes, which no number of them has"
        )
    return raw, size // raw.itemsize, 0


def _megatron_dtype(path: Path) -> str | None:
    """What Megatron's index beside a .bin says of it."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        return None
    with index.open("rb") as file:
        head = file.read(18)
    if len(head) < 18 or not head.startswith(MEGATRON_MAGIC):
        return None
    if head[17] not in MEGATRON_DTYPES:
        raise ValueError(f"{index}: dtype {head[17]} holds no token ids")
    return MEGATRON_DTYPES[head[17]]


def _width(path: Path, size: int) -> str:
    """ "<u2" or "<u4" of raw ids, from the ids; ValueError where both could be meant.

    Read by twos, every second word of 32-bit ids is their upper half: 0 or, in the largest
    vocabularies, a little more, whatever the word before it is. In 16-bit ids both are alike.
    """
    if size % 2:
        raise ValueError(
            f"{path}: truncated or not raw token ids: it has {size} bytes, an odd number"
        )
    pieces = []
    with path.open("rb") as file:
        step = max(SAMPLE, size // 16 // 8 * 8)
        for place in range(0, size, step):
            file.seek(place)
            pieces.append(file.read(SAMPLE))
    _refuse_text(path, pieces[0])
    if size % 4:
        return "<u2"
    sample = b"".join(pieces)  # all begin, and but for the last end, at a multiple of eight
    words = np.frombuffer(sample, "<u2")
    small = words < WIDEST_ID >> 16
    lower, upper = small[0::2].mean(), small[1::2].mean()
    tiny = len(words) < 64  # chance alone could make them so
    if upper == 1 and lower < 1 and not tiny:
        long = size % 8 == 0 and not np.frombuffer(sample, "<u4")[1::2].any()
        return "<u8" if long else "<u4"
    if (upper > 0.9 and upper > lower) or not words[1::2].any():
        raise ValueError(
            f"{path}: its ids could be of 16 bits or of more, and no header says which: give "
            "--token-dtype uint16 or uint32"
        )
    return "<u2"


def _refuse_text(path: Path, start: bytes) -> None:
    letters = np.frombuffer(start, np.uint8)
    printable = ((letters >= 0x20) & (letters < 0x7F)) | np.isin(letters, (9, 10, 13))
    if len(letters) >= 64 and printable.all():
        raise ValueError(f"{path}: holds text, not token ids; use --data-mode text")

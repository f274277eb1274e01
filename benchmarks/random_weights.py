"""Random weights in bfloat16 as a Hugging Face directory, without a GPU and through no memory of
their own: written by many threads, for models larger than a disk into a tmpfs that is made large
enough.

    how = make_room(Path("/dev/shm"), n_bytes(config))
    if not is_written(place):
        write(config, place)
"""

import json
import os
import re
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import GPTConfig

POOL = 2**28  # random numbers, of which every matrix has a piece
PIECE = 2**24  # bytes written at a time
WRITERS = 16
OTHERS = 2**34  # bytes of memory for all but the files


def tensors_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by their names in its Hugging Face directory."""
    from formats import layouts, native
    from model import GPTModel

    parts = layouts.parts(GPTModel.on_meta(config), native.layout_of(config))
    return {name: tuple(part.tensor.shape) for name, part in parts}


def n_bytes(config: GPTConfig) -> int:
    """Of its weights in bfloat16."""
    return sum(_bytes(shape) for shape in tensors_of(config).values())


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def is_written(place: Path) -> bool:
    """Whether `write` came to its end there."""
    return (place / "config.json").exists()


def make_room(work: Path, needed: int) -> str:
    """What was done so that so many bytes fit: a tmpfs is half of memory, unless told otherwise."""

    def fits() -> bool:
        return shutil.disk_usage(work).free >= needed

    if fits():
        return "as it was"
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    memory = {name: 1024 * int(rest.split()[0]) for name, rest in (x.split(":") for x in lines)}
    if memory["MemAvailable"] < needed + OTHERS:
        return f"no memory for {needed / 2**30:.0f} GiB"
    size, above = needed + shutil.disk_usage(work).used, work.resolve()
    while not os.path.ismount(above):
        above = above.parent
    for words in (
        ["-o", f"remount,size={size}", above],
        ["-t", "tmpfs", "-o", f"size={needed + PIECE}", "none", work],
    ):
        words = ["mount", *map(str, words)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0 and fits():
            return " ".join(words)
    return f"no room: {done.stderr.strip()}"


def write(config: GPTConfig, place: Path, seed: int = 0) -> None:
    """A file for each layer. What a matrix holds goes from the pool of random numbers to its file,
    through no memory of its own."""
    import torch

    from formats import native

    place.mkdir(parents=True, exist_ok=True)
    pool = torch.empty(min(POOL, n_bytes(config) // 8), dtype=torch.bfloat16)
    pool.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    raw = memoryview(pool.view(torch.uint8).numpy())
    files: dict[str, dict] = {}
    for name, shape in tensors_of(config).items():
        layer = re.search(r"\.(\d+)\.", name)
        file = f"model-{layer[1] if layer else name.removesuffix('.weight')}.safetensors"
        files.setdefault(file, {})[name] = shape
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(lambda file: _fill(place / file, files[file], raw), files))
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": n_bytes(config)}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    native.write_about(config, place, None, torch.bfloat16)


def _fill(path: Path, shapes: dict[str, tuple[int, ...]], raw: memoryview) -> None:
    """Tensors in the layout of safetensors: matrices from `raw`, and vectors of ones."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left, at = _bytes(shape), 2 * (zlib.crc32(name.encode()) % 1000)
            while left and len(shape) > 1:
                n = f.write(raw[at : at + min(left, PIECE)])
                left, at = left - n, (at + n) % len(raw)
            while left:
                left -= f.write(b"\x80\x3f" * (left // 2))

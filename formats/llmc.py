"""llm.c's GPT-2: model_{step}.bin, in float32 or bfloat16.

256 integers, then every parameter, stacked over the layers. The embedding is padded to a multiple
of 128 rows, which its loss never sees: they are cut off.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from config import GPTConfig
from formats import Opened, archives, trained
from formats.stored import rows
from inputs import refuse_impostor

FORMAT = "formats/llmc.py"
MAGIC = 20240326
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by the version in the header
# llm.c's other files
OTHERS = {
    20240327: "activations for debugging",
    20240328: "a tokenizer",
    20240520: "token ids",
    20240522: "an evaluation's data",
    20240527: "an optimizer's state",
    20240801: "token ids",
    20240803: "a Llama 3, whose header cannot hold its norm_eps",
}


def magic(path: Path) -> int | None:
    """The first integer of a .bin file."""
    head = archives.head(path, 4) if path.suffix == ".bin" else b""
    return struct.unpack("<i", head)[0] if len(head) == 4 else None


def recognises(path: Path) -> bool:
    """By its magic number."""
    return magic(path) == MAGIC


def finished(path: Path) -> bool | None:
    """DONE_{step} is written after model_{step}.bin."""
    step = re.fullmatch(r"model_(\d{8})\.bin", path.name)
    return (path.parent / f"DONE_{step[1]}").is_file() if step else None


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step); the step is in the name."""
    return "llm.c", None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """Everything is in the file."""
    refuse_impostor(path)
    with path.open("rb") as f:
        head = f.read(1024)
    if len(head) < 1024:
        raise ValueError(f"{path} is truncated: it has {len(head)} bytes of a header of 1,024")
    _, version, T, V, L, H, C, padded = struct.unpack("<8i", head[:32])
    if version not in DTYPES:
        raise ValueError(f"{path} is of llm.c's version {version}, known are 3 and 5")
    if min(T, V, L, H, C) < 1 or padded < V or C % H:
        raise ValueError(f"{path} is damaged: its header says T {T}, V {V} of {padded}, {L} layers")
    tensors = trained.laid_out(path, 1024, DTYPES[version], _order(T, padded, L, C))
    tensors["token_embedding.weight"] = rows(tensors["token_embedding.weight"], [range(V)])
    config = config or GPTConfig(
        vocab_size=V,
        max_position_embeddings=T,
        n_layers=L,
        n_heads=H,
        d_model=C,
        d_ff=4 * C,
        dropout=0.0,
        activation="gelu_new",
    )
    return trained.opened(path, "llm.c", FORMAT, tensors, config)


def _order(T: int, V: int, L: int, C: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embedding.weight", (V, C)
    yield "position_embedding.weight", (T, C)
    for name, shape in {
        "ln1": (C,), "attn.qkv_proj": (3 * C, C), "attn.out_proj": (C, C),
        "ln2": (C,), "mlp.fc1": (4 * C, C), "mlp.fc2": (C, 4 * C),
    }.items():  # fmt: skip
        for leaf in ("weight", "bias"):
            for i in range(L):
                yield f"blocks.{i}.{name}.{leaf}", shape if leaf == "weight" else shape[:1]
    yield "ln_f.weight", (C,)
    yield "ln_f.bias", (C,)

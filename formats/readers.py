"""The formats of checkpoints, in the order in which they are asked: the first that recognises a
path opens it."""

from pathlib import Path
from types import ModuleType

from formats import (
    adapters,
    dcp,
    dcp_safetensors,
    deepspeed,
    directories,
    gguf,
    lightning,
    litgpt,
    llama2c,
    llmc,
    megatron,
    meta,
    nanochat,
    native,
    olmo_core,
    pt_files,
)

READERS: tuple[ModuleType, ...] = (native, dcp_safetensors)
READERS += (directories, litgpt, olmo_core)
READERS += (megatron, dcp, deepspeed, meta, lightning, llama2c, llmc, gguf, nanochat)
READERS += (pt_files, adapters)


def place_of(path: Path) -> Path:
    """Where the files of a checkpoint lie: itself, or a folder in it."""
    try:
        reader = next((reader for reader in READERS if reader.recognises(path)), None)
        return getattr(reader, "place", lambda path: path)(path) or path
    except Exception:  # an edge: one of a directory, which says what is wrong when it is opened
        return path


def is_run(path: Path) -> bool:
    """Whether a directory that is no checkpoint holds that of a format which has one for a run."""
    return any(reader.place(path) for reader in READERS if hasattr(reader, "place"))

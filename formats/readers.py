"""The formats of checkpoints, in the order in which they are asked: the first that recognises a
path opens it."""

from types import ModuleType

from formats import (
    adapters,
    dcp,
    dcp_safetensors,
    deepspeed,
    gguf,
    huggingface,
    lightning,
    litgpt,
    llama2c,
    llmc,
    meta,
    nanochat,
    native,
    olmo_core,
    pt_files,
)

READERS: tuple[ModuleType, ...] = (native, dcp_safetensors, huggingface, litgpt, olmo_core, dcp)
READERS += (deepspeed, meta, lightning, llama2c, llmc, gguf, nanochat)
READERS += (pt_files, adapters)

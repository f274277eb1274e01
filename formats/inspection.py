"""What a checkpoint holds, for people: from its handle, without reading a tensor."""

import math
from typing import TYPE_CHECKING, Any

import cli
from formats import naming

if TYPE_CHECKING:
    from checkpoint import Checkpoint


def inspect(ckpt: "Checkpoint") -> dict[str, Any]:
    """Plain values for JSON."""
    note = None
    try:
        config = ckpt.config
        note = None if config else ckpt.problem
    except ValueError as error:
        config, note = None, cli.first_line(error)
    sizes = {name: math.prod(t.shape) for name, t in ckpt.tensors.items()}
    if config is not None and config.tie_embeddings:
        sizes.pop(naming.head_name(ckpt.layout or "native"), None)
    return {
        "path": str(ckpt.path),
        "kind": ckpt.kind,
        "base": ckpt.base and str(ckpt.base.path),
        "step": ckpt.step,
        "epoch": ckpt.facts.get("epoch"),
        "loss": ckpt.facts.get("loss"),
        "left_out": ckpt.facts.get("left_out"),
        "parameters": sum(sizes.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in ckpt.tensors.values()}),
        "layout": ckpt.layout,
        "tokenizer": ckpt.tokenizer and str(ckpt.tokenizer),
        "config": config and config.to_dict(),
        "note": note,
    }

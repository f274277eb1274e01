"""What checkpoints hold, for people: from their handles, without reading a tensor."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from formats import naming
from formats.finding import CheckpointInfo

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
        "quantisation": ckpt.facts.get("quantisation"),
        "trained_over": ckpt.facts.get("trained_over"),
        "dtypes": sorted({kind for t in ckpt.tensors.values() for kind in t.kinds}),
        "layout": ckpt.layout,
        "tokenizer": ckpt.tokenizer and str(ckpt.tokenizer),
        "config": config and config.to_dict(),
        "note": note,
    }


def print_list(found: Sequence[CheckpointInfo], directory: str | Path) -> None:
    """ValueError if there are none."""
    if not found:
        raise ValueError(f"{directory} holds no checkpoint")
    print(f"{'step':>10}  {'kind':<12} path")
    for info in found:
        step, why = "-" if info.step is None else info.step, info.problem and f"  ({info.problem})"
        print(f"{step:>10}  {info.kind:<12} {cli.printable(f'{info.path}{why}')}")

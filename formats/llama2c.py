"""llama2.c's checkpoints: what train.py saves, and the .bin files of export.py.

    ckpt.pt                    {model, optimizer, model_args with dim, iter_num, …}
    stories15M.bin             version 0: 7 integers, float32; known by its size alone
    model.bin                  version 1: "ak42", 7 integers, norms first, float32

Not stored, and fixed by its model.py: an epsilon of 1e-5, a rotary base of 10,000.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from config import GPTConfig
from formats import Opened, archives, dialects, trained

FORMAT = "formats/llama2c.py"
MAGIC = 0x616B3432
HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def recognises(path: Path) -> bool:
    """A .bin by its magic number or a header that makes sense; a file of torch.save by the names
    that its pickle holds."""
    if not os.path.isfile(path):
        return False
    if path.suffix == ".bin":
        return _version(path) is not None
    words = (b"model_args", b"n_kv_heads", b"tok_embeddings.weight")
    return path.suffix in (".pt", ".pth") and archives.mentions(path, words)


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """Everything is in the file."""
    if path.suffix != ".bin":
        return _open_training(path, config)
    version, facts, offset = _header(path)
    shared = facts.pop("shared")
    tensors = trained.laid_out(path, offset, torch.float32, _order(version, facts, shared))
    config = config or _config(facts, str(path), shared)
    return trained.opened(path, "llama2.c", FORMAT, tensors, config)


def _open_training(path: Path, config: GPTConfig | None) -> Opened:
    contents = archives.open_archive(path)
    if not isinstance(contents, dict) or not isinstance(contents.get("model_args"), dict):
        raise ValueError(f"{path} is no training state of llama2.c: it has no model_args")
    args = contents["model_args"]
    tensors = dialects.model_part(trained.weights(contents.get("model"), path))
    gate = tensors.get("layers.0.feed_forward.w1.weight")
    if config is None and gate is not None:
        hidden = args.get("hidden_dim") or gate.shape[0]
        config = _config(args | {"hidden_dim": hidden}, str(path), "output.weight" not in tensors)
    step = contents.get("iter_num")
    return trained.opened(path, "llama2.c", FORMAT, tensors, config, step=step)


def _config(args: dict[str, Any], where: str, shared: bool) -> GPTConfig:
    fields = {
        "vocab_size": args.get("vocab_size"),
        "max_position_embeddings": args.get("max_seq_len"),
        "n_layers": args.get("n_layers"),
        "n_heads": args.get("n_heads"),
        "n_kv_heads": args.get("n_kv_heads"),
        "d_model": args.get("dim"),
        "d_ff": args.get("hidden_dim"),
        "norm_eps": args.get("norm_eps", 1e-5),
        "tie_embeddings": True,  # where the file has two that differ, they are found to be untied
    }
    lacking = [name for name, value in fields.items() if value is None and name != "n_kv_heads"]
    if lacking:
        raise ValueError(f"{where}: its model_args lack what says {lacking[0]}")
    return GPTConfig.from_dict(fields | trained.LLAMA | {"tie_embeddings": shared}, where)


# ---------------------------------------------------------------------------------------------
# .bin


def _version(path: Path) -> int | None:
    head = archives.head(path, 36)
    if len(head) >= 8 and struct.unpack("<I", head[:4])[0] == MAGIC:
        return struct.unpack("<i", head[4:8])[0]
    if len(head) < 28:
        return None
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", head[:28])
    sane = 0 < heads <= dim <= 1 << 17 and 0 < hidden <= 1 << 20 and 0 < layers <= 1000
    sane = sane and 0 < kv_heads <= heads and 0 < abs(vocab) <= 1 << 24 and 0 < length <= 1 << 24
    return 0 if sane and dim % heads == 0 and heads % kv_heads == 0 else None


def _header(path: Path) -> tuple[int, dict, int]:
    """(version, the header's fields and whether the head is the embedding, where weights begin)"""
    version = _version(path)
    if version not in (0, 1):
        what = "int8" if version == 2 else "unknown"
        raise ValueError(
            f"{path} is of llama2.c's version {version} ({what}), which is not read: export "
            "version 1 or 0"
        )
    with path.open("rb") as f:
        head = f.read(256)
    if version == 0:
        facts = dict(zip(HEADER, struct.unpack("<7i", head[:28])))
        shared, offset = facts["vocab_size"] > 0, 28
        facts["vocab_size"] = abs(facts["vocab_size"])
    else:
        if len(head) < 256:
            raise ValueError(f"{path} is truncated: it has {len(head)} bytes of a header of 256")
        facts, offset = dict(zip(HEADER, struct.unpack("<7i", head[8:36]))), 256
        shared = head[36] != 0
        if min(facts.values()) < 1 or facts["dim"] % facts["n_heads"]:
            raise ValueError(f"{path} is damaged: its header says {facts}")
    return version, facts | {"shared": shared}, offset


def _order(version: int, facts: dict, shared: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) in the order of the file."""
    C, F, V = facts["dim"], facts["hidden_dim"], facts["vocab_size"]
    D = C // facts["n_heads"]
    K = facts["n_kv_heads"] * D
    shapes = {
        "attention_norm": (C,), "attention.wq": (C, C), "attention.wk": (K, C),
        "attention.wv": (K, C), "attention.wo": (C, C), "ffn_norm": (C,),
        "feed_forward.w1": (F, C), "feed_forward.w2": (C, F), "feed_forward.w3": (F, C),
    }  # fmt: skip
    norms = [name for name in shapes if name.endswith("norm")]

    def stacked(names):
        for name in names:
            for i in range(facts["n_layers"]):
                yield f"layers.{i}.{name}.weight", shapes[name]

    embedding, last = ("tok_embeddings.weight", (V, C)), ("norm.weight", (C,))
    if version == 0:
        yield embedding
        yield from stacked(shapes)
        yield last
        for name in ("freqs_cos", "freqs_sin"):
            yield name, (facts["max_seq_len"], D // 2)
    else:
        yield from stacked(norms)
        yield last
        yield embedding
        yield from stacked(name for name in shapes if name not in norms)
    if not shared:
        yield "output.weight", (V, C)

"""Meta's Llama as released: consolidated.00.pth … and params.json.

Several files are the shards of as many ranks, each of whole heads: rows of wq, wk, wv, w1, w3 and
the head, columns of wo and w2; the embedding is cut by columns in Llama 1 and 2 and by rows in
Llama 3, which the shapes tell. The last file to come is not told from the others by any sign.
"""

import os
import re
from pathlib import Path
from typing import Any

from config import GPTConfig, read_json
from formats import Opened, archives, dialects, trained
from formats.stored import Stored, beside

FORMAT = "formats/meta.py"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
ROWS = re.compile(r"(wq|wk|wv|w1|w3|output)\.weight$")
COLUMNS = re.compile(r"(wo|w2)\.weight$")


def shards(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("consolidated.*.pth") if SHARD.fullmatch(f.name))


def recognises(path: Path) -> bool:
    """The directory, or one of its shards, which stands for all."""
    if os.path.isdir(path):
        return bool(shards(path))
    return os.path.isfile(path) and SHARD.fullmatch(path.name) is not None


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step)"""
    return "meta", None


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """All shards and params.json."""
    folder = path if path.is_dir() else path.parent
    files, said, problem = shards(folder), folder / "params.json", ""
    missing = [n for n, file in enumerate(files) if file.name != f"consolidated.{n:02}.pth"]
    if missing:
        raise ValueError(f"{folder} lacks consolidated.{missing[0]:02}.pth")
    tables = [dialects.model_part(trained.weights(archives.open_archive(f), f)) for f in files]
    for file, table in zip(files, tables):
        if table.keys() != tables[0].keys():
            name = min(table.keys() ^ tables[0].keys())
            raise ValueError(f"{file} and {files[0]} do not go together: one of them lacks {name}")
    params = read_json(said) if said.is_file() else {}
    joined = {n: _merge(n, [t[n] for t in tables], params, folder) for n in tables[0]}
    if config is None and params:
        try:
            config = _config(params, joined, str(said))
        except ValueError as error:
            problem = str(error)
    if said.is_file():
        files = [*files, said]
    return trained.opened(path, "meta", FORMAT, joined, config, files, problem)


def _merge(name: str, parts: list[Stored], params: dict, folder: Path) -> Stored:
    if ROWS.search(name):
        return beside(f"{name} in {folder}", parts)
    if COLUMNS.search(name):
        return beside(f"{name} in {folder}", parts, dim=1)
    if name == "tok_embeddings.weight" and len(parts) > 1:
        columns = parts[0].shape[-1] * len(parts) == params.get("dim")
        return beside(f"{name} in {folder}", parts, dim=1 if columns else 0)
    return parts[0]  # norms, which all ranks have


def _config(params: dict[str, Any], tensors: dict[str, Stored], where: str) -> GPTConfig:
    if params.get("use_scaled_rope"):
        raise ValueError(
            f"{where} has use_scaled_rope, but not its factor (8 in Llama 3.1, 32 in 3.2): give "
            "the model's config with --config"
        )
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps"}
    known |= {"ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "max_seq_len"}
    known |= {"max_batch_size", "head_dim"}
    for name in params.keys() - known:
        raise ValueError(f"{where}: {name} = {params[name]!r} is not known here")
    if type(params.get("max_seq_len")) is not int:
        raise ValueError(
            f"{where} does not say how many positions the model was trained for: give the model's "
            "config with --config"
        )
    shape = {name: stored.shape for name, stored in tensors.items()}
    try:
        fields = {
            "vocab_size": shape["tok_embeddings.weight"][0],
            "max_position_embeddings": params["max_seq_len"],
            "n_layers": params["n_layers"],
            "n_heads": params["n_heads"],
            "n_kv_heads": params.get("n_kv_heads"),
            "d_model": params["dim"],
            "d_ff": shape["layers.0.feed_forward.w1.weight"][0],
            "norm_eps": params["norm_eps"],
            "rope_theta": params.get("rope_theta", 10000.0),
            "tie_embeddings": "output.weight" not in shape,
        }
    except KeyError as error:
        raise ValueError(f"{where}: {error} is missing") from None
    return GPTConfig.from_dict(fields | trained.LLAMA, where)

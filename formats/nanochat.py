"""nanochat's checkpoints: model_{step}.pt beside meta_{step}.json, of its first architecture.

    base_checkpoints/d20/model_021400.pt  meta_021400.json  optim_021400_rank0.pt …
    tokenizer/tokenizer.pkl                                 of all its runs, read without unpickling

The files do not say what the code fixed: rotary positions of base 10,000 that turn by -angle, norms
without weights, relu², queries and keys that are normed after they are turned, logits within 15.
Until January 2026 that was all. What came then has weights of its own, by whose names it is
refused: other constants came along with it, and which ones is in no file.
"""

import os
import re
from pathlib import Path
from typing import Any

from config import GPTConfig
from families.convert import fields_from_hf
from families.dense import SIZES
from formats import Opened, archives, naming, shown, tensorfiles
from formats.stored import Stored, rows
from inputs import read_object

FORMAT = "formats/nanochat.py"
NAME = re.compile(r"model_(\d{6,})\.pt")
LATER = {  # names of weights: what they are, and since when
    r"(resid|x0)_lambdas$": "scalars of each layer's residual stream (since January 2026)",
    r"(^|\.)(value_embeds?|ve_gate)\b": "embeddings of values (since January 2026)",
    r"(^|\.)smear_": "a mixture with the token before (since March 2026)",
    r"(^|\.)backout_": "a middle layer taken off the last one (since March 2026)",
}
KEYS = {  # of model_config: the field that it is
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_kv_head": "n_kv_heads",
    "n_embd": "d_model",
}
EPSILON = 2.0**-23  # float32's, which is what an rms_norm without one adds in that dtype
NAMES = {  # nanochat's own names of weights: transformers'
    r"transformer\.wte\b": "model.embed_tokens",
    r"transformer\.h\b": "model.layers",
    r"\battn\.c_([qkv])\b": r"self_attn.\1_proj",
    r"\battn\.c_proj\b": "self_attn.o_proj",
    r"\bmlp\.c_fc\b": "mlp.fc1",
    r"\bmlp\.c_proj\b": "mlp.fc2",
}


def recognises(path: Path) -> bool:
    """By its name, and by its meta_{step}.json or the names that its pickle holds."""
    if not NAME.fullmatch(path.name) or not os.path.isfile(path):
        return False
    words = (b"transformer.wte.weight", b"transformer.h.0.attn.c_q.weight")
    return os.path.lexists(_meta(path)) or archives.mentions(path, words)


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), from the name."""
    named = NAME.fullmatch(path.name)
    return "nanochat", int(named[1]) if named else None


def finished(path: Path) -> bool | None:
    """meta_{step}.json is written after the weights."""
    return os.path.isfile(_meta(path))


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """The structure of the file, and what its meta_{step}.json says."""
    source, problem = tensorfiles.open_torch(path), ""
    tensors = tensorfiles.stored_tensors(source, tensorfiles.mapping(source))
    tensors = naming.strip_wrappers(tensors)
    for pattern, what in LATER.items():
        if there := [name for name in tensors if re.search(pattern, name)]:
            raise ValueError(
                f"{path} is of a later nanochat: {shown(there, 2)} are {what}, which have no "
                "native form"
            )
    meta, said = _meta(path), {}
    if os.path.lexists(meta):
        said = read_object(meta)
    if config is None:
        try:
            config = _config(said.get("model_config"), meta)
        except ValueError as error:
            problem = str(error)[:1000]
    else:
        _refuse_windows(said.get("model_config"), meta)
    if config is not None:
        tensors = {name: _unpadded(name, t, config) for name, t in tensors.items()}
    return Opened(
        path=path,
        kind="nanochat",
        format=FORMAT,
        tensors={_renamed(name): t for name, t in tensors.items()},
        layout="nanochat",
        files=(path, meta) if said else (path,),
        config=config,
        problem=problem,
        step=glance(path)[1],
        facts={"val_bpb": said["val_bpb"]} if type(said.get("val_bpb")) is float else {},
        tokenizer=_tokenizer(path),
    )


def _meta(path: Path) -> Path:
    return path.with_name(re.sub(r"^model_(\d+)\.pt$", r"meta_\1.json", path.name))


def _tokenizer(path: Path) -> Path | None:
    """tokenizer.pkl, below the directory that all of nanochat's runs are in, or nearer."""
    folders = [folder / "tokenizer" for folder in path.absolute().parents[:3]]
    places = [folder / "tokenizer.pkl" for folder in (path.absolute().parent, *folders)]
    return next((place for place in places if os.path.isfile(place)), None)


def _renamed(name: str) -> str:
    for pattern, new in NAMES.items():
        name = re.sub(pattern, new, name)
    return name


def _unpadded(name: str, stored: Stored, config: GPTConfig) -> Stored:
    """The embedding and the head have rows up to a multiple of 64, which are never scored."""
    padded = -(-config.vocab_size // 64) * 64
    if name not in ("transformer.wte.weight", "lm_head.weight") or stored.shape[:1] != (padded,):
        return stored
    return rows(stored, [range(config.vocab_size)])


def _config(said: Any, meta: Path) -> GPTConfig:
    if not isinstance(said, dict):
        raise ValueError(
            f"{meta} does not say what the model is: it is missing, or has no model_config. Give "
            "the model's config with --config"
        )
    _refuse_windows(said, meta)
    for key in said.keys() - KEYS.keys() - {"window_pattern"}:
        raise ValueError(f"{meta}: model_config has {shown(key)}, which is not known here")
    for key in KEYS.keys() - said.keys():
        raise ValueError(f"{meta}: model_config lacks {key}")
    sizes = {SIZES[field]: said[key] for key, field in KEYS.items()}
    try:
        fields = fields_from_hf({"model_type": "nanochat"} | sizes)
        width = fields["d_model"]
        return GPTConfig(**fields | {"d_ff": 4 * width, "norm_eps": EPSILON})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{meta}: model_config: {error}") from None


def _refuse_windows(said: Any, meta: Path) -> None:
    pattern = said.get("window_pattern", "L") if isinstance(said, dict) else "L"
    if type(pattern) is not str or set(pattern.upper()) != {"L"}:
        raise ValueError(
            f"{meta}: window_pattern {pattern!r:.60} is of a later nanochat, whose short windows "
            "have had several lengths: it has no native form"
        )

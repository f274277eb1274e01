"""Checkpoints: read any of the usual formats, write one that transformers opens directly.

    python checkpoint.py list checkpoints/                  # in step order
    python checkpoint.py inspect checkpoints/checkpoint-1000
    python checkpoint.py convert old/ckpt.pt checkpoints/checkpoint-1000

    model = load_model("checkpoints/checkpoint-1000", dtype="bfloat16", device="cuda")
    path = save_checkpoint(model, optimizer, scheduler, epoch, step, loss, "checkpoints")
    epoch, step, loss = load_checkpoint(path, model, optimizer, scheduler)

Read: .pt files of rosetrainer and nanoGPT, `checkpoint-{step}/pytorch_model.bin` that holds
model_state_dict, and Hugging Face directories (safetensors or .bin, sharded or not). Written:
`checkpoint-{step}/`, a Hugging Face directory plus trainer_state.pt and manifest.json.

Every format is opened as a table, name -> where the bytes lie (tensorfiles.py), under the names of
one of four layouts (layouts.py). The model is built without memory, the table checked against it,
and each tensor goes from the file, a piece at a time, to its place in its final dtype and device.
"""

import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import cli
from config import GPTConfig, UnsupportedArchitecture, config_to_hf, load_config
from durable import dumps, fsync, refuse_impostor
from formats import layouts, tensorfiles
from formats.tensorfiles import FLOATS, Stored
from model import GPTModel
from tokenizer import TOKENIZER_COPIES, TOKENIZER_FILES
from transformers_model import TransformersModel, load_transformers, transformers_sizes

READ_WITH = ("formats/tensorfiles.py", "formats/layouts.py")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
MANIFEST_FORMAT = "roseval checkpoint 1"
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id")  # null if not known: Hugging Face has defaults
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
NOT_WEIGHTS = re.compile(
    r"(trainer_state|optimizer|scheduler|rng_state.*|training_args|scaler)\.\w+"
)


# ---------------------------------------------------------------------------------------------
# Opening: any format becomes a table of tensors, and a config


@dataclass
class Checkpoint:
    path: Path
    kind: str  # roseval, huggingface, rosetrainer, nanogpt, training, weights
    tensors: dict[str, Stored]  # in the layout's full names
    layout: str | None  # of layouts.LAYOUTS; None: not known
    rest: dict  # what else the file holds: step, config, ...


def _weight_file(path: Path) -> Path:
    """The file of weights, or the index of its shards, of a checkpoint path."""
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        if (path / ".metadata").is_file():
            raise ValueError(
                f"{path} is a distributed checkpoint, whose .metadata can run code: convert it "
                "where it was made with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        raise ValueError(f"{path} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return path


def _files(weights: Path) -> list[Path]:
    """The files of an index, or the one file that it is."""
    if weights.suffix != ".json":
        return [weights]
    refuse_impostor(weights)
    try:
        names = sorted(set(json.loads(weights.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{weights} is no index of shards: {cli.first_line(error)}") from None
    for name in names:
        if type(name) is not str or Path(name).name != name or name == "..":
            raise ValueError(f"{weights} names {name!r}: a shard lies in the same directory")
    missing = [name for name in names if not (weights.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{weights.parent} lacks {len(missing)} of {len(names)} shards: "
            f"{', '.join(missing[:5])}"
        )
    return [weights.parent / name for name in names]


def _open_file(path: Path) -> tuple[dict[str, Stored], dict]:
    """(tensors, the rest) of one file."""
    if path.suffix == ".safetensors":
        return tensorfiles.open_safetensors(path), {}
    source = tensorfiles.open_torch(path)
    contents, rest = source.contents, {}
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a dictionary of weights")
    for key in ("model", "model_state_dict"):
        if isinstance(contents.get(key), dict):
            rest = {k: v for k, v in contents.items() if k != key}
            contents = contents[key]
            break
    return tensorfiles.stored_tensors(source, contents), rest


def open_checkpoint(path) -> Checkpoint:
    """The table of a checkpoint's tensors and what else it says; no tensor is read."""
    path = Path(path)
    _check_manifest(path)
    files = _files(_weight_file(path))
    tensors, rest = {}, {}
    for file in files:
        found, rest = _open_file(file)
        tensors |= found
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    tensors = layouts.strip_wrappers(tensors)
    layout = layouts.recognise({name: stored.shape for name, stored in tensors.items()})
    if layout is not None:
        tensors = layouts.canonical(tensors, layout)
    return Checkpoint(path, _kind(path, rest), tensors, layout, rest)


def _kind(path: Path, rest: dict) -> str:
    if "model_args" in rest:
        return "nanogpt"
    if "optimizer_state_dict" in rest:
        return "training"
    if path.is_dir():
        return "roseval" if _manifest(path) else "huggingface" if _config_file(path) else "weights"
    return "rosetrainer" if "step" in rest or "config" in rest else "weights"


def _config_file(path: Path) -> Path | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    return file if file.is_file() else None


def config_of(opened: Checkpoint, given: GPTConfig | None = None) -> GPTConfig:
    """`given`, else the config in the file, else config.json beside it, else one clear error."""
    rest = opened.rest
    if opened.layout is None:
        raise ValueError(
            f"{opened.path}: its weights have names that are not known here: "
            f"{', '.join(list(opened.tensors)[:3])}, …"
        )
    if given is not None:
        config = given
    elif isinstance(rest.get("model_args"), dict):
        config = _nanogpt_config(rest["model_args"], opened.path)
    elif isinstance(rest.get("config"), dict):
        config = _rosetrainer_config(rest["config"], opened)
    elif (file := _config_file(opened.path)) is not None:
        config = GPTConfig.from_pretrained(file)
    else:
        told = ", ".join(f"{k}={v}" for k, v in _told_by_shapes(opened).items())
        raise ValueError(
            f"{opened.path} has no config. Its shapes say {told or 'nothing'}, but not n_heads or "
            "the activation: give the model's config, a preset or a YAML file, with --config"
        )
    return _tie_as_stored(config, opened)


def _told_by_shapes(opened: Checkpoint) -> dict:
    """The fields of rosetrainer's config that the weights themselves fix."""
    shapes = {name: t.shape for name, t in opened.tensors.items()}
    told = {}
    for name, fields in {
        "token_embedding.weight": ("vocab_size", "d_model"),
        "position_embedding.weight": ("max_position_embeddings", "d_model"),
        "blocks.0.mlp.fc1.weight": ("d_ff", "d_model"),
    }.items():
        told |= dict(zip(fields, shapes.get(name, ())))
    layers = {m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))}
    return told | ({"n_layers": len(layers)} if layers else {})


def _rosetrainer_config(values: dict, opened: Checkpoint) -> GPTConfig:
    """Of fields that older files lack, sizes are what the shapes say, dropout and activation
    rosetrainer's defaults (0.1, erf GELU). Its activation is tanh GELU only if "gelu_new"."""
    trainers_own = ("use_tensor_parallel", "use_activation_checkpoint")
    values = {k: v for k, v in values.items() if k not in trainers_own}
    if "n_heads" not in values:
        raise ValueError(
            f"{opened.path}: its config lacks n_heads, which no shape tells: give the model's "
            "config, a preset or a YAML file, with --config"
        )
    if "norm" not in values:  # rosetrainer's fields only
        values["activation"] = "gelu_new" if values.get("activation") == "gelu_new" else "gelu"
    return GPTConfig.from_dict(_told_by_shapes(opened) | values, str(opened.path))


def _nanogpt_config(args: dict, path) -> GPTConfig:
    try:
        return GPTConfig(
            vocab_size=args["vocab_size"],
            max_position_embeddings=args["block_size"],
            n_layers=args["n_layer"],
            n_heads=args["n_head"],
            d_model=args["n_embd"],
            d_ff=4 * args["n_embd"],
            dropout=args.get("dropout", 0.0),
            bias=args.get("bias", True),
            activation="gelu",
        )
    except KeyError as error:
        raise ValueError(f"{path}: model_args lacks {error}") from None


def _tie_as_stored(config: GPTConfig, opened: Checkpoint) -> GPTConfig:
    """rosetrainer's oldest files are untied and do not say so: compare the two tensors."""
    head = opened.tensors.get("lm_head.weight")
    embedding = opened.tensors.get(layouts.embedding_name(opened.layout))
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    return config.replace(tie_embeddings=tensorfiles.equal(head, embedding))


# ---------------------------------------------------------------------------------------------
# Loading


def as_dtype(dtype) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, cli.DTYPES.get(dtype, ""), dtype)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(cli.DTYPES)}, not {dtype!r}")
    return dtype


def load_model(path, dtype=torch.bfloat16, device="cpu", config: GPTConfig | None = None):
    """The model of a checkpoint in evaluation mode, frozen: matrices in `dtype`, norms in float32.
    `config`: for files that hold none.

    A GPTModel wherever GPTModel can express the config, otherwise transformers' own model behind
    the same interface. Raises ValueError, one line, for whatever is wrong with the file.
    """
    path, dtype = Path(path), as_dtype(dtype)
    if config is None and _needs_transformers(path):
        return _load_fallback(path, dtype, device)
    opened = open_checkpoint(path)
    config = config_of(opened, config)
    model = GPTModel.on_meta(config)
    _check_table(model, opened)
    model.allocate(dtype, device)
    _fill(model, opened)
    return model.for_inference(dtype)


def load_weights(path, model: nn.Module) -> None:
    """Weights of any format into a model that exists, in its dtypes and on its device."""
    model, opened = _bare(model), open_checkpoint(path)
    if opened.layout and _tie_as_stored(model.config, opened) != model.config:
        raise ValueError(
            f"{path} has a head of its own, but the model ties its head to the embedding: "
            "set tie_embeddings to false"
        )
    _check_table(model, opened)
    _fill(model, opened)


def _needs_transformers(path: Path) -> bool:
    if not path.is_dir() or _config_file(path) is None:
        return False
    try:
        return GPTConfig.from_pretrained(path).n_experts > 0
    except UnsupportedArchitecture:
        return True


def _load_fallback(path: Path, dtype: torch.dtype, device) -> TransformersModel:
    tensorfiles.require_safe_torch()
    for file in _files(_weight_file(path)):
        _open_file(file)  # says what is wrong with a bad file more clearly than what follows
    return load_transformers(path, dtype, device, load_config_of(path))


def load_config_of(path) -> GPTConfig | None:
    """The config of a checkpoint; None where only transformers knows the architecture."""
    path = Path(path)
    if not (path.is_dir() and _config_file(path)):
        return config_of(open_checkpoint(path))
    try:
        config = GPTConfig.from_pretrained(path)
    except UnsupportedArchitecture:
        return None
    return config if config.n_experts else config_of(open_checkpoint(path))


class Shape(NamedTuple):
    """What evaluations ask of a model before it runs; a loaded model has the same attributes."""

    vocab_size: int
    max_positions: int | None
    supports_cache: bool


def shape_of(path, config: GPTConfig | None = None) -> Shape:
    """The Shape of the model that load_model would return, from the files' headers alone."""
    path = Path(path)
    if config is None and _needs_transformers(path):
        return Shape(*transformers_sizes(path), False)
    config = config_of(open_checkpoint(path), config)
    return Shape(config.vocab_size, config.max_position_embeddings, True)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_table(model: GPTModel, opened: Checkpoint) -> None:
    """Every tensor of the model, of its shape and a float type, and no others. Before anything is
    allocated on the word of a config."""
    tensors = opened.tensors
    wanted = {
        name: list(view.shape) for name, view in layouts.views(model, opened.layout or "native")
    }
    spare = {"lm_head.weight"} if model.config.tie_embeddings else set()
    found = {name: tensors[name] for name in wanted if name in tensors}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and name not in spare],
        "of another shape": [
            f"{name} (file {list(t.shape)}, model {wanted[name]})"
            for name, t in found.items()
            if list(t.shape) != wanted[name]
        ],
        "of a type that is not float32, bfloat16, float16 or float64": [
            f"{name} ({str(t.dtype).removeprefix('torch.')})"
            for name, t in found.items()
            if t.dtype not in FLOATS
        ],
    }
    said = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    trained = opened.rest.get("config")
    if said and isinstance(trained, dict) and trained.get("use_tensor_parallel"):
        said.append("use_tensor_parallel saved the shard of one rank only")
    if said:
        raise ValueError(f"{opened.path}: of {len(wanted)} tensors, {'; '.join(said)}")


@torch.no_grad()
def _fill(model: GPTModel, opened: Checkpoint) -> None:
    """From the file into the model. Refuses a wrong checksum, NaN and Inf."""
    views, records = dict(layouts.views(model, opened.layout)), {}
    for name in views:
        stored = opened.tensors[name]
        if stored.record:
            records.setdefault(stored.file, set()).add(stored.record)
    for file, names in records.items():
        tensorfiles.check_crc(file, names)
    extremes = {}
    with cli.progress(len(views), f"loading {opened.path.name}", "tensor") as bar:
        for name, view in views.items():
            for row, piece in tensorfiles.pieces(opened.tensors[name]):
                view[row : row + len(piece)].copy_(piece)
            extremes[name] = tensorfiles.extremes(view)
            bar.update(1)
    tensorfiles.refuse_nonfinite(extremes, opened.path)


# ---------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    model,
    optimizer,
    scheduler,
    epoch: int,
    step: int,
    loss: float,
    output_dir,
    config: GPTConfig | None = None,
    tokenizer=None,
    extra: dict | None = None,
    keep: int | None = None,
) -> Path:
    """Write output_dir/checkpoint-{step}/ and return it. For one process (rank 0) a directory.

    extra: plain values and tensors, such as RNG states and the data position, that
    `load_training_state` gives back; its "tokens", the tokens trained on, is also what `describe`
    and the records of evaluations say. keep: delete all but the last `keep` checkpoints and the
    one with the lowest loss.

    The directory is made under a hidden name, every file is flushed, manifest.json with the
    sha256 of all the others last, and then one rename makes it appear: a `checkpoint-{step}` with
    a manifest is whole, whenever the process or the machine dies, and nothing else is.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    model, output = _bare(model), Path(output_dir)
    final = output / f"checkpoint-{step}"
    state = {
        "epoch": epoch,
        "step": step,
        "loss": float(loss),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra or {},
    }
    output.mkdir(parents=True, exist_ok=True)
    for leftover in [*output.glob(".tmp-checkpoint-*"), *output.glob(".old-checkpoint-*")]:
        shutil.rmtree(leftover)
    temporary = output / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        write_weights(model, config or model.config, temporary, tokenizer)
        _save_state(state, temporary / "trainer_state.pt")
        about = {"epoch": epoch, "step": step, "loss": float(loss)}
        about["tokens"] = state["extra"].get("tokens")
        _write_manifest(temporary, about)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if keep is not None:
        _prune(output, keep, final)
    return final


def write_weights(
    model: GPTModel, config: GPTConfig, directory: Path, tokenizer=None, dtype=None, **about
) -> None:
    """config.json, model.safetensors and the tokenizer's files: in Hugging Face's layout where an
    architecture has the config, else under our own names. dtype: as the parameters are, unless
    given. about: more fields for config.json."""
    hf = config_to_hf(config)
    layout = "native" if hf is None else "gpt2" if hf["model_type"] == "gpt2" else "llama"
    views = dict(layouts.views(model, layout))
    dtype = dtype or next(iter(views.values())).dtype
    about["dtype"] = str(dtype).removeprefix("torch.")
    if hf is None:
        about["note"] = "no Hugging Face architecture computes this: native names, roseval only"
    for key in TOKEN_IDS:
        about.setdefault(key, getattr(tokenizer, key, None))
    if tokenizer is not None:
        tokenizer.save(directory)
    config.save_pretrained(directory, **about)
    tensorfiles.write_safetensors(directory / "model.safetensors", views, dtype)


def _save_state(state: dict, path: Path) -> None:
    torch.save(state, path)
    with torch.serialization.safe_globals(tensorfiles.allowed_globals()):
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        raise ValueError(
            f"the training state holds {', '.join(sorted(unsafe))}, which could not be loaded "
            "again: `extra` and the optimizer's state take tensors and plain values only"
        )


def _write_manifest(directory: Path, about: dict) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        fsync(path)
    text = dumps({"format": MANIFEST_FORMAT, **about, "files": files}, indent=2) + "\n"
    (directory / "manifest.json").write_text(text)
    fsync(directory / "manifest.json")
    fsync(directory)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename. A step that was saved before changes places with the new one at once, where the
    file system can do that (Linux: renameat2), and is deleted then."""
    if final.exists():
        aside = final.parent / f".old-{final.name}-{os.getpid()}"
        if _exchange(temporary, final):
            temporary.rename(aside)
        else:
            final.rename(aside)
            temporary.rename(final)
        fsync(final.parent)
        shutil.rmtree(aside)
    else:
        temporary.rename(final)
        fsync(final.parent)


def _exchange(a: Path, b: Path) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _prune(output: Path, keep: int, newest: Path) -> None:
    """Delete old checkpoints: renamed away first, so that none is ever seen half deleted."""
    ours = [info.path for info in list_checkpoints(output) if info.kind == "roseval"]
    losses = {path: _manifest(path).get("loss") for path in ours}
    losses = {path: math.inf if loss is None else loss for path, loss in losses.items()}
    for path in ours[:-keep]:
        if path not in (newest, min(losses, key=losses.get)):
            aside = output / f".old-{path.name}-{os.getpid()}"
            path.rename(aside)
            fsync(output)
            shutil.rmtree(aside)


# ---------------------------------------------------------------------------------------------
# Training state

STATE_NAMES = {  # ours: theirs
    "optimizer": ("optimizer", "optimizer_state_dict"),
    "scheduler": ("scheduler", "scheduler_state_dict"),
    "epoch": ("epoch",),
    "step": ("step", "iter_num"),
    "loss": ("loss", "best_val_loss"),
    "extra": ("extra",),
}


def load_training_state(path) -> dict:
    """optimizer, scheduler, epoch, step, loss and extra of a checkpoint; None what it has not."""
    path = Path(path)
    file = path / "trainer_state.pt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        file = _weight_file(path)
    if file.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"{path} has no training state: it holds weights only (--init-from)")
    _check_manifest(path)
    source = tensorfiles.open_torch(file)  # its checks; the state itself is then read, not mapped
    tensorfiles.check_crc(file, [record.name for record in source.records if record.name])
    del source
    contents = tensorfiles.load_torch(file, mapped=False)
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds a {type(contents).__name__}, not a training state")
    return {
        ours: next((contents[name] for name in theirs if name in contents), None)
        for ours, theirs in STATE_NAMES.items()
    }


def load_checkpoint(checkpoint_path, model, optimizer=None, scheduler=None):
    """Restore model, optimizer and scheduler exactly; returns (epoch, step, loss). What else was
    saved (`extra`) comes from `load_training_state`."""
    state = load_training_state(checkpoint_path)
    for name, wanted in (("optimizer", optimizer), ("scheduler", scheduler)):
        if wanted is not None and state[name] is None:
            raise ValueError(f"{checkpoint_path} holds no {name} state")
    load_weights(checkpoint_path, model)
    try:
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint_path}: its training state does not fit: {error}") from None
    return state["epoch"] or 0, state["step"] or 0, state["loss"]


# ---------------------------------------------------------------------------------------------
# Finding


class CheckpointInfo(NamedTuple):
    path: Path
    step: int | None
    name: str
    kind: str  # as Checkpoint.kind, or "unreadable"


def is_checkpoint(path) -> bool:
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (*WEIGHT_FILES, ".metadata"))
    suffixes = (*TORCH_SUFFIXES, ".safetensors")
    return path.suffix in suffixes and path.is_file() and not NOT_WEIGHTS.fullmatch(path.name)


def is_complete(path) -> bool:
    """Whether a checkpoint's files are all there and whole, as far as sizes and tables of contents
    tell. For a watcher: ours are whole when they appear, others grow under their final name."""
    try:
        open_checkpoint(path)
    except (ValueError, OSError):
        return False
    return True


def list_checkpoints(directory) -> list[CheckpointInfo]:
    """The checkpoints in a directory, in step order; those without a step come last."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    return _in_order(p for p in directory.iterdir() if not p.name.startswith("."))


def _in_order(paths) -> list[CheckpointInfo]:
    found = [info_of(path) for path in paths if is_checkpoint(path)]
    return sorted(found, key=lambda c: (c.step is None, c.step or 0, _natural(c.name)))


def info_of(path: Path) -> CheckpointInfo:
    """What a checkpoint is called, its step and kind; an unreadable one has them too."""
    name = path.name if path.is_dir() else path.stem
    step, kind = _step_in_name(name), "unreadable"
    try:
        if path.is_dir() and (manifest := _manifest(path)):
            return CheckpointInfo(path, manifest.get("step"), name, "roseval")
        file = _weight_file(path)
        rest = _open_file(file)[1] if file.suffix in TORCH_SUFFIXES else {}
        kind = _kind(path, rest)
    except (ValueError, OSError):
        return CheckpointInfo(path, step, name, kind)
    inside = _number(rest.get("step", rest.get("iter_num")))
    return CheckpointInfo(path, inside if isinstance(inside, int) else step, name, kind)


def _number(value):
    """A plain number of what a training file holds: numpy's and one-element tensors included."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    return value if isinstance(value, (int, float)) else None


def _step_in_name(name: str) -> int | None:
    word = re.search(r"(?:checkpoint|ckpt|step|iter)[-_=]?(\d+)", name)
    word = word or re.search(r"(?:^|[-_])(\d+)$", name)
    return int(word[1]) if word else None


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def expand_paths(paths) -> list[Path]:
    """Checkpoint paths from files, checkpoint directories, directories of checkpoints and globs,
    each once, in the order given and in step order within a directory or glob."""
    found = []
    for given in paths:
        path = Path(given)
        if is_checkpoint(path) or path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [info.path for info in list_checkpoints(path)]
        else:
            matches = [info.path for info in _in_order(map(Path, glob.glob(str(given))))]
        if not matches:
            what = "does not exist"
            if path.is_dir():  # its files tell whether the weights are missing or it is another
                names = sorted(entry.name for entry in path.iterdir())[:5]
                what = f"holds no checkpoint, only {', '.join(names) or 'nothing'}"
            raise ValueError(f"{given} {what}")
        found += matches
    return list(dict.fromkeys(found))


def describe(path, config: GPTConfig | None = None) -> dict:
    """What a result record says of the checkpoint it was measured on: results.py's `checkpoint`.
    `config`: the loaded model's, where that is at hand."""
    info, config = info_of(Path(path)), config or load_config_of(path)
    return {
        "path": str(path),
        "name": info.name,
        "step": info.step,
        "tokens": (_manifest(Path(path)) or {}).get("tokens"),
        "fingerprint": fingerprint(path),
        "config": config and config.to_dict(),
    }


def find_tokenizer(path) -> Path | None:
    """The directory with tokenizer files that goes with a checkpoint: itself, or the run's."""
    path = Path(path)
    here = path if path.is_dir() else path.parent
    for directory in [here, here.parent] if path.is_dir() else [here]:
        if any((directory / name).is_file() for name in TOKENIZER_FILES):
            return directory
    return None


def _manifest(path: Path) -> dict | None:
    """The manifest of a directory that `save_checkpoint` wrote, None if there is none."""
    file = path / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} is damaged: it is not JSON") from None
    ours = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
    return manifest if ours else None  # others use the name too


def _check_manifest(path: Path, content: bool = False) -> None:
    """Sizes as the manifest has them; `content`: the sha256 too."""
    for name, entry in (_manifest(path) or {"files": {}})["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise ValueError(f"{file} has {size} bytes, its manifest says {entry['bytes']:,}")
        if content and _sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its sha256 is not the manifest's")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(path) -> str:
    """sha256 that identifies a checkpoint: of its manifest, else of config.json and the weights.
    The digest of a large file is remembered under ~/.cache/roseval by inode, size and mtime."""
    path = Path(path)
    if _manifest(path):
        return _sha256(path / "manifest.json")
    weights = _weight_file(path)
    files = sorted({weights, *_files(weights)})
    if path.is_dir() and (config := _config_file(path)):
        files.append(config)
    digests = [f"{file.name} {_remembered_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _remembered_sha256(path: Path) -> str:
    s = path.stat()
    key = f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "roseval/sha256"
    memo = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memo.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    digest = _sha256(path)
    with contextlib.suppress(OSError):  # a read-only home only costs the next start some time
        cache.mkdir(parents=True, exist_ok=True)
        memo.write_text(digest)
    return digest


READERS = (tensorfiles, layouts)


class _Handle:
    def __init__(self, path, config):
        self.path, self._config = Path(path), config
        self.vocab_size, self.max_positions, self.supports_cache = shape_of(path, config)
        self.tokenizer, info = find_tokenizer(path), info_of(Path(path))
        self.name, self.step, self.kind = info.name, info.step, info.kind
        self.format = READ_WITH[0]

    @property
    def fingerprint(self):
        return fingerprint(self.path)

    def describe(self):
        return describe(self.path, self._config)

    def load(self, dtype, device):
        return load_model(self.path, dtype, device, self._config)


def open(path, config=None):
    return _Handle(path, config)


# ---------------------------------------------------------------------------------------------
# Command line


def inspect(path, config: GPTConfig | None = None) -> dict:
    """What a checkpoint holds, without reading a tensor."""
    path = Path(path)
    opened, info, note = open_checkpoint(path), info_of(path), None
    try:
        config = config_of(opened, config)
    except ValueError as error:
        config, note = None, cli.first_line(error)
    said = opened.rest | (_manifest(path) or {})
    sizes = {name: math.prod(t.shape) for name, t in opened.tensors.items()}
    if config is not None and config.tie_embeddings:
        sizes.pop("lm_head.weight", None)
    return {
        "path": str(path),
        "kind": opened.kind,
        "step": info.step,
        "epoch": _number(said.get("epoch")),
        "loss": _number(said.get("loss")),
        "parameters": sum(sizes.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in opened.tensors.values()}),
        "layout": opened.layout,
        "tokenizer": (found := find_tokenizer(path)) and str(found),
        "config": config and config.to_dict(),
        "note": note,
    }


def convert(source, destination, config: GPTConfig | None = None) -> Path:
    """Any readable checkpoint to a directory as `save_checkpoint` writes it, in the dtype that it
    has, without training state."""
    source, final = Path(source), Path(destination)
    if final.exists():
        raise ValueError(f"{final} exists already: name a new directory")
    opened = open_checkpoint(source)
    dtype = next(iter(opened.tensors.values())).dtype
    config = config_of(opened, config)
    model = load_model(source, dtype, config=config)
    tokenizer, file = find_tokenizer(source), _config_file(source)
    said = json.loads(file.read_text()) if file else {}
    temporary = final.parent / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        ids = {key: said.get(key) for key in TOKEN_IDS}
        write_weights(model, model.config, temporary, dtype=dtype, **ids)
        for name in TOKENIZER_COPIES if tokenizer else ():
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, temporary)
        _write_manifest(temporary, {"step": info_of(source).step, "converted": source.name})
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def main(argv=None):
    p = cli.parser(__doc__)
    jobs = p.add_subparsers(dest="job", required=True, metavar="list|inspect|convert")
    listing = jobs.add_parser("list", help="checkpoints of a directory, in step order")
    listing.add_argument("directory")
    inspecting = jobs.add_parser("inspect", help="what a checkpoint holds")
    inspecting.add_argument("path")
    inspecting.add_argument("--verify", action="store_true", help="read all of it and check sha256")
    converting = jobs.add_parser("convert", help="to a Hugging Face directory")
    converting.add_argument("source")
    converting.add_argument("destination")
    for job in (inspecting, converting):
        job.add_argument("--config", help="preset or YAML file, for files that hold no config")
    for job in (listing, inspecting, converting):
        job.add_argument("--debug", action="store_true")
    args = p.parse_args(argv)
    if args.job == "list":
        print_list(args.directory)
        return
    config = load_config(args.config) if args.config else None
    if args.job == "convert":
        print(convert(args.source, args.destination, config))
        return
    for key, value in inspect(args.path, config).items():
        print(f"{key}: {json.dumps(value)}")
    if args.verify:
        _check_manifest(Path(args.path), content=True)
        load_model(args.path, "float32", config=config)
        print("verified: checksums hold, every weight is a finite number")


def print_list(directory) -> None:
    found = list_checkpoints(directory)
    if not found:
        raise ValueError(f"{directory} holds no checkpoint")
    print(f"{'step':>10}  {'kind':<12} path")
    for info in found:
        print(f"{'-' if info.step is None else info.step:>10}  {info.kind:<12} {info.path}")


if __name__ == "__main__":
    cli.run(main)

"""Our own `checkpoint-{step}/`: a Hugging Face directory, trainer_state.pt and manifest.json.

    with appearing(final, {"step": 1000, "loss": 2.5}) as directory:
        write_weights(model, model.config, directory, tokenizer)
        training_state.write(state, directory)

The directory is made under a hidden name, every file is flushed, manifest.json with the sha256 of
all the others last, and then one rename makes it appear: a `checkpoint-{step}` with a manifest is
whole, whenever the process or the machine dies, and nothing else is.
"""

import contextlib
import ctypes
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import GPTConfig
from durable import dumps, fsync
from families.convert import config_to_hf
from formats import Opened, huggingface, layouts, naming, tensorfiles, training_state
from formats.fingerprints import sha256
from formats.huggingface import TOKEN_IDS
from inputs import read_object
from model import GPTModel

FORMAT = "formats/native.py"
MANIFEST_FORMAT = "roseval checkpoint 1"
ADAPTER = "adapter_config.json"  # has a reader of its own (adapters.py)
Entries = dict[str, dict[str, Any]]  # of a manifest's files, by name
MOST = 2**53  # of a number that all readers of JSON agree about
STATED: dict[str, tuple[tuple[type, ...], float]] = {  # fields: their types, the least value
    "step": ((int,), 0),
    "tokens": ((int,), 0),
    "epoch": ((int, float), 0),
    "loss": ((int, float), -MOST),
}


# ---------------------------------------------------------------------------------------------
# Reading


def recognises(path: Path) -> bool:
    """A directory with a manifest of ours, or with a damaged one; not an adapter's."""
    try:
        manifest = read_manifest(path)
        return manifest is not None and ADAPTER not in manifest["files"]
    except ValueError:
        return True


def finished(path: Path) -> bool:
    """Always: our directories appear whole."""
    return True


def glance(path: Path) -> tuple[str, int | None]:
    """(kind, step), as the manifest has it."""
    return "roseval", (read_manifest(path) or {}).get("step")


def open(path: Path, config: GPTConfig | None = None) -> Opened:
    """A Hugging Face directory whose manifest says more."""
    manifest = check_manifest(path) or {}  # first: it knows what a truncated file is
    opened = huggingface.open(path, config)
    return stated(replace(opened, kind="roseval", format=FORMAT), manifest)


def stated(opened: Opened, manifest: dict[str, Any]) -> Opened:
    """With what a manifest says beyond the files. Its sha256 stands for the checkpoint's, so it
    must cover all that are read."""
    file = opened.path / "manifest.json"
    for read in opened.files:
        if read.name not in manifest.get("files", ()):
            raise ValueError(f"{file} does not know {read.name}, which is read")
    facts = {name: manifest.get(name) for name in ("epoch", "loss", "tokens", "trained_over")}
    step = manifest.get("step")
    return replace(opened, step=step, facts=opened.facts | facts, manifest=file)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory that `appearing` wrote, None if there is none. ValueError where
    a field is not what `appearing` writes."""
    file = path / "manifest.json"
    if not os.path.lexists(file):
        return None
    manifest = read_object(file)
    if manifest.get("format") != MANIFEST_FORMAT:
        return None  # others use the name too
    if not isinstance(manifest.get("trained_over"), str | None):
        raise ValueError(f"{file}: trained_over must be the name of a rule")
    for name, (kinds, least) in STATED.items():
        value: Any = manifest.get(name)
        if value is not None and not (type(value) in kinds and least <= value <= MOST):
            raise ValueError(f"{file}: {name} must be a number, or null, not {value!r:.60}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{file}: files must be an object, not {files!r:.60}")
    for name, entry in files.items():
        digest = str(entry.get("sha256")) if isinstance(entry, dict) else ""
        whole = re.fullmatch("[0-9a-f]{64}", digest) and type(entry.get("bytes")) is int
        if not (whole and huggingface.is_plain_name(name)):
            raise ValueError(f"{file}: {name!r:.60} is no file with its bytes and its sha256")
    return manifest


def check_manifest(path: Path, content: bool = False) -> dict[str, Any] | None:
    """The manifest, after a check of the sizes that it states; `content`: of the sha256 too."""
    manifest = read_manifest(path)
    for name, entry in (manifest or {"files": {}})["files"].items():
        file = path / name
        size = os.path.getsize(file) if os.path.isfile(file) else None
        if size != entry["bytes"]:
            there = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(
                f"{file} {there}, its manifest says {entry['bytes']:,}: it is damaged, or was "
                "changed on purpose: then delete manifest.json"
            )
        if content and sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its sha256 is not the manifest's")
    return manifest


# ---------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    epoch: int,
    step: int,
    loss: float,
    output_dir: str | Path,
    config: GPTConfig | None = None,
    tokenizer: Any = None,
    extra: dict | None = None,
    keep: int | None = None,
) -> Path:
    """Write output_dir/checkpoint-{step}/ and return it. For one process (rank 0) a directory.

    extra: plain values and tensors, such as RNG states and the data position, that
    `load_training_state` gives back; its "tokens", the tokens trained on, is also what the records
    of evaluations say. keep: delete all but the last `keep` checkpoints and the one with the lowest
    loss. The directory appears whole or not at all.
    """
    gpt = layouts.bare(model)
    about = {"epoch": epoch, "step": step, "loss": float(loss)}
    state = about | {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra or {},
    }

    def write(directory: Path) -> None:
        write_weights(gpt, config or gpt.config, directory, tokenizer)

    return save_state(state, output_dir, write, keep)


def save_state(
    state: dict[str, Any],
    output_dir: str | Path,
    write: Callable[[Path], Entries | None],
    keep: int | None,
) -> Path:
    """`save_checkpoint` of a state (epoch, step, loss, optimizer, scheduler, extra) beside whatever
    `write` puts into the directory; what it returns is said of files that others have flushed."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    output = Path(output_dir)
    _remove_leftovers(output)
    final = output / f"checkpoint-{state['step']}"
    about = {name: state[name] for name in ("epoch", "step", "loss")}
    known: Entries = {}
    about |= {"tokens": state["extra"].get("tokens")}
    if rounded := state["extra"].get("quantisation"):  # of the frozen weights below an adapter
        about["trained_over"] = rounded["rule"]
    with appearing(final, about, known) as directory:
        known |= write(directory) or {}
        training_state.write(state, directory)
    if keep is not None:
        _prune(output, keep, newest=final)
    return final


@contextlib.contextmanager
def appearing(
    final: Path, about: dict[str, Any] | None, known: Entries | None = None
) -> Iterator[Path]:
    """A directory to fill, which becomes `final`, whole or not at all. about: what its manifest
    states beyond the files; None: it has none. known: of files that are flushed and hashed."""
    temporary = final.parent / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if about is not None:
            _write_manifest(temporary, about, known or {})
        else:
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(
    model: GPTModel,
    config: GPTConfig,
    directory: Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    **about: Any,
) -> None:
    """config.json, model.safetensors and the tokenizer's files: in Hugging Face's layout where an
    architecture has the config, else under our own names. dtype: as the parameters are, unless
    given. about: more fields for config.json."""
    layout = layout_of(config)
    views = dict(layouts.views(model, layout))
    dtype = dtype or next(iter(views.values())).dtype
    write_about(config, directory, tokenizer, dtype, **about)
    unrounded = layouts.never_rounded(views, layout)
    tensorfiles.write_safetensors(directory / "model.safetensors", views, dtype, unrounded)


def layout_of(config: GPTConfig) -> str:
    """In which weights are written."""
    hf = config_to_hf(config)
    layout = "native" if hf is None else naming.of_family(hf["model_type"])
    assert layout is not None, hf
    return layout


def write_about(
    config: GPTConfig, directory: Path, tokenizer: Any, dtype: torch.dtype, **about: Any
) -> None:
    """What lies beside weights: config.json and the tokenizer's files."""
    about["dtype"] = str(dtype).removeprefix("torch.")
    if layout_of(config) == "native":
        about["note"] = "no Hugging Face architecture computes this: native names, roseval only"
    for key in TOKEN_IDS:  # null if not known: Hugging Face has defaults
        about.setdefault(key, getattr(tokenizer, key, None))
    if tokenizer is not None:
        tokenizer.save(directory)
    config.save_pretrained(directory, **about)


def flushed(path: Path) -> dict[str, Any]:
    """What a manifest says of a file, which is on disk then."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_manifest(directory: Path, about: dict[str, Any], known: Entries) -> None:
    files = {
        path.name: known.get(path.name) or flushed(path) for path in sorted(directory.iterdir())
    }
    text = dumps({"format": MANIFEST_FORMAT, **about, "files": files}, indent=2) + "\n"
    (directory / "manifest.json").write_text(text, encoding="utf-8")
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


def _remove_leftovers(output: Path) -> None:
    """What killed processes left half written or half deleted."""
    for leftover in [*output.glob(".tmp-checkpoint-*"), *output.glob(".old-checkpoint-*")]:
        shutil.rmtree(leftover)


def _prune(output: Path, keep: int, newest: Path) -> None:
    """Delete all of our checkpoints but the last `keep`, the one with the lowest loss, and
    `newest`. They are renamed away first, so that none is ever seen half deleted."""
    manifests = {}
    for path in output.iterdir():
        with contextlib.suppress(ValueError):
            manifest = None if path.name.startswith(".") else read_manifest(path)
            if manifest is not None:
                manifests[path] = manifest
    steps = {path: manifest.get("step") for path, manifest in manifests.items()}
    ours = sorted(steps, key=lambda path: (steps[path] is None, steps[path] or 0, path.name))
    stated = {path: manifests[path].get("loss") for path in ours}
    losses = {path: math.inf if loss is None else loss for path, loss in stated.items()}
    for path in ours[:-keep]:
        if path not in (newest, min(losses, key=losses.__getitem__)):
            aside = output / f".old-{path.name}-{os.getpid()}"
            path.rename(aside)
            fsync(output)
            shutil.rmtree(aside)

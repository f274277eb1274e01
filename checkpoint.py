"""Checkpoints: read any of the usual formats, write one that transformers opens directly.

    python checkpoint.py list checkpoints/                  # in step order
    python checkpoint.py inspect checkpoints/checkpoint-1000
    python checkpoint.py convert old/ckpt.pt checkpoints/checkpoint-1000
    python checkpoint.py convert lora/ merged/ --to hf      # an adapter, into its base
    python checkpoint.py extend-vocab old/ new/ --tokenizer larger/

    ckpt = checkpoint.open("checkpoints/checkpoint-1000")   # headers only, once
    ckpt.step, ckpt.config, ckpt.tokenizer, ckpt.fingerprint
    model = ckpt.load("bfloat16", "cuda")                   # or load_model(path, dtype, device)

    path = save_checkpoint(model, optimizer, scheduler, epoch, step, loss, "checkpoints")
    epoch, step, loss = load_checkpoint(path, model, optimizer, scheduler)

Read: what the files of formats/ say (formats/readers.py lists them). Written:
`checkpoint-{step}/`, a Hugging Face directory plus trainer_state.pt and manifest.json.

Every format (READERS) is opened as a table, name -> where the bytes lie (formats/stored.py), under
the names of a layout (formats/naming.py). A model is built without memory, the table checked with
it (formats/layouts.py), and each tensor put in its place, dtype and device (formats/filling.py).
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import installed  # noqa: F401

import torch
from torch import nn

import cli
import formats
from config import GPTConfig, load_config
from formats import (
    adapters,
    conversion,
    filling,
    finding,
    fingerprints,
    foreign,
    huggingface,
    inspection,
    layouts,
    merging,
    naming,
    native,
    row_shards,
    stored,
    training_state,
)
from formats.finding import CheckpointInfo, find_tokenizer
from formats.readers import READERS, is_run, place_of
from model import GPTModel
from packed import require_file
from quantisation.apply import Rounding
from transformers_model import Model, TransformersModel, load_transformers, transformers_sizes

# ---------------------------------------------------------------------------------------------
# The handle


def open(
    path: str | Path, config: GPTConfig | None = None, base: "Checkpoint | str | Path | None" = None
) -> "Checkpoint":
    """The handle of a checkpoint, from the headers of its files. `config`: for files that hold
    none. `base`: of an adapter, whose own files name one too. ValueError, one line, for whatever is
    wrong with a file."""
    path = formats.named(path)
    with _readable(path):
        opened = reader_of(path).open(path, config)
        if opened.adapter is None:
            return Checkpoint(opened)
        if not isinstance(base, Checkpoint):
            base = open(adapters.base_path(opened, base), config)
        return Checkpoint(adapters.onto(opened, base), base)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that may not be read, or is gone, is wrong like any other."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{error.filename or path} cannot be read: {why}") from None


def reader_of(path: Path) -> ModuleType:
    """The format of a path. A file that none recognises by its name is tried, and refused by what
    is in it; of a run, the checkpoint that it calls its latest."""
    for question in ("recognises", "tries"):
        for reader in READERS:
            if getattr(reader, question, lambda path: False)(path):
                return reader
        if (question == "tries" or not os.path.isdir(path)) and (kind := foreign.what_is(path)):
            raise ValueError(f"{path} is {kind}")
    if not os.path.isdir(path):
        require_file(path)
    if finding.closed_to_us(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    instead = finding.inside(path, LOOK) or f"none of {', '.join(huggingface.WEIGHT_FILES)}"
    raise ValueError(f"{path} holds no weights: {instead}")


class Checkpoint:
    """A checkpoint that was opened once: what its files state, and the way to its model.

    Attributes beside the properties below: path; name; kind, what its format calls it ("roseval",
    "gguf", "adapter"); format, the file that opened it ("formats/native.py"); rooms, all such
    files; base, the handle of an adapter's base; step, as the files or the name state it; tensors,
    {name: stored.Stored}, and their layout; tokenizer, the directory with tokenizer files that goes
    with it, or the file that holds one; facts, plain values that the files state (epoch, loss,
    tokens); native, whether GPTModel runs it, not transformers; problem, why its config is not
    known. No file stays open.
    """

    def __init__(self, opened: formats.Opened, base: "Checkpoint | None" = None):
        self._opened, self.path, self.base = opened, opened.path, base
        self.kind, self.format, self.native = opened.kind, opened.format, opened.native
        self.rooms: tuple[str, ...] = (opened.format, *(base.rooms if base else ()))
        self.tensors, self.layout, self.facts = opened.tensors, opened.layout, opened.facts
        self.problem = opened.problem
        self.name = formats.name_of(self.path)
        self.step = formats.step_in_name(self.name) if opened.step is None else opened.step
        own = opened.tokenizer or find_tokenizer(self.path)
        self.tokenizer: Path | None = own or (base.tokenizer if base else None)
        self._as_opened = self._state_of_files()

    @cached_property
    def config(self) -> GPTConfig | None:
        """None where only transformers knows the architecture. ValueError where the files do not
        say it and the caller did not either."""
        opened = self._opened
        if not self.native:
            return opened.config
        if self.layout is None:
            raise ValueError(opened.problem or f"{self.path}: {naming.unknown_names(self.tensors)}")
        if opened.config is None:
            raise ValueError(opened.problem)
        layouts.check_sizes(opened.config, self.tensors, self.layout, self.path, opened.hint)
        with _readable(self.path):
            return self._tied_as_stored(opened.config, self.layout)

    @cached_property
    def _sizes(self) -> tuple[int, int | None]:
        if not self.native:
            return transformers_sizes(self.base.path if self.base else self.path)
        assert self.config is not None, "a native one has a config, or says why not"
        return self.config.vocab_size, self.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Of the model that `load` gives."""
        return self._sizes[0]

    @property
    def context(self) -> int | None:
        """Positions that the model can hold; None if nobody says."""
        return self._sizes[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of its manifest, else of its files; of an adapter, its base's and its own."""
        with _readable(self.path):
            found = fingerprints.fingerprint(self._opened)
            self._check_unchanged()
        return fingerprints.of_both(self.base.fingerprint, found) if self.base else found

    def describe(self) -> dict[str, Any]:
        """results.py's `checkpoint`: what a record says of what it was measured on."""
        base, told = self.base, ("quantisation", "trained_over")
        return {
            "path": str(self.path),
            "name": self.name,
            "step": self.step,
            "tokens": self.facts.get("tokens"),
            "fingerprint": self.fingerprint,
            "config": self.config and self.config.to_dict(),
            "module": "GPTModel" if self.native else "transformers",
            **({"base": {"path": str(base.path), "fingerprint": base.fingerprint}} if base else {}),
            **{name: self.facts[name] for name in told if self.facts.get(name)},
        }

    def load(
        self,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        part: Callable[[GPTConfig], GPTModel] | None = None,
        *,
        packed: bool | None = None,
        rounding: Rounding | None = None,
    ) -> GPTModel | TransformersModel:
        """The model in evaluation mode, frozen: matrices in `dtype`, norms in float32. GPTModel, or
        what `part` makes of its config on meta; else transformers' behind the same interface.
        packed: whether layers keep the codes of a quantised file; None: on a GPU. rounding: takes
        layers as they are read; the caller finishes it."""
        dtype, adapted = layouts.as_dtype(dtype), self.base is not None
        if not self.native:
            self._check_unchanged()
            other = load_transformers((self.base or self).path, dtype, device, self.config)
            self.merge_into(other)
            return other
        assert self.config is not None, "a native one has a config, or says why not"
        model = GPTModel.on_meta(self.config)
        self._check_fits(model)
        model, rounding = part(self.config) if part else model, None if adapted else rounding
        with self._reading():
            filling.load(model, self._table, dtype, device, False if adapted else packed, rounding)
        self.merge_into(model)
        model.for_inference(dtype)
        if "quantisation" in self.facts and rounding is None:
            filling.tell(model, self._table)
        return model

    def merge_into(self, model: Model, keep: bool = False) -> Callable[[], None]:
        """Of an adapter: into a model of its config that holds its base's weights. keep: what is
        returned, when called, takes it out again."""
        adapter, before = self._opened.adapter, None
        if adapter is not None and self.base is not None:
            with _readable(self.path):
                self._check_unchanged()
                before = merging.merge(adapter, model, self.base.path, keep)
        return lambda: merging.restore(adapter, model, before) if before else None

    def load_weights(self, model: nn.Module) -> None:
        """The weights into a GPTModel that exists, in its dtypes and on its device."""
        gpt = layouts.bare(model)
        if self._opened.rearranged and self._opened.config is None:
            raise ValueError(self._opened.problem)
        if self.layout and self._tied_as_stored(gpt.config, self.layout) != gpt.config:
            raise ValueError(
                f"{self.path} has a head of its own, but the model ties its head to the "
                "embedding: set tie_embeddings to false"
            )
        self._check_fits(gpt)
        with self._reading():
            row_shards.fill(gpt, self._table)
        self.merge_into(gpt)

    def _tied_as_stored(self, config: GPTConfig, layout: str) -> GPTConfig:
        """rosetrainer's oldest files are untied and do not say so: compare the two tensors."""
        head = self.tensors.get(naming.head_name(layout))
        embedding = self.tensors.get(naming.embedding_name(layout))
        if not config.tie_embeddings or head is None or embedding is None:
            return config
        return config.replace(tie_embeddings=stored.equal(head, embedding))

    @property
    def _table(self) -> filling.Table:
        assert self.layout is not None, "names of no layout do not fit"
        return filling.Table(self.tensors, self.layout, self.path)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Refuses files that are not those that were opened."""
        with _readable(self.path):
            self._check_unchanged()
            yield
            self._check_unchanged()

    def _check_fits(self, model: GPTModel) -> None:
        layouts.check_fits(model, self.tensors, self.layout, self.path, self._opened.hint)

    def _state_of_files(self) -> list[tuple]:
        files = self._opened.files + (self.base._opened.files if self.base else ())
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, files)]

    def _check_unchanged(self) -> None:
        with _readable(self.path):
            if self._state_of_files() != self._as_opened:
                raise ValueError(f"{self.path} was replaced or changed since it was opened")


# ---------------------------------------------------------------------------------------------
# By path

save_checkpoint, write_weights = native.save_checkpoint, native.write_weights


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: GPTConfig | None = None,
) -> GPTModel | TransformersModel:
    """`open(path, config).load(dtype, device)`."""
    return open(path, config).load(dtype, device)


def load_weights(path: str | Path, model: nn.Module) -> None:
    """`open(path, config).load_weights(model)`, with the model's config."""
    open(path, layouts.bare(model).config).load_weights(model)


def fingerprint(path: str | Path) -> str:
    """`open(path).fingerprint`."""
    return open(path).fingerprint


def load_training_state(path: str | Path, whole: bool = True) -> dict[str, Any]:
    """`training_state.read` of a checkpoint: what training goes on from."""
    path = Path(path)
    with _readable(path):
        reader_of(path)  # says what is wrong with a path that is no checkpoint
        native.check_manifest(path)
        return training_state.read(path, whole)


def load_checkpoint(
    checkpoint_path: str | Path, model: nn.Module, optimizer: Any = None, scheduler: Any = None
) -> tuple[int, int, float | None]:
    """Restore model, optimizer and scheduler exactly; returns (epoch, step, loss). What else was
    saved (`extra`) comes from `load_training_state`."""
    state = load_training_state(checkpoint_path)
    training_state.require(state, optimizer, scheduler, checkpoint_path)
    load_weights(checkpoint_path, model)
    training_state.restore(state, optimizer, scheduler, checkpoint_path)
    return state["epoch"] or 0, state["step"] or 0, state["loss"]


# ---------------------------------------------------------------------------------------------
# Finding


def is_checkpoint(path: str | Path) -> bool:
    """Whether it looks like one, whole or not; those too that are refused by name."""
    path = Path(path)
    if finding.closed_to_us(path):
        return formats.step_in_name(path.name) is not None
    try:
        if any(reader.recognises(path) for reader in READERS):
            return True
        return bool(foreign.what_is(path)) and not is_run(path)
    except Exception:  # an edge: one of a directory, which says what is wrong when it is opened
        return True


def is_complete(path: str | Path) -> bool:
    """Whether all files are there and whole as far as headers tell: others grow in place."""
    path = formats.named(path)
    try:  # without an adapter's base, which may be known to others alone
        reader_of(path).open(path)
    except Exception:  # an edge: one of those that a watcher sees
        return False
    return True


def is_finished(path: str | Path) -> bool | None:
    """Whether the sign is there with which its format ends a save; None where there is no such."""
    reader = next((reader for reader in READERS if reader.recognises(Path(path))), None)
    return getattr(reader, "finished", lambda path: None)(Path(path))


def info_of(path: Path) -> CheckpointInfo:
    """What it is called, its step and kind, cheaply told, also of an unreadable one."""
    name, problem = path.name, ""
    try:
        name, reader = formats.name_of(path), reader_of(path)
        if hasattr(reader, "glance"):
            kind, step = reader.glance(path)
        else:
            opened = reader.open(path)
            kind, step = opened.kind, opened.step
    except Exception as error:  # an edge: one checkpoint of a directory
        kind, step, problem = "unreadable", None, cli.reason_of(error)
    step = step if type(step) is int else formats.step_in_name(name)
    return CheckpointInfo(path, step, name, kind, problem)


LOOK = finding.Look(is_checkpoint, info_of, place_of)


def list_checkpoints(directory: str | Path) -> list[CheckpointInfo]:
    """The checkpoints in a directory, in step order; those without a step come last."""
    return finding.listed(Path(directory), LOOK)


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Checkpoint paths from files, checkpoint directories, directories of checkpoints and globs,
    each once, in the order given and in step order within a directory or glob."""
    return finding.expand(paths, LOOK)


# ---------------------------------------------------------------------------------------------
# Command line


def inspect(path: str | Path, config: GPTConfig | None = None) -> dict[str, Any]:
    """What a checkpoint holds, without reading a tensor."""
    return inspection.inspect(open(path, config))


def convert(
    source: str | Path,
    destination: str | Path,
    config: GPTConfig | None = None,
    base: str | Path | None = None,
) -> Path:
    """Any readable checkpoint to a directory as `save_checkpoint` writes it, in the dtype that it
    has, without training state; an adapter merged into its base."""
    return conversion.to_native(open(source, config, base), Path(destination))


def main(argv=None):
    from formats import extension  # of this command alone

    p = cli.parser(__doc__)
    jobs = p.add_subparsers(dest="job", required=True, metavar="list|inspect|convert|extend-vocab")
    listing = jobs.add_parser("list", help="checkpoints of a directory, in step order")
    listing.add_argument("directory")
    inspecting = jobs.add_parser("inspect", help="what a checkpoint holds")
    inspecting.add_argument("path")
    inspecting.add_argument("--verify", action="store_true", help="read all of it and check sha256")
    converting = conversion.add_job(jobs)
    extending = extension.add_job(jobs)
    for job in (inspecting, converting, extending):
        job.add_argument("--config", help="preset or YAML file, for files that hold no config")
        job.add_argument("--base", help="the base of an adapter that names none")
    for job in (listing, inspecting, converting, extending):
        job.add_argument("--debug", action="store_true")
    args = p.parse_args(argv)
    if args.job == "list":
        return inspection.print_list(list_checkpoints(args.directory), args.directory)
    config = load_config(args.config) if args.config else None
    path = args.path if args.job == "inspect" else args.source
    if args.base and info_of(Path(path)).kind != "adapter":
        raise ValueError(f"{path} is no adapter: --base does not go with it")
    ckpt = open(path, config, args.base)
    if args.job == "convert":
        return print(cli.printable(conversion.run(ckpt, args)))
    if args.job == "extend-vocab":
        return print(extension.run(ckpt, args))
    for key, value in inspection.inspect(ckpt).items():
        print(f"{key}: {json.dumps(value)}")
    if args.verify:
        native.check_manifest(Path(args.path), content=True)
        ckpt.load("float32")
        print("verified: checksums hold, every weight is a finite number")


if __name__ == "__main__":
    cli.run(main)

"""Checkpoints of every format, damaged in every way, and what must come of each.

    run(folder, everything=False)     # prints what went wrong, as JSON lines; limits the process

A field of a JSON file or of a pickle is replaced by values of every kind, files are cut, emptied,
filled with something else, or replaced by a FIFO, a socket, a directory, a device. Each damaged
checkpoint is opened, listed, inspected, hashed and loaded: that gives a result, or a ValueError of
one line that names it, within the memory and the time that a tiny model needs.
"""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import gguf_files
import megatron_files
import numpy as np
import torch
from checkpoint_files import CONFIGS, ROOT, make_model, nanogpt_file, rosetrainer_config
from checkpoint_files import rosetrainer_state as state_of

import checkpoint
from formats import stored, tensorfiles

MEMORY = 1 << 30  # bytes of address space beyond what is there at the start
SECONDS = 300  # for any one checkpoint, which takes some ms
SHARE, FIELDS = 18, 5  # of the quick run: % of what is done to files, fields of each file
PICKLED = (".pt", ".bin")
Damage = Callable[[Path], None]

DEEP: list = []
for _ in range(400):
    DEEP = [DEEP]
VALUES = {
    "null": None,
    "true": True,
    "minus": -1,
    "zero": 0,
    "one and a half": 1.5,
    "a million": 1_000_000,
    "huge": 10**30,
    "a float of its size": 1e300,
    "many digits": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "empty text": "",
    "text": "../../x",
    "long text": "y" * 100_000,
    "control characters": "\x1b[2J\n\x00\ud800",
    "a list": [1, "a"],
    "an object": {"a": {"b": 1}},
    "a deep list": DEEP,
}
TEXTS = {
    "empty": b"",
    "blank": b" \n" * 9,
    "null": b"null",
    "a list": b"[]",
    "text": b'"x"',
    "a number": b"17",
    "no object": b"{}",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "gpt2"}'.encode("utf-16"),
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "closed objects in objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "many lists": b'{"a": [' + b"[]," * 600_000 + b"[]]}",
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"model_type": "gpt2", "model_type": "llama"}',
    "too large": b"{" + b" " * (9 << 20) + b"}",
    "a web page": b"<!DOCTYPE html><html></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "zeros": bytes(4096),
}


# ---------------------------------------------------------------------------------------------
# Good ones


def make_good(folder: Path) -> dict[str, Path]:
    """{format: a checkpoint that loads}"""
    good = {}
    for kind in ("gpt2", "llama"):
        model = make_model(CONFIGS[kind])
        made = checkpoint.save_checkpoint(model, None, None, 1, 10, 2.5, folder / kind)
        good[f"native {kind}"] = made
        plain = folder / f"hf-{kind}/checkpoint-10"
        shutil.copytree(made, plain)
        (plain / "manifest.json").unlink()
        good[f"hugging face {kind}"] = plain
    good["sharded"] = cut(good["hugging face llama"], folder / "sharded/checkpoint-10", True)
    good["without index"] = cut(good["hugging face gpt2"], folder / "loose/checkpoint-10", False)
    model = make_model()
    state, config = state_of(model), rosetrainer_config(model.config)
    for name in ("pt", "nanogpt", "lightning", "training", "bare"):
        (folder / name).mkdir()
        good[name] = folder / name / "step-10.pt"
    torch.save({"model": state, "optimizer": {}, "step": 7, "config": config}, good["pt"])
    nanogpt_file(make_model(CONFIGS["gpt2"].replace(d_ff=128)), good["nanogpt"])
    wrapped = {f"model.{k}": t for k, t in state.items()}
    more = {"pytorch-lightning_version": "2", "global_step": 7, "config": config}
    torch.save({"state_dict": wrapped, "epoch": 1} | more, good["lightning"])
    good["training"] = folder / "training/checkpoint-10"
    model.config.save_pretrained(good["training"])
    contents = {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 1, "loss": 2.5}
    torch.save(contents, good["training"] / "pytorch_model.bin")
    good["bare"] = folder / "bare/step-10.safetensors"
    shutil.copy(good["native llama"] / "model.safetensors", good["bare"])
    shutil.copy(good["native llama"] / "config.json", folder / "bare")
    (folder / "gguf").mkdir()
    good["gguf"] = gguf_files.write_native(
        folder / "gguf/step-10.gguf", make_model(CONFIGS["llama"])
    )
    shutil.copytree(ROOT / "tests/fixtures/trained/nanochat", folder / "nanochat")
    good["nanochat"] = folder / "nanochat/model_000010.pt"
    for name in ("gptq-4bit-v2-act-order", "compressed-packed", "bnb-4bit"):
        good[name] = folder / f"{name}/checkpoint-10"
        shutil.copytree(ROOT / "tests/fixtures/quantised" / name / "model", good[name])
    config = CONFIGS["llama"]
    theirs = megatron_files.core_state(make_model(config))
    good["megatron"] = megatron_files.ranks(folder / "megatron", theirs, config, 2, 1)
    good["torch_dist"] = megatron_files.torch_dist(folder / "dist", theirs, config, 1, 1, 0)
    return good | {f"adapter {end}": adapter(good, folder, end) for end in ("safetensors", "bin")}


def adapter(good: dict[str, Path], folder: Path, ending: str) -> Path:
    """As PEFT saves it, over q of a Llama, with rows of its embedding and a norm."""
    path = folder / f"adapter-{ending}/checkpoint-10"
    path.mkdir(parents=True)
    D, at = CONFIGS["llama"].d_model, "base_model.model.model."
    table = {f"{at}norm.weight": torch.ones(D)}
    table[f"{at}embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(2, D)
    for i in range(CONFIGS["llama"].n_layers):
        for x, shape in (("A", (2, D)), ("B", (D, 2))):
            table[f"{at}layers.{i}.self_attn.q_proj.lora_{x}.weight"] = torch.ones(shape)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"modules_to_save": ["model.norm"], "trainable_token_indices": [1, 2]}
    config |= {"base_model_name_or_path": str(good["native llama"]), "rank_pattern": {"k": 3}}
    config |= {"alpha_pattern": {"q_proj": 3.5}, "bias": "none", "use_dora": False}
    (path / "adapter_config.json").write_text(json.dumps(config))
    if ending == "bin":
        torch.save(table, path / "adapter_model.bin")
    else:
        tensorfiles.write_safetensors(path / "adapter_model.safetensors", table, torch.float32)
    return path


def cut(source: Path, target: Path, index: bool) -> Path:
    table = tensorfiles.open_safetensors(source / "model.safetensors")
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    where = {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        part = {name: stored.read_whole(table[name]) for name in sorted(table)[i::2]}
        tensorfiles.write_safetensors(target / file, part, torch.float32)
        where |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        (target / "model.safetensors.index.json").write_text(text)
    return target


# ---------------------------------------------------------------------------------------------
# Damage


def damages(good: Path, rng: random.Random, everything: bool) -> Iterator[tuple[str, Damage]]:
    """(what, a function that does it to a copy) over the ways to damage a checkpoint."""
    files = sorted(p for p in good.rglob("*") if p.is_file()) if good.is_dir() else [good]
    files += [] if good.is_dir() else sorted(good.parent.glob("meta_*.json"))
    for file in files:
        own, fields = [*impostors(file), *contents_of(file, rng)], []
        if file.suffix == ".json":
            own += [(f"{file.name}: {k}", writing(file, text)) for k, text in TEXTS.items()]
            fields = list(fields_of_json(file))
        elif file.suffix == ".safetensors":
            fields = list(fields_of_header(file))
        elif file.suffix == ".gguf":
            fields = list(fields_of_gguf(file))
        elif file.suffix in PICKLED:
            own += damaged_zips(file)
            fields = list(fields_of_pickle(file))
        yield from own if everything else rng.sample(own, SHARE * len(own) // 100)
        yield from fields if everything else rng.sample(fields, min(len(fields), FIELDS))


def writing(file: Path, data: bytes) -> Damage:
    return lambda root: place(root, file).write_bytes(data)


def place(root: Path, file: Path) -> Path:
    """In a copy, the file of a good one, whose directory is called as the copy is."""
    if not root.is_dir():
        return root.with_name(file.name)
    home = next(folder for folder in file.parents if folder.name == root.name)
    return root / file.relative_to(home)


def impostors(file: Path) -> Iterator[tuple[str, Damage]]:
    def replaced(make):
        def damage(root):
            path = place(root, file)
            path.unlink()
            make(path)

        return damage

    def a_socket(path):
        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)

    kinds = {
        "gone": lambda path: None,
        "a FIFO": os.mkfifo,
        "a directory": os.mkdir,
        "a socket": a_socket,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
    }
    for kind, make in kinds.items():
        yield f"{file.name} is {kind}", replaced(make)


def contents_of(file: Path, rng: random.Random) -> Iterator[tuple[str, Damage]]:
    data = file.read_bytes()
    for n in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        yield f"{file.name} cut at {n}", writing(file, data[:n])
    yield f"{file.name} with more", writing(file, data + b"\0" * 9)
    for i in range(8):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(min(len(data), 4000))] ^= 1 << rng.randrange(8)
        yield f"{file.name} flipped {i}", writing(file, bytes(damaged))


def replacements(values, path=()) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Every field of nested dictionaries, gone or with each of VALUES."""
    for key in list(values):

        def at(root, path=path):
            for step in path:
                root = root[step]
            return root

        where = ".".join(map(str, (*path, key)))
        yield f"{where} gone", lambda root, at=at, key=key: at(root).pop(key)
        for name, value in VALUES.items():
            yield (
                f"{where} = {name}",
                lambda root, at=at, key=key, value=value: at(root).update({key: value}),
            )
        if isinstance(values[key], dict) and len(path) < 3:
            yield from replacements(values[key], (*path, key))


def fields_of_json(file: Path) -> Iterator[tuple[str, Damage]]:
    values = json.loads(file.read_text())
    for what, change in replacements(values):

        def damage(root, change=change):
            changed = json.loads(file.read_text())
            change(changed)
            place(root, file).write_text(json.dumps(changed))

        yield f"{file.name}: {what}", damage


def fields_of_header(file: Path) -> Iterator[tuple[str, Damage]]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    few = {name: header[name] for name in list(header)[:4]}
    for what, change in replacements(few):

        def damage(root, change=change):
            changed = json.loads(data[8 : 8 + size])
            change(changed)
            text = json.dumps(changed).encode()
            place(root, file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

        yield f"{file.name}: {what}", damage
    for lie in (0, 1, size - 1, size + 1, 1 << 40, (1 << 64) - 1):
        yield f"{file.name}: header of {lie}", writing(file, struct.pack("<Q", lie) + data[8:])


def fields_of_gguf(file: Path) -> Iterator[tuple[str, Damage]]:
    """Every entry of the metadata, gone or of another value, and tensors of other shapes."""
    held = gguf.GGUFReader(file)
    metadata = {f.name: f.contents() for f in held.fields.values() if "." in f.name}
    metadata = {k: v for k, v in metadata.items() if not k.startswith(("GGUF.", "general."))}
    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in held.tensors}
    writable = {
        name: value
        for name, value in VALUES.items()
        if type(value) in (bool, float, str) or (type(value) is int and 0 <= value < 1 << 32)
    }
    del writable["a float of its size"]
    writable |= {"numbers": [1, 2], "texts": ["a", "b"], "control characters": "\x1b[2J\n\x00"}
    for key in metadata:
        yield (
            f"{key} gone",
            rewriting(file, tensors, {k: metadata[k] for k in metadata if k != key}),
        )
        for what, value in writable.items():
            yield f"{key} = {what}", rewriting(file, tensors, metadata | {key: value})
    for name in list(tensors)[:4]:
        kind, data = tensors[name]
        rest = {n: tensors[n] for n in tensors if n != name}
        yield f"{name} gone", rewriting(file, rest, metadata)
        yield (
            f"{name} longer",
            rewriting(file, rest | {name: (kind, np.repeat(data, 2, 0))}, metadata),
        )
        nan = np.full_like(data, np.nan) if data.dtype == np.float32 else data[:1]
        yield f"{name} of others", rewriting(file, rest | {name: (kind, nan)}, metadata)


def rewriting(file: Path, tensors: dict, metadata: dict) -> Damage:
    return lambda root: gguf_files.write_tensors(place(root, file), tensors, "llama", metadata)


class Named:
    """Pickles as a call of a function by its name."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def odd_values() -> dict:
    """What a pickle can hold beyond JSON."""
    return {
        "bytes": b"\xff",
        "a set": {1},
        "a complex number": 1j,
        "a bytearray of 900 MB": Named(bytearray, 900_000_000),
        "a Namespace": argparse.Namespace(a=1),
        "a call": Named(os.system, "exit"),
        "a module": torch.nn.Linear(2, 2),
        "a tensor": torch.ones(2),
        "one number": torch.tensor(3),
        "no numbers": torch.ones(0),
        "2^40 numbers": torch.ones(1).expand(1 << 40),
        "booleans": torch.ones(3, dtype=torch.bool),
        "complex numbers": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.ones(2, 2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        "without storage": torch.ones(2, device="meta"),
        "NaN": torch.full((97, 32), float("nan")),
        "a key of tuples": {((1, 2), 3): 4},
    }


def fields_of_pickle(file: Path) -> Iterator[tuple[str, Damage]]:
    contents = torch.load(file, weights_only=False)  # make_good's
    values = {k: v for k, v in VALUES.items() if k != "a deep list"} | odd_values()
    deep = {k: v for k, v in VALUES.items() if k == "a deep list"}
    for key in contents:
        inner = [None, *list(contents[key])[:2]] if isinstance(contents[key], dict) else [None]
        for field in inner:
            for name, value in (values | deep).items():

                def damage(root, key=key, field=field, value=value):
                    changed = dict(contents)
                    changed[key] = value if field is None else {**contents[key], field: value}
                    torch.save(changed, place(root, file))

                yield f"{file.name}: {key}.{field} = {name}", damage
    for name, value in values.items():
        yield (
            f"{file.name} holds {name}",
            lambda root, value=value: torch.save(value, place(root, file)),
        )
    yield f"{file.name} is a plain pickle", writing(file, pickle.dumps({"model": 1}))


def damaged_zips(file: Path) -> Iterator[tuple[str, Damage]]:
    def rewritten(change, method=zipfile.ZIP_STORED):
        def damage(root):
            with zipfile.ZipFile(file) as old:
                entries = {info.filename: old.read(info) for info in old.infolist()}
            with zipfile.ZipFile(place(root, file), "w", method) as new:
                for name, data in change(entries):
                    new.writestr(name, data)

        return damage

    def without(word):
        return lambda entries: [(n, d) for n, d in entries.items() if word not in n]

    def doubled(entries):
        return [*entries.items(), *((n, b"\x80\x02N.") for n in entries if "data.pkl" in n)]

    def renamed(entries):
        return [(n.replace("data/0", "../../\x1b\ndata"), d) for n, d in entries.items()]

    yield f"{file.name} compressed", rewritten(lambda e: e.items(), zipfile.ZIP_DEFLATED)
    yield f"{file.name} without a pickle", rewritten(without("data.pkl"))
    yield f"{file.name} without a storage", rewritten(without("data/1"))
    yield f"{file.name} with two pickles", rewritten(doubled)
    yield f"{file.name} with strange names", rewritten(renamed)
    yield f"{file.name} with none", rewritten(lambda e: [])
    yield (
        f"{file.name} with one too short",
        rewritten(lambda e: [(n, d[:-4]) for n, d in e.items()]),
    )


# ---------------------------------------------------------------------------------------------
# What must come of it


def ask(path: Path, where: Path, everything: bool) -> Iterator[str]:
    """What is wrong with what the doors of checkpoint.py say of a damaged checkpoint."""

    def opened():
        ckpt = checkpoint.open(path)
        if ckpt.native or everything:  # transformers takes longer to import than all else here
            return ckpt.config, ckpt.vocab_size, ckpt.context, ckpt.describe(), ckpt.load("float32")

    doors = {
        "list": lambda: checkpoint.list_checkpoints(where),
        "expand": lambda: checkpoint.expand_paths([path]),
        "complete": lambda: checkpoint.is_complete(path),
        "open": opened,
        "inspect": lambda: json.dumps(checkpoint.inspect(path)),
        "state": lambda: checkpoint.load_training_state(path),
        "fingerprint": lambda: checkpoint.fingerprint(path),
    }
    for door, call in doors.items():
        try:
            call()
        except ValueError as error:
            said = str(error)
            if str(where) not in said or not said.isprintable() or len(said) > 2500:
                yield f"{door}: {said[:600]!r}"
            if door in ("list", "complete"):
                yield f"{door} fails: {said[:300]}"
        except BaseException as error:
            yield f"{door}: {type(error).__name__}: {str(error)[:300]}"


def run(folder: Path, everything: bool) -> None:
    """Print a JSON line for each fault, and one with the number of checkpoints."""
    torch.set_num_threads(1)
    good = make_good(folder)
    for name, path in good.items():
        checkpoint.load_model(path, "float32"), checkpoint.inspect(path)
        assert len(checkpoint.list_checkpoints(path.parent)) == 1, name
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    rng, count = random.Random(0), 0
    for kind, path in good.items():
        for what, damage in damages(path, rng, everything):
            where = folder / "damaged"
            shutil.rmtree(where, ignore_errors=True)
            shutil.copytree(path.parent, where)
            damage(where / path.name)
            signal.alarm(SECONDS)  # where one of them hangs, the process ends
            for fault in ask(where / path.name, where, everything):
                print(json.dumps({"of": kind, "what": what, "fault": fault}), flush=True)
            signal.alarm(0)
            count += 1
    print(json.dumps({"count": count}))

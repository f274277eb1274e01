"""checkpoint.py: the handle, dtypes and memory, finding, the command line."""

import collections
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys

import pytest
import torch
import toy_format
from checkpoint_files import CONFIGS, ROOT, good_file, logits, make_model, rosetrainer_state

import checkpoint
from checkpoint import (
    expand_paths,
    fingerprint,
    inspect,
    is_complete,
    list_checkpoints,
    load_model,
    save_checkpoint,
)
from formats import fingerprints, layouts, stored, tensorfiles
from model import GPTModel
from tokenizer import build_tokenizer

# ---------------------------------------------------------------------------------------------
# The handle

OPENED = collections.Counter()  # files that Python code opened, by path
sys.addaudithook(lambda event, args: event == "open" and OPENED.update([str(args[0])]))


@pytest.mark.parametrize("kind", ["native", "sharded", "pt"])
def test_files_are_read_once(tmp_path, monkeypatch, kind):
    """Opening, describing and loading: one look at each header, and at config.json, which also
    tells who quantised the weights."""
    model = make_model(CONFIGS["llama"])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    if kind == "sharded":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
        path = tmp_path / "theirs"
        theirs.save_pretrained(path, max_shard_size="20KB")
    if kind == "pt":
        path = good_file(tmp_path / "a.pt")
    headers = collections.Counter()
    for name in ("open_safetensors", "open_torch"):
        real = getattr(tensorfiles, name)
        count = lambda file, real=real: headers.update([file]) or real(file)  # noqa: E731
        monkeypatch.setattr(tensorfiles, name, count)
    OPENED.clear()
    ckpt = checkpoint.open(path)
    looks = {"native": 1, "sharded": 1, "pt": 0}[kind]
    assert OPENED[str(path / "config.json")] == looks
    ckpt.describe()  # hashes the files, each once
    assert OPENED[str(path / "config.json")] <= looks + 1
    assert (ckpt.vocab_size, ckpt.context) == (97, 32)
    ckpt.load("float32")
    files = [path] if kind == "pt" else sorted(path.glob("*.safetensors"))
    assert headers == dict.fromkeys(files, 1) and (len(files) > 1) == (kind == "sharded")
    assert OPENED[str(path / "model.safetensors.index.json")] <= 3  # is it a web page, itself, hash


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_handle_keeps_nothing_open(tmp_path, kind):
    """No file, and no mapping: of an optimizer's state, and of strided tensors, neither."""
    state = rosetrainer_state(make_model())
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous().t()
    path = good_file(tmp_path / "a.pt", state, optimizer={"m": torch.ones(1000)})
    if kind == "safetensors":
        path = checkpoint.convert(path, tmp_path / "out")
    ckpt = checkpoint.open(path)
    assert ckpt.config.n_layers == 2
    maps = pathlib.Path("/proc/self/maps").read_text()
    held = [os.readlink(f) for f in pathlib.Path("/proc/self/fd").iterdir() if f.is_symlink()]
    assert str(tmp_path) not in maps and not any(str(tmp_path) in name for name in held)
    pickle.dumps(ckpt)  # plain values all through


def test_what_a_handle_says(tmp_path):
    tokenizer = build_tokenizer("byte")
    model = make_model(CONFIGS["llama"].replace(vocab_size=257))
    path = save_checkpoint(
        model, None, None, 2, 30, 2.5, tmp_path, tokenizer=tokenizer, extra={"tokens": 640}
    )
    ckpt = checkpoint.open(str(path))
    assert (ckpt.path, ckpt.kind, ckpt.name, ckpt.step) == (path, "roseval", "checkpoint-30", 30)
    assert ckpt.format == "formats/native.py" and ckpt.native and ckpt.layout == "llama"
    assert (ckpt.vocab_size, ckpt.context, ckpt.tokenizer) == (257, 32, path)
    assert (ckpt.facts["epoch"], ckpt.facts["loss"], ckpt.facts["tokens"]) == (2, 2.5, 640)
    assert ckpt.config == model.config and ckpt.fingerprint == fingerprint(path)
    assert ckpt.describe() == {
        "path": str(path),
        "name": "checkpoint-30",
        "step": 30,
        "tokens": 640,
        "fingerprint": ckpt.fingerprint,
        "config": model.config.to_dict(),
        "module": "GPTModel",
    }
    again = make_model(model.config, seed=1)
    ckpt.load_weights(again)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(ckpt.load("float32")), logits(model))


def test_a_given_config_travels_with_the_handle(tmp_path):
    model = make_model()
    torch.save({"model": rosetrainer_state(model)}, tmp_path / "bare_step9.pt")
    ckpt = checkpoint.open(tmp_path / "bare_step9.pt")
    assert (ckpt.kind, ckpt.step, ckpt.format) == ("weights", 9, "formats/pt_files.py")
    for ask in (lambda: ckpt.config, lambda: ckpt.vocab_size, ckpt.describe, ckpt.load):
        with pytest.raises(ValueError, match="has no config") as error:
            ask()
        assert "\n" not in str(error.value)
    ckpt = checkpoint.open(tmp_path / "bare_step9.pt", model.config)
    assert ckpt.config == model.config and ckpt.vocab_size == 97
    assert ckpt.describe()["config"] == model.config.to_dict()
    assert torch.equal(logits(ckpt.load("float32")), logits(model))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_files_that_change_under_a_handle(tmp_path, kind):
    path = file = good_file(tmp_path / "a.pt")
    if kind == "safetensors":
        path = checkpoint.convert(path, tmp_path / "out")
        file = path / "model.safetensors"
    ckpt, content = checkpoint.open(path), file.read_bytes()
    file.unlink()
    file.write_bytes(content)  # another file, though of the same length
    for ask in (ckpt.load, lambda: ckpt.fingerprint):
        with pytest.raises(ValueError, match="was replaced or changed since it was opened"):
            ask()
    checkpoint.open(path).load()


def test_a_format_is_one_file_and_one_entry(tmp_path, monkeypatch):
    """toy_format.py, whose tensors lie in columns over files in sub-directories: found, listed,
    described, loaded, converted."""
    model = make_model()
    folder, names = tmp_path / "runs/run-40", {}
    for rank in range(2):
        (folder / f"ranks/{rank}").mkdir(parents=True)
    for name, t in rosetrainer_state(model).items():
        pieces = []
        for rank, part in enumerate(t.chunk(2, dim=-1)):
            file = folder / f"ranks/{rank}/weights.bin"
            with file.open("ab") as f:
                start = [0] * (t.dim() - 1) + [rank * (t.shape[-1] // 2)]
                where = str(file.relative_to(folder))
                pieces.append([where, f.tell(), start, list(part.shape)])
                f.write(part.contiguous().numpy().tobytes())
        names[name] = {"shape": list(t.shape), "pieces": pieces}
    said = {"step": 40, "loss": 1.5, "config": model.config.to_dict(), "names": names}
    (folder / "toy.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint.open(folder)
    monkeypatch.setattr(checkpoint, "READERS", (*checkpoint.READERS, toy_format))
    assert expand_paths([tmp_path / "runs"]) == [folder] and is_complete(folder)
    (found,) = list_checkpoints(tmp_path / "runs")
    assert (found.name, found.step, found.kind) == ("run-40", 40, "toy")
    said = inspect(folder)
    assert (said["kind"], said["step"], said["loss"], said["note"]) == ("toy", 40, 1.5, None)
    loaded = load_model(folder, "float32")
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.tie_embeddings
    before = fingerprint(folder)
    path = checkpoint.convert(folder, tmp_path / "converted")
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    content = bytearray((folder / "ranks/1/weights.bin").read_bytes())
    content[0] ^= 1
    (folder / "ranks/1/weights.bin").write_bytes(content)
    assert fingerprint(folder) != before


# ---------------------------------------------------------------------------------------------
# dtype, memory


def test_dtypes(tmp_path):
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    loaded = load_model(path, torch.bfloat16)
    state = model.state_dict()
    for name, p in loaded.named_parameters():
        norm = ".ln" in name or name.startswith("ln_f")
        assert p.dtype == (torch.float32 if norm else torch.bfloat16), name
        assert torch.equal(p, state[name].to(p.dtype))
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(path, "int8")


MEASURE = """
import resource, sys, torch, checkpoint
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = checkpoint.load_model(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) * 1024, held)
"""


def peak_of_load(path, dtype):
    """(bytes by which the peak grew, bytes that the model holds) of loading in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(int(n) for n in done.stdout.split())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_loading_holds_one_copy(tmp_path, kind):
    """Of a float32 file of 240 MB in bfloat16: the 120 MB that the model holds and one piece; the
    optimizer state in the same .pt is never read."""
    config = CONFIGS["llama"].replace(
        vocab_size=4000, n_layers=6, n_heads=8, n_kv_heads=8, head_dim=96, d_model=768, d_ff=2048
    )
    model = GPTModel(config)
    if kind == "pt":
        path = tmp_path / "a.pt"
        contents = {"model": model.state_dict(), "optimizer": torch.zeros(60 << 20), "step": 1}
        torch.save(contents | {"config": config.to_dict()}, path)
    else:
        path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    size = 4 * sum(p.numel() for p in model.parameters())
    del model
    grown, held = peak_of_load(path, "bfloat16")
    assert held < 0.51 * size
    assert grown < held + stored.READ_BYTES + (40 << 20) < 0.9 * size


@pytest.mark.slow
def test_seven_billion_parameters(tmp_path):
    """Llama-2-7B's shape, bf16, 13.5 GB on disk, into CPU memory: one copy, not two."""
    from config import load_config

    available = (
        int(re.search(r"MemAvailable: +(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) << 10
    )
    if available < 18 << 30:
        pytest.skip("needs 18 GB of memory")
    config = load_config("7b")
    with torch.device("meta"):
        shapes = {name: view for name, view in layouts.views(GPTModel(config), "llama")}
    config.save_pretrained(tmp_path / "7b")
    header, offset = {}, 0
    for name, view in shapes.items():
        end = offset + 2 * view.numel()
        header[name] = {"dtype": "BF16", "shape": list(view.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(tmp_path / "7b/model.safetensors", "wb") as f:  # sparse: reads as zeros
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    assert offset == 2 * 6_738_415_616
    grown, held = peak_of_load(tmp_path / "7b", "bfloat16")
    assert offset <= held < 1.001 * offset  # the norms are float32
    assert grown < held + stored.READ_BYTES + (64 << 20)


def test_a_directory_of_checkpoints_where_one_is_wanted(tmp_path):
    save_checkpoint(make_model(CONFIGS["gpt2"]), None, None, 0, 10, 1.0, tmp_path / "runs/a")
    for place in ("runs/a", "runs"):
        with pytest.raises(ValueError, match=rf"{place} holds no weights: .* as \S+checkpoint-10$"):
            checkpoint.open(tmp_path / place)


def test_directories_without_weights(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="damaged or no pickle"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere.pt")


# ---------------------------------------------------------------------------------------------
# Finding


def test_listing_and_expanding(tmp_path):
    model = make_model()
    for number in (10, 9, 200):
        save_checkpoint(model, None, None, 0, number, 1.0, tmp_path)
    good_file(tmp_path / "run.pt", step=50)
    good_file(tmp_path / "last.pth", step=1)
    (tmp_path / "broken_step300.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "log.jsonl").write_text("{}\n")
    (tmp_path / "optimizer.pt").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".tmp-checkpoint-5-1").mkdir()
    listed = [(c.name, c.step, c.kind) for c in list_checkpoints(tmp_path)]
    assert listed == [
        ("last", 1, "rosetrainer"),
        ("checkpoint-9", 9, "roseval"),
        ("checkpoint-10", 10, "roseval"),
        ("run", 50, "rosetrainer"),
        ("checkpoint-200", 200, "roseval"),
        ("broken_step300", 300, "unreadable"),
    ]
    nine, ten, last = (tmp_path / f"checkpoint-{n}" for n in (9, 10, 200))
    assert expand_paths([str(tmp_path / "checkpoint-*")]) == [nine, ten, last]
    assert expand_paths([ten, tmp_path])[:3] == [ten, tmp_path / "last.pth", nine]
    assert expand_paths([tmp_path / "run.pt"]) == [tmp_path / "run.pt"]
    for bad, what in (("none-*", "does not exist"), ("notes", "holds no checkpoint")):
        with pytest.raises(ValueError, match=what):
            expand_paths([tmp_path / bad])
    with pytest.raises(ValueError, match="not a directory"):
        list_checkpoints(tmp_path / "log.jsonl")


def test_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = good_file(tmp_path / "a.pt")
    first = fingerprint(path)
    assert len(first) == 64 and first == fingerprint(path)
    assert len(list((tmp_path / "cache/roseval/sha256_of_pieces").iterdir())) == 1
    monkeypatch.setattr(fingerprints, "sha256", None)  # now from the cache alone
    assert fingerprint(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # unwritable: computed, not remembered
    assert fingerprint(path) == first
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(path) != first
    ours = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path / "o")
    again = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path / "p")
    other = save_checkpoint(make_model(seed=1), None, None, 0, 1, 1.0, tmp_path / "q")
    assert fingerprint(ours) == fingerprint(again) != fingerprint(other)


# ---------------------------------------------------------------------------------------------
# Command line


def test_command_line(tmp_path, capsys):
    def run(*args):
        checkpoint.main([str(arg) for arg in args])
        return capsys.readouterr().out

    path, converted = good_file(tmp_path / "a.pt"), tmp_path / "out/checkpoint-7"
    assert run("convert", path, converted) == f"{converted}\n"
    assert torch.equal(
        logits(load_model(converted, "float32")), logits(load_model(path, "float32"))
    )
    assert run("list", tmp_path / "out").split()[-3:] == ["7", "roseval", str(converted)]
    said = run("inspect", converted, "--verify")
    assert 'kind: "roseval"' in said and "verified" in said
    assert f"parameters: {sum(p.numel() for p in make_model().parameters())}\n" in said
    with pytest.raises(ValueError, match="exists already"):
        run("convert", path, tmp_path / "out")
    content = bytearray((converted / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (converted / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="sha256 is not the manifest's"):
        run("inspect", converted, "--verify")


def test_command_line_error_is_one_line(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    command = [sys.executable, str(ROOT / "checkpoint.py"), "inspect", str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'a.pt'} is empty")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_keeps_dtype_and_tokenizer(tmp_path, dtype):
    model = make_model(CONFIGS["llama"].replace(vocab_size=257)).to(dtype)
    source = save_checkpoint(
        model, None, None, 0, 4, 1.0, tmp_path, tokenizer=build_tokenizer("byte")
    )
    path = checkpoint.convert(source, tmp_path / "converted")
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    assert {t.dtype for t in table.values()} == {dtype}
    before, after = load_model(source, dtype), load_model(path, dtype)
    assert torch.equal(logits(before), logits(after))
    assert (path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 256

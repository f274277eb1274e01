"""formats/tensorfiles.py: every kind of bad file is one clear line, and no damage gets through."""

import io
import os
import pathlib
import random
import shutil
import zipfile

import pytest
import torch
from builders import saved_checkpoint
from checkpoint_files import (
    good_file,
    logits,
    make_model,
    refused,
    rosetrainer_state,
    safetensors_file,
)

import checkpoint
from checkpoint import (
    is_complete,
    load_model,
    load_training_state,
    save_checkpoint,
)
from formats import stored, tensorfiles


def test_a_path_that_the_library_cannot_open(tmp_path):
    """Whose bytes are of another encoding: no file is damaged."""
    path = saved_checkpoint(tmp_path)
    other = path.rename(tmp_path / os.fsdecode(b"l\xf6c"))
    with pytest.raises(ValueError, match="opens no path that is not UTF-8: rename"):
        checkpoint.open(other)


def test_a_good_file_loads(tmp_path):
    load_model(good_file(tmp_path / "a.pt"), "float32")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\n\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"hello, this is a text file", "no safetensors|not a torch file"),
        (b"\x80\x02]q\x00.", "no safetensors|not a torch file"),
        (b"PK\x03\x04" + bytes(100), "no safetensors|truncated"),
        (b"PK\x05\x06" + bytes(18), "no safetensors|not a torch file"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "model.safetensors"])
def test_what_is_no_checkpoint(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    make_model().config.save_pretrained(tmp_path)
    refused(tmp_path / name, match)
    assert not is_complete(tmp_path / name)


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_truncated(tmp_path, kind, share):
    if kind == "pt":
        path = good_file(tmp_path / "a.pt")
    else:
        make_model().config.save_pretrained(tmp_path)
        saved = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path / "o")
        path = shutil.copy(saved / "model.safetensors", tmp_path)
        path = pathlib.Path(path)
    assert is_complete(path)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(share * len(content)))])
    refused(path, "truncated|not a torch file|no safetensors file")
    assert not is_complete(path)


def test_shrinking_while_read_is_an_error(tmp_path):
    path = good_file(tmp_path / "a.pt")
    table = checkpoint.open(path).tensors
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="became shorter"):
        list(stored.read(table["token_embedding.weight"]))


def test_very_deep_list(tmp_path):
    """100,000 levels; saved by hand, since pickle itself recurses."""
    path = tmp_path / "a.pt"
    good_file(path)
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    rewrite_record(path, "data.pkl", deep)
    refused(path, "holds a list|claim|cannot be read")


def rewrite_record(path, leaf, content, keep_crc=False):
    """Replace an entry of a torch file; with keep_crc its checksum stays that of the old bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, content if info.filename.endswith(leaf) else data)
    path.write_bytes(buffer.getvalue())


def pickle_of(path):
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))


def test_declared_size_beyond_the_file(tmp_path):
    """A storage that claims 2^33 elements in a file of a few hundred bytes; mapped, torch would
    take whatever follows, and unmapped would allocate 32 GB."""
    path = tmp_path / "a.pt"
    torch.save({"model": {"token_embedding.weight": torch.zeros(1000)}}, path)
    pickled = pickle_of(path)
    assert b"M\xe8\x03" in pickled  # BININT2 1000
    rewrite_record(path, "data.pkl", pickled.replace(b"M\xe8\x03", b"\x8a\x05\x00\x00\x00\x00\x02"))
    refused(path, "claim|cannot be read")
    # a small lie, within the file but beyond the record
    torch.save({"model": {"token_embedding.weight": torch.zeros(1000)}, "x": torch.ones(9)}, path)
    pickled = pickle_of(path)
    rewrite_record(path, "data.pkl", pickled.replace(b"M\xe8\x03", b"M\xea\x03"))
    refused(path, "claim")


@pytest.mark.parametrize("lie", [(1 << 40,), (1 << 20, 1 << 20)])
def test_stride_zero_bombs(tmp_path, lie):
    bomb = torch.zeros(1).expand(*lie)
    torch.save({"model": {"token_embedding.weight": bomb}}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 3000
    refused(tmp_path / "a.pt", f"claims {1 << 40:,} elements, the file holds 4 bytes")


def test_strided_tensors_are_read_right(tmp_path):
    model = make_model()
    state = rosetrainer_state(model)
    for name in ("blocks.0.mlp.fc1.weight", "token_embedding.weight", "lm_head.weight"):
        state[name] = state[name].t().contiguous().t()
        assert not state[name].is_contiguous()
    flat = torch.cat([state[f"blocks.{i}.mlp.fc2.weight"].flatten() for i in range(2)])
    for i in range(2):  # two tensors in one storage, as FSDP leaves them
        state[f"blocks.{i}.mlp.fc2.weight"] = flat.view(2, 32, 48)[i]
    loaded = load_model(good_file(tmp_path / "a.pt", state), "float32")
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.tie_embeddings


def test_a_table_of_contents_without_end(tmp_path, monkeypatch):
    """Half a million entries of no bytes: refused before any is made; in zip64's form as well."""
    for n in (200, 70_000):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for i in range(n):
                archive.writestr(f"a/{i}", b"")
        refused(tmp_path / "a.pt", "it has no data.pkl")
        monkeypatch.setattr(tensorfiles, "MAX_DIRECTORY", 48 * n)
        refused(tmp_path / "a.pt", "too many entries")
        monkeypatch.undo()


def test_a_name_twice_in_a_header(tmp_path):
    """Which the library and Python's reader could take for different tensors."""
    entry = b'"w": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'
    header = b"{" + entry % (0, 8) + b"," + entry % (8, 16) + b"}"
    make_model().config.save_pretrained(tmp_path)
    safetensors_file(tmp_path / "model.safetensors", header, bytes(16))
    refused(tmp_path, r"model\.safetensors .*no safetensors file")


def flip(path, needle_name):
    """Flip one bit in the middle of a record's bytes."""
    record = next(r for r in tensorfiles.zip_records(path) if r.name.endswith(needle_name))
    content = bytearray(path.read_bytes())
    content[record.offset + record.size // 2] ^= 1
    path.write_bytes(content)


def test_flipped_bits(tmp_path):
    path = good_file(tmp_path / "a.pt")
    flip(path, "data/3")
    refused(path, "is damaged: the checksum of .*data/3 is wrong")
    path = good_file(tmp_path / "b.pt", optimizer={"m": torch.ones(1000)})
    records = tensorfiles.open_torch(path).records
    last = max(int(name.removeprefix("data/")) for name in records if name.startswith("data/"))
    flip(path, f"data/{last}")
    load_model(path, "float32")  # the optimizer's tensors are no business of an evaluation
    with pytest.raises(ValueError, match="checksum"):
        load_training_state(path)
    path = good_file(tmp_path / "c.pt")
    flip(path, "data.pkl")
    refused(path, "checksum of .*data.pkl")


def test_files_without_checksums_load(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = good_file(tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    load_model(path, "float32")


@pytest.mark.slow
def test_random_damage_never_gets_through(tmp_path):
    """Any bit of the weights, the structure or the table flipped: refused, or the same model."""
    path = good_file(tmp_path / "a.pt")
    content, wanted = path.read_bytes(), logits(load_model(path, "float32"))
    rng = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 5))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            got = logits(load_model(path, "float32"))
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"shape": [4], "data_offsets": [0, 16]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        b"[" * 100_000,
        b"[]",
        b"\xff\xfe{",
    ],
)
def test_safetensors_lies(tmp_path, header):
    make_model().config.save_pretrained(tmp_path)
    safetensors_file(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def bytes_read() -> int:
    """By this process so far."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def test_safetensors_header_cap(tmp_path):
    """A header over the limit is not even read."""
    make_model().config.save_pretrained(tmp_path)
    safetensors_file(tmp_path / "model.safetensors", b"{" + b" " * (20 << 20) + b"}")
    for _ in range(2):  # the first time modules may be read as well
        before = bytes_read()
        with pytest.raises(ValueError, match="header's limit is 10,485,760"):
            load_model(tmp_path)
    assert bytes_read() - before < 1 << 20
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_model(tmp_path)


def test_old_torch_is_refused(tmp_path, monkeypatch):
    path = good_file(tmp_path / "a.pt")
    for version, fine in (("2.9.1+cu128", False), ("1.13.0", False), ("2.10.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        load_model(path)  # which needs torch.load for nothing
        if fine:
            load_training_state(path)
        else:
            with pytest.raises(ValueError, match=r"CVE-2025-32434"):
                load_training_state(path)

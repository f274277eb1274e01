"""formats/finding.py and foreign.py: what a path stands for, and that nothing is passed over in
silence."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOT, good_file, make_model, refused

import checkpoint
import cli
from checkpoint import expand_paths, list_checkpoints, save_checkpoint
from formats import foreign


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(make_model(), None, None, 0, 100, 1.0, tmp_path_factory.mktemp("s"))


@pytest.fixture(autouse=True)
def notes(capsys):
    """What is said on stderr; each note is said once in a process."""
    cli.note.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


def a_trainers(folder, saved):
    """The final model beside the steps on the way to it, as transformers' Trainer leaves them."""
    shutil.copytree(saved, folder)
    (folder / "manifest.json").unlink()
    for step in (50, 100):
        shutil.copytree(saved, folder / f"checkpoint-{step}")
    (folder / "runs").mkdir()
    return folder


def test_checkpoints_inside_of_a_checkpoint(tmp_path, saved, notes):
    trainer = a_trainers(tmp_path / "trainer", saved)
    listed = [info.path for info in list_checkpoints(trainer)]
    assert listed == [trainer / "checkpoint-50", trainer / "checkpoint-100", trainer]
    assert not notes()
    assert expand_paths([trainer]) == [trainer]
    (note,) = notes()
    assert note.startswith(
        f"note: {trainer} is a checkpoint and holds others inside, such as check"
    )
    assert note.endswith(f"give '{trainer}/checkpoint-*' for them")
    assert expand_paths([trainer]) == [trainer] and not notes()  # once
    assert expand_paths([trainer / "checkpoint-*"]) == listed[:2]
    (found,) = list_checkpoints(tmp_path)
    assert found.path == trainer


def test_checkpoints_deeper_down(tmp_path, saved, notes):
    for epoch in (1, 2):
        shutil.copytree(saved, tmp_path / f"ep/epoch_{epoch}/step_10")
    for given in ("ep", "ep/epoch_*", "", "e*"):
        with pytest.raises(ValueError, match="holds no checkpoint itself") as error:
            expand_paths([tmp_path / given])
        assert "ep/epoch_1 has step_10" in str(error.value)
    assert len(expand_paths([tmp_path / "ep/*/*"])) == 2
    assert len(expand_paths([tmp_path / "ep/epoch_1"])) == 1 and not notes()
    good_file(tmp_path / "ep/last.pt")
    assert expand_paths([tmp_path / "ep"]) == [tmp_path / "ep/last.pt"]
    assert len(notes()) == 2  # epoch_1 and epoch_2 hold some too
    assert expand_paths([tmp_path / "ep/*"]) == [tmp_path / "ep/last.pt"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"noth\* matches .*nothing, but no checkpoint"):
        expand_paths([tmp_path / "noth*"])


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("..")
    with pytest.raises(ValueError, match="holds no checkpoint, only a"):
        expand_paths([tmp_path])


FOREIGN = {
    "zero_to_fp32.py": "a directory of DeepSpeed's without the directory of a tag",
    "tf_model.h5": "weights of Flax or TensorFlow",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_read_is_named(tmp_path, name):
    (tmp_path / "it-5").mkdir()
    (tmp_path / "it-5" / name).write_bytes(b"x")
    (tmp_path / "it-5/README.md").write_text("x")
    (found,) = list_checkpoints(tmp_path)
    assert (found.name, found.step, found.kind) == ("it-5", 5, "unreadable")
    assert expand_paths([tmp_path / "it-5"]) == [tmp_path / "it-5"]
    refused(tmp_path / "it-5", FOREIGN[name])


def test_files_that_are_not_read_hide_none_beside_them(tmp_path, monkeypatch):
    monkeypatch.setitem(foreign.FILES, ".strange", "a strange file, which is not read")
    good_file(tmp_path / "step-1.pt")
    (tmp_path / "step-2.strange").write_bytes(b"GGUF")
    found = {info.name: info for info in list_checkpoints(tmp_path)}
    assert (found["step-1"].kind, found["step-2.strange"].kind) == ("rosetrainer", "unreadable")
    assert found["step-2.strange"].problem.endswith("is a strange file, which is not read")
    refused(tmp_path / "step-2.strange", "is a strange file, which is not read")


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    (tmp_path / "a/adapter_config.json").write_text("{}")
    refused(tmp_path / "a", "adapter_config.json beside a model")


UNPRIVILEGED = """
import os, sys
sys.path.insert(0, {root!r})
import checkpoint
os.setgid(12345), os.setuid(12345)
from pathlib import Path
folder = Path({folder!r})
print([(c.name, c.kind) for c in checkpoint.list_checkpoints(folder)])
print(len(checkpoint.expand_paths([folder])))
for name in ("checkpoint-200", "checkpoint-300", "checkpoint-400", "other", "e-7.pt"):
    try:
        checkpoint.open(folder / name).config
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="sets another user")
def test_what_may_not_be_read_is_listed_and_named(saved):
    """As another user: a directory, files in a directory, a file."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for their user alone
        as_another_user(Path(folder), saved)


def as_another_user(tmp_path, saved):
    tmp_path.chmod(0o755)
    for step in (100, 200, 300, 400):
        shutil.copytree(saved, tmp_path / f"checkpoint-{step}")
    shutil.copytree(saved, tmp_path / "other")
    good_file(tmp_path / "e-7.pt")
    (tmp_path / "checkpoint-200").chmod(0)
    (tmp_path / "checkpoint-300/model.safetensors").chmod(0)
    (tmp_path / "checkpoint-400").chmod(0o444)
    (tmp_path / "other").chmod(0)
    (tmp_path / "e-7.pt").chmod(0)
    code = UNPRIVILEGED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed, count, *errors = done.stdout.splitlines()
    for name in ("checkpoint-200", "checkpoint-400", "e-7"):
        assert f"('{name}', 'unreadable')" in listed
    assert "('checkpoint-100', 'roseval'), " in listed and "('checkpoint-300', 'roseval')" in listed
    assert count == "5" and len(errors) == 5
    assert all("cannot be read: Permission denied" in error for error in errors), errors


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "extra", "a.json"])
def test_strange_files_in_a_directory(tmp_path, saved, name):
    """Nobody waits for a FIFO, not even who opens the tokenizer or transformers next."""
    path = tmp_path / "checkpoint-1"
    shutil.copytree(saved, path)
    (path / "manifest.json").unlink()
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    refused(path, f"{name} is a FIFO, not a file")
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    refused(path, f"{name} is a device, not a file")


def test_an_unreadable_one_ends_no_listing(tmp_path, saved, capsys):
    os.mkfifo(tmp_path / "checkpoint-1.pt")
    (tmp_path / "checkpoint-2").mkdir()
    os.mkfifo(tmp_path / "checkpoint-2/manifest.json")
    shutil.copytree(saved, tmp_path / "checkpoint-3")
    torch.save([[]], tmp_path / "checkpoint-4.pt")
    kinds = {info.name: info.kind for info in list_checkpoints(tmp_path)}
    assert kinds.pop("checkpoint-3") == "roseval"
    assert set(kinds.values()) == {"unreadable"} and len(kinds) == 2
    with pytest.raises(ValueError, match="is a FIFO, not a file"):
        checkpoint.open(tmp_path / "checkpoint-1.pt")
    (tmp_path / "x\x1b[2J\n-5.pt").write_bytes(b"x")
    checkpoint.main(["list", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    assert "manifest.json is a FIFO, not a file)" in "".join(lines)

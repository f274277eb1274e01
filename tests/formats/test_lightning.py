"""formats/lightning.py: the file and the directory, and what lies beside the weights in them."""

import pathlib
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from trained_files import TRAINED, copied, difference, refusal

import checkpoint
from config import load_config

NAME = "lightning/last.ckpt"


@pytest.fixture
def config():
    return load_config(TRAINED / "lightning/config.yaml")


def test_a_config_beside_it_and_a_copy_of_the_weights(tmp_path, config):
    path = copied(NAME, tmp_path)
    assert "has no config" in refusal(path)
    config.save_pretrained(path.parent)
    assert difference(path, NAME) <= 1e-5
    ckpt = checkpoint.open(path)
    assert (ckpt.step, ckpt.facts["epoch"], ckpt.kind) == (3, ckpt.facts["epoch"], "lightning")
    (found,) = checkpoint.list_checkpoints(path.parent)
    assert (found.kind, found.step) == ("lightning", 3)


def state_of(path):
    return torch.load(path, weights_only=False)["state_dict"]


def test_attributes_of_any_depth_and_other_modules(tmp_path, config):
    state = state_of(TRAINED / NAME)
    about = {"pytorch-lightning_version": "2.6.6", "global_step": 7, "epoch": 0}
    bare = {name.removeprefix("net."): t for name, t in state.items()}
    for prefix in ("", "model.", "gpt.inner.", "_forward_module.net.", "net._orig_mod."):
        named = {prefix + name: t for name, t in bare.items()}
        torch.save(about | {"state_dict": named}, tmp_path / "a.ckpt")
        assert difference(tmp_path / "a.ckpt", NAME, config) <= 1e-5, prefix
    two = {f"model.{n}": t for n, t in bare.items()} | {f"ema.{n}": t + 1 for n, t in bare.items()}
    torch.save(about | {"state_dict": two}, tmp_path / "a.ckpt")
    assert difference(tmp_path / "a.ckpt", NAME, config) <= 1e-5  # the model, not its average
    two = {f"one.{n}": t for n, t in bare.items()} | {f"two.{n}": t + 1 for n, t in bare.items()}
    torch.save(about | {"state_dict": two}, tmp_path / "a.ckpt")
    assert "not known here" in refusal(tmp_path / "a.ckpt", config)  # which of them?
    for bad, match in (({}, "no dictionary of weights"), ({"w": 3}, "'w' is of type int")):
        torch.save(about | {"state_dict": bad}, tmp_path / "a.ckpt")
        assert match in refusal(tmp_path / "a.ckpt", config)


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("/tmp/roseval-was-here"),)


def test_hostile_and_truncated(tmp_path, config):
    path = copied(NAME, tmp_path)
    content = path.read_bytes()
    for n in (len(content) - 10, len(content) // 2):
        path.write_bytes(content[:n])
        assert "truncated or still being written" in refusal(path, config)
    said = {"pytorch-lightning_version": "2", "state_dict": state_of(TRAINED / NAME)}
    torch.save(said | {"callbacks": Evil()}, path)
    assert "getattr" in refusal(path, config) and "could run code" in refusal(path, config)
    assert not pathlib.Path("/tmp/roseval-was-here").exists()


def test_a_directory_of_shards(tmp_path, config):
    """As FSDP leaves it under the same name: DCP's container and meta.pt."""
    path = tmp_path / "last.ckpt"
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save({"state_dict": state_of(TRAINED / NAME)}, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 0, "global_step": 3}, path / "meta.pt")
    assert difference(path, NAME, config) <= 1e-5 and checkpoint.is_finished(path)

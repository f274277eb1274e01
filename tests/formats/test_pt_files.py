"""formats/pt_files.py: rosetrainer's, nanoGPT's and training loops' files, what they may hold."""

import argparse
import collections
import json
import os
import pathlib

import numpy as np
import pytest
import torch
from checkpoint_files import (
    CONFIGS,
    IDS,
    good_file,
    logits,
    make_model,
    nanogpt_file,
    refused,
    rosetrainer_config,
    rosetrainer_state,
    step,
    trained,
)

from checkpoint import (
    inspect,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_training_state,
    load_weights,
)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", None])
def test_rosetrainer(tmp_path, activation):
    model = make_model(CONFIGS["gpt2"].replace(activation=activation or "gelu"))
    config = rosetrainer_config(model.config)
    if activation is None:  # an older file
        for name in ("activation", "dropout", "vocab_size", "use_activation_checkpoint"):
            del config[name]
    contents = {"model": rosetrainer_state(model), "optimizer": {}, "step": 70, "config": config}
    torch.save(contents | {"scaler": {}, "extra": {"note": "x"}}, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", "float32")
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.tie_embeddings
    assert inspect(tmp_path / "a.pt")["kind"] == "rosetrainer"
    assert load_training_state(tmp_path / "a.pt")["extra"] == {"note": "x"}


def test_rosetrainer_unknown_activation_is_erf_gelu(tmp_path):
    model = make_model(CONFIGS["gpt2"].replace(activation="gelu"))
    config = rosetrainer_config(model.config) | {"activation": "swish"}
    torch.save({"model": rosetrainer_state(model), "step": 1, "config": config}, tmp_path / "a.pt")
    assert torch.equal(logits(load_model(tmp_path / "a.pt", "float32")), logits(model))


def test_rosetrainer_old_and_untied(tmp_path):
    model = make_model(CONFIGS["gpt2 untied"])
    config = rosetrainer_config(model.config)
    torch.save({"model": rosetrainer_state(model), "step": 1, "config": config}, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", "float32")
    assert not loaded.config.tie_embeddings
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="has a head of its own"):
        load_weights(tmp_path / "a.pt", make_model(CONFIGS["gpt2"]))


def test_rosetrainer_without_config_takes_it_from_the_caller(tmp_path):
    model = make_model()
    torch.save({"model": rosetrainer_state(model), "step": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "a.pt", "float32")
    for said in ("vocab_size=97", "d_model=32", "max_position_embeddings=32", "d_ff=48"):
        assert said in str(error.value)
    assert "n_layers=2" in str(error.value) and "n_heads" in str(error.value)
    loaded = load_model(tmp_path / "a.pt", "float32", config=model.config)
    assert torch.equal(logits(loaded), logits(model))
    assert inspect(tmp_path / "a.pt")["config"] is None


def test_rosetrainer_tensor_parallel_shard(tmp_path):
    model = make_model()
    state = rosetrainer_state(model)
    state["blocks.0.attn.qkv_proj.weight"] = state["blocks.0.attn.qkv_proj.weight"][:48].clone()
    config = rosetrainer_config(model.config) | {"use_tensor_parallel": True}
    torch.save({"model": state, "step": 1, "config": config}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"1 of another shape.*shard of one rank"):
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path, bias):
    config = CONFIGS["gpt2"].replace(activation="gelu", bias=bias, qkv_bias=bias, d_ff=128)
    model = make_model(config)
    nanogpt_file(model, tmp_path / "ckpt.pt")
    loaded = load_model(tmp_path / "ckpt.pt", "float32")
    assert loaded.config == config
    assert torch.equal(logits(loaded), logits(model))
    (found,) = list_checkpoints(tmp_path)
    assert (found.step, found.kind) == (1500, "nanogpt")


def test_llama2c_is_not_nanogpt(tmp_path):
    """Its ckpt.pt has model_args too, of another architecture."""
    args = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 97}
    state = {"tok_embeddings.weight": torch.ones(97, 32), "layers.0.attention.wq.weight": IDS + 0.0}
    torch.save({"model": state, "model_args": args, "iter_num": 5}, tmp_path / "ckpt.pt")
    assert inspect(tmp_path / "ckpt.pt")["kind"] == "llama2.c"
    refused(tmp_path / "ckpt.pt", "max_position_embeddings")
    torch.save({"model": rosetrainer_state(make_model()), "model_args": args}, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "llama2.c's")


def test_numpy_values_in_a_config(tmp_path):
    model = make_model()
    config = rosetrainer_config(model.config)
    config |= {"n_layers": np.int64(2), "dropout": np.float64(0.0), "d_ff": np.int32(48)}
    torch.save({"model": rosetrainer_state(model), "step": 1, "config": config}, tmp_path / "a.pt")
    assert load_model(tmp_path / "a.pt").config == model.config


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_training_directory(tmp_path, prefix):
    """checkpoint-{step}/pytorch_model.bin with model_state_dict and the rest."""
    model, optimizer, scheduler = trained()
    directory = tmp_path / "checkpoint-300"
    model.config.save_pretrained(directory)
    contents = {
        "model_state_dict": {prefix + name: t for name, t in model.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "epoch": 3,
        "step": 300,
        "loss": torch.tensor(2.25),
    }
    torch.save(contents, directory / "pytorch_model.bin")
    assert torch.equal(logits(load_model(directory, "float32")), logits(model))
    said = inspect(directory)
    assert (said["kind"], said["step"], said["epoch"], said["loss"]) == ("training", 300, 3, 2.25)
    again, optimizer2, scheduler2 = trained(CONFIGS["gpt2"])
    step(again, optimizer2, scheduler2)
    assert load_checkpoint(directory, again, optimizer2, scheduler2) == (3, 300, 2.25)
    assert optimizer2.state_dict()["state"][0]["step"] == 2
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))  # our fields alone
    assert torch.equal(logits(load_model(directory, "float32")), logits(model))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/roseval-evil",)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(), "system"),
        (pathlib.PurePosixPath("x"), "PurePosixPath"),
        (collections.deque(), "deque"),
        (torch.nn.Linear(2, 2), "Linear"),
        (argparse.Namespace(lr=1), "Namespace"),
    ],
)
def test_disallowed_globals_are_named(tmp_path, value, name):
    refused(good_file(tmp_path / "a.pt", note=value), f"holds .*{name}.*could run code")
    assert not os.path.exists("/tmp/roseval-evil")
    (found,) = list_checkpoints(tmp_path)  # listed, so that an evaluation reports it
    assert found.kind == "unreadable"


def test_honest_training_values_load(tmp_path):
    """numpy numbers and arrays, an OrderedDict, a defaultdict's plain copy."""
    more = {
        "loss": np.float64(2.5),
        "n": np.int64(3),
        "rng": np.random.get_state(),
        "flags": np.array([True, False]),
        "ordered": collections.OrderedDict(a=1),
        "losses": np.zeros(3, np.float32),
    }
    load_model(good_file(tmp_path / "a.pt", **more), "float32")
    assert load_training_state(tmp_path / "a.pt")["loss"] == 2.5


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ("just a string", "holds a str"),
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"model": {"a": 1}}, "'a' is of type int"),
        ({"model": {3: torch.ones(2)}}, "3 is of type Tensor"),
        ({"model": {"w": torch.ones(2)}}, "names that are not known"),
        ({"epoch": 3, "weights": {}}, "'epoch' is of type int"),
        ({"model": {"token_embedding.weight": torch.ones(2, 2).to_sparse()}}, "not plain"),
        (
            {"model": {"token_embedding.weight": torch.ones(2, 2, device="meta")}},
            "not plain number",
        ),
    ],
)
def test_other_contents(tmp_path, contents, match):
    torch.save(contents, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)

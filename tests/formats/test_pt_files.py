"""formats/pt_files.py: rosetrainer's, nanoGPT's and training loops' files, what they may hold."""

import argparse
import collections
import functools
import json
import pathlib
import signal

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
    with pytest.raises(ValueError, match=r"48 in the tensors; .*shard of one rank"):
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
    torch.save({"model": state, "iter_num": 5}, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "names that are not known here: they are Meta's .*llama2.c")


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


@pytest.mark.parametrize(
    "value",
    [
        pathlib.PurePosixPath("x"),
        collections.deque([1]),
        collections.defaultdict(list, a=[1]),
        torch.nn.Linear(2, 2),
        argparse.Namespace(lr=1),
        functools.partial(max, 1),
        signal.SIGTERM,  # an Enum
        {1, 2},
        bytearray(b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_lies_beside_the_weights_stays_a_name(tmp_path, value):
    """Read, since none of it is made; the training state, which is made of it, is refused."""
    path = good_file(tmp_path / "a.pt", note=value, args=[value])
    assert torch.equal(logits(load_model(path, "float32")), logits(make_model()))
    assert [info.kind for info in list_checkpoints(tmp_path)] == ["rosetrainer"]
    if not isinstance(value, set):
        with pytest.raises(ValueError, match=r"a\.pt holds .*could run code"):
            load_training_state(path)


def test_a_whole_module_is_no_state_dict(tmp_path):
    for contents in (torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2), "step": 3}):
        torch.save(contents, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", r"torch\.nn\.modules\.linear\.Linear.*save .*state_dict\(\)")


class Settings:
    """Somebody's own class, which nobody has where the file is read."""

    def __init__(self):
        self.lr = 1.0


def lightning(state):
    named = {f"model.{name}": t for name, t in state.items()}
    more = {"epoch": 1, "pytorch-lightning_version": "2.4.0", "hyper_parameters": Settings()}
    return {"state_dict": named, "global_step": 30, "optimizer_states": [{}], **more}


NESTED = {
    "lightning": (lightning, "lightning", 30),
    "deepspeed": (
        lambda s: {"module": s, "global_steps": 40, "ds_version": "0.1", "ds_config": Settings()},
        "deepspeed",
        40,
    ),
    "state_dict": (lambda s: {"state_dict": s}, "weights", None),
    "model_state": (lambda s: {"model_state": s, "iteration": 7}, "weights", 7),
    "params": (lambda s: {"params": s}, "weights", None),
    "ema alone": (lambda s: {"ema": s, "step": 5}, "rosetrainer", 5),
    "two deep": (lambda s: {"state": 1, "model": {"state_dict": s, "step": 6}}, "rosetrainer", 6),
    "a loss that is a tensor": (lambda s: {"loss": torch.tensor(1.5), "model": s}, "weights", None),
    "bare": (lambda s: s, "weights", None),
}


@pytest.mark.parametrize("name", NESTED)
def test_where_weights_lie_in_a_file(tmp_path, name):
    make, kind, step = NESTED[name]
    model = make_model()
    torch.save(make(rosetrainer_state(model)), tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", "float32", config=model.config)
    assert torch.equal(logits(loaded), logits(model))
    said = inspect(tmp_path / "a.ckpt")
    assert (said["kind"], said["step"], said["left_out"]) == (kind, step, None)
    assert (
        "vocab_size=97, d_model=32, max_position_embeddings=32, d_ff=48, n_layers=2"
        in (said["note"])
    )


def test_several_state_dicts_in_a_file(tmp_path):
    """The model's is read, and what is left is named; what nobody can choose between is refused."""
    model, other = make_model(), rosetrainer_state(make_model(seed=1))
    path = good_file(tmp_path / "a.pt", ema=other, teacher=other)
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    assert inspect(path)["left_out"] == ["ema", "teacher"]
    torch.save({"generator": other, "judge": other, "step": 3}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "no state dict under model, .*but generator, judge: save")


def test_dictionaries_without_end(tmp_path):
    """One that holds itself, and a list that would be 2^60 words long if it were shown."""
    circle = {"step": 3}
    circle["model"] = circle
    torch.save(circle, tmp_path / "circle.pt")
    refused(tmp_path / "circle.pt", "'step' is of type int, not a tensor")
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    for field in ("n_layers", "rope_scaling", "anything"):
        config = rosetrainer_config(CONFIGS["gpt2"]) | {field: laughs}
        path = good_file(tmp_path / "a.pt", config=config, loss=laughs, note=laughs)
        refused(path, f"'{field}' of its config is more than a list of values")
    refused(good_file(tmp_path / "b.pt", config=laughs), "has no config")
    refused(good_file(tmp_path / "c.pt", {"ln_f.weight": laughs}), "is of type list, not a tensor")


def test_nanogpt_without_its_arguments(tmp_path):
    model = make_model(CONFIGS["gpt2"].replace(activation="gelu", d_ff=128))
    nanogpt_file(model, tmp_path / "a.pt")
    contents = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(contents["model"], tmp_path / "bare.pt")
    refused(tmp_path / "bare.pt", "vocab_size=97, .*d_ff=128, n_layers=2, but not n_heads")
    contents["model_args"]["vocab_size"] = None
    torch.save(contents, tmp_path / "none.pt")
    refused(tmp_path / "none.pt", r"model_args: vocab_size must be a positive integer, not None")
    del contents["model_args"]["n_head"]
    torch.save(contents, tmp_path / "lacks.pt")
    refused(tmp_path / "lacks.pt", "model_args lacks 'n_head'")


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
        ({"epoch": 3, "weights": {}}, "holds no tensors"),
        ({"epoch": 3, "layers": {}}, "'epoch' is of type int"),
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

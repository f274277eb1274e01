"""checkpoint.py and the rooms under it: every format, every kind of bad file, saving under kill."""

import argparse
import collections
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint import (
    describe,
    expand_paths,
    find_tokenizer,
    fingerprint,
    inspect,
    is_complete,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from config import GPTConfig
from formats import tensorfiles
from model import GPTModel
from tokenizer import build_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = dict(vocab_size=97, max_position_embeddings=32, n_layers=2, n_heads=4, d_model=32, d_ff=48)
LLAMA = dict(norm="rmsnorm", position="rope", gated_mlp=True, bias=False, activation="silu")
CONFIGS = {
    "gpt2": GPTConfig(**SIZES, activation="gelu_new"),
    "gpt2 untied": GPTConfig(**SIZES, tie_embeddings=False),
    "gpt2 without biases": GPTConfig(**SIZES, bias=False),
    "llama": GPTConfig(**SIZES, **LLAMA, n_kv_heads=2, tie_embeddings=False),
    "llama biased": GPTConfig(**SIZES, **(LLAMA | {"bias": True})),
    "mistral": GPTConfig(**SIZES, **LLAMA, n_kv_heads=1, sliding_window=4),
    "qwen2": GPTConfig(**SIZES, **LLAMA, n_kv_heads=2, qkv_bias=True),
    "qwen3": GPTConfig(**SIZES, **LLAMA, n_kv_heads=2, qk_norm=True, head_dim=16),
}
CONFIGS = {name: config.replace(dropout=0.0) for name, config in CONFIGS.items()}
IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))


def make_model(config=CONFIGS["gpt2"], seed=0):
    torch.manual_seed(seed)
    model = GPTModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def trained(config=CONFIGS["gpt2"]):
    """A model, its optimizer and scheduler after two steps."""
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(2):
        step(model, optimizer, scheduler)
    return model.eval(), optimizer, scheduler


def step(model, optimizer, scheduler):
    optimizer.zero_grad()
    model(IDS, labels=IDS)[1].backward()
    optimizer.step()
    scheduler.step()


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def rosetrainer_state(model):
    """As rosetrainer's own state_dict: the tied head is in it too."""
    return {name: t.clone() for name, t in model.state_dict().items()}


def rosetrainer_config(config):
    names = "vocab_size max_position_embeddings n_layers n_heads d_model d_ff dropout activation"
    own = {"use_tensor_parallel": False, "use_activation_checkpoint": False}
    return {name: getattr(config, name) for name in names.split()} | own


def nanogpt_file(model, path):
    c = model.config
    names = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "blocks": "transformer.h",
        "ln_f": "transformer.ln_f",
        "ln1": "ln_1",
        "ln2": "ln_2",
        "qkv_proj": "c_attn",
        "out_proj": "c_proj",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    state = {
        "_orig_mod." + ".".join(names.get(part, part) for part in name.split(".")): t
        for name, t in model.state_dict().items()
    }
    model_args = {
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_embd": c.d_model,
        "block_size": c.max_position_embeddings,
        "bias": c.bias,
        "vocab_size": c.vocab_size,
        "dropout": 0.0,
    }
    extra = {"iter_num": 1500, "best_val_loss": torch.tensor(3.25), "optimizer": {"state": {}}}
    torch.save({"model": state, "model_args": model_args, "config": {"lr": 1.0}} | extra, path)


# ---------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_again(tmp_path, name):
    model, optimizer, scheduler = trained(CONFIGS[name])
    extra = {
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(1).bit_generator.state,
        "best": np.float64(2.5),
        "tokens": 640,
    }
    path = save_checkpoint(model, optimizer, scheduler, 1, 2, 2.5, tmp_path, extra=extra)
    assert path == tmp_path / "checkpoint-2"
    loaded = load_model(path, "float32")
    assert loaded.config == model.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    state = load_training_state(path)
    assert torch.equal(state["extra"]["rng"], extra["rng"])
    assert state["extra"]["python"] == extra["python"]
    assert np.array_equal(state["extra"]["numpy"][1], extra["numpy"][1])
    assert describe(path)["tokens"] == 640 and describe(path)["step"] == 2


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gpt2 without biases"])
def test_transformers_opens_what_was_saved(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = make_model(CONFIGS[name])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        difference = (theirs.eval()(IDS).logits - logits(model)).abs().max().item()
    assert difference <= 1e-5


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gpt2 without biases"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_directories_that_transformers_wrote(tmp_path, name, shard):
    transformers = pytest.importorskip("transformers")
    model = make_model(CONFIGS[name])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_model(tmp_path / "theirs", "float32")
    assert isinstance(ours, GPTModel)
    assert (logits(ours) - logits(model)).abs().max().item() <= 1e-5


def test_tokenizer_goes_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS["gpt2"].replace(vocab_size=257)
    tokenizer = build_tokenizer("byte")
    path = save_checkpoint(GPTModel(config), None, None, 0, 1, 1.0, tmp_path, tokenizer=tokenizer)
    text = "naïve\n  <|endoftext|>"
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    split = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert split == list(tokenizer.encode(text))
    assert find_tokenizer(path) == path
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 256
    assert list(build_tokenizer(path).encode(text)) == list(tokenizer.encode(text))


def test_config_without_hugging_face_form_keeps_native_names(tmp_path):
    model = make_model(CONFIGS["gpt2 without biases"])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    written = json.loads((path / "config.json").read_text())
    assert "model_type" not in written and "native names" in written["note"]
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    assert list(table) == [name for name, _ in model.named_parameters()]


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


def test_sharded_pytorch_bin(tmp_path):
    """Hugging Face's older layout, GPT-2's bare backbone and its mask buffers included."""
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path / "ours")
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    state = {
        name.removeprefix("transformer."): torch.cat([p.clone() for _, p in tensorfiles.pieces(t)])
        for name, t in table.items()
    }
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool) for i in range(2)}
    names = sorted(state)
    theirs = tmp_path / "theirs"
    model.config.save_pretrained(theirs)
    weight_map = {}
    for part, chosen in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-{part:05d}-of-00002.bin"
        torch.save({name: state[name] for name in chosen}, theirs / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = theirs / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(load_model(theirs, "float32")), logits(model))
    (theirs / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 shards: pytorch_model-00002-of-00002.bin"):
        load_model(theirs)
    for bad in ("../pytorch_model.bin", "/etc/passwd", "..", "a/b.bin", 7):
        index.write_text(json.dumps({"weight_map": {"wte.weight": bad}}))
        with pytest.raises(ValueError, match="same directory"):
            load_model(theirs)
    index.write_text("{")
    with pytest.raises(ValueError, match="no index of shards"):
        load_model(theirs)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "gpt_neox", "mixtral", "opt"])
def test_other_architectures_through_transformers(tmp_path, family):
    """Soft caps, logit scales, biased heads, experts: the same logits as the own forward."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    more = {
        "gemma2": {"final_logit_softcapping": 2.0},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.25},
        "mixtral": {"num_local_experts": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    config = transformers.AutoConfig.for_model(family, **(sizes | more.get(family, {})))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", "float32")
    assert not model.supports_cache and model.vocab_size == 97 and model.max_positions == 64
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert torch.allclose(model.logits(model.hidden(IDS)), wanted, atol=1e-5)
        assert torch.allclose(model(IDS)[0], wanted, atol=1e-5)
        loss = model(IDS, labels=IDS)[1]
        assert abs(loss.item() - theirs(IDS, labels=IDS).loss.item()) < 1e-5
    assert is_complete(tmp_path / "m")
    assert (model.config is not None) == (family == "mixtral")


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
    assert grown < held + tensorfiles.PIECE_BYTES + (40 << 20) < 0.9 * size


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
        shapes = {name: view for name, view in checkpoint.layouts.views(GPTModel(config), "llama")}
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
    assert grown < held + tensorfiles.PIECE_BYTES + (64 << 20)


# ---------------------------------------------------------------------------------------------
# Bad files: one clear line each


def good_file(path, state=None, **more):
    model = make_model()
    contents = {"model": state or rosetrainer_state(model), "step": 7}
    torch.save(contents | {"config": rosetrainer_config(model.config)} | more, path)
    return path


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        load_model(path, "float32", **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def test_every_truncation_of_a_file_of_ours_is_noticed(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="its manifest says"):
        load_model(path)
    weights.unlink()
    with pytest.raises(ValueError, match="its manifest says"):
        load_model(path)


def test_shrinking_while_read_is_an_error(tmp_path):
    path = good_file(tmp_path / "a.pt")
    table = checkpoint.open_checkpoint(path).tensors
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="became shorter"):
        list(tensorfiles.pieces(table["token_embedding.weight"]))


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
    last = max(
        int(r.name.rpartition("/")[2]) for r in checkpoint.tensorfiles.open_torch(path).records
    )
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_weights_are_named(tmp_path, value):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 4] = value
    refused(good_file(tmp_path / "a.pt", rosetrainer_state(model)), "NaN or Inf: blocks.1.mlp.fc2")
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    refused(path, r"1 of 28 tensors hold NaN or Inf: transformer.h.1.mlp.c_proj.weight")


def test_overflow_of_the_target_dtype_counts_as_inf(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    path = good_file(tmp_path / "a.pt", rosetrainer_state(model))
    load_model(path, "bfloat16")
    with pytest.raises(ValueError, match=r"Inf: blocks.0.mlp.fc1.weight"):
        load_model(path, "float16")


def test_keys_shapes_and_dtypes(tmp_path):
    model = make_model()
    state = rosetrainer_state(model)
    del state["ln_f.weight"], state["blocks.1.ln1.bias"]
    state["extra.weight"] = torch.ones(2)
    state["blocks.0.mlp.fc1.weight"] = torch.ones(40, 32)
    state["blocks.0.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    state["blocks.1.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.complex64)
    path = good_file(tmp_path / "a.pt", state)
    refused(path, "2 missing: blocks.1.ln1.bias, ln_f.weight")
    refused(path, "1 unexpected: extra.weight")
    refused(path, r"blocks.0.mlp.fc1.weight \(file \[40, 32\], model \[48, 32\]\)")
    refused(path, r"out_proj.weight \(int8\), blocks.1.attn.out_proj.weight \(complex64\)")
    bigger = model.config.replace(n_layers=4, vocab_size=98)
    with pytest.raises(ValueError) as error:
        load_model(good_file(tmp_path / "b.pt"), config=bigger)
    said = str(error.value)
    assert "24 missing: blocks.2.ln1.weight" in said and said.count("blocks.") == 5 and "…" in said
    assert "(file [97, 32], model [98, 32])" in said


def test_missing_head_is_fine_only_if_tied(tmp_path):
    for name, fine in (("gpt2", True), ("gpt2 untied", False)):
        model = make_model(CONFIGS[name])
        state = rosetrainer_state(model)
        del state["lm_head.weight"]
        config = model.config.to_dict()
        path = tmp_path / f"{name}.pt"
        torch.save({"model": state, "step": 1, "config": config}, path)
        if fine:
            load_model(path)
        else:
            refused(path, "1 missing: lm_head.weight")


def test_wrappers_are_stripped_only_when_every_name_has_them(tmp_path):
    state = rosetrainer_state(make_model())
    state["module.ln_f.weight"] = state.pop("ln_f.weight")
    refused(
        good_file(tmp_path / "a.pt", state), "1 missing: ln_f.weight; 1 unexpected: module.ln_f"
    )


def safetensors_file(path, header: dict | bytes, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


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


def test_safetensors_header_cap(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    safetensors_file(tmp_path / "model.safetensors", b"{" + b" " * (20 << 20) + b"}")
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="header's limit is 10,485,760"):
        load_model(tmp_path)
    assert time.perf_counter() - begin < 1
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="no safetensors file"):
        load_model(tmp_path)


def test_quantised_safetensors_are_refused(tmp_path):
    config = CONFIGS["gpt2"]
    path = save_checkpoint(make_model(config), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").unlink()
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    header, offset = {}, 0
    for name, t in table.items():
        end = offset + int(np.prod(t.shape))
        header[name] = {"dtype": "I8", "shape": t.shape, "data_offsets": [offset, end]}
        offset = end
    safetensors_file(path / "model.safetensors", header, bytes(offset))
    refused(path, r"28 of a type that is not float32, .*transformer.wte.weight \(I8\)")


def test_directories_without_weights(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="distributed checkpoint"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "nowhere.pt")


def test_old_torch_is_refused(tmp_path, monkeypatch):
    path = good_file(tmp_path / "a.pt")
    for version, fine in (("2.9.1+cu128", False), ("1.13.0", False), ("2.10.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if fine:
            load_model(path)
        else:
            with pytest.raises(ValueError, match=r"CVE-2025-32434"):
                load_model(path)


# ---------------------------------------------------------------------------------------------
# Saving


def test_resume_is_exact(tmp_path):
    model, optimizer, scheduler = trained()
    path = save_checkpoint(model, optimizer, scheduler, 1, 2, 3.5, tmp_path)
    step(model, optimizer, scheduler)
    again = make_model(seed=1)
    optimizer2 = torch.optim.AdamW(again.parameters(), lr=1e-3)
    scheduler2 = torch.optim.lr_scheduler.LambdaLR(optimizer2, lambda step: 1 / (1 + step))
    assert load_checkpoint(path, again, optimizer2, scheduler2) == (1, 2, 3.5)
    step(again, optimizer2, scheduler2)
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    assert scheduler.get_last_lr() == scheduler2.get_last_lr()


def test_wrapped_models_are_saved_bare_and_loaded_into(tmp_path):
    model = make_model()
    path = save_checkpoint(torch.compile(model), None, None, 0, 1, 1.0, tmp_path)
    again = make_model(seed=1)
    load_weights(path, torch.compile(again))
    assert torch.equal(logits(again), logits(model))


def test_keep(tmp_path):
    model = make_model()
    for number, loss in enumerate((3.0, 0.9, 1.1, float("nan"), 1.0), start=1):
        save_checkpoint(model, None, None, 0, number, loss, tmp_path, keep=2)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 4, 5]
    # after a resume from an old one, the one just written is not the one to go
    save_checkpoint(model, None, None, 0, 3, 1.0, tmp_path, keep=1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 3, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (2, 3, 5)]
    with pytest.raises(ValueError, match="keep"):
        save_checkpoint(model, None, None, 0, 9, 1.0, tmp_path, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    for seed in (0, 1):
        model = make_model(seed=seed)
        path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    with pytest.raises(ValueError, match="PurePosixPath"):
        extra = {"path": pathlib.PurePosixPath("x")}
        save_checkpoint(make_model(seed=1), None, None, 0, 1, 1.0, tmp_path, extra=extra)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(logits(load_model(path, "float32")), logits(model))
    # without an atomic exchange (some network file systems) the result is the same
    monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    other = make_model(seed=2)
    save_checkpoint(other, None, None, 0, 1, 1.0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(logits(load_model(path, "float32")), logits(other))


def kill_while_saving(directory, rounds, seed):
    """kill -9 at random moments of saving new steps and old ones again, with old ones removed; then
    everything listed must be whole. Returns how many rounds left something half done behind."""
    directory, rng, half_done = pathlib.Path(directory), random.Random(seed), 0
    torch.set_num_threads(1)  # so that a fork is safe
    model, optimizer, scheduler = trained(CONFIGS["llama"])
    save_checkpoint(model, optimizer, scheduler, 0, 0, 1.0, directory)
    for _ in range(rounds):
        child = os.fork()
        if not child:
            for n in itertools.count():
                number = n % 5 if n % 2 else n
                save_checkpoint(model, optimizer, scheduler, 0, number, 1.0, directory, keep=2)
        time.sleep(rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        half_done += any(p.name.startswith(".") for p in directory.iterdir())
        found = list_checkpoints(directory)
        assert found and all(info.kind == "roseval" for info in found), found
        for info in found:
            checkpoint._check_manifest(info.path, content=True)
            load_model(info.path, "float32")
            assert load_training_state(info.path)["step"] == info.step
    save_checkpoint(model, None, None, 0, 10**6, 1.0, directory)
    assert not [p for p in directory.iterdir() if p.name.startswith(".")]
    return half_done


def kill_in_a_process_of_its_own(directory, rounds, seed):
    call = f"print(test_checkpoint.kill_while_saving({str(directory)!r}, {rounds}, {seed}))"
    command = [sys.executable, "-c", f"import test_checkpoint; {call}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kill_while_saving(tmp_path):
    assert kill_in_a_process_of_its_own(tmp_path, 10, seed=0) >= 3


@pytest.mark.slow
def test_kill_while_saving_many_times(tmp_path):
    assert kill_in_a_process_of_its_own(tmp_path, 500, seed=1) >= 150


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
    assert len(list((tmp_path / "cache/roseval/sha256").iterdir())) == 1
    monkeypatch.setattr(checkpoint, "_sha256", None)  # now from the cache alone
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


def test_a_manifest_of_somebody_else_is_none_of_ours(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").write_text('{"files": ["a"], "name": "web app"}')
    assert [info.kind for info in list_checkpoints(tmp_path)] == ["huggingface"]
    load_model(path)
    (path / "manifest.json").write_text('{"files": ')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load_model(path)


@pytest.mark.slow
def test_lm_eval_opens_what_was_saved(tmp_path):
    """lm-eval's HFLM from the directory alone: the log-likelihood that our own model gives."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = build_tokenizer("byte")
    model = make_model(CONFIGS["llama"].replace(vocab_size=257))
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path, tokenizer=tokenizer)
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)
    context, continuation = "The capital", " of France"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((wanted, _),) = theirs.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([list(tokenizer.encode(context + continuation))])
    with torch.no_grad():
        logprobs = model(ids)[0].log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    assert logprobs[len(context) - 1 :].sum().item() == pytest.approx(wanted, abs=1e-3)

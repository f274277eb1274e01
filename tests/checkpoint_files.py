"""What the tests of checkpoints share: models of each family, files of each format."""

import json
import pathlib
import struct

import pytest
import torch

from checkpoint import (
    load_model,
)
from config import GPTConfig
from model import GPTModel

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


def good_file(path, state=None, **more):
    model = make_model()
    contents = {"model": state or rosetrainer_state(model), "step": 7}
    torch.save(contents | {"config": rosetrainer_config(model.config)} | more, path)
    return path


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        load_model(path, "float32", **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def safetensors_file(path, header: dict | bytes, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)

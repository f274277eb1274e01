"""formats/llama2c.py: headers that lie, files cut short, and what only looks alike."""

import re
import struct

import numpy as np
import pytest
import torch
from trained_files import copied, difference, refusal

import checkpoint

HEADER = (16, 48, 2, 4, 2, 61, 32)


@pytest.mark.parametrize("name", ["llama2c-tied/v0.bin", "llama2c-tied/v1.bin"])
def test_cut_short_or_too_long(tmp_path, name):
    path = copied(name, tmp_path)
    content = path.read_bytes()
    for n in (len(content) - 1, len(content) // 2, 300):
        path.write_bytes(content[:n])
        assert "truncated: its header promises" in refusal(path)
        (found,) = checkpoint.list_checkpoints(path.parent)
        assert found.kind == "unreadable" and not checkpoint.is_complete(path)
    path.write_bytes(content + b"\0")
    assert "damaged: its header promises" in refusal(path)
    path.write_bytes(content[:400] + struct.pack("<f", float("nan")) + content[404:])
    assert "hold NaN or Inf" in refusal(path)
    path.write_bytes(content)
    assert difference(path, name) <= 1e-5


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (struct.pack("<Ii7iB", 0x616B3432, 2, *HEADER, 1), "version 2 (int8)"),
        (struct.pack("<Ii7iB", 0x616B3432, 9, *HEADER, 1), "version 9"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, 16, 48, 2, 3, 2, 61, 32, 1), "damaged: its header"),
        (struct.pack("<Ii7iB", 0x616B3432, 1, 16, -48, 2, 4, 2, 61, 32, 1), "damaged: its header"),
        (struct.pack("<Ii", 0x616B3432, 1), "header of 256"),
        (struct.pack("<7i", *HEADER[:2], 900, *HEADER[3:]), "truncated: its header promises"),
        (struct.pack(">7i", *HEADER), "not a torch file"),  # the other byte order
        (struct.pack("<7i", 16, 48, 2, 5, 2, 61, 32), "not a torch file"),
    ],
)
def test_headers_that_do_not_hold(tmp_path, head, match):
    path = copied("llama2c-tied/v1.bin", tmp_path)
    content = path.read_bytes()
    path.write_bytes(head + (content[len(head) :] if len(head) > 8 else b""))
    assert match in refusal(path)


def test_token_ids_are_not_weights(tmp_path):
    """nanoGPT's raw uint16 beside it."""
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 50257, 5000).astype(np.uint16)
        ids.tofile(tmp_path / "val.bin")
        with pytest.raises(ValueError, match="not a torch file"):
            checkpoint.open(tmp_path / "val.bin")


def test_training_states(tmp_path):
    path = copied("llama2c-tied/ckpt.pt", tmp_path)
    said = torch.load(path)
    checkpoint.load_training_state(path)
    for change, match in (
        (
            {"model_args": {k: v for k, v in said["model_args"].items() if k != "n_heads"}},
            "n_heads",
        ),
        ({"model_args": said["model_args"] | {"dim": 32}}, "of another shape|d_model is 32"),
        ({"model": said["model"] | {"extra": 3}}, "'extra' is of type int"),
    ):
        torch.save(said | change, path)
        assert re.search(match, refusal(path))
    nanogpt = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 61}
    torch.save(said | {"model_args": nanogpt | {"n_kv_heads": 1}}, path)
    assert "lack what says" in refusal(path)

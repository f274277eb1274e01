"""formats/llmc.py: headers, other files of llm.c, when a save is over."""

import struct

import pytest
import torch
from trained_files import copied, refusal

import checkpoint
from formats import llmc

NAME = "llmc/float32/model_00000030.bin"


@pytest.fixture
def path(tmp_path):
    return copied(NAME, tmp_path)


def test_padding_is_cut_off(path):
    ckpt = checkpoint.open(path)
    assert ckpt.vocab_size == 61 and ckpt.tensors["token_embedding.weight"].shape == (61, 16)
    assert ckpt.config.activation == "gelu_new" and ckpt.config.tie_embeddings
    bf16 = checkpoint.open(path.parents[1] / "float32" / path.name)
    assert bf16.facts == ckpt.facts


def test_cut_short_or_damaged(path):
    content = path.read_bytes()
    for n in (len(content) - 4, 2000, 1024):
        path.write_bytes(content[:n])
        assert "truncated: its header promises" in refusal(path)
    path.write_bytes(content[:100])
    assert "a header of 1,024" in refusal(path)
    path.write_bytes(content + b"\0")
    assert "damaged: its header promises" in refusal(path)
    for at, value, match in (
        (1, 4, "version 4, known are 3 and 5"),
        (3, 500, "damaged: its header says"),  # more tokens than rows
        (4, -2, "damaged: its header says"),
        (4, 1 << 30, "truncated: its header promises"),
        (5, 3, "damaged: its header says"),
    ):
        changed = bytearray(content)
        changed[4 * at : 4 * at + 4] = struct.pack("<i", value)
        path.write_bytes(changed)
        assert match in refusal(path)
    path.write_bytes(content[:2000] + b"\xff" * 4 + content[2004:])
    assert "hold NaN or Inf" in refusal(path)


@pytest.mark.parametrize("magic", llmc.OTHERS)
def test_other_files_are_refused_by_name(tmp_path, magic):
    path = tmp_path / "x_00000030.bin"
    path.write_bytes(struct.pack("<256i", magic, *[1] * 255))
    assert llmc.OTHERS[magic] in refusal(path)
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_a_save_ends_with_its_sign(path):
    assert checkpoint.is_finished(path) is False
    (path.parent / "DONE_00000030").touch()
    assert checkpoint.is_finished(path) is True
    other = path.rename(path.parent / "gpt2_124M.bin")
    assert checkpoint.is_finished(other) is None
    assert checkpoint.open(other).kind == "llm.c"


def test_bfloat16_is_the_same_rounded(path, tmp_path):
    half = checkpoint.open(copied("llmc/bfloat16/model_00000030.bin", tmp_path / "half"))
    a, b = checkpoint.open(path).load("float32"), half.load("float32")
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p.bfloat16().float(), q)

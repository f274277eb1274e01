"""formats/bitsandbytes.py: which half of a byte is first, and the scales of scales."""

import json

import pytest
import torch
from quantised_files import changed, linear, one_line

STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**said):
    return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


def four_bits(folder, shape, size, double):
    """(what it should be, what is read), made by a loop over the numbers."""
    torch.manual_seed(0)
    n = shape[0] * shape[1]
    blocks = -(-n // size)
    codes, table = torch.randint(0, 16, (n,)), torch.linspace(-1, 1, 16)
    high, low = codes[::2], torch.cat([codes[1::2], torch.zeros(n % 2, dtype=torch.long)])
    tensors = {"weight": (high * 16 + low).to(torch.uint8)[:, None], "weight.quant_map": table}
    said = {"quant_type": "nf4", "blocksize": size, "dtype": "float16", "shape": list(shape)}
    absmax = torch.rand(blocks)
    tensors["weight.absmax"] = absmax
    if double:
        index, nested = torch.randint(0, 256, (blocks,)), torch.rand(-(-blocks // 3))
        map256, offset = torch.linspace(-1, 1, 256), 0.1234567
        absmax = map256[index] * nested.repeat_interleave(3)[:blocks] + torch.tensor(offset)
        said |= {"nested_blocksize": 3, "nested_offset": offset, "nested_dtype": "float32"}
        tensors |= {"weight.absmax": index.to(torch.uint8), "weight.nested_absmax": nested}
        tensors["weight.nested_quant_map"] = map256
    tensors[STATE] = state(**said)
    should = (table[codes] * absmax.repeat_interleave(size)[:n]).view(shape)
    return should, linear(folder, "bitsandbytes", {"load_in_4bit": True}, tensors)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((6, 40), 64), ((5, 7), 8), ((3, 128), 32)])
def test_four_bits(shape, size, double, tmp_path, monkeypatch):
    """Rows that are no whole blocks, and an odd number of columns."""
    from formats import quantised

    for band in (1 << 20, 1):
        monkeypatch.setattr(quantised, "BAND", band)
        should, found = four_bits(tmp_path, shape, size, double)
        assert torch.equal(found, should)


def test_the_first_number_is_in_the_high_half(tmp_path):
    tensors = {"weight": torch.tensor([[0x01]], dtype=torch.uint8)}
    tensors |= {"weight.absmax": torch.ones(1), "weight.quant_map": torch.arange(16.0)}
    tensors[STATE] = state(blocksize=64, shape=[1, 2])
    assert linear(tmp_path, "bitsandbytes", {}, tensors).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("leaf", "value", "what"),
    [
        ("weight_format", torch.tensor(1, dtype=torch.uint8), "weight_format is not 0"),
        ("SCB", torch.ones(31), r"SCB is float32 \[31\], and not float32 \[32\]"),
    ],
)
def test_int8_in_another_order(leaf, value, what, tmp_path):
    full = f"model.layers.0.self_attn.k_proj.{leaf}"
    one_line(changed(tmp_path, "bnb-int8", change=lambda s: s.update({full: value})), what)


@pytest.mark.parametrize(
    "said",
    [
        {"blocksize": 64, "shape": [32, 32, 1]},
        {"blocksize": 0, "shape": [32, 32]},
        {"blocksize": 64, "shape": [32, 64]},
        {"blocksize": 64, "shape": [2**40, 1]},
        {"blocksize": 64, "shape": [32, 32], "nested_offset": 1e400, "nested_blocksize": 256},
        {"blocksize": 64, "shape": [32, 32], "nested_offset": 0.1, "nested_blocksize": "a"},
    ],
)
def test_a_state_that_cannot_be(said, tmp_path):
    full = f"model.layers.0.self_attn.q_proj.{STATE}"
    path = changed(tmp_path, "bnb-4bit", change=lambda s: s.update({full: state(**said)}))
    one_line(path, r"model\.safetensors: .*q_proj\.weight")

"""formats/compressed.py: groups of settings that are told by shapes, and what is not read."""

import json

import pytest
import torch
from quantised_files import changed, linear, one_line, source

import checkpoint


def group(**weights):
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    return {"targets": ["Linear"], "weights": usual | weights}


def said(*groups, **more):
    each = {f"group_{i}": one for i, one in enumerate(groups)}
    usual = {"format": "pack-quantized", "config_groups": each, "ignore": ["re:.*lm_head"]}
    return usual | more


def test_the_first_word_of_the_codes(tmp_path):
    """-8 … -1 are the numbers 0 … 7 of it."""
    tensors = {"weight_packed": torch.full((3, 2), 0x76543210, dtype=torch.int32)}
    tensors |= {"weight_scale": torch.ones(3, 1), "weight_shape": torch.tensor([3, 16])}
    found = linear(tmp_path, "compressed-tensors", said(group()), tensors)
    assert torch.equal(found, torch.arange(-8.0, 0).repeat(2).expand(3, 16))


def test_columns_that_do_not_fill_the_last_word(tmp_path):
    numbers = torch.randint(0, 8, (4, 21))
    rows = [sum(int(n) << (3 * i) for i, n in enumerate(row)) for row in numbers]
    raw = b"".join(row.to_bytes(8, "little") for row in rows)
    words = torch.frombuffer(bytearray(raw), dtype=torch.int32).view(4, 2)
    tensors = {"weight_packed": words, "weight_shape": torch.tensor([4, 21])}
    tensors["weight_scale"] = torch.rand(4, 1)
    one = group(num_bits=3, strategy="channel", group_size=None)
    found = linear(tmp_path, "compressed-tensors", said(one), tensors)
    assert torch.equal(found, (numbers - 4) * tensors["weight_scale"])


def test_zeros_of_older_files_lie_in_int8(tmp_path):
    tensors = {"weight_packed": torch.full((3, 2), 0x76543210, dtype=torch.int32)}
    tensors |= {"weight_scale": torch.ones(3, 1), "weight_shape": torch.tensor([3, 16])}
    tensors["weight_zero_point"] = torch.tensor([[-8], [0], [2]], dtype=torch.int8)
    one = group(symmetric=False)
    found = linear(tmp_path, "compressed-tensors", said(one), tensors)
    assert found[:, 0].tolist() == [0.0, -8.0, -10.0]


def test_columns_that_are_said_to_lie_in_order(tmp_path):
    """-1 for each is what a matrix has whose columns were not moved."""
    tensors = {"weight_packed": torch.full((3, 4), 0x76543210, dtype=torch.int32)}
    tensors |= {"weight_scale": torch.rand(3, 2), "weight_shape": torch.tensor([3, 32])}
    plain = linear(tmp_path, "compressed-tensors", said(group()), tensors)
    tensors["weight_g_idx"] = torch.full((32,), -1, dtype=torch.int32)
    ordered = said(group(actorder="group"))
    assert torch.equal(linear(tmp_path, "compressed-tensors", ordered, tensors), plain)
    tensors["weight_g_idx"] = torch.arange(32, dtype=torch.int32) % 2
    moved = linear(tmp_path, "compressed-tensors", ordered, tensors)
    scales = tensors["weight_scale"][:, torch.arange(32) % 2]
    assert torch.equal(moved, torch.arange(-8.0, 0).repeat(4) * scales)
    tensors["weight_g_idx"][5] = 2
    with pytest.raises(ValueError, match=r"weight_g_idx names groups beyond its 2"):
        linear(tmp_path, "compressed-tensors", ordered, tensors)


def test_two_groups_that_fit_and_differ_are_refused(tmp_path):
    """7 bits in whole numbers a word and 8 bits have the same shape."""
    row = {"strategy": "channel", "group_size": None}
    tensors = {"weight_packed": torch.ones(3, 8, dtype=torch.int32)}
    tensors |= {"weight_scale": torch.ones(3, 1), "weight_shape": torch.tensor([3, 32])}
    both = said(group(num_bits=7, **row), group(num_bits=8, **row))
    with pytest.raises(ValueError, match=r"down_proj\.weight_packed fits 2 groups"):
        linear(tmp_path, "compressed-tensors", both, tensors)
    with pytest.raises(ValueError, match=r"down_proj\.weight_packed fits no group"):
        linear(tmp_path, "compressed-tensors", said(group()), tensors)


def first(path, **values):
    """Of the first group's weights, other values."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)
    file.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ({"format": "mxfp4-pack-quantized"}, "format is 'mxfp4-pack-quantized'"),
        ({"format": "marlin-24"}, "format is 'marlin-24'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is "),
        ({"transform_config": {"config_groups": {"a": 1}}}, "transform_config is "),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is "),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups must hold objects"),
        ({"config_groups": {"group_0": {"weights": None}}}, "group_0 says nothing of weights"),
    ],
)
def test_what_is_not_read_is_named(values, what, tmp_path):
    one_line(changed(tmp_path, "compressed-packed", values), what)


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ({"strategy": "token"}, "strategy is 'token'"),
        ({"strategy": "tensor_group"}, "strategy is 'tensor_group'"),
        ({"strategy": "block"}, "of strategy block without its size"),
        ({"strategy": "block", "block_structure": [1, 2, 3]}, "of strategy block without"),
        ({"num_bits": 9}, "num_bits is 9"),
        ({"type": "float", "num_bits": 4}, "num_bits is 4, which is not read"),
        ({"dynamic": True}, "dynamic is True"),
        ({"group_size": -2}, "group_size must be -1 or a size"),
        ({"actorder": "sideways"}, "actorder is 'sideways'"),
    ],
)
def test_schemes_that_are_not_read_are_named(weights, what, tmp_path):
    one_line(first(changed(tmp_path, "compressed-packed"), **weights), what)


def test_what_the_file_wants_of_activations_is_said():
    for name, wants in (("naive", "float8 by tensor, static"), ("int8", "int8 by token, dynamic")):
        ckpt = checkpoint.open(source(f"compressed-{name}"))
        said = ckpt.describe()["quantisation"]["activations"]
        assert said == f"not quantised (the file wants {wants}): w8a16"

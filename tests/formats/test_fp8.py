"""formats/fp8.py: tiles at the edge, one scale for a row or the whole, and parts that are fused."""

import pytest
import torch
from quantised_files import changed, dense, linear, one_line

import checkpoint

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("shape", [(300, 200), (128, 130), (7, 384)])
def test_tiles_at_the_edge_are_smaller(shape, tmp_path):
    codes = (torch.randn(shape) * 50).clamp(-448, 448).to(E4M3)
    tiles = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    said = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    found = linear(tmp_path, "fp8", said, {"weight": codes, "weight_scale_inv": tiles})
    each = tiles.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(found, codes.float() * each)


@pytest.mark.parametrize("scales", [(), (1,), (40,), (40, 1)])
def test_a_scale_for_all_or_for_each_row(scales, tmp_path):
    codes, scale = (torch.randn(40, 24) * 50).to(E4M3), torch.rand(scales)
    for method in ("fp8", "fbgemm_fp8"):
        found = linear(tmp_path, method, {}, {"weight": codes, "weight_scale": scale})
        assert torch.equal(found, codes.float() * scale.view(-1, 1))


def test_parts_that_are_fused_keep_their_own_scales(tmp_path):
    """Of q, k and v, which are one matrix of ours, in the model itself."""
    path = changed(tmp_path, "fp8-tensor")
    weights = dense(path)
    fused = checkpoint.load_model(path, "float32").state_dict()["blocks.0.attn.qkv_proj.weight"]
    parts = [weights[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(fused, torch.cat(parts))


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"scale_fmt": "e4m3"}, "scale_fmt is 'e4m3'"),
        ({"kv_cache_scheme": "static"}, "kv_cache_scheme is 'static'"),
        ({"weight_block_size": [128]}, "weight_block_size must be two sizes"),
        ({"weight_block_size": [128, 0]}, "weight_block_size must be two sizes"),
        ({"weight_block_size": [128, 128]}, r"weight_scale_inv is \[.*and not \[1, 1\]"),
        ({"weight_block_size": None}, r"weight_scale_inv is \[.*and not \[1, 1\] or"),
    ],
)
def test_switches_that_change_the_numbers(said, what, tmp_path):
    one_line(changed(tmp_path, "fp8-block", said), what)


def test_what_the_file_wants_of_activations_is_said():
    from quantised_files import source

    said = checkpoint.open(source("fp8-tensor")).describe()["quantisation"]["activations"]
    assert said == "not quantised (the file wants fp8, static): w8a16"

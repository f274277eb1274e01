"""Layers whose weights stay packed against the weights that their codes stand for, and whole models
against models with those weights. tests/gpu/test_low_bit_gpu.py has the kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_model
from low_bit import codes_by_name, codes_of

from backends import Sampling, engine
from backends.local import batch_overhead
from gpu_kernels import low_bit_matmul
from gpu_kernels.float8_matmul import float8_rows
from model import GPTModel
from modeling.mlp import Linear
from quantisation.codes import Codes
from quantisation.linear import (
    PackedLinear,
    n_weights,
    pack_model,
    packed_of,
    weight_bytes,
)

SHAPES = [(1, 1), (7, 100), (64, 64), (33, 257), (130, 384), (5, 31)]
TERMS = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 32, "zeros": "whole"},
    {"bits": 4, "group": 64, "zeros": "broken"},
    {"bits": 4, "group": 16},
    {"bits": 4, "group": 32, "zeros": "added", "dtype": torch.float16},
    {"bits": 5, "group": 32, "zeros": "added"},
    {"bits": 4, "zeros": "whole", "shuffled": True, "group": 32},
    {"bits": 3, "group": 128, "zeros": "whole", "dtype": torch.float16},
    {"bits": 2, "group": 32},
    {"bits": 8},
    {"bits": 8, "zeros": "whole"},
    {"bits": 8, "zeros": "broken", "group": 128},
    {"bits": 8, "group": 32, "shuffled": True, "dtype": torch.bfloat16},
    {"bits": 6, "group": 64},
    {"bits": 0},
    {"bits": 0, "group": 128},
]


def drawn(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("N, K", SHAPES)
def test_a_weight_is_the_same_bits_packed_or_not(N, K, terms):
    codes = codes_of(drawn(N, K), **terms)
    layer = PackedLinear([codes], torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        layer.dtype = dtype
        assert torch.equal(layer.weight, codes.dequantise(dtype))
    layer.dtype, x = torch.float32, drawn(3, K, seed=1)
    wanted = x.double() @ codes.dequantise(torch.float64).t()
    assert layer(x).shape == (3, N)
    assert (layer(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_every_code_survives():
    """All that a code may be, the extremes that rounding to nearest never gives among them."""
    every = {
        "signed nibble": (4, torch.arange(-8, 8, dtype=torch.int8)),
        "nibble": (4, torch.arange(16, dtype=torch.uint8)),
        "signed byte": (8, torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)),
        "byte": (8, torch.arange(256, dtype=torch.int16).to(torch.uint8)),
        "e4m3": (8, torch.arange(256, dtype=torch.int16).to(torch.uint8)),
    }
    for name, (bits, values) in every.items():
        q = torch.stack((values, values.flip(0)))
        if name == "e4m3":
            q = q.view(torch.float8_e4m3fn)
        codes = Codes(name, bits, q, torch.tensor([[1.0], [0.5]]))
        packed = packed_of(codes)[0]
        found = low_bit_matmul.dequantise_plain(packed, torch.float32)
        wanted = codes.dequantise()
        assert torch.equal(found.nan_to_num(99), wanted.nan_to_num(99)), name


def test_codes_of_four_bits_take_half_a_byte():
    for bits, least in ((4, 0.5), (3, 0.5), (8, 1.0), (0, 1.0)):
        layer = PackedLinear([codes_of(drawn(256, 1024), bits=bits)], torch.bfloat16)
        codes = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if "words" in n)
        assert codes == 256 * 1024 * least
        assert weight_bytes(layer) < codes + 256 * 8


def test_parts_of_one_form_are_one_and_others_stay_apart():
    weights = [drawn(n, 64, seed=n) for n in (32, 8, 8)]
    x = drawn(2, 64, seed=9)
    alike = {"bits": 4, "group": 32}
    for terms, n_apart in (
        ([alike] * 3, 1),
        ([alike, alike, {"bits": 8}], 2),
        ([alike, alike | {"zeros": "whole"}, alike | {"group": 64}], 3),
        ([alike | {"shuffled": True}, alike, alike], 2),
    ):
        parts = [codes_of(w, **t) for w, t in zip(weights, terms, strict=True)]
        layer = PackedLinear(parts, torch.float32)
        dense = torch.cat([part.dequantise() for part in parts])
        assert len(layer.weights) == n_apart and torch.equal(layer.weight, dense)
        assert (layer(x) - x @ dense.t()).abs().max() < 1e-5


def test_a_bias_is_added_once_whatever_the_parts():
    bias = torch.nn.Parameter(drawn(1, 48)[0])
    weights, x = [drawn(n, 64, seed=n) for n in (32, 16)], drawn(2, 64)
    for bits in ((4, 4), (4, 8)):
        parts = [codes_of(w, bits=b) for w, b in zip(weights, bits, strict=True)]
        layer = PackedLinear(parts, torch.float32, bias)
        wanted = F.linear(x, torch.cat([part.dequantise() for part in parts]), bias)
        assert (layer(x) - wanted).abs().max() < 1e-5
        assert dict(layer.named_parameters()).keys() == {"bias"}


def test_groups_of_unequal_sizes_are_refused():
    codes = codes_of(drawn(4, 64), group=32)
    groups = torch.arange(64) // 32
    groups[0] = 1
    with pytest.raises(ValueError, match="unequal"):
        packed_of(Codes("odd", 4, codes.codes, codes.scales, None, groups))


# ---------------------------------------------------------------------------------------------
# Activations of 8-bit floats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_layers_are_rounded_on_both_sides(dtype):
    parts = [codes_of(drawn(n, 100, seed=n), bits=0) for n in (20, 13)]
    layer = PackedLinear(parts, dtype, activations="e4m3")
    x = drawn(7, 100).to(dtype)
    codes, scales = float8_rows(x)
    dense = torch.cat([part.dequantise(torch.float64) for part in parts])
    wanted = codes.double() * scales @ dense.t()
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    assert (layer(x) - wanted).abs().max() <= wanted.abs().max() * bound
    assert torch.equal(layer.weight, dense.to(dtype))
    with pytest.raises(ValueError, match="one scale a row"):
        PackedLinear([codes_of(drawn(4, 64), bits=0, group=32)], dtype, activations="e4m3")
    with pytest.raises(ValueError, match="one scale a row"):
        PackedLinear([codes_of(drawn(4, 64))], dtype, activations="e4m3")


# ---------------------------------------------------------------------------------------------
# Models

KINDS = {
    "llama": {},
    "gpt": {"bias": True, "activation": "gelu_new"},
    "latent": {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8}
    | {"qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 16, "n_kv_heads": 4},
}


def small(kind) -> GPTModel:
    return tiny_model("gpt" if kind == "gpt" else "llama", **KINDS[kind])


def with_weights_of(model: GPTModel, codes: dict[str, list[Codes]]) -> GPTModel:
    """The same model, its layers holding what the codes stand for."""
    dense = copy.deepcopy(model)
    for name, (own,) in codes.items():
        dense.get_submodule(name).weight.data = own.dequantise()
    return dense


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_packed_model_scores_and_draws_as_one_with_those_weights(kind):
    model, terms = small(kind), {"bits": 8} if kind == "gpt" else {"bits": 4, "group": 16}
    codes = codes_by_name(model, **terms)
    dense = with_weights_of(model, codes)
    pack_model(model, codes)
    assert not any(isinstance(m, Linear) for m in model.blocks.modules())
    ids = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    found, wanted = (m.logits(m.hidden(ids)) for m in (model, dense))
    assert (found - wanted).abs().max() < 1e-4 and (wanted - small(kind)(ids)[0]).abs().max() > 0.1
    prompts = [ids[0, :7].tolist(), ids[1, :12].tolist()]
    drawn_by = [
        {s.prompt_index: s.token_ids for s in engine.generate(m, prompts, Sampling(12))}
        for m in (model, dense)
    ]
    assert drawn_by[0] == drawn_by[1]


@torch.no_grad()
def test_a_model_on_meta_takes_its_layers_one_by_one():
    """Nothing dense of a packed layer is ever there."""
    whole = tiny_model("gpt", bias=True)
    model, seen = GPTModel.on_meta(whole.config), []

    def one_by_one():
        for name, codes in codes_by_name(whole, bits=4, group=16).items():
            assert model.get_submodule(name).weight.is_meta
            seen.append(name)
            yield name, codes

    pack_model(model, one_by_one(), dtype=torch.float32)
    assert len(seen) == 8
    model.allocate(torch.float32, "cpu")
    model.for_inference(torch.float32)
    rest = whole.state_dict()
    for name, p in model.named_parameters():
        p.copy_(rest[name])
    dense = with_weights_of(whole, codes_by_name(whole, bits=4, group=16))
    ids = torch.arange(20)[None]
    assert (model(ids)[0] - dense(ids)[0]).abs().max() < 1e-4


def test_sizes_count_packed_weights():
    model = tiny_model("llama", d_model=128, d_ff=192)  # that fill tiles
    before, overhead = weight_bytes(model), n_weights(model)
    layers = [m.weight.numel() for m in model.blocks.modules() if isinstance(m, Linear)]
    pack_model(model, codes_by_name(model, bits=8))
    assert n_weights(model) == overhead
    assert before - 4 * sum(layers) < weight_bytes(model) < before - 2 * sum(layers)
    assert batch_overhead(model, torch.device("cpu")) == 128


def test_what_cannot_be_packed_is_named():
    model = tiny_model("llama")
    codes = [codes_of(drawn(8, 32))]
    with pytest.raises(ValueError, match=r"blocks\.0\.ln1: Norm cannot"):
        pack_model(model, {"blocks.0.ln1": codes})
    with pytest.raises(AssertionError, match="fc2"):
        pack_model(model, {"blocks.0.mlp.fc2": codes})


def test_hooks_of_the_layer_stay():
    model, seen = tiny_model("llama"), []
    layer = model.blocks[0].mlp.fc1
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(len(seen)))
    pack_model(model, codes_by_name(model))
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert seen == [0]
    handle.remove()
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert seen == [0]

"""Rules of quantisation on CUDA: the memory that they leave, weights put back from the host, and
the numbers of the model that holds what the codes stand for.

python -m pytest -q tests/gpu/test_rules_gpu.py
"""

import pytest
import torch
from builders import tiny_model

from quantisation.apply import Weights, matrices, quantise_model
from quantisation.linear import weight_bytes
from quantisation.names import Quantisation
from quantisation.rules import rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
WIDE = dict(d_model=1024, d_ff=2048, n_heads=16, n_kv_heads=16, n_layers=24)


def on_cuda(**changes):
    return tiny_model("llama", std=0.02, **changes).cuda().for_inference(torch.bfloat16)


@torch.no_grad()
def test_memory_holds_codes_and_one_dense_layer():
    """From rule to rule too, and all comes back, bit for bit and onto the GPU."""
    start = torch.cuda.memory_allocated()
    model = on_cuda(**WIDE)
    before = {name: p.cpu() for name, p in model.named_parameters()}
    dense = torch.cuda.memory_allocated() - start
    weights = Weights(model, keep=True)
    for rule, share in (("rtn-w8", 0.55), ("rtn-w4-g128", 0.32), ("fp8", 0.55)):
        torch.cuda.reset_peak_memory_stats()
        weights.under(Quantisation(rule, skip=("blocks.0.*",)))
        held = torch.cuda.memory_allocated() - start
        assert held < share * dense + 2 * dense / 24, (rule, held / dense)
        assert abs(held - model.quantisation["memory_bytes"]) < 0.05 * dense
        assert all(p.is_cuda for p in model.parameters())
        if rule != "rtn-w8":  # the first follows the dense model
            peak = torch.cuda.max_memory_allocated() - start
            assert peak < 0.95 * dense, (rule, peak / dense)
    weights.under(Quantisation("bf16"))
    weights.under(None)
    assert abs(torch.cuda.memory_allocated() - start - dense) < 0.01 * dense
    for name, p in model.named_parameters():
        assert p.is_cuda and torch.equal(p.cpu(), before[name]), name
    del weights
    quantise_model(model, "rtn-w4-g128")
    assert torch.cuda.memory_allocated() - start < 0.32 * dense
    assert weight_bytes(model) == model.quantisation["memory_bytes"]


@pytest.mark.parametrize("rule", ["rtn-w8", "rtn-w4-g64-asym", "fp8", "rtn-w8a8"])
@torch.no_grad()
def test_long_inputs_have_the_bits_of_dequantised_weights(rule):
    """More rows than the kernels take meet the weights that codes stand for; few are near."""
    packed, dense = (on_cuda(d_model=256, d_ff=512, n_heads=4, n_kv_heads=4) for _ in range(2))
    quantise_model(packed, rule)
    for matrix in matrices(dense):
        rows = matrix.weight.split([n for _, n in matrix.parts])
        matrix.weight.copy_(torch.cat([rounded(part, rule) for part in rows]))
    ids = torch.randint(0, 257, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()
    if rule != "rtn-w8a8":  # whose activations the dense twin has not rounded
        assert torch.equal(packed.hidden(ids), dense.hidden(ids))
    few, wanted = (m.logits(m.hidden(ids[:1, :9])).float() for m in (packed, dense))
    assert (few - wanted).abs().max() < 0.1 * wanted.abs().max()


@torch.no_grad()
def test_float8_on_both_sides_is_near_its_definition():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper or later")
    sizes = dict(d_model=256, d_ff=512, n_heads=4, n_kv_heads=4)

    def in_float32():
        model = tiny_model("llama", std=0.02, **sizes).for_inference(torch.bfloat16)
        return model.for_inference(torch.float32)

    ours, exact, plain = on_cuda(**sizes), in_float32(), in_float32()
    for model in (ours, plain):
        quantise_model(model, "fp8-a8")
    ids = torch.arange(80)[None]
    found, wanted = ours.hidden(ids.cuda()).float().cpu(), plain.hidden(ids).float()
    unrounded = exact.hidden(ids).float()
    # what bfloat16 changes decides other roundings to 8 bits, no worse ones
    ours_off, plain_off = ((x - unrounded).norm() / unrounded.norm() for x in (found, wanted))
    assert (found - wanted).norm() < 0.06 * wanted.norm() and ours_off < 1.1 * plain_off

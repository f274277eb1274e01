"""gpu_kernels/elementwise.py against PyTorch's own operations, in float64 where rounding tells.

python -m pytest tests/gpu/test_elementwise_gpu.py
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_model

from gpu_kernels import elementwise
from gpu_kernels.elementwise import PLAIN, Terms
from modeling.rotary import rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def error(found, wanted) -> float:
    assert found.isfinite().all()
    distance, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return float(distance / size.clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 64, 768, 1600, 4096, 5000, 8192, 16384])
def test_norms(width, dtype):
    for rows, offset, weighted in itertools.product((1, 7, 333), (0.0, 1.0), (True, False)):
        x = torch.randn(rows, width, device="cuda") * 3 + 1
        w = torch.randn(width, device="cuda") if weighted else None
        b = torch.randn(width, device="cuda")
        scale = None if w is None else w.double() + offset
        rms = elementwise.norm(x, Terms(w, None, 1e-5, True, offset), dtype)
        assert error(rms, F.rms_norm(x.double(), (width,), scale, 1e-5).to(dtype)) < 1e-3
        layer = elementwise.norm(x, Terms(w, b, 1e-5, False, offset), dtype)
        wanted = F.layer_norm(x.double(), (width,), scale, b.double(), 1e-5)
        assert error(layer, wanted.to(dtype)) < 1e-3


@pytest.mark.parametrize("width", [1, 3, 768, 4096, 5000])
def test_a_branch_is_added_and_the_sum_normed_at_once(width):
    for rows, rms, half in itertools.product((1, 7, 333), (True, False), (True, False)):
        x = torch.randn(rows, width, device="cuda") * 3 + 1
        branch = torch.randn(rows, width, device="cuda")
        branch = branch.bfloat16() if half else branch
        w, b = torch.randn(width, device="cuda"), torch.randn(width, device="cuda")
        terms = Terms(w, None if rms else b, 1e-5, rms, 1.0)
        total, y = elementwise.add_and_norm(x, branch, terms, torch.bfloat16)
        assert torch.equal(total, x + branch), "the very sum"
        assert torch.equal(y, elementwise.norm(total, terms, torch.bfloat16))
        first = Terms(torch.randn_like(w), None if rms else -b, 1e-5, rms, 1.0)
        total, y = elementwise.add_and_norm(x, branch, terms, torch.bfloat16, first)
        apart = x + elementwise.norm(branch, first, torch.float32)
        assert error(total, apart) < 1e-6 and torch.equal(
            y, elementwise.norm(total, terms, torch.bfloat16)
        )
        alone, again = elementwise.add_and_norm(x, branch, None, torch.float32, first)
        assert torch.equal(alone, total) and again is alone


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_sums_across_blocks_have_the_bits_of_sums_made_at_once(kind):
    model = tiny_model(kind, n_layers=5).cuda().for_inference(torch.bfloat16)
    ids, positions = torch.randint(257, (3, 50), device="cuda"), torch.arange(50, device="cuda")
    x = model.embed(ids, positions)
    for block in model.blocks:
        x = block(x, model._ropes(positions, 50).get("global"))
    assert torch.equal(model.through_blocks(ids, positions, None).whole(), x)


@pytest.mark.parametrize("D, R", [(2, 2), (16, 16), (64, 64), (80, 32), (96, 72), (128, 128)])
def test_rotary_positions(D, R):
    for B, T, H, same in itertools.product((1, 3), (1, 5, 130), (1, 3, 12, 40), (True, False)):
        fused = torch.randn(B, T, H + 2, D, device="cuda", dtype=torch.bfloat16)
        angle = torch.randn(1 if same else B, T, 1, R // 2, device="cuda") * 9
        kept, own = fused.clone(), fused[:, :, :H]
        with torch.enable_grad():  # the plain twin
            wanted = rotate(kept[:, :, :H], angle.cos(), angle.sin())
        found = rotate(own, angle.cos(), angle.sin())
        assert found.data_ptr() == own.data_ptr() and error(found, wanted) < 1e-3
        assert torch.equal(fused[:, :, H:], kept[:, :, H:])
        assert torch.equal(found[..., R:], kept[:, :, :H, R:])


@pytest.mark.parametrize("D", [2, 16, 64, 128, 256])
def test_heads_are_normed_and_turned(D):
    for B, T, H, G in itertools.product((1, 3), (1, 5, 130), (1, 12, 40), (1, 8)):
        fused = torch.randn(B, T, H + 2 * G, D, device="cuda").bfloat16() * 3
        kept, (q, k, _) = fused.clone(), fused.split([H, G, G], dim=2)
        angle = torch.randn(B, T, 1, D // 2, device="cuda") * 9
        weights = torch.randn(2, D, device="cuda")
        elementwise.rotate_(q, angle.cos(), angle.sin(), k, (*weights, 1e-6, 1.0))
        for found, part, w in zip((q, k), kept.split([H, G, G], dim=2), weights):
            with torch.enable_grad():  # the plain twin
                normed = F.rms_norm(part.float(), (D,), w + 1, 1e-6).bfloat16()
                assert error(found, rotate(normed, angle.cos(), angle.sin())) < 2e-3
        assert torch.equal(fused[:, :, H + G :], kept[:, :, H + G :])


NORMED = {
    "qwen3": {},
    "gemma3": {"post_norm": True, "norm_offset": True},
    "olmo2": {"qk_norm_over": "width", "pre_norm": False, "post_norm": True},
}


@pytest.mark.parametrize("kind", NORMED)
def test_families_whose_heads_and_branches_are_normed(kind):
    """In 16 bits as near to float32 as plain operations are."""
    model = tiny_model("llama", n_layers=3, qk_norm=True, **NORMED[kind]).cuda()
    ids = torch.randint(257, (3, 50), device="cuda")
    exact = model.hidden(ids)
    half = model.for_inference(torch.bfloat16)
    with torch.enable_grad():
        plain = error(half.hidden(ids), exact)
    assert error(half.hidden(ids), exact) < 1.2 * plain + 1e-4


@pytest.mark.parametrize("name", elementwise.ACTIVATIONS)
def test_gates(name):
    for rows, width in ((1, 1), (5, 37), (100, 1024), (33, 11008), (7, 1025)):
        h = torch.randn(2, rows, 2 * width, device="cuda", dtype=torch.bfloat16) * 4
        gate, up = h.chunk(2, dim=-1)
        assert error(elementwise.gated(h, name), PLAIN[name](gate) * up) < 1e-3


def test_a_row_does_not_depend_on_its_neighbours():
    x = torch.randn(50, 4096, device="cuda")
    w = torch.randn(4096, device="cuda")
    terms = Terms(w, None, 1e-5, True)
    whole = elementwise.norm(x, terms, torch.bfloat16)
    for rows in (slice(0, 1), slice(3, 20), slice(49, 50)):
        alone = elementwise.norm(x[rows].contiguous(), terms, torch.bfloat16)
        assert torch.equal(alone, whole[rows])


def test_float32_gradients_and_the_cpu_stay_plain():
    x = torch.randn(2, 4, device="cuda")
    assert elementwise.applies(x, torch.bfloat16)
    assert not elementwise.applies(x, torch.float32)
    assert not elementwise.applies(x.cpu(), torch.bfloat16)
    with torch.enable_grad():
        assert not elementwise.applies(x, torch.bfloat16)

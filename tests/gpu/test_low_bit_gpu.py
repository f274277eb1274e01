"""Products with packed weights on CUDA: kernels against the plain twins over shapes, groups and
zeros; the same bits twice, alone and among others, inside a CUDA graph and compiled.

python -m pytest -q tests/gpu/test_low_bit_gpu.py    # minutes, of compiling: in parts side by side,
    -k "products and int4"    -k "products and not int4"    -k "not products"
"""

import pytest
import torch
import torch.nn.functional as F
from low_bit import codes_of

from gpu_kernels import low_bit_matmul as low_bit
from gpu_kernels.float8_matmul import float8_rows
from model import inductor_options
from quantisation.linear import PackedLinear, packed_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs Hopper or later",
)
BFLOAT16 = 2.0**-8  # half a step of bfloat16, and as much for sums in another order

SHAPES = [(130, 300), (513, 576)]  # few, since each is a compilation of its own
ODD = [(257, 100), (64, 33), (1, 2048)]
LARGE = [(12288, 4096), (4096, 11008)]
TERMS = {
    "int4 of 128": {"bits": 4, "group": 128},
    "int4 of 64": {"bits": 4, "group": 64, "dtype": torch.float16},
    "int4 of 32": {"bits": 4, "group": 32, "dtype": torch.bfloat16},
    "int4 of 256": {"bits": 4, "group": 256},
    "int4 of 96": {"bits": 4, "group": 96},
    "int4 of a row": {"bits": 4},
    "uint4 of 128, whole zeros": {"bits": 4, "group": 128, "zeros": "whole"},
    "uint4 of 32, whole zeros": {"bits": 4, "group": 32, "zeros": "whole"},
    "uint4 of 64, broken zeros": {"bits": 4, "group": 64, "zeros": "broken"},
    "uint4 of 128, act-order": {"bits": 4, "group": 128, "zeros": "whole", "shuffled": True},
    "int3 of 128": {"bits": 3, "group": 128},
    "uint4 of 32, minima": {"bits": 4, "group": 32, "zeros": "added", "dtype": torch.float16},
    "uint5 of 32, minima": {"bits": 5, "group": 32, "zeros": "added"},
    "int8 of a row": {"bits": 8},
    "int8 of 128": {"bits": 8, "group": 128},
    "uint8 of 32, whole zeros": {"bits": 8, "group": 32, "zeros": "whole"},
    "uint8 of a row, broken zeros": {"bits": 8, "zeros": "broken"},
    "int8 of 64, act-order": {"bits": 8, "group": 64, "shuffled": True},
    "e4m3 of a row": {"bits": 0},
    "e4m3 of 128": {"bits": 0, "group": 128},
    "int4 of 16": {"bits": 4, "group": 16},
    "uint4 of 16, minima": {"bits": 4, "group": 16, "zeros": "added"},
    "uint4 of 48, whole zeros": {"bits": 4, "group": 48, "zeros": "whole"},
    "int8 of 16": {"bits": 8, "group": 16},
    "int4 of 24, which the kernel leaves": {"bits": 4, "group": 24},
}
SOME = ["int4 of 128", "uint4 of 32, whole zeros", "int8 of a row", "e4m3 of 128"]
ROWS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200)


def drawn(*shape, seed=0, scale=1.0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda") * scale


def layer_of(N, K, name, bias=False):
    """(layer in bfloat16, its weight in float64)."""
    codes = codes_of(drawn(N, K, scale=K**-0.5), **TERMS[name])
    bias = torch.nn.Parameter(drawn(N, seed=1), requires_grad=False) if bias else None
    return PackedLinear([codes], torch.bfloat16, bias), codes.dequantise().double()


@pytest.mark.parametrize(
    "N, K, name",
    [(*shape, name) for shape in SHAPES for name in TERMS]
    + [(*shape, name) for shape in ODD for name in SOME],
)
@torch.no_grad()
def test_products_equal_those_of_the_weights(N, K, name):
    """Against float64, whatever the number of rows."""
    layer, weight = layer_of(N, K, name, bias=True)
    x = drawn(max(ROWS), K, seed=2).bfloat16()
    wanted = F.linear(x.double(), weight, layer.bias.bfloat16().double())
    for M in ROWS:
        error = (layer(x[:M]) - wanted[:M]).norm() / wanted[:M].norm()
        assert error < BFLOAT16, (M, error.item())


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("N, K", LARGE)
@torch.no_grad()
def test_products_of_a_7b(N, K, name):
    layer, weight = layer_of(N, K, name)
    x = drawn(64, K, seed=2).bfloat16()
    wanted = x.double() @ weight.t()
    for M in (1, 16, 64):
        error = (layer(x[:M]) - wanted[:M]).norm() / wanted[:M].norm()
        assert error < BFLOAT16, (M, error.item())


@pytest.mark.parametrize("name", TERMS)
@torch.no_grad()
def test_the_kernel_takes_what_it_is_for(name):
    weight = layer_of(130, 320, name)[0].weights[0]
    x = drawn(64, 320).bfloat16()
    assert low_bit.multiplies(x, weight.packed) == ("leaves" not in name)
    assert not low_bit.multiplies(x.float(), weight.packed)
    assert not low_bit.multiplies(drawn(65, 320).bfloat16(), weight.packed)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in TERMS]
    + [(name, dtype) for name in SOME for dtype in (torch.float32, torch.float16)],
)
@torch.no_grad()
def test_weights_are_the_same_bits_as_on_the_cpu(name, dtype):
    for N, K in SHAPES:
        codes = codes_of(drawn(N, K), **TERMS[name])
        packed = packed_of(codes)[0]
        assert torch.equal(
            low_bit.dequantise(packed, dtype), low_bit.dequantise_plain(packed, dtype)
        )
        layer = PackedLinear([codes], dtype)
        assert torch.equal(layer.weight, codes.dequantise(dtype))


@pytest.mark.parametrize("name", TERMS)
@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_others(name):
    """And in every call: programs that share a sum arrive in any order."""
    for N, K in ((513, 576), *([(4096, 4096)] if name in SOME else [])):
        layer, _ = layer_of(N, K, name)
        x = drawn(64, K, seed=3).bfloat16()
        whole = layer(x)
        for _ in range(20):
            assert torch.equal(layer(x), whole)
        if "leaves" in name:  # cuBLAS chooses a kernel by the number of rows
            continue
        for M in (1, 5, 16, 17, 40):
            assert torch.equal(layer(x[-M:]), whole[-M:]), M
        others = drawn(64, K, seed=4, scale=100.0).bfloat16()
        others[7] = x[7]
        assert torch.equal(layer(others)[7], whole[7])
        assert not any(weight.arrivals.any() for weight in layer.weights)


@torch.no_grad()
def test_rows_of_nan_and_infinity_stay_their_own():
    layer, _ = layer_of(513, 576, "int4 of 64")
    x = drawn(20, 576).bfloat16()
    wanted = layer(x)
    x[3], x[4, 0] = float("nan"), float("inf")
    found = layer(x)
    assert found[3].isnan().all() and not found[4].isfinite().any()
    rest = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(found[rest], wanted[rest])


def captured(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


@pytest.mark.parametrize("M", [1, 64, 100])
@pytest.mark.parametrize("name", ["int4 of 128", "int8 of a row", "uint4 of 128, act-order"])
@torch.no_grad()
def test_captured_in_a_graph(name, M):
    layer, _ = layer_of(4096, 4096, name, bias=True)
    x = drawn(M, 4096).bfloat16()
    graph, y = captured(lambda: layer(x))
    for seed in range(5):
        x.copy_(drawn(M, 4096, seed=seed))
        graph.replay()
        assert torch.equal(y, layer(x))


def compiled_as_scoring_is(function):
    """Left alone, the compiler fills up matrices where it finds that faster, for other bits."""
    torch.compiler.reset()  # few shapes of one function are compiled before it is given up
    options = inductor_options()
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@pytest.mark.parametrize("M", [1, 64, 100])
@pytest.mark.parametrize("name", ["int4 of 32", "int8 of a row", "uint4 of 64, broken zeros"])
@torch.no_grad()
def test_compiled_whole(name, M):
    layer, _ = layer_of(513, 576, name, bias=True)
    x = drawn(M, 576)
    run = compiled_as_scoring_is(lambda x: layer(x * 2) * 4)
    assert torch.equal(run(x), layer(x * 2) * 4) and torch.equal(run(x), run(x))


# ---------------------------------------------------------------------------------------------
# 8-bit floats on both sides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [33, 4096, 28672])
@torch.no_grad()
def test_rows_are_rounded_to_the_same_bits_as_on_the_cpu(K, dtype):
    x = (drawn(9, K) * torch.logspace(-30, 30, 9, device="cuda")[:, None]).to(dtype)
    x[3] = 0
    for found, wanted in zip(float8_rows(x), float8_rows(x.cpu()), strict=True):
        assert torch.equal(found.view(torch.uint8).cpu(), wanted.view(torch.uint8))
    x[1, 0], x[2, 5] = float("nan"), float("inf")
    codes, scales = float8_rows(x)
    values = codes.float() * scales
    assert values[1, 0].isnan() and values[2, 5].isnan() and values[4:].isfinite().all()


@float8
@pytest.mark.parametrize("M", [1, 16, 17, 300])
@pytest.mark.parametrize("N, K", [(4096, 4096), (130, 300), (64, 33)])
@torch.no_grad()
def test_float8_products_equal_those_of_what_both_sides_became(N, K, M):
    codes = codes_of(drawn(N, K, scale=K**-0.5), bits=0)
    bias = torch.nn.Parameter(drawn(N, seed=1), requires_grad=False)
    layer = PackedLinear([codes], torch.bfloat16, bias, activations="e4m3")
    x = (drawn(M, K, seed=2) * torch.logspace(-3, 3, M, device="cuda")[:, None]).bfloat16()
    rows, scales = float8_rows(x)
    wanted = F.linear(rows.double() * scales, codes.dequantise().double(), bias.double())
    error = (layer(x) - wanted).norm() / wanted.norm()
    assert error < 2 * BFLOAT16, error.item()
    assert torch.equal(layer(x), layer(x))
    run = compiled_as_scoring_is(layer)
    compiled = (run(x) - wanted).norm() / wanted.norm()
    assert compiled < 2 * BFLOAT16, compiled.item()
    graph, y = captured(lambda: layer(x))
    graph.replay()
    assert torch.equal(y, layer(x))

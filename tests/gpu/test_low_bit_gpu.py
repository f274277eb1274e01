"""Products with packed weights on CUDA: kernels against the plain twins over shapes, groups and
zeros; the same bits twice, alone and among others, inside a CUDA graph and compiled; whole models
against models that hold what the codes stand for, and in how much memory.

python -m pytest -q tests/gpu/test_low_bit_gpu.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_model
from low_bit import codes_by_name, codes_of

from backends import Sampling, engine
from backends.scoring import nll_function
from gpu_kernels import low_bit_matmul as low_bit
from gpu_kernels.float8_matmul import float8_rows
from model import GPTModel, inductor_options
from modeling.mlp import Linear
from quantisation.linear import PackedLinear, pack_model, packed_of

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


# ---------------------------------------------------------------------------------------------
# Models

WIDTHS = {"max_position_embeddings": 400, "n_layers": 3, "d_model": 256, "d_ff": 512}
RULES = {"int4": {"bits": 4, "group": 64}, "int8": {"bits": 8}, "uint4": {"bits": 4, "group": 32}}
RULES["uint4"]["zeros"] = "whole"


def pair(rule):
    """(a packed model, one that holds the same weights in bfloat16)."""
    model = tiny_model("llama", std=0.08, **WIDTHS).cuda()
    codes = codes_by_name(model, **RULES[rule])
    dense = copy.deepcopy(model)
    for name, (own,) in codes.items():
        dense.get_submodule(name).weight.data = own.dequantise()
    pack_model(model, codes, dtype=torch.bfloat16)
    return model.for_inference(torch.bfloat16), dense.for_inference(torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_scores_are_those_of_the_weights(rule, compiled):
    """Many rows: products with the same numbers, so the same bits. Few: within bfloat16."""
    model, dense = pair(rule)
    ids = torch.randint(0, 257, (3, 300), generator=torch.Generator().manual_seed(0)).cuda()
    targets = ids.roll(-1, dims=1)
    for n, bound in ((300, 0.0 if not compiled else 1e-2), (7, 6e-2)):
        found, wanted = (
            nll_function(m, compiled)(ids[:, :n].contiguous(), targets[:, :n].contiguous())
            for m in (model, dense)
        )
        assert (found - wanted).abs().mean() <= bound


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_generation_draws_what_scoring_finds_likeliest(rule, compiled):
    """Each greedy token is, by the dense model, within bfloat16 of the likeliest; the same tokens
    twice, and alone."""
    model, dense = pair(rule)
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 257, (n,), generator=g).tolist() for n in (40, 1, 17, 90)]

    def tokens(m, prompts, rows=4):
        samples = engine.generate(
            m, prompts, Sampling(30), batch_size=rows, compile=compiled, units=[range(len(prompts))]
        )
        return {s.prompt_index: s.token_ids for s in samples}

    found = tokens(model, prompts)
    assert found == tokens(model, prompts)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + found[i]], device="cuda")
        logits = dense.logits(dense.hidden(ids)[0, len(prompt) - 1 : -1]).float()
        drawn_logits = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (logits.amax(1) - drawn_logits).max() < 0.25, i


@pytest.mark.parametrize("bits, most", [(4, 0.32), (8, 0.57)])
@torch.no_grad()
def test_a_packed_model_is_small_while_it_is_built_and_while_it_runs(bits, most):
    """Its peak, as a share of the matrices in bfloat16, stays near that of the codes."""
    shape = {"n_layers": 12, "d_model": 2048, "d_ff": 5632, "n_heads": 16, "n_kv_heads": 16}
    config = tiny_model("llama").config.replace(**shape, head_dim=128)
    model = GPTModel.on_meta(config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and "blocks" in n}
    dense = 2 * sum(layer.weight.numel() for layer in layers.values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    group = 128 if bits == 4 else None

    def codes():
        for name, layer in layers.items():
            weight = torch.randn(layer.weight.shape, device="cuda") * 0.02
            yield name, [codes_of(weight, bits=bits, group=group, dtype=torch.bfloat16)]

    pack_model(model, codes(), dtype=torch.bfloat16)
    model.allocate(torch.bfloat16, "cuda")
    for p in model.parameters():
        p.normal_(std=0.02)
    model.for_inference(torch.bfloat16)
    kept = torch.cuda.memory_allocated() - before
    assert kept < most * dense, kept / dense
    torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros(1, 256, dtype=torch.int64, device="cuda")
    assert model.logits(model.hidden(ids)[:, -1]).isfinite().all()
    largest = 2 * 2 * 5632 * 2048  # one matrix in bfloat16
    running = torch.cuda.max_memory_allocated() - before - kept
    assert running < 1.5 * largest + 5e7, running

"""Grouped products of experts on CUDA: against the plain loop, with no wait for the host, the same
bits twice, inside a CUDA graph; and whole mixtures against the CPU, on one GPU and two.

python -m pytest -q tests/gpu/test_experts_gpu.py
"""

import copy

import pytest
import torch
from builders import saved_checkpoint, tiny_model
from on_gpus import commands, run, write_data

from backends import Sampling, engine
from backends.scoring import nll_function
from gpu_kernels import experts
from gpu_kernels.experts import FEW, by_all, by_groups, by_loop, through_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
grouped = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs Hopper or Blackwell",
)
SHAPES = {  # N, K, E, C, width
    "qwen3, prefill": (4096, 8, 128, 2048, 768),
    "qwen3, decode": (64, 8, 128, 2048, 768),
    "mixtral, prefill": (2048, 2, 8, 4096, 14336),
    "one token": (1, 8, 64, 2048, 1024),
    "odd counts": (333, 3, 7, 64, 24),
}


def drawn(name, dtype=torch.bfloat16, skewed=False):
    N, K, E, C, width = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(N, C, device="cuda").to(dtype)
    fc1 = (torch.randn(E, 2 * width, C, device="cuda") * C**-0.5).to(dtype)
    fc2 = (torch.randn(E, C, width, device="cuda") * width**-0.5).to(dtype)
    likely = torch.rand(N, E, device="cuda")
    if skewed:  # most tokens to a few, most experts to nobody
        likely[:, : K + 1] += 1
    return x, fc1, fc2, likely.topk(K).indices


def error(y, place, wanted, wanted_place):
    found, exact = y[place].float(), wanted[wanted_place].float()
    return ((found - exact).norm() / exact.norm()).item()


@grouped
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_groups_equal_the_loop(name, skewed):
    args = (*drawn(name, skewed=skewed), "silu", True)
    wanted = by_loop(*(t.float() for t in args[:3]), *args[3:])
    for align in (1, 8):
        found = by_groups(*args, align=align)
        assert error(*found, *wanted) < 6e-3, align
        again = by_groups(*args, align=align)
        assert torch.equal(found[0][found[1]], again[0][again[1]])
    assert error(*by_all(*args), *wanted) < 6e-3


@grouped
@pytest.mark.parametrize("name", ["qwen3, decode", "odd counts"])
@torch.no_grad()
def test_a_token_has_the_same_bits_whatever_its_neighbours_choose(name):
    x, fc1, fc2, chosen = drawn(name)
    y, place = by_groups(x, fc1, fc2, chosen, "silu", True)
    others = chosen.roll(1, dims=0)
    others[5] = chosen[5]
    y2, place2 = by_groups(x, fc1, fc2, others, "silu", True)
    assert torch.equal(y[place[5]], y2[place2[5]])


@grouped
@pytest.mark.parametrize("name", ["qwen3, prefill", "qwen3, decode"])
@torch.no_grad()
def test_the_host_waits_for_nothing(name):
    args = (*drawn(name), "silu", True)
    through_experts(*args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        through_experts(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_captured_in_a_graph(dtype):
    """In float32 too, where groups would wait for the host; other choices at every replay."""
    x, fc1, fc2, chosen = drawn("odd counts" if dtype == torch.float32 else "qwen3, decode", dtype)
    assert len(x) > FEW or experts.groups(x, fc2) or dtype == torch.bfloat16
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        through_experts(x, fc1, fc2, chosen, "silu", True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, place = through_experts(x, fc1, fc2, chosen, "silu", True)
    for shift in (0, 1, 5):
        chosen.copy_(chosen.roll(shift, dims=0))
        graph.replay()
        wanted = by_loop(x.float(), fc1.float(), fc2.float(), chosen, "silu", True)
        assert error(y, place, *wanted) < (6e-3 if dtype == torch.bfloat16 else 1e-5)


@grouped
def test_gradients_equal_those_of_the_loop():
    gradients = []
    for way in (by_loop, lambda *args: by_groups(*args, align=experts.ALIGNED)):
        x, fc1, fc2, chosen = drawn("odd counts")
        leaves = [t.requires_grad_() for t in (x, fc1, fc2)]
        y, place = way(*leaves, chosen, "silu", True)
        (y[place].float() * torch.arange(1.0, y[place].numel() + 1, device="cuda").sin().view(
            y[place].shape)).sum().backward()  # fmt: skip
        gradients.append([t.grad.float() for t in leaves])
    for one, other in zip(*gradients, strict=True):
        assert other.isfinite().all() and (one - other).norm() / one.norm() < 2e-2


# ---------------------------------------------------------------------------------------------
# Whole mixtures

WIDTHS = {"max_position_embeddings": 400, "n_layers": 3, "d_model": 256, "d_ff": 512}
MIXTURES = {
    "mixtral": {"n_experts": 8, "n_experts_per_token": 2, "router_norm": True},
    "qwen2_moe": {"n_experts": 16, "n_experts_per_token": 4, "d_ff_expert": 64}
    | {"d_ff_shared": 128, "shared_gate": True, "dense_layers": (1,)},
    "glm4_moe": {"n_experts": 16, "n_experts_per_token": 4, "d_ff_expert": 64, "d_ff_shared": 64}
    | {"router_score": "sigmoid", "router_choice_bias": True, "router_norm": True}
    | {"n_expert_groups": 4, "n_expert_groups_per_token": 2, "expert_group_score": "top2"},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_scores_equal_those_of_the_cpu(name, dtype, bound, compiled):
    exact = tiny_model("llama", std=0.05, **WIDTHS, **MIXTURES[name])
    model = copy.deepcopy(exact).cuda().for_inference(getattr(torch, dtype))
    ids = torch.randint(0, 257, (3, 300), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, dims=1)
    wanted = exact.nll(exact.hidden(ids).flatten(0, 1), targets.flatten()).view(3, 300)
    nll = nll_function(model, compiled)
    nats = [nll(ids.cuda(), targets.cuda()).cpu() for _ in range(2)]
    assert (nats[0] - wanted).abs().mean() < bound and torch.equal(*nats)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_through_a_graph_is_greedy(dtype, compiled):
    """float32: the tokens of a loop without a cache. bfloat16: the same tokens twice, and on fewer
    rows at a time, where neighbours are others."""
    model = tiny_model("llama", std=0.08, **WIDTHS, **MIXTURES["glm4_moe"]).cuda()
    model.for_inference(getattr(torch, dtype))
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 257, (n,), generator=g).tolist() for n in (40, 1, 17, 90)]
    options = {"n_samples": 1, "compile": compiled, "units": [range(4)]}

    def tokens():
        samples = engine.generate(model, prompts, Sampling(30), batch_size=4, **options)
        return {s.prompt_index: s.token_ids for s in samples}

    found = tokens()
    assert found == tokens() and all(len(ids) == 30 for ids in found.values())
    if dtype == "bfloat16":
        return
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(30):
                hidden = model.hidden(torch.tensor([ids], device="cuda"))
                ids.append(int(model.logits(hidden[0, -1]).argmax()))
        assert found[i] == ids[len(prompt) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_on_cuda(dtype):
    """Losses and the router's gradients as on the CPU; in bfloat16 by aligned groups."""
    steps = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", std=0.05, **WIDTHS, **MIXTURES["mixtral"], router_loss=0.5)
        model.train().to(device)
        ids = torch.randint(0, 257, (2, 200), generator=torch.Generator().manual_seed(2))
        amp = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        with amp:
            loss = model(ids.to(device), labels=ids.to(device))[1]
        loss.backward()
        router = model.blocks[0].mlp.router.weight.grad.cpu()
        steps.append((loss.item(), router, model.router_loads().detach().cpu()))
    (loss, router, loads), (loss2, router2, loads2) = steps
    exact = dtype == "float32"
    assert loss2 == pytest.approx(loss, rel=1e-4 if exact else 1e-2)
    assert (loads - loads2).abs().max() < (1e-3 if exact else 0.05)
    assert (router - router2).norm() / router.norm() < (1e-2 if exact else 0.3)


LONG = {"max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixtures")
    for name, changes in MIXTURES.items():
        saved_checkpoint(root / name, 1, "llama", std=0.05, **WIDTHS | changes | LONG)
    write_data(root)
    return root


COMMANDS = ("eval", "eval compiled", "mmlu", "humaneval", "humaneval compiled")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_one_and_two_gpus_give_the_same_bits(root, tmp_path, name, command):
    words = [*commands(root)[command], "--checkpoint-path", root / name, "--dtype", "bfloat16"]
    one, wanted = run(1, tmp_path / "one", words)
    two, found = run(2, tmp_path / "two", words)
    assert (one["cost"]["world_size"], two["cost"]["world_size"]) == (1, 2)
    assert found == wanted

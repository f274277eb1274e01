"""Each way through the experts against one token and one expert at a time in float64, and its
gradients. tests/gpu/test_experts_gpu.py has the grouped kernel itself."""

import functools

import pytest
import torch
import torch.nn.functional as F

from gpu_kernels.experts import FEW, by_all, by_expert, by_groups, by_loop, through_experts

WAYS = {
    "loop": by_loop,
    "all": by_all,
    "groups": by_groups,
    "aligned groups": functools.partial(by_groups, align=8),
}
ACTIVATIONS = {"silu": F.silu, "relu": F.relu}


def drawn(N, K, E=6, C=16, width=24, gated=True, seed=0):
    """x, fc1, fc2 and chosen, the last expert chosen by nobody."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g)
    fc1 = torch.randn(E, 2 * width if gated else width, C, generator=g)
    fc2 = torch.randn(E, C, width, generator=g)
    return x, fc1, fc2, torch.rand(N, max(E - 1, 1), generator=g).topk(K).indices


def plain(x, fc1, fc2, chosen, activation, gated):
    """[N, K, C], float64."""
    act, (x, fc1, fc2) = ACTIVATIONS[activation], (t.double() for t in (x, fc1, fc2))
    rows = []
    for row, experts in zip(x, chosen.tolist(), strict=True):
        for e in experts:
            h = fc1[e] @ row
            h = act(h[: len(h) // 2]) * h[len(h) // 2 :] if gated else act(h)
            rows.append(fc2[e] @ h)
    return torch.stack(rows).view(*chosen.shape, -1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("N", "K", "E", "gated", "activation"),
    [
        (1, 1, 1, True, "silu"),
        (7, 2, 6, True, "silu"),
        (40, 5, 6, False, "relu"),
        (3, 1, 6, 1, "silu"),
    ],
)
def test_every_token_goes_through_those_it_chose(way, N, K, E, gated, activation):
    *tensors, chosen = drawn(N, K, E, gated=bool(gated))
    y, place = WAYS[way](*tensors, chosen, activation, bool(gated))
    wanted = plain(*tensors, chosen, activation, bool(gated))
    assert (y[place] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("align", [1, 8])
def test_rows_by_expert(align):
    """Each expert's rows together, in the order of the tokens, and ends where they are said to."""
    chosen = drawn(50, 3)[-1]
    tokens, ends, place = by_expert(chosen, 6, align)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        own = (chosen == e).any(1).nonzero()[:, 0]
        assert torch.equal(tokens[begin : begin + len(own)], own) and len(own) <= end - begin
        assert begin % align == end % align == 0
        assert torch.equal(place[chosen == e].sort().values, begin + torch.arange(len(own)))
        begin = end
    assert end == len(tokens)


@pytest.mark.parametrize("way", ["groups", "aligned groups"])
def test_gradients_are_those_of_the_loop(way):
    gradients = []
    for run in (by_loop, WAYS[way]):
        x, fc1, fc2, chosen = drawn(30, 2)
        leaves = [t.requires_grad_() for t in (x, fc1, fc2)]
        y, place = run(*leaves, chosen, "silu", True)
        (y[place] * torch.arange(1.0, 61).view(30, 2, 1)).sum().backward()
        gradients.append([t.grad for t in leaves])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    assert not gradients[0][1][-1].any(), "nobody chose the last expert"


@torch.no_grad()
@pytest.mark.parametrize("N", [5, FEW + 1])
def test_compiled_whole(N):
    """No break in the graph, however the host takes part; shapes are known before anything runs."""
    args = (*drawn(N, 2), "silu", True)
    run = torch.compile(through_experts, fullgraph=True, backend="eager")
    wanted = through_experts(*args)
    for found, same in zip(run(*args), wanted, strict=True):
        assert torch.equal(found, same)
    torch.library.opcheck(
        torch.ops.roseval.through_experts.default, args, test_utils="test_faketensor"
    )


@torch.no_grad()
def test_few_tokens_have_bits_that_no_neighbour_changes():
    x, fc1, fc2, chosen = drawn(FEW, 2, C=96, width=80)
    y, place = through_experts(x, fc1, fc2, chosen, "silu", True)
    others = drawn(FEW, 2, C=96, width=80, seed=1)
    x2, chosen2 = others[0], others[-1]
    x2[7], chosen2[7] = x[7], chosen[7]
    y2, place2 = through_experts(x2, fc1, fc2, chosen2, "silu", True)
    assert torch.equal(y[place[7]], y2[place2[7]])

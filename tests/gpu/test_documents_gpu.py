"""Document masks on CUDA: flex attention against the dense mask, forward and gradients; a compiled
training step whose documents change from batch to batch without compiling anew; eval.py.

    python -m pytest -q tests/gpu/test_documents_gpu.py        # two minutes: it compiles
"""

import numpy as np
import pytest
import torch
from builders import tiny_model

import train
from backends.local import Local
from dataset import Source, TokenStream, Windows, build_tokenizer
from distributed import Dist
from formats.documents import Mark, starts_in_rows
from modeling.attention import DocumentMask, attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def starts_of(B, T, rate, seed=0):
    """Documents of 1 / rate tokens as a mean; in the first row one."""
    ids = (np.random.RandomState(seed).rand(B, T) < rate).astype(np.int64)
    ids[0] = 0
    return torch.from_numpy(starts_in_rows(ids, Mark(1, opens=True))).cuda()


EXACT, HALF = (torch.float32, 1e-4), (torch.bfloat16, 2e-2)


@pytest.mark.parametrize(  # each is compiled by itself, for ten seconds
    "T, rate, window, softcap, D, dtype, tolerance",
    [
        (512, 0.01, None, None, 64, *EXACT),
        (300, 0.05, 100, None, 64, *EXACT),
        (128, 0.5, 100, 3.0, 128, *EXACT),
        (300, 0.05, None, None, 64, *HALF),
        (1024, 0.001, 100, 3.0, 128, *HALF),
    ],
)
def test_by_blocks_equals_the_dense_mask(T, rate, window, softcap, D, dtype, tolerance):
    g = torch.Generator("cuda").manual_seed(T)
    q, k, v = (torch.randn(3, h, T, D, generator=g, device="cuda").to(dtype) for h in (8, 2, 2))
    upstream = torch.randn(3, 8, T, D, generator=g, device="cuda").to(dtype)
    mask = DocumentMask(starts_of(3, T, rate), window)
    assert mask.blocks is not None
    results = []
    for sides, form in (((q, k, v), mask), ((q.float(), k.float(), v.float()), mask.dense())):
        sides = [x.detach().clone().requires_grad_() for x in sides]
        out = attend(*sides, causal=True, window=window, softcap=softcap, mask=form)
        out.backward(upstream.to(out.dtype))
        results.append([out, *(x.grad for x in sides)])
    for got, wanted in zip(*results):
        scale = wanted.abs().max().clamp(min=1)
        torch.testing.assert_close(
            got.float() / scale, wanted / scale, atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("kind, changes", [("gpt", {}), ("windowed", {"sliding_window": 50})])
def test_compiled_steps_follow_the_documents(kind, changes):
    """Losses and gradients of three batches are the eager CPU's, and the graph is compiled once."""
    changes = {"d_model": 64, "n_heads": 2, "n_kv_heads": 2} | changes
    model = tiny_model(kind, std=0.1, **changes)
    reference = tiny_model(kind, std=0.1, **changes)
    model = model.cuda()
    loss_fn = train.wrap(train.Loss(model), "on", Dist(0, 1, 0, torch.device("cuda")))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames = []
    for seed in range(3):
        starts = starts_of(4, 256, 0.02, seed)
        ids = torch.randint(257, (4, 257), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        reference.zero_grad()
        x, y = ids[:, :-1], ids[:, 1:]
        got, _ = loss_fn(x.cuda(), y.cuda(), **model.within_documents(starts))
        got.backward()
        wanted, _ = train.Loss(reference)(x, y, **reference.within_documents(starts.cpu()))
        wanted.backward()
        assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
        for p, r in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), r.grad, atol=1e-4, rtol=1e-3)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] == frames[-1], "compiled anew for other documents"


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_scoring_within_documents_equals_the_cpus(compile, dtype, tolerance):
    dice = np.random.RandomState(0)
    ids = np.where(dice.rand(3000) < 0.02, 256, dice.randint(0, 256, 3000)).astype(np.uint16)
    stream, byte = TokenStream([Source("x", ids)]), build_tokenizer("byte")
    windows = Windows(len(stream), 256, mark=Mark(256, opens=False))
    shape = {"d_model": 64, "n_heads": 2, "n_kv_heads": 2}
    on_cpu = Local(tiny_model("llama", std=0.1, **shape), byte)
    wanted = on_cpu.score_windows(stream, windows, 4, per_token=True).token_nll
    model = tiny_model("llama", std=0.1, **shape).cuda().for_inference(dtype)
    got = Local(model, byte, compile=compile).score_windows(stream, windows, 4, per_token=True)
    np.testing.assert_allclose(got.token_nll, wanted, atol=tolerance * 10, rtol=tolerance)


def test_dropout_takes_the_dense_mask():
    """Flex attention has none; no query may see another document for that."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 64, generator=g, device="cuda") for _ in range(3))
    mask = DocumentMask(starts_of(2, 64, 0.1))
    torch.manual_seed(0)
    before = attend(q, k, v, causal=True, mask=mask, dropout=0.3)
    for changed in (k, v):
        changed[1, :, :1] += 100.0
    torch.manual_seed(0)
    after = attend(q, k, v, causal=True, mask=mask, dropout=0.3)
    other = mask.first_key[1] > 0
    assert torch.equal(before[1][:, other], after[1][:, other])
    assert not torch.equal(before[1], after[1])

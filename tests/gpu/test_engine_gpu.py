"""Generation on CUDA: the decode kernel against plain operations, the captured step (as it is and
compiled) against a loop without a cache, late looks and refills, random bits equal to the CPU's.

    python -m pytest -q tests/gpu/test_engine_gpu.py        # minutes: it compiles
"""

from collections import deque

import numpy as np
import pytest
import torch

from backends import engine
from backends.engine import generate
from config import GPTConfig
from gpu_kernels import decode_attention
from model import GPTModel
from tokenizer import build_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LLAMA = {
    "norm": "rmsnorm", "position": "rope", "gated_mlp": True, "activation": "silu", "bias": False,
    "n_kv_heads": 2, "tie_embeddings": False,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The kernel

# B rows, N prompts, G key heads, R query heads each, D, S own tokens, P prompt tokens, window
CASES = [
    (1, 1, 32, 1, 128, 256, 150, 0),
    (200, 8, 32, 1, 128, 130, 150, 0),
    (64, 64, 8, 4, 128, 300, 500, 0),
    (64, 6, 8, 4, 64, 300, 500, 0),
    (5, 3, 4, 7, 128, 700, 70, 0),
    (9, 2, 2, 3, 80, 100, 70, 37),
    (70, 2, 2, 1, 64, 60, 290, 55),
    (3, 1, 1, 24, 96, 65, 0, 0),
    (2, 2, 2, 2, 256, 1000, 33, 0),
]


@pytest.mark.parametrize(
    "dtype,tolerance", [("float32", 1e-5), ("bfloat16", 6e-3), ("float16", 1e-3)]
)
@pytest.mark.parametrize("B,N,G,R,D,S,P,window", CASES)
def test_kernel_equals_plain_operations(B, N, G, R, D, S, P, window, dtype, tolerance):
    dtype, H = getattr(torch, dtype), G * R
    generator = torch.Generator("cuda").manual_seed(B + S)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    qkv = normal(B, (H + 2 * G) * D)  # as the model has them: slices of one projection
    q, k_new, v_new = (x.unflatten(1, (-1, D)) for x in qkv.split([H * D, G * D, G * D], dim=1))
    k, v, prefix_k, prefix_v = (normal(n, G, s, D) for n, s in [(B, S)] * 2 + [(N, P)] * 2)
    g = np.random.default_rng(B)
    lengths = torch.tensor(g.integers(0, S, B), device="cuda")
    lengths[0], lengths[-1] = 0, S - 1
    prefix_lengths = torch.tensor(g.integers(0, P + 1, N), device="cuda")
    prefix_lengths[0], prefix_lengths[-1] = P // 3, P
    row_prefix = g.integers(0, N, B)
    tiles = decode_attention.plan_tiles(row_prefix, N, R, dtype).cuda()
    where = lengths, prefix_k, prefix_v, prefix_lengths, torch.tensor(row_prefix, device="cuda")
    exact = [x.double() for x in (q, k_new, v_new, k, v)]
    exact += [x.double() if x.is_floating_point() else x for x in where]
    wanted, _ = decode_attention._decode_torch(*exact, window, S)
    parts = decode_attention.decode_attention(q, k_new, v_new, k, v, *where, tiles, window, S)
    got = decode_attention.merge_parts(*parts)
    error = (got - wanted[0]).norm() / wanted.norm()
    assert error < tolerance, float(error)
    assert torch.equal(k.double(), exact[3]) and torch.equal(v.double(), exact[4]), "stored keys"
    own = decode_attention._splits(B, G, S)
    if B == 1:
        assert own > 1, "one row's keys are split over many programs"


# ---------------------------------------------------------------------------------------------
# The engine


def small_model(dtype=torch.float32, scale=4.0, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "max_position_embeddings": 400, "n_layers": 2, "n_heads": 4}
    model = GPTModel(GPTConfig(**(shape | {"d_model": 64, "d_ff": 96, "dropout": 0.0} | changes)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model.cuda().for_inference(dtype)


@torch.no_grad()
def plain_greedy(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        hidden = model.hidden(torch.tensor([ids], device="cuda"))
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


def prompts_of(*lengths):
    g = np.random.default_rng(1)
    return [g.integers(0, 257, n).tolist() for n in lengths]


def by_index(samples):
    return {(s.prompt_index, s.sample_index): s for s in samples}


SHAPES = {"gpt2": {}, "llama": LLAMA, "window": LLAMA | {"sliding_window": 30}}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_the_loop_without_a_cache(shape, compiled):
    model, prompts = small_model(**SHAPES[shape]), prompts_of(1, 70, 33, 64, 65, 7, 150)
    prompts = prompts[:4] if shape == "window" else prompts  # flex attention compiles each length
    lengths = [70, 30, 5, 64, 1, 90, 40][: len(prompts)]
    options = {"max_new_tokens": lengths, "batch_size": 3, "compile": compiled, "n_samples": 2}
    samples = by_index(generate(model, prompts, **options))
    assert len(samples) == 2 * len(prompts)
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], lengths[i]), i


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_samples_do_not_depend_on_neighbours_and_late_looks(compiled):
    """Rows refill while steps are in flight; the same samples with other rows around them."""
    model, prompts = small_model(**LLAMA), prompts_of(*range(5, 45))
    tok = build_tokenizer("byte")
    options = {"tokenizer": tok, "stop": ["e", "th"], "eos_ids": [7, 8, 9], "max_new_tokens": 80}
    options |= {"temperature": 1.0, "top_p": 0.95, "batch_size": 16, "compile": compiled}
    names = [str(i) for i in range(40)]
    whole = by_index(
        generate(model, prompts, n_samples=3, keys=names, units=[range(40)], **options)
    )
    assert {s.finish_reason for s in whole.values()} == {"eos", "stop", "length"}
    assert len(whole) == 120
    order = list(np.random.default_rng(0).permutation(40)[:20])
    part = generate(
        model, [prompts[i] for i in order], keys=[names[i] for i in order], n_samples=2, **options
    )
    for s in part:
        same = whole[order[s.prompt_index], s.sample_index]
        assert (s.token_ids, s.text, s.finish_reason) == (
            same.token_ids, same.text, same.finish_reason,
        )  # fmt: skip
    again = by_index(
        generate(model, prompts, n_samples=3, keys=names, units=[range(40)], **options)
    )
    assert again == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decoding_is_close_to_the_whole_sequence(dtype, monkeypatch):
    """Teacher-forced through the cache: logits as near to float32's as those of one pass are."""
    shape = LLAMA | {"d_model": 512, "d_ff": 1024, "n_heads": 8, "n_layers": 4}
    exact, model = small_model(scale=1.0, **shape), small_model(dtype, scale=1.0, **shape)
    prompt, n = prompts_of(100)[0], 60
    seen, plain = [], engine.sample_tokens

    def spy(logits, *rest):
        seen.append(logits.float())
        return plain(logits, *rest)

    monkeypatch.setattr(engine, "sample_tokens", spy)
    monkeypatch.setattr(engine.CachedRows, "_capture", lambda self: None)
    rows = engine.CachedRows(model, 2, len(prompt), n, 1, frozenset(), False)
    at, tokens = [None, None], []
    rows.admit(at, deque([engine.Sequence(0, 0, prompt, n, 0.0, 1.0, 0, (0, 0))]))
    for _ in range(n):
        tokens.append(rows.tokens(rows.step(at))[0])
    ids = torch.tensor([prompt + tokens[:-1]], device="cuda")
    with torch.no_grad():
        wanted = exact.logits(exact.hidden(ids)[0, len(prompt) - 1 :]).float()
        whole = model.logits(model.hidden(ids)[0, len(prompt) - 1 :]).float()
    stepwise = torch.stack([logits[0] for logits in seen])
    scale = wanted.std()
    ours, theirs = ((x - wanted).pow(2).mean().sqrt() / scale for x in (stepwise, whole))
    assert ours < 1.5 * theirs + 1e-4 and ours < 0.05, (float(ours), float(theirs))


def test_random_bits_and_samples_equal_the_cpus():
    keys = torch.tensor([engine.stream_key(5, "t", i) for i in range(64)], dtype=torch.int32)
    position = torch.arange(64, dtype=torch.int32)
    counter = position[:, None], torch.arange(1000, dtype=torch.int32)[None]
    here = engine.threefry((keys[:, :1], keys[:, 1:]), counter)
    there = engine.threefry(
        (keys[:, :1].cuda(), keys[:, 1:].cuda()), tuple(x.cuda() for x in counter)
    )
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    logits = torch.randn(64, 1999, generator=torch.Generator().manual_seed(0)) * 2
    vectors = keys, position, torch.full((64,), 0.8), torch.full((64,), 0.9), position % 7 * 10
    equal = 0
    compiled = torch.compile(engine.sample_tokens, fullgraph=True)
    for t in range(50):
        args = [logits.roll(t, 1), *vectors[:1], position + t, *vectors[2:]]
        args[-1] = args[-1].int()
        tokens = engine.sample_tokens(*args)
        moved = [x.cuda() for x in args]
        equal += (tokens == engine.sample_tokens(*moved).cpu()).sum()
        equal += (tokens == compiled(*moved).cpu()).sum()
    assert equal >= 6400 - 3  # logarithms may differ in the last bit, which rarely decides


def test_the_graph_serves_a_whole_job_without_waiting(monkeypatch):
    """One capture for prompts and samples of all lengths, and no synchronising call in a step."""
    model, prompts = small_model(**LLAMA), prompts_of(9, 60, 3, 31)
    captures, capture, step = [], engine.CachedRows._capture, engine.CachedRows.step

    def watched(self, rows):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.CachedRows, "step", watched)
    count = lambda self: (captures.append(1), capture(self))  # noqa: E731
    monkeypatch.setattr(engine.CachedRows, "_capture", count)
    options = {"n_samples": 5, "max_new_tokens": 20, "batch_size": 4}
    samples = by_index(generate(model, prompts, **options))
    assert captures == [1]
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], 20)

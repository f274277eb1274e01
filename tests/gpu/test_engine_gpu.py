"""Generation on CUDA: the decode kernel against plain operations, the captured step (as it is and
compiled) against a loop without a cache, late looks and refills, requests that come and go, random
bits equal to the CPU's; attention's forms on CUDA against the dense one.

    python -m pytest -q tests/gpu/test_engine_gpu.py        # minutes: it compiles
"""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import tiny_model

from backends import Sampling, rows, sampling
from backends.engine import Capacity, Engine, generate, shared_tokens
from gpu_kernels import decode_attention
from modeling.attention import attend
from tokenizer import build_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
@pytest.mark.parametrize("softcap,scale", [(None, None), (3.0, None), (None, 0.3), (2.0, 0.3)])
def test_kernel_equals_plain_operations(
    B, N, G, R, D, S, P, window, softcap, scale, dtype, tolerance
):
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
    own, prompts = (k, v, lengths), (prefix_k, prefix_v, prefix_lengths)
    row_prompt, terms = torch.tensor(row_prefix, device="cuda"), (window or None, softcap, scale)
    exact = [x.double() for x in (q, k_new, v_new)]
    exact_own, exact_prompts = (
        tuple(x.double() if x.is_floating_point() else x for x in part) for part in (own, prompts)
    )
    wanted = decode_attention._decode_torch(*exact, exact_own, exact_prompts, row_prompt, S, *terms)
    got = decode_attention.decode_attention(
        q, k_new, v_new, own, prompts, row_prompt, tiles, S,
        window=window or None, softcap=softcap, scale=scale,
    )  # fmt: skip
    error = (got - wanted).norm() / wanted.norm()
    assert error < tolerance, float(error)
    assert torch.equal(k.double(), exact_own[0]), "stored keys"
    assert torch.equal(v.double(), exact_own[1])
    own = decode_attention._splits(B, G, S)
    if B == 1:
        assert own > 1, "one row's keys are split over many programs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap, scale", [(None, None), (3.0, None), (3.0, 0.3)])
def test_attention_equals_the_dense_form(window, softcap, scale, dtype):
    """Block by block (window, soft cap), flash with log-sum-exp, and PyTorch's own choice."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, h, 150, 64, generator=g, device="cuda").to(dtype) for h in (8, 2, 2))
    i = torch.arange(150, device="cuda")
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or 999))
    exact = [x.float().cpu() for x in (q, k, v)]
    terms = {"softcap": softcap, "scale": scale}
    wanted, sums = attend(*exact, causal=False, mask=seen.cpu(), lse=True, **terms)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    got = attend(q, k, v, causal=True, window=window, **terms)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float().cpu(), wanted, atol=tolerance, rtol=tolerance)
    got, lse = attend(q, k, v, causal=True, window=window, lse=True, **terms)
    torch.testing.assert_close(got.float().cpu(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.cpu(), sums, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------
# The engine


def small_model(kind="llama", dtype=torch.float32, std=0.1, **changes):
    changes = {"max_position_embeddings": 400, "d_model": 64, "d_ff": 96} | changes
    return tiny_model(kind, std=std, **changes).cuda().for_inference(dtype)


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


SHAPES = {
    "gpt2": {"kind": "gpt", "n_heads": 4},
    "llama": {},
    "window": {"sliding_window": 30},
    "window, soft caps": {"sliding_window": 30, "full_attention_layers": (1,)}
    | {"attention_softcap": 2.0, "logit_softcap": 4.0, "attention_scale": 0.5, "head_dim": 80}
    | {"post_norm": True, "norm_offset": True, "local_rope_theta": 100.0, "embedding_scale": 8.0},
    "parallel": {"parallel_residual": True, "shared_norm": True, "norm": "layernorm"}
    | {"rotary_fraction": 0.5, "no_rope_layers": (1,), "head_bias": True, "qk_norm": True}
    | {"qk_norm_over": "width", "clip_qkv": 1.0, "logit_scale": 0.5, "residual_scale": 0.5},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_the_loop_without_a_cache(shape, compiled):
    model, prompts = small_model(**SHAPES[shape]), prompts_of(1, 70, 33, 64, 65, 7, 150)
    prompts = prompts[:4] if "window" in shape else prompts  # flex attention compiles each length
    lengths = [70, 30, 5, 64, 1, 90, 40][: len(prompts)]
    options = {"batch_size": 3, "compile": compiled, "n_samples": 2}
    samples = by_index(generate(model, prompts, [Sampling(n) for n in lengths], **options))
    assert len(samples) == 2 * len(prompts)
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], lengths[i]), i


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_samples_do_not_depend_on_neighbours_and_late_looks(compiled):
    """Rows refill while steps are in flight; the same samples with other rows around them."""
    model, prompts = small_model(), prompts_of(*range(5, 45))
    tok = build_tokenizer("byte")
    drawn = Sampling(80, temperature=1.0, top_p=0.95, stop=("e", "th"), seed=0)
    options = {"tokenizer": tok, "eos_ids": [7, 8, 9], "batch_size": 16, "compile": compiled}
    names = [str(i) for i in range(40)]
    everything = {"n_samples": 3, "keys": names, "units": [range(40)]} | options
    whole = by_index(generate(model, prompts, drawn, **everything))
    assert {s.finish_reason for s in whole.values()} == {"eos", "stop", "length"}
    assert len(whole) == 120
    order = list(np.random.default_rng(0).permutation(40)[:20])
    names = [names[i] for i in order]
    some = [prompts[i] for i in order]
    for s in generate(model, some, drawn, keys=names, n_samples=2, **options):
        same = whole[order[s.prompt_index], s.sample_index]
        assert (s.token_ids, s.text, s.finish_reason) == (
            same.token_ids, same.text, same.finish_reason,
        )  # fmt: skip
    assert by_index(generate(model, prompts, drawn, **everything)) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decoding_is_close_to_the_whole_sequence(dtype, monkeypatch):
    """Teacher-forced through the cache: logits as near to float32's as those of one pass are."""
    shape = {"d_model": 512, "d_ff": 1024, "n_heads": 8, "n_layers": 4, "std": 0.02}
    exact, model = small_model(**shape), small_model(dtype=dtype, **shape)
    prompt, n = prompts_of(100)[0], 60
    seen, plain = [], sampling.sample_tokens

    def spy(logits, *rest):
        seen.append(logits.float())
        return plain(logits, *rest)

    monkeypatch.setattr(rows, "sample_tokens", spy)
    monkeypatch.setattr(rows.CachedRows, "_capture", lambda self: None)
    batch = rows.CachedRows(model, Capacity(2, len(prompt), n), frozenset(), False, None)
    at, tokens = [None, None], []
    request = rows.Request("a", prompt, 1, shared=len(prompt) - 1)
    batch.admit(at, deque([rows.Sequence(request, 0, Sampling(n), n, (0, 0))]))
    for _ in range(n):
        tokens.append(batch.look(batch.step(at))["token"][0])
    ids = torch.tensor([prompt + tokens[:-1]], device="cuda")
    with torch.no_grad():
        wanted = exact.logits(exact.hidden(ids)[0, len(prompt) - 1 :]).float()
        whole = model.logits(model.hidden(ids)[0, len(prompt) - 1 :]).float()
    stepwise = torch.stack([logits[0] for logits in seen])
    scale = wanted.std()
    ours, theirs = ((x - wanted).pow(2).mean().sqrt() / scale for x in (stepwise, whole))
    assert ours < 1.5 * theirs + 1e-4 and ours < 0.05, (float(ours), float(theirs))


def test_random_bits_and_samples_equal_the_cpus():
    keys = torch.tensor([sampling.stream_key(5, "t", i) for i in range(64)], dtype=torch.int32)
    position = torch.arange(64, dtype=torch.int32)
    counter = position[:, None], torch.arange(1000, dtype=torch.int32)[None]
    here = sampling.threefry((keys[:, :1], keys[:, 1:]), counter)
    there = sampling.threefry(
        (keys[:, :1].cuda(), keys[:, 1:].cuda()), tuple(x.cuda() for x in counter)
    )
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    logits = torch.randn(64, 1999, generator=torch.Generator().manual_seed(0)) * 2
    columns = {"temperature": torch.full((64,), 0.8), "top_p": torch.full((64,), 0.9)}
    columns["top_k"] = (position % 7 * 10).int()
    on_gpu = {name: column.cuda() for name, column in columns.items()}
    equal = 0
    compiled = torch.compile(sampling.sample_tokens, fullgraph=True)
    for t in range(50):
        args = [logits.roll(t, 1), keys, position + t]
        tokens = sampling.sample_tokens(*args, columns)
        moved = [x.cuda() for x in args]
        equal += (tokens == sampling.sample_tokens(*moved, on_gpu).cpu()).sum()
        equal += (tokens == compiled(*moved, on_gpu).cpu()).sum()
    assert equal >= 6400 - 3  # logarithms may differ in the last bit, which rarely decides


def test_the_graph_serves_a_whole_job_without_waiting(monkeypatch):
    """One capture for prompts and samples of all lengths, and no synchronising call in a step."""
    model, prompts = small_model(), prompts_of(9, 60, 3, 31)
    captures, capture, step = [], rows.CachedRows._capture, rows.CachedRows.step

    def watched(self, at):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(rows.CachedRows, "step", watched)
    count = lambda self: (captures.append(1), capture(self))  # noqa: E731
    monkeypatch.setattr(rows.CachedRows, "_capture", count)
    options = {"n_samples": 5, "batch_size": 4}
    samples = by_index(generate(model, prompts, Sampling(20), **options))
    assert captures == [1]
    for (i, _), sample in samples.items():
        assert sample.token_ids == plain_greedy(model, prompts[i], 20)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_what_prompts_begin_with_is_kept_once(kind):
    """Rows that keep the end of their prompts themselves, refilled in graphs, against each prompt
    alone: greedy tokens in float32."""
    g = np.random.default_rng(5)
    model = tiny_model(kind, std=0.1, max_position_embeddings=256).to("cuda")
    model = model.for_inference(torch.float32)
    begins = [g.integers(0, 257, n).tolist() for n in (130, 97)]
    prompts = [begins[i % 2] + g.integers(0, 257, 1 + i % 70).tolist() for i in range(60)]
    assert set(shared_tokens(model, prompts, 1)) == {130, 97}
    limits = [Sampling(int(n)) for n in g.integers(1, 30, len(prompts))]
    samples = {s.prompt_index: s for s in generate(model, prompts, limits, batch_size=24)}
    assert len(samples) == len(prompts)
    for i in range(0, len(prompts), 7):
        (alone,) = generate(model, [prompts[i]], limits[i], batch_size=1)
        assert samples[i].token_ids == alone.token_ids, i


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_requests_come_and_go_with_logprobs(compiled):
    """As a server drives it: late looks, a cancelled request with steps in flight, and each token's
    log-probabilities, which are those of the whole sequence."""
    model, prompts = small_model(), prompts_of(9, 60, 3, 31, 17, 5)
    drawn = Sampling(30, temperature=0.9, top_k=20, seed=2)
    wanted = by_index(generate(model, prompts, drawn, eos_ids=[3, 4], batch_size=4))
    capacity, options = Capacity(4, 60, 40), {"compiled": compiled, "logprobs": 3}
    server, tokens, finished = Engine(model, capacity, eos_ids=[3, 4], **options), {}, {}
    server.submit("greedy", prompts[0], replace(drawn, temperature=0.0, max_new_tokens=12))
    server.submit("gone", prompts[1], Sampling(40))
    for i in range(200):
        if i % 3 == 0 and i // 3 < len(prompts):
            server.submit(i // 3, prompts[i // 3], drawn)
        if i == 5:
            server.cancel("gone")
        progress = server.step()
        assert i < 5 or all(token.request != "gone" for token in progress.tokens)
        for token in progress.tokens:
            tokens.setdefault(token.request, []).append(token)
        finished |= {sample.prompt_index: sample for sample in progress.finished}
        if i > 20 and not server.busy:
            break
    assert finished.keys() == {"greedy", *range(len(prompts))}
    same = sum(finished[i].token_ids == wanted[i, 0].token_ids for i in range(len(prompts)))
    assert same >= len(prompts) - compiled  # another batch, compiled: a rare tie may fall elsewhere
    prompts_by_name = dict(enumerate(prompts)) | {"greedy": prompts[0]}
    for name, sample in finished.items():
        prompt = prompts_by_name[name]
        assert [token.token_id for token in tokens[name]] == sample.token_ids
        ids = torch.tensor([prompt + sample.token_ids], device="cuda")
        with torch.no_grad():
            logits = model.logits(model.hidden(ids)[0, len(prompt) - 1 : -1])
        for token, expected in zip(tokens[name], logits.log_softmax(-1).tolist()):
            top, values = token.logprobs
            assert top[0] == token.token_id and len(top) == 4
            np.testing.assert_allclose(values, [expected[i] for i in top], atol=1e-3)
            likeliest = sorted(expected, reverse=True)[:3]
            np.testing.assert_allclose(values[1:], likeliest, atol=1e-3)

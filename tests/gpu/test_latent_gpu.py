"""Latent attention on CUDA: the decode kernel over latents against plain operations, attention
whose values have another width than its keys against the dense form, scores of one pass and after a
shared prefix as on the CPU, and generation from latents against a loop without a cache, which makes
keys and values of them.

    python -m pytest -q tests/gpu/test_latent_gpu.py        # minutes: it compiles
"""

import copy
from collections import deque

import numpy as np
import pytest
import torch
from builders import tiny_model

from backends import Sampling, rows, sampling
from backends.engine import Capacity, generate
from backends.kvcache import PrefixCache
from gpu_kernels import decode_attention
from modeling.attention import attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---------------------------------------------------------------------------------------------
# The kernels

# B rows, N prompts, H query heads, R channels of positions, L others, S own tokens, P prompt tokens
CASES = [
    (1, 1, 16, 64, 512, 256, 150),  # DeepSeek-V2-Lite
    (5, 2, 128, 64, 512, 300, 70),  # DeepSeek-V3
    (70, 3, 20, 64, 512, 90, 200),  # GLM-4.7-Flash
    (9, 9, 40, 32, 256, 100, 37),  # MiniCPM3
    (200, 4, 4, 16, 64, 130, 150),
    (3, 1, 5, 10, 36, 65, 0),
]


@pytest.mark.parametrize("dtype,bound", [("float32", 1e-5), ("bfloat16", 6e-3), ("float16", 1e-3)])
@pytest.mark.parametrize("B,N,H,R,L,S,P", CASES)
@pytest.mark.parametrize("terms", [{}, {"window": 40}, {"softcap": 3.0}])
def test_kernel_over_latents_equals_plain_operations(B, N, H, R, L, S, P, terms, dtype, bound):
    terms = {"window": None, "softcap": None, "scale": 0.7 * (R + L) ** -0.5} | terms
    dtype, generator = getattr(torch, dtype), torch.Generator("cuda").manual_seed(B + S)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    q, new = normal(B, H, R + L), normal(B, 1, R + L)
    k, prompt_k = normal(B, 1, S, R + L), normal(N, 1, P, R + L)
    g = np.random.default_rng(B)
    lengths = torch.tensor(g.integers(0, S, B), device="cuda")
    lengths[0], lengths[-1] = 0, S - 1
    prompt_lengths = torch.tensor(g.integers(0, P + 1, N), device="cuda")
    prompt_lengths[-1] = P
    row_prompt = g.integers(0, N, B)
    tiles = decode_attention.plan_tiles(row_prompt, N, H, dtype, L).cuda()
    where = torch.tensor(row_prompt, device="cuda")
    exact, exact_new, exact_k, exact_prompt = (x.double() for x in (q, new, k, prompt_k))
    wanted = decode_attention._decode_torch(
        exact, exact_new, exact_new[..., R:], (exact_k, None, lengths),
        (exact_prompt, None, prompt_lengths), where, S, *terms.values(),
    )  # fmt: skip
    got = decode_attention.decode_attention(
        q, new, new[..., R:], (k, None, lengths), (prompt_k, None, prompt_lengths), where, tiles, S,
        **terms,
    )  # fmt: skip
    assert got.shape == (B, H, L)
    error = (got - wanted).norm() / wanted.norm()
    assert error < bound, float(error)
    assert torch.equal(k.double(), exact_k), "stored latents"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("widths", [(192, 128), (24, 16), (16, 32)])
def test_attention_with_values_of_another_width_equals_the_dense_form(
    widths, window, softcap, dtype
):
    """Block by block (window, soft cap), flash with log-sum-exp, and PyTorch's own choice."""
    g, (D, E) = torch.Generator("cuda").manual_seed(0), widths
    q, k, v = (torch.randn(2, 4, 150, n, generator=g, device="cuda").to(dtype) for n in (D, D, E))
    i = torch.arange(150, device="cuda")
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or 999))
    exact = [x.float().cpu() for x in (q, k, v)]
    terms = {"softcap": softcap, "scale": None}
    wanted, sums = attend(*exact, causal=False, mask=seen.cpu(), lse=True, **terms)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    got = attend(q, k, v, causal=True, window=window, **terms)
    assert got.dtype == dtype and got.shape == v.shape
    torch.testing.assert_close(got.float().cpu(), wanted, atol=bound, rtol=bound)
    got, lse = attend(q, k, v, causal=True, window=window, lse=True, **terms)
    torch.testing.assert_close(got.float().cpu(), wanted, atol=bound, rtol=bound)
    torch.testing.assert_close(lse.cpu(), sums, atol=bound, rtol=bound)


# ---------------------------------------------------------------------------------------------
# Models

LATENT = {"max_position_embeddings": 400, "n_layers": 3, "d_model": 128, "d_ff": 192}
LATENT |= {"n_heads": 4, "n_kv_heads": 4, "head_dim": None, "kv_lora_rank": 64, "q_lora_rank": 48}
LATENT |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
WIDE = {"n_heads": 20, "n_kv_heads": 20, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
WIDE |= {"q_lora_rank": None, "v_head_dim": 96}
EXPERTS = {"n_experts": 8, "n_experts_per_token": 3, "d_ff_expert": 64, "d_ff_shared": 64}
EXPERTS |= {"dense_layers": (0,), "router_score": "sigmoid", "router_choice_bias": True}
EXPERTS |= {"router_norm": True, "n_expert_groups": 4, "n_expert_groups_per_token": 2}
SHAPES = {
    "latent": LATENT,
    "wide": LATENT | WIDE,
    "window": LATENT | {"sliding_window": 30, "full_attention_layers": (1,)},
    "experts": LATENT | EXPERTS | {"expert_group_score": "top2", "router_scale": 2.5},
}


def model_of(shape, dtype=torch.float32, std=0.1):
    return tiny_model("llama", std=std, **SHAPES[shape]).cuda().for_inference(dtype)


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


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_equal_those_of_the_cpu(shape, dtype, bound):
    """One pass of 150 tokens, and rows of 90 after a prefix of 60, in nats by target."""
    exact = tiny_model("llama", std=0.05, **SHAPES[shape])
    model = copy.deepcopy(exact).cuda().for_inference(getattr(torch, dtype))
    ids = torch.randint(0, 257, (3, 150), generator=torch.Generator().manual_seed(0))
    ids[1:, :60] = ids[0, :60]
    targets = ids.roll(-1, dims=1)
    wanted = exact.nll(exact.hidden(ids).flatten(0, 1), targets.flatten()).view(3, 150)

    def error(hidden, start):
        nats = model.nll(hidden.flatten(0, 1), targets[:, start:].cuda().flatten()).view(3, -1)
        return (nats.cpu() - wanted[:, start:]).abs().mean().item()

    assert error(model.hidden(ids.cuda()), 0) < bound
    prefix = PrefixCache(model, 60)
    model.hidden(ids[:1, :60].cuda(), cache=prefix.filling())
    assert error(model.hidden(ids[:, 60:].cuda(), cache=prefix), 60) < bound


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_from_latents_is_that_without_a_cache(shape, compiled):
    """The captured step, as it is and compiled, in float32: the same tokens."""
    model, prompts = model_of(shape), prompts_of(1, 70, 33, 64)
    lengths, options = [50, 30, 5, 64], {"batch_size": 3, "compile": compiled, "n_samples": 2}
    samples = list(generate(model, prompts, [Sampling(n) for n in lengths], **options))
    assert len(samples) == 2 * len(prompts)
    for s in samples:
        i = s.prompt_index
        assert s.token_ids == plain_greedy(model, prompts[i], lengths[i]), i


@pytest.mark.parametrize("shape", ["latent", "wide", "experts"])
def test_bfloat16_steps_over_latents_are_as_close_as_one_pass(shape, monkeypatch):
    """Teacher-forced: logits as near to float32's as those that keys and values of all heads
    give. Absorbed queries are rounded once more, to bfloat16."""
    exact, model = model_of(shape, std=0.03), model_of(shape, torch.bfloat16, std=0.03)
    prompt, n = prompts_of(100)[0], 60
    seen, plain = [], sampling.sample_tokens

    def spy(logits, *rest):
        seen.append(logits.float())
        return plain(logits, *rest)

    monkeypatch.setattr(rows, "sample_tokens", spy)
    monkeypatch.setattr(rows.CachedRows, "_capture", lambda self: None)
    batch = rows.CachedRows(model, Capacity(2, len(prompt), n), frozenset(), False, None)
    assert batch.cache.k[0].shape[-1] == model.config.cache_dim and batch.cache.v[0] is None
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
    assert ours < 2 * theirs + 1e-3 and ours < 0.1, (float(ours), float(theirs))


def test_bfloat16_generation_under_a_graph_repeats_itself():
    """The same samples with other rows around them, and again."""
    model, prompts = model_of("experts", torch.bfloat16), prompts_of(*range(5, 25))
    drawn = Sampling(40, temperature=1.0, top_p=0.95, seed=0)
    options = {"batch_size": 16, "n_samples": 2, "units": [range(20)]}
    runs = [list(generate(model, prompts, drawn, **options)) for _ in range(2)]
    first, second = ({(s.prompt_index, s.sample_index): s.token_ids for s in run} for run in runs)
    assert first == second and len(first) == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_through_latents(dtype):
    """Training on CUDA, where values are widened: gradients as on the CPU."""
    exact = tiny_model("llama", std=0.05, **LATENT).train()
    model = copy.deepcopy(exact).cuda()
    ids = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(0))
    exact(ids, labels=ids)[1].backward()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(ids.cuda(), labels=ids.cuda())[1]
    loss.backward()
    bound = 1e-3 if dtype == torch.float32 else 0.1
    for (name, p), q in zip(exact.named_parameters(), model.parameters(), strict=True):
        error = (q.grad.cpu() - p.grad).norm() / p.grad.norm()
        assert error < bound, (name, float(error))

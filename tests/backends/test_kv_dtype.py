"""Generation with keys and values in 8 bits: tokens and logits of a plain loop that rounds them by
a definition of its own, whole and without a cache; the same samples whoever the neighbours are; how
far it lies from a cache that rounds nothing; room and refusals. The codes: test_kv_codes.py."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import PlainModel, tiny_model
from eight_bits import RoundedAttention
from small_models import tiny
from test_engine import SHAPES, draw, ragged_prompts, small_model

import backends.engine as engine
from backends import CacheOptions, Sampling, rows
from backends.engine import Capacity, generate
from backends.kvcache import DecodeCache, PrefixCache, token_bytes
from backends.local import Local
from config import load_config
from gpu_kernels.kv_codes import Codes
from model import GPTModel

KINDS = ("int8", "fp8")
SHAPES = SHAPES | {
    "soft caps": {"kind": "llama", "attention_softcap": 2.0, "attention_scale": 0.5},
}


@torch.no_grad()
def plain_logits(model, ids, kv_dtype):
    """[T, V] of a whole sequence."""
    ids = torch.tensor([ids])
    cache = kv_dtype and RoundedAttention(kv_dtype, ids.shape[1])
    return model.logits(model.hidden(ids, cache=cache)[0])


def plain_greedy(model, prompt, n, kv_dtype):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(plain_logits(model, ids, kv_dtype)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_the_plain_loop_that_rounds(shape):
    model, prompts = small_model(std=0.5, **SHAPES[shape]), ragged_prompts(n=4)
    lengths = [14, 14, 9, 1, 14, 14]
    drawn = {
        kind: draw(model, prompts, max_new_tokens=lengths, batch_size=3, kv_dtype=kind)
        for kind in (None, *KINDS)
    }
    for kind in KINDS:
        for i, (prompt, n) in enumerate(zip(prompts, lengths)):
            assert drawn[kind][i, 0].token_ids == plain_greedy(model, prompt, n, kind), (kind, i)
    assert drawn["int8"] != drawn["fp8"] != drawn[None], "which is told from the others"


def stepwise_logits(model, prompt, n, kv_dtype, monkeypatch):
    """([n, V], tokens) of each step, as the rows see them."""
    seen, plain = [], rows.sample_tokens
    with monkeypatch.context() as m:
        m.setattr(rows, "sample_tokens", lambda x, *more: (seen.append(x[0]), plain(x, *more))[1])
        capacity = Capacity(2, len(prompt), n, kv_dtype=kv_dtype)
        batch = rows.CachedRows(model, capacity, frozenset(), False, None)
        at, tokens = [None, None], []
        request = rows.Request("a", prompt, 1, shared=len(prompt) - 1)
        batch.admit(at, deque([rows.Sequence(request, 0, Sampling(n), n, (0, 0))]))
        for _ in range(n):
            tokens.append(batch.look(batch.step(at))["token"][0])
            at[0].launched += 1
    return torch.stack(seen), tokens


def distance(a, b):
    """Of logits, beside how much they differ from token to token."""
    return float((a - b).pow(2).mean().sqrt() / b.std())


@pytest.mark.parametrize("kind, most", [("int8", 0.01), ("fp8", 0.06)])
def test_logits_of_each_step(kind, most, monkeypatch):
    """Those of the plain loop, and near to those of a cache that rounds nothing."""
    model = small_model(d_model=64, head_dim=32, max_position_embeddings=96)
    prompt = ragged_prompts(n=0, longest=50)[1]
    logits, tokens = stepwise_logits(model, prompt, 30, kind, monkeypatch)
    ids = prompt + tokens[:-1]
    wanted, exact = (plain_logits(model, ids, k)[len(prompt) - 1 :] for k in (kind, None))
    # a number at a tie may fall elsewhere where a product's last bit does
    assert distance(logits, wanted) < 0.1 * distance(logits, exact)
    assert most / 20 < distance(logits, exact) < most


def test_samples_do_not_depend_on_neighbours_nor_on_what_is_shared(monkeypatch):
    """Batches of any size, rows refilled; prompts that begin alike, their beginning once for all,
    or whole for each of them."""
    g = np.random.default_rng(3)
    begin = g.integers(0, 257, 150).tolist()
    prompts = [begin + g.integers(0, 257, n).tolist() for n in (2, 7, 4, 1, 9, 3)]
    model = small_model(std=0.5, max_position_embeddings=200)
    options = {"max_new_tokens": 12, "temperature": 1.0, "eos_ids": [9, 10]}
    options |= {"kv_dtype": "fp8"}
    whole = draw(model, prompts, batch_size=4, **options)
    assert set(engine.shared_tokens(model, prompts, 1)) == {150}, "kept once"
    assert draw(model, prompts, batch_size=1, **options) == whole
    assert draw(model, prompts, batch_size=16, **options) == whole
    monkeypatch.setattr(engine, "shared_tokens", lambda m, p, n: [len(x) - 1 for x in p])
    assert draw(model, prompts, batch_size=3, **options) == whole, "whole, for each"
    assert draw(model, prompts, batch_size=4, **options | {"kv_dtype": None}) != whole


def test_kept_codes_are_the_models_own(monkeypatch):
    """What lies in the cache after some steps: the keys and values of a pass over the whole text,
    but for numbers at a tie; and the slots beyond are untouched."""
    model, prompt = small_model(), [5, 80, 3, 200, 14, 7]
    caches, build = [], rows.DecodeCache
    monkeypatch.setattr(rows, "DecodeCache", lambda *a: caches.append(build(*a)) or caches[0])
    _, tokens = stepwise_logits(model, prompt, 5, "int8", monkeypatch)
    wanted = DecodeCache(model, 1, 10, 1, 1, kv_dtype="int8")
    with torch.no_grad():
        model.hidden(torch.tensor([prompt + tokens[:-1]]), cache=wanted.filling([0], [10]))
    (cache,) = caches
    for layer in model.layers:
        for prompts, own, all_ in (
            (cache.prompt_k, cache.k, wanted.prompt_k), (cache.prompt_v, cache.v, wanted.prompt_v),
        ):  # fmt: skip
            got = torch.cat((prompts[layer].codes[0, :, :5], own[layer].codes[0]), dim=1).int()
            assert got.shape == all_[layer].codes[0].shape
            off = (got - all_[layer].codes[0].int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    assert not own[0].codes[1, :, 1:].any(), "the idle row writes its first slot alone"


# ---------------------------------------------------------------------------------------------
# Room


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_token_are_those_of_the_cache(kind, dtype):
    model = tiny_model("llama", head_dim=12).for_inference(dtype)
    cache = DecodeCache(model, n_prompts=3, prompt_len=5, n_rows=2, max_len=7, kv_dtype=kind)
    held = 0
    for room in (cache.prompt_k, cache.prompt_v, cache.k, cache.v):
        for own in room.values():
            parts = (own.codes, own.scales) if isinstance(own, Codes) else (own,)
            assert isinstance(own, Codes) == bool(kind)
            held += sum(part.nbytes for part in parts)
    assert held == 2 * (3 * 5 + 2 * 7) * token_bytes(model.config, dtype, kind)


def test_about_twice_the_rows_fit(monkeypatch):
    """Of a 7B and of an 8B with grouped heads, on a card of 80 GB, 2,048 tokens and 256 new."""
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for preset, weights, rows_of in (("7b", 13.5e9, 40), ("llama3-8b", 16e9, 160)):
        model = SimpleNamespace(
            config=load_config(preset), device=SimpleNamespace(type="cuda"), supports_cache=True,
            dtype=torch.bfloat16, largest_share=(32, weights),
        )  # fmt: skip
        fit = {k: engine.default_batch_size(model, 2048, 256, kv_dtype=k) for k in (None, *KINDS)}
        assert fit["int8"] == fit["fp8"]
        assert abs(fit[None] - rows_of) <= 8 and fit["int8"] >= min(1.8 * fit[None], 256), fit


# ---------------------------------------------------------------------------------------------
# What it is not of


def test_scoring_rounds_nothing():
    """A prefix of scoring lies in the model's own numbers, whatever the cache of what is drawn."""
    model = small_model()
    local = Local(model, cache=CacheOptions("int8"))
    assert all(isinstance(k, torch.Tensor) for k in PrefixCache(local.model, 4).k.values())
    prompts = ragged_prompts(n=3)
    drawn = [s.token_ids for s in local.generate(prompts, Sampling(8), batch_size=2)]
    again = [
        s.token_ids for s in generate(model, prompts, Sampling(8), batch_size=2, kv_dtype="int8")
    ]
    assert drawn == again


def latent_model():
    return GPTModel(tiny("deepseek_v3")).eval().for_inference(torch.float32)


@pytest.mark.parametrize(
    "model, kind, said",
    [
        (PlainModel, "int8", "--kv-dtype int8: this architecture runs through transformers"),
        (latent_model, "fp8", "--kv-dtype fp8: latent attention keeps latents"),
        (lambda: small_model("gpt", head_dim=7), "int8", "--kv-dtype int8: heads of 7 channels"),
        (small_model, "int4", "--kv-dtype int4: there are fp8, int8"),
    ],
)
def test_what_cannot_be_is_refused(model, kind, said):
    model = model()
    with pytest.raises(ValueError, match=said):
        generate(model, [[1, 2]], Sampling(2), kv_dtype=kind)
    with pytest.raises(ValueError, match=said):
        engine.Engine(model, Capacity(2, 4, 4, kv_dtype=kind))

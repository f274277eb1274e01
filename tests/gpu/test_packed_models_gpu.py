"""Whole models of packed weights on CUDA, against models that hold what the codes stand for, and in
how much memory.

python -m pytest -q tests/gpu/test_packed_models_gpu.py
"""

import copy

import pytest
import torch
from builders import tiny_model
from low_bit import codes_by_name, codes_of

from backends import Sampling, engine
from backends.scoring import nll_function
from model import GPTModel
from modeling.mlp import Linear
from quantisation.linear import pack_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

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

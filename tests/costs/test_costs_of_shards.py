"""costs/shards.py and pipeline.py: cuts by brute force, shares beside real models' parameters."""

import itertools

import numpy as np
import pytest
import torch
from small_models import KINDS, tiny

from config import load_config
from costs.gpus import find_gpu
from costs.memory import estimate_memory, fewest_shards, usable_memory
from costs.pipeline import sharded_time
from costs.shards import _cut, cut, part, shares, weight_bytes
from costs.symbols import Setup
from model import GPTModel

ONE = Setup(training=False)


def test_the_fullest_share_is_the_least_possible():
    g = np.random.default_rng(0)
    for _ in range(200):
        L = int(g.integers(1, 9))
        n, sizes = int(g.integers(1, L + 1)), g.integers(1, 20, L).tolist()
        first, last = g.integers(0, 30, 2).tolist()

        def fullest(runs, sizes=sizes, first=first, last=last):
            held = [sum(sizes[i] for i in run) for run in runs]
            held[0] += first
            held[-1] += last
            return max(held)

        best = min(
            fullest([range(a, b) for a, b in itertools.pairwise((0, *cuts, L))])
            for cuts in itertools.combinations(range(1, L), n - 1)
        )
        runs = _cut(sizes, n, first, last)
        assert [i for run in runs for i in run] == list(range(L)) and all(runs)
        assert len(runs) == n and fullest(runs) == best, (sizes, n, first, last, runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_are_the_bytes_of_parameters(kind, dtype):
    """Of a whole model's parameters, by the layer in their names."""
    config = tiny(kind, n_layers=5)
    model = GPTModel.on_meta(config)
    dtypes = model.inference_dtypes(dtype)
    for n in (1, 2, 3, 5):
        setup = Setup(dtype=str(dtype).removeprefix("torch."), training=False, shard=n)
        runs, wanted = cut(config, n, setup), [0] * n
        for name, p in model.named_parameters():
            # the formulas do not know that what a router chooses by is never rounded
            size = p.numel() * (dtype if "choice_bias" in name else dtypes[name]).itemsize
            if name.startswith("blocks."):
                layer = int(name.split(".")[1])
                wanted[next(k for k, run in enumerate(runs) if layer in run)] += size
            else:
                at_the_end = name.startswith(("ln_f.", "lm_head."))
                wanted[n - 1 if at_the_end else 0] += size
            if name == "token_embedding.weight" and config.tie_embeddings and n > 1:
                wanted[n - 1] += size
        assert [weight_bytes(*share) for share in shares(config, setup)] == wanted


def test_a_part_keeps_the_kinds_of_its_layers():
    config = tiny("deepseek_v3", n_layers=5, dense_layers=(0, 3))
    assert part(config, range(2, 5)).dense_layers == (1,)
    gemma = tiny("gemma3_text", n_layers=5, full_attention_layers=(1, 4))
    own = part(gemma, range(1, 4))
    assert [own.layer_window(i) for i in range(3)] == [gemma.layer_window(i) for i in (1, 2, 3)]


def test_more_gpus_than_layers():
    with pytest.raises(ValueError, match=r"--shard 13 is more than the model's 12 layers"):
        cut(load_config("gpt2"), 13)
    assert [len(run) for run in cut(load_config("gpt2"), 12)] == [1] * 12


def test_memory_is_that_of_the_fullest():
    config = load_config("llama3-70b")
    setup = Setup(training=False, shard=4)
    memory = estimate_memory(config, 1, 4096, training=False, dtype="bf16", shard=4)
    held = max(weight_bytes(*share) for share in shares(config, setup))
    assert memory["parts"]["weights"] == int(held)
    whole = estimate_memory(config, 1, 4096, training=False, dtype="bf16")
    assert whole["parts"]["kv cache"] == 80 / 21 * memory["parts"]["kv cache"]


def test_fewest_shards():
    h100, among = find_gpu("h100"), (1, 2, 4, 8)
    for name, wanted in (("7b", 1), ("llama3-70b", 2), ("mixtral-8x7b", 2), ("deepseek-v3", None)):
        config = load_config(name)
        assert fewest_shards(config, h100, 1, 4096, ONE, among) == wanted, name
        if wanted:
            run = dict(training=False, dtype="bf16", shard=wanted)
            assert estimate_memory(config, 1, 4096, **run)["peak_bytes"] <= usable_memory(h100)


def test_time_of_a_pipe():
    """Twice as fast on two, but for the filling of the pipe and an uneven cut."""
    config, gpu = load_config("llama3-70b"), find_gpu("h100")
    one, two = (sharded_time(config, gpu, 2, 4096, Setup(training=False, shard=n)) for n in (1, 2))
    assert two["fill"] == 1 / 65 and one["fill"] == 0 and two["layers"] == [40, 40]
    assert sum(two["scoring_seconds"]) == pytest.approx(one["scoring_seconds"][0], rel=0.01)
    rates = [t["scoring_tokens_per_second"] for t in (one, two)]
    assert rates[1] / rates[0] == pytest.approx(2 * 64 / 65, rel=0.03)
    assert two["decode_seconds"] == pytest.approx(one["decode_seconds"], rel=0.02)
    assert two["decode_tokens_per_second"] == pytest.approx(
        2 * one["decode_tokens_per_second"], rel=0.05
    )


@pytest.mark.parametrize("run", [dict(training=True), dict(training=False, tp=2)])
def test_what_does_not_go_with_shards(run):
    with pytest.raises(ValueError, match="shard 2 is of inference"):
        Setup(shard=2, **run)

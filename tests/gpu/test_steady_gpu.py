"""Served rows on CUDA: the bits of an answer whoever runs beside it, in bfloat16.

python -m pytest -q tests/gpu/test_steady_gpu.py
"""

import numpy as np
import pytest
import torch
from builders import tiny_model

from backends import Sampling
from backends.engine import Capacity, Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_an_answer_is_the_same_alone_and_among_others():
    shape = {"d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1024, "n_layers": 4}
    model = (
        tiny_model("llama", std=0.1, max_position_embeddings=2048, **shape)
        .cuda()
        .for_inference(torch.bfloat16)
    )
    g = np.random.default_rng(0)
    begins = [g.integers(0, 257, size).tolist() for size in (0, 300, 530)]
    asked = []
    for i in range(40):
        prompt = begins[i % 3] + g.integers(0, 257, int(g.integers(1, 400))).tolist()
        asked.append((prompt, Sampling(24, temperature=(0.0, 0.9)[i % 2], top_p=0.9, seed=i)))

    def answers(engine, which):
        found, which = {}, list(which)
        while which or engine.busy:
            if which:
                i = which.pop(0)
                engine.submit(i, *asked[i], key=i, told=i % 4 == 0)
            for token in engine.step().tokens:
                found.setdefault(token.request, []).append((token.token_id, token.logprobs[1][0]))
        return found

    def server():
        return Engine(model, Capacity(16, 1000, 24, prompt_room=960, steady=True), logprobs=4)

    alone = {}
    for i in range(0, 40, 5):
        alone |= answers(server(), [i])
    engine = server()
    for order in (range(40), reversed(range(40))):
        together = answers(engine, order)
        assert len(together) == 40
        assert {i: together[i] for i in alone} == alone

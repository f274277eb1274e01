"""Scores of prompts that begin alike, beside each alone and beside the model run on the whole; and
what is run for them."""

import numpy as np
import pytest
import torch
from builders import tiny_model

from distributed import Dist
from serving import scores

ALONE = Dist(0, 1, 0, torch.device("cpu"))


def model_of(**changes):
    changes = {"max_position_embeddings": 512} | changes
    return tiny_model("llama", std=0.1, **changes).for_inference(torch.float32)


def questions(n=3, choices=4, examples=300, seed=0):
    """Choices after questions after examples, as clients of a task ask them, and two others."""
    g = np.random.default_rng(seed)

    def tokens(size):
        return g.integers(0, 257, size).tolist()

    begin, asked = tokens(examples), []
    for _ in range(n):
        question = begin + tokens(int(g.integers(20, 60)))
        asked += [question + tokens(int(g.integers(1, 4))) for _ in range(choices)]
    return [*asked, tokens(7), tokens(1)]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 50}], ids=["plain", "window"])
def test_prompts_that_begin_alike_are_scored_as_alone(changes):
    model, prompts, k = model_of(**changes), questions(), 3
    found = scores.score_prompts(model, prompts, k, 4096, ALONE)
    for prompt, one in zip(prompts, found, strict=True):
        assert len(one.ids) == len(one.logprobs) == len(prompt)
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([prompt])))[0].log_softmax(-1)
        follows = [*prompt[1:], int(logits[-1].argmax())]
        assert [ids[0] for ids in one.ids] == follows
        wanted = torch.cat((logits[range(len(prompt)), follows][:, None], logits.topk(k)[0]), 1)
        np.testing.assert_allclose(np.array(one.logprobs), wanted.numpy(), atol=2e-5)
        for ids, values, row in zip(one.ids, one.logprobs, logits):
            np.testing.assert_allclose(values, row[ids].numpy(), atol=2e-5)


def test_what_is_shared_runs_twice_and_what_is_not_once():
    prompts = questions(n=10)
    rows, parts = scores.shared_rows(prompts)
    assert 300 < rows.unique_tokens() - 2 * 300 < sum(map(len, prompts)) - 39 * 300
    assert sum(map(len, parts)) == 2 * 40 + 2
    few, parts = scores.shared_rows([*prompts[:2], [1], [2, 3]])
    assert parts == [[0], [1], [2], [3]] and len(few.prefixes) == 1
    assert scores.shared_rows(prompts, share=False)[0].unique_tokens() == sum(map(len, prompts))

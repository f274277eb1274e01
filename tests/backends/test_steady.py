"""An answer's bits whoever runs beside it, beginnings that are computed once, and slots."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import tiny_model

from backends import Sampling, steady
from backends.engine import Capacity, Engine, generate

SHAPES = {
    "gpt2": {"kind": "gpt"},
    "llama-gqa": {"kind": "llama"},
    "window-some-layers": {"kind": "llama", "sliding_window": 9, "full_attention_layers": (0,)},
}
LONGEST, NEW = 40, 12


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(steady, "PIECE", 8)


def model_of(kind="llama", **changes):
    changes = {"max_position_embeddings": 64} | changes
    return tiny_model(kind, std=0.1, **changes).for_inference(torch.float32)


def asked_of(n=8, seed=0):
    """(prompt, sampling, samples, told) of so many, a good half of which begin like others."""
    g = np.random.default_rng(seed)
    begins = [g.integers(0, 257, size).tolist() for size in (0, 17, 24)]
    found = []
    for i in range(n):
        prompt = begins[i % 3] + g.integers(0, 257, int(g.integers(1, 15))).tolist()
        new = min(int(g.integers(2, NEW)), LONGEST + 1 - len(prompt))
        sampling = Sampling(new, temperature=(0.0, 0.9)[i % 2], top_p=0.9, seed=i)
        found.append((prompt, sampling, range(1 + i % 2), i % 4 == 0))
    return found


def server_of(model, rows=4, room=LONGEST - NEW, logprobs=3, kv_dtype=None):
    capacity = Capacity(rows, LONGEST, NEW, prompt_room=room, steady=True, kv_dtype=kv_dtype)
    return Engine(model, capacity, logprobs=logprobs)


def answers(engine, asked, g=None):
    """{(request, sample): (tokens, their log-probabilities)}; they come one after the other, with
    some steps between them, and one of them leaves."""
    found = {}

    def step():
        for token in engine.step().tokens:
            values = token.logprobs[1][0]
            found.setdefault((token.request, token.sample_index), []).append(
                (token.token_id, values)
            )

    for i, (prompt, sampling, samples, told) in asked:
        engine.submit(i, prompt, sampling, samples, key=str(prompt), told=told)
        for _ in range(int(g.integers(0, 4)) if g else 0):
            step()
    while engine.busy:
        step()
    return found


@pytest.mark.parametrize(
    "shape,room,kv_dtype",
    [
        ("gpt2", LONGEST - NEW, None),
        ("window-some-layers", LONGEST - NEW, "fp8"),
        ("llama-gqa", 20, None),
    ],
)
def test_an_answer_is_the_same_alone_and_among_others(shape, room, kv_dtype):
    """To the last bit: among others in any order, with beginnings that were computed for it, for
    others before, or that lie there of itself; and it is what `generate` gives."""
    model, asked = model_of(**SHAPES[shape]), []
    for i, (prompt, sampling, *rest) in enumerate(asked_of()):
        own = max(0, len(prompt) - 1 - room)  # what of it lies in its row takes room of new tokens
        if own < NEW:
            new = min(sampling.max_new_tokens, NEW - own)
            asked.append((i, (prompt, replace(sampling, max_new_tokens=new), *rest)))
    assert room > 20 or any(len(one[0]) > 1 + room for _, one in asked)
    alone = {}
    for one in asked:
        alone |= answers(server_of(model, room=room, kv_dtype=kv_dtype), [one])
    for order in (1, -1):
        engine = server_of(model, room=room, kv_dtype=kv_dtype)
        together = answers(engine, asked[::order], np.random.default_rng(5))
        assert together == alone
        again = answers(engine, asked, np.random.default_rng(6))  # with what lies there already
        assert again == alone
    for i, (prompt, sampling, samples, _) in asked if kv_dtype is None else ():
        wanted = generate(model, [prompt], sampling, n_samples=len(samples), keys=[str(prompt)])
        for sample in wanted:
            got = [token for token, _ in alone[i, sample.sample_index]]
            assert got == sample.token_ids, i


def test_a_beginning_is_computed_once(monkeypatch):
    """For prompts that wait together, for those that come while it runs, and when it is over."""
    model, g = model_of(), np.random.default_rng(1)
    begin = g.integers(0, 257, 24).tolist()
    prompts = [[*begin, *g.integers(0, 257, 3).tolist()] for _ in range(6)]
    read, hidden = [], model.hidden

    def spy(ids, **terms):
        read.append(ids.shape[1] if isinstance(terms["cache"], steady.Piece) else 0)
        return hidden(ids, **terms)

    monkeypatch.setattr(model, "hidden", spy)
    engine = server_of(model, rows=3)
    for i in range(4):
        engine.submit(i, prompts[i], Sampling(4))
    while engine.busy:
        engine.step()
    assert sum(read) == 24 + 4 * 2  # the last token is the first step's input
    for i in (4, 5):
        engine.submit(i, prompts[i], Sampling(4))
        while engine.busy:
            engine.step()
    assert sum(read) == 24 + 6 * 2
    engine.submit(6, prompts[5], Sampling(4))  # all of it lies there
    while engine.busy:
        engine.step()
    assert sum(read) == 24 + 6 * 2


def test_slots_without_use_for_longest_are_given_away():
    kept = steady.Kept(3)
    assert [kept.take(()) for _ in range(3)] == [0, 1, 2]
    for slot, key in ((0, b"a"), (0, b"ab"), (1, b"a"), (2, b"c")):
        kept.add(slot, key)
    assert kept.find(b"a") == 1 and kept.find(b"ab") == 0 and kept.find(b"what") is None
    assert kept.take({2}) == 1 and kept.find(b"a") == 0  # 2 is used, 0 was of use later
    assert kept.take({0, 1}) == 2 and kept.find(b"c") is None
    assert kept.take({0, 1, 2}) is None
    assert kept.take({1, 2}) == 0 and not kept.slots


def test_likeliest_tokens_are_told_to_those_who_read_them():
    """And whoever else runs, a token's own value is there."""
    engine = server_of(model_of(), logprobs=5)
    for told in (False, True):
        engine.submit("a", [1, 2, 3], Sampling(4), told=told)
        widths = set()
        while engine.busy:
            widths |= {len(token.logprobs[1]) for token in engine.step().tokens}
        assert widths == {6 if told else 1}

"""rows.py: rows refill, idle ones stay where they may, a host that looks late sees the same. The
tokens themselves: test_engine.py; the captured step: tests/gpu/test_engine_gpu.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_engine import draw, plain_greedy, ragged_prompts, run, says, small_model

from backends import Sampling, engine, rows
from backends.engine import Capacity, Engine, generate
from config import load_config
from tokenizer import build_tokenizer


def test_freed_rows_are_refilled():
    """Nine sequences of 1..9 tokens in three rows: no more steps than a full batch needs."""
    tok = build_tokenizer("byte")
    model, prompts = says(tok, *("x" * n + "." for n in [9, 1, 5, 2, 7, 3, 8, 4, 6]))
    units = [range(9)]
    sampling, options = Sampling(20, stop=(".",)), {"tokenizer": tok, "batch_size": 3}
    order = [s.prompt_index for s in generate(model, prompts, sampling, units=units, **options)]
    assert sorted(order) == list(range(9)) and order[0] == 1, "samples come as they finish"
    assert model.calls == 20  # 10 | 2 3 8 .. : what three rows filled in this order take


def test_rows_refill_with_the_cache_as_well(monkeypatch):
    model, prompts = small_model(), ragged_prompts(n=10)
    steps, step = [], rows._decode_step
    monkeypatch.setattr(rows, "_decode_step", lambda *a: (steps.append(1), step(*a)))
    lengths = [10, 1, 6, 2, 8, 3, 9, 4, 7, 5, 1, 2]
    units = [range(12)]
    samples = draw(model, prompts, max_new_tokens=lengths, batch_size=3, units=units)
    assert [len(samples[i, 0].token_ids) for i in range(12)] == lengths
    # rows taken in order: 10+3+7 | 1+2+8+4+... no row idles before the queue is empty
    assert len(steps) <= -(-sum(lengths) // 3) + max(lengths) // 2


def test_idle_rows_stay_inside_the_context():
    """A row left over from long sequences, now behind a prompt that fills the context, must not
    run on: its position would be beyond the table."""
    model, prompts = small_model(), [[5], ragged_prompts(n=0, longest=48)[1]]
    options = {"n_samples": 2, "max_new_tokens": 46, "batch_size": 2, "units": [[0], [1]]}
    samples = draw(model, prompts, done={(1, 1)}, **options)
    assert samples[1, 0].token_ids == plain_greedy(model, prompts[1], 1)
    assert samples.keys() == {(0, 0), (0, 1), (1, 0)}


def test_a_host_that_looks_late_changes_nothing(monkeypatch):
    """On CUDA tokens are looked at some steps after they were sampled; the overshoot is dropped."""
    model, prompts = small_model(), ragged_prompts(n=8)
    tok = build_tokenizer("byte")
    options = {"max_new_tokens": 14, "temperature": 1.0, "eos_ids": range(40), "batch_size": 3}
    options |= {"tokenizer": tok, "stop": ("e", "\x90"), "n_samples": 2}
    prompt_now = draw(model, prompts, **options)
    build = rows.CachedRows.__init__

    def late(self, *args):
        build(self, *args)
        self.lag, self.patience = 2, 2
        self.make_buffers(4)
        self.compiled = True  # reading is then not narrowed step by step

    monkeypatch.setattr(rows.CachedRows, "__init__", late)
    assert draw(model, prompts, **options) == prompt_now
    assert {s.finish_reason for s in prompt_now.values()} >= {"eos", "length"}


def test_logprobs_off_leave_nothing_on_the_device():
    server = Engine(small_model(), Capacity(2, 4, 4))
    server.submit("a", [1, 2], Sampling(4))
    streamed, _ = run(server)
    assert server.rows.state.keys() == rows.STATE.keys()
    assert all(token.logprobs is None for token in streamed["a", 0])


@pytest.mark.parametrize("n_samples, least, most", [(1, 100, 120), (20, 160, 192), (200, 190, 208)])
def test_as_many_rows_as_fit_beside_the_prompts_that_they_share(
    monkeypatch, n_samples, least, most
):
    """HumanEval's lengths, a 7B on a card of 80 GB: what lies in memory, as the engine is made."""
    card = SimpleNamespace(total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    made = []
    monkeypatch.setattr(engine, "Engine", lambda model, capacity, *_, **__: made.append(capacity))
    config, weights = load_config("7b"), 13.5e9
    model = SimpleNamespace(
        config=config, device=SimpleNamespace(type="cuda"), supports_cache=True,
        dtype=torch.bfloat16, largest_share=(config.n_layers, weights), max_positions=4096,
    )  # fmt: skip
    g = np.random.default_rng(0)
    prompts = [g.integers(0, 32000, n).tolist() for n in [400, *g.integers(60, 400, 163)]]
    options = {"n_samples": n_samples, "units": [range(len(prompts))], "compile": False}
    samples = generate(model, prompts, Sampling(512), **options)
    with pytest.raises(AttributeError):  # this engine steps no further
        next(samples)
    (capacity,) = made
    assert least <= capacity.rows <= most, capacity
    token = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim
    held = capacity.prompts * 400 + capacity.rows * capacity.row_tokens
    assert weights + token * held < 0.85 * card.total_memory


@pytest.mark.parametrize(
    "changes, least",
    [
        ({}, 2**18),
        ({"kind": "gpt"}, 2**18),
        ({"qk_norm": True}, 2**13),
        ({"n_experts": 4, "n_experts_per_token": 2, "d_ff_expert": 32}, 2**13),
    ],
)
def test_compiling_a_step_is_left_to_where_it_saves_much(changes, least):
    model = small_model(**changes)
    assert [engine.compiling_pays(model, n) for n in (least - 1, least)] == [False, True]
    model.packing = {"rule": "int8"}
    assert engine.compiling_pays(model, 2**13)


def test_prompts_are_read_beside_others_of_their_length(monkeypatch):
    """However long and short ones follow one another, little of what is computed is padding."""
    model, seen = small_model(), []
    hidden = model.hidden
    lengths = [3, 40, 5, 38, 4, 41, 6, 39]
    prompts = [[(i * 7 + j) % 250 for j in range(n)] for i, n in enumerate(lengths)]
    monkeypatch.setattr(rows, "PREFILL_TOKENS", 170)
    alone = {i: plain_greedy(model, prompt, 3) for i, prompt in enumerate(prompts)}
    monkeypatch.setattr(model, "hidden", lambda ids, **k: seen.append(ids) or hidden(ids, **k))
    samples = draw(model, prompts, max_new_tokens=3, batch_size=8, units=[range(8)])
    assert {i: samples[i, 0].token_ids for i in range(8)} == alone
    read = sum(ids.numel() for ids in seen if ids.shape[1] > 1)
    assert read < 1.1 * sum(lengths), (read, sum(lengths))

"""backends/local.py: the three verbs against plain torch, memory that runs out on one of two ranks,
NaN, and what is said of how it ran."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from builders import CPU, Rank, run_ranks, saved_checkpoint, tiny_model, token_shard
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
from backends import Sampling
from backends.continuations import Continuations
from backends.local import Local, facts_in_memory, facts_of, halve_until_it_fits
from backends.scoring import BatchTooLarge
from config import load_config
from dataset import RandomWindows, Windows, build_tokenizer, open_stream
from model import GPTModel
from transformers_model import TransformersModel

T = 32


@pytest.fixture(scope="module")
def byte():
    return build_tokenizer("byte")


@pytest.fixture
def stream(tmp_path, byte):
    return open_stream("fineweb_npy", [token_shard(tmp_path / "x.npy", n=211)], byte)


@torch.no_grad()
def log_probs(model, ids) -> torch.Tensor:
    """[len(ids), V], float64: after each token, of a model that reads them whole."""
    logits = model.logits(model.hidden(torch.tensor([list(ids)]))[0])
    return logits.double().log_softmax(-1)


# ---------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("kind", ["gpt", "windowed"])
@pytest.mark.parametrize("stride, bos", [(T, False), (12, True), (12, False)])
def test_every_token_of_windows_by_brute_force(kind, stride, bos, stream, byte):
    model, windows = tiny_model(kind), Windows(len(stream), T, stride, bos)
    totals = Local(model, byte).score_windows(stream, windows, 4, per_token=True)
    tokens = ([256] if bos else []) + stream.rows(np.array([0]), len(stream))[0].tolist()
    wanted, scored_before = np.zeros((len(windows), T)), 0
    for w in range(len(windows)):
        start = w * stride
        logs = log_probs(model, tokens[start : start + T])
        for j in range(T):
            target = start + j + 1
            if scored_before < target < len(tokens):
                wanted[w, j] = -logs[j, tokens[target]]
        scored_before = start + T
    np.testing.assert_allclose(totals.token_nll, wanted, rtol=2e-5, atol=1e-6)
    assert ((totals.token_nll != 0) == (wanted != 0)).all()
    nll, count = totals.by_window()
    np.testing.assert_allclose(nll, totals.token_nll.sum(1), rtol=1e-12)
    assert count.tolist() == (wanted != 0).sum(1).tolist()
    assert totals.tokens.sum() == len(tokens) - 1
    assert Local(model, byte).score_windows(stream, windows, 4).token_nll is None


@pytest.mark.parametrize("sampled", [False, True])
def test_a_consumer_of_windows_gets_each_scored_position_once(sampled, stream, byte):
    model, seen = tiny_model(), {}
    windows = RandomWindows(len(stream), T, 1) if sampled else Windows(len(stream), T, 12)

    def consumer(logits, targets, places):
        assert len(logits) == len(targets) == len(places)
        for place, token, row in zip(places.tolist(), targets.tolist(), logits):
            assert place not in seen
            seen[place] = -row.double().log_softmax(-1)[token].item()

    totals = Local(model, byte).score_windows(
        stream, windows, 4, per_token=True, consumer=lambda: consumer
    )
    places = np.flatnonzero(totals.token_nll)
    assert sorted(seen) == places.tolist() and len(seen) == totals.tokens.sum()
    found = np.array([seen[place] for place in places])
    np.testing.assert_allclose(found, totals.token_nll.ravel()[places], rtol=2e-5, atol=1e-6)


def test_sums_of_ranks_have_the_same_bits(stream, byte):
    windows = Windows(len(stream), T, 12, True)
    whole = Local(tiny_model(), byte).score_windows(stream, windows, 4, per_token=True)
    parts = [
        Local(tiny_model(), byte, dist=Rank(rank, 3, 0, CPU)).score_windows(
            stream, windows, 4, per_token=True
        )
        for rank in range(3)
    ]
    assert np.array_equal(sum(p.nll for p in parts), whole.nll)
    assert np.array_equal(sum(p.token_nll for p in parts), whole.token_nll)
    assert sum(p.tokens for p in parts).tolist() == whole.tokens.tolist()


# Rank 1 of 2 has no memory for more than 2 windows: both go on with 2, with the same sums.
SHORT_OF_MEMORY = """
from backends.local import Local
from dataset import Windows, build_tokenizer, open_stream
model, byte = builders.tiny_model(), build_tokenizer("byte")
real = model.hidden
def hidden(ids, **more):
    if dist.rank == 1 and len(ids) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(ids, **more)
model.hidden = hidden
stream = open_stream("fineweb_npy", [{path!r}], byte)
local = Local(model, byte, dist=dist)
totals = local.score_windows(stream, Windows(len(stream), 32), 8, per_token=True)
say("found", local.ran()["batch_size"], totals.loss.hex(), float(totals.token_nll.sum()).hex())
"""


def test_memory_running_out_is_agreed_and_halves_the_batch(tmp_path, byte):
    path = token_shard(tmp_path / "x.npy")
    out = run_ranks(2, tmp_path, SHORT_OF_MEMORY.format(path=str(path)))
    lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("found")]
    assert out.stdout.count("out of memory: going on with a batch of") == 2  # 4, then 2
    stream, model = open_stream("fineweb_npy", [path], byte), tiny_model()
    alone = Local(model, byte)
    totals = alone.score_windows(stream, Windows(len(stream), T), 2, per_token=True)
    assert lines == [["2", totals.loss.hex(), float(totals.token_nll.sum()).hex()]] * 2
    ids, nats = stream.rows(np.array([0]), len(stream))[0].tolist(), []
    for start in range(0, len(ids) - 1, T):
        logs = log_probs(model, ids[start : start + T])
        nats += [-logs[j, t].item() for j, t in enumerate(ids[start + 1 : start + T + 1])]
    assert totals.loss == pytest.approx(math.fsum(nats) / (len(ids) - 1), rel=1e-6)


def test_halving_ends_at_one():
    asked = []

    def score(b):
        asked.append(b)
        raise BatchTooLarge

    with pytest.raises(ValueError, match="out of memory with a batch of one"):
        halve_until_it_fits(score, 9)
    assert asked == [9, 4, 2, 1]


# ---------------------------------------------------------------------------------------------
# Rows


def some_rows(choice_ids):
    g = np.random.default_rng(0)
    prefixes = [g.integers(0, 256, n) for n in (40, 0, 33)]
    prefix = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    ids = [g.integers(0, 256, n) for n in (3, 9, 1, 20, 4, 7, 7, 2, 12)]
    targets = [g.integers(0, 256, n) for n in (2, 0, 1, 5, 4, 1, 7, 0, 3)]
    return Continuations(prefixes, prefix, ids, targets, choice_ids)


@pytest.mark.parametrize("kind", ["gpt", "llama", "windowed"])
@pytest.mark.parametrize("choice_ids", [None, [5, 80, 255]])
def test_rows_by_brute_force(kind, choice_ids, byte):
    model, rows = tiny_model(kind), some_rows(choice_ids)
    likeliest = log_probs(model, [*rows.prefixes[0], *rows.ids[0]]).argmax(-1)[-2:]
    rows.targets[0] = likeliest.numpy()  # of one row, the greedy tokens are asked about
    wanted_tokens, wanted_greedy, seen = [], [], {}

    def consumer(logits, targets, places):
        for place, token, row in zip(places.tolist(), targets.tolist(), logits):
            assert place not in seen
            seen[place] = row.double().log_softmax(-1)[token].item()

    found = Local(model, byte).score_rows(rows, 60, greedy=True, consumer=lambda: consumer)
    for r, (g, ids, targets) in enumerate(zip(rows.prefix, rows.ids, rows.targets)):
        logs = log_probs(model, [*rows.prefixes[g], *ids])
        if choice_ids:
            assert found.choices[r] == pytest.approx(logs[-1, choice_ids].numpy(), abs=2e-4)
        own = logs[len(logs) - len(targets) :].numpy()
        wanted_tokens += own[np.arange(len(targets)), targets].tolist()
        wanted_greedy.append((own.argmax(-1) == targets).all())
    assert found.choices.shape == (9, len(choice_ids or ()))
    assert found.tokens == pytest.approx(np.array(wanted_tokens), abs=2e-4)
    assert sorted(seen) == list(range(len(wanted_tokens)))
    assert found.tokens == pytest.approx(np.array([seen[i] for i in sorted(seen)]), abs=2e-4)
    assert found.greedy.tolist() == wanted_greedy and wanted_greedy[0] and not all(wanted_greedy)
    at = rows.target_offsets
    sums = [math.fsum(wanted_tokens[a:b]) for a, b in itertools.pairwise(at)]
    assert found.targets == pytest.approx(np.array(sums), abs=5e-4)
    plain = Local(model, byte).score_rows(rows, 60, max_rows=1)
    assert plain.greedy is None
    assert plain.targets == pytest.approx(found.targets, abs=5e-4)


# ---------------------------------------------------------------------------------------------
# Samples

PROMPTS = [[*b"def f"], [*b"x"], [*b"import os"], [*b"abc"], [*b"A B C"], [*b"7"], [*b"it"]]
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
DONE = {(0, 1), (3, 3)}


def drawn(samples) -> dict:
    """{(prompt, sample): (text, why it ended)}; each there once."""
    found = {}
    for s in samples:
        assert (s.prompt_index, s.sample_index) not in found
        found[s.prompt_index, s.sample_index] = s.text, s.finish_reason
    return found


# Rank 1 of 2 runs out of memory in the midst of its share, until 2 rows are drawn at a time.
DRAWING = """
import json
from test_local import DONE, PROMPTS, SAMPLING
from backends.local import Local
from dataset import build_tokenizer
model, byte = builders.tiny_model(), build_tokenizer("byte")
real, calls = model.hidden, []
def hidden(ids, **more):
    calls.append(len(ids))
    if dist.rank == 1 and len(ids) > 2 and len(calls) > 9:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(ids, **more)
model.hidden = hidden
local = Local(model, byte, dist=dist)
mine = [
    [s.prompt_index, s.sample_index, s.text, s.finish_reason]
    for s in local.generate(PROMPTS, SAMPLING, 4, batch_size=8, done=DONE)
]
say("found", json.dumps([mine, local.ran()["batch_size"], local.cost()["tokens"]]))
"""


def test_samples_when_memory_runs_out_on_one_of_two_ranks(tmp_path, byte):
    """Every one drawn exactly once, and as on a rank that has memory."""
    alone = Local(tiny_model(), byte)
    samples = list(alone.generate(PROMPTS, SAMPLING, 4, batch_size=8, done=DONE))
    wanted = drawn(samples)
    assert len(wanted) == 4 * len(PROMPTS) - 2 and DONE.isdisjoint(wanted)
    out = run_ranks(2, tmp_path, DRAWING)
    assert "out of memory: going on with a batch of 4" in out.stdout
    lines = [json.loads(x[6:]) for x in out.stdout.splitlines() if x.startswith("found")]
    assert len(lines) == 2 and all(mine for mine, *_ in lines), "both ranks draw"
    mine = [sample for part, *_ in lines for sample in part]
    assert len(mine) == len(wanted)
    assert {(p, s): (text, why) for p, s, text, why in mine} == wanted
    n_tokens = sum(len(s.token_ids) for s in samples)
    assert [(b, n) for _, b, n in lines] == [(2, n_tokens)] * 2


def test_no_memory_for_one_row_is_said(byte):
    model = tiny_model()
    real = model.hidden

    def hidden(ids, **more):
        if ids.shape[1] == 1:  # a step, and not the look at a prompt
            raise torch.OutOfMemoryError
        return real(ids, **more)

    model.hidden = hidden
    with pytest.raises(ValueError, match="out of memory with a batch of one"):
        list(Local(model, byte).generate([[1, 2, 3]], SAMPLING, 4, batch_size=4))


def test_greedy_samples_are_the_plain_loop(byte):
    model = tiny_model()
    found = drawn(Local(model, byte).generate(PROMPTS, Sampling(max_new_tokens=9), end_ids=()))
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(9):
            ids.append(int(log_probs(model, ids)[-1].argmax()))
        assert found[i, 0] == (byte.decode(ids[len(prompt) :]).rstrip("\ufffd"), "length")


def test_the_tokenizers_end_of_text_ends_a_sample(byte):
    """Unless other tokens are named."""
    model, greedy = tiny_model("llama"), Sampling(max_new_tokens=9)
    first = int(log_probs(model, PROMPTS[0])[-1].argmax())
    assert first != 256
    (sample,) = Local(model, byte).generate(PROMPTS[:1], greedy, end_ids=(first,))
    assert (sample.token_ids, sample.finish_reason) == ([], "eos")
    with torch.no_grad():  # now the end of text is the likeliest
        model.lm_head.weight[256] = 50 * model.hidden(torch.tensor(PROMPTS[:1]))[0, -1]
    (sample,) = Local(model, byte).generate(PROMPTS[:1], greedy)
    assert (sample.token_ids, sample.finish_reason) == ([], "eos")


# ---------------------------------------------------------------------------------------------
# What goes wrong, and what is said


def test_no_verb_gives_a_score_that_is_not_a_number(stream, byte):
    model = tiny_model()
    with torch.no_grad():
        model.ln_f.weight.fill_(math.nan)
    local = Local(model, byte)
    with pytest.raises(ValueError, match="NaN or infinite losses, first in window 0"):
        local.score_windows(stream, Windows(len(stream), T), 4)
    with pytest.raises(ValueError, match="NaN or infinite log-probabilities"):
        local.score_rows(some_rows([1, 2]), 60)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        list(local.generate(PROMPTS, SAMPLING))


def test_cost_and_how_it_ran_are_the_last_verbs(stream, byte):
    local = Local(tiny_model(), byte)
    shared = {"world_size": 1, "gpu": None, "peak_memory_bytes": None, "mfu": None}
    windows = Windows(len(stream), T)
    local.score_windows(stream, windows, 400)
    assert local.ran() == {"batch_size": len(windows), "compiled": False}
    cost = local.cost()
    assert cost.items() >= shared.items() and cost["warm_up_seconds"] > 0
    rate = (len(stream) - 1) / cost["seconds"]
    assert cost["tokens_per_second"] == pytest.approx(rate)
    rows = some_rows([1, 2])
    local.score_rows(rows, 60)
    assert local.ran() == {"batch_tokens": 60, "compiled": False}
    cost = local.cost()
    assert cost.items() >= (shared | {"rows": 9}).items() and "warm_up_seconds" not in cost
    assert cost["tokens_unshared"] == sum(
        len(rows.prefixes[g]) + len(ids) for g, ids in zip(rows.prefix, rows.ids)
    )
    assert cost["tokens_padded"] >= sum(map(len, rows.ids))
    samples = list(local.generate(PROMPTS, SAMPLING, batch_size=3))
    assert local.ran() == {"batch_size": 3, "compiled": False}
    assert local.cost()["tokens"] == sum(len(s.token_ids) for s in samples)


def test_facts_are_the_models(byte):
    native = tiny_model("llama")
    facts = Local(native, byte).facts
    assert (facts.vocab_size, facts.context, facts.dtype) == (257, 256, "float32")
    assert (facts.device, facts.tokenizer, facts.shares_prefixes) == ("cpu", byte, True)
    half = Local(tiny_model().for_inference(torch.bfloat16), byte).facts
    assert half.dtype == "bfloat16" and half.kind != facts.kind
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).eval()
    other = TransformersModel(small, None)
    theirs = Local(other).facts
    assert (theirs.vocab_size, theirs.context, theirs.shares_prefixes) == (50257, 1024, False)
    assert facts == facts_in_memory(native, byte)


def test_facts_of_a_checkpoint_are_those_of_its_model(tmp_path, byte):
    ckpt = checkpoint.open(saved_checkpoint(tmp_path, kind="llama"))
    facts = facts_of(ckpt, byte, "float32", "cpu")
    assert facts.name == "checkpoint-10"
    assert facts.kind == Local(ckpt.load("float32", "cpu"), byte).facts.kind  # whatever its name


def test_eager_is_chosen_for_small_jobs_and_on_cpu(byte):
    cuda, gpt2 = torch.device("cuda"), load_config("gpt2")
    float32 = GPTModel.on_meta(gpt2)

    def compiles(compile, device, n_tokens, n_jobs=1, at_once=2**15, model=float32):
        local = Local(model, byte, dist=Rank(0, 1, 0, device), compile=compile)
        local.n_jobs = n_jobs
        return local.should_compile(Windows(n_tokens + 1, 1024), at_once // 1024)

    assert not compiles("auto", cuda, 1_000_000)
    assert compiles("auto", cuda, 1_000_000, n_jobs=100)
    assert compiles("auto", cuda, 100_000_000)
    assert not compiles("auto", CPU, 10**12)
    assert not compiles("off", cuda, 10**12)
    assert compiles("on", CPU, 1)
    # in 16 bits what is between products is one kernel: compiling saves launches, where they count
    half = GPTModel.on_meta(gpt2).bfloat16()
    assert not compiles("auto", cuda, 10**12, model=half)
    assert compiles("auto", cuda, 10**9, at_once=8 * 1024, model=half)
    assert compiles("on", cuda, 1, model=half)
    half.quantisation = {"rule": "fp8-a8", "embeddings": False, "skip": []}
    assert compiles("auto", cuda, 10**9, model=half)


@pytest.mark.parametrize(
    "more",
    [
        {"post_norm": True},
        {"pre_norm": False, "post_norm": True},
        {"parallel_residual": True},
        {"qk_norm": True, "qk_norm_over": "width"},
        {"activation": "relu", "gated_mlp": False},
        {"attention_softcap": 30.0},
        {"n_experts": 4, "n_experts_per_token": 2},
    ],
)
def test_what_no_kernel_of_ours_does_is_compiled(more, byte):
    cuda, config = torch.device("cuda"), load_config("7b")
    heads = config.replace(qk_norm=True)  # normed and turned by one kernel
    for c, wanted in ((config, False), (heads, False), (config.replace(**more), True)):
        local = Local(GPTModel.on_meta(c).bfloat16(), byte, dist=Rank(0, 1, 0, cuda))
        assert local.should_compile(Windows(10**9, 1024), 16) == wanted

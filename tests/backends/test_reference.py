"""backends/reference.py and states.py: every token against float64 numpy, and states that are kept,
found again, made anew where they are torn, and never taken for another's."""

import json
import os

import numpy as np
import pytest
import torch
from builders import CPU, Rank, save_model, saved_checkpoint, tiny_model, token_shard
from transformers import OPTConfig, OPTForCausalLM

import checkpoint
from backends import reference
from backends.local import Local, facts_in_memory
from backends.reference import FOLDER, divergences, open_reference
from backends.states import States
from checkpoint import Checkpoint
from dataset import RandomWindows, Windows, build_tokenizer, open_stream
from durable import Journal

T = 32
BYTE = build_tokenizer("byte")


@pytest.fixture
def stream(tmp_path):
    return open_stream("fineweb_npy", [token_shard(tmp_path / "x.npy", n=211)], BYTE)


def by_hand(logits, base, targets):
    """[N, 4], a token at a time, of float64 numpy: no torch, no log-softmax of a library."""
    rows = []
    for q, b, target in zip(logits, base, targets):
        log_q, log_b = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (q, b))
        kl = sum(np.exp(y) * (y - x) for x, y in zip(log_q, log_b) if y > -np.inf)
        rows.append([kl, -log_q[target], -log_b[target], np.argmax(q) == np.argmax(b)])
    return np.array(rows)


@torch.no_grad()
def every_token(model, base, stream, windows):
    """The same of every scored token of windows, each window alone, in order."""
    rows = []
    for w in range(len(windows)):
        batch = windows.batch(stream, [w])
        ids, targets = torch.from_numpy(batch["input_ids"]), batch["targets"][0]
        logits = [m.logits(m.hidden(ids)[0], exact=True).double().numpy() for m in (model, base)]
        scored = targets >= 0
        rows.append(by_hand(logits[0][scored], logits[1][scored], targets[scored]))
    return np.concatenate(rows)


def compare(against, model, stream, windows, folder, batch_size=4, dist=None):
    return against.compare(Local(model, BYTE, dist=dist), stream, windows, batch_size, folder)


def columns(tokens):
    return np.stack([tokens.kl, tokens.nll, tokens.base_nll, tokens.same_top], 1)


@pytest.fixture
def counted(monkeypatch):
    """Windows that a reference is run over from now on, -1 for a dummy."""
    seen, keep = [], States.keep

    def see(self, hidden, targets, ids):
        seen.extend(ids.tolist())
        keep(self, hidden, targets, ids)

    monkeypatch.setattr(States, "keep", see)
    return seen


# ---------------------------------------------------------------------------------------------
# The numbers


def test_divergences_by_hand():
    """Real logits of two models; those of one rounded to bfloat16, where ties are common; and what
    one model, or both, think impossible."""
    with torch.no_grad():
        ids = torch.randint(257, (1, 60), generator=torch.Generator().manual_seed(0))
        q, b = (m.logits(m.hidden(ids))[0] for m in (tiny_model(seed=1), tiny_model(seed=2)))
    targets = torch.arange(60) * 3
    for a, c in ((q, b), (q, q.bfloat16().float()), (b.bfloat16(), q.bfloat16())):
        found = divergences(a, c, targets)
        assert found.dtype == torch.float64
        wanted = by_hand(a.double().numpy(), c.double().numpy(), targets.numpy())
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-14)
    b[:, 200:] = q[:, 230:] = -torch.inf
    found = divergences(q, b, targets)
    assert found[:, 0].isfinite().all()
    wanted = by_hand(*(x.numpy() for x in (q.double(), b.double(), targets)))
    np.testing.assert_allclose(found[:, 0], wanted[:, 0])
    assert divergences(b, q, targets)[:, 0].isinf().all()
    assert (divergences(q, q, targets)[:, 0] == 0).all()


def test_parts_of_the_table_are_the_whole(monkeypatch):
    q, b, t = torch.randn(50, 300), torch.randn(50, 300), torch.arange(50)
    whole = divergences(q, b, t)
    monkeypatch.setattr(reference, "ELEMENTS", 900)
    assert torch.equal(divergences(q, b, t), whole)


@pytest.mark.parametrize("kind", ["disjoint", "sliding, BOS", "sampled"])
def test_every_token_by_brute_force(kind, stream, tmp_path):
    """Whatever windows there are; and without a results directory."""
    windows = {
        "disjoint": Windows(len(stream), T),
        "sliding, BOS": Windows(len(stream), T, 12, True),
        "sampled": RandomWindows(len(stream), T, 1),
    }[kind]
    path = saved_checkpoint(tmp_path, kind="llama", seed=5)
    model, base = tiny_model("llama", seed=6), checkpoint.open(path).load("float32")
    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    totals, tokens = compare(against, model, stream, windows, None)
    wanted = every_token(model, base, stream, windows)
    np.testing.assert_allclose(columns(tokens), wanted, rtol=1e-4, atol=1e-6)
    assert np.bincount(tokens.window).tolist() == totals.by_window()[1].tolist()
    alone = Local(model, BYTE).score_windows(stream, windows, 4)
    assert np.array_equal(alone.nll, totals.nll)
    np.testing.assert_allclose(tokens.by_window(tokens.nll), totals.by_window()[0], rtol=1e-6)


SCALED = {"logit_scale": 0.37, "logit_softcap": 5.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, SCALED], ids=["plain", "scaled and capped"])
def test_a_model_diverges_from_itself_by_nothing(changes, dtype, stream, tmp_path):
    """Exactly, through the file too: what is kept of a state is all that the head looks at."""
    path = saved_checkpoint(tmp_path, seed=3, tie_embeddings=False, **changes)
    windows = Windows(len(stream), T)
    for _ in range(2):  # made, then read
        model = checkpoint.open(path).load(dtype)
        against = open_reference(str(path), dtype, facts_in_memory(model, BYTE))
        _, tokens = compare(against, model, stream, windows, tmp_path)
        assert (tokens.kl == 0).all() and tokens.same_top.all()
        assert np.array_equal(tokens.nll, tokens.base_nll)
    size = (tmp_path / FOLDER).rglob("states").__next__().stat().st_size
    width = 2 if dtype == "bfloat16" and not changes else 4
    assert size == len(windows) * T * 32 * width


def test_one_that_transformers_runs(stream, tmp_path):
    """As the reference of itself in another precision: of its body, nothing stays."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48}
    sizes |= {"max_position_embeddings": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    OPTForCausalLM(OPTConfig(**sizes)).save_pretrained(tmp_path / "opt")
    full = checkpoint.open(tmp_path / "opt").load("float32")
    half = checkpoint.open(tmp_path / "opt").load("bfloat16")
    assert not full.is_native
    against = open_reference(str(tmp_path / "opt"), "float32", facts_in_memory(half, BYTE))
    windows = Windows(len(stream), T)
    wanted = every_token(half, full, stream, windows)
    assert wanted[:, 0].max() > 0
    for _ in range(2):
        _, tokens = compare(against, half, stream, windows, tmp_path)
        np.testing.assert_allclose(columns(tokens)[:, :3], wanted[:, :3], rtol=1e-3, atol=1e-7)
    left = sum(p.numel() for p in against._head.parameters())
    assert left == 257 * 32


def test_sums_of_ranks_have_the_same_bits(stream, tmp_path):
    """What one rank made alone, three read; dealt by batch, as all windows are."""
    path, model = saved_checkpoint(tmp_path, seed=3), tiny_model(seed=4)
    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    windows = Windows(len(stream), T, 12)
    _, whole = compare(against, model, stream, windows, tmp_path)

    class Kept(Rank):
        def sum(self, values):
            self.last[:] = [super().sum(values)]
            return self.last[0]

    parts = []
    for rank in range(3):
        dist = Kept(rank, 3, 0, CPU)
        object.__setattr__(dist, "last", [])
        compare(against, model, stream, windows, tmp_path, dist=dist)
        parts.append(dist.last[0])
    every = sum(parts)
    assert np.array_equal(every[every[:, 4] == 1, :3], columns(whole)[:, :3].astype(float))
    assert set(np.unique(every[:, 4])) <= {0.0, 1.0}


def test_what_was_seen_before_memory_ran_out_counts_once(stream, tmp_path):
    """Each of two ranks sees a batch of 4, has no memory for the next, and is dealt others of 2."""
    path, windows = saved_checkpoint(tmp_path, seed=3), Windows(len(stream), T, 12)
    model = tiny_model(seed=4)
    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    _, whole = compare(against, model, stream, windows, tmp_path)
    hidden, calls, parts = model.hidden, [], []

    def too_large(ids, **more):
        calls.append(len(ids))
        if len(ids) > 2 and len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(ids, **more)

    class Kept(Rank):
        def sum(self, values):
            parts.append(super().sum(values))
            return parts[-1]

    tables = []
    model.hidden = too_large
    for rank in range(2):
        compare(against, model, stream, windows, tmp_path, dist=Kept(rank, 2, 0, CPU))
        assert calls[:3] == [4, 4, 4] and set(calls[3:]) == {2}
        tables.append(parts[-1])
        calls.clear()
    every = sum(tables)
    assert set(np.unique(every[:, 4])) == {0.0, 1.0}
    np.testing.assert_allclose(every[every[:, 4] == 1, :3], columns(whole)[:, :3], atol=1e-6)


# ---------------------------------------------------------------------------------------------
# States that are kept


def test_a_second_model_runs_no_reference(stream, tmp_path, counted):
    path, windows = saved_checkpoint(tmp_path, seed=3), Windows(len(stream), T)
    facts = facts_in_memory(tiny_model(), BYTE)
    against = open_reference(str(path), "float32", facts)
    _, first = compare(against, tiny_model(seed=4), stream, windows, tmp_path)
    assert sorted(i for i in counted if i >= 0) == list(range(len(windows)))
    counted.clear()
    for opened in (against, open_reference(str(path), "float32", facts)):
        _, again = compare(opened, tiny_model(seed=4), stream, windows, tmp_path)
        assert np.array_equal(columns(again), columns(first))
    assert not counted


def test_states_are_those_of_these_tokens_windows_and_weights(stream, tmp_path, counted):
    """Whatever differs has a place of its own, and nothing stale is ever taken."""
    path, model = saved_checkpoint(tmp_path / "run", seed=3), tiny_model(seed=4)
    other = open_stream("fineweb_npy", [token_shard(tmp_path / "y.npy", n=211, seed=1)], BYTE)
    windows = Windows(len(stream), T)

    def run(dtype="float32", stream=stream, windows=windows, batch_size=4, path=path):
        against = open_reference(str(path), dtype, facts_in_memory(model, BYTE))
        compare(against, model, stream, windows, tmp_path, batch_size)
        made = len(counted) > 0
        counted.clear()
        return made

    assert run() and not run()
    assert run(dtype="bfloat16")
    assert run(stream=other)
    assert run(windows=Windows(len(stream), T, 16))
    assert run(windows=Windows(len(stream), T, bos=True))
    assert run(windows=RandomWindows(len(stream), T, 1))
    assert run(windows=RandomWindows(len(stream), T, 2))
    assert run(batch_size=2)
    assert not run()
    save_model(tiny_model(seed=8), tmp_path / "run")  # trained on, under the same path
    assert run() and not run()
    assert len(list((tmp_path / FOLDER).iterdir())) == 9


@pytest.mark.parametrize("harm", ["cut", "flipped", "journal torn", "lost"])
def test_what_is_torn_is_made_anew(harm, stream, tmp_path, counted):
    """In whole batches of 2, so that the bits are those of an undisturbed run."""
    path, model = saved_checkpoint(tmp_path, seed=3), tiny_model(seed=4)
    windows = Windows(len(stream), T)  # 7
    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    _, wanted = compare(against, model, stream, windows, tmp_path, 2)
    [place] = (tmp_path / FOLDER).iterdir()
    file, journal = place / "states", place / "journal-0"
    if harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif harm == "flipped":
        data = bytearray(file.read_bytes())
        data[5 * T * 32 * 4 + 9] ^= 1  # in window 5
        file.write_bytes(data)
    elif harm == "journal torn":
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    else:
        file.unlink()
    counted.clear()
    _, found = compare(against, model, stream, windows, tmp_path, 2)
    assert np.array_equal(columns(found), columns(wanted))
    n_run = sum(i >= 0 for i in counted)
    assert n_run == {"cut": 7, "flipped": 2, "journal torn": 5, "lost": 7}[harm]
    counted.clear()
    compare(against, model, stream, windows, tmp_path, 2)
    assert not counted


def test_memory_that_runs_out_halves_the_batch(stream, tmp_path, monkeypatch):
    """The windows that were kept before it did are written again, and the later ones hold."""
    path, model = saved_checkpoint(tmp_path, seed=3), tiny_model(seed=4)
    load = Checkpoint.load

    def short_of_memory(self, *args, **more):
        loaded, calls = load(self, *args, **more), []
        hidden = loaded.hidden

        def too_large(ids, **more):
            calls.append(len(ids))
            if len(ids) > 2 and len(calls) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return hidden(ids, **more)

        loaded.hidden = too_large
        return loaded

    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    windows = Windows(len(stream), T)
    wanted = every_token(model, load(against.ckpt, "float32"), stream, windows)
    monkeypatch.setattr(Checkpoint, "load", short_of_memory)
    _, tokens = compare(against, model, stream, windows, tmp_path)
    np.testing.assert_allclose(columns(tokens)[:, :3], wanted[:, :3], rtol=1e-4, atol=1e-6)
    [place] = (tmp_path / FOLDER).iterdir()
    kept = [json.loads(line[18:])["window"] for line in (place / "journal-0").open()]
    assert len(kept) > len(windows) and set(kept) == set(range(len(windows)))


# ---------------------------------------------------------------------------------------------
# What is refused


def test_what_cannot_be_compared_is_one_line(stream, tmp_path):
    model = tiny_model()
    facts = facts_in_memory(model, BYTE)
    larger = saved_checkpoint(tmp_path / "larger", vocab_size=300)
    with pytest.raises(ValueError, match="vocabulary of 300, in-memory one of 257"):
        open_reference(str(larger), "float32", facts)
    short = saved_checkpoint(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(ValueError, match="16 positions, too few for windows of 32: --seq-len 16"):
        open_reference(str(short), "float32", facts).check(stream, T, BYTE, BYTE)
    path = saved_checkpoint(tmp_path / "good", seed=3)
    against = open_reference(str(path), "float32", facts)
    against.check(stream, T, BYTE, BYTE)
    against.check(stream, T, BYTE, None)

    class Other:
        def encode(self, text):
            return [i ^ 1 for i in BYTE.encode(text)]

    with pytest.raises(ValueError, match="another tokenizer"):
        against.check(stream, T, BYTE, Other())


def test_nan_is_told_of_whom(stream, tmp_path):
    """Of weights that are none, as of any checkpoint; of finite ones that overflow; of a model that
    is compared, as without a reference. Nothing that was kept of it is taken later."""
    model, windows = tiny_model(), Windows(len(stream), T)
    facts = facts_in_memory(model, BYTE)
    for value, said in ((torch.nan, "1 of 28 tensors hold NaN"), (3e38, "the model gives NaN")):
        broken = tiny_model(seed=3)
        broken.blocks[1].mlp.fc2.weight.data[:] = value
        path = save_model(broken, tmp_path / said[:3])
        against = open_reference(str(path), "float32", facts)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{path}: {said}"):
                compare(against, model, stream, windows, tmp_path)
    against = open_reference(str(saved_checkpoint(tmp_path / "ok")), "float32", facts)
    with pytest.raises(ValueError, match=r"^the model gives NaN"):
        compare(against, broken, stream, windows, tmp_path)


def test_no_room_and_another_at_it(stream, tmp_path, monkeypatch):
    path, model = saved_checkpoint(tmp_path, seed=3), tiny_model()
    windows = Windows(len(stream), T)
    against = open_reference(str(path), "float32", facts_in_memory(model, BYTE))
    with monkeypatch.context() as patch:
        full = os.statvfs_result((4096, 4096, 10, 2, 2, 0, 0, 0, 0, 255))
        patch.setattr(os, "statvfs", lambda path: full)
        with pytest.raises(ValueError, match=r"take 0\.00 GiB, and 0\.00 are free: fewer"):
            compare(against, model, stream, windows, tmp_path)
    [place] = (tmp_path / FOLDER).iterdir()
    with Journal(place / "journal-0"), pytest.raises(ValueError, match="another process"):
        compare(against, model, stream, windows, tmp_path)
    _, tokens = compare(against, model, stream, windows, tmp_path)  # and then all is well
    assert len(tokens.kl) == 210
    with Journal(place / "journal-0"):  # reading is no business of a writer's
        compare(against, model, stream, windows, tmp_path)

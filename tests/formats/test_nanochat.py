"""formats/nanochat.py: against nanochat's own model, and against its mathematics written anew."""

import json
import math
import os
import pickle
import shutil

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from trained_files import copied, difference, refusal

import checkpoint
import evaluation
from formats import naming
from model import GPTModel
from tokenizer import build_tokenizer

MODEL, META = "model_000010.pt", "meta_000010.json"


@pytest.fixture
def path(tmp_path):
    return copied("nanochat", tmp_path / "base_checkpoints") / MODEL


def test_its_own_models_logits(path):
    assert difference(path, "nanochat") < 1e-5


SAID = dict(sequence_len=64, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)


def weights(padded):
    """Of SAID, under nanochat's names, with rows that no token has."""
    C, kv, generator = 64, 32, torch.Generator().manual_seed(0)
    shapes = {"transformer.wte": (padded, C), "lm_head": (padded, C)}
    for i in range(3):
        at = f"transformer.h.{i}."
        shapes |= {at + "attn.c_q": (C, C), at + "attn.c_k": (kv, C), at + "attn.c_v": (kv, C)}
        shapes |= {at + "attn.c_proj": (C, C), at + "mlp.c_fc": (4 * C, C)}
        shapes |= {at + "mlp.c_proj": (C, 4 * C)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2
        for name, shape in shapes.items()
    }


def plain_logits(w, ids):
    """A decoder of double precision, as nanochat's README describes it."""
    w = {name: t.double() for name, t in w.items()}
    H, G, D, T = 4, 2, 16, ids.shape[1]

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt()

    angles = torch.outer(torch.arange(T).double(), 10000.0 ** -(torch.arange(0, D, 2) / D))
    turn = torch.polar(torch.ones_like(angles), -angles)  # by minus the angle

    def turned(x):  # channel i with i + D/2
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    x = norm(w["transformer.wte.weight"][ids])
    for i in range(3):
        at, y = f"transformer.h.{i}.", norm(x)
        q, k, v = (
            (y @ w[f"{at}attn.c_{n}.weight"].T).unflatten(-1, (heads, D))
            for n, heads in zip("qkv", (H, G, G))
        )
        q, k = norm(turned(q)), norm(turned(k)).repeat_interleave(H // G, 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(H // G, 2))
        x = x + mixed.flatten(2) @ w[f"{at}attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ w[f"{at}mlp.c_fc.weight"].T) ** 2 @ w[f"{at}mlp.c_proj.weight"].T
    return 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)


@pytest.mark.parametrize("padded", [97, 128])
def test_logits_of_plain_mathematics(tmp_path, padded):
    """The embedding's rows beyond the vocabulary are cut off, as its loss never sees them."""
    w = weights(padded)
    torch.save(w, tmp_path / MODEL)
    (tmp_path / META).write_text(json.dumps({"model_config": SAID | {"window_pattern": "L"}}))
    ckpt = checkpoint.open(tmp_path / MODEL)
    assert (ckpt.vocab_size, ckpt.context, ckpt.step, ckpt.kind) == (97, 64, 10, "nanochat")
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ckpt.load("float32")(ids)[0]
    assert found.shape[-1] == 97
    assert (found - plain_logits(w, ids)[..., :97]).abs().max() < 3e-5


def test_listing_watching_converting(path):
    (info,) = checkpoint.list_checkpoints(path.parent)
    assert (info.step, info.kind, info.problem) == (10, "nanochat", "")
    ckpt = checkpoint.open(path)
    assert ckpt.facts == {"val_bpb": 1.25} and not ckpt.config.tie_embeddings
    assert checkpoint.is_finished(path) is True
    made = checkpoint.convert(path, path.parent / "checkpoint-10")
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "nanochat" and checkpoint.open(made).config == ckpt.config
    model, before = GPTModel(ckpt.config), ckpt.fingerprint
    checkpoint.load_weights(path, model)
    wanted = ckpt.load("float32").state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())
    meta = path.with_name(META)
    meta.write_text(meta.read_text().replace("1.25", "1.5"))
    assert checkpoint.fingerprint(path) != before
    meta.unlink()
    assert checkpoint.is_finished(path) is False
    assert "does not say what the model is" in checkpoint.inspect(path)["note"]
    assert difference(path, "nanochat", ckpt.config) < 1e-5


LATER = {
    "resid_lambdas": (torch.ones(2), "scalars of each layer's residual stream"),
    "x0_lambdas": (torch.ones(2), "since January 2026"),
    "value_embeds.1.weight": (torch.ones(64, 8), "embeddings of values"),
    "transformer.h.1.attn.ve_gate.weight": (torch.ones(2, 12), "embeddings of values"),
    "smear_gate.weight": (torch.ones(1, 24), "a mixture with the token before"),
    "smear_lambda": (torch.ones(1), "since March 2026"),
    "backout_lambda": (torch.ones(1), "a middle layer taken off the last one's"),
}


@pytest.mark.parametrize("name", LATER)
def test_later_generations_are_refused_by_name(path, name):
    tensor, what = LATER[name]
    state = torch.load(path, weights_only=True)
    torch.save(state | {f"_orig_mod.{name}": tensor}, path)
    said = refusal(path)
    assert what.rstrip("'s") in said and name in said
    (info,) = checkpoint.list_checkpoints(path.parent)
    assert info.kind == "nanochat"


@pytest.mark.parametrize(
    "change, match",
    [
        ({"window_pattern": "SSSL"}, "window_pattern 'SSSL' is of a later nanochat"),
        ({"window_pattern": 3}, "window_pattern 3"),
        ({"n_layer": 3}, "n_layers is 3 in the config, 2 in the tensors"),
        ({"n_head": 3}, "model_config: d_model 16 does not divide"),
        ({"n_embd": "x"}, "model_config: "),
        ({"vocab_size": 70}, "vocab_size is 70 in the config, 64 in the tensors"),
        ({"rotary": 7}, "model_config has rotary, which is not known here"),
    ],
)
def test_a_meta_that_does_not_fit(path, change, match):
    meta = path.with_name(META)
    said = json.loads(meta.read_text())
    meta.write_text(json.dumps(said | {"model_config": said["model_config"] | change}))
    with pytest.raises(ValueError, match=match) as error:
        checkpoint.load_model(path, "float32")
    assert "\n" not in str(error.value)


def test_another_file_of_such_a_name_is_left_to_others(tmp_path):
    torch.save({"transformer.wte.weight": torch.ones(3, 3)}, tmp_path / MODEL)
    with pytest.raises(ValueError, match="has no config, and its weights have names"):
        checkpoint.load_model(tmp_path / MODEL)
    assert naming.whose(["transformer.h.0.attn.c_q.weight"]) == "nanochat's"


# ---------------------------------------------------------------------------------------------
# Its tokenizer

PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
)
PATTERN += r"|\s*[\r\n]|\s+(?!\S)|\s+"


def encoding():
    """As nanochat makes one: bytes and a few merges, then its special tokens."""
    merges = [b"th", b"the", b" t", b" the", b"in", b"ing", b"12", "é".encode(), b"\n\n"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    names = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
    specials = {name: len(ranks) + i for i, name in enumerate(names)}
    return tiktoken.Encoding(
        "rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


def test_its_tokenizer_is_read_without_unpickling(path, monkeypatch):
    file = path.parents[2] / "tokenizer/tokenizer.pkl"
    file.parent.mkdir()
    theirs = encoding()
    file.write_bytes(pickle.dumps(theirs))
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    ckpt = checkpoint.open(path)
    assert ckpt.tokenizer == file
    ours = evaluation.open_tokenizer(ckpt.tokenizer)
    text = "Nothing, the thing: the 1234 things\n\n<|bos|> naïve é 数据 \ud800"
    assert ours.encode(text) == theirs.encode_ordinary(text)
    bos = theirs.encode_single_token("<|bos|>")
    assert (ours.bos_token_id, ours.eos_token_id, ours.adds_bos) == (bos, bos, False)
    assert ours.vocab_size == theirs.n_vocab and bos in ours.special_ids
    pytest.importorskip("transformers")
    ours.save(path.parent / "saved")
    again = build_tokenizer(path.parent / "saved")
    assert again.encode(text) == ours.encode(text) and again.bos_token_id == bos


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    "content, match",
    [
        (pickle.dumps(Hostile()), r"holds posix\.system: making it could run code"),
        (pickle.dumps({"a": Hostile()}), r"holds posix\.system"),
        (pickle.dumps({"mergeable_ranks": {}}), r"is no pickled tiktoken\.Encoding"),
        (pickle.dumps(encoding()).replace(b"pat_str", b"pat_sss"), "how text is split"),
        (pickle.dumps(encoding()).replace(b"mergeable_ranks", b"mergeable_rankz"), "mergeable_"),
        (pickle.dumps(encoding())[:-20], "damaged or no pickle"),
        (b"", "damaged or no pickle"),
    ],
)
def test_hostile_tokenizers(tmp_path, monkeypatch, content, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        build_tokenizer(tmp_path / "tokenizer.pkl")
    assert "\n" not in str(error.value) and "tokenizer.pkl" in str(error.value)
    assert not (tmp_path / "owned").exists()
    shutil.rmtree(tmp_path)

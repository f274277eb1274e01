"""--packing from files to windows: every way on ugly data, indexes that are kept and refused."""

import json

import numpy as np
import pytest
import torch
from builders import write_jsonl

from dataset import build_tokenizer, open_stream
from distributed import Dist
from training.options import KEPT, WAYS, DataOptions
from training.plans import Packer

BYTE = build_tokenizer("byte")
ALONE = Dist(0, 1, 0, torch.device("cpu"))
T = 8
UGLY = {
    "empty documents": ["", "", "abc", "", "def ghi"],
    "one token each": [""] * 20,
    "longer than a window": ["x" * 50, "yy", "z" * 17],
    "exactly full": ["1234567", "abcdefg", "ABCDEFG"],
    "unicode": ["naïve café", "数据 🙂", "e\u0301\u0301", "ünïcödé"],
    "one document": ["a long single document without any end"],
}


def pack(stream, seed=3, packer=Packer, **options):
    data = DataOptions(**options)
    return packer(data, BYTE, T, seed, ALONE).pack(stream)


def written(folder, texts, name="data"):
    return open_stream(
        "text", write_jsonl(folder / f"{name}.jsonl", [{"text": t} for t in texts]), BYTE
    )


@pytest.mark.parametrize("texts", UGLY.values(), ids=list(UGLY))
@pytest.mark.parametrize("way", WAYS)
def test_every_token_is_used_once_or_counted(texts, way, tmp_path):
    stream = written(tmp_path, texts)
    flat = stream.read(0, len(stream))
    rows, counts = pack(stream, packing=way)
    inputs, _, starts = rows.read(np.arange(len(rows)))
    assert (starts is None) == (way != "document")
    # padding is end of text, which is a token of the data too: counted, and taken off
    expected, extra = np.bincount(flat, minlength=257), np.bincount(inputs.ravel(), minlength=257)
    extra[256] -= counts.padding
    assert (extra <= expected).all() and (expected - extra).sum() == counts.tokens_left_out
    assert counts.documents == len(texts) and counts.windows == len(rows)
    assert counts.tokens + counts.tokens_left_out == len(stream)
    assert rows.sizes(np.arange(len(rows))).sum() == counts.tokens
    if way == "best-fit":
        assert counts.tokens_left_out == 0
        assert counts.cut == sum(len(text.encode()) + 1 > T for text in texts)
    else:
        assert counts.tokens_left_out <= T and counts.padding == 0


def test_a_stream_without_end_of_text_is_one_document(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(1, 60, dtype=np.uint16))
    stream = open_stream("fineweb_npy", tmp_path / "x.npy", BYTE)
    for way in WAYS:
        rows, counts = pack(stream, data_mode="fineweb_npy", packing=way)
        assert counts.documents == 1
        plain = [*range(1, 57)] if way != "best-fit" else [*range(1, 60)]
        used = rows.read(np.arange(len(rows)))[0].ravel()
        assert used[used != 256].tolist() == plain


def test_concat_is_what_it_was(tmp_path):
    """Without --packing nothing is counted; with concat the rows are the same."""
    stream = written(tmp_path, UGLY["unicode"])
    plain, nothing = pack(stream)
    asked, counts = pack(stream, packing="concat")
    ids = np.arange(len(plain))
    assert nothing is None and counts.documents == 4
    for a, b in zip(plain.read(ids)[:2], asked.read(ids)[:2]):
        assert np.array_equal(a, b)


def test_a_plan_is_made_once_and_read_again(tmp_path, monkeypatch):
    stream = written(tmp_path, UGLY["unicode"] * 9)
    for way in KEPT:
        first, counts = pack(stream, packing=way)
        with monkeypatch.context() as patch:
            patch.setattr(Packer, "make_plan", lambda *args: pytest.fail("made again"))
            second, again = pack(stream, packing=way)
        ids = np.arange(len(first))
        assert counts == again and np.array_equal(first.read(ids)[0], second.read(ids)[0])
    assert len(list(tmp_path.glob(".data.jsonl.*.packing"))) == len(KEPT)
    assert [path.name for path in tmp_path.glob("*") if path.name[0] != "."] == ["data.jsonl"]
    # another seed is another plan; in-context draws nothing
    pack(stream, seed=4, packing="in-context")
    assert len(list(tmp_path.glob(".*.packing"))) == len(KEPT)
    pack(stream, seed=4, packing="best-fit")
    assert len(list(tmp_path.glob(".*.packing"))) == len(KEPT) + 1


def error_of(*args, **options):
    with pytest.raises(ValueError) as caught:
        pack(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stale_and_damaged_plans_are_refused(tmp_path):
    stream = written(tmp_path, UGLY["unicode"])
    pack(stream, packing="best-fit")
    changed = written(tmp_path, ["another", *UGLY["unicode"][1:]])
    said = error_of(changed, packing="best-fit")
    assert "for something else (data: sha256:" in said and "remove it" in said
    index = tmp_path / "own"
    pack(stream, packing="best-fit", packing_index=str(index))
    said = error_of(stream, seed=9, packing="best-fit", packing_index=str(index))
    assert "(seed: 3 there, 9 here)" in said
    said = error_of(stream, packing="cluster", packing_index=str(index))
    assert "packing: best-fit there, cluster here" in said
    whole = index.read_bytes()
    for damage in (b"", b"\n\n", whole[:-1], whole + b"x", whole[:70], b"{}\n" + whole):
        index.write_bytes(damage)
        said = error_of(stream, packing="best-fit", packing_index=str(index))
        assert "no plan of packing, or a damaged one" in said
    dice = np.random.RandomState(0)
    for at in dice.randint(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << dice.randint(8)
        index.write_bytes(flipped)
        assert "damaged" in error_of(stream, packing="best-fit", packing_index=str(index))
    index.write_bytes(whole)
    pack(stream, packing="best-fit", packing_index=str(index))


def test_a_plan_that_cannot_be_written_says_where_else(tmp_path):
    stream = written(tmp_path, UGLY["unicode"])
    (tmp_path / "file").write_text("")
    said = error_of(stream, packing="best-fit", packing_index=str(tmp_path / "file/x"))
    assert "name another place with --packing-index FILE" in said


def test_vectors_of_ones_own(tmp_path):
    """In-context order by them alone: from the first document on, to the nearest that is left."""
    texts = [f"{i}" * 3 for i in range(8)]
    stream = written(tmp_path, texts)
    angle = np.array([5, 1, 7.2, 0, 3.1, 2, 6, 4.4]) * 0.3
    path = tmp_path / "v.npy"
    np.save(path, np.stack((np.cos(angle), np.sin(angle)), 1))
    rows, counts = pack(stream, packing="in-context", packing_vectors=str(path))
    inputs = rows.read(np.arange(len(rows)))[0].ravel()
    order = [int(chr(i)) for i in inputs[::4]]
    wanted = [0]
    while len(wanted) < 6:  # windows are full of six
        left = set(range(8)) - set(wanted)
        wanted.append(min(left, key=lambda d: abs(angle[d] - angle[wanted[-1]])))
    assert order == wanted and counts.documents == 8
    np.save(path, np.stack((np.sin(angle), np.cos(angle) * 2), 1))
    pack(stream, packing="in-context", packing_vectors=str(path))  # other vectors, another index
    assert len(list(tmp_path.glob(".*.packing"))) == 2
    assert "No such file" in error_of(stream, packing="in-context", packing_vectors="none.npy")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"packing": "cluster", "document_mask": True}, "would undo what --packing cluster"),
        ({"packing_noise": "mask:4"}, "--packing-noise needs --packing noise"),
        ({"packing": "noise", "packing_noise": "mask:0"}, "give mask:N or separator:N"),
        ({"packing": "noise", "packing_noise": "both:3"}, "give mask:N or separator:N"),
        ({"packing_vectors": "v.npy"}, "needs --packing in-context"),
        ({"packing_index": "x"}, "--packing-index needs one source and --packing best-fit"),
        ({"mix": ("a:1",), "train_data": ("b",)}, "--train-data does not go with --mix"),
        ({"mix": ("a:1",), "val_ratio": 0.1}, "--val-ratio does not go with --mix"),
        ({"mix": ("a",)}, "--mix a: give FILE:weight"),
        ({"mix": ("a:1",), "packing": "best-fit", "packing_index": "x"}, "needs one source"),
    ],
)
def test_what_contradicts_itself_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DataOptions(**options)


def test_the_head_of_a_plan_is_plain(tmp_path):
    stream = written(tmp_path, UGLY["unicode"])
    pack(stream, packing="best-fit", packing_index=str(tmp_path / "own"))
    head = json.loads((tmp_path / "own").read_bytes().split(b"\n")[1])
    assert (
        head["about"]["packing"] == "best-fit" and head["about"]["documents"] == "after token 256"
    )
    assert head["about"]["data"] == stream.fingerprint and head["counts"]["documents"] == 4

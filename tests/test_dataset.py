"""Streams and windows against plain Python loops over lists."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from dataset import (
    FineWebNPYDataset,
    RandomWindows,
    Source,
    TextDatasetForCausalLM,
    TokenStream,
    Windows,
    build_tokenizer,
    compute_perplexity,
    open_stream,
)
from formats import text, tokens

BYTE = build_tokenizer("byte")
EOT = 256


def stream_of(*lists, bos_id=None, max_tokens=None):
    arrays = [np.array(tokens, dtype=np.uint16) for tokens in lists]
    sources = [Source(f"part{i}", array) for i, array in enumerate(arrays)]
    return TokenStream(sources, max_tokens, bos_id)


def shard(path, tokens, dtype=np.uint16):
    np.save(path, np.array(tokens, dtype=dtype))
    return path


# ---------------------------------------------------------------------------------------------
# Windows


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_target_is_scored_exactly_once(data):
    n = data.draw(st.integers(1, 120), "N")
    T = data.draw(st.integers(1, 40), "T")
    stride = data.draw(st.none() | st.integers(1, T), "stride")
    bos = data.draw(st.booleans(), "bos")
    if n - 1 + bos == 0:
        with pytest.raises(ValueError, match="nothing to score"):
            Windows(n, T, stride, bos)
        return
    cuts = sorted(data.draw(st.lists(st.integers(1, n), max_size=3)))
    x = [1000 + i for i in range(n)]
    parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, n]) if a < b]
    stream, windows = stream_of(*parts, bos_id=7), Windows(n, T, stride, bos)
    y, shift = ([7, *x], 1) if bos else (x, 0)

    scored = {}  # stream position -> (token, tokens of context)
    ids = list(range(len(windows)))
    size = data.draw(st.integers(1, 5), "batch")
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        padded = chunk + [-1] * (size - len(chunk))
        batch = windows.batch(stream, padded)
        for row, k in enumerate(padded):
            inputs, targets = batch["input_ids"][row].tolist(), batch["targets"][row].tolist()
            assert len(inputs) == len(targets) == T
            if k < 0:
                assert inputs == [0] * T and targets == [-100] * T
                assert batch["n_scored"][row] == 0 == batch["first_target"][row]
                continue
            s = k * (stride or T)
            there = y[s : s + T]
            assert inputs == there + [0] * (T - len(there))
            first = batch["first_target"][row]
            assert first == s + 1 - shift
            here = [first + j for j, t in enumerate(targets) if t != -100]
            assert [int(p) for p in windows.target_span(k)] == [here[0], here[-1]]
            assert batch["n_scored"][row] == sum(t != -100 for t in targets) > 0
            for j, target in enumerate(targets):
                if target != -100:
                    position = int(batch["first_target"][row]) + j
                    assert position not in scored, (k, j)
                    assert target == y[s + 1 + j] == x[position]
                    # "the first window that reaches it": no earlier window's targets include it
                    assert k == 0 or s + 1 + j > (k - 1) * (stride or T) + T
                    scored[position] = j + 1
    assert sorted(scored) == list(range(1 - shift, n))
    assert windows.n_targets == len(scored) == n - 1 + shift
    least = T - (stride or T)
    assert all(c > min(least, p - 1 + shift) for p, c in scored.items())


@given(n=st.integers(2, 10**12), T=st.integers(1, 10**6), part=st.floats(0, 1), bos=st.booleans())
def test_window_count_is_the_smallest_that_reaches_the_end(n, T, part, bos):
    stride = max(1, int(T * part))
    k = len(Windows(n, T, stride, bos))
    targets = n - 1 + bos
    assert (k - 1) * stride + T >= targets
    assert k == 1 or (k - 2) * stride + T < targets


def test_windows_written_out():
    stream = stream_of([10, 11, 12], [13, 14, 15, 16], bos_id=9)
    batch = Windows(7, 4).batch(stream, [0, 1, -1])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, 12, 13, 14], [15, 16, -100, -100], [-100] * 4]
    assert batch["first_target"].tolist() == [1, 5, 0] and batch["n_scored"].tolist() == [4, 2, 0]
    batch = Windows(7, 4, stride=2, bos=True).batch(stream, [0, 1, 2])
    assert batch["input_ids"].tolist() == [[9, 10, 11, 12], [11, 12, 13, 14], [13, 14, 15, 16]]
    _ = -100
    assert batch["targets"].tolist() == [[10, 11, 12, 13], [_, _, 14, 15], [_, _, 16, _]]
    assert batch["first_target"].tolist() == [0, 2, 4] and batch["n_scored"].tolist() == [4, 2, 1]
    for name in batch:
        assert batch[name].dtype == np.int64 and batch[name].flags.c_contiguous, name


def test_windows_refuse_what_would_skip_targets():
    for T, stride in ((4, 5), (4, 0), (0, None), (4, -1)):
        with pytest.raises(ValueError, match="stride"):
            Windows(100, T, stride)
    with pytest.raises(ValueError, match="--bos needs a tokenizer"):
        Windows(3, 2, bos=True).batch(stream_of([1, 2, 3]), [0])


@settings(deadline=None)
@given(n=st.integers(2, 300), T=st.integers(2, 40), seed=st.integers(0, 2**40))
def test_random_windows_are_rosetrainers(n, T, seed):
    if n < T:
        with pytest.raises(ValueError, match="random windows"):
            RandomWindows(n, T, seed)
        return
    x = list(range(n))
    starts = random.Random(seed).sample(range(n - T + 1), min(n // T, n - T + 1))
    windows = RandomWindows(n, T, seed)
    assert len(windows) == len(starts) and windows.n_targets == len(starts) * (T - 1)
    batch = windows.batch(stream_of(x), [*range(len(starts)), -1])
    for row, s in enumerate(starts):
        assert batch["input_ids"][row].tolist() == x[s : s + T]
        assert batch["targets"][row].tolist() == [*x[s + 1 : s + T], -100]
        assert batch["first_target"][row] == s + 1 and batch["n_scored"][row] == T - 1
        assert [int(p) for p in windows.target_span(row)] == [s + 1, s + T - 1]
    assert batch["targets"][-1].tolist() == [-100] * T and batch["n_scored"][-1] == 0


# ---------------------------------------------------------------------------------------------
# Streams


@given(data=st.data())
def test_reading_crosses_sources(data):
    parts = data.draw(
        st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=6)
    )
    limit = data.draw(st.none() | st.integers(1, 30))
    x = [t for part in parts for t in part][:limit]
    stream = stream_of(*parts, max_tokens=limit)
    assert len(stream) == len(x)
    stream.check_vocab(max(x) + 1)
    if max(x):
        with pytest.raises(ValueError, match=f"token id {max(x)}, but"):
            stream.check_vocab(max(x))
    start = data.draw(st.integers(0, len(x)))
    end = data.draw(st.integers(start, len(x)))
    read = stream.read(start, end)
    assert read.dtype == np.int64 and read.tolist() == x[start:end]
    owner = [i for i, part in enumerate(parts) for _ in part][: len(x)]
    positions = np.arange(len(x))
    assert (np.searchsorted(stream.file_starts, positions, "right") - 1).tolist() == owner
    assert stream.file_starts[-1] == len(x) and len(stream.file_names) == owner[-1] + 1
    with pytest.raises(AssertionError):
        stream.read(0, len(x) + 1)


@given(
    parts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=4),
    ratio=st.floats(0.001, 0.999),
)
def test_split_holds_out_the_end(parts, ratio):
    x = [t for part in parts for t in part]
    held_out = max(1, int(len(x) * ratio))
    if held_out == len(x):
        with pytest.raises(ValueError, match="too few"):
            stream_of(*parts).split(ratio)
        return
    head, tail = stream_of(*parts, bos_id=3).split(ratio)
    assert head.read(0, len(head)).tolist() == x[:-held_out]
    assert tail.read(0, len(tail)).tolist() == x[-held_out:]
    assert head.bos_id == tail.bos_id == 3


def test_split_of_a_mapped_shard_is_scanned_where_it_is(tmp_path):
    x = np.random.default_rng(0).integers(0, 60000, 1000)
    head, tail = open_stream("fineweb_npy", shard(tmp_path / "x.npy", x), None).split(0.1)
    for part, ids in ((head, x[:900]), (tail, x[900:])):
        with pytest.raises(ValueError, match=f"holds token id {ids.max()}, "):
            part.check_vocab(ids.max())
    assert tail.fingerprint == stream_of(x[900:]).fingerprint
    for ratio in (0, 1, -1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            head.split(ratio)


def test_one_stream_from_every_kind_of_shard(tmp_path):
    x = np.random.default_rng(0).integers(0, 50257, 1000)
    shard(tmp_path / "a.npy", x[:100])
    shard(tmp_path / "b.npy", x[100:300], np.uint32)
    shard(tmp_path / "c.npy", x[300:400], ">u2")
    x[400:600].astype("<u2").tofile(tmp_path / "d.bin")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 200
    (tmp_path / "e.bin").write_bytes(header.tobytes() + x[600:800].astype("<u2").tobytes())
    header[:2] = 20240801, 7
    (tmp_path / "f.bin").write_bytes(header.tobytes() + x[800:].astype("<u4").tobytes())
    with (tmp_path / "g.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array([5], dtype=np.uint16), version=(2, 0))
    (tmp_path / "notes.md").write_text("not a shard")
    stream = open_stream("fineweb_npy", tmp_path, None)
    assert stream.read(0, 1001).tolist() == [*x.tolist(), 5]
    assert [Path(name).name for name in stream.file_names] == [f"{c}.npy" for c in "abc"] + [
        "d.bin",
        "e.bin",
        "f.bin",
        "g.npy",
    ]
    assert stream.file_starts.tolist() == [0, 100, 300, 400, 600, 800, 1000, 1001]
    assert stream.n_text_bytes is None and stream.bos_id is None
    # the fingerprint is of the tokens, not of how they are stored or cut
    assert stream.fingerprint == stream_of([*x.tolist(), 5]).fingerprint
    assert open_stream("fineweb_npy", tmp_path, BYTE).bos_id == EOT


def test_fingerprint_follows_the_tokens(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 60000, 300_000)
    one = open_stream("fineweb_npy", shard(tmp_path / "x.npy", x), None)
    assert one.fingerprint.startswith("sha256:")
    assert one.fingerprint == stream_of(x[:7], x[7:]).full_fingerprint()
    cut = open_stream("fineweb_npy", tmp_path / "x.npy", None, max_tokens=299_999)
    assert cut.fingerprint == stream_of(x[:-1]).fingerprint != one.fingerprint
    changed = x.copy()
    changed[150_000] ^= 1
    assert stream_of(changed).fingerprint != one.fingerprint
    monkeypatch.setattr(tokens, "FULL_HASH_TOKENS", 1000)
    sampled = [stream_of(x), stream_of(x[:9], x[9:]), stream_of(x[:-1]), stream_of(x[::-1])]
    assert all(s.fingerprint.startswith("sampled:") for s in sampled)
    assert sampled[0].fingerprint == sampled[1].fingerprint
    assert len({s.fingerprint for s in sampled}) == 3


def test_vocabulary_is_checked_before_scoring(tmp_path):
    shard(tmp_path / "a.npy", [1, 2, 3])
    shard(tmp_path / "b.npy", [4, 50300, 5])
    stream = open_stream("fineweb_npy", tmp_path, None)
    stream.check_vocab(50301)
    with pytest.raises(ValueError, match=r"b\.npy: holds token id 50300, .* has 50257 ids"):
        stream.check_vocab(50257)


def test_a_large_shard_costs_little_memory_to_open_check_and_window(tmp_path):
    n = 100_000_000
    with (tmp_path / "x.npy").open("wb") as file:  # sparse: zeros that take no disk
        header = {"descr": "<u2", "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * n)
    code = """
import resource, sys
from dataset import Windows, open_stream
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
stream = open_stream("fineweb_npy", sys.argv[1], None)
windows = Windows(len(stream), 1024)
windows.batch(stream, range(32))
print(peak() - before)
stream.check_vocab(50257)
print(peak() - before)
"""
    args = [sys.executable, "-c", code, str(tmp_path / "x.npy")]
    out = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    opened, checked = map(int, out.split())  # KiB
    assert opened < 8 * 1024, opened
    assert checked < 40 * 1024, checked  # a scan reads blocks; the shard itself has 195,000 KiB


# ---------------------------------------------------------------------------------------------
# Text


def test_text_files_with_end_of_text_after_each(tmp_path):
    first, second = "one\r\ntwo\n", "\ufeffdrei é 🙂"
    (tmp_path / "a.txt").write_bytes(first.encode())
    (tmp_path / "b.txt").write_bytes(second.encode())
    expected = [*first.encode(), EOT, *second.encode(), EOT]
    for files in (tmp_path, [tmp_path / "a.txt", str(tmp_path / "b.txt")], f"{tmp_path}/*.txt"):
        stream = open_stream("text", files, BYTE)
        assert stream.read(0, len(stream)).tolist() == expected
        assert stream.n_text_bytes == len(first.encode()) + len(second.encode())
        assert stream.file_starts.tolist() == [0, len(first) + 1, len(expected)]
    bare = open_stream("text", tmp_path, BYTE, add_eos=False)
    assert bare.read(0, len(bare)).tolist() == [t for t in expected if t != EOT]
    order = open_stream("text", [tmp_path / "b.txt", tmp_path / "a.txt"], BYTE)
    assert order.file_names == [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    # any other suffix is plain text as well
    (tmp_path / "README").write_text("hi")
    assert open_stream("text", tmp_path / "README", BYTE).read(0, 3).tolist() == [104, 105, EOT]


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 8, 9, 100])
def test_max_tokens(tmp_path, limit):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("defg")
    x = [*b"abc", EOT, *b"defg", EOT]
    stream = open_stream("text", tmp_path, BYTE, max_tokens=limit)
    assert stream.read(0, len(stream)).tolist() == x[:limit]
    assert len(stream.file_names) == (1 if limit <= 4 else 2)
    assert stream.n_text_bytes == (7 if limit >= 9 else None)
    shard(tmp_path / "x.npy", x)
    cut = open_stream("fineweb_npy", tmp_path / "x.npy", None, max_tokens=limit)
    assert cut.read(0, len(cut)).tolist() == x[:limit]


def test_bytes_of_text_are_unknown_when_only_part_of_a_file_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 1)
    monkeypatch.setattr(text, "GROUP_BYTES", 1)
    (tmp_path / "x.txt").write_text("ab\ncd\nef\n")
    for limit in range(1, 12):  # pieces end after 3, 6 and 9 bytes
        stream = open_stream("text", tmp_path, BYTE, max_tokens=limit)
        assert stream.read(0, len(stream)).tolist() == [*b"ab\ncd\nef\n", EOT][:limit]
        assert stream.n_text_bytes == (9 if limit >= 10 else None), limit


def test_jsonl_has_one_document_a_line(tmp_path):
    documents = ["ein\nTag", "", 'q"uote\u2028', "é", "\ud800"]
    lines = [json.dumps({"id": i, "text": d}) for i, d in enumerate(documents)]
    lines[3] = json.dumps({"text": "é"}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    stream = open_stream("text", tmp_path / "x.jsonl", BYTE)
    documents[4] = "\ufffd"  # what a lone surrogate becomes
    expected = [t for d in documents for t in [*d.encode(), EOT]]
    assert stream.read(0, len(stream)).tolist() == expected
    assert stream.file_starts.tolist() == [0, len(expected)]
    assert stream.n_text_bytes == len("".join(documents).encode())


DOCUMENTS = ["ein\nTag", "zwei", "é drei"]


def forms_of_documents():
    """(name, bytes): the same three documents in every form that holds documents."""
    rows = [{"id": i, "text": d} for i, d in enumerate(DOCUMENTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array, indented = json.dumps(rows).encode(), json.dumps(rows, indent=2).encode()
    for name in ("x.jsonl", "x.JSONL", "x.ndjson", "x.json", "x.Json"):
        yield name, lines
        yield name + ".gz", gzip.compress(lines)
        yield name, gzip.compress(lines)  # a name that does not say so
    for name in ("x.json", "x.jsonl", "x.JSON.GZ"):
        yield name, array
        yield name, b"\xef\xbb\xbf \n" + indented
        yield name, gzip.compress(indented)


# a gzip's bytes hold the time: names of tests must be the same in every worker
@pytest.mark.parametrize(
    ("name", "data"),
    [pytest.param(*form, id=f"{i}-{form[0]}") for i, form in enumerate(forms_of_documents())],
)
def test_documents_under_every_name(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    stream = open_stream("text", tmp_path / name, BYTE)
    assert stream.read(0, len(stream)).tolist() == [
        t for d in DOCUMENTS for t in [*d.encode(), EOT]
    ]
    assert stream.n_text_bytes == len("".join(DOCUMENTS).encode())


def test_documents_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name in ("a.parquet", "b.PARQUET", "c.txt"):  # a wrong name is noticed
        parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / name)
        stream = open_stream("text", tmp_path / name, BYTE)
        wanted = [t for d in DOCUMENTS for t in [*d.encode(), EOT]]
        assert stream.read(0, len(stream)).tolist() == wanted
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    refused("text", tmp_path / "null.parquet", "row 2: needs")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    refused("text", tmp_path / "other.parquet", "no column 'text', only body")


def test_plain_text_under_every_name(tmp_path, capsys):
    for name, data in (
        ("x.txt", b"a b"),
        ("x.TXT", b"a b"),
        ("x.txt.gz", gzip.compress(b"a b")),
        ("x.txt", gzip.compress(b"a b")),
        ("x.md", b"a b"),
        ("x", b"a b"),
    ):
        (tmp_path / name).write_bytes(data)
        stream = open_stream("text", tmp_path / name, BYTE)
        assert stream.read(0, len(stream)).tolist() == [*b"a b", EOT], name
    assert "note:" not in capsys.readouterr().err
    lines = b'{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n'
    (tmp_path / "lines.txt").write_bytes(lines)
    stream = open_stream("text", tmp_path / "lines.txt", BYTE)
    assert stream.read(0, len(stream)).tolist() == [*lines, EOT]
    assert "lines.txt: its lines look like JSON" in capsys.readouterr().err


def test_a_directory_is_read_whatever_the_case_and_the_packing(tmp_path):
    (tmp_path / "a.TXT").write_text("a")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    (tmp_path / "c.ndjson").write_text('{"text": "c"}\n')
    (tmp_path / "settings.json").write_text('{"not": "data"}')
    stream = open_stream("text", tmp_path, BYTE)
    assert stream.read(0, len(stream)).tolist() == [97, EOT, 98, EOT, 99, EOT]
    shard(tmp_path / "x.npy", [1, 2]).rename(tmp_path / "x.NPY")
    np.arange(3).astype("<u2").tofile(tmp_path / "y.BIN")
    ids = open_stream("fineweb_npy", tmp_path, None)
    assert ids.read(0, len(ids)).tolist() == [1, 2, 0, 1, 2]


def test_integers_of_any_width_are_the_same_tokens(tmp_path):
    x = np.random.default_rng(0).integers(0, 250, 1000)
    wanted = stream_of(x).fingerprint
    for dtype in ("u1", "i2", ">u2", "i4", "u4", "i8", ">i8", "u8"):
        stream = open_stream("fineweb_npy", shard(tmp_path / f"{dtype}.npy", x, dtype), None)
        stream.check_vocab(250)
        assert stream.fingerprint == wanted
        assert np.array_equal(stream.read(0, 1000), x)
        with pytest.raises(ValueError, match="holds token id 249"):
            stream.check_vocab(249)
    for width in ("<u2", "<u4", "<i8"):  # raw, and nothing said of them
        x.astype(width).tofile(tmp_path / "raw.bin")
        stream = open_stream("fineweb_npy", tmp_path / "raw.bin", None)
        assert (len(stream), stream.fingerprint) == (1000, wanted)
    x.astype("<u4")[:20].tofile(tmp_path / "few.bin")
    refused("fineweb_npy", tmp_path / "few.bin", "--token-dtype")
    told = open_stream("fineweb_npy", tmp_path / "few.bin", None, token_dtype="uint32")
    assert told.read(0, 20).tolist() == x[:20].tolist()
    for dtype in ("i1", "i2", "i4", "i8"):
        x = np.array([1, 2, -100, 3])
        stream = open_stream("fineweb_npy", shard(tmp_path / "negative.npy", x, dtype), None)
        with pytest.raises(ValueError, match="holds token id -100"):
            stream.check_vocab(2**40)
    huge = open_stream("fineweb_npy", shard(tmp_path / "huge.npy", [1, 2**32 + 1], "i8"), None)
    with pytest.raises(ValueError, match=f"holds token id {2**32 + 1}"):
        huge.check_vocab(50257)


def test_long_text_is_encoded_in_pieces_as_in_one_go(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken"))
    gpt2 = build_tokenizer("gpt2")
    files = sorted((data_dir / "text").glob("*.txt"))
    assert files
    expected = [t for f in files for t in [*gpt2.encode(f.read_bytes().decode()), 50256]]
    for chunk, group in ((2**20, 2**23), (1000, 50_000)):
        monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(text, "GROUP_BYTES", group)
        stream = open_stream("text", files, gpt2)
        assert np.array_equal(stream.read(0, len(stream)), expected)
        assert stream.n_text_bytes == sum(f.stat().st_size for f in files)
        cut = open_stream("text", files, gpt2, max_tokens=1234)
        assert np.array_equal(cut.read(0, len(cut)), expected[:1234])
        x = stream.read(0, len(stream))
        assert gpt2.token_bytes()[x].sum() == stream.n_text_bytes
    hf = build_tokenizer(str(data_dir / "tokenizers" / "gpt2"))
    assert np.array_equal(open_stream("text", files, hf).read(0, len(expected)), expected)


def test_memory_of_a_text_is_near_its_size(tmp_path):
    line = "for the whole is never more than twice its parts\n"
    (tmp_path / "x.txt").write_text(line * (16_000_000 // len(line)))
    size = (tmp_path / "x.txt").stat().st_size
    tracemalloc.start()
    stream = open_stream("text", tmp_path / "x.txt", BYTE)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(stream) == size + 1
    assert held < 2.1 * size and peak < 6 * size, (held / size, peak / size)


# ---------------------------------------------------------------------------------------------
# Ugly input: one line that names the file and the remedy


def refused(mode, path, *words, tokenizer=BYTE):
    with pytest.raises(ValueError) as caught:
        open_stream(mode, path, tokenizer)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in (str(path), *words):
        assert word in message, (word, message)


def test_text_that_cannot_be_used(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    refused("fineweb_npy", tmp_path, "holds no .npy or .bin")
    refused("text", tmp_path / "none.txt", "no such file")
    refused("text", f"{tmp_path}/*.text", "no file matches")
    refused("text", tmp_path, "holds no .txt or .jsonl or .ndjson or .parquet files")
    refused("text", file("empty.txt", b""), "empty")
    refused("text", file("wide.txt", "words words".encode("utf-16-le")), "zero bytes", "iconv")
    refused("text", file("a.tar.gz", gzip.compress(b"name" + bytes(600))), "zero bytes")
    refused("text", file("x.json", b'[{"text": "a"},'), "x.json: begins as a JSON array")
    refused("text", file("x.json", b'[{"text": "a"}, 3]'), "x.json: item 2: an object expected")
    refused(
        "text", file("x.json", b'[{"text": "a"}, {"body": 1}]'), "x.json: item 2: needs", "body"
    )
    refused("text", file("x.json", b'{\n"text": "a"\n}'), "x.json:1: not a line of JSON")
    refused("text", file("latin.txt", b"abc\xe9t"), "not UTF-8 at byte 3", "iconv")
    refused("text", file("ids.npy", b"x"), "--data-mode fineweb_npy")
    refused("text", file("x.jsonl", b'{"text": "a"}\n{"text": \n'), "x.jsonl:2: not a line of JSON")
    refused("text", file("x.jsonl", b'{"text": "a"}\n\n{"body": "a"}'), "x.jsonl:3: needs", "text")
    refused("text", file("x.jsonl", b'["a"]'), "x.jsonl:1: an object")
    refused("text", file("x.jsonl", b'{"text": null}'), "x.jsonl:1: needs")
    refused("text", file("x.jsonl", b'{"text": "a"}\n"\xff"'), "x.jsonl:2: not UTF-8 at byte 15")
    refused("text", file("x.jsonl", b"[" * 200_000), "x.jsonl:1: not a line of JSON")
    refused("text", file("x.jsonl", b"\n \n"), "no text")
    good = file("good.txt", b"a")
    with pytest.raises(ValueError, match=r"good\.txt: listed twice"):
        open_stream("text", [good, f"{tmp_path}/go*.txt"], BYTE)
    with pytest.raises(ValueError, match="no data files"):
        open_stream("text", [], BYTE)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        open_stream("text", good, BYTE, max_tokens=0)
    with pytest.raises(ValueError, match="data mode must be"):
        open_stream("npy", good, BYTE)


def test_not_utf8_is_found_at_its_offset_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_BYTES", 100)
    data = b"line of text\n" * 100
    (tmp_path / "x.txt").write_bytes(data + b"\xff" + data)
    refused("text", tmp_path / "x.txt", f"not UTF-8 at byte {len(data)} ")


def test_tokenizer_without_end_of_text(tmp_path):
    class Bare:
        name, eos_token_id, bos_token_id = "bare", None, None

    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="'bare' has no end-of-text token"):
        open_stream("text", tmp_path / "x.txt", Bare())


# ---------------------------------------------------------------------------------------------
# rosetrainer's functions


def test_text_dataset_has_rosetrainers_items(tmp_path):
    (tmp_path / "a.txt").write_text("the first file")
    (tmp_path / "b.txt").write_text("and the second one")
    x = [*b"the first file", EOT, *b"and the second one", EOT]
    data = TextDatasetForCausalLM(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], BYTE, seq_len=5, seed=42
    )
    starts = random.Random(42).sample(range(len(x) - 5 + 1), len(x) // 5)
    assert len(data) == len(starts) == 6
    for i, s in enumerate(starts):
        item = data[i]
        assert sorted(item) == ["attention_mask", "input_ids", "labels"]
        assert item["input_ids"].tolist() == item["labels"].tolist() == x[s : s + 5]
        assert item["attention_mask"].tolist() == [1] * 5
        assert {t.dtype for t in item.values()} == {torch.int64}
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert batch["labels"].shape == (4, 5)


def test_fineweb_dataset(tmp_path):
    paths = [shard(tmp_path / "a.npy", range(13)), shard(tmp_path / "b.npy", range(13, 25))]
    data = FineWebNPYDataset(paths, seq_len=4, seed=7)
    starts = random.Random(7).sample(range(22), 6)
    assert [data[i]["input_ids"][0].item() for i in range(len(data))] == starts
    ordered = FineWebNPYDataset(paths, seq_len=4, random_start=False, max_tokens=22)
    assert [item["labels"].tolist() for item in (ordered[i] for i in range(len(ordered)))] == [
        [s, s + 1, s + 2, s + 3] for s in (0, 4, 8, 12, 16)
    ]
    with pytest.raises(IndexError):
        ordered[5]


def test_compute_perplexity_is_the_models_own_loss():
    """Labels that are left out, padding, and more tokens than one chunk of logits holds."""
    model = tiny_model()
    ids = torch.arange(2 * 9).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.clone()
    labels[0, 4] = -100
    got = compute_perplexity(model, [{"input_ids": ids, "labels": labels}], "cpu")
    assert got["tokens"] == (8 - 1) + 8
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    got = compute_perplexity(model, [batch], "cpu")
    assert got["tokens"] == (8 - 1) + 4
    with torch.no_grad():
        _, loss = model(ids, attention_mask=mask, labels=labels)
    assert got["avg_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert got["ppl"] == pytest.approx(loss.exp().item(), rel=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "CHUNK_TOKENS", 5)
        assert compute_perplexity(model, [batch], "cpu") == pytest.approx(got, rel=1e-6)
    with pytest.raises(ValueError, match="no token to score"):
        compute_perplexity(model, [{"input_ids": ids[:, :1], "labels": ids[:, :1]}], "cpu")


# ---------------------------------------------------------------------------------------------
# scripts/make_corpus.py


def test_corpus_of_the_standard_library(tmp_path):
    out = tmp_path / "corpus"

    def make(*flags):
        args = [sys.executable, str(ROOT / "scripts" / "make_corpus.py"), "--out", str(out)]
        return subprocess.run([*args, *flags], capture_output=True, text=True)

    first = make("--shard-tokens", "4000000")
    assert first.returncode == 0, first.stderr
    train = open_stream("fineweb_npy", f"{out}/stdlib_train_*.npy", BYTE)
    val = open_stream("fineweb_npy", f"{out}/stdlib_val_*.npy", BYTE)
    assert len(train) > 10 * len(val) > 1_000_000 and len(train.file_names) > 1
    made = json.loads((out / "corpus.json").read_text())
    assert made["train"]["tokens"] == len(train) and made["val"]["tokens"] == len(val)
    # the validation shard is its text files, end-of-text before each document
    texts = [path.read_bytes() for path in sorted((out / "val_text").iterdir())]
    ids = val.read(0, len(val))
    documents = np.split(ids, np.flatnonzero(ids == EOT))[1:]
    assert sorted(bytes(d[1:].tolist()) for d in documents) == sorted(texts)
    assert np.load(out / "stdlib_val_000000.npy").dtype == np.uint16 and ids[0] == EOT

    def listing():
        files = (p for p in out.rglob("*") if p.is_file())
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = listing()
    again = make("--shard-tokens", "4000000")
    assert "already complete" in again.stdout and listing() == before
    assert make("--val-fraction", "0.2").returncode == 0
    assert len(open_stream("fineweb_npy", f"{out}/stdlib_val_*.npy", BYTE)) > 2 * len(val)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]  # nothing left behind
    (out / "corpus.json").unlink()
    assert make().returncode == 2 and (out / "val_text").is_dir()  # not ours: left alone
    nowhere = make("--out", str(out / "stdlib_val_000000.npy" / "corpus"))
    assert nowhere.returncode == 2 and "--out" in nowhere.stderr.splitlines()[-1]

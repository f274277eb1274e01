"""Token shards: every layout read back, and what is none refused in one line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.shards import open_shard


def saved(path, tokens, dtype=np.uint16):
    np.save(path, np.array(tokens, dtype=dtype))
    return path


def llmc(magic, version, n):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, n
    return header.tobytes()


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", "<i4", "<i8", ">i8", "<u8", "|u1", "<i2"])
def test_npy_is_mapped_where_its_header_ends(tmp_path, dtype):
    ids = [5, 6, 250 if np.dtype(dtype).itemsize == 1 else 32000]
    tokens, offset = open_shard(saved(tmp_path / "x.npy", ids, dtype))
    assert tokens.tolist() == ids and tokens.dtype == dtype
    assert (tmp_path / "x.npy").stat().st_size == offset + tokens.nbytes
    assert isinstance(tokens.base, np.memmap) and not tokens.flags.writeable


def test_bin_is_llmcs_by_its_header_and_else_nanogpts(tmp_path):
    ids = np.array([1, 2, 50256])
    for name, header, dtype in (
        ("nano.bin", b"", "<u2"),
        ("llmc.bin", llmc(20240520, 1, 3), "<u2"),
        ("wide.bin", llmc(20240801, 7, 3), "<u4"),
    ):
        (tmp_path / name).write_bytes(header + ids.astype(dtype).tobytes())
        tokens, offset = open_shard(tmp_path / name)
        assert (tokens.tolist(), tokens.dtype, offset) == (ids.tolist(), dtype, len(header))


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        open_shard(path)
    message = str(caught.value)
    assert "\n" not in message, message
    for word in (path.stem, *words):
        assert word in message, (word, message)


def test_shards_that_cannot_be_used(tmp_path):
    def array(name, value, **options):
        np.save(tmp_path / name, value, **options)
        return tmp_path / name

    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    whole = saved(tmp_path / "whole.npy", range(1000)).read_bytes()
    (tmp_path / "whole.npy").unlink()
    refused(array("float.npy", np.zeros(3)), "float64", "not integers", "dtype=np.uint32")
    refused(array("flags.npy", np.zeros(3, dtype=bool)), "bool", "not integers")
    refused(array("time.npy", np.zeros(3, dtype="M8[s]")), "not integers")
    refused(array("2d.npy", np.zeros((2, 3), dtype=np.uint16)), "(2, 3)", "1-D")
    refused(array("0d.npy", np.uint16(3)), "()", "1-D")
    refused(array("none.npy", np.zeros(0, dtype=np.uint16)), "holds no tokens")
    objects = np.array([{"a": 1}, None], dtype=object)
    refused(array("object.npy", objects, allow_pickle=True), "never loaded")
    refused(file("cut.npy", whole[:-1]), "truncated or still being written", "1000 tokens")
    refused(file("long.npy", whole + b"\0"), "damaged", "1000 tokens")
    refused(file("head.npy", whole[:20]), "not a .npy array")
    refused(file("pickle.npy", b"\x80\x04]."), "not a .npy array")
    refused(file("page.npy", b"<!DOCTYPE html><html>"), "web page")
    refused(file("lfs.npy", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull")
    refused(file("words.txt", b"some words"), "--data-mode text")
    refused(file("odd.bin", b"abc"), "odd number")
    refused(file("text.bin", b"plain words " * 20), "holds text")
    with (tmp_path / "huge.npy").open("wb") as npy:
        claim = {"descr": "<u2", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(npy, claim)
    refused(tmp_path / "huge.npy", "truncated", f"{10**15} tokens")
    refused(file("short.bin", llmc(20240520, 1, 10) + bytes(18)), "truncated", "10 tokens")
    refused(file("negative.bin", llmc(20240520, 1, -1)), "promises -1 tokens")
    refused(file("new.bin", llmc(20240520, 2, 10)), "version 2")


# ---------------------------------------------------------------------------------------------
# Raw ids: how wide they are


def drawn(vocab, n=4000, seed=0):
    """Ids as text has them: a few very often, most of the vocabulary now and then."""
    ranks = np.random.RandomState(seed).zipf(1.3, n) - 1
    return ranks % vocab


def raw(path, ids, dtype):
    path.write_bytes(np.asarray(ids).astype(dtype).tobytes())
    return path


VOCABULARIES = [65, 257, 4096, 32000, 50257, 50304, 65536]
LARGE = [100277, 128256, 151936, 262144]


@pytest.mark.parametrize("n", [4000, 4001, 4002])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_raw_ids_of_16_bits(vocab, n, tmp_path):
    ids = np.resize(drawn(vocab), n)
    tokens, _ = open_shard(raw(tmp_path / "x.bin", ids, "<u2"))
    assert tokens.dtype == "<u2" and np.array_equal(tokens, ids)


@pytest.mark.parametrize("n", [100, 4001])
@pytest.mark.parametrize("vocab", VOCABULARIES + LARGE)
@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_raw_ids_of_more_bits(vocab, n, dtype, tmp_path):
    """Read by twos they would be other tokens, and twice as many."""
    ids = np.resize(drawn(vocab), n)
    tokens, _ = open_shard(raw(tmp_path / "x.bin", ids, dtype))
    assert np.array_equal(tokens, ids)


@pytest.mark.parametrize(("vocab", "dtype"), [(50257, "<u2"), (151936, "<u4")])
def test_a_large_file_is_looked_at_in_places(vocab, dtype, tmp_path):
    ids = np.resize(drawn(vocab), 9_000_001)
    assert np.array_equal(open_shard(raw(tmp_path / "x.bin", ids, dtype))[0], ids)


@pytest.mark.parametrize("vocab", [2, 10, 15])
def test_few_ids_are_of_16_bits_where_they_can_be(vocab, tmp_path):
    """nanoGPT's sets of characters: all words are small, and not every second one is 0."""
    ids = np.random.RandomState(0).randint(0, vocab, 4000)
    assert np.array_equal(open_shard(raw(tmp_path / "x.bin", ids, "<u2"))[0], ids)
    refused(raw(tmp_path / "y.bin", ids, "<u4"), "--token-dtype uint16 or uint32")
    assert np.array_equal(open_shard(tmp_path / "y.bin", "uint32")[0], ids)


def test_a_doubt_is_asked_about(tmp_path):
    refused(raw(tmp_path / "zeros.bin", np.zeros(4000), "<u2"), "--token-dtype")
    refused(raw(tmp_path / "few.bin", [5, 600, 70, 8000], "<u4"), "--token-dtype")
    ids = drawn(128256)
    ids[::300] = -1  # padding of somebody's own
    refused(raw(tmp_path / "padded.bin", ids, "<i4"), "--token-dtype")
    few = open_shard(tmp_path / "few.bin", "uint32")[0]
    assert few.tolist() == [5, 600, 70, 8000]
    assert len(open_shard(tmp_path / "few.bin", "uint16")[0]) == 8
    assert len(open_shard(tmp_path / "few.bin", "uint8")[0]) == 16


def test_a_header_is_believed_and_not_contradicted(tmp_path):
    path = tmp_path / "llmc.bin"
    path.write_bytes(llmc(20240520, 1, 400) + drawn(15, 400).astype("<u2").tobytes())
    assert open_shard(path, "uint16")[0].dtype == "<u2"
    np.save(tmp_path / "a.npy", np.arange(9, dtype="<u2"))
    assert len(open_shard(tmp_path / "a.npy", "uint16")[0]) == 9
    for file in (path, tmp_path / "a.npy"):
        with pytest.raises(ValueError, match="its header says uint16, not uint32"):
            open_shard(file, "uint32")


@pytest.mark.parametrize(("code", "dtype"), [(1, "|u1"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatrons_index_states_the_width(code, dtype, tmp_path):
    ids = np.random.RandomState(0).randint(0, 12, 400)
    raw(tmp_path / "x.bin", ids, dtype)
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code])
    (tmp_path / "x.idx").write_bytes(head + bytes(16))
    tokens, _ = open_shard(tmp_path / "x.bin")
    assert tokens.dtype == dtype and np.array_equal(tokens, ids)
    (tmp_path / "x.idx").write_bytes(head[:-1] + b"\x07")
    refused(tmp_path / "x.bin", "x.idx", "dtype 7")


def test_a_raw_file_called_npy_needs_to_be_told(tmp_path):
    """OLMo's shards are such."""
    raw(tmp_path / "part.npy", drawn(100277), "<u4")
    refused(tmp_path / "part.npy", "not a .npy array", "--token-dtype")
    assert np.array_equal(open_shard(tmp_path / "part.npy", "uint32")[0], drawn(100277))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(scratch, data):
    path = scratch / "x.npy"
    path.unlink(missing_ok=True)  # an earlier example's mapping keeps its file
    whole = bytearray(saved(path, range(50)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        tokens, offset = open_shard(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert offset + tokens.nbytes <= len(whole)
        tokens.sum()

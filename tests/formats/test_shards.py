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


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4"])
def test_npy_is_mapped_where_its_header_ends(tmp_path, dtype):
    tokens, offset = open_shard(saved(tmp_path / "x.npy", [5, 6, 50256], dtype))
    assert tokens.tolist() == [5, 6, 50256] and tokens.dtype == dtype
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
    for word in (str(path), *words):
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
    refused(array("float.npy", np.zeros(3)), "float64", "uint16 or uint32")
    refused(array("signed.npy", np.zeros(3, dtype=np.int32)), "int32", "np.uint16")
    refused(array("bytes.npy", np.zeros(3, dtype=np.uint8)), "uint8")
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
    with (tmp_path / "huge.npy").open("wb") as npy:
        claim = {"descr": "<u2", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(npy, claim)
    refused(tmp_path / "huge.npy", "truncated", f"{10**15} tokens")
    refused(file("short.bin", llmc(20240520, 1, 10) + bytes(18)), "truncated", "10 tokens")
    refused(file("negative.bin", llmc(20240520, 1, -1)), "promises -1 tokens")
    refused(file("new.bin", llmc(20240520, 2, 10)), "version 2")


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

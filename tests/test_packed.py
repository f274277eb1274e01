"""packed.py: what is packed is read as if it were not, and nothing without an end is begun."""

import bz2
import gzip
import lzma
import os
import sys
import tracemalloc

import pytest
from builders import run_to_end

import packed

TEXT = b"".join(b"line %d of some text\n" % i for i in range(5000))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.TXT.GZ", "nothing-in-the-name"])
def test_packing_is_told_by_the_content(name, tmp_path):
    for data in (TEXT, gzip.compress(TEXT), gzip.compress(TEXT[:99]) + gzip.compress(TEXT[99:])):
        (tmp_path / name).write_bytes(data)
        with packed.open_packed(tmp_path / name) as file:
            assert file.peek(1)[:1] == b"l" and file.read() == TEXT
        with packed.open_packed(tmp_path / name) as file:
            assert list(file) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b.JSONL", ".jsonl"),
        ("a.Json.GZ", ".json"),
        ("a.ndjson.gzip", ".ndjson"),
        ("a.gz", ""),
        ("a", ""),
        ("v1.0/a.parquet", ".parquet"),
    ],
)
def test_suffixes(name, suffix):
    assert packed.suffix_of(name) == suffix


@pytest.mark.parametrize("cut", [3, 11, 500, -1, -9])
def test_damaged_gzip(cut, tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(TEXT)[:cut])
    with pytest.raises(ValueError, match=r"a\.gz: damaged gzip"), packed.open_packed(path) as f:
        f.read()


@pytest.mark.parametrize("filler", [b"\n", b" ", b"\0", b'{"text": "a"}\n'])
def test_a_bomb_is_given_up_early(filler, tmp_path, monkeypatch):
    """64 MB in 64 kB: by lines and whole, it costs neither the memory nor the time of all."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(filler * (2**20 // len(filler)))
    monkeypatch.setattr(packed, "ALWAYS_ALLOWED", 2**21)
    for read in (lambda file: sum(map(len, file)), lambda file: len(file.read())):
        with pytest.raises(ValueError, match="more than 200 times"), packed.open_packed(path) as f:
            read(f)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 200 times"), packed.open_packed(path) as f:
        f.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_what_has_no_end_is_not_begun(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero", "/dev/stdin", tmp_path):
        with pytest.raises(ValueError, match="not a file"):
            packed.require_file(path)
        with pytest.raises(ValueError, match="not a file"), packed.open_packed(path):
            pass


ENDLESS = ["/dev/zero", "/dev/urandom", "PIPE.txt", "PIPE.npy", "PIPE.bin", "PIPE.jsonl"]


def test_scripts_end_where_their_data_does_not(tmp_path):
    """One line for each, and none of them waits for a writer: one process that tries them all."""
    for name in ENDLESS[2:]:
        os.mkfifo(tmp_path / name)
    code = """
import sys, pathlib
from dataset import open_stream, build_tokenizer
from tasks.questions import read_data
from tasks.problems import read_problems
byte = build_tokenizer("byte")
for path in sys.argv[1:]:
    for read in (lambda: open_stream("text", path, byte), lambda: read_problems(path),
                 lambda: open_stream("fineweb_npy", path, None), lambda: read_data(path)):
        try:
            read()
        except ValueError as error:
            print(error)
"""
    paths = [str(tmp_path / name) if "PIPE" in name else name for name in ENDLESS]
    out = run_to_end([sys.executable, "-c", code, *paths]).stdout.splitlines()
    assert len(out) == 4 * len(ENDLESS)
    assert sum("not a file" in line for line in out) >= 3 * len(ENDLESS)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": [f"t{i}" for i in range(3000)], "id": list(range(3000))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    rows = list(packed.parquet_rows(tmp_path / "a.parquet", ["text"]))
    assert [row["text"] for _, row in rows] == table["text"].to_pylist()
    assert rows[2999] == (f"{tmp_path / 'a.parquet'}: row 3000", {"text": "t2999"})
    assert list(packed.parquet_rows(tmp_path / "a.parquet"))[7][1] == {"text": "t7", "id": 7}
    with pytest.raises(ValueError, match="has no column 'body', only text, id"):
        list(packed.parquet_rows(tmp_path / "a.parquet", ["body"]))
    data = (tmp_path / "a.parquet").read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"PAR1", b"", data[:100] + b"\xff" * 999):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.parquet: not a parquet file") as caught:
            list(packed.parquet_rows(tmp_path / "b.parquet"))
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(packed.parquet_rows(tmp_path / "a"))


@pytest.mark.parametrize(
    ("data", "command"),
    [
        (bz2.compress(TEXT), "bzip2 -d"),
        (lzma.compress(TEXT), "xz -d"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "zstd -d"),
        (b"PK\x03\x04\x14\x00", "unzip"),
    ],
)
def test_other_packings_say_what_unpacks_them(data, command, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=command), packed.open_packed(tmp_path / "a.txt"):
        pass

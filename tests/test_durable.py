"""durable.py against processes that are really killed, full disks, and files that are not what they
say."""

import gzip
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import durable
from durable import Journal, read_journal

ROOT = Path(durable.__file__).parent


# ---------------------------------------------------------------------------------------------
# Writing


def test_write_atomic_replaces_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    durable.write_atomic(path, "old")
    durable.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["x.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # readable by whom the umask lets


def test_json_is_strict_and_takes_numpy():
    obj = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), -math.inf],
        "i": np.int64(3),
        "b": np.bool_(True),
        "a": np.array([[1.5, np.nan]]),
        "p": Path("x/y"),
        1: (1, 2),
    }
    text = durable.dumps(obj)
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} in strict JSON")}
    back = json.loads(text, **refuse)
    assert back == {
        "nan": None,
        "inf": [None, None],
        "i": 3,
        "b": True,
        "a": [[1.5, None]],
        "p": "x/y",
        "1": [1, 2],
    }
    with pytest.raises(TypeError):
        durable.dumps({"x": object()})


def test_broken_unicode_survives(tmp_path):
    durable.write_json(tmp_path / "x.json", {"text": "é \ud800 \u2028 \n"})
    assert json.loads((tmp_path / "x.json").read_bytes())["text"] == "é \ud800 \u2028 \n"


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    """A file-size limit fails in the middle of a write, as a full disk does."""
    path = tmp_path / "x.bin"
    durable.write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"nothing was written: '.*x\.bin'") as caught:
            durable.write_atomic(path, b"n" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing was written"):
        durable.write_atomic(tmp_path / "file" / "x.json", "{}")  # the parent is a file
    directory = tempfile.mkdtemp()  # below /tmp itself: an unprivileged user can reach it
    os.chmod(directory, 0o555)
    euid = os.geteuid()
    try:
        if euid == 0:
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=r"Permission denied; nothing was written"):
            durable.write_atomic(Path(directory) / "x.json", "{}")
        assert os.listdir(directory) == []
    finally:
        os.seteuid(euid)
        shutil.rmtree(directory)


# ---------------------------------------------------------------------------------------------
# Journals


def test_journal_round_trip_and_single_writer(tmp_path):
    path = tmp_path / "new" / "j"
    records = [{"i": i, "text": "line\nbreak é" * i} for i in range(50)]
    with Journal(path) as journal:
        assert journal.records == [] and journal.bad == 0
        for record in records:
            journal.append(record)
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(path)
        assert read_journal(path) == (records, 0)  # readable while it grows
    with Journal(path) as journal:
        assert journal.records == records
        journal.append("last")
    assert read_journal(path) == ([*records, "last"], 0)
    assert read_journal(tmp_path / "none") == ([], 0)


def test_journal_cut_at_every_byte(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal:
        for i in range(4):
            journal.append({"i": i})
    data = path.read_bytes()
    ends = [0] + [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        with Journal(path) as journal:
            assert [r["i"] for r in journal.records] == list(range(whole))
            assert journal.bad == (cut not in ends)
            journal.append({"i": "new"})
        kept, bad = read_journal(path)
        assert [r["i"] for r in kept] == [*range(whole), "new"] and bad == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_journal_damage_costs_only_the_damaged_lines(data):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "j"
        with Journal(path) as journal:
            for i in range(10):
                journal.append({"i": i})
        raw = bytearray(path.read_bytes())
        hit = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.integers(0, 255).filter(lambda b: b != raw[hit]))
        line = raw[:hit].count(b"\n")
        newline = raw[hit] == 10
        raw[hit] = new
        path.write_bytes(raw)
        kept, bad = read_journal(path)
        lost = {line, line + 1} if newline else {line}
        assert [r["i"] for r in kept] == [i for i in range(10) if i not in lost]
        assert bad == 2 - newline if new == 10 else bad == 1


def test_journal_on_a_full_disk_ends_with_a_whole_record(tmp_path):
    path = tmp_path / "j"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        journal.append({"i": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="nothing was written"):
                journal.append({"i": 1, "x": "x" * 2000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert read_journal(path) == ([{"i": 0}], 0)
        journal.append({"i": 2})
    assert read_journal(path) == ([{"i": 0}, {"i": 2}], 0)


WRITER = """
import sys
from durable import Journal
with Journal(sys.argv[1]) as journal:
    i = len(journal.records)
    while True:
        journal.append({"i": i, "x": "x" * (i % 3000)})
        print(i, flush=True)
        i += 1
"""


def kill_writers(path, rounds, seed):
    """Kill -9 an appending process again and again; what it reported as appended must be there."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(int(rng.integers(1, 60))):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        reported = int(rest[-1]) if rest else reported
        numbers = [r["i"] for r in read_journal(path)[0]]
        assert numbers == list(range(len(numbers))) and len(numbers) > reported


def test_journal_survives_kill_9(tmp_path):
    kill_writers(tmp_path / "j", rounds=4, seed=0)


@pytest.mark.slow
def test_journal_survives_kill_9_many_times(tmp_path):
    kill_writers(tmp_path / "j", rounds=60, seed=1)


# ---------------------------------------------------------------------------------------------
# Reading what others wrote


def test_jsonl_plain_and_gzipped(tmp_path):
    lines = ['\ufeff{"a": "é"}', "", '{"a": 2}  ', '{"a": [3]}']
    data = "\r\n".join(lines).encode()
    for name, content in (("x.jsonl", data), ("x.jsonl.gz", gzip.compress(data))):
        path = tmp_path / name
        path.write_bytes(content)
        found = list(durable.read_jsonl(path))
        assert [where for where, *_ in found] == [f"{path}:{i}" for i in (1, 3, 4)]
        assert [value for *_, value in found] == [{"a": "é"}, {"a": 2}, {"a": [3]}]
        assert sum(size for _, size, _ in found) == len(data) - 2  # all but the blank line


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1}\n{"a": \n', r"x.jsonl:2: not a line of JSON"),
        (b'{"a": 1}\n[1]\n', r"x.jsonl:2: an object expected, not '\[1\]'"),
        (b'{"a": 1}\n"\xff"\n', r"x.jsonl:2: not UTF-8 at byte 10 .*iconv"),
        (b"[" * 200_000, r"x.jsonl:1: not a line of JSON"),
        (b"", r"x.jsonl is empty"),
        (b"<!DOCTYPE html><html></html>", r"x.jsonl is a web page.*download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer.*git lfs pull"),
        (gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"x.jsonl: damaged gzip"),
        (b"\x1f\x8b\x08damaged", r"x.jsonl: damaged gzip"),
    ],
)
def test_jsonl_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(durable.read_jsonl(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nowhere: no such file of samples"):
        list(durable.read_jsonl(tmp_path / "nowhere", "file of samples"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b'{"a": 1, "a": 2}', "is not JSON: the key 'a' stands there twice"),
        (b'{"b": [{"a": 1, "a": 2}]}', "the key 'a' stands there twice"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"[1]", "holds list, not a JSON object"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "is nested more than 64 deep"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"a": [' + b"{}," * 600_000 + b"{}]}", "has more than 500,000 lists and objects"),
        (b'{"a": ' + b" " * (9 << 20) + b"1}", "has more than 8,388,608 bytes"),
    ],
)
def test_objects_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        durable.read_object(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_object_is_read_as_it_stands(tmp_path):
    path, values = tmp_path / "x.json", {"é": [1, 2.5, None, {"a": {"b": [[]]}}], "n": 2**60}
    path.write_text(json.dumps(values))
    assert durable.read_object(path) == values


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("nowhere")
    readers = (durable.read_object, durable.refuse_impostor, lambda p: list(durable.read_jsonl(p)))
    for read in readers:
        for name, what in (
            ("fifo", "is a FIFO, not a file"),
            ("device", "is a device, not a file"),
            ("", "is a directory, not a file"),
            ("link", "is a link to nothing"),
        ):
            with pytest.raises(ValueError, match=what):
                read(tmp_path / name)

"""formats/pickles.py and archives.py: what real pickles say, and that nothing in them runs."""

import argparse
import collections
import functools
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from formats import archives, pickles, stored

PLAIN = {
    "text": "naïve \ud800 数据",
    "numbers": [0, 1, -1, 255, 256, 65536, -(1 << 31), 1 << 40, 1 << 2000, 1.5, math.inf],
    "bytes": b"\x00\xff",
    "nested": {"a": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 3: None, None: True, (1, "x"): 0},
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "long": "x" * 70_000,
    "many": list(range(3000)),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_are_as_pickle_has_them(protocol):
    if protocol < 4:  # sets and bytes are made by calls there
        values = {k: v for k, v in PLAIN.items() if k not in ("set", "frozen", "bytes")}
    else:
        values = PLAIN
    values = {k: v for k, v in values.items() if k != "numbers"} | {
        "numbers": [n for n in PLAIN["numbers"] if not isinstance(n, int) or abs(n) < 1 << 2000]
    }
    data = pickle.dumps(values, protocol)
    assert pickles.read(data, "here", {}) == pickle.loads(data) == values
    shared = [[1, 2]] * 3
    found = pickles.read(pickle.dumps([shared, shared], protocol), "here", {})
    assert found == [shared, shared] and found[0] is found[1] and found[0][0] is found[1][2]


class Made:
    """Something of this file's, which must never be made by reading."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def __setstate__(self, state):
        type(self).made += 1

    def __reduce__(self):
        return Made, (), {"x": [1]}


def test_classes_stay_names():
    data = pickle.dumps({"a": Made(), "b": functools.partial(int, "3")})
    with pytest.raises(ValueError, match=r"here holds test_pickles\.Made: making it could run"):
        pickles.read(data, "here", {})
    Made.made = 0
    found = pickles.read(data, "here", pickles.Anything())
    assert Made.made == 0 and found["a"].name.endswith("Made") and found["a"].state == {"x": [1]}
    assert found["b"].name == "functools.partial"
    calls = []
    names = pickles.Anything({f"{Made.__module__}.Made": lambda: calls.append(1) or "ours"})
    with pytest.raises(ValueError, match="damaged"):  # ours takes no state
        pickles.read(data, "here", names)
    assert calls == [1]


HOSTILE = [
    (os.system, ("true",)),
    (eval, ("1",)),
    (exec, ("1",)),
    (getattr, (1, "real")),
    (io.open, ("/etc/hostname",)),
    (__import__, ("os",)),
]


@pytest.mark.parametrize(("function", "args"), HOSTILE)
def test_what_would_run_something_is_refused_even_among_anything(function, args):
    class Call:
        def __reduce__(self):
            return function, args

    for protocol in (2, 4):
        data = pickle.dumps({"x": Call()}, protocol)
        with pytest.raises(ValueError, match="could run code") as error:
            pickles.read(data, "here", pickles.Anything())
        assert "\n" not in str(error.value)


def test_what_a_name_would_run():
    for name in ("posix.system", "builtins.eval", "operator.attrgetter", "torch.load", "a.b.popen"):
        assert pickles.runs_code(name), name
    for name in ("builtins.max", "builtins.set", "functools.partial", "numpy.dtype", "osmosis.x"):
        assert not pickles.runs_code(name), name


@pytest.mark.parametrize("protocol", [0, 4])
def test_items_are_counted(monkeypatch, protocol):
    data = pickle.dumps([[]] * 10 + list(range(5000)), protocol)
    assert len(pickles.read(data, "here", {})) == 5010
    monkeypatch.setattr(pickles, "MAX_STEPS", 4000)
    with pytest.raises(ValueError, match="here has too many items"):
        pickles.read(data, "here", {})
    assert len(pickles.read(data, "here", {}, most=40_000)) == 5010


def test_any_bytes_end_in_one_line():
    """Every truncation, and thousands of flipped bytes, of a real one."""
    data = pickle.dumps({"a": [1, 2.5, "x", (1, 2)], "b": {"c": collections.OrderedDict(d=1)}}, 4)
    generator = np.random.default_rng(0)
    changed = [data[:n] for n in range(len(data))]
    for _ in range(3000):
        flipped = bytearray(data)
        for at in generator.integers(0, len(data), generator.integers(1, 4)):
            flipped[at] = generator.integers(0, 256)
        changed.append(bytes(flipped))
    refused = 0
    for content in changed:
        try:
            pickles.read(content, "here", pickles.Anything())
        except ValueError as error:
            refused += 1
            assert str(error).startswith("here ") and "\n" not in str(error)
    assert refused > len(data)


# ---------------------------------------------------------------------------------------------
# Archives


def saved(tmp_path, value, **options):
    torch.save(value, tmp_path / "a.pt", **options)
    return tmp_path / "a.pt"


def test_tensors_of_every_form(tmp_path):
    t = torch.randn(6, 4)
    named = torch.nn.Parameter(torch.randn(3))
    named.ds_id = "0_10"  # an attribute makes another pickle of it
    values = {
        "plain": t,
        "turned": t.t(),
        "part": t[2:4, 1:3],
        "parameter": torch.nn.Parameter(t),
        "named": named,
        "half": t.bfloat16(),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(2.5),
        "ints": torch.arange(5),
    }
    beside = {"args": argparse.Namespace(lr=1, path=pathlib.Path("x")), "n": np.float64(2.0)}
    beside["rng"] = np.random.default_rng(0).integers(0, 9, 5)
    found = archives.open_archive(saved(tmp_path, {"model": values, **beside}))
    assert found["args"].name == "argparse.Namespace" and found["args"].state["lr"] == 1
    for name, value in values.items():
        assert torch.equal(stored.read_whole(found["model"][name]), value.detach()), name
        stored.check_sums(found["model"][name].pieces)


def test_archives_inside_of_files(tmp_path):
    inside = saved(tmp_path, torch.arange(6.0)).read_bytes()
    whole = tmp_path / "many"
    whole.write_bytes(b"before" + inside + b"PK\x05\x06after" + inside)
    for start in (6, 6 + len(inside) + 9):
        found = archives.open_archive(whole, start, len(inside))
        assert torch.equal(stored.read_whole(found), torch.arange(6.0))
    for start, length in ((0, len(inside)), (6, len(inside) - 30), (7, len(inside)), (-1, 5)):
        with pytest.raises(ValueError, match="many") as error:
            archives.open_archive(whole, start, length)
        assert "\n" not in str(error.value)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with its records changed: {name: bytes} -> {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in change(records).items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: {k: b"big" if "byteorder" in k else v for k, v in r.items()}, "big-endian"),
        (lambda r: {k: v for k, v in r.items() if "pkl" not in k}, "data.pkl is missing"),
        (lambda r: {k: v for k, v in r.items() if "data/0" not in k}, "claims 96 bytes, the file"),
        (lambda r: {k: v[:90] if "data/0" in k else v for k, v in r.items()}, "claims 96 bytes"),
        (lambda r: {k: v.replace(b"K\x06K\x04", b"K\x60K\x04") for k, v in r.items()},
         "claims more than the 96 bytes"),
    ],
)  # fmt: skip
def test_archives_that_do_not_hold(tmp_path, change, match):
    path = rewritten(saved(tmp_path, {"w": torch.ones(6, 4)}), change)
    with pytest.raises(ValueError, match=match):
        archives.open_archive(path)


def test_compressed_old_and_unchecked_archives(tmp_path):
    path = rewritten(saved(tmp_path, {"w": torch.ones(6, 4)}), dict, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        archives.open_archive(path)
    old = saved(tmp_path, {"w": torch.ones(6, 4)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"no archive of torch\.save.*without its zip format"):
        archives.open_archive(old)
    found = archives.open_archive(saved(tmp_path, {"w": torch.ones(6, 4)}))
    (piece,) = found["w"].pieces
    content = bytearray(path.read_bytes())
    content[piece.offset : piece.offset + 4] = struct.pack("<f", 2.0)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the checksum at byte"):
        stored.check_sums(found["w"].pieces)
    assert archives.mentions(path, (b"w", b"torch")) and not archives.mentions(path, (b"nothing",))
    path.write_bytes(b"PK\x03\x04")
    assert not archives.mentions(path, (b"w",))

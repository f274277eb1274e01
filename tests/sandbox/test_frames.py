"""jail.py: plain data over a pipe, and the system-call table."""

import collections
import decimal
import enum
import math
import random
import re
import struct
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import jail

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())  # surrogates too
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(collections.deque)
        | st.dictionaries(scalars, inner)
        | st.sets(scalars)
        | st.frozensets(scalars)
        | st.binary().map(bytearray)
    ),
)


def shape(value):
    """A value's types and contents, as text that == cannot blur (1, True and 1.0 differ)."""
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value).__name__, [shape(item) for item in value]
    if isinstance(value, dict):
        return "dict", [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(map(repr, map(shape, value)))
    return type(value).__name__, repr(value)


@settings(max_examples=150, deadline=None)
@given(values)
def test_plain_data_survives_the_pipe_with_its_types(value):
    assert shape(jail.decode(jail.encode(value))) == shape(value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | values.map(jail.encode), st.randoms())
def test_hostile_bytes_give_plain_data_or_a_known_error(frame, rng):
    frame = bytearray(frame)
    for _ in range(rng.randint(0, 3)):
        if frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
    try:
        value = jail.decode(bytes(frame))
    except (ValueError, TypeError, ArithmeticError, AttributeError):
        return
    plain = (type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set)
    plain += (
        frozenset,
        range,
        collections.deque,
        Fraction,
        decimal.Decimal,
        type(...),
        jail.Opaque,
    )
    plain += (type({}.keys()), type({}.values()), type({}.items()), type(iter([])))
    assert type(value) in plain or type(value).__module__ == "numpy"


def test_subclasses_are_cast_down_and_views_keep_their_kind():
    Point = collections.namedtuple("Point", "x y")
    Colour = enum.IntEnum("Colour", "red green")
    for value, plain in [
        (Point(1, 2), (1, 2)),
        (Colour.green, 2),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (type("Text", (str,), {"__eq__": lambda *_: True, "__hash__": str.__hash__})("no"), "no"),
    ]:
        got = jail.decode(jail.encode(value))
        assert type(got) is type(plain) and got == plain
    assert jail.decode(jail.encode({1: 2}.keys())) == {1}
    assert list(jail.decode(jail.encode({1: 2}.values()))) == [2]
    assert list(jail.decode(jail.encode({1: 2}.items()))) == [(1, 2)]
    assert list(jail.decode(jail.encode(n * n for n in range(3)))) == [0, 1, 4]
    assert math.isnan(jail.decode(jail.encode(math.nan)))


def test_other_objects_equal_nothing_and_keep_their_truth():
    class Yes:
        __eq__ = lambda *_: True  # noqa: E731
        __hash__ = None

    got = jail.decode(jail.encode([Yes(), re.compile("a")]))
    assert all(type(item) is jail.Opaque and bool(item) for item in got)
    assert got[0] != 1 and got[0] != got[1] and repr(got[0]) == "<Yes object>"
    with pytest.raises(jail.FrameError, match="argument of type Yes"):
        jail.encode([Yes()], strict=True)


def test_arrays_keep_dtype_shape_and_values():
    numpy = pytest.importorskip("numpy")
    for array in (
        numpy.arange(6, dtype=numpy.int16).reshape(2, 3).T,
        numpy.array(["ab", "c"]),
        numpy.zeros((0, 3)),
        numpy.array(3.5),
        numpy.array([True, False]),
    ):
        got = jail.decode(jail.encode(array))
        assert type(got) is numpy.ndarray and got.dtype == array.dtype
        assert got.shape == array.shape and (got == array).all()
    got = jail.decode(jail.encode(numpy.array({"a": [1]})))  # an array of objects
    assert got.dtype == object and got.shape == () and got[()] == {"a": [1]}
    got = jail.decode(jail.encode(numpy.int32(7)))
    assert type(got) is numpy.int32 and got == 7
    assert type(jail.decode(jail.encode(numpy.float64(7)))) is float
    for dtype, extent, raw in [("|O8", (1,), bytes(8)), ("<i8", (1 << 40,), bytes(8))]:
        body = b"a" + b"".join(map(jail.encode, (dtype, extent, raw)))
        with pytest.raises(jail.FrameError):
            jail.decode(body)
    with pytest.raises((jail.FrameError, ValueError)):
        jail.decode(b"a" + b"".join(map(jail.encode, ("<U0", (1 << 60,), b""))))


def test_one_object_met_twice_stays_one_object():
    row = [1]
    rows, again, table = jail.decode(jail.encode(([row, row, [1]], row, {"row": row})))
    assert rows[0] is rows[1] is again is table["row"] and rows[2] is not again
    row.append(row)
    with pytest.raises(jail.FrameError, match="contains itself"):
        jail.decode(jail.encode(row))
    doubling = []
    for _ in range(50):
        doubling = [doubling, doubling]
    with pytest.raises(jail.FrameError, match="items"):
        jail.decode(jail.encode(doubling))  # small on the pipe, 2^50 for who walks over it


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_caps_hold_on_both_sides(monkeypatch):
    frames = [jail.encode(nested(jail.MAX_DEPTH)), jail.encode("x" * 1000), jail.encode([0] * 1000)]
    assert all(jail.decode(frame) is not None for frame in frames)
    with pytest.raises(jail.FrameError, match="deeper"):
        jail.encode(nested(jail.MAX_DEPTH + 1))
    monkeypatch.setattr(jail, "MAX_FRAME", 1000)
    with pytest.raises(jail.FrameError, match="more than"):
        jail.encode("x" * 1001)
    monkeypatch.setattr(jail, "MAX_ITEMS", 100)
    with pytest.raises(jail.FrameError, match="items"):
        jail.encode([0] * 1000)
    with pytest.raises(jail.FrameError, match="items"):
        jail.decode(frames[2])
    monkeypatch.setattr(jail, "MAX_DEPTH", 5)
    with pytest.raises(jail.FrameError, match="deeper"):
        jail.decode(frames[0])


def test_system_call_numbers_are_the_kernel_headers():
    """Both columns of the table against the C headers, where they are installed."""
    headers = {
        1: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        2: Path("/usr/include/asm-generic/unistd.h"),
    }
    checked = 0
    for column, header in headers.items():
        if not header.exists():
            continue
        found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s", header.read_text())
        numbers = {name: int(number) for name, number in found}
        numbers.setdefault("newfstatat", numbers.get("fstatat"))
        for entry in [*jail._ALLOWED.split(), *jail._CONDITIONAL]:
            fields = entry.split(":")
            if fields[column]:
                assert numbers[fields[0]] == int(fields[column]), fields[0]
                checked += 1
    if not checked:
        pytest.skip("no kernel headers here")


def simulate(code, number, arguments, arch):
    """The kernel's answer, by an interpreter of the BPF operations that the filter uses."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    at = accumulator = 0
    while True:
        op, yes, no, k = struct.unpack_from("<HBBI", code, at * 8)
        at += 1
        if op == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif op == 0x06:
            return k
        else:
            holds = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[op]
            at += yes if holds else no


@pytest.mark.parametrize("machine, arch", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_allows_exactly_the_table(monkeypatch, machine, arch):
    column = 1 if machine == "x86_64" else 2
    monkeypatch.setattr(jail.os, "uname", lambda: type("U", (), {"machine": machine}))
    code, pids = jail.seccomp_filter()
    for at in pids:
        code[at : at + 4] = (4321).to_bytes(4, "little")
    allowed = {int(n) for e in jail._ALLOWED.split() if (n := e.split(":")[column])}
    special = {e.split(":")[0]: int(e.split(":")[column]) for e in jail._CONDITIONAL}
    special |= {"clone": jail._CLONE[column - 1], "clone3": jail._CLONE3}
    for number in [*range(600), 0x40000000, 0x40000027, 0xFFFFFFFF]:
        if number not in special.values():
            assert (simulate(code, number, [0] * 6, arch) == jail._ALLOW) == (number in allowed)
    rng = random.Random(0)
    for name, arguments, allow in [
        ("kill", [4321, 9], True),
        ("kill", [4320, 9], False),
        ("kill", [(1 << 64) - 1, 9], False),
        ("tgkill", [4321, 4321], True),
        ("tgkill", [1, 4321], False),
        ("clone", [0x3D0F00], True),
        ("clone", [17], False),
        ("clone", [0x10000000 | 17], False),
        ("clone3", [0], False),
        ("prctl", [15, 1], True),
        ("prctl", [1, 0], False),
        ("prctl", [22, 2], False),
        ("prlimit64", [0, 9, 0, 1], True),
        ("prlimit64", [0, 9, 1 << 32, 1], False),
        ("prlimit64", [0, 9, 8, 1], False),
        ("sendto", [3, 1, 1, 0, 0, 0], True),
        ("sendto", [3, 1, 1, 0, 1 << 40, 16], False),
        ("socketpair", [1, 1], True),
        ("socketpair", [2, 1], False),
        ("fcntl", [3, 4], True),
        ("fcntl", [3, 8], False),
        ("fcntl", [3, 10], False),
        ("ioctl", [0, 0x5401], True),
        ("ioctl", [0, 0x5412], False),
        ("ioctl", [0, 0x8901], False),
    ]:
        rest = [rng.randrange(1 << 32) for _ in range(6 - len(arguments))]
        answer = simulate(code, special[name], arguments + rest, arch)
        assert (answer == jail._ALLOW) == allow, (name, arguments)
    assert simulate(code, special["clone3"], [0] * 6, arch) == jail._ENOSYS
    assert simulate(code, 0, [0] * 6, 0x40000003) == jail._KILL  # i386

"""frames.py: plain data over a pipe."""

import collections
import decimal
import enum
import math
import os
import re
import struct
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import frames

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
    assert shape(frames.decode(frames.encode(value))) == shape(value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | values.map(frames.encode), st.randoms())
def test_hostile_bytes_give_plain_data_or_a_known_error(frame, rng):
    frame = bytearray(frame)
    for _ in range(rng.randint(0, 3)):
        if frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
    try:
        value = frames.decode(bytes(frame))
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
        frames.Opaque,
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
        got = frames.decode(frames.encode(value))
        assert type(got) is type(plain) and got == plain
    assert frames.decode(frames.encode({1: 2}.keys())) == {1}
    assert list(frames.decode(frames.encode({1: 2}.values()))) == [2]
    assert list(frames.decode(frames.encode({1: 2}.items()))) == [(1, 2)]
    assert list(frames.decode(frames.encode(n * n for n in range(3)))) == [0, 1, 4]
    assert math.isnan(frames.decode(frames.encode(math.nan)))


def test_other_objects_equal_nothing_and_keep_their_truth():
    class Yes:
        __eq__ = lambda *_: True  # noqa: E731
        __hash__ = None

    got = frames.decode(frames.encode([Yes(), re.compile("a")]))
    assert all(type(item) is frames.Opaque and bool(item) for item in got)
    assert got[0] != 1 and got[0] != got[1] and repr(got[0]) == "<Yes object>"
    with pytest.raises(frames.FrameError, match="argument of type Yes"):
        frames.encode([Yes()], strict=True)


def test_arrays_keep_dtype_shape_and_values():
    numpy = pytest.importorskip("numpy")
    for array in (
        numpy.arange(6, dtype=numpy.int16).reshape(2, 3).T,
        numpy.array(["ab", "c"]),
        numpy.zeros((0, 3)),
        numpy.array(3.5),
        numpy.array([True, False]),
    ):
        got = frames.decode(frames.encode(array))
        assert type(got) is numpy.ndarray and got.dtype == array.dtype
        assert got.shape == array.shape and (got == array).all()
    got = frames.decode(frames.encode(numpy.array({"a": [1]})))  # an array of objects
    assert got.dtype == object and got.shape == () and got[()] == {"a": [1]}
    got = frames.decode(frames.encode(numpy.int32(7)))
    assert type(got) is numpy.int32 and got == 7
    assert type(frames.decode(frames.encode(numpy.float64(7)))) is float
    for dtype, extent, raw in [("|O8", (1,), bytes(8)), ("<i8", (1 << 40,), bytes(8))]:
        body = b"a" + b"".join(map(frames.encode, (dtype, extent, raw)))
        with pytest.raises(frames.FrameError):
            frames.decode(body)
    with pytest.raises((frames.FrameError, ValueError)):
        frames.decode(b"a" + b"".join(map(frames.encode, ("<U0", (1 << 60,), b""))))


def test_one_object_met_twice_stays_one_object():
    row = [1]
    rows, again, table = frames.decode(frames.encode(([row, row, [1]], row, {"row": row})))
    assert rows[0] is rows[1] is again is table["row"] and rows[2] is not again
    row.append(row)
    with pytest.raises(frames.FrameError, match="contains itself"):
        frames.decode(frames.encode(row))
    doubling = []
    for _ in range(50):
        doubling = [doubling, doubling]
    with pytest.raises(frames.FrameError, match="items"):
        frames.decode(frames.encode(doubling))  # small on the pipe, 2^50 for who walks over it


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_caps_hold_on_both_sides(monkeypatch):
    deepest, most = frames.encode(nested(frames.MAX_DEPTH)), frames.encode([0] * 1000)
    for frame in (deepest, most, frames.encode("x" * 1000)):
        assert frames.decode(frame) is not None
    with pytest.raises(frames.FrameError, match="deeper"):
        frames.encode(nested(frames.MAX_DEPTH + 1))
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    with pytest.raises(frames.FrameError, match="more than"):
        frames.encode("x" * 1001)
    monkeypatch.setattr(frames, "MAX_ITEMS", 100)
    with pytest.raises(frames.FrameError, match="items"):
        frames.encode([0] * 1000)
    with pytest.raises(frames.FrameError, match="items"):
        frames.decode(most)
    monkeypatch.setattr(frames, "MAX_DEPTH", 5)
    with pytest.raises(frames.FrameError, match="deeper"):
        frames.decode(deepest)


def test_a_frame_crosses_a_pipe_whole_or_not_at_all():
    ours, theirs = os.pipe()
    frames.send_frame(theirs, b"text")
    os.write(theirs, struct.pack("<I", frames.MAX_FRAME + 1))
    os.close(theirs)
    assert frames.receive_frame(ours) == b"text"
    with pytest.raises(frames.FrameError, match="more than"):
        frames.receive_frame(ours)
    with pytest.raises(EOFError):
        frames.receive_frame(ours)
    os.close(ours)

"""frames.py, decoder.py and kinds.py: plain data over a pipe."""

import collections
import datetime
import decimal
import enum
import math
import os
import re
import struct
import tracemalloc
import uuid
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import decoder, frames
from sandbox.decoder import Decoder, Opaque, decode
from sandbox.frames import FrameError, encode
from sandbox.peer import Peer

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
    assert shape(decode(encode(value))) == shape(value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | values.map(encode), st.randoms())
def test_hostile_bytes_give_plain_data_or_a_known_error(frame, rng):
    frame = bytearray(frame)
    for _ in range(rng.randint(0, 3)):
        if frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)
    try:
        value = decode(bytes(frame))
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
        Opaque,
    )
    plain += (type({}.keys()), type({}.values()), type({}.items()), type(iter([])))
    assert type(value) in plain or type(value).__module__ == "numpy"


def test_subclasses_are_cast_down_and_views_keep_their_kind():
    Point = collections.namedtuple("Point", "x y")
    Colour = enum.IntEnum("Colour", "red green")
    for value, plain in [
        (Point(1, 2), (1, 2)),
        (Colour.green, 2),
        (type("Tally", (collections.Counter,), {})("aab"), collections.Counter("aab")),
        (collections.defaultdict(list, {1: [2]}), collections.defaultdict(list, {1: [2]})),
        (type("Text", (str,), {"__eq__": lambda *_: True, "__hash__": str.__hash__})("no"), "no"),
    ]:
        got = decode(encode(value))
        assert type(got) is type(plain) and got == plain
    assert decode(encode({1: 2}.keys())) == {1}
    assert list(decode(encode({1: 2}.values()))) == [2]
    assert list(decode(encode({1: 2}.items()))) == [(1, 2)]
    assert list(decode(encode(n * n for n in range(3)))) == [0, 1, 4]
    assert math.isnan(decode(encode(math.nan)))


def test_other_objects_equal_nothing_and_keep_their_truth():
    class Yes:
        __eq__ = lambda *_: True  # noqa: E731
        __hash__ = None

    got = decode(encode([Yes(), re.compile("a")]))
    assert all(type(item) is Opaque and bool(item) for item in got)
    assert repr(got[0]) == "<Yes object>"
    # Whose class says itself what it equals, that is neither equal to anything nor different.
    assert [got[0] == 1, got[0] != 1] == [False, False]
    plain = decode(encode([object()]))[0]
    assert plain != 1 and plain == plain
    with pytest.raises(FrameError, match="argument of type Yes"):
        encode([Yes()], strict=True)


def test_arrays_keep_dtype_shape_and_values():
    numpy = pytest.importorskip("numpy")
    for array in (
        numpy.arange(6, dtype=numpy.int16).reshape(2, 3).T,
        numpy.array(["ab", "c"]),
        numpy.zeros((0, 3)),
        numpy.array(3.5),
        numpy.array([True, False]),
    ):
        got = decode(encode(array))
        assert type(got) is numpy.ndarray and got.dtype == array.dtype
        assert got.shape == array.shape and (got == array).all()
    got = decode(encode(numpy.array({"a": [1]})))  # an array of objects
    assert got.dtype == object and got.shape == () and got[()] == {"a": [1]}
    got = decode(encode(numpy.int32(7)))
    assert type(got) is numpy.int32 and got == 7
    assert type(decode(encode(numpy.float64(7)))) is float
    for dtype, shape, raw in [
        ("|O8", b"\1" + encode(1), bytes(8)),
        ("<i8", b"\1" + encode(1 << 40), bytes(8)),
        ("<U0", b"\1" + encode(1 << 60), b""),
        ("<i8", b"\1" + encode(-1), b""),
        ("<i8", b"\1" + encode(True), bytes(8)),
    ]:
        with pytest.raises(ValueError, match="array"):
            decode(b"a" + shape + encode(dtype) + encode(raw))


def test_one_object_met_twice_stays_one_object():
    row = [1]
    rows, again, table = decode(encode(([row, row, [1]], row, {"row": row})))
    assert rows[0] is rows[1] is again is table["row"] and rows[2] is not again
    row.append(row)
    with pytest.raises(FrameError, match="contains itself"):
        decode(encode(row))
    doubling = []
    for _ in range(50):
        doubling = [doubling, doubling]
    with pytest.raises(FrameError, match="items"):
        decode(encode(doubling))  # small on the pipe, 2^50 for who walks over it


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_caps_hold_on_both_sides(monkeypatch):
    deepest, most = encode(nested(frames.MAX_DEPTH)), encode([0] * 1000)
    for frame in (deepest, most, encode("x" * 1000)):
        assert decode(frame) is not None
    with pytest.raises(FrameError, match="deeper"):
        encode(nested(frames.MAX_DEPTH + 1))
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    with pytest.raises(FrameError, match="more than"):
        encode("x" * 1001)
    for module in (frames, decoder):
        monkeypatch.setattr(module, "MAX_ITEMS", 100)
    with pytest.raises(FrameError, match="items"):
        encode([0] * 1000)
    with pytest.raises(FrameError, match="items"):
        decode(most)
    monkeypatch.setattr(decoder, "MAX_DEPTH", 5)
    with pytest.raises(FrameError, match="deeper"):
        decode(deepest)


def test_a_frame_crosses_a_pipe_whole_or_not_at_all():
    ours, theirs = os.pipe()
    frames.Pipe(ours, theirs).send(b"text")
    frames.Pipe(ours, theirs).send(b"x" * 20_000)
    os.write(theirs, struct.pack("<I", frames.MAX_FRAME + 1))
    os.close(theirs)
    pipe = frames.Pipe(ours, theirs)
    assert pipe.receive() == b"text" and pipe.receive() == b"x" * 20_000
    with pytest.raises(FrameError, match="more than"):
        pipe.receive()
    with pytest.raises(EOFError):
        frames.Pipe(ours, theirs).receive()
    os.close(ours)


# ---------------------------------------------------------------------------------------------
# Memory: nothing is made before its cost is charged


def memory_of(frame, links=None):
    """(what decoding a frame takes at most, what was charged for it, the error if it is one)"""
    reader, error = Decoder(frame, links), None
    tracemalloc.start()
    try:
        reader.read()
    except (ValueError, TypeError, ArithmeticError, AttributeError) as caught:
        error = caught
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, reader.memory, error


DENSE = [
    [[] for _ in range(3000)],
    [() for _ in range(3000)],
    [set() for _ in range(1000)],
    [{} for _ in range(1000)],
    [collections.deque() for _ in range(1000)],
    [bytearray() for _ in range(1000)],
    [bytes([i % 256, 1]) for i in range(3000)],
    ["é" * (i % 3) for i in range(3000)],
    ["\U0001f600" + "x" * 1000 for _ in range(300)],
    {"x" * (i % 3) + str(i): i for i in range(3000)},
    set(range(5000)),
    frozenset(map(str, range(5000))),
    list(range(1 << 40, (1 << 40) + 5000)),
    [float(i) for i in range(5000)],
    [i if i % 2 else float(i) for i in range(5000)],
    [1 << 100 for _ in range(3000)],
    [1j * i for i in range(3000)],
    [range(i) for i in range(3000)],
    [Fraction(i, 7) for i in range(2000)],
    [decimal.Decimal(i) / 7 for i in range(2000)],
    [datetime.datetime(2020, 1, 1, microsecond=i) for i in range(2000)],
    [datetime.timedelta(i) for i in range(2000)],
    [uuid.UUID(int=i) for i in range(1000)],
    [object() for _ in range(2000)],
    [collections.Counter("ab") for _ in range(1000)],
    [collections.OrderedDict(a=1) for _ in range(1000)],
    [collections.defaultdict(list) for _ in range(1000)],
    "x" * 100_000,
    b"x" * 100_000,
]


@pytest.mark.parametrize("at", range(len(DENSE)))
def test_what_is_charged_is_at_least_what_it_takes(at):
    frame = encode(DENSE[at])
    decode(frame)  # what is imported and cached on the way is no cost of a value
    peak, charged, error = memory_of(frame)
    assert error is None and peak <= charged + 20_000, (peak, charged, DENSE[at][:1])


def test_arrays_are_charged_too():
    numpy = pytest.importorskip("numpy")
    for array in (
        numpy.zeros(100_000),
        [numpy.zeros(1) for _ in range(1000)],
        [numpy.int8(1) for _ in range(1000)],
        numpy.array([[None] * 50] * 50),
        numpy.array(["text"] * 5000),
    ):
        frame = encode(array)
        decode(frame)
        peak, charged, error = memory_of(frame)
        assert error is None and peak <= charged + 20_000, (peak, charged, error)


@pytest.mark.parametrize("tag", sorted(decoder._READERS.keys() | decoder._BUILDERS.keys()))
def test_no_declared_size_is_believed(tag):
    """Every tag with all that may follow it claiming to be huge: no more than what is there."""
    for count in (1 << 16, 1 << 20, (1 << 31) - 1, (1 << 32) - 1):
        number, size = struct.pack("<q", count), struct.pack("<I", count)
        for body in (
            size + b"T" * 30,
            b"*" + size + b"T" * 30,
            b"=" + size + b"\1\0\0\0q" + size,
            b"=" + size + size + b"q" * 30,
            b"s" + size + b"\0" * 30,
            b"N*" + size,
            b"i" + number + b"*" + size,
            b"s\0\0\0\0" + size,
            b"\1i" + number + encode("<i8") + encode(b"12345678"),
            b"\1i" + number + encode("<U999999") + encode(b""),
            b"\2i" + number + encode(0) + encode("<U999999") + encode(b""),
            b"\1" + encode(1.5) + encode("<i8") + encode(b"12345678"),
            b"\1" + encode(range(1 << 60)) + encode("<i8") + encode(b"12345678"),
            b"\1" + encode(-1) + encode("<i8") + encode(b""),
            b"\377" + b"i" + number,
            b"\1" + size,
        ):
            peak, _, _ = memory_of(tag + body)
            assert peak < 100_000, (tag, body, peak)
            peak, _, _ = memory_of(b"l*\2\0\0\0" + tag + body)
            assert peak < 100_000, (tag, body, peak)


def test_a_value_too_large_for_the_judge_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(decoder, "MAX_MEMORY", 1 << 20)
    for value in (list(range(50_000)), [[]] * 1 + [[] for _ in range(20_000)], "x" * (2 << 20)):
        frame = encode(value)
        peak, _, error = memory_of(frame)
        assert isinstance(error, FrameError) and peak < (3 << 20) + len(frame)


@settings(max_examples=150, deadline=None)
@given(values.map(encode) | st.binary(max_size=80), st.randoms())
def test_damaged_frames_take_no_more_than_is_charged(frame, rng):
    frame = bytearray(frame)
    for _ in range(rng.randint(0, 4)):
        if frame:
            odd = rng.choice([0, 255, *b"*=lSdqaOtpXPLGKYeAU!()@", rng.randrange(256)])
            frame[rng.randrange(len(frame))] = odd
    for links in (None, Peer(frames.Pipe(-1, -1), {"Shared": Shared})):
        peak, charged, _ = memory_of(bytes(frame), links)
        assert peak <= charged + 200_000


class Shared:
    """A class that both ends have."""


Point = collections.namedtuple("Point", "x y")


def carried():
    """Frames of what is no plain data."""
    error = ValueError("text", [1])
    error.__cause__, error.more = KeyError("k"), Shared()
    group = ExceptionGroup("several", [error, OSError(2, "no", "file")])
    things = [Shared(), [Shared(), len], Point(1, 2), error, group, int, ValueError, Shared]
    peer = Peer(frames.Pipe(-1, -1), {"Shared": Shared})
    return [frames.Encoder(False, peer).frame([thing, "x"]) for thing in things]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(carried()), st.integers(0, 400), st.integers(0, 255))
def test_damaged_objects_are_objects_or_a_known_error(frame, at, byte):
    frame = bytearray(frame)
    frame[at % len(frame)] = byte
    peak, charged, _ = memory_of(bytes(frame), Peer(frames.Pipe(-1, -1), {"Shared": Shared}))
    assert peak <= charged + 200_000

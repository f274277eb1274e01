"""Plain data on a pipe: how the tests and a candidate talk to each other.

    send_frame(fd, encode(([1, 2], {"key": "text"})))
    args, kwargs = decode(receive_frame(fd))

A frame is a length and as many bytes. The bytes may come from an enemy: they decode to plain data
of exact builtin types (and Fraction, Decimal, deque, numpy, Opaque) or to an error, never to code,
and are limited in size, depth and number of items.
"""

import collections
import itertools
import os
import re
import struct
import sys

MAX_FRAME = 16 << 20  # bytes
MAX_ITEMS = 1_000_000  # an empty deque of 4 frame bytes takes 760 bytes: this bounds the judge
MAX_DEPTH = 200


class FrameError(ValueError):
    """What should cross the pipe is malformed, or over MAX_FRAME, MAX_ITEMS or MAX_DEPTH."""


def encode(value: object, strict: bool = False) -> bytes:
    """Plain data -> bytes. Subclasses of builtin types are cast down; iterators are drained.

    A mutable container met twice is sent once, so that it stays one object. Objects of any other
    type keep only their type's name and truth, or raise FrameError if `strict`. Raises FrameError
    over the caps.
    """
    encoder = _Encoder(strict)
    encoder.put(value, 0)
    frame = b"".join(encoder.out)
    if len(frame) > MAX_FRAME:
        raise FrameError(f"a value of more than {MAX_FRAME >> 20} MB")
    return frame


class _Encoder:
    """A value on its way to bytes. met: the number of each mutable container that came by."""

    def __init__(self, strict):
        self.strict, self.out, self.met = strict, [], {}

    def put_bytes(self, tag, raw):
        if len(raw) > MAX_FRAME:
            raise FrameError(f"a value of more than {MAX_FRAME >> 20} MB")
        self.out.append(tag + struct.pack("<I", len(raw)) + raw)

    def put_all(self, tag, parts, depth):
        self.out.append(tag)
        for part in parts:
            self.put(part, depth + 1)

    def put(self, obj, depth):
        if depth > MAX_DEPTH:
            raise FrameError(f"a value nested deeper than {MAX_DEPTH}")
        if len(self.out) > MAX_ITEMS:
            raise FrameError(f"a value of more than {MAX_ITEMS} items")
        kind = type(obj)
        if kind in _MUTABLE:
            if id(obj) in self.met:
                self.out.append(b"R" + struct.pack("<I", self.met[id(obj)]))
                return
            self.met[id(obj)] = len(self.met)
        if kind is int and -(1 << 63) <= obj < 1 << 63:
            self.out.append(b"i" + struct.pack("<q", obj))
        elif kind is str:
            self.put_bytes(b"s", obj.encode("utf-8", "surrogatepass"))
        elif obj is None:
            self.out.append(b"N")
        elif kind is bool:
            self.out.append(b"T" if obj else b"F")
        elif kind is float:
            self.out.append(b"f" + struct.pack("<d", obj))
        elif kind in _SEQUENCES:
            self.put_all(_SEQUENCES[kind] + struct.pack("<I", len(obj)), obj, depth)
        elif kind is dict:
            pairs = [part for pair in obj.items() for part in pair]
            self.put_all(b"d" + struct.pack("<I", len(obj)), pairs, depth)
        elif kind is int:
            raw = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            self.put_bytes(b"I", raw)
        elif kind is bytes or kind is bytearray:
            self.put_bytes(b"b" if kind is bytes else b"B", bytes(obj))
        elif kind is complex:
            self.out.append(b"c" + struct.pack("<dd", obj.real, obj.imag))
        elif kind is range:
            self.put_all(b"r", (obj.start, obj.stop, obj.step), depth)
        elif obj is Ellipsis:
            self.out.append(b"E")
        elif kind is _DICT_ITEMS:
            self.put_all(b"m", [dict(obj)], depth)
        else:
            self.put_other(obj, depth)

    def put_other(self, obj, depth):
        numpy = sys.modules.get("numpy")
        arrays = (numpy.ndarray, numpy.generic) if numpy else ()
        # numpy.float64 is a float, numpy.str_ a str: those are cast down like any subclass.
        if isinstance(obj, arrays) and not isinstance(obj, (float, complex, str, bytes)):
            array = numpy.ascontiguousarray(obj)
            if array.dtype.kind == "O":
                return self.put_all(b"O", (numpy.shape(obj), tuple(array.flat)), depth)
            if array.dtype.kind in "biufcSU":
                parts = array.dtype.str, numpy.shape(obj), array.tobytes()
                return self.put_all(b"a" if isinstance(obj, numpy.ndarray) else b"g", parts, depth)
        for base in _BASES:
            if isinstance(obj, base):
                return self.put(base(obj), depth)
        # Nobody has an object of a module not imported, and importing these would slow every fork.
        if (module := sys.modules.get("fractions")) and isinstance(obj, module.Fraction):
            return self.put_all(b"/", (int(obj.numerator), int(obj.denominator)), depth)
        if (module := sys.modules.get("decimal")) and isinstance(obj, module.Decimal):
            return self.put_bytes(b"D", str(obj).encode())
        if isinstance(obj, collections.abc.Iterator):
            items = list(itertools.islice(obj, MAX_ITEMS + 1))
            return self.put_all(b"n", [tuple(items)], depth)
        if self.strict:
            raise FrameError(f"an argument of type {type(obj).__name__}, which is not plain data")
        self.put_bytes(b"o", type(obj).__name__.encode("utf-8", "replace"))
        self.put(bool(obj), depth + 1)


_DICT_KEYS, _DICT_VALUES, _DICT_ITEMS = type({}.keys()), type({}.values()), type({}.items())
_MUTABLE = {list, dict, set, bytearray, collections.deque}
_SEQUENCES: dict[type, bytes] = {
    list: b"l",
    tuple: b"t",
    set: b"S",
    frozenset: b"Z",
    collections.deque: b"q",
}
_FROM_ITEMS: dict = {tag: kind for kind, tag in _SEQUENCES.items()}
_SEQUENCES |= {_DICT_KEYS: b"k", _DICT_VALUES: b"v"}
_FROM_ITEMS[b"k"] = lambda items: dict.fromkeys(items).keys()
_FROM_ITEMS[b"v"] = lambda items: dict(enumerate(items)).values()
_CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis}
_BASES: tuple[type, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
)
_BASES += (collections.deque,)


class Opaque:
    """Stands for an object that is no plain data: equal to nothing but itself, true as it was."""

    def __init__(self, name, truth):
        self.name, self.truth = name, truth

    def __bool__(self):
        return self.truth

    def __repr__(self):
        return f"<{self.name} object>"


def decode(frame: bytes) -> object:
    """Bytes -> plain data of exact builtin types (and Fraction, Decimal, deque, numpy, Opaque).

    The bytes may come from an enemy: raises FrameError, ArithmeticError, TypeError, ValueError or
    ImportError (arrays want numpy).
    """
    decoder = _Decoder(frame)
    value = decoder.get(0)
    if decoder.at != len(frame):
        raise FrameError(f"{len(frame) - decoder.at} bytes too many")
    return value


class _Decoder:
    """Bytes on their way to a value. met: the mutable containers that came by, with how many items
    each is, in their order."""

    def __init__(self, frame):
        self.frame, self.at, self.items, self.met = frame, 0, 0, []

    def take(self, n):
        if n > len(self.frame) - self.at:
            raise FrameError("a truncated value")
        self.at += n
        return self.frame[self.at - n : self.at]

    def count(self):
        return struct.unpack("<I", self.take(4))[0]

    def get_all(self, n, depth):
        return [self.get(depth + 1) for _ in range(n)]

    def get(self, depth):
        self.items += 1
        if depth > MAX_DEPTH or self.items > 2 * MAX_ITEMS:
            raise FrameError(f"a value deeper than {MAX_DEPTH} or of too many items")
        tag = self.take(1)
        if tag == b"i":
            return struct.unpack("<q", self.take(8))[0]
        if tag == b"s":
            return self.take(self.count()).decode("utf-8", "surrogatepass")
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"f":
            return struct.unpack("<d", self.take(8))[0]
        if tag in b"lSqdB":
            return self.get_mutable(tag, depth)
        if tag in _FROM_ITEMS:
            return _FROM_ITEMS[tag](self.get_all(self.count(), depth))
        return self.get_other(tag, depth)

    def get_mutable(self, tag, depth):
        index, before = len(self.met), self.items
        self.met.append(None)
        n = self.count()
        if tag == b"d":
            value = {self.get(depth + 1): self.get(depth + 1) for _ in range(n)}
        elif tag == b"B":
            value = bytearray(self.take(n))
        else:
            value = _FROM_ITEMS[tag](self.get_all(n, depth))
        self.met[index] = value, self.items - before
        return value

    def get_other(self, tag, depth):
        if tag == b"R":
            index = self.count()
            if index >= len(self.met) or self.met[index] is None:
                raise FrameError("a value that contains itself")
            value, items = self.met[index]
            self.items += items  # as if it were sent again: the caps bound what the tests walk over
            return value
        if tag == b"I":
            return int.from_bytes(self.take(self.count()), "little", signed=True)
        if tag == b"b":
            return self.take(self.count())
        if tag == b"c":
            return complex(*struct.unpack("<dd", self.take(16)))
        if tag == b"r":
            return range(*self.get_all(3, depth))
        if tag == b"m":
            return self.get(depth + 1).items()
        if tag == b"n":
            return iter(self.get(depth + 1))
        if tag == b"o":
            name = self.take(self.count()).decode("utf-8", "replace")[:80]
            return Opaque(name, self.get(depth + 1) is True)
        if tag == b"/":
            from fractions import Fraction

            return Fraction(*self.get_all(2, depth))
        if tag == b"D":
            from decimal import Decimal

            return Decimal(self.take(self.count()).decode("ascii"))
        if tag in b"ag":
            array = _array(*self.get_all(3, depth))
            return array if tag == b"a" else array[()]
        if tag == b"O":
            return _object_array(*self.get_all(2, depth))
        raise FrameError(f"an unknown tag {tag}")


def _array(dtype, shape, raw):
    import numpy  # only programs that return arrays pay for it

    if not re.fullmatch(r"[<>|=][biufcSU][0-9]{1,6}", dtype) or type(raw) is not bytes:
        raise FrameError("a malformed array")
    dtype, size = numpy.dtype(dtype), 1
    for extent in shape:
        size *= extent
    if dtype.itemsize == 0 or size * dtype.itemsize != len(raw) or len(shape) > 32:
        raise FrameError("an array whose size is not its shape's")
    return numpy.frombuffer(raw, dtype).reshape(shape).copy()


def _object_array(shape, items):
    import numpy

    array = numpy.empty(len(items), object)
    for i, item in enumerate(items):
        array[i] = item
    return array.reshape(shape)


def send_frame(fd: int, frame: bytes) -> None:
    """Write one frame (length, bytes) to a pipe. Raises BrokenPipeError when nobody reads."""
    data = memoryview(struct.pack("<I", len(frame)) + frame)
    while data:
        data = data[os.write(fd, data) :]


def receive_frame(fd: int) -> bytes:
    """Read one frame from a pipe. Raises EOFError when nobody writes, FrameError over the cap."""
    (size,) = struct.unpack("<I", _read(fd, 4))
    if size > MAX_FRAME:
        raise FrameError(f"a frame of {size} bytes, more than {MAX_FRAME}")
    return _read(fd, size)


def _read(fd, size):
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

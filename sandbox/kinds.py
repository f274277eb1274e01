"""Plain data beyond the builtin types: numbers and dates of the standard library, numpy's arrays.

Nobody has an object of a module that is not imported, and importing these would slow every fork: a
module is only looked up where objects are written, and imported where they are read.
"""

import importlib
import math
import re
import sys
from typing import Any

_DTYPE = re.compile(r"[<>|=]([biufcSU][0-9]{1,6}|[mM]8(\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
MAX_ARRAY = 64 << 20  # bytes


def _date(obj):
    return obj.year, obj.month, obj.day


def _time(obj):
    return obj.hour, obj.minute, obj.second, obj.microsecond, obj.tzinfo


# tag: module, type, its parts in the order of its arguments. A datetime is a date: it comes first.
_KINDS: dict[bytes, tuple] = {
    b"/": ("fractions", "Fraction", lambda obj: (int(obj.numerator), int(obj.denominator))),
    b"D": ("decimal", "Decimal", lambda obj: (sys.modules["decimal"].Decimal.__str__(obj),)),
    b"x": ("datetime", "datetime", lambda obj: _date(obj) + _time(obj)),
    b"y": ("datetime", "date", _date),
    b"h": ("datetime", "time", _time),
    b"j": ("datetime", "timedelta", lambda obj: (obj.days, obj.seconds, obj.microseconds)),
    b"z": ("datetime", "timezone", lambda obj: obj.__getinitargs__()),
    b"J": ("zoneinfo", "ZoneInfo", lambda obj: (obj.key,)),
    b"u": ("uuid", "UUID", lambda obj: (f"{obj.int:032x}",)),
}
_PART_TYPES = {b"/": (int,), b"D": (str,), b"j": (int,), b"J": (str,), b"u": (str,)}


def is_one(module: str, name: str) -> bool:
    """Whether a type is one of these."""
    return any(entry[:2] == (module, name) for entry in _KINDS.values())


def put(encoder: Any, obj: object, kind: type, depth: int) -> bool:
    """Whether it was one of these, and is written."""
    for tag, (module, name, parts_of) in _KINDS.items():
        found = sys.modules.get(module)
        if found and getattr(found, name, None) in kind.__mro__:
            parts = parts_of(obj)
            encoder.put_all(tag + bytes([len(parts)]), parts, depth)
            return True
    numpy = sys.modules.get("numpy")
    if numpy and (numpy.ndarray in kind.__mro__ or numpy.generic in kind.__mro__):
        return _put_array(encoder, numpy.asarray(obj), obj, depth)
    return False


def _put_array(encoder, array, obj, depth):
    """array: obj itself, or a number of numpy's as an array."""
    shape, dtype = array.shape, array.dtype
    if dtype.kind != "O" and not _DTYPE.fullmatch(dtype.str):
        return False
    if array is obj and encoder.is_known(obj):
        return True
    tag = b"O" if dtype.kind == "O" else b"a" if array.ndim or array is obj else b"g"
    encoder.put_all(tag + bytes([len(shape)]), map(int, shape), depth)
    if dtype.kind == "O":
        encoder.put_items(tuple(array.flat), depth)
    else:
        encoder.put(dtype.str, depth)
        encoder.put(array.tobytes(), depth)
    return True


def _read(tag, decoder, depth):
    module, name, _ = _KINDS[tag]
    decoder.charge(200)
    parts = decoder.get_all(decoder.take(1)[0], depth)
    if tag in _PART_TYPES and not {*map(type, parts)} <= {*_PART_TYPES[tag]}:
        raise ValueError(f"a malformed {name}")
    return getattr(importlib.import_module(module), name)(*parts)


def _read_shape(decoder, depth):
    decoder.charge(300)
    shape = decoder.get_all(decoder.take(1)[0], depth)
    sound = all(type(extent) is int and extent >= 0 for extent in shape) and len(shape) <= 32
    if not sound or math.prod(max(extent, 1) for extent in shape) > MAX_ARRAY:
        raise ValueError("an array of a malformed shape")
    return shape


def _read_array(decoder, depth):
    shape, dtype, raw = _read_shape(decoder, depth), decoder.get(depth), decoder.get(depth)
    if type(dtype) is not str or not _DTYPE.fullmatch(dtype) or type(raw) is not bytes:
        raise ValueError("a malformed array")
    import numpy  # only programs that return arrays pay for it

    dtype = numpy.dtype(dtype)
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError("an array whose size is not its shape's")
    decoder.charge(len(raw))
    return numpy.frombuffer(raw, dtype).reshape(shape).copy()


def _read_objects(decoder, depth):
    shape, items = _read_shape(decoder, depth), decoder.get_items(depth)
    if math.prod(shape) != len(items):
        raise ValueError("an array whose size is not its shape's")
    import numpy

    array = numpy.empty(len(items), object)
    for i, item in enumerate(items):
        array[i] = item
    return array.reshape(shape)


READERS: dict = {tag: lambda d, depth, tag=tag: _read(tag, d, depth) for tag in _KINDS}
READERS |= {b"g": lambda d, depth: _read_array(d, depth)[()]}
BUILDERS: dict = {b"a": _read_array, b"O": _read_objects}  # what may be changed by who holds it

"""Plain data on a pipe, the receiver's side: bytes to values.

The bytes may come from an enemy. They decode to data of exact builtin types, of a few of the
standard library's and numpy's (kinds.py) and Opaque, or to an error, never to code. A value is
limited in depth, in number of items, and in the memory that it may take: each declared size is held
against the bytes that are there, and its cost charged, before anything is made of it.
"""

import itertools
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

from sandbox import kinds
from sandbox.frames import (
    COMPLEX,
    COUNT,
    FACTORIES,
    FLOAT,
    INT,
    MAX_DEPTH,
    MAX_ITEMS,
    STACK,
    FrameError,
)

MAX_MEMORY = 256 << 20  # bytes that a frame's value may take, by the estimates below


class Opaque:
    """Stands for an object that is no plain data: equal to nothing but itself, true as it was.

    compares: whether its class says itself what it equals. Nobody here can tell: then it is neither
    equal to anything nor different from it.
    """

    __slots__ = ("compares", "name", "truth")

    def __init__(self, name, truth, compares=False):
        self.name, self.truth, self.compares = name, truth, compares

    def __ne__(self, other):
        return False if self.compares else self is not other

    def __bool__(self):
        return self.truth

    def __repr__(self):
        return f"<{self.name} object>"


def decode(frame: bytes) -> object:
    """Bytes -> plain data. They may come from an enemy: raises FrameError, ArithmeticError,
    TypeError, ValueError or ImportError (arrays want numpy)."""
    return Decoder(frame).read()


class Decoder:
    """Bytes on their way to a value.

    linked: the mutable containers that came by, in the encoder's order; sizes: how many items each
    has. ours: {number: container} of those that we sent, which the bytes may refer to and renew.
    """

    def __init__(self, frame, links=None, ours=None):
        self.frame, self.links, self.ours = frame, links, ours or {}
        self.at = self.items = self.memory = 0
        self.linked, self.sizes, self.open = [], [], {}
        self.result: Any = None

    def read(self) -> Any:
        """The value that all of the bytes are, `result` from then on."""
        tag = self.frame[:1]
        if tag in _SHORT:
            number = COUNT.unpack(self.take(5)[1:])[0]
            self.result = _SHORT[tag](self, number)
        else:
            self.result = self._get_deep()
        if self.at != len(self.frame):
            raise FrameError(f"{len(self.frame) - self.at} bytes too many")
        return self.result

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > len(self.frame) - self.at:
            raise FrameError("a truncated value")
        self.at += n
        return self.frame[self.at - n : self.at]

    def count(self) -> int:
        return COUNT.unpack(self.take(4))[0]

    def charge(self, memory: int, items: int = 0) -> None:
        """Before something is made: what it takes, and how many more values there are."""
        self.memory += memory
        self.items += items
        if self.memory > MAX_MEMORY or self.items > MAX_ITEMS:
            raise FrameError(f"a value of more than {MAX_ITEMS} items or {MAX_MEMORY >> 20} MB")

    def get(self, depth: int) -> Any:
        """The next value. Its own 56 bytes (a number and where it stands) are charged already."""
        at = self.at
        tag = self.frame[at : at + 1]
        self.at = at + 1
        if tag == b"i" and at + 9 <= len(self.frame):
            self.at = at + 9
            return INT.unpack_from(self.frame, at + 1)[0]
        if depth > MAX_DEPTH:
            raise FrameError(f"a value nested deeper than {MAX_DEPTH}")
        if tag in _READERS:
            return _READERS[tag](self, depth)
        if tag in _BUILDERS:
            return self.link(_BUILDERS[tag], depth)
        if self.links:
            return self.links.get(self, tag, depth)
        raise FrameError(f"an unknown tag {tag}" if tag else "a truncated value")

    def _get_deep(self):
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + STACK)
        try:
            return self.get(0)
        finally:
            sys.setrecursionlimit(limit)

    def get_scalars(self) -> tuple:
        """Numbers and texts up to the end."""
        frame, at, values = self.frame, self.at, []
        while at < len(frame):
            tag = frame[at : at + 1]
            if tag == b"i" and at + 9 <= len(frame):
                values.append(INT.unpack_from(frame, at + 1)[0])
                at += 9
            else:
                self.at = at
                if tag not in (b"s", b"f", b"T", b"F", b"N"):
                    raise FrameError("a value that is no number and no text")
                values.append(self.get(0))
                at = self.at
            self.charge(56, 1)
        self.at = at
        return tuple(values)

    def get_all(self, n: int, depth: int) -> list:
        """n values that always follow a tag."""
        self.charge(56 * n)
        return [self.get(depth + 1) for _ in range(n)]

    def get_items(self, depth: int) -> list:
        """A count and as many values."""
        mode, n = self.take(1), self.count()
        self.charge(56 * n, n)
        if mode == b"=":
            codes, block = self.raw(), self.raw()
            if set(codes) - {*b"qd?"} or len(codes) not in (1, n):
                raise FrameError("numbers of a malformed kind")
            self.charge(32 * len(codes))
            form = f"<{n}{codes.decode()}" if len(codes) == 1 else f"<{codes.decode()}"
            return list(struct.Struct(form).unpack(block))
        if mode == b"s":
            self.charge(80 * n)
            lengths, text = struct.unpack(f"<{n}I", self.take(4 * n)), self.text()
            if sum(lengths) != len(text):
                raise FrameError("texts whose lengths are not theirs")
            self.charge(4 * len(text))
            ends = itertools.accumulate(lengths)
            return [text[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        if mode != b"*" or n > len(self.frame) - self.at:
            raise FrameError("a truncated value")
        get, depth = self.get, depth + 1
        return [get(depth) for _ in range(n)]

    def text(self) -> str:
        size = self.count()
        self.charge(size)
        raw = self.take(size)
        self.charge((1 if raw.isascii() else 5) * len(raw))
        return raw.decode("utf-8", "surrogatepass")

    def raw(self) -> bytes:
        size = self.count()
        self.charge(2 * size)
        return self.take(size)

    def link(self, build: Any, depth: int) -> Any:
        """A container, with the number that it has by its place."""
        number, before = len(self.linked), self.items
        self.linked.append(None)
        self.sizes.append(None)
        self.charge(64)
        self.linked[number] = value = build(self, depth)
        self.sizes[number] = self.items - before
        return value

    def _again(self, _):
        """A container that came by before."""
        number = self.count()
        if number >= len(self.linked) or self.sizes[number] is None:
            raise FrameError("a value that contains itself")
        self.charge(0, self.sizes[number])  # as if it were sent again: the tests walk over it
        return self.linked[number]

    def _own(self, _):
        """A container of ours."""
        return self.ours_by(self.count())

    def ours_by(self, number: int) -> Any:
        """The container of ours that has this number."""
        if number not in self.ours or self.open.get(number):
            raise FrameError("a value that contains itself, or a container that is not known")
        return self.ours[number]

    def _renew(self, depth):
        """A container of ours, brought to the content that follows."""
        number, tag = self.count(), self.take(1)
        if number not in self.ours or number in self.open:
            raise FrameError("a container that is not known")
        self.open[number] = True
        old = self.ours[number]
        if tag in _BUILDERS:
            refill(old, _BUILDERS[tag](self, depth))
        elif self.links:
            self.links.renew(self, tag, old, depth)
        self.open[number] = False
        return old


def refill(old: Any, new: Any) -> None:
    """Bring a container, in place, to the content of another one of its kind."""
    arrays = type(old).__name__ == "ndarray" and type(new) is type(old)
    if arrays and (old.dtype, old.shape) == (new.dtype, new.shape):
        old[...] = new
        return
    for base, clear, fill in _REFILL:
        if isinstance(old, base) and isinstance(new, base):
            clear(old)
            return fill(old, new)
    raise FrameError(f"a {type(old).__name__} that came back as another kind of value")


# By the base's methods, whatever a subclass of the tests overrides. An OrderedDict is a dict too.
_REFILL: tuple[tuple, ...] = (
    (list, list.clear, list.extend),
    (bytearray, bytearray.clear, bytearray.extend),
    (OrderedDict, OrderedDict.clear, OrderedDict.update),
    (dict, dict.clear, dict.update),
    (set, set.clear, set.update),
    (deque, deque.clear, deque.extend),
)


def _set(decoder, depth):
    items = decoder.get_items(depth)
    decoder.charge(216 + 110 * len(items))
    return items


def _deque(decoder, depth):
    decoder.charge(760)
    most = decoder.get(depth)
    if most is not None and not (type(most) is int and 0 <= most < 1 << 63):
        raise FrameError("a deque of a malformed length")
    return deque(decoder.get_items(depth), most)


def _dict(decoder, depth, make=dict):
    n = decoder.count()
    decoder.charge(240 + 220 * n, 2 * n)
    if 2 * n > len(decoder.frame) - decoder.at:
        raise FrameError("a truncated value")
    value = make()
    for _ in range(n):
        key = decoder.get(depth + 1)
        value[key] = decoder.get(depth + 1)
    return value


def _defaultdict(decoder, depth):
    decoder.charge(64)
    factory = decoder.get(depth)
    if factory not in FACTORIES:
        raise FrameError("a defaultdict of an unknown factory")
    return _dict(decoder, depth, lambda: defaultdict(FACTORIES[factory]))


def _bytearray(decoder, _):
    return bytearray(decoder.raw())


def _range(decoder, depth):
    return range(*decoder.get_all(3, depth))


def _opaque(decoder, depth):
    decoder.charge(250)
    name = decoder.raw().decode("utf-8", "replace")[:80]
    return Opaque(name, *(part is True for part in decoder.get_all(2, depth)))


_READERS: dict = {
    b"s": lambda d, _: d.text(),
    b"f": lambda d, _: FLOAT.unpack(d.take(8))[0],
    b"T": lambda *_: True,
    b"F": lambda *_: False,
    b"N": lambda *_: None,
    b"E": lambda *_: Ellipsis,
    b"c": lambda d, _: complex(*COMPLEX.unpack(d.take(16))),
    b"I": lambda d, _: int.from_bytes(d.raw(), "little", signed=True),
    b"b": lambda d, _: d.raw(),
    b"r": _range,
    b"t": lambda d, depth: tuple(d.get_items(depth)),
    b"Z": lambda d, depth: frozenset(_set(d, depth)),
    b"k": lambda d, depth: dict.fromkeys(_set(d, depth)).keys(),
    b"v": lambda d, depth: dict(enumerate(_set(d, depth))).values(),
    b"m": lambda d, depth: _dict(d, depth).items(),
    b"n": lambda d, depth: iter(tuple(d.get_items(depth))),
    b"o": _opaque,
    b"R": Decoder._again,
    b"A": Decoder._own,
    b"U": Decoder._renew,
    **kinds.READERS,
}
# Messages of peer.py in few bytes. A number follows: the function's, nothing, the argument's.
_SHORT: dict = {
    b"!": lambda d, number: ("call", number, d.get_scalars(), (), ()),
    b"=": lambda d, _: ("result", *d.get_scalars(), None, (), ()),
    b"(": lambda d, number: ("call", number, d._get_deep(), (), ()),
    b")": lambda d, _: ("result", d._get_deep(), None, (), ()),
    b"@": lambda d, number: ("result", d.ours_by(number), None, (), ()),
}
_BUILDERS: dict = {
    b"l": lambda d, depth: d.get_items(depth),
    b"S": lambda d, depth: set(_set(d, depth)),
    b"q": _deque,
    b"d": _dict,
    b"Q": lambda d, depth: _dict(d, depth, OrderedDict),
    b"C": lambda d, depth: _dict(d, depth, Counter),
    b"w": _defaultdict,
    b"B": _bytearray,
    **kinds.BUILDERS,
}

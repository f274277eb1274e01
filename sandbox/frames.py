"""Plain data on a pipe, the sender's side: values to bytes, bytes as frames.

    pipe = Pipe(read_fd, write_fd)
    pipe.send(encode(([1, 2], {"key": "text"})))
    args, kwargs = decode(pipe.receive())            # decoder.py

A frame is a length and as many bytes. Plain data are Python's builtin types and some of the
standard library's and numpy's (kinds.py); what else can be carried is peer.py's to say.
"""

import collections
import itertools
import os
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

from sandbox import kinds

MAX_FRAME = 64 << 20  # bytes
MAX_ITEMS = 8_000_000  # that the tests walk over: what is met twice counts twice
MAX_DEPTH = 1000
STACK = 20 * MAX_DEPTH  # of Python's frames, which 3.11 and later keep off the stack of C


class FrameError(ValueError):
    """What should cross the pipe is malformed, or over one of the limits above."""


TOO_LARGE = f"a value of more than {MAX_FRAME >> 20} MB"
COUNT, INT, FLOAT, COMPLEX = map(struct.Struct, ("<I", "<q", "<d", "<dd"))
SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z", deque: b"q"}
MAPPINGS: dict[type, bytes] = {dict: b"d", OrderedDict: b"Q", Counter: b"C", defaultdict: b"w"}
MUTABLE = {list, set, deque, bytearray, *MAPPINGS}
FACTORIES = {"": None} | {k.__name__: k for k in (int, float, str, list, dict, set, tuple, bool)}
# Bases, those that derive from others first, and what makes a base's object of a subclass's.
BASES: tuple[tuple[type, Any], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, lambda z: complex(complex.real.__get__(z), complex.imag.__get__(z))),
    (str, str.__str__),
    (bytes, lambda raw: bytes.__getitem__(raw, slice(None))),
    (bytearray, lambda raw: bytearray.__getitem__(raw, slice(None))),
    *((kind, None) for kind in (*SEQUENCES, OrderedDict, Counter, defaultdict, dict)),
)
_CODES = {int: "q", float: "d", bool: "?"}  # of struct
_VIEWS = {type({}.keys()): b"k", type({}.values()): b"v"}
_DICT_ITEMS = type({}.items())


def encode(value: object, strict: bool = False) -> bytes:
    """Plain data -> bytes. Subclasses of builtin types are cast down, past what they override;
    iterators are drained.

    A mutable container met twice is sent once, so that it stays one object. Objects of any other
    type keep only their type's name and truth, or raise FrameError if `strict`. Raises FrameError
    over the limits.
    """
    return Encoder(strict).frame(value)


def encode_scalars(values: Iterable) -> bytes | None:
    """Numbers that 8 bytes hold, texts, True, False and None, quickly; None if there are others."""
    out = []
    for value in values:
        kind = type(value)
        if kind is int and -(1 << 63) <= value < 1 << 63:
            out.append(b"i" + INT.pack(value))
        elif kind is str and len(value) < 1 << 16:
            raw = value.encode("utf-8", "surrogatepass")
            out.append(b"s" + COUNT.pack(len(raw)) + raw)
        elif kind is float:
            out.append(b"f" + FLOAT.pack(value))
        elif kind is bool or value is None:
            out.append(b"N" if value is None else b"T" if value else b"F")
        else:
            return None
    return b"".join(out)


class Encoder:
    """A value on its way to bytes.

    linked: the mutable containers that came by, whose place here is their number (holding them also
    keeps them alive: an id is one object's no longer than that). known: {id: number} of containers
    that the other side has too: they go as references, the first time with their content if their
    number is `fresh` or above. drain: whether iterators are drained or left alone, without content.
    """

    def __init__(self, strict=False, links=None, known=None, fresh=0, drain=True):
        self.strict, self.links, self.known = strict, links, known or {}
        self.fresh, self.drain = fresh, drain
        self.out, self.met, self.linked, self.items, self.sent = [], {}, [], 0, set()

    def frame(self, value: object, head: bytes = b"") -> bytes:
        """The bytes of a value, after others."""
        self.out.append(head)
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + STACK)
        try:
            self.put(value, 0)
        finally:
            sys.setrecursionlimit(limit)
        frame = b"".join(self.out)
        if len(frame) > MAX_FRAME:
            raise FrameError(TOO_LARGE)
        return frame

    def put(self, obj: Any, depth: int) -> None:
        """Append a value's bytes."""
        kind = type(obj)
        if kind is int and -(1 << 63) <= obj < 1 << 63:
            self.out.append(b"i" + INT.pack(obj))
        elif kind is str:
            self.put_bytes(b"s", obj.encode("utf-8", "surrogatepass"))
        elif kind is float:
            self.out.append(b"f" + FLOAT.pack(obj))
        elif kind is bool:
            self.out.append(b"T" if obj else b"F")
        elif obj is None:
            self.out.append(b"N")
        elif depth > MAX_DEPTH:
            raise FrameError(f"a value nested deeper than {MAX_DEPTH}")
        elif kind in SEQUENCES or kind in MAPPINGS or kind is bytearray:
            self._put_container(obj, kind, depth)
        else:
            self._put_scalar(obj, kind, depth)

    def _put_scalar(self, obj, kind, depth):
        if kind is int:
            raw = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            self.put_bytes(b"I", raw)
        elif kind is bytes:
            self.put_bytes(b"b", obj)
        elif kind is complex:
            self.out.append(b"c" + COMPLEX.pack(obj.real, obj.imag))
        elif kind is range:
            self.put_all(b"r", (obj.start, obj.stop, obj.step), depth)
        elif obj is Ellipsis:
            self.out.append(b"E")
        elif kind is Own:
            self.out.append(b"A" + COUNT.pack(obj.number))
        elif not (self.links and self.links.put(self, obj, depth)):
            self._put_other(obj, kind, depth)

    def _put_container(self, obj, base, depth):
        """An object of a container's type, or of a subclass: by its base's methods alone."""
        if base in MUTABLE and self.is_known(obj):
            return
        if base is bytearray:
            return self.put_bytes(b"B", bytearray.__getitem__(obj, slice(None)))
        if base in MAPPINGS:
            return self._put_mapping(MAPPINGS[base], obj, list(base.items(obj)), depth)
        self.out.append(SEQUENCES[base])
        if base is deque:
            self.put(deque.maxlen.__get__(obj), depth)
        self.put_items(obj if type(obj) is base else tuple(base.__iter__(obj)), depth)

    def is_known(self, obj: object) -> bool:
        """Whether a reference to a container was enough; if not, its content is to follow."""
        number = self.known.get(id(obj))
        if number is not None:
            enough = number < self.fresh or number in self.sent
            self.sent.add(number)
            self.out.append((b"A" if enough else b"U") + COUNT.pack(number))
            return enough
        number = self.met.get(id(obj))
        if number is not None:
            self.out.append(b"R" + COUNT.pack(number))
            return True
        self.met[id(obj)] = len(self.linked)
        self.linked.append(obj)
        return False

    def put_bytes(self, tag: bytes, raw: bytes) -> None:
        if len(raw) > MAX_FRAME:
            raise FrameError(TOO_LARGE)
        self.out.append(tag + COUNT.pack(len(raw)) + raw)

    def put_all(self, tag: bytes, parts: Any, depth: int) -> None:
        """A tag and the values that always follow it."""
        self.out.append(tag)
        for part in parts:
            self.put(part, depth + 1)

    def put_items(self, items: Any, depth: int) -> None:
        """A count and as many values."""
        self._count(len(items))
        if len(items) < 8 or not self._put_block(tuple(items)):
            self.out.append(b"*" + COUNT.pack(len(items)))
            depth += 1
            for item in items:
                self.put(item, depth)

    def _put_block(self, items):
        """Texts alone, or numbers that 8 bytes hold, in one piece and at the speed of C."""
        n, types = len(items), set(map(type, items))
        if types == {str} and sum(map(len, items)) <= MAX_FRAME:
            lengths = struct.pack(f"<{n}I", *map(len, items))
            self.out.append(b"s" + COUNT.pack(n) + lengths)
            self.put_bytes(b"", "".join(items).encode("utf-8", "surrogatepass"))
            return True
        if not types <= _CODES.keys():
            return False
        alike = len(types) == 1
        codes = _CODES[types.pop()] if alike else "".join([_CODES[type(x)] for x in items])
        try:  # not struct.pack, which remembers its formats
            block = struct.Struct(f"<{n}{codes}" if alike else f"<{codes}").pack(*items)
        except struct.error:  # an int of more than 8 bytes
            return False
        self.out.append(b"=" + COUNT.pack(n))
        self.put_bytes(b"", codes.encode())
        self.put_bytes(b"", block)
        return True

    def _put_mapping(self, tag, obj, pairs, depth):
        self._count(2 * len(pairs))
        self.out.append(tag)
        if tag == b"w":
            names = [name for name, kind in FACTORIES.items() if kind is obj.default_factory]
            self.put(names[0] if names else "", depth)
        self.put_all(COUNT.pack(len(pairs)), itertools.chain.from_iterable(pairs), depth)

    def _count(self, n):
        self.items += n
        if self.items > MAX_ITEMS:
            raise FrameError(f"a value of more than {MAX_ITEMS} items")

    def _put_other(self, obj, kind, depth):
        # numpy.float64 is a float, numpy.str_ a str: those are cast down like any subclass. What
        # an object says of its class (isinstance believes it) does not count.
        for base, plain in BASES:
            if base in kind.__mro__:
                if plain is None or base is bytearray:
                    return self._put_container(obj, base, depth)
                return self.put(plain(obj), depth)
        if kind in _VIEWS:
            self.out.append(_VIEWS[kind])
            return self.put_items(obj, depth)
        if kind is _DICT_ITEMS:
            return self._put_mapping(b"m", obj, list(obj), depth)
        if kinds.put(self, obj, kind, depth):
            return
        if isinstance(obj, collections.abc.Iterator):
            self.out.append(b"n")
            most = MAX_ITEMS + 1 if self.drain else 0
            return self.put_items(tuple(itertools.islice(obj, most)), depth)
        if self.strict:
            raise FrameError(f"an argument of type {kind.__name__}, which is not plain data")
        self.put_bytes(b"o", kind.__name__.encode("utf-8", "replace"))
        self.put_all(b"", (bool(obj), kind.__eq__ is not object.__eq__), depth)


class Own:
    """Stands for something that the other side has under a number, whatever it is."""

    def __init__(self, number):
        self.number = number


# ---------------------------------------------------------------------------------------------
# Pipes


class Pipe:
    """Frames from one descriptor and to another. What is read too much is the next frame's."""

    def __init__(self, reads: int, writes: int):
        self.reads, self.writes, self.rest = reads, writes, b""

    def send(self, frame: bytes) -> None:
        """Write a frame. Raises BrokenPipeError when nobody reads."""
        data = COUNT.pack(len(frame)) + frame
        sent = os.write(self.writes, data)
        if sent < len(data):
            left = memoryview(data)[sent:]
            while left:
                left = left[os.write(self.writes, left) :]

    def receive(self) -> bytes:
        """Read a frame. Raises EOFError when nobody writes, FrameError over the limit."""
        data = self.rest or self._read(1 << 13)
        while len(data) < 4:
            data += self._read(1 << 13)
        end = 4 + COUNT.unpack_from(data)[0]
        if end - 4 > MAX_FRAME:
            raise FrameError(f"a frame of {end - 4} bytes, more than {MAX_FRAME}")
        parts, size = [data], len(data)
        while size < end:
            parts.append(self._read(min(end - size, 1 << 20)))
            size += len(parts[-1])
        data = b"".join(parts) if len(parts) > 1 else data
        self.rest = data[end:]
        return data[4:end]

    def _read(self, most):
        part = os.read(self.reads, most)
        if not part:
            raise EOFError
        return part

"""A closed reader of pickles: their opcodes read as data, nothing imported, nothing called.

    read(data, "ckpt/.metadata", {"torch.Size": lambda n: tuple(n), "module.Name": None})

A pickle is a program for a small stack machine, which builds plain values and asks for others by
name. This machine knows the instructions of every protocol that build values. A name stands for
what the table says: a function of ours, or None for an inert Record that keeps what it was given.
Other names, and other instructions, are refused, and so is what has more items than memory should
be spent on; nothing is allocated by a size that a pickle merely claims. Standard library only.
"""

import codecs
import struct
from collections.abc import Callable, Mapping
from typing import Any

Names = Mapping[str, Callable[..., Any] | None]
MAX_STEPS = 3_000_000  # a file of 10,000 tensors takes 400,000
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocols below 3 write them


class Global:
    """A name that a pickle speaks of, "module.name"."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Record:
    """What a pickle would have made by calling a name: its arguments, and what was put in later.
    Compared and hashed by identity, so that a key costs what it weighs."""

    __slots__ = ("args", "entries", "name", "state")

    def __init__(self, name: str, args: tuple):
        self.name, self.args = name, args
        self.state: Any = None  # what its __setstate__ would have been given
        self.entries: list = []  # of a list, a set or a dictionary of another class


MODULES = "os posix nt sys subprocess pty runpy importlib shutil pickle socket ctypes operator"
MODULES += " webbrowser"
CALLS = "open eval exec compile system popen load loads getattr setattr"  # of any module
CALLS += " execfile __import__ input breakpoint"


def runs_code(name: str) -> bool:
    """Whether a pickle that names it would run something where others load it. Not what protects:
    nothing that a pickle names is ever called here."""
    module, _, leaf = name.rpartition(".")
    return module.split(".")[0] in MODULES.split() or leaf in CALLS.split()


class Anything(dict):
    """Names for files whose values beside the weights are nobody's concern: each stands for an
    inert record, but for those with which a pickle would run something."""

    def __missing__(self, name: str) -> None:
        if runs_code(name):
            raise KeyError(name)
        return None


def read(
    data: bytes,
    where: str,
    names: Names,
    persistent: Callable[[Any], Any] | None = None,
    most: int | None = None,
) -> Any:
    """The value that a pickle describes. `where` begins each ValueError. persistent: what stands
    for an object that the pickle keeps outside, such as a tensor's storage. most: instructions
    (MAX_STEPS), whose number bounds time and memory."""
    machine = _Machine(data, where, names, persistent)
    try:
        return machine.run(most or MAX_STEPS)
    except (struct.error, IndexError, KeyError, TypeError, UnicodeDecodeError, AttributeError):
        raise ValueError(
            f"{where} is damaged or no pickle: byte {machine.at:,} of {len(data):,}"
        ) from None


_MARK = object()
_CONSTANTS: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord("]"): list,
    ord(")"): tuple,
    ord("}"): dict,
    0x8F: set,
}
_U8, _U16, _U32, _U64 = map(struct.Struct, ("<B", "<H", "<I", "<Q"))
_NUMBERS = {
    ord("K"): _U8,
    ord("M"): _U16,
    ord("J"): struct.Struct("<i"),
    ord("G"): struct.Struct(">d"),
}
_TEXTS = {0x8C: _U8, ord("X"): _U32, 0x8D: _U64}  # opcode: form of the length
_TEXTS |= {ord("U"): _U8, ord("T"): _U32}  # Python 2's, which are mostly UTF-8
_BYTES = {ord("C"): _U8, ord("B"): _U32, 0x8E: _U64}
_SIMPLE_KEYS = (str, int, float, bytes, type(None), Record, Global)


class _Machine:
    def __init__(self, data, where, names, persistent):
        self.data, self.where, self.at = data, where, 0
        self.names, self.persistent = names, persistent
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.steps = {opcode: getattr(self, name) for opcode, name in _STEPS.items()}

    def run(self, most):
        data, push = self.data, self.stack.append
        for _ in range(most):
            code = data[self.at]
            self.at += 1
            if code in _CONSTANTS:
                push(_CONSTANTS[code]())
            elif code in _NUMBERS:
                push(self.number(_NUMBERS[code]))
            elif code in _TEXTS:
                push(str(self.taken(self.number(_TEXTS[code])), "utf-8", "surrogatepass"))
            elif code in _BYTES:
                push(self.taken(self.number(_BYTES[code])))
            elif code == ord("."):
                return self.stack.pop()
            elif code in self.steps:
                self.steps[code]()
            else:
                raise ValueError(
                    f"{self.where} holds instruction {code:#04x} at byte {self.at - 1:,}, which "
                    "a pickle of weights has no use for: it is refused"
                )
        raise ValueError(f"{self.where} has too many items: keep long lists as tensors")

    def number(self, form):
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def taken(self, n):
        if self.at + n > len(self.data):
            raise IndexError(n)
        self.at += n
        return self.data[self.at - n : self.at]

    def line(self):
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise IndexError("no end of line")
        return self.taken(end + 1 - self.at)[:-1]

    def line_as(self, kind):
        """A number that is spelt out."""
        text = self.line()
        try:
            return kind(text[:5000])
        except ValueError:  # no number, or one of so many digits that reading it would take long
            raise TypeError("no number") from None

    def since_mark(self):
        stack = self.stack
        i = len(stack) - 1
        while stack[i] is not _MARK:
            i -= 1
            if i < 0:
                raise IndexError("no mark")
        found = stack[i + 1 :]
        del stack[i:]
        return found

    # one method for each instruction that is more than a constant

    def frame(self):
        self.number(_U64)

    def protocol(self):
        self.number(_U8)

    def mark(self):
        self.stack.append(_MARK)

    def pop(self):
        self.stack.pop()

    def pop_mark(self):
        self.since_mark()

    def duplicate(self):
        self.stack.append(self.stack[-1])

    def long(self, form=_U8):
        self.stack.append(int.from_bytes(self.taken(self.number(form)), "little", signed=True))

    def longer(self):
        self.long(_U32)

    def spelt_int(self):
        flag = {b"00\n": False, b"01\n": True}.get(self.data[self.at : self.at + 3])
        number = self.line_as(int)
        self.stack.append(number if flag is None else flag)

    def spelt_long(self):
        self.stack.append(self.line_as(lambda text: int(text.removesuffix(b"L"))))

    def spelt_float(self):
        self.stack.append(self.line_as(float))

    def spelt_string(self):
        quoted = self.line()
        self.stack.append(str(codecs.escape_decode(quoted[1:-1])[0], "utf-8"))

    def spelt_text(self):
        self.stack.append(str(self.line(), "raw-unicode-escape"))

    def spelt_put(self):
        self.memo[self.line_as(int)] = self.stack[-1]

    def spelt_get(self):
        self.stack.append(self.memo[self.line_as(int)])

    def put(self):
        self.memo[self.number(_U8)] = self.stack[-1]

    def long_put(self):
        self.memo[self.number(_U32)] = self.stack[-1]

    def memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self):
        self.stack.append(self.memo[self.number(_U8)])

    def long_get(self):
        self.stack.append(self.memo[self.number(_U32)])

    def make_tuple(self):
        self.stack.append(tuple(self.since_mark()))

    def tuple1(self):
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def tuple2(self):
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def tuple3(self):
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def make_list(self):
        self.stack.append(self.since_mark())

    def make_dict(self):
        values = self.since_mark()
        self.stack.append({})
        self.set_pairs(values)

    def frozen(self):
        self.stack.append(frozenset(map(as_key, self.since_mark())))

    def add(self, values):
        into = self.stack[-1]
        if type(into) is list:
            into.extend(values)
        elif type(into) is set:
            into.update(map(as_key, values))
        elif type(into) is Record:
            into.entries.extend(values)
        else:
            raise TypeError(type(into))

    def append(self):
        value = self.stack.pop()
        self.add([value])

    def appends(self):
        self.add(self.since_mark())

    def set_pairs(self, values):
        if len(values) % 2:
            raise IndexError("a key without a value")
        into, pairs = self.stack[-1], zip(values[::2], values[1::2], strict=True)
        if type(into) is dict:
            into.update((as_key(key), value) for key, value in pairs)
        elif type(into) is Record:
            into.entries.extend(pairs)
        else:
            raise TypeError(type(into))

    def set_item(self):
        pair = self.stack[-2:]
        del self.stack[-2:]
        self.set_pairs(pair)

    def set_items(self):
        self.set_pairs(self.since_mark())

    def named(self, module, leaf):
        name = f"{PYTHON_2.get(module, module)}.{leaf}"
        try:
            self.names[name]
        except KeyError:
            raise ValueError(
                f"{self.where} holds {name}: making it could run code, so it is refused"
            ) from None
        self.stack.append(Global(name))

    def global_line(self):
        module, leaf = (str(self.line(), "utf-8") for _ in range(2))
        self.named(module, leaf)

    def global_stack(self):
        leaf, module = self.stack.pop(), self.stack.pop()
        if type(leaf) is not str or type(module) is not str:
            raise TypeError("a name that is no text")
        self.named(module, leaf)

    def reduce(self):
        args, what = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(what) is not Global:
            raise TypeError("only a name can be called")
        made = self.names[what.name]
        self.stack.append(Record(what.name, args) if made is None else made(*args))

    def new_with_keywords(self):
        self.stack.pop()
        self.reduce()

    def instance(self):
        args = tuple(self.since_mark())
        self.global_line()
        self.stack.append(args)
        self.reduce()

    def object_of(self):
        what, *args = self.since_mark()
        self.stack += [what, tuple(args)]
        self.reduce()

    def build(self):
        state, into = self.stack.pop(), self.stack[-1]
        if type(into) is Record:
            into.state = state
        elif type(into) is not dict:  # an OrderedDict's own attributes are nobody's concern
            raise TypeError(type(into))

    def persist(self):
        if self.persistent is None:
            raise TypeError("an object from outside")
        self.stack.append(self.persistent(self.stack.pop()))


def as_key(value: Any) -> Any:
    """A key whose hash costs nothing: that of a tuple of tuples of tuples can take for ever."""
    if not isinstance(value, _SIMPLE_KEYS):
        if type(value) is tuple and all(isinstance(part, _SIMPLE_KEYS) for part in value):
            return value
        raise TypeError(f"a key of type {type(value).__name__}")
    return value


_STEPS = {
    0x80: "protocol", 0x95: "frame", ord("("): "mark", ord("0"): "pop", ord("1"): "pop_mark",
    ord("2"): "duplicate", 0x8A: "long", 0x8B: "longer",
    ord("I"): "spelt_int", ord("L"): "spelt_long", ord("F"): "spelt_float",
    ord("S"): "spelt_string", ord("V"): "spelt_text", ord("p"): "spelt_put", ord("g"): "spelt_get",
    ord("q"): "put", ord("r"): "long_put", 0x94: "memoize", ord("h"): "get", ord("j"): "long_get",
    ord("t"): "make_tuple", 0x85: "tuple1", 0x86: "tuple2", 0x87: "tuple3",
    ord("l"): "make_list", ord("d"): "make_dict", 0x91: "frozen",
    ord("a"): "append", ord("e"): "appends", 0x90: "appends", ord("s"): "set_item",
    ord("u"): "set_items", ord("c"): "global_line", 0x93: "global_stack",
    ord("i"): "instance", ord("o"): "object_of", ord("R"): "reduce", 0x81: "reduce",
    0x92: "new_with_keywords", ord("b"): "build", ord("Q"): "persist",
}  # fmt: skip

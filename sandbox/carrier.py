"""What is no plain data and still crosses the pipe between the tests and a candidate.

- A function goes as a number, and is a Proxy at the other end.
- An object of a class that both ends have by name (the prompt's) goes as its attributes, a named
  tuple of any other class as its names and values, builtin types by name.
- An exception goes as its classes' names, arguments, attributes, text and cause, and is made of the
  nearest classes that are known where it arrives.

All of it may come from an enemy: a name is looked up among the classes that may cross and nowhere
else, nobody's __init__, __setattr__ or __reduce__ is called, and nothing is imported.
"""

import builtins
import collections
import contextlib
import functools
import sys
from typing import Any

from sandbox import kinds
from sandbox.decoder import Decoder, Opaque, refill
from sandbox.frames import BASES, MAPPINGS, MUTABLE, Encoder, FrameError

_TYPES = {bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset}
_TYPES |= {range, object, type(None)}
_HEAP_TYPE = 1 << 9
_TEXT = "__text__"  # where an exception of a class that is not here keeps its words


class Proxy:
    """A function of the other end."""

    __slots__ = ("__name__", "end", "number")

    def __init__(self, end, number, name):
        self.end, self.number, self.__name__ = end, number, name

    def __call__(self, /, *args, **kwargs):
        return self.end.call(self.number, args, kwargs)

    def __repr__(self):
        return f"<function {self.__name__}>"


class Carrier:
    """Writes and reads them, for one end. classes: {name: class} of those that the other end has
    too. strict: whether what cannot be carried is an error (the tests') or goes as Opaque."""

    def __init__(self, classes: dict, strict: bool = False):
        self.classes, self.strict = classes, strict
        self.functions: list = []  # ours, that the other end may call by their place
        self.numbers: dict[int, int] = {}
        self.stand_ins: dict[tuple, type] = {}  # for classes of exceptions that are not here

    def call(self, number: int, args: tuple, kwargs: dict) -> Any:
        """Call the other end's function: what a Proxy does."""
        raise NotImplementedError

    # -- out

    def put(self, encoder: Encoder, obj: Any, depth: int) -> bool:
        """Write an object, if it is one of those above."""
        kind = type(obj)
        if type in kind.__mro__:
            if name := self.name_of(obj):
                encoder.put_all(b"K", (name,), depth)
            elif issubclass(obj, BaseException) and not self.strict:
                encoder.put_all(b"Y", (self.names_of(obj),), depth)
            return bool(name) or (issubclass(obj, BaseException) and not self.strict)
        if kind is Proxy and obj.end is self:
            encoder.put_all(b"G", (obj.number,), depth)
        elif BaseException in kind.__mro__:
            self._put_exception(encoder, obj, depth)
        elif self.is_shared(kind):
            self._put_instance(encoder, obj, kind, depth)
        elif tuple in kind.__mro__ and kind is not tuple and _fields(kind):
            values = tuple(tuple.__iter__(obj))
            encoder.put_all(b"P", (kind.__name__, _fields(kind), values), depth)
        elif callable(obj) and not any(base in kind.__mro__ for base, _ in BASES):
            number = self.number_of(obj)
            encoder.put_all(b"L", (number, str(getattr(obj, "__name__", "function"))), depth)
        else:
            return False
        return True

    def number_of(self, function: Any) -> int:
        """A function's place among ours."""
        number = self.numbers.get(id(function))
        if number is None:
            number = self.numbers[id(function)] = len(self.functions)
            self.functions.append(function)
        return number

    def is_shared(self, kind: type) -> bool:
        """Whether both ends have a class, by its name."""
        return bool(self.classes) and walk(self.classes, kind.__qualname__) is kind

    def name_of(self, kind: type) -> str:
        """The name by which the other end knows a class, or ""."""
        if self.is_shared(kind):
            return f":{kind.__qualname__}"
        name = f"{kind.__module__}:{kind.__qualname__}"
        return name if self.find(name) is kind else ""

    def names_of(self, kind: type) -> tuple[str, ...]:
        """What a class of exceptions and its bases are called."""
        names = [
            (self.name_of(base), f"{base.__module__}:{base.__qualname__}") for base in kind.__mro__
        ]
        return tuple(name or other for name, other in names[:-1])

    def _put_instance(self, encoder, obj, kind, depth):
        enum = sys.modules.get("enum")
        if enum and enum.Enum in kind.__mro__:
            return encoder.put_all(b"e", (self.name_of(kind), obj._name_ or obj._value_), depth)
        if encoder.is_known(obj):
            return
        content = None
        for base, plain in BASES:
            if base in kind.__mro__:
                items = base.items if base in MAPPINGS else getattr(base, "__iter__", None)
                content = plain(obj) if plain else tuple(items(obj))
                break
        state = dict(getattr(obj, "__dict__", {}))
        state |= {name: getattr(obj, name) for name in _slots(kind) if hasattr(obj, name)}
        encoder.put_all(b"p", (self.name_of(kind), content, tuple(state.items())), depth)

    def _put_exception(self, encoder, error, depth):
        args, state = BaseException.args.__get__(error), dict(error.__dict__)
        if isinstance(error, OSError):  # its file names are in neither
            args = OSError.__reduce__(error)[1]
        for name in ("name", "path"):
            if isinstance(error, (NameError, AttributeError, ImportError)) and hasattr(error, name):
                state.setdefault(name, getattr(error, name))
        try:
            text = str(error)[:500]
        except (
            BaseException
        ):  # a hostile or broken __str__ is still to be reported as its exception
            text = ""
        cause = error.__cause__
        strict, encoder.strict = encoder.strict, False
        parts = self.names_of(type(error)), args, tuple(state.items()), text, cause
        encoder.put_all(b"X", parts, depth)
        encoder.strict = strict

    # -- in

    def get(self, decoder: Decoder, tag: bytes, depth: int) -> Any:
        """Read an object of a tag that is no plain data's."""
        if tag == b"p":
            return decoder.link(self._get_instance, depth)
        if tag not in _PARTS:
            raise FrameError(f"an unknown tag {tag!r}" if tag else "a truncated value")
        decoder.charge(400)
        parts = decoder.get_all(len(_PARTS[tag]), depth)
        if not all(isinstance(part, kind) for part, kind in zip(parts, _PARTS[tag], strict=True)):
            raise FrameError("an object out of form")
        return getattr(self, _GETTERS[tag])(decoder, *parts)

    def _get_type(self, _, name):
        return Opaque("type", True) if (kind := self.find(name)) is None else kind

    def _get_own(self, _, number):
        if not 0 <= number < len(self.functions):
            raise FrameError("a function that is not known")
        return self.functions[number]

    def _get_function(self, _, number, name):
        return Proxy(self, number, name[:80])

    def _get_member(self, _, name, member):
        kind = self.find(name)
        if not hasattr(kind, "__members__"):
            raise FrameError("a member of no enumeration")
        return kind[member] if type(member) is str and member in kind.__members__ else kind(member)

    def _get_named_tuple(self, decoder, name, fields, values):
        decoder.charge(10_000)
        if len(fields) != len(values) or len(fields) > 1000:
            raise FrameError("a named tuple out of form")
        return _named_tuple(name[:80], fields)(*values)

    def _get_instance(self, decoder, depth):
        decoder.charge(400)
        name, content, state = decoder.get_all(3, depth)
        kind = self.find(name) if type(name) is str and name.startswith(":") else None
        if kind is None or type(state) is not tuple:
            raise FrameError(f"an object of a class that is not known: {name}")
        for base, plain in BASES:
            if base in kind.__mro__:
                obj = base.__new__(kind, *([content] if plain or base in _FROZEN else []))
                if base in _FILL and not plain:
                    _FILL[base](obj, content)
                break
        else:
            obj = object.__new__(kind)
        set_state(obj, state)
        return obj

    def renew(self, decoder: Decoder, tag: bytes, old: Any, depth: int) -> None:
        """Bring an object of ours to the state that follows."""
        new = self._get_instance(decoder, depth) if tag == b"p" else None
        if type(new) is not type(old):
            raise FrameError(f"a {type(old).__name__} that came back as another kind of value")
        if hasattr(old, "__dict__"):
            old.__dict__.clear()
        set_state(old, _state(new))
        if isinstance(old, tuple(MUTABLE)):
            refill(old, new)

    def _get_exception(self, decoder, names, args, state, text, cause):
        kind = self._get_exception_type(decoder, names)
        if not (cause is None or isinstance(cause, BaseException)):
            raise FrameError("an exception out of form")
        error = _new_exception(kind, args)
        set_state(error, state)
        error.__cause__ = cause
        if kind in self.stand_ins.values():
            error.__dict__[_TEXT] = text
        return error

    def _get_exception_type(self, decoder, names):
        """The class of these names if it is here, else one that is called and caught alike."""
        decoder.charge(5000)
        if not names or not all(type(name) is str for name in names):
            raise FrameError("an exception out of form")
        if kind := self.find_exception(names[0]):
            return kind
        if names not in self.stand_ins:
            found = [kind for name in names if (kind := self.find_exception(name))]
            bases = [k for k in found if not any(k is not o and issubclass(o, k) for o in found)]
            if not bases:
                raise FrameError("an exception out of form")
            self.stand_ins[names] = _stand_in(names[0], tuple(dict.fromkeys(bases)))
        return self.stand_ins[names]

    def find(self, name: str) -> type | None:
        """The class of a name, if it is one that may cross."""
        module, _, qualname = name.partition(":")
        if not module:
            kind = walk(self.classes, qualname)
            return kind if kind and kind.__flags__ & _HEAP_TYPE else None
        if module == "builtins":
            kind = type(None) if qualname == "NoneType" else walk(vars(builtins), qualname)
            return kind if kind and (kind in _TYPES or issubclass(kind, BaseException)) else None
        if module.partition(".")[0] not in sys.stdlib_module_names or module not in sys.modules:
            return None
        kind = walk(vars(sys.modules[module]), qualname)
        if kind and (issubclass(kind, BaseException) or kinds.is_one(module, qualname)):
            return kind
        return None

    def find_exception(self, name: str) -> type | None:
        kind = self.find(name)
        return kind if kind and issubclass(kind, BaseException) else None


# tag: the types of its parts
_PARTS: dict[bytes, tuple] = {
    b"K": (str,),
    b"G": (int,),
    b"L": (int, str),
    b"e": (str, object),
    b"P": (str, tuple, tuple),
    b"X": (tuple, tuple, tuple, str, object),
    b"Y": (tuple,),
}
_GETTERS = {
    b"K": "_get_type",
    b"G": "_get_own",
    b"L": "_get_function",
    b"e": "_get_member",
    b"P": "_get_named_tuple",
    b"X": "_get_exception",
    b"Y": "_get_exception_type",
}
_FROZEN = (tuple, frozenset)
_FILL: dict = {
    list: list.extend,
    set: set.update,
    collections.deque: collections.deque.extend,
    collections.OrderedDict: collections.OrderedDict.update,
    collections.Counter: dict.update,
    collections.defaultdict: dict.update,
    dict: dict.update,
}


def walk(names: Any, qualname: str) -> type | None:
    """The class of a dotted name, or None."""
    kind = None
    for part in qualname.split("."):
        kind = names.get(part)
        if not isinstance(kind, type):
            return None
        names = vars(kind)
    return kind


def in_a_module(kind: type) -> bool:
    """Whether a class is some module's own, not of a program that was run from its text."""
    module = sys.modules.get(kind.__module__)
    return module is not None and walk(vars(module), kind.__qualname__) is kind


def _fields(kind):
    fields = getattr(kind, "_fields", None)
    return fields if type(fields) is tuple and all(type(name) is str for name in fields) else ()


def _slots(kind):
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        yield from (name for name in names if name not in ("__dict__", "__weakref__"))


def _state(obj):
    state = dict(getattr(obj, "__dict__", {}))
    state |= {name: getattr(obj, name) for name in _slots(type(obj)) if hasattr(obj, name)}
    return tuple(state.items())


def set_state(obj: Any, state: tuple) -> None:
    """Give an object its attributes, past what its class makes of that."""
    slots = set(_slots(type(obj)))
    for name, value in state:
        if type(name) is not str:
            raise FrameError("an attribute that has no name")
        named = isinstance(obj, (NameError, AttributeError, ImportError))
        if name in slots or not hasattr(obj, "__dict__") or (named and name in ("name", "path")):
            object.__setattr__(obj, name, value)
        else:
            obj.__dict__[name] = value


@functools.lru_cache(256)
def _named_tuple(name, fields):
    return collections.namedtuple(name, fields)


def _stand_in(name, bases):
    module, _, qualname = name.partition(":")
    about = {"__module__": module or "builtins", "__str__": lambda self: vars(self).get(_TEXT, "")}
    try:
        return type(qualname.rpartition(".")[2], bases, about)
    except TypeError:  # bases that do not go together
        return type(qualname.rpartition(".")[2], bases[:1], about)


def _new_exception(kind, args):
    if kind.__flags__ & _HEAP_TYPE == 0:
        with contextlib.suppress(Exception):  # some cannot be made of what they say they were
            return kind(*args)
    error = kind.__new__(kind, *args)
    error.args = args
    return error

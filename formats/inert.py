"""What a pickle says, read without importing or calling anything that it names.

    read_pickle(data)        # -> (contents, the names in it that are not plain data)

pickle, and torch.load with it, turns names in a file into calls. Here a name stays a name: tensors
become `Tensor` records of where their numbers lie, dictionaries, lists, numbers and text are
themselves, and whatever else a file would build is an `Inert` that says what it was. So a file
opens with an argparse.Namespace or a DeepSpeed enum in it, and neither ever exists. Nothing is
allocated by a size that a file merely claims.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

MAX_READS = 3_000_000  # two for most items of a list; a file of 10,000 tensors takes 500,000
MAX_NAMES = 1000
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 writes them
DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}


class Storage(NamedTuple):
    """The numbers of one or more tensors: the archive's record data/{key}."""

    key: str
    dtype: torch.dtype
    numel: int


class Tensor(NamedTuple):
    """A tensor as the pickle describes it; nothing of it is checked but the types."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Name:
    """A name that stands in a pickle, such as torch.float32 or os.system."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Inert:
    """What a file wanted to be made of a name: what it was called with, and its state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple):
        self.name, self.args, self.state = name, args, None


def read_pickle(data: bytes) -> tuple[Any, set[str]]:
    """(contents, the names that are not plain data). ValueError for what is no pickle, holds what
    only a hostile one does, or has more items than memory should be spent on."""
    reader = _Reader(_Counted(data))
    try:
        contents = reader.load()
    except Exception as error:  # an edge: a hostile pickle can raise anything
        raise ValueError(str(error) or type(error).__name__) from None
    return contents, set(reader.names)


class _Counted(io.BytesIO):
    """Every item costs one read or two, so that their number bounds time and memory."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise pickle.UnpicklingError("too many items: keep long lists as tensors")
        return super().read(size)


# ---------------------------------------------------------------------------------------------
# Names that plain data has


def _tensor(storage, offset, size, stride, grad=None, hooks=None, dtype=None, metadata=None):
    shape, strides = tuple(size), tuple(stride)
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without storage, or of no size")
    if len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    if metadata:  # a sign or a conjugate that is still to be taken
        return Inert("a tensor with pending operations", (metadata,))
    return Tensor(storage, offset, shape, strides, dtype or storage.dtype)


def _tensor_v2(storage, offset, size, stride, grad=None, hooks=None, metadata=None):
    return _tensor(storage, offset, size, stride, metadata=metadata)


def _tensor_v3(storage, offset, size, stride, grad, hooks, dtype, metadata=None):
    return _tensor(storage, offset, size, stride, dtype=DTYPES[dtype.name], metadata=metadata)


def _mapping(*args) -> dict:
    """Of OrderedDict and Counter, of a dictionary or of pairs."""
    made: dict = {}
    for given in args[:1]:
        for key, value in given.items() if isinstance(given, dict) else given:
            made[_plain_key(key)] = value
    return made


def _plain_key(key: Any) -> Any:
    """A key whose hash costs nothing: that of a tuple of tuples of tuples can take for ever."""
    parts = key if type(key) is tuple else (key,)
    for part in parts:
        if type(part) not in (str, bytes, int, float, bool, type(None), Inert, Name):
            raise pickle.UnpicklingError(f"a key of type {type(part).__name__}")
    return key


def _encoded(text, encoding):
    """How protocol 2 writes bytes."""
    if encoding not in ("latin1", "latin-1"):
        return Inert("_codecs.encode", (text, encoding))
    return text.encode("latin-1")


def _numpy_number(dtype, data=b""):
    """A plain number of numpy's, little-endian; anything else stays as it is."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else ""
    order = dtype.state[1] if isinstance(dtype, Inert) and type(dtype.state) is tuple else "<"
    if re.fullmatch(r"[fiu][1248]|b1", str(code)) and order in ("<", "|", "="):
        return np.frombuffer(data, code, count=1)[0].item()
    return Inert("numpy.scalar", (dtype, data))


PLAIN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch.Size": lambda *args: tuple(args[0]) if args else (),
    "torch.device": lambda *args: Inert("torch.device", args),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
    "numpy.dtype": lambda *args: Inert("numpy.dtype", args),
}
for _name in ("numpy.ndarray", "numpy.core.multiarray._reconstruct", "builtins.set"):
    PLAIN[_name] = lambda *args, name=_name: Inert(name, args)
PLAIN["numpy._core.multiarray._reconstruct"] = PLAIN["numpy.core.multiarray._reconstruct"]
TENSORS_OWN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def is_plain(name: str) -> bool:
    """Whether an honest file of tensors and numbers holds it."""
    storage = re.fullmatch(r"torch\.(cuda\.)?(\w+)Storage", name)
    return (
        name in PLAIN
        or name in DTYPES
        or name in ("torch.storage.UntypedStorage", "torch._tensor._rebuild_from_type_v2")
        or name in TENSORS_OWN
        or (storage is not None and storage[2] in STORAGES)
        or re.fullmatch(r"numpy\.dtypes\.\w+DType", name) is not None
    )


# ---------------------------------------------------------------------------------------------
# The reader


class _Reader(pickle._Unpickler):  # the one in plain Python: each operation is a method
    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.names: dict[str, Name] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if len(self.names) == MAX_NAMES:
            raise pickle.UnpicklingError("too many names")
        return self.names.setdefault(full, Name(full))

    def persistent_load(self, pid: Any) -> Storage:
        kind, of, key, _, numel = pid
        name = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", of.name)
        untyped = of.name == "torch.storage.UntypedStorage"
        if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage that is none")
        return Storage(key, torch.uint8 if untyped else STORAGES[name[1]], numel)  # type: ignore

    def made_of(self, of: Any, args: Any) -> Any:
        """What stands for the result of a call."""
        if not isinstance(of, Name) or type(args) is not tuple:
            raise pickle.UnpicklingError("a call of what is no name")
        if of.name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            func, kind, inner, _ = args
            return self.made_of(func if kind.name in TENSORS_OWN else kind, inner)
        if of.name == "collections.defaultdict":
            return _mapping(*args[1:])
        return PLAIN[of.name](*args) if of.name in PLAIN else Inert(of.name, args)

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = self.made_of(self.stack[-1], args)

    def load_newobj(self):
        args = self.stack.pop()
        self.stack[-1] = self.made_of(self.stack[-1], args)

    def load_frame(self):
        self.read(8)  # a frame is a hint for files; its items would be read uncounted

    def load_newobj_ex(self):
        named, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.made_of(self.stack[-1], (*args, named))

    def _instantiate(self, klass, args):
        self.append(self.made_of(klass, tuple(args)))

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state  # of a dictionary (state_dict's _metadata) it is dropped

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self):
        self._set_items(self.pop_mark())

    def _set_items(self, items):
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(target, dict):
                target[_plain_key(key)] = value
        if not isinstance(target, (dict, Inert)):
            raise pickle.UnpicklingError(f"items of a {type(target).__name__}")

    def load_append(self):
        self._extend([self.stack.pop()])

    def load_appends(self):
        self._extend(self.pop_mark())

    def _extend(self, items):
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"items of a {type(target).__name__}")

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(pickle._Unpickler.dispatch)


for _opcode, _method in {
    pickle.FRAME: _Reader.load_frame,
    pickle.REDUCE: _Reader.load_reduce,
    pickle.NEWOBJ: _Reader.load_newobj,
    pickle.NEWOBJ_EX: _Reader.load_newobj_ex,
    pickle.BUILD: _Reader.load_build,
    pickle.SETITEM: _Reader.load_setitem,
    pickle.SETITEMS: _Reader.load_setitems,
    pickle.APPEND: _Reader.load_append,
    pickle.APPENDS: _Reader.load_appends,
}.items():
    _Reader.dispatch[_opcode[0]] = _method
for _opcode in (  # by a claimed size, by tables of this process, by hashes: none is ever needed
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
):
    del _Reader.dispatch[_opcode[0]]

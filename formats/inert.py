"""What the pickle of a file of torch.save says: tensors as records of where their numbers lie.

    read_pickle(data)        # -> (contents, the names in it)

Read by pickles.py, for which a name stays a name. Here those that plain data has become `Tensor`
records, dictionaries and numbers, and whatever else a file would build is an inert Record that says
what it was. So a file opens with an argparse.Namespace or a DeepSpeed enum in it, and neither ever
exists.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from formats import pickles
from formats.pickles import Record

MAX_NAMES = 1000
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


def read_pickle(data: bytes) -> tuple[Any, set[str]]:
    """(contents, the names that stand in it). ValueError for what is no pickle, holds what only a
    hostile one does, or has more items than memory should be spent on."""
    names = _Names(READ)
    try:
        contents = pickles.read(data, "its data.pkl", names, _storage)
    except Exception as error:  # an edge: what plain names are given can be anything
        raise ValueError(str(error) or type(error).__name__) from None
    return contents, names.seen


class _Names(dict):
    """Every name is taken: those that plain data does not have stand for inert records."""

    def __init__(self, plain: dict):
        super().__init__(plain)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Callable[..., Any] | None:
        self.seen.add(name)
        if len(self.seen) > MAX_NAMES:
            raise ValueError("it has too many names")
        return self.get(name)


def _storage(pid: Any) -> Storage:
    """Of ("storage", its class, its key, its device, its length)."""
    kind, of, key, _, numel = pid
    if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
        raise ValueError("a storage that is none")
    if of.name == "torch.storage.UntypedStorage":
        return Storage(key, torch.uint8, numel)
    named = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", of.name)
    return Storage(key, STORAGES[named[1]], numel)  # type: ignore[index]


# ---------------------------------------------------------------------------------------------
# Names that plain data has


def _tensor(storage, offset, size, stride, grad=None, hooks=None, dtype=None, metadata=None):
    shape, strides = tuple(size), tuple(stride)
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor without storage, or of no size")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    if metadata:  # a sign or a conjugate that is still to be taken
        return Record("a tensor with pending operations", (metadata,))
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
            made[pickles.as_key(key)] = value
    return made


def _encoded(text, encoding):
    """How protocol 2 writes bytes."""
    if encoding not in ("latin1", "latin-1"):
        return Record("_codecs.encode", (text, encoding))
    return text.encode("latin-1")


def _numpy_number(dtype, data=b""):
    """A plain number of numpy's, little-endian; anything else stays as it is."""
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else ""
    order = dtype.state[1] if isinstance(dtype, Record) and type(dtype.state) is tuple else "<"
    if re.fullmatch(r"[fiu][1248]|b1", str(code)) and order in ("<", "|", "="):
        return np.frombuffer(data, code, count=1)[0].item()
    return Record("numpy.scalar", (dtype, data))


def _with_attributes(function, kind, args, state):
    """A tensor that attributes were put on; inert if it is of a class of its own."""
    make = PLAIN.get(function.name) if kind.name in TENSORS_OWN else None
    return Record(kind.name, args) if make is None else make(*args)


TENSORS_OWN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
PLAIN: dict[str, Callable[..., Any] | None] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": None,
    "torch.storage.UntypedStorage": None,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "builtins.set": None,
    "_codecs.encode": _encoded,
    "numpy.dtype": None,
    "numpy.ndarray": None,
    **dict.fromkeys(TENSORS_OWN),
}
for _core in ("numpy.core", "numpy._core"):
    PLAIN[f"{_core}.multiarray.scalar"] = _numpy_number
    PLAIN[f"{_core}.multiarray._reconstruct"] = None
READ = PLAIN | {
    "collections.defaultdict": lambda factory=None, *items: _mapping(*items),
    "builtins.bytes": lambda *args: Record("builtins.bytes", args) if args else b"",
}


def is_plain(name: str) -> bool:
    """Whether an honest file of tensors and numbers holds it."""
    storage = re.fullmatch(r"torch\.(cuda\.)?(\w+)Storage", name)
    return (
        name in PLAIN
        or name in DTYPES
        or (storage is not None and storage[2] in STORAGES)
        or re.fullmatch(r"numpy\.dtypes\.\w+DType", name) is not None
    )

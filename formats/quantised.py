"""Matrices that somebody quantised: codes in one tensor of a module, scales and zeros in others.

    settings = settings_of(path, config)      # quantization_config, or a file that says the same
    tensors, facts = dense(table, ("qweight", "scales"), matrix, settings)
    tensors["model.layers.0.mlp.up_proj.weight"]    # a Stored [N, K], unpacked as it is read
    codes_of(stored)                                # what a layer keeps that stays packed, or None

A format (gptq.py, awq.py, …) says where the codes of a matrix lie; what all have in common is here.
The numbers are those of Codes, in float32 and rounded once, to the dtype of the model. Activations
are never quantised, whatever a file asks for: `facts` say so.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from formats import shown
from formats.blocks import TYPES, Blocks
from formats.stored import Box, Piece, Stored, read_whole, rows
from inputs import read_object
from quantisation import linear
from quantisation.codes import Codes

BAND = 1 << 20  # numbers that are unpacked at a time
INTEGERS = (torch.int32, torch.int64)
DTYPES = {  # of safetensors, beside tensorfiles.SAFETENSORS_DTYPES
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ
KEYS = ("quantization_config", "compression_config")

# ---------------------------------------------------------------------------------------------
# What a directory says


class Settings(NamedTuple):
    """What is said of how weights were quantised, and in which file."""

    method: str
    values: dict[str, Any]
    file: Path

    def value(self, *names: str) -> Any:
        """Of the first of these names that says something."""
        return next((v for name in names if (v := self.values.get(name)) is not None), None)

    def one_of(self, names: str, allowed: tuple, usual: Any = None) -> Any:
        """What one of several names says, `usual` where none does. ValueError unless allowed."""
        value = self.value(*names.split())
        value = usual if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(other) and value == other for other in allowed):
            read = ", ".join(str(other) for other in allowed)
            raise ValueError(
                f"{self.file}: {names.split()[0]} is {value!r:.60}, which is not read of "
                f"{self.method}: read are {read}"
            )
        return value

    def group_size(self, *names: str) -> int | None:
        """Columns that share a scale; None for a whole row."""
        value = self.value(*names)
        if value is not None and not (value == -1 or is_size(value)):
            raise ValueError(f"{self.file}: {names[0]} must be -1 or a size, not {value!r:.60}")
        return None if value in (None, -1) else value

    def refuse(self, *names: str) -> None:
        """ValueError where one of these, which would change the numbers, is set."""
        for name in names:
            if self.values.get(name):
                raise ValueError(
                    f"{self.file}: {name} is {self.values[name]!r:.60}, which is not read of "
                    f"{self.method}: name the original"
                )


def is_size(found: Any) -> bool:
    """Whether it is a number of rows, columns or bytes that a tensor may have."""
    return type(found) is int and 0 < found < 2**31


def settings_of(path: Path, config: dict[str, Any] | None) -> Settings | None:
    """Of a directory with this config.json; None where nothing is said. ValueError for a damaged
    file."""
    file, config = path / "config.json", config or {}
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for key in KEYS:
            said = values.get(key)
            if said and not isinstance(said, dict):
                raise ValueError(f"{file}: {key} must be an object, not {said!r:.60}")
            if said:
                return Settings(_method(said, ""), said, file)
    for name, usual in BESIDE.items():
        if (path / name).is_file():
            said = read_object(path / name)
            return Settings(_method(said, usual), said, path / name)
    return None


def _method(values: dict[str, Any], usual: str) -> str:
    if values.get("load_in_8bit") or values.get("load_in_4bit"):
        usual = "bitsandbytes"
    said = values.get("quant_method") or values.get("method") or usual
    return str(said or "nobody that it names")[:60].lower()


# ---------------------------------------------------------------------------------------------
# One matrix


class Module(NamedTuple):
    """The tensors of one linear layer, by the rest of their names."""

    name: str
    tensors: dict[str, Stored]

    def error(self, leaf: str, why: str) -> ValueError:
        """What to raise of one of its tensors."""
        stored = self.tensors.get(leaf) or next(iter(self.tensors.values()))
        file = stored.pieces[0].file if stored.pieces else "a file without tensors"
        return ValueError(f"{file}: {shown(f'{self.name}.{leaf}')} {why}")

    def tensor(
        self, leaf: str, dtypes: Collection[object], shape: tuple[int | None, ...] | None = None
    ) -> Stored:
        """One of them, which must be of one of these types and this shape; None: of any size."""
        stored = self.tensors.get(leaf)
        if stored is None:
            raise self.error(leaf, "is not there, without which the others say nothing")
        dtype = DTYPES.get(str(stored.dtype), stored.dtype)
        alike = shape is None or len(shape) == len(stored.shape)
        fits = alike and all(n in (None, m) for n, m in zip(shape or (), stored.shape))
        whole = len(stored.pieces) == 1 and stored.pieces[0].strides is None
        if dtype not in dtypes or not fits or not whole:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            sides = f" {[n if n is not None else '…' for n in shape]}" if shape else ""
            found = f"{str(dtype).removeprefix('torch.')} {list(stored.shape)}"
            raise self.error(leaf, f"is {found}, and not {kinds}{sides}")
        return stored._replace(dtype=dtype)


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix [N, K], and how its numbers are unpacked."""

    rule: str  # "gptq-w4-g128-sym"
    bits: int  # of a code
    shape: tuple[int, int]
    parts: tuple[Stored, ...]
    codes: Callable[[int, int], Codes] | None  # of its rows, or columns, from the first to the last
    dense: Callable[[int, int], torch.Tensor] | None = None  # numbers, where codes do not say them
    along: int = 0  # 0: rows are unpacked together, 1: columns
    step: int = 1  # how many begin where a word of the file does

    def stored(self) -> Stored:
        """As one tensor."""
        pieces = tuple(piece for part in self.parts for piece in part.pieces)
        return Stored(torch.float32, self.shape, pieces, self)

    def bands(self) -> Iterator[Box]:
        """As stored.read."""
        side, other = self.shape[self.along], self.shape[1 - self.along]
        count = max(1, BAND // max(1, other) // self.step) * self.step
        for first in range(0, side, count):
            last = min(first + count, side)
            where = [slice(0, n) for n in self.shape]
            where[self.along] = slice(first, last)
            if self.dense is not None:
                yield tuple(where), self.dense(first, last)
            elif self.codes is not None:
                yield tuple(where), self.codes(first, last).dequantise()

    @property
    def bytes(self) -> int:
        """In the file, with scales and all."""
        sizes = (math.prod(t.shape) * t.dtype.itemsize for t in self.parts)  # type: ignore[union-attr]
        return sum(sizes)


def is_quantised(stored: Stored) -> bool:
    """Whether a tensor's numbers are codes and scales in its file."""
    in_blocks = (piece.blocks for piece in stored.pieces if piece.blocks)
    return stored.packed is not None or any(how.name in TYPES for how in in_blocks)


def has_codes(stored: Stored) -> bool:
    """Whether its numbers are those of Codes, bit for bit: not those of bitsandbytes."""
    if stored.packed is not None:
        return isinstance(stored.packed, Matrix) and stored.packed.codes is not None
    lie = (piece.blocks and piece.blocks.codes and len(piece.shape) == 2 for piece in stored.pieces)
    return bool(stored.pieces) and all(lie)


def codes_of(stored: Stored) -> list[Codes] | None:
    """The codes of a whole matrix, in memory, of some rows after the others where they lie in
    several ways; None where it `has_codes` not."""
    if not has_codes(stored):
        return None
    matrix = stored.packed
    if isinstance(matrix, Matrix) and matrix.codes is not None:
        return [matrix.codes(0, matrix.shape[matrix.along])]
    return [_codes_of_blocks(run, how) for how, run in _runs_of_blocks(stored)]


def held_bytes(stored: Stored) -> int:
    """Of a matrix that `has_codes`, where these are kept packed: a few of them are read."""
    matrix = stored.packed
    if not (isinstance(matrix, Matrix) and matrix.codes):
        size = 0
        for how, run in _runs_of_blocks(stored):
            N, K = sum(piece.shape[0] for piece in run), stored.shape[1]
            some = _codes_of_blocks([run[0]._replace(shape=(1, K))], how)
            size += linear.held_bytes(some, N, K, some.scales.shape[1])
        return size
    some = matrix.codes(0, min(matrix.step, matrix.shape[matrix.along]))
    G = some.scales.shape[1]
    if matrix.along:  # those columns lie in a few of its groups
        floats = (p for p in matrix.parts if getattr(p.dtype, "is_floating_point", False))
        G = next(floats).shape[0]
    return linear.held_bytes(some, *matrix.shape, G)


def _runs_of_blocks(stored: Stored) -> list[tuple[Blocks, list[Piece]]]:
    """Rows that follow each other and lie in blocks of one kind."""
    pieces = sorted(stored.pieces, key=lambda piece: piece.start)
    runs = itertools.groupby(pieces, key=lambda piece: piece.blocks)
    return [(how, list(run)) for how, run in runs if how]


def _codes_of_blocks(pieces: list[Piece], how: Blocks) -> Codes:
    """Of rows that lie in blocks of one kind, read as the bytes that they are."""
    assert how.codes, how.name
    N, K = sum(p.shape[0] for p in pieces), pieces[0].shape[1]
    first, width = pieces[0].start[0], how.size_of(K)
    lines = tuple(
        p._replace(
            start=(p.start[0] - first, 0),
            shape=(p.shape[0], width),
            strides=p.strides and (how.size_of(p.strides[0]), 1),
            blocks=None,
        )
        for p in pieces
    )
    raw = read_whole(Stored(torch.uint8, (N, width), lines))
    codes, scales, minima = how.codes(raw.view(-1, how.bytes))
    minima = None if minima is None else minima.view(N, -1)
    rule, codes, scales = f"gguf-{how.name}", codes.view(N, K), scales.view(N, -1)
    return Codes(rule, how.bits, codes, scales, minima, added=minima is not None)


def values(stored: Stored, first: int = 0, last: int | None = None) -> torch.Tensor:
    """A part of a matrix in memory, or some rows of it."""
    return read_whole(stored if last is None else rows(stored, [range(first, last)]))


def reshaped(stored: Stored, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Stored:
    """The same bytes under another shape."""
    (piece,) = stored.pieces
    piece = piece._replace(start=(0,) * len(shape), shape=shape)
    return Stored(dtype or stored.dtype, shape, (piece,))


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of `bits` bits in the int32 words of each line, from the lowest bits on, and from
    one word on into the next: uint8 [lines, as many as are whole]."""
    if 8 % bits == 0:  # none crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        found = words.contiguous().view(torch.uint8)[..., None] >> shifts
        return (found & ((1 << bits) - 1)).flatten(1)
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))  # words are signed
    starts = torch.arange(words.shape[1] * 32 // bits) * bits
    word, shift = starts // 32, starts % 32
    found = (wide[:, word] | (wide[:, word + 1] << 32)) >> shift
    return (found & ((1 << bits) - 1)).to(torch.uint8)


def in_order(groups: torch.Tensor, n_groups: int) -> torch.Tensor | None:
    """Codes.groups: None where columns k // (K / G) share a scale."""
    size = len(groups) // max(1, n_groups)
    usual = size * n_groups == len(groups) and torch.equal(
        groups, torch.arange(len(groups)) // max(1, size)
    )
    return None if usual else groups


def scaled(
    module: Module, rule: str, codes: Stored, scales: Stored, block: tuple[int, int], zeros: Any
) -> Matrix:
    """A matrix whose codes lie one an element, in blocks of rows and columns that share a scale:
    of one row and some columns, or all of them, or a tile of 128 x 128. zeros: as scales, or
    None."""
    N, K = codes.shape
    table = (math.ceil(N / block[0]), math.ceil(K / block[1]))
    scales = reshaped(scales, table)
    zeros = zeros and reshaped(zeros, table)
    groups = in_order(torch.arange(K) // block[1], table[1])

    def band(first: int, last: int) -> Codes:
        begin, end = first // block[0], math.ceil(last / block[0])
        row = torch.arange(first, last) // block[0] - begin
        found = values(scales, begin, end)[row]
        found = found.float() if found.dtype == torch.float8_e8m0fnu else found
        shift = values(zeros, begin, end)[row] if zeros else None
        return Codes(rule, 8, values(codes, first, last), found, shift, groups)

    parts = (codes, scales, zeros) if zeros else (codes, scales)
    return Matrix(rule, 8, (N, K), parts, band)


# ---------------------------------------------------------------------------------------------
# A table


def dense(
    table: dict[str, Stored],
    leaves: str,
    matrix: Callable[[Module], Matrix],
    settings: Settings,
) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(a table with one tensor for each quantised matrix, facts). leaves: the rest of the names of
    those that say it, patterns; a module that has the first, which can be several parted by "|", is
    quantised."""
    keys, *others = leaves.split()
    pattern = re.compile(rf"(.+?)\.({'|'.join([keys, *others])})")
    found = {name: m for name in table if (m := pattern.fullmatch(name))}
    quantised = {m[1] for m in found.values() if re.fullmatch(keys, m[2])}
    modules: dict[str, dict[str, Stored]] = {}
    for name, m in found.items():
        if m[1] in quantised:
            modules.setdefault(m[1], {})[m[2]] = table[name]
    plain = {
        name: t for name, t in table.items() if not (m := found.get(name)) or m[1] not in modules
    }
    made = {}
    for name, tensors in modules.items():
        module = Module(name, tensors)
        if f"{name}.weight" in plain:
            raise module.error(next(iter(tensors)), "stands beside a weight: which one counts?")
        made[f"{name}.weight"] = matrix(module)
    facts = facts_of(made.values(), settings) if made else {}
    return plain | {name: one.stored() for name, one in made.items()}, facts


def facts_of(matrices: Iterable[Matrix], settings: Settings) -> dict[str, Any]:
    """What a record says of them."""
    matrices = list(matrices)
    rules = Counter(matrix.rule for matrix in matrices)
    numbers = sum(math.prod(matrix.shape) for matrix in matrices)
    costs = cost(rules, sum(matrix.bytes for matrix in matrices), numbers)
    return costs | {"method": settings.method, "activations": "not quantised"}


def cost(rules: Counter[str], weight_bytes: int, numbers: int) -> dict[str, Any]:
    """Of all quantised matrices together: the rules, the most usual first; the bytes that they take
    with their scales, and the bits of one of so many numbers."""
    return {
        "rule": "+".join(rule for rule, _ in rules.most_common()),
        "matrices": rules.total(),
        "weight_bytes": weight_bytes,
        "bits_per_weight": round(8 * weight_bytes / max(1, numbers), 4),
    }

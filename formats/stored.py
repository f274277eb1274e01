"""Where the bytes of a tensor lie, in one file or in pieces over several, and how they are read.

    stored = whole("model.bin", 4096, torch.bfloat16, [50257, 768])
    stored = joined("lm_head.weight", torch.float32, [8, 6], [Piece(a, 0, (0, 0), (8, 3)), ...])
    for where, values in read(stored):
        weight[where] = values                       # some MB at a time, any dtype, any device

    stacked(name, parts), unstacked(stored)      # a tensor of several, and each of them again
    rows(stored, [range(0, 8, 2), range(1, 8, 2)])   # another order of its rows: a table, no bytes
    beside([q, k, v])                                # one below the other, or next to (dim=1)

Bytes are read, not mapped, so a file that shrinks meanwhile is an error, not a SIGBUS (tensors
whose rows do not lie in one piece, which are rare, excepted). A piece whose numbers lie packed in
blocks (formats/blocks.py) is unpacked as it is read, and so is a matrix whose codes are one tensor
and whose scales are another (formats/quantised.py). Of torch only.
"""

import math
import mmap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from formats.blocks import Blocks

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READ_BYTES = 16 << 20


class Checksum(NamedTuple):
    """Bytes of a file, and their CRC-32."""

    offset: int
    size: int
    crc: int


class Piece(NamedTuple):
    """A box of a tensor, as it lies in one file in C order from `offset` on."""

    file: Path
    offset: int  # bytes
    start: tuple[int, ...]  # of the box in the whole tensor
    shape: tuple[int, ...]  # of the box
    record: str = ""  # the entry of a zip archive whose CRC covers it
    strides: tuple[int, ...] | None = None  # in elements, where it is not in C order
    check: Checksum | None = None  # of bytes that it lies within, where the file states one
    blocks: Blocks | None = None  # how its numbers lie packed; every row is whole blocks

    def size_of(self, numbers: int, dtype: torch.dtype | str) -> int:
        """Bytes of so many of its numbers; 0 of a type that is not read."""
        if self.blocks is not None:
            return self.blocks.size_of(numbers)
        return numbers * dtype.itemsize if isinstance(dtype, torch.dtype) else 0


Box = tuple[tuple[slice, ...], torch.Tensor]  # where in a tensor, and its numbers there


class Packed(Protocol):
    """How several tensors say one together."""

    @property
    def rule(self) -> str:
        """Who made its numbers, and how: "gptq-w4-g128-sym"."""

    def bands(self) -> Iterator[Box]:
        """All its numbers in float32, some rows or columns at a time."""


class Stored(NamedTuple):
    """A tensor in files, whole or in pieces that tile it. It holds no memory and no open file."""

    dtype: torch.dtype | str  # a str: one that torch has no use for here
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    packed: Packed | None = None  # then the pieces are those of all tensors that say it

    @property
    def kinds(self) -> set[str]:
        """How its numbers lie there: "bfloat16", or blocks or a rule by their name."""
        if self.packed is not None:
            return {self.packed.rule}
        plain = str(self.dtype).removeprefix("torch.")
        return {piece.blocks.name if piece.blocks else plain for piece in self.pieces} or {plain}


def whole(
    file: Path,
    offset: int,
    dtype: torch.dtype | str,
    shape: Iterable[int],
    record: str = "",
    strides: tuple[int, ...] | None = None,
) -> Stored:
    """A tensor in one piece."""
    shape = tuple(shape)
    return Stored(dtype, shape, (Piece(file, offset, (0,) * len(shape), shape, record, strides),))


def joined(
    name: str, dtype: torch.dtype | str, shape: Iterable[int], pieces: Iterable[Piece]
) -> Stored:
    """A tensor of pieces. ValueError, naming their files, unless they tile it: every element in
    exactly one of them."""
    shape, pieces = tuple(shape), tuple(sorted(pieces, key=lambda piece: piece.start))
    what = f"tensor {name} {list(shape)}"
    for piece in pieces:
        stops = [a + n for a, n in zip(piece.start, piece.shape)]
        if not (len(piece.start) == len(piece.shape) == len(shape)) or not all(
            0 <= a <= stop <= n for a, stop, n in zip(piece.start, stops, shape)
        ):
            raise ValueError(f"{piece.file}: its piece {_box(piece)} lies outside {what}")
    for a, b in _overlapping(pieces):
        raise ValueError(
            f"{b.file}: its piece {_box(b)} of {what} overlaps the piece {_box(a)} in {a.file}"
        )
    held, wanted = sum(math.prod(piece.shape) for piece in pieces), math.prod(shape)
    if held != wanted:
        where = pieces[0].file if pieces else "no file"
        raise ValueError(f"{where}: the pieces of {what} hold {held:,} of its {wanted:,} elements")
    return Stored(dtype, shape, pieces)


def _box(piece: Piece) -> str:
    return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(piece.start, piece.shape))}]"


def _overlapping(pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs that share an element. Along the dimension that is cut most, neighbours suffice."""
    filled = [piece for piece in pieces if math.prod(piece.shape)]
    if len(filled) < 2:
        return
    dims = range(len(filled[0].start))
    most = max(dims, key=lambda d: len({piece.start[d] for piece in filled}), default=None)
    if most is None:  # scalars
        yield filled[0], filled[1]
        return
    filled.sort(key=lambda piece: piece.start[most])
    for i, a in enumerate(filled):
        for b in filled[i + 1 :]:
            if b.start[most] >= a.start[most] + a.shape[most]:
                break
            if all(
                a.start[d] < b.start[d] + b.shape[d] and b.start[d] < a.start[d] + a.shape[d]
                for d in dims
            ):
                yield a, b


def rows(stored: Stored, runs: Iterable[range]) -> Stored:
    """The rows (places along the first dimension) of `runs`, one after the other."""
    assert stored.packed is None, "a matrix of several tensors is read whole"
    pieces, base = [], 0
    for run in runs:
        assert run.step > 0 and (not run or 0 <= run[0] <= run[-1] < stored.shape[0]), run
        for piece in stored.pieces:
            a, n = piece.start[0], piece.shape[0]
            first = max(0, -((run.start - a) // run.step))
            stop = min(len(run), -((run.start - a - n) // run.step))
            if first >= stop:
                continue
            strides = piece.strides or _packed(piece.shape)
            before = (run.start + first * run.step - a) * strides[0]
            at = piece.offset + piece.size_of(before, stored.dtype)
            whole_rows = piece.strides is None and (run.step == 1 or stop - first == 1)
            moved = None if whole_rows else (strides[0] * run.step, *strides[1:])
            start, shape = (base + first, *piece.start[1:]), (stop - first, *piece.shape[1:])
            pieces.append(piece._replace(offset=at, start=start, shape=shape, strides=moved))
        base += len(run)
    return Stored(stored.dtype, (base, *stored.shape[1:]), tuple(pieces))


def beside(name: str, parts: Iterable[Stored], dim: int = 0) -> Stored:
    """Tensors put together along one dimension. ValueError, naming a file, unless they agree in the
    others."""
    parts, pieces, base = list(parts), [], 0
    kinds = {(part.dtype, *part.shape[:dim], None, *part.shape[dim + 1 :]) for part in parts}
    if len(kinds) != 1 or len(parts[0].shape) <= dim:
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        where = next((piece.file for part in parts for piece in part.pieces), "a file")
        raise ValueError(f"{where}: the parts of {name} do not go together: {shapes}")
    for part in parts:
        for piece in part.pieces:
            start = (*piece.start[:dim], piece.start[dim] + base, *piece.start[dim + 1 :])
            pieces.append(piece._replace(start=start))
        base += part.shape[dim]
    shape = (*parts[0].shape[:dim], base, *parts[0].shape[dim + 1 :])
    return Stored(parts[0].dtype, shape, tuple(pieces))


def stacked(name: str, parts: Iterable[Stored]) -> Stored:
    """Tensors of one shape along a new first dimension. ValueError, naming a file, unless they
    are."""
    each = []
    for part in parts:
        pieces = (
            p._replace(
                start=(0, *p.start),
                shape=(1, *p.shape),
                strides=p.strides and (math.prod(p.shape), *p.strides),
            )
            for p in part.pieces
        )
        each.append(Stored(part.dtype, (1, *part.shape), tuple(pieces)))
    return beside(name, each)


def unstacked(stored: Stored, turned: bool = False) -> list[Stored]:
    """The tensors that are stacked along the first dimension; turned: with their last two
    dimensions the other way round, which blocks of packed numbers cannot be."""
    pieces: list[list[Piece]] = [[] for _ in range(stored.shape[0])]
    order = (*range(1, len(stored.shape) - 2), -1, -2) if turned else range(1, len(stored.shape))
    for piece in stored.pieces:
        assert not (turned and piece.blocks), f"{piece.file}: rows of blocks cannot be turned"
        strides = piece.strides or _packed(piece.shape)
        own = tuple(strides[d] for d in order)
        shape = tuple(piece.shape[d] for d in order)
        start = tuple(piece.start[d] for d in order)
        moved = None if own == _packed(shape) else own
        for i in range(piece.shape[0]):
            at = piece.offset + piece.size_of(i * strides[0], stored.dtype)
            part = piece._replace(offset=at, start=start, shape=shape, strides=moved)
            pieces[piece.start[0] + i].append(part)
    shape = tuple(stored.shape[d] for d in order)
    return [Stored(stored.dtype, shape, tuple(own)) for own in pieces]


def ranges(flat: Stored, at: int, shape: tuple[int, ...], first: int, last: int) -> Iterator[Piece]:
    """The elements first … last of a tensor in C order, which lie one after the other from place
    `at` of a vector, as boxes of that tensor."""
    size = flat.dtype.itemsize if isinstance(flat.dtype, torch.dtype) else 0
    (piece,) = flat.pieces
    assert piece.blocks is None, "a row of numbers is cut anywhere, a block nowhere"
    assert piece.strides is None and 0 <= at <= at + last - first <= flat.shape[0]
    for start, box in _boxes(shape, first, last):
        yield piece._replace(offset=piece.offset + at * size, start=start, shape=box)
        at += math.prod(box)


def _boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple]:
    """(start, shape) of the boxes that elements first … last - 1 fill, in order."""
    if len(shape) < 2:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while first < last:
        i, within = divmod(first, row)
        whole = (last - first) // row if within == 0 else 0
        if whole:
            yield (i, *(0 for _ in shape[1:])), (whole, *shape[1:])
            first += whole * row
            continue
        end = min(row, within + last - first)
        for start, box in _boxes(shape[1:], within, end):
            yield (i, *start), (1, *box)
        first += end - within


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of C order."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def check_sums(pieces: Iterable[Piece]) -> None:
    """ValueError if bytes that a piece lies within are not those of its checksum."""
    for file, check in sorted({(piece.file, piece.check) for piece in pieces if piece.check}):
        crc, left = 0, check.size
        with open(file, "rb") as f:
            f.seek(check.offset)
            while left and (data := f.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != check.crc:
            raise ValueError(f"{file} is damaged: the checksum at byte {check.offset:,} is wrong")


class Staging:
    """Memory that files are read into, the same for one tensor after another: of a thread's own.
    pinned: for a GPU, which then takes it at the full speed of its bus."""

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self.memory: torch.Tensor | None = None

    def room(self, size: int) -> torch.Tensor:
        """`size` bytes, uint8; what was in them is gone."""
        if self.memory is None or len(self.memory) < size:
            most = max(size, READ_BYTES)
            if self.pinned:
                self.memory = torch.empty(most, dtype=torch.uint8, pin_memory=True)
            else:  # mapped, not malloc'ed: it leaves the process whole, with no hole in the heap
                mapped = mmap.mmap(-1, most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self.memory = torch.frombuffer(mapped, dtype=torch.uint8)
        return self.memory[:size]


def read(stored: Stored, staging: Staging | None = None) -> Iterator[Box]:
    """(where, values) over a stored tensor, so that `t[where] = values` fills one of its shape; at
    most READ_BYTES at a time, unless a row has more. The values last until the next step, and
    with a staging of the caller's no longer than its next use."""
    assert isinstance(stored.dtype, torch.dtype), "check_fits refuses what torch has no use for"
    if stored.packed is not None:
        yield from stored.packed.bands()
        return
    staging = staging or Staging()
    for piece in stored.pieces:
        if math.prod(piece.shape):
            yield from _read_piece(piece, stored.dtype, staging)


def _read_piece(piece: Piece, dtype: torch.dtype, staging: Staging) -> Iterator[Box]:
    shape = piece.shape or (1,)
    packed = _packed(shape)
    strides = piece.strides or packed
    if len(shape) > 2 and packed[0] * dtype.itemsize > READ_BYTES:  # matrix by matrix of a stack
        for i in range(shape[0]):
            at = piece.offset + piece.size_of(i * strides[0], dtype)
            own = piece.strides and piece.strides[1:]
            one = piece._replace(offset=at, start=piece.start[1:], shape=shape[1:], strides=own)
            begin = piece.start[0] + i
            for where, values in _read_piece(one, dtype, staging):
                yield (slice(begin, begin + 1), *where), values[None]
        return
    in_rows = strides[1:] == packed[1:] and packed[0] <= strides[0]
    row = strides[0] if in_rows else packed[0]
    count = max(1, min(shape[0], READ_BYTES // (row * dtype.itemsize)))
    if in_rows:
        found = _read_rows(piece, dtype, shape, count, staging)
    else:
        assert piece.blocks is None, "packed rows lie whole"
        found = _map_rows(piece, dtype, shape, count)
    for row, values in found:
        if not piece.shape:
            yield (), values[0]
            continue
        begins = (piece.start[0] + row, *piece.start[1:])
        yield tuple(slice(a, a + n) for a, n in zip(begins, values.shape)), values


def _read_rows(
    piece: Piece, dtype: torch.dtype, shape: tuple[int, ...], rows: int, staging: Staging
):
    """(first row, values) of a box whose rows lie whole, one after the other or with room between
    them, `rows` at a time."""
    row_bytes = piece.size_of(math.prod(shape[1:]), dtype)
    pitch = row_bytes if piece.strides is None else piece.size_of(piece.strides[0], dtype)
    memory = staging.room(rows * pitch)
    lines, raw = memory.view(rows, pitch)[:, :row_bytes], memory.numpy().data
    with open(piece.file, "rb", buffering=0) as f:
        for row in range(0, shape[0], rows):
            count = min(rows, shape[0] - row)
            f.seek(piece.offset + row * pitch)
            wanted = raw[: (count - 1) * pitch + row_bytes]
            while wanted:
                n = f.readinto(wanted)
                if not n:
                    raise ValueError(f"{piece.file} became shorter while it was read")
                wanted = wanted[n:]
            yield row, _numbers(lines[:count], piece.blocks, dtype).view(count, *shape[1:])


def _numbers(lines: torch.Tensor, blocks: Blocks | None, dtype: torch.dtype) -> torch.Tensor:
    """What lines of bytes say, [lines, numbers]; without blocks a view of them."""
    if blocks is None:
        return lines.view(dtype)
    return blocks.decode(lines.reshape(-1, blocks.bytes)).view(len(lines), -1)


def _map_rows(piece: Piece, dtype: torch.dtype, shape: tuple[int, ...], rows: int):
    """The same of a strided box, which is mapped while it is read."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, piece.strides or (1,)))
    with open(piece.file, "rb") as f:
        try:
            end = piece.offset + span * dtype.itemsize
            memory = mmap.mmap(f.fileno(), end, access=mmap.ACCESS_COPY)
        except ValueError:
            raise ValueError(f"{piece.file} became shorter while it was read") from None
    flat = torch.frombuffer(memory, dtype=dtype, count=span, offset=piece.offset)
    values = flat.as_strided(shape, piece.strides or (1,))
    for row in range(0, shape[0], rows):
        yield row, values[row : row + rows]


def read_whole(stored: Stored) -> torch.Tensor:
    """A stored tensor in memory."""
    assert isinstance(stored.dtype, torch.dtype), "`equal` reads FLOATS only"
    t = torch.empty(stored.shape, dtype=stored.dtype)
    for where, values in read(stored):
        t[where] = values
    return t


def equal(a: Stored, b: Stored) -> bool:
    """Whether two stored tensors are the same numbers; usually because they are the same bytes."""
    if a == b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in FLOATS:
        return False
    cuts = [[(p.start, p.shape) for p in stored.pieces] for stored in (a, b)]
    if a.packed or b.packed or cuts[0] != cuts[1]:
        return torch.equal(read_whole(a), read_whole(b))
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(read(a), read(b), strict=True))

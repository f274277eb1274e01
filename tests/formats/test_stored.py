"""formats/stored.py: tensors in one file and in pieces over several, read and refused."""

import random

import pytest
import torch
from checkpoint_files import CONFIGS, logits, make_model

import checkpoint
from formats import filling, layouts, stored, tensorfiles
from formats.blocks import TYPES
from formats.stored import Piece, joined, read, read_whole, whole
from model import GPTModel


def cut(shape, rng, cuts=3, start=None):
    """Boxes (start, shape) that tile a tensor: cut in two along some dimension, again and again, so
    that they form no grid."""
    start = start or (0,) * len(shape)
    dims = [d for d, n in enumerate(shape) if n > 1]
    if not cuts or not dims:
        return [(start, shape)]
    d = rng.choice(dims)
    at = rng.randrange(1, shape[d])
    first = (*shape[:d], at, *shape[d + 1 :])
    second = (*shape[:d], shape[d] - at, *shape[d + 1 :])
    moved = (*start[:d], start[d] + at, *start[d + 1 :])
    return cut(first, rng, cuts - 1, start) + cut(second, rng, cuts - 1, moved)


def write_boxes(t, boxes, files, rng):
    """Pieces of t, appended to some of the files."""
    pieces = []
    for start, shape in boxes:
        where = tuple(slice(a, a + n) for a, n in zip(start, shape))
        content = t[where].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        file = rng.choice(files)
        with open(file, "ab") as f:
            f.write(bytes(rng.randrange(4) * t.element_size()))
            pieces.append(Piece(file, f.tell(), start, shape))
            f.write(content)
    rng.shuffle(pieces)
    return pieces


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 6), (1, 9), (3, 4, 5), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 48, 1 << 20])
def test_whole_tensors(tmp_path, monkeypatch, shape, dtype, step):
    monkeypatch.setattr(stored, "READ_BYTES", step)
    t = torch.randn(shape).to(dtype)
    (tmp_path / "a").write_bytes(b"head" * 2 + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert torch.equal(read_whole(whole(tmp_path / "a", 8, dtype, shape)), t)


@pytest.mark.parametrize("step", [16, 1 << 20])
@pytest.mark.parametrize("shape", [(40,), (12, 10), (6, 1, 8), (4, 6, 5)])
def test_pieces_in_several_files(tmp_path, monkeypatch, shape, step):
    """Rows, columns and boxes of both, on no grid, in any order."""
    monkeypatch.setattr(stored, "READ_BYTES", step)
    rng = random.Random(0)
    files = [tmp_path / name for name in "abc"]
    for _ in range(20):
        t = torch.randn(shape)
        pieces = write_boxes(t, cut(shape, rng, rng.randrange(5)), files, rng)
        assert torch.equal(read_whole(joined("w", torch.float32, shape, pieces)), t)


def test_strided_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "READ_BYTES", 40)
    t = torch.randn(6, 9)
    (tmp_path / "a").write_bytes(t.numpy().tobytes())
    transposed = whole(tmp_path / "a", 0, torch.float32, (9, 6), strides=(1, 9))
    assert torch.equal(read_whole(transposed), t.t())
    halves = [
        Piece(tmp_path / "a", 4 * at, (0, at), (6, n), strides=(9, 1)) for at, n in ((0, 4), (4, 5))
    ]
    assert torch.equal(read_whole(joined("w", torch.float32, (6, 9), halves)), t)


@pytest.mark.parametrize("step", [16, 300, 1 << 20])
def test_tensors_stacked_and_apart_again(tmp_path, monkeypatch, step):
    """In pieces and in other strides; a stack is read matrix by matrix where it is large."""
    monkeypatch.setattr(stored, "READ_BYTES", step)
    t, rng = torch.randn(4, 6, 5), random.Random(1)
    (tmp_path / "a").write_bytes(t.numpy().tobytes())
    turned = stored.unstacked(whole(tmp_path / "a", 0, torch.float32, t.shape), turned=True)
    pieces = write_boxes(t[0], cut((6, 5), rng), [tmp_path / "b"], rng)
    for each, wanted in (
        (turned, t.transpose(1, 2)),
        ([joined("w", torch.float32, (6, 5), pieces)] * 2, t[:1].expand(2, -1, -1)),
    ):
        stack = stored.stacked("w", each)
        assert stack.shape == wanted.shape and torch.equal(read_whole(stack), wanted)
        largest = max(values.numel() * 4 for _, values in read(stack))
        assert largest <= max(step, 4 * max(wanted.shape))
        assert [read_whole(one).tolist() for one in stored.unstacked(stack)] == wanted.tolist()
    with pytest.raises(ValueError, match="do not go together"):
        stored.stacked("w", [turned[0], joined("w", torch.float32, (6, 5), pieces)])


def test_shrinking_while_read_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    for more in ({}, {"strides": (1, 5)}):
        with pytest.raises(ValueError, match="a became shorter while it was read"):
            read_whole(whole(tmp_path / "a", 4, torch.float32, (5, 5), **more))


def box(start, shape, file="one.bin"):
    return Piece(file, 0, start, shape)


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([], r"no file: the pieces of tensor w \[4, 6\] hold 0 of its 24 elements"),
        ([box((0, 0), (4, 5))], r"one.bin: the pieces of tensor w .* hold 20 of its 24"),
        ([box((0, 0), (4, 7))], r"one.bin: its piece \[0:4, 0:7\] lies outside tensor w \[4, 6\]"),
        ([box((-1, 0), (4, 6))], r"\[-1:3, 0:6\] lies outside"),
        ([box((0,), (24,))], r"\[0:24\] lies outside"),
        ([box((0, 0, 0), (4, 6, 1))], "lies outside"),
        (
            [box((0, 0), (4, 6)), box((0, 0), (4, 6), "two.bin")],
            "overlaps .* (one|two).bin",
        ),
        ([box((0, 0), (2, 6)), box((1, 0), (3, 6), "two.bin")], r"piece \[1:4, 0:6\] .* overlaps"),
        ([box((0, 0), (4, 3)), box((1, 2), (3, 4), "two.bin")], "overlaps"),
        # as many elements as there should be, but one of them twice and one not at all
        ([box((0, 0), (3, 6)), box((3, 0), (1, 5)), box((2, 5), (1, 1), "two.bin")], "overlaps"),
        ([box((0, 0), (2, 6)), box((3, 0), (1, 6))], "hold 18 of its 24"),
    ],
)
def test_pieces_that_do_not_tile(pieces, match):
    for order in (pieces, pieces[::-1]):
        with pytest.raises(ValueError, match=match) as error:
            joined("w", torch.float32, (4, 6), order)
        assert "\n" not in str(error.value)


def test_scalars_and_empty_pieces():
    assert joined("s", torch.float32, (), [box((), ())]).shape == ()
    with pytest.raises(ValueError, match="overlaps"):
        joined("s", torch.float32, (), [box((), ()), box((), (), "two.bin")])
    pieces = [box((0, 0), (4, 6)), box((4, 0), (0, 6), "two.bin"), box((2, 3), (0, 0))]
    assert joined("w", torch.float32, (4, 6), pieces).shape == (4, 6)


def test_many_pieces_are_checked_quickly(tmp_path):
    mesh = [box((64 * i, 512 * j), (64, 512)) for i in range(64) for j in range(8)]
    for _ in range(20):
        joined("w", torch.float32, (4096, 4096), mesh)


def test_equal(tmp_path):
    rng = random.Random(1)
    t = torch.randn(8, 6)
    files = [tmp_path / "a", tmp_path / "b"]

    def stored_in(values, boxes):
        return joined("w", torch.float32, (8, 6), write_boxes(values, boxes, files, rng))

    rows, columns = [((0, 0), (3, 6)), ((3, 0), (5, 6))], [((0, 0), (8, 2)), ((0, 2), (8, 4))]
    one = stored_in(t, rows)
    other = t.clone()
    other[7, 5] += 1
    assert stored.equal(one, one)
    for boxes in (rows, columns, [((0, 0), (8, 6))]):
        assert stored.equal(one, stored_in(t, boxes))
        assert not stored.equal(one, stored_in(other, boxes))
    assert not stored.equal(one, one._replace(dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_fills_from_pieces(tmp_path, name):
    """The weights of a checkpoint, cut in boxes over three files: the same model."""
    rng = random.Random(2)
    model = make_model(CONFIGS[name])
    path = checkpoint.save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    ckpt = checkpoint.open(path)
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    tensors = {}
    for key, t in tensorfiles.open_safetensors(path / "model.safetensors").items():
        pieces = write_boxes(read_whole(t), cut(t.shape, rng, 2), files, rng)
        tensors[key] = joined(key, t.dtype, t.shape, pieces)
    again = GPTModel(model.config)
    layouts.check_fits(again, tensors, ckpt.layout, path)
    filling.fill(again, filling.Table(tensors, ckpt.layout, path))
    assert torch.equal(logits(again.eval()), logits(model))
    assert sum(len(t.pieces) for t in tensors.values()) > 2 * len(tensors)
    assert all(where is not None for t in tensors.values() for where, _ in read(t))


def test_one_of_a_stack(tmp_path):
    """Whatever the boxes: whole, by layer, through rows and columns, strided."""
    t = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6)
    first, rest, left, right = slice(0, 1), slice(1, 3), slice(0, 2), slice(2, 6)
    cuts = [(slice(0, 3), slice(0, 4), left), (first, slice(0, 4), right)]
    cuts += [(rest, slice(0, 1), right), (rest, slice(1, 4), right)]
    pieces = []
    for i, cut in enumerate(cuts):
        box, file = t[cut].contiguous(), tmp_path / f"{i}"
        file.write_bytes(box.numpy().tobytes())
        pieces.append(Piece(file, 0, tuple(s.start for s in cut), tuple(box.shape)))
    stack = stored.joined("t", torch.float32, t.shape, pieces)
    for one, wanted in zip(stored.unstacked(stack), t, strict=True):
        assert torch.equal(stored.read_whole(one), wanted)
    for one, wanted in zip(stored.unstacked(stack, turned=True), t, strict=True):
        assert torch.equal(stored.read_whole(one), wanted.t())
    (tmp_path / "turned").write_bytes(t.permute(0, 2, 1).contiguous().numpy().tobytes())
    turned = stored.whole(tmp_path / "turned", 0, torch.float32, t.shape, strides=(24, 1, 4))
    assert torch.equal(stored.read_whole(stored.unstacked(turned)[2]), t[2])


@pytest.mark.parametrize("kind", ("Q4_0", "Q8_0", "Q6_K"))
def test_one_of_a_stack_of_blocks(kind, tmp_path):
    """A matrix begins where the blocks before it end, not where its numbers would."""
    how = TYPES[kind]
    raw = torch.randint(0, 60, (3 * 4 * 2, how.bytes), generator=torch.Generator().manual_seed(0))
    (tmp_path / "packed").write_bytes(raw.to(torch.uint8).numpy().tobytes())
    stack = stored.whole(tmp_path / "packed", 0, torch.float32, (3, 4, 2 * how.numbers))
    stack = stack._replace(pieces=tuple(p._replace(blocks=how) for p in stack.pieces))
    whole = how.decode(raw.to(torch.uint8)).view(3, 4, 2 * how.numbers)
    assert whole.isfinite().all() and whole.unique().numel() > 20
    for one, wanted in zip(stored.unstacked(stack), whole, strict=True):
        assert torch.equal(stored.read_whole(one), wanted)

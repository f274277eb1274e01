"""Codes and scales of keys and values against their definition in plain numpy, bit for bit."""

import numpy as np
import pytest
import torch
from eight_bits import E4M3, dequantised, nearest_e4m3, rounded

from gpu_kernels.kv_codes import DTYPES, Codes, read, store

KINDS = ("int8", "fp8")


def numbers(seed=0):
    """[7, 3, 40]: usual ones, an outlier, ties of int8, huge and tiny ones, zeros."""
    x = np.random.default_rng(seed).normal(size=(7, 3, 40)).astype(np.float32)
    x[1, :, 7] = 300
    x[2] = np.arange(40) / 2 - 10  # of a scale of 1: every half is a tie
    x[2, :, 0] = 127
    x[3] *= 1e37
    x[4] *= 1e-37
    x[5, 1] = 0
    x[6] *= 1e-42  # whose scale has few bits, or is 0
    return x


def test_the_values_of_e4m3():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert (every.double().numpy() == E4M3).all()
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    x = np.concatenate([E4M3, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    x = np.concatenate([x, -x]).astype(np.float32)
    wanted = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    assert (nearest_e4m3(x) == wanted).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_the_definition(kind, dtype):
    x = torch.from_numpy(numbers()).to(dtype)
    x = x[:3] if dtype == torch.float16 else x
    got = Codes.of(x, DTYPES[kind])
    codes, scales = rounded(x.float().numpy(), kind)
    assert got.codes.dtype == DTYPES[kind] and got.scales.dtype == torch.float32
    assert (got.scales.numpy() == scales).all()
    assert (got.codes.float().numpy() == codes).all()
    assert (read(got, torch.float32).numpy() == dequantised(x.float().numpy(), kind)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_bounded(kind):
    """Half a step of int8; a sixteenth of a number of e4m3, or half of its finest step."""
    x = numbers()[:2]
    error, scale = np.abs(dequantised(x, kind) - x), rounded(x, kind)[1][..., None]
    assert (
        read(Codes.of(torch.from_numpy(x), DTYPES[kind]), torch.float32).numpy()
        == dequantised(x, kind)
    ).all()
    bound = scale / 2 if kind == "int8" else np.maximum(np.abs(x) / 16, scale * 2.0**-10)
    assert (error <= bound * (1 + 1e-5)).all() and error.max() > 0
    assert np.abs(rounded(x, kind)[0]).max() == {"int8": 127, "fp8": 448}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(kind, bad):
    x = torch.from_numpy(numbers())
    x[0, 1, 3] = bad
    found = read(Codes.of(x, DTYPES[kind]), torch.float32)
    assert found[0, 1].isnan().all(), "no answer is made of it"
    assert found[0, 0].isfinite().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_codes_wherever_it_lies(kind):
    """Beside others, alone, in any row and place; stored as it is read; no other is touched."""
    x = torch.from_numpy(numbers()).transpose(0, 1)  # [3, 7, 40]: heads, tokens
    room, wanted = (Codes.room((4, 3, 9, 40), DTYPES[kind], "cpu") for _ in range(2))
    rows, slots = torch.tensor([3, 0]), torch.tensor([8, 2])
    seen = store(room, (rows, slice(None), slice(7)), x.expand(2, -1, -1, -1))
    assert torch.equal(seen, read(room[rows][:, :, :7], torch.float32))
    store(room, (rows, slice(None), slots), torch.stack((x[:, 1], x[:, 0])))
    token_at = {(row, t): t for row in (0, 3) for t in range(7)} | {(3, 8): 1, (0, 2): 0}
    for (row, place), token in token_at.items():
        for g in range(3):
            alone = Codes.of(x[g, token], DTYPES[kind])
            wanted.codes[row, g, place], wanted.scales[row, g, place] = alone.codes, alone.scales
    assert torch.equal(room.codes.float(), wanted.codes.float())
    assert torch.equal(room.scales, wanted.scales)


def test_a_plain_room_keeps_what_it_is_given():
    room, x = torch.zeros(2, 3, 4), torch.randn(2, 4)
    assert store(room, (slice(None), 1), x) is x
    assert torch.equal(read(room, torch.float32)[:, 1], x) and room.count_nonzero() == 8

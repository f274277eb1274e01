"""Rules of rounding against their definitions in plain numpy, against gguf, and against what
compressed-tensors and GPTQModel wrote (fixtures/make_rounded.py)."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantisation.names import Quantisation, QuantiseOptions, parse
from quantisation.rules import quantise, round_tokens, rounded

SPELLINGS = {
    "rtn-w4-g128": "rtn-w4-g128-sym-absmax",
    "rtn-w8": "rtn-w8-channel-sym-absmax",
    "rtn-w8-row-sym": "rtn-w8-channel-sym-absmax",
    "rtn-w3-asym": "rtn-w3-channel-asym-minmax",
    "rtn-w4-tensor-range": "rtn-w4-tensor-sym-range",
    "rtn-w8a8": "rtn-w8-channel-sym-absmax-a8",
    "rtn-w4a8-g64-asym-range": "rtn-w4-g64-asym-range-a8",
    "fp8": "fp8-e4m3-channel",
    "fp8-b128": "fp8-e4m3-b128",
    "q8_0": "gguf-q8_0",
    "bf16": "bf16",
}
# of a [5, 200] matrix: a group of one row that is not whole, blocks that are not, and whole ones
GRIDS = ("tensor", "channel", "g64", "g40", "b3", "b128")


def weight(rows=5, columns=200, seed=0) -> torch.Tensor:
    """Rows of several sizes with outliers, one half of zeros, one of one sign."""
    torch.manual_seed(seed)
    w = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    w[0, ::37] *= 8
    w[1, : columns // 2] = 0
    w[2] = w[2].abs() + 0.1
    return w


# ---------------------------------------------------------------------------------------------
# Names


def test_a_name_says_all_and_names_itself():
    for spelling, name in SPELLINGS.items():
        rule = parse(spelling)
        assert (rule.name, parse(rule.name)) == (name, rule)
    assert Quantisation("rtn-w8") == Quantisation("rtn-w8-channel-sym-absmax")


@pytest.mark.parametrize(
    "name", ["int4", "rtn-w9", "rtn-w1", "rtn-w4-g0", "rtn-w4-128", "rtn", "fp8-e5m2", "BF16", ""]
)
def test_unknown_rules_are_told_which_there_are(name):
    with pytest.raises(ValueError, match=r"there is no rule .*; there are bf16, .*rtn-w4-g128"):
        parse(name)


def test_words_that_do_not_go_together():
    for name in ("rtn-w4-sym-minmax", "rtn-w4-asym-absmax"):
        with pytest.raises(ValueError, match="goes with"):
            parse(name)
    with pytest.raises(ValueError, match="rtn-w8-channel-sym-absmax is asked for twice"):
        QuantiseOptions(("rtn-w8", "rtn-w8-row"))
    with pytest.raises(ValueError, match="go with --quantise RULE"):
        QuantiseOptions((), quantise_embeddings=True)


# ---------------------------------------------------------------------------------------------
# Definitions, a group at a time


def groups_of(grid: str, rows: int, columns: int):
    """Slices of the numbers that share a scale."""
    n = int(grid[1:]) if grid[0] in "gb" and grid[1:].isdigit() else 0
    tall = {"t": rows, "b": n}.get(grid[0], 1)
    for top in range(0, rows, tall):
        for left in range(0, columns, n or columns):
            yield slice(top, min(top + tall, rows)), slice(left, left + (n or columns))


F = np.float32


def by_definition(x: np.ndarray, bits: int, scheme: str) -> np.ndarray:
    """What one group becomes: float32 throughout, halves to even."""
    most, low, high = F(2**bits - 1), x.min(), x.max()
    if scheme == "sym-absmax":  # llmc: absmax / 7, and -8 is never met
        scale = max(np.abs(x).max(), F(1e-5)) / F(2 ** (bits - 1) - 1)
        return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    if scheme == "sym-range":  # absmax / 7.5, over -8 … 7
        scale = np.abs(x).max() / (most / F(2)) or F(1)
        return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    if scheme == "asym-range":
        low, high = min(low, F(0)), max(high, F(0))
        scale = (high - low) / most or F(1)
    else:
        scale = max(high - low, F(1e-5)) / most
    zero = np.clip(-np.round(low / scale), 0, most)
    return (np.clip(np.round(x / scale) + zero, 0, most) - zero) * scale


@pytest.mark.parametrize("scheme", ["sym-absmax", "sym-range", "asym-minmax", "asym-range"])
def test_rtn_is_its_definition_bit_for_bit(scheme):
    w = weight()
    for grid in GRIDS:
        for bits in (2, 3, 4, 8):
            wanted, x = np.empty(w.shape, F), w.numpy()
            for place in groups_of(grid, *w.shape):
                wanted[place] = by_definition(x[place], bits, scheme)
            codes = quantise(w, f"rtn-w{bits}-{grid}-{scheme}")
            assert np.array_equal(codes.dequantise().numpy(), wanted), (grid, bits)


def test_fp8_is_its_definition():
    w = weight()
    for grid in GRIDS:
        wanted = torch.empty_like(w)
        for place in groups_of(grid, *w.shape):
            scale = w[place].abs().max() / 448
            scale = scale if scale else torch.tensor(1.0)
            wanted[place] = (w[place] / scale).to(torch.float8_e4m3fn).float() * scale
        assert wanted.isfinite().all()  # 448 at most, by a quotient that rounds to it
        assert torch.equal(quantise(w, f"fp8-{grid}").dequantise(), wanted), grid


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf_is_gguf(kind):
    w = weight(7, 256, seed=3)
    w[3, 32:64] = 0.25  # all of a size: which is the extreme?
    w[4, 32:64] = torch.tensor([0.5, -0.5] * 16)
    w[5, :32] = 1e-9  # a scale that float16 does not hold
    of_gguf = getattr(gguf.GGMLQuantizationType, kind)
    packed = gguf.quants.quantize(w.numpy(), of_gguf)
    codes = quantise(w, f"gguf-{kind.lower()}")
    assert np.array_equal(codes.dequantise().numpy(), gguf.quants.dequantize(packed, of_gguf))
    assert parse(codes.rule).size(*w.shape) == packed.nbytes


def test_what_others_made_of_a_weight():
    """All of them to the bit, but GPTQ's symmetric groups without a negative number, to which it
    gives half of its range, and compressed-tensors' asymmetric ties."""
    there = np.load(Path(__file__).parents[1] / "fixtures/rounded.npz")
    w = torch.from_numpy(there["weight"])
    assert (w[:, :64].amin(1) < 0).all()
    compared = 0
    for name in there.files:
        who, _, how = name.partition(" ")
        if who == "weight":
            continue
        bits = how.removesuffix("-asym").removesuffix("-sym")
        rule = f"rtn-{how}-range" if how[0] == "w" else "fp8-channel"
        ours, theirs = quantise(w, rule).dequantise(), torch.from_numpy(there[name])
        differ = (ours != theirs).float().mean().item()
        if who == "ct" and how.endswith("-asym"):
            scales = quantise(w, rule).scales.max()
            assert differ < 0.01 and (ours - theirs).abs().max() <= scales * 1.001, (bits, differ)
        else:
            assert differ == 0, (name, differ)
        compared += 1
    assert compared == 17


# ---------------------------------------------------------------------------------------------
# Sizes of the error, and traps


def test_errors_on_gaussian_weights():
    """The relative errors that each convention is known by, of 4M bfloat16 numbers."""
    torch.manual_seed(0)
    w = torch.randn(1024, 4096).bfloat16().float()
    for rule, wanted in {
        "rtn-w4-g128": 0.1174,
        "rtn-w4-g128-range": 0.1109,
        "rtn-w4-g128-asym": 0.1006,
        "rtn-w8": 0.0087,
        "fp8-tensor": 0.0265,
        "fp8": 0.0265,
    }.items():
        error = (quantise(w, rule).dequantise() - w).norm() / w.norm()
        assert error.item() == pytest.approx(wanted, abs=7e-5), rule


def test_tiny_weights_have_the_least_scale():
    """llmc's 1e-5: what is far below it becomes zero; those that follow the range keep it."""
    w = torch.full((1, 8), 1e-8)
    w[0, 0] = -1e-8
    assert not quantise(w, "rtn-w4").dequantise().any()
    assert quantise(w, "rtn-w4").scales.item() == pytest.approx(1e-5 / 7)
    assert quantise(w, "rtn-w4-range").dequantise().all()


@pytest.mark.parametrize("rule", ["rtn-w4", "rtn-w4-range", "rtn-w4-asym", "rtn-w4-asym-range"])
@pytest.mark.parametrize("more", ["fp8", "fp8-b128", "gguf-q4_0", "gguf-q8_0"])
def test_groups_of_zeros_stay_zero(rule, more):
    for name in (rule, more):
        codes = quantise(torch.zeros(2, 64), name)
        assert torch.equal(codes.dequantise(), torch.zeros(2, 64))
        assert codes.scales.isfinite().all()


@pytest.mark.parametrize("rule", ["rtn-w4-g128", "rtn-w8-asym", "fp8", "gguf-q8_0", "fp16", "bf16"])
def test_what_is_not_finite_is_refused(rule):
    w = torch.ones(2, 64)
    w[1, 3] = torch.nan
    with pytest.raises(ValueError, match="it holds"):
        rounded(w, rule)
    w[1, 3] = torch.inf
    with pytest.raises(ValueError, match="it holds"):
        rounded(w, rule)


def test_fp16_refuses_what_it_cannot_hold_and_gguf_rows_without_blocks():
    with pytest.raises(ValueError, match="it holds 70000, which fp16 does not"):
        rounded(torch.tensor([[7e4]]), "fp16")
    assert rounded(torch.tensor([[7e4]]), "bf16").item() == 70144
    with pytest.raises(ValueError, match="blocks of 32, but a row has 40 columns"):
        quantise(torch.ones(2, 40), "gguf-q4_0")


def test_activations_are_rounded_a_token_at_a_time():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 50) * torch.tensor([1.0, 100.0, 1e-7])[:, None]
    wanted = np.stack(
        [by_definition(row, 8, "sym-absmax") for row in x.flatten(0, 1).numpy()]
    ).reshape(x.shape)
    assert np.array_equal(round_tokens(x).numpy(), wanted)
    assert torch.equal(round_tokens(x[:1]), round_tokens(x)[:1])
    assert round_tokens(x.bfloat16()).dtype == torch.bfloat16


def test_sizes_are_those_of_real_codes():
    """Codes of their bits, scales and zeros as they lie there; a scale of several rows once."""
    w = weight(6, 200)
    for grid in GRIDS:
        for name in (f"rtn-w4-{grid}", f"rtn-w8-{grid}-asym", f"fp8-{grid}"):
            codes = quantise(w, name)
            n_groups = len(list(groups_of(grid, *w.shape)))
            size = w.numel() * codes.bits // 8 + n_groups * codes.scales.element_size()
            size += 0 if codes.zeros is None else n_groups * codes.zeros.element_size()
            assert parse(name).size(*w.shape) == size, name

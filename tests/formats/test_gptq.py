"""formats/gptq.py: what two versions, and files that lie about theirs, mean by their zeros."""

import pytest
import torch
from quantised_files import changed, dense, linear, one_line

from formats import quantised


def packed(numbers, bits, dim):
    """int32 words, from the lowest bits on and from one word into the next."""
    lines = numbers.t() if dim == 0 else numbers
    found = []
    for line in lines.tolist():
        whole = sum(n << (bits * i) for i, n in enumerate(line))
        raw = whole.to_bytes(-(-len(line) * bits // 32) * 4, "little")
        found.append(torch.frombuffer(bytearray(raw), dtype=torch.int32))
    words = torch.stack(found)
    return words.t() if dim == 0 else words


def matrix(folder, bits=4, K=96, N=64, group=32, zeros=None, index=None, stated=None, **said):
    """(codes [K, N], scales [G, N], what is read of them [N, K])"""
    torch.manual_seed(bits)
    G = -(-K // group) if group > 0 else 1
    codes, scales = torch.randint(0, 1 << bits, (K, N)), torch.rand(G, N).half()
    zeros = torch.randint(0, 1 << bits, (G, N)) if zeros is None else zeros
    tensors = {"qweight": packed(codes, bits, 0), "qzeros": packed(zeros, bits, 1)}
    tensors |= {"scales": scales} | ({} if index is None else {"g_idx": index})
    said = (
        {"bits": stated or bits, "group_size": group, "sym": False} | {"format": "gptq_v2"} | said
    )
    return codes, scales.float(), linear(folder, "gptq", said, tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [96, 160])
def test_groups_that_do_not_divide_the_columns(bits, K, tmp_path):
    zeros = torch.randint(0, 1 << bits, (-(-K // 64), 64))
    codes, scales, found = matrix(tmp_path, bits, K, group=64, zeros=zeros)
    groups = torch.arange(K) // 64
    assert torch.equal(found, ((codes - zeros[groups]) * scales[groups]).t())


def test_columns_in_any_order(tmp_path):
    index = torch.randint(0, 3, (96,), dtype=torch.int32)
    zeros = torch.randint(0, 16, (3, 64))
    codes, scales, found = matrix(tmp_path, zeros=zeros, index=index)
    groups = index.long()
    assert torch.equal(found, ((codes - zeros[groups]) * scales[groups]).t())
    for wrong in (-1, 3):
        index[50] = wrong
        with pytest.raises(ValueError, match=r"model\.safetensors: .*g_idx names the groups"):
            matrix(tmp_path, index=index)


@pytest.mark.parametrize(
    ("held", "sym", "form", "meant"),
    [
        (7, True, "gptq", 8),
        (8, True, "gptq", 8),  # says the first version, holds the second's zeros
        (8, True, "gptq_v2", 8),
        (7, True, "gptq_v2", 8),
        (7, False, "gptq", 8),
        (8, False, "gptq", 9),  # where zeros differ, nothing but the name tells
        (7, False, "gptq_v2", 7),
    ],
)
def test_which_version_a_zero_is_of(held, sym, form, meant, tmp_path):
    zeros = torch.full((3, 64), held)
    assert packed(zeros, 4, 1)[0, 0].item() & 0xFFFFFFFF == int(f"0x{held:x}" + f"{held:x}" * 7, 16)
    codes, scales, found = matrix(tmp_path, zeros=zeros, sym=sym, format=form)
    groups = torch.arange(96) // 32
    assert torch.equal(found, ((codes - meant) * scales[groups]).t())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_the_first_version_that_wrapped(bits, tmp_path):
    """1 was taken from each number of a word at once: one that was 0 borrowed from the next."""
    zeros = torch.arange(3 * 64).view(3, 64) * 3 % (1 << bits)
    zeros[:, ::8] = 0
    ones = sum(1 << at for at in range(0, 32, bits))
    codes, scales = torch.randint(0, 1 << bits, (96, 64)), torch.rand(3, 64).half()
    tensors = {"qweight": packed(codes, bits, 0), "qzeros": packed(zeros, bits, 1) - ones}
    said = {"bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    found = linear(tmp_path, "gptq", said, tensors | {"scales": scales})
    groups = torch.arange(96) // 32
    assert torch.equal(found, ((codes - zeros[groups]) * scales.float()[groups]).t())


def test_other_bits_for_some_modules(tmp_path):
    """`dynamic` has patterns of names, a stranger's programs: they are never run, shapes tell."""
    zeros = torch.randint(0, 256, (3, 64))
    more = {"dynamic": {"+:(a+)+down.*": {"bits": 8}}}
    codes, scales, found = matrix(tmp_path, 8, zeros=zeros, stated=4, **more)
    groups = torch.arange(96) // 32
    assert torch.equal(found, ((codes - zeros[groups]) * scales[groups]).t())
    with pytest.raises(ValueError, match=r"down_proj\.qzeros is int32 \[3, 16\], and not"):
        matrix(tmp_path, 8, zeros=zeros, stated=4)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p', which is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"bits": 5}, "bits is 5, which is not read of gptq: read are 2, 3, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"group_size": 0}, "group_size must be -1 or a size, not 0"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"bits": 8}, "qzeros is int32"),
    ],
)
def test_switches_that_change_the_numbers(said, what, tmp_path):
    one_line(changed(tmp_path, "gptq-4bit-v1", said), what)


def test_codes_stay_packed_in_their_order(tmp_path):
    """What a layer that keeps them needs: groups only where they are in no order."""
    import checkpoint

    full = "model.layers.0.mlp.down_proj.weight"
    for name, ordered in (("gptq-4bit-v1", True), ("gptq-4bit-v2-act-order", False)):
        ckpt = checkpoint.open(changed(tmp_path, name))
        (codes,) = quantised.codes_of(ckpt.tensors[full])
        assert (codes.groups is None) == ordered and codes.bits == 4
        assert codes.codes.dtype == torch.uint8 and codes.scales.dtype == torch.float16
        assert codes.scales.shape == codes.zeros.shape == (32, 3)
        assert torch.equal(codes.dequantise(), dense(tmp_path / name)[full])

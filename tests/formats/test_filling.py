"""formats/filling.py: files whose codes stay codes against the same files dequantised, and layers
that are rounded as they are read against the whole model rounded afterwards."""

import shutil
import weakref

import gguf
import numpy as np
import pytest
import torch
from builders import saved_checkpoint
from gguf_files import converted, described, write_tensors
from quantised_files import NAMES, changed, source

import checkpoint
import cli
from backends.local import Local
from formats import filling, quantised
from quantisation.apply import Rounding, Weights, quantise_model
from quantisation.linear import PackedLinear, PackedWeight, weight_bytes
from quantisation.names import Quantisation

IDS = torch.arange(40).view(2, 20) * 7 % 48
LAYERS = 4  # of a Llama's block: q, k and v are one, gate and up too


def packed_layers(model):
    return [m for m in model.modules() if isinstance(m, PackedLinear)]


def both(path, dtype):
    """(packed, dequantised): the same file."""
    return [checkpoint.open(path).load(dtype, packed=packed) for packed in (True, False)]


def bytes_of_blocks(model):
    layers = [m for m in model.blocks.modules() if isinstance(m, PackedLinear | torch.nn.Linear)]
    return sum(weight_bytes(layer) for layer in layers)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.logits(model.hidden(ids))


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_files_stay_codes(name):
    """All of what is code times scale, in every order of columns, with the very logits."""
    for dtype in (torch.float32, torch.bfloat16):
        packed, dense = both(source(name), dtype)
        assert torch.equal(logits(packed), logits(dense)), dtype
    n = 0 if name.startswith("bnb") else LAYERS
    assert len(packed_layers(packed)) == n and not packed_layers(dense)
    assert (packed.packing["packed"], packed.packing["dequantised"]) == (n, LAYERS - n)
    assert (dense.packing["packed"], dense.packing["dequantised"]) == (0, LAYERS)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_known_from_a_few_codes(name):
    """Of each matrix by itself, scales, zeros and the order of columns included."""
    ckpt = checkpoint.open(source(name))
    of_one, numbers = [], 0
    for stored in ckpt.tensors.values():
        numbers += stored.shape[0] * stored.shape[1] if quantised.is_quantised(stored) else 0
        if codes := quantised.codes_of(stored):
            of_one.append(weight_bytes(torch.nn.ModuleList(map(PackedWeight, codes))))
            assert quantised.held_bytes(stored) == of_one[-1]
    found = filling.block_bytes(ckpt, "bfloat16")
    assert found == (sum(of_one) / numbers if of_one else None)


def small_llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def blocks_of(kind, array, seed):
    """Random bytes with sound scales, as a tensor of this type has them: no quantiser of these
    types is at hand for all."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q2_K": 84, "Q3_K": 110}
    size |= {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    halves = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}
    halves |= {"Q4_K": [0, 2], "Q5_K": [0, 2]}
    columns = array.shape[1] // (256 if kind.endswith("K") else 32)
    g = np.random.default_rng(seed)
    raw = g.integers(0, 256, (array.shape[0], columns, size[kind]), dtype=np.uint8)
    for at in halves.get(kind, [0]):
        scale = g.uniform(-1, 1, raw.shape[:2]).astype(np.float16) * np.float16(2e-3)
        raw[:, :, at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(array.shape[0], -1)


def gguf_of(path, kind_of):
    """A Llama whose matrices lie in the types that kind_of(name) says, rows of q and k in pairs."""

    def pack(name, array):
        kind = kind_of(name) if array.ndim == 2 else None
        return (kind, blocks_of(kind, array, len(name))) if kind else ("F32", array)

    theirs = small_llama()
    tensors = {name: pack(name, array) for name, array in converted(theirs, "llama").items()}
    said = {f"llama.{key}": value for key, value in described(theirs, "llama").items()}
    write_tensors(path, tensors, "llama", said)
    return path


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_codes_of_gguf_stay_codes(kind, tmp_path):
    """Minima and scales of scales too; what is no layer of the blocks is dequantised."""
    path = gguf_of(tmp_path / "m.gguf", lambda name: kind)
    for dtype in (torch.float32, torch.bfloat16):
        packed, dense = both(path, dtype)
        assert torch.equal(logits(packed), logits(dense)) and logits(dense).isfinite().all()
    assert len(packed_layers(packed)) == LAYERS
    assert packed.packing["packed"] == LAYERS and packed.packing["dequantised"] == 2  # the ends
    assert packed.packing["memory_bytes"] < 0.75 * dense.packing["memory_bytes"]
    share = bytes_of_blocks(packed) / bytes_of_blocks(dense)
    assert filling.block_bytes(checkpoint.open(path), "bfloat16") == pytest.approx(2 * share)


def test_parts_of_a_fused_layer_in_several_types(tmp_path):
    """As "Q4_K_M" has them: v and down in more bits; one part that is plain keeps a layer dense."""
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_output": "Q8_0", "ffn_gate": None}
    path = gguf_of(
        tmp_path / "m.gguf", lambda n: next((k for w, k in kinds.items() if w in n), "Q4_K")
    )
    packed, dense = both(path, "float32")
    assert torch.equal(logits(packed), logits(dense))
    found = {name for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert found == {f"blocks.0.{n}" for n in ("attn.qkv_proj", "attn.out_proj", "mlp.fc2")}
    assert len(packed.blocks[0].attn.qkv_proj.weights) == 2
    assert packed.packing["dequantised"] == 3  # up, beside its gate, and both ends
    share = bytes_of_blocks(packed) / bytes_of_blocks(dense)
    assert filling.block_bytes(checkpoint.open(path), "float32") == pytest.approx(4 * share)


def test_columns_in_unequal_groups_are_dequantised(tmp_path):
    def change(state):
        index = state["model.layers.0.mlp.down_proj.g_idx"]
        index[0] = (index[0] + 1) % 3

    path = changed(tmp_path, "gptq-4bit-v2-act-order", change=change)
    packed, dense = both(path, "float32")
    assert torch.equal(logits(packed), logits(dense))
    assert packed.packing["packed"] == LAYERS - 1 and packed.packing["dequantised"] == 1


def test_what_is_no_number_is_named(tmp_path):
    """Of codes as of weights: NaN of the file, and what the dtype cannot hold."""
    at = "model.layers.0.mlp.down_proj.scales"
    for value, dtype, said in (
        (float("nan"), "bfloat16", "1 of 1 tensors hold NaN or Inf: .*down_proj.weight"),
        (60000.0, "float16", "down_proj.weight holds .*, which overflows float16"),
    ):
        path = changed(tmp_path, "gptq-4bit-v1", change=lambda s, v=value: s[at].fill_(v))
        for packed in (True, False):
            with pytest.raises(ValueError, match=said.replace("1 of 1", r"1 of \d+")):
                checkpoint.open(path).load(dtype, packed=packed)
        shutil.rmtree(path)


def test_a_record_says_which_stayed_packed(monkeypatch):
    """As `quantise_model`'s: how many, and the bytes measured; a line for people says the same."""
    said = []
    monkeypatch.setattr(cli, "note", said.append)
    packed, dense = both(source("gptq-4bit-v1"), "float32")
    assert "4 stay packed, 0 are dequantised; weights take 0.0 MB" in said[0]
    assert "0 stay packed, 4 are dequantised" in said[1] and len(said) == 2
    held = Local(packed).ran()["packing"]
    buffers = sum(b.nbytes for layer in packed_layers(packed) for b in layer.buffers())
    assert held["memory_bytes"] == buffers + sum(p.nbytes for p in packed.parameters())
    plain = Local(checkpoint.load_model(source("gptq-4bit-v1"), "float32")).ran()["packing"]
    assert plain == dense.packing, "a CPU dequantises unasked"
    with pytest.raises(AssertionError, match="packed are codes"):
        quantise_model(packed, "rtn-w4")


# ---------------------------------------------------------------------------------------------
# A layer at a time


class Watched(Rounding):
    """Counts the dense layers that are there when one is taken."""

    most = 0

    def begin(self, model, device):
        self.alive: list = []
        self.layers = {name: model.get_submodule(name) for name in super().begin(model, device)}
        assert all(layer.weight.is_meta for layer in self.layers.values())
        return list(self.layers)

    def take(self, name):
        layer = self.layers.pop(name)
        self.alive.append(weakref.ref(layer.weight))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        super().take(name)


@pytest.mark.parametrize("rule", ["rtn-w4-g24", "fp8", "rtn-w8a8"])
def test_a_model_is_never_dense_and_the_same(rule, tmp_path):
    """Layers of many blocks come and go: at most as many as threads read are there at a time."""
    path = saved_checkpoint(tmp_path, kind="llama", n_layers=9)
    whole = checkpoint.open(path).load("bfloat16")
    quantise_model(whole, rule, packed=True)
    rounding = Watched(Quantisation(rule), packed=True)
    model = checkpoint.open(path).load("bfloat16", rounding=rounding)
    rounding.finish(model)
    assert len(packed_layers(model)) == 9 * LAYERS and not rounding.layers
    assert 1 <= rounding.most <= filling.READERS
    assert model.quantisation == whole.quantisation
    assert torch.equal(logits(model), logits(whole))


def test_weights_read_so_are_put_back(tmp_path):
    """keep: the next rule, and the weights as they were, as if all had been read first."""
    path = saved_checkpoint(tmp_path, kind="llama")
    whole = checkpoint.open(path).load("float32")
    rounding = Rounding(Quantisation("rtn-w8"), keep=True, packed=True)
    model = checkpoint.open(path).load("float32", rounding=rounding)
    weights = Weights(model, True, rounding, packed=True)
    assert weights.under(Quantisation("rtn-w8")) is model and len(packed_layers(model)) == 8
    first = logits(model)
    weights.under(Quantisation("rtn-w4"))
    assert not torch.equal(logits(model), first)
    weights.under(None)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3, 3] = torch.nan
    checkpoint.save_checkpoint(model, None, None, 0, 11, 1.0, tmp_path)
    for each in (True, False):
        rounding = Rounding(Quantisation("rtn-w8"), packed=each)
        with pytest.raises(ValueError, match=r"hold NaN or Inf: .*gate_proj"):
            checkpoint.open(tmp_path / "checkpoint-11").load("float32", rounding=rounding)


def test_gguf_says_its_types():
    """So that the list above is whole."""
    from formats.blocks import TYPES

    assert set(TYPES) <= {t.name for t in gguf.GGMLQuantizationType}
    assert all(how.codes for how in TYPES.values())

"""A model's weights rounded where they lie: which, by which parts, and put back."""

import gc
import re
import weakref

import pytest
import torch
import transformers
from adapter_files import saved_base
from builders import tiny_model

import checkpoint
from backends.local import Local
from costs.memory import estimate_memory
from formats import layouts
from quantisation.apply import Weights, matrices, quantise_model
from quantisation.linear import PackedLinear, weight_bytes
from quantisation.names import Quantisation
from quantisation.rules import quantise, rounded
from transformers_model import TransformersModel

RULES = ("rtn-w4-tensor", "rtn-w4-b20-range", "rtn-w4-g24-asym", "fp8-b128", "gguf-q8_0")
MIXTURE = dict(n_experts=4, n_experts_per_token=2, d_ff_expert=24, d_ff_shared=40)
LATENT = dict(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8)
LATENT |= dict(v_head_dim=8, n_kv_heads=4, head_dim=16)

SHAPES = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "odd": ("llama", dict(d_ff=200, n_layers=3)),
    "mixture": ("llama", MIXTURE),
    "latent": ("llama", LATENT),
    "gelu": ("gpt", dict(bias=True, activation="gelu_new")),
}


def values(model):
    """All weights, those of packed layers as they multiply."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]
    return found | {f"{name}.weight": layer.weight for name, layer in packed}


def changed(before, model):
    now = values(model)
    assert now.keys() == before.keys()
    return {name for name, weight in now.items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("rule", RULES)
def test_parts_of_fused_matrices_are_rounded_by_themselves(rule):
    """As files of Llama's have them, q of its own, gate of its own."""
    model = tiny_model("llama", d_ff=64).for_inference(torch.float32)
    apart = {name: part.clone() for name, part in layouts.views(model, "llama")}
    quantise_model(model, rule)
    for name, part in layouts.views(model, "llama"):
        inside = re.search(r"(q|k|v|o|gate|up|down)_proj\.weight$", name)
        wanted = rounded(apart[name], rule) if inside else apart[name]
        assert torch.equal(part, wanted), name


def test_by_tensor_fused_and_apart_differ():
    """So the test above could fail: the parts do not share their extremes."""
    model = tiny_model("llama").for_inference(torch.float32)
    fused = model.blocks[0].attn.qkv_proj.weight.clone()
    quantise_model(model, "rtn-w4-tensor")
    assert not torch.equal(model.blocks[0].attn.qkv_proj.weight, rounded(fused, "rtn-w4-tensor"))


def test_experts_one_by_one_and_not_their_router():
    model = tiny_model("llama", **MIXTURE, shared_gate=True).for_inference(torch.float32)
    before = values(model)
    quantise_model(model, "rtn-w4-tensor")
    mlp, old = "blocks.1.mlp", before["blocks.1.mlp.experts.fc1.weight"]
    new = model.blocks[1].mlp.experts.fc1.weight
    for e in range(4):
        for half in (slice(24), slice(24, 48)):
            assert torch.equal(new[e, half], rounded(old[e, half], "rtn-w4-tensor"))
    down = model.blocks[1].mlp.experts.fc2.weight
    for e in range(4):
        wanted = rounded(before[f"{mlp}.experts.fc2.weight"][e], "rtn-w4-tensor")
        assert torch.equal(down[e], wanted)
    untouched = before.keys() - changed(before, model)
    assert {f"{mlp}.router.weight", f"{mlp}.shared_gate.weight", "lm_head.weight"} <= untouched
    assert f"{mlp}.shared.fc1.weight" not in untouched


def test_what_is_left_alone_and_what_is_asked_for():
    blocks = {"attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2"}
    blocks = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in blocks}
    for kind, ends in (
        ("gpt", {"token_embedding.weight"}),  # tied
        ("llama", {"token_embedding.weight", "lm_head.weight"}),
    ):
        for embeddings in (False, True):
            model = tiny_model(kind).for_inference(torch.float32)
            before = values(model)
            quantise_model(model, Quantisation("rtn-w4", embeddings))
            assert changed(before, model) == blocks | (ends if embeddings else set())
    model = tiny_model("llama").for_inference(torch.float32)
    before = values(model)
    quantise_model(model, Quantisation("rtn-w4", skip=("blocks.0.*", "*.fc2")))
    assert changed(before, model) == {
        "blocks.1.attn.qkv_proj.weight",
        "blocks.1.attn.out_proj.weight",
        "blocks.1.mlp.fc1.weight",
    }
    with pytest.raises(ValueError, match=r"--quantise-skip \*.down_proj: no matrix .*mlp.fc2"):
        quantise_model(tiny_model(), Quantisation("rtn-w4", skip=("*.down_proj",)))


def test_a_cast_is_of_everything_that_loading_casts():
    exact = tiny_model("llama", norm_bias=True, norm="layernorm")
    wanted = tiny_model("llama", norm_bias=True, norm="layernorm").for_inference(torch.bfloat16)
    model = exact.for_inference(torch.float32)
    quantise_model(model, "bf16")
    for (name, ours), theirs in zip(model.named_parameters(), wanted.parameters()):
        assert torch.equal(ours, theirs.float()), name
    with pytest.raises(ValueError, match="run in bfloat16 cannot hold it: --dtype float32"):
        quantise_model(wanted, "fp16")
    quantise_model(wanted, "bf16")


def test_weights_come_back_bit_for_bit():
    """After each rule, and after one that fails half way."""
    model = tiny_model("gpt").for_inference(torch.bfloat16)
    before = values(model)
    for packed in (False, True):
        weights = Weights(model, keep=True, packed=packed)
        for rule in ("rtn-w4", "bf16", "rtn-w8a8"):
            weights.under(Quantisation(rule))
            assert model.quantisation["rule"] == Quantisation(rule).rule
        assert weights.under(None) is model
        assert changed(before, model) == set() and model.quantisation is None
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = torch.inf
    broken = values(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2: it holds NaN, infinity"):
        weights.under(Quantisation("rtn-w4"))
    assert changed(broken, model) == set() and model.quantisation is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_have_the_bits_of_dequantised_ones(dtype):
    """On a CPU, whatever the rule: the model whose Linear layers hold what the codes stand for."""
    ids = torch.arange(20).view(2, 10)
    for shape in ("odd", "mixture", "latent", "gelu"):
        kind, changes = SHAPES[shape]
        of_blocks = "gguf-q8_0" if shape == "gelu" else "rtn-w8"  # rows of 32 and 128
        for rule in (*RULES[:-1], of_blocks, "rtn-w3-g16-asym-range"):
            packed, dense = (tiny_model(kind, **changes).for_inference(dtype) for _ in range(2))
            plain = tiny_model(kind, **changes).for_inference(dtype)
            quantise_model(packed, rule, packed=True)
            quantise_model(plain, rule)  # as a CPU does it unasked
            assert any(isinstance(m, PackedLinear) for m in packed.modules())
            assert not any(isinstance(m, PackedLinear) for m in plain.modules())
            for matrix in matrices(dense):
                rows = matrix.weight.split([n for _, n in matrix.parts])
                matrix.weight.copy_(torch.cat([rounded(part, rule) for part in rows]))
            found, unasked, right = (m.logits(m.hidden(ids)) for m in (packed, plain, dense))
            assert torch.equal(found, right) and torch.equal(unasked, right), (shape, rule)


def test_a_single_rule_keeps_nothing_dense():
    """One layer after the other lets go of its weight; several rules get the same ones back."""
    model = tiny_model("llama").for_inference(torch.float32)
    layers = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    weights = Weights(model, keep=True, packed=True)
    for rule in ("rtn-w4", "fp8", "bf16", "rtn-w8a8"):
        weights.under(Quantisation(rule))
    weights.under(None)
    now = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert all(a is b for a, b in zip(layers, now, strict=True))
    alive = [weakref.ref(weight) for weight in layers]
    del layers, now, weights
    quantise_model(model, "rtn-w4", packed=True)
    gc.collect()
    assert len(alive) == 8 and not any(ref() is not None for ref in alive)


@torch.no_grad()
def test_floats_of_8_bits_meet_activations_rounded_alike():
    """fp8-a8: both sides e4m3, by the definition of each; the weight-only rule leaves x alone."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    made = {}
    for rule in ("fp8", "fp8-a8", "fp8-tensor-a8"):
        model = tiny_model("llama").for_inference(torch.float32)
        layer = model.blocks[0].mlp.fc1
        halves = layer.weight.double().chunk(2)
        quantise_model(model, rule)
        made[rule] = model.blocks[0].mlp.fc1(x).double()
        most = [half.abs().amax(1, keepdim=True) for half in halves]
        scales = [(rows.max() if "tensor" in rule else rows) / 448 for rows in most]
        dense = torch.cat([e4m3(half / s) * s for half, s in zip(halves, scales)])
        own = x.double().abs().amax(1, keepdim=True) / 448
        tokens = e4m3(x.double() / own) * own if "a8" in rule else x.double()
        wanted = tokens @ dense.t()
        assert (made[rule] - wanted).abs().max() < 1e-4 * wanted.abs().max(), rule
        assert model.quantisation["rule"] == Quantisation(rule).rule
    assert (made["fp8"] - made["fp8-a8"]).abs().max() > 1e-3 * made["fp8"].abs().max()
    for rule in ("fp8-b128-a8", "fp8-g32-a8"):
        with pytest.raises(ValueError, match="a8 goes with a scale for each row, or one"):
            Quantisation(rule)


def e4m3(x):
    return x.float().to(torch.float8_e4m3fn).double()


def test_conv1d_is_dequantised_and_has_no_float8_product():
    """transformers' own kinds of layers hold their weight."""
    gpt2 = tiny_conv1d()
    with pytest.raises(ValueError, match=r"c_attn: fp8-e4m3-channel-a8 is for linear layers"):
        quantise_model(gpt2, "fp8-a8", keep=True)
    before = {matrix.name: matrix.weight.clone() for matrix in matrices(gpt2)}
    restore = quantise_model(gpt2, "rtn-w8", keep=True)
    assert gpt2.quantisation["packed"] == 0
    assert gpt2.quantisation["dequantised"] == len(before) == 4
    for matrix in matrices(gpt2):
        assert torch.equal(matrix.weight, rounded(before[matrix.name], "rtn-w8"))
    restore()
    for matrix in matrices(gpt2):
        assert torch.equal(matrix.weight, before[matrix.name])


def tiny_conv1d():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    return TransformersModel(transformers.GPT2LMHeadModel(config).eval(), None)


def test_activations_are_rounded_before_each_matrix():
    """The loss is that of a model whose products see rounded tokens; the head's are not."""
    model = tiny_model("gpt").for_inference(torch.float32)
    ids = torch.arange(64).view(2, 32)
    seen = {}
    quantise_model(model, Quantisation("rtn-w8a8", embeddings=True), packed=True)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | torch.nn.Embedding):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (args[0], out)})
            )
    with torch.no_grad():
        model.logits(model.hidden(ids))
    assert torch.equal(seen.pop("token_embedding")[0], ids)  # which are no activations
    assert seen.pop("position_embedding") and len(seen) == 8  # four of each block
    for name, (x, out) in seen.items():
        steps = x / x.abs().amax(-1, keepdim=True) * 127
        assert (steps - steps.round()).abs().max() < 1e-3, name
        module = model.get_submodule(name)
        assert torch.equal(out, torch.nn.functional.linear(x, module.weight, module.bias)), name
    for changes in (MIXTURE, LATENT):
        for rule in ("rtn-w8a8", "fp8-a8"):
            with pytest.raises(ValueError, match="a8: the activations of"):
                quantise_model(tiny_model("llama", **changes), rule)


def test_compiled_blocks_see_activations_rounded_and_not_any_more():
    """torch.compile does not look whether hooks came or went: one rule after another must. That
    layers came or went it sees."""
    model, ids = tiny_model("gpt", n_layers=1).for_inference(torch.float32), torch.arange(32)[None]
    weights = Weights(model, keep=True, packed=True)
    for rule in ("rtn-w8", "rtn-w8a8", "rtn-w4-g16", None):
        weights.under(rule and Quantisation(rule))
        with torch.no_grad():
            eager = model.hidden(ids)
            for block in model.blocks:
                block.compile(backend="eager")
            assert torch.equal(model.hidden(ids), eager), rule
        for block in model.blocks:
            block._compiled_call_impl = None


def test_models_of_transformers(tmp_path):
    """By their own modules' names, without their positions."""
    opt = checkpoint.open(saved_base(tmp_path, "opt")).load("float32")
    names = {matrix.name for matrix in matrices(opt)}
    ends = {m.name for m in matrices(opt, True)} - names
    assert ends == {"model.decoder.embed_tokens", "lm_head"}
    assert {n.rpartition(".")[2] for n in names} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    }
    before = {m.name: m.weight.clone() for m in matrices(opt)}
    quantise_model(opt, "rtn-w4-g16", packed=True)
    for name, weight in before.items():
        layer = opt.causal_lm.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.weight, rounded(weight, "rtn-w4-g16"))
    assert opt.quantisation["bits_per_weight"] < 16


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_that_compute_py_tells(shape):
    """And those of the codes themselves, for all kinds of matrices."""
    kind, changes = SHAPES[shape]
    for rule in ("rtn-w4-g24", "rtn-w8", "rtn-w4-tensor-asym", "fp8-b20", "bf16", "fp32"):
        model = tiny_model(kind, **changes).for_inference(torch.float32)
        parts = [
            quantise(part, rule)
            for matrix in matrices(model)
            for part in matrix.weight.split([rows for _, rows in matrix.parts])
            if rule not in ("bf16", "fp32")
        ]
        n = sum(p.numel() for p in model.parameters())
        norms = sum(p.numel() for name, p in model.named_parameters() if is_norm(name))
        quantise_model(model, rule)
        held = model.quantisation
        told = estimate_memory(model.config, 1, 8, "bf16", training=False, quantise=rule)
        assert held["weight_bytes"] == told["states"]["weights"], rule
        assert held["bits_per_weight"] == pytest.approx(8 * held["weight_bytes"] / n)
        if parts and "tensor" not in rule and "b20" not in rule:
            size = sum(c.codes.numel() * c.bits // 8 + c.scales.numel() * 4 for c in parts)
            rounded_numbers = sum(c.codes.numel() for c in parts)
            assert held["weight_bytes"] == size + 4 * norms + 2 * (n - norms - rounded_numbers)


def test_sizes_measured_are_those_computed():
    """To the byte where rows fill the packed words and a row or group has one scale and no zero,
    but for the kernels' counters of arrivals; else memory holds somewhat more."""
    wide = dict(d_model=128, d_ff=256, n_heads=4, n_kv_heads=2)
    for rule in ("rtn-w8", "rtn-w4-g128", "rtn-w4", "fp8", "fp8-g128"):
        model = tiny_model("llama", **wide).for_inference(torch.bfloat16)
        quantise_model(model, rule, packed=True)
        held = model.quantisation
        counters = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("arrivals"))
        assert 0 < counters < 0.01 * held["weight_bytes"]
        assert held["memory_bytes"] == held["weight_bytes"] + counters, rule
        assert (held["packed"], held["dequantised"]) == (8, 0)
    for rule, changes in (("rtn-w3", {}), ("rtn-w4-tensor-asym", {}), ("rtn-w4", MIXTURE)):
        model = tiny_model("llama", **wide | changes).for_inference(torch.bfloat16)
        dense = weight_bytes(model)
        quantise_model(model, rule, packed=True)
        held = model.quantisation
        assert held["weight_bytes"] < held["memory_bytes"] < dense, rule
        assert held["memory_bytes"] == weight_bytes(model)
    assert held["packed"] == 2 * 4 and held["dequantised"] == 2 * 2  # experts' stacks


def is_norm(name):
    return bool(re.search(r"\bln\w*\.|norm\.", name))


def test_a_model_in_memory_says_what_it_holds():
    model = tiny_model("gpt").for_inference(torch.float32)
    assert Local(model).facts.quantisation is None and "quantisation" not in Local(model).ran()
    quantise_model(model, Quantisation("rtn-w4", True, ("*.fc2",)))
    assert Local(model).facts.quantisation == Quantisation("rtn-w4", True, ("*.fc2",))
    assert Local(model).ran()["quantisation"]["weight_bytes"] > 0

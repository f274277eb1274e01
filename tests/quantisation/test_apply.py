"""A model's weights rounded where they lie: which, by which parts, and put back."""

import re

import pytest
import torch
from adapter_files import saved_base
from builders import tiny_model

import checkpoint
from backends.local import Local
from costs.memory import estimate_memory
from formats import layouts
from quantisation.apply import Weights, matrices, quantise_model
from quantisation.names import Quantisation
from quantisation.rules import quantise, rounded

RULES = ("rtn-w4-tensor", "rtn-w4-b20-range", "rtn-w4-g24-asym", "fp8-b128", "gguf-q8_0")
MIXTURE = dict(n_experts=4, n_experts_per_token=2, d_ff_expert=24, d_ff_shared=40)
LATENT = dict(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8)
LATENT |= dict(v_head_dim=8, n_kv_heads=4, head_dim=16)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


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
    before, weights = values(model), Weights(model, keep=True)
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


def test_activations_are_rounded_before_each_matrix():
    """The loss is that of a model whose products see rounded tokens; the head's are not."""
    model = tiny_model("gpt").for_inference(torch.float32)
    ids = torch.arange(64).view(2, 32)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (args[0], out)})
            )
    quantise_model(model, "rtn-w8a8")
    with torch.no_grad():
        model.logits(model.hidden(ids))
    assert len(seen) == 8  # four of each block
    for name, (x, out) in seen.items():
        steps = x / x.abs().amax(-1, keepdim=True) * 127
        assert (steps - steps.round()).abs().max() < 1e-3, name
        module = model.get_submodule(name)
        assert torch.equal(out, torch.nn.functional.linear(x, module.weight, module.bias)), name
    for changes in (MIXTURE, LATENT):
        with pytest.raises(ValueError, match="a8: the activations of"):
            quantise_model(tiny_model("llama", **changes), "rtn-w8a8")


def test_compiled_blocks_see_activations_rounded_and_not_any_more():
    """torch.compile does not look whether hooks came or went: one rule after another must."""
    model, ids = tiny_model("gpt").for_inference(torch.float32), torch.arange(32)[None]
    weights = Weights(model, keep=True)
    for rule in ("rtn-w8", "rtn-w8a8", "rtn-w8"):
        weights.under(Quantisation(rule))
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
    quantise_model(opt, "rtn-w4-g16")
    for matrix in matrices(opt):
        assert torch.equal(matrix.weight, rounded(before[matrix.name], "rtn-w4-g16"))
    assert opt.quantisation["bits_per_weight"] < 16


SHAPES = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "odd": ("llama", dict(d_ff=200, n_layers=3)),
    "mixture": ("llama", MIXTURE),
    "latent": ("llama", LATENT),
}


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
        restore = quantise_model(model, rule)
        held = model.quantisation
        told = estimate_memory(model.config, 1, 8, "bf16", training=False, quantise=rule)
        assert held["weight_bytes"] == told["states"]["weights"], rule
        n = sum(p.numel() for p in model.parameters())
        assert held["bits_per_weight"] == pytest.approx(8 * held["weight_bytes"] / n)
        if parts and "tensor" not in rule and "b20" not in rule:
            size = sum(c.codes.numel() * c.bits // 8 + c.scales.numel() * 4 for c in parts)
            rounded_numbers = sum(c.codes.numel() for c in parts)
            norms = sum(p.numel() for name, p in model.named_parameters() if is_norm(name))
            assert held["weight_bytes"] == size + 4 * norms + 2 * (n - norms - rounded_numbers)
        restore()


def is_norm(name):
    return bool(re.search(r"\bln\w*\.|norm\.", name))


def test_a_model_in_memory_says_what_it_holds():
    model = tiny_model("gpt").for_inference(torch.float32)
    assert Local(model).facts.quantisation is None and "quantisation" not in Local(model).ran()
    quantise_model(model, Quantisation("rtn-w4", True, ("*.fc2",)))
    assert Local(model).facts.quantisation == Quantisation("rtn-w4", True, ("*.fc2",))
    assert Local(model).ran()["quantisation"]["weight_bytes"] > 0

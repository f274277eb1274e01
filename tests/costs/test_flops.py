"""costs/flops.py against transformers, torch's own counter, brute force and published counts."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from published import PARAMETERS
from small_models import FEATURED, KINDS, LATENT, MEGATRON, MIXTURES, hf_model, megatron, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import load_config, presets
from costs.flops import count_parameters, estimate_flops
from gpu_kernels.experts import FEW
from model import GPTModel

# ---------------------------------------------------------------------------------------------
# Parameters


def parameters_of(theirs) -> int:
    """Of a model of transformers', where what a router chooses by is a buffer."""
    biases = (b for name, b in theirs.named_buffers() if name.endswith("correction_bias"))
    return theirs.num_parameters() + sum(b.numel() for b in biases)


@pytest.mark.parametrize("name", presets())
def test_parameters_of_every_preset_equal_transformers(name):
    c = load_config(name)
    assert count_parameters(c)["total"] == parameters_of(hf_model(c))


def test_parameters_equal_published_counts():
    counted = {name: count_parameters(load_config(name))["total"] for name in PARAMETERS}
    assert counted == PARAMETERS
    assert count_parameters(load_config("mixtral-8x7b"))["active"] == 12_879_925_248
    # 2.4 and 37 billion without the embedding, as their makers count
    for name, billions in (("deepseek-v2-lite", 2.45), ("deepseek-v3", 36.6)):
        n = count_parameters(load_config(name))
        without = n["active"] - n["embedding"]
        assert without / 1e9 == pytest.approx(billions, abs=0.05)
    nanogpt = load_config("gpt2").replace(bias=False, qkv_bias=False)
    assert count_parameters(nanogpt)["total"] == 124_337_664


def test_the_files_of_glm_hold_one_more_layer():
    """GLM-4.5-Air's: a layer that guesses at the token after the next, with its joining matrix,
    three norms, and an embedding and a head of its own."""
    c = load_config("glm-4.5-air")
    n, h = count_parameters(c), c.d_model
    layers = [count_parameters(c.replace(n_layers=k))["total"] for k in (2, 3)]
    ahead = layers[1] - layers[0] + 2 * h * h + 3 * h + 2 * c.vocab_size * h
    assert n["total"] + ahead == 110_468_824_832
    assert n["active"] == 13_424_129_664


@st.composite
def configs(draw):
    kind = draw(st.sampled_from(KINDS))
    groups, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, d = groups * k, 2 * draw(st.integers(2, 6))
    changes = dict(
        vocab_size=draw(st.integers(5, 80)),
        max_position_embeddings=draw(st.integers(4, 40)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        d_ff=draw(st.integers(3, 50)),
        tie_embeddings=draw(st.booleans()),
    )
    if kind in FEATURED:
        d, k = 4 * draw(st.integers(1, 3)), heads if kind == "gpt_neox" else k
        changes |= dict(n_kv_heads=k, head_dim=d, d_model=heads * d)
        changes |= {"embedding_scale": (heads * d) ** 0.5} if kind.startswith("gemma") else {}
    elif kind in ("gpt2", "qwen2"):
        changes |= dict(n_kv_heads=heads if kind == "gpt2" else k, head_dim=d, d_model=heads * d)
    else:
        changes |= dict(n_kv_heads=k, head_dim=d, d_model=2 * draw(st.integers(2, 30)))
    if kind == "llama":  # transformers wants a width that divides into the heads
        bias = draw(st.booleans())
        changes |= dict(bias=bias, qkv_bias=bias, d_model=heads * draw(st.integers(2, 9)))
    if kind in LATENT:
        low, dims = st.integers(1, 9), st.sampled_from([2, 4, 6])
        changes |= dict(head_dim=None, n_kv_heads=heads, kv_lora_rank=draw(low))
        changes |= dict(q_lora_rank=draw(st.none() | low), qk_nope_head_dim=draw(low))
        changes |= dict(qk_rope_head_dim=draw(dims), v_head_dim=draw(low))
    if kind in MIXTURES:
        experts = draw(st.integers(1, 5))
        chosen = draw(st.integers(1, experts))
        width = changes["d_ff"] if kind == "mixtral" else draw(st.integers(3, 50))
        changes |= dict(n_experts=experts, n_experts_per_token=chosen, d_ff_expert=width)
        if kind == "glm4_moe":
            changes |= dict(head_dim=d * 2)
        if kind == "deepseek_v3":
            changes |= dict(n_experts=2 * experts, n_expert_groups=experts)
            changes |= dict(n_expert_groups_per_token=chosen)
        if kind in ("glm4_moe", "deepseek_v3"):
            changes |= dict(d_ff_shared=width * draw(st.integers(1, 3)))
            changes |= dict(dense_layers=tuple(range(draw(st.integers(0, 3)))))
    return tiny(kind, **changes)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_parameters_of_random_configs_equal_transformers(c):
    model, n = hf_model(c), count_parameters(c)
    assert n["total"] == parameters_of(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = experts * (c.n_experts - c.n_experts_per_token) // max(c.n_experts, 1)
    assert n["active"] == n["total"] - unused


@settings(max_examples=15, deadline=None)
@given(configs())
def test_parameters_of_random_configs_equal_our_model(c):
    with torch.device("meta"):
        model = GPTModel(c)
    assert count_parameters(c)["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("billions, heads, width, layers", MEGATRON)
def test_megatron_parameter_counts(billions, heads, width, layers):
    total = count_parameters(megatron(heads, width, layers))["total"]
    assert total / 1e9 == pytest.approx(billions, abs=0.06)


# ---------------------------------------------------------------------------------------------
# FLOPs


def counted_flops(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def rotary_product(c, T) -> int:
    """transformers multiplies positions and frequencies with a matrix product, once a forward, and
    where two kinds of layer turn by their own, twice."""
    kinds = {c.layer_rope(layer) for layer in range(c.n_layers)} - {None}
    return T * c.rotary_dim * len(kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_training_flops_equal_the_counter_on_transformers(kind):
    c, B, T = tiny(kind), 2, 40
    experts = {"experts_implementation": "eager"} if c.n_experts else {}
    model = hf_model(c, "cpu", attn_implementation="eager", **experts)
    ids = torch.randint(0, c.vocab_size, (B, T))
    flops, angles = estimate_flops(c, B, T), rotary_product(c, T)
    with torch.no_grad():
        assert counted_flops(lambda: model(ids)) == flops["forward"] + angles
    assert counted_flops(lambda: model(ids).logits.sum().backward()) == flops["training"] + angles


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_the_counter_on_our_model(kind):
    c, T = tiny(kind), 40
    B = FEW // T + 1 if c.n_experts else 2  # fewer tokens go through every expert
    model, ids = GPTModel(c).train(), torch.randint(0, c.vocab_size, (B, T))
    with torch.no_grad():
        assert counted_flops(lambda: model(ids)) == estimate_flops(c, B, T)["forward"]
    model.activation_checkpointing = True
    executed = estimate_flops(c, B, T, recompute="full", attention="math")["training_executed"]
    assert counted_flops(lambda: model(ids)[0].sum().backward()) == executed


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "youtu"])
def test_lora_flops_equal_the_counter(kind):
    c, B, T, rank = tiny(kind), 2, 40, 4
    model = hf_model(c, "cpu", attn_implementation="eager").requires_grad_(False)
    adapted = 0
    for name, module in list(model.named_modules()):
        linear = isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
        if linear and name != "lm_head":
            adapted += 1
            add_adapter(module, rank, split=3 if name.endswith("c_attn") else 1)
    assert adapted
    ids = torch.randint(0, c.vocab_size, (B, T))
    counted = counted_flops(lambda: model(ids).logits.sum().backward())
    expected = estimate_flops(c, B, T, lora_rank=rank)["training_lora"]
    assert counted == expected + rotary_product(c, T)


def add_adapter(module, rank, split):
    """y += B A x, one pair for each of the `split` matrices that the layer fuses."""
    transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
    n_in, n_out = module.weight.shape if transposed else module.weight.shape[::-1]
    pairs = [
        (
            torch.randn(rank, n_in, requires_grad=True),
            torch.randn(n_out // split, rank, requires_grad=True),
        )
        for _ in range(split)
    ]
    plain = module.forward
    linear = torch.nn.functional.linear
    module.forward = lambda x: plain(x) + torch.cat([linear(linear(x, a), b) for a, b in pairs], -1)


PUBLISHED_FORWARD = {
    ("gpt2", 1024): 291_648_307_200,
    ("7b", 2048): 29_261_612_187_648,
    ("llama3-8b", 2048): 32_938_104_193_024,
    ("qwen2.5-7b", 2048): 30_643_517_915_136,
    ("qwen3-8b", 2048): 33_472_827_621_376,
    ("mistral-7b", 2048): 31_323_196_489_728,
}


def test_forward_flops_equal_measured_full_size_models():
    for (name, T), expected in PUBLISHED_FORWARD.items():
        assert estimate_flops(load_config(name), 1, T)["forward"] == expected, name


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3))
def test_causal_and_windowed_flops_equal_brute_force(T, window, B):
    full_layers = (1,)
    c = tiny("mistral", sliding_window=window, full_attention_layers=full_layers)
    attended = 0
    for layer in range(c.n_layers):
        w = T if layer in full_layers else window
        attended += B * sum(1 for i in range(T) for j in range(T) if j <= i and i - j < w)
    flops = estimate_flops(c, B, T)["parts"]
    assert flops["attention_causal"] == 4 * c.n_heads * c.head_dim * attended
    assert flops["attention"] == 4 * c.n_heads * c.head_dim * c.n_layers * B * T * T


def test_the_usual_shortcuts_miss_what_the_docs_say():
    c, B, T = load_config("7b"), 1, 2048
    parts, s = estimate_flops(c, B, T)["parts"], B * T
    block = parts["linear"] / c.n_layers
    one_product = 2 * s * c.d_model * c.d_ff
    projections = 2 * s * 4 * c.d_model**2
    assert block == projections + 3 * one_product  # 2*s*h*f is a third of a gated MLP
    assert parts["attention"] / c.n_layers == 4 * B * T * T * c.d_model
    assert projections > 2 * parts["attention"] / c.n_layers  # what 4*B*T^2*h leaves out

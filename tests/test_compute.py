"""compute.py against transformers, torch's own counters, brute force and published tables."""

import ast
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import compute
import model as model_file
from backends import scoring
from backends.kvcache import DecodeCache
from benchmarks import memory as memory_benchmark
from compute import (
    GPU,
    count_parameters,
    estimate_flops,
    estimate_memory,
    find_gpu,
    mfu,
    roofline,
)
from config import GPTConfig, config_to_hf, load_config, presets
from costs import formulas
from costs.formulas import Setup, solve_all
from gpu_kernels import cross_entropy
from model import GPTModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hf_model(c: GPTConfig, device="meta", **kwargs):
    hf = transformers.AutoConfig.for_model(**config_to_hf(c))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(hf, **kwargs)


def tiny(kind: str, **changes) -> GPTConfig:
    """Small models whose sizes are all different, so that no two symbols can be confused."""
    llama = dict(norm="rmsnorm", position="rope", activation="silu", gated_mlp=True, bias=False)
    llama |= dict(n_heads=6, n_kv_heads=2, head_dim=16, d_ff=144, tie_embeddings=False)
    kinds = {
        "gpt2": dict(activation="gelu_new", n_heads=4, d_ff=224),
        "llama": llama,
        "qwen2": llama | dict(qkv_bias=True, head_dim=None, n_heads=4),
        "qwen3": llama | dict(qk_norm=True, tie_embeddings=True),
        "mistral": llama | dict(sliding_window=24),
        "mixtral": llama | dict(n_experts=5, n_experts_per_token=2),
    }
    sizes = dict(vocab_size=131, max_position_embeddings=64, n_layers=3, d_model=96, dropout=0.0)
    return GPTConfig(**sizes | kinds[kind] | changes)


KINDS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "mixtral")

# ---------------------------------------------------------------------------------------------
# Parameters


@pytest.mark.parametrize("name", presets())
def test_parameters_of_every_preset_equal_transformers(name):
    c = load_config(name)
    assert count_parameters(c)["total"] == hf_model(c).num_parameters()


PUBLISHED_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
}


def test_parameters_equal_published_counts():
    counted = {name: count_parameters(load_config(name))["total"] for name in PUBLISHED_PARAMETERS}
    assert counted == PUBLISHED_PARAMETERS
    assert count_parameters(load_config("mixtral-8x7b"))["active"] == 12_879_925_248
    nanogpt = load_config("gpt2").replace(bias=False, qkv_bias=False)
    assert count_parameters(nanogpt)["total"] == 124_337_664


@st.composite
def configs(draw, experts=True):
    kind = draw(st.sampled_from(KINDS if experts else KINDS[:-1]))
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
    if kind in ("gpt2", "qwen2"):
        changes |= dict(n_kv_heads=heads if kind == "gpt2" else k, head_dim=d, d_model=heads * d)
    else:
        changes |= dict(n_kv_heads=k, head_dim=d, d_model=2 * draw(st.integers(2, 30)))
    if kind == "llama":  # transformers wants a width that divides into the heads
        bias = draw(st.booleans())
        changes |= dict(bias=bias, qkv_bias=bias, d_model=heads * draw(st.integers(2, 9)))
    if kind == "mixtral":
        experts = draw(st.integers(1, 5))
        chosen = draw(st.integers(1, experts))
        changes |= dict(n_experts=experts, n_experts_per_token=chosen)
    return tiny(kind, **changes)


@settings(max_examples=30, deadline=None)
@given(configs())
def test_parameters_of_random_configs_equal_transformers(c):
    model, n = hf_model(c), count_parameters(c)
    assert n["total"] == model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = 1 - c.n_experts_per_token / max(c.n_experts, 1)
    assert n["active"] == n["total"] - experts * unused


@settings(max_examples=15, deadline=None)
@given(configs(experts=False))
def test_parameters_of_random_configs_equal_our_model(c):
    with torch.device("meta"):
        model = GPTModel(c)
    assert count_parameters(c)["total"] == sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------
# FLOPs


def counted_flops(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def rotary_product(c, T) -> int:
    """transformers multiplies positions and frequencies with a matrix product, once a forward."""
    return T * c.head_dim if c.position == "rope" else 0


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


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_flops_equal_the_counter_on_our_model(kind):
    c, B, T = tiny(kind), 2, 40
    model, ids = GPTModel(c).train(), torch.randint(0, c.vocab_size, (B, T))
    with torch.no_grad():
        assert counted_flops(lambda: model(ids)) == estimate_flops(c, B, T)["forward"]
    model.activation_checkpointing = True
    executed = estimate_flops(c, B, T, recompute="full", attention="math")["training_executed"]
    assert counted_flops(lambda: model(ids)[0].sum().backward()) == executed


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
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


# ---------------------------------------------------------------------------------------------
# Published tables

# parameters in billions, heads, width, layers: Narayanan et al. 2021, table 1 (V 51,200, T 2,048)
MEGATRON = (
    (1.7, 24, 2304, 24),
    (3.6, 32, 3072, 30),
    (7.5, 32, 4096, 36),
    (18.4, 48, 6144, 40),
    (39.1, 64, 8192, 48),
    (76.1, 80, 10240, 60),
    (145.6, 96, 12288, 80),
    (310.1, 128, 16384, 96),
    (529.6, 128, 20480, 105),
    (1008.0, 160, 25600, 128),
)


def megatron(heads, width, layers, **changes) -> GPTConfig:
    shape = dict(n_heads=heads, d_model=width, n_layers=layers, d_ff=4 * width, dropout=0.1)
    return GPTConfig(**dict(vocab_size=51200, max_position_embeddings=2048) | shape | changes)


@pytest.mark.parametrize("billions, heads, width, layers", MEGATRON)
def test_megatron_parameter_counts(billions, heads, width, layers):
    total = count_parameters(megatron(heads, width, layers))["total"]
    assert total / 1e9 == pytest.approx(billions, abs=0.06)


# GPUs, batch, seconds, MFU: Korthikanti et al. 2022, table 5, A100 at 312 TFLOP/s
@pytest.mark.parametrize(
    "heads, width, layers, gpus, batch, seconds, published",
    [
        (64, 6144, 48, 8, 4, 1.10, 0.415),
        (96, 12288, 96, 64, 64, 13.75, 0.514),
        (128, 20480, 105, 280, 280, 37.83, 0.560),
        (160, 25600, 128, 512, 512, 71.49, 0.563),
    ],
)
def test_korthikanti_mfu(heads, width, layers, gpus, batch, seconds, published):
    flops = estimate_flops(megatron(heads, width, layers), batch, 2048)["training"]
    assert mfu(flops, seconds, gpus, find_gpu("a100")) == pytest.approx(published, abs=0.002)


def test_nanogpt_and_palm_mfu():
    flops = estimate_flops(load_config("gpt2"), 100, 1024)["training"]
    assert mfu(flops, 0.755, 1, find_gpu("a100")) == pytest.approx(0.3714, abs=0.0002)
    palm = GPTConfig(  # Chowdhery et al. 2022: 540B, multi-query, 238.3k tokens/s on 6,144 TPU v4
        vocab_size=256000, max_position_embeddings=2048, n_layers=118, n_heads=48, n_kv_heads=1,
        head_dim=256, d_model=18432, d_ff=4 * 18432, gated_mlp=True, activation="silu",
        position="rope", norm="rmsnorm", bias=False,
    )  # fmt: skip
    assert count_parameters(palm)["total"] / 1e9 == pytest.approx(540.35, abs=0.05)
    tpu = GPU("tpu-v4", "", 275e12, 0, 0, 0)
    rate = estimate_flops(palm, 1, 2048)["per_token"]["training"] * 238_300
    assert mfu(rate, 1.0, 6144, tpu) == pytest.approx(0.462, abs=0.001)


def test_zero_memory_of_a_7_5b_model_on_64_gpus():
    c = megatron(32, 4096, 36)
    run = dict(precision="master-weights", implementation="megatron")
    published = {0: 120, 1: 31.4, 2: 16.6, 3: 1.88}  # GB; Rajbhandari et al. 2020, figure 1
    for zero, gigabytes in published.items():
        states = estimate_memory(c, 1, 8, "fp16", dp=64, zero=zero, **run)["states"]
        scaled = sum(states.values()) * 7.5e9 / count_parameters(c)["total"]
        assert scaled / 1e9 == pytest.approx(gigabytes, abs=0.06), zero


def korthikanti_block(c, T, B=1, **run) -> float:
    """Bytes a block saves, without the small statistics that the paper leaves out."""
    run = {"attention": "math", "precision": "pure"} | run
    setup = Setup(dtype="fp16", implementation="megatron", **run)
    v = solve_all(c, B, T, setup)
    return v["A_block"] - v["s"] * v["A_statistics"] if not v["full_recompute"] else v["A_kept"]


@pytest.mark.parametrize("_, heads, width, layers", MEGATRON)
def test_korthikanti_activation_formulas(_, heads, width, layers):
    c, T, B, t = megatron(heads, width, layers), 2048, 3, 8
    sbh, scores = T * B * width, 5 * heads * T / width
    assert korthikanti_block(c, T, B) == pytest.approx(sbh * (34 + scores), rel=1e-12)
    assert korthikanti_block(c, T, B, tp=t) == pytest.approx(sbh * (10 + 24 / t + scores / t))
    sharded = dict(tp=t, sequence_parallel=True)
    assert korthikanti_block(c, T, B, **sharded) == pytest.approx(sbh / t * (34 + scores))
    selective = korthikanti_block(c, T, B, recompute="selective", **sharded)
    assert selective == pytest.approx(34 * sbh / t)
    assert korthikanti_block(c, T, B, recompute="full") == 2 * sbh


def test_cache_bytes_and_litgpt_weights():
    for name, size in (("7b", 524_288), ("llama3-8b", 131_072)):
        memory = estimate_memory(load_config(name), 1, 128, training=False)
        assert memory["cache_bytes_per_token"] == size
    weights = estimate_memory(load_config("7b"), 1, 1, "bf16", training=False)["parts"]["weights"]
    assert weights / 1e9 == pytest.approx(13.48, abs=0.01)


BYTES_A_PARAMETER = (
    (dict(dtype="fp32"), 16),
    (dict(), 16),
    (dict(precision="pure"), 8),
    (dict(precision="master-weights", gradients="fp32"), 18),
    (dict(optimizer="adamw8bit"), 10.03),
    (dict(optimizer="adamw8bit", precision="pure"), 6.03),
    (dict(optimizer="sgd"), 8),
    (dict(optimizer="momentum"), 12),
    (dict(optimizer="sgd", precision="pure"), 4),
    (dict(optimizer="momentum", precision="pure"), 6),
)


@pytest.mark.parametrize("run, expected", BYTES_A_PARAMETER)
def test_bytes_a_parameter(run, expected):
    c = load_config("7b")
    states = estimate_memory(c, 1, 8, **({"dtype": "bf16", "implementation": "megatron"} | run))
    per_parameter = sum(states["states"].values()) / count_parameters(c)["total"]
    assert per_parameter == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Muon"])
def test_optimizer_state_equals_torch(name):
    c = tiny("llama")
    model = GPTModel(c)
    if name == "Muon":
        blocks = [p for p in model.blocks.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if not any(p is b for b in blocks)]
        optimizers = [torch.optim.Muon(blocks), torch.optim.AdamW(rest)]
    else:
        kwargs = {"momentum": 0.9} if name == "SGD" else {}
        optimizers = [getattr(torch.optim, name)(model.parameters(), **kwargs)]
    ids = torch.randint(0, c.vocab_size, (1, 8))
    model(ids, labels=ids)[1].backward()
    held = 0
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            held += sum(t.nbytes for t in state.values() if torch.is_tensor(t) and t.dim())
    setting = {"SGD": "momentum"}.get(name, name.lower())
    assert estimate_memory(c, 1, 8, "fp32", optimizer=setting)["states"]["optimizer"] == held


# ---------------------------------------------------------------------------------------------
# Activations and peaks, measured on CPU tensors


def saved_bytes(model, run, ids) -> int:
    """Storages that autograd keeps for the backward, parameters and buffers apart."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run(ids)
    size = sum(storage.nbytes() for storage in found.values())
    del output
    return size


def saved_by_a_block(kind, mode, ours: bool) -> tuple[GPTConfig, float]:
    sizes, B, T = [], 2, 64
    for layers in (2, 3):  # the difference is one block
        c = tiny(kind, n_layers=layers)
        torch.manual_seed(0)
        model = GPTModel(c).train() if ours else hf_model(c, "cpu", attn_implementation="sdpa")
        if mode == "pure":
            model = to_pure(model) if ours else model.bfloat16()
        body = model.hidden if ours else lambda ids, m=model: m.base_model(ids, use_cache=False)
        ids = torch.randint(0, c.vocab_size, (B, T))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            sizes.append(saved_bytes(model, body, ids))
    return c, (sizes[1] - sizes[0]) / (B * T)


def to_pure(model):
    dtypes = model.inference_dtypes(torch.bfloat16)
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes[name])
    return model


@pytest.mark.parametrize("mode", ["fp32", "autocast", "pure"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
def test_saved_activations_of_our_model(kind, mode):
    c, measured = saved_by_a_block(kind, mode, ours=True)
    measured -= casts_and_norms(c, mode)
    setup = Setup(
        dtype="fp32" if mode == "fp32" else "bf16", precision=mode.replace("fp32", "pure")
    )
    v = solve_all(c, 2, 64, setup)
    assert measured == v["A_block"] / v["s"]


def casts_and_norms(c, mode) -> float:
    """Per token: autocast's copies of the weights, which the estimate has apart, and what CPU's
    RMSNorm keeps beyond CUDA's fused one, its normalised output."""
    extra = 0.0
    if mode == "autocast":
        extra += solve_all(c, 2, 64, Setup())["M_casts"] / 128
    if c.norm == "rmsnorm":
        extra += 2 * 4 * c.d_model
        extra += c.qk_norm * 4 * (c.n_heads + c.n_kv_heads) * c.head_dim
    return extra


@pytest.mark.parametrize("mode", ["fp32", "autocast", "pure"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_saved_activations_of_transformers(kind, mode):
    c, measured = saved_by_a_block(kind, mode, ours=False)
    precision = mode.replace("fp32", "pure")
    setup = Setup(
        dtype="fp32" if mode == "fp32" else "bf16",
        precision=precision,
        implementation="transformers",
    )
    v = solve_all(c, 2, 64, setup)
    expected = v["A_block"] / v["s"] + v["M_casts"] / v["s"]
    if mode == "autocast" and kind == "gpt2":
        expected -= 6 * c.d_ff  # on CUDA `pow` runs in float32 and drags the activation with it
    if mode == "pure" and kind == "gpt2":
        expected -= 8  # CPU keeps the statistics of LayerNorm in bfloat16
    assert measured == pytest.approx(expected, rel=1e-3)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under it that are still alive, and their maximum."""

    def __init__(self, model):
        super().__init__()
        own = (*model.parameters(), *model.buffers())
        self.own = {p.untyped_storage()._cdata for p in own}
        self.now, self.peak, self.sizes = 0, 0, {}

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in filter(torch.is_tensor, tree_leaves(result)):
            storage = t.untyped_storage()
            if storage._cdata not in self.sizes and storage._cdata not in self.own:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result


STEP_CASES = [
    (kind, mode, recompute, B)
    for kind, mode in (("gpt2", "autocast"), ("llama", "autocast"), ("llama", "pure"))
    for recompute in ("none", "full")
    for B in (1, 12)
]


@pytest.mark.parametrize("kind, mode, recompute, B", STEP_CASES)
def test_peaks_of_a_training_step_on_cpu(kind, mode, recompute, B):
    """The forward's end and the backward's peak, with gradients or activations the larger part."""
    c, T = tiny(kind, vocab_size=320, d_model=192, max_position_embeddings=64, n_layers=4), 64
    if kind == "llama":  # LayerNorm is fused on CPU as RMSNorm is on CUDA
        c = c.replace(norm="layernorm", n_heads=12, n_kv_heads=4, d_ff=512)
    else:
        c = c.replace(d_ff=768)
    torch.manual_seed(0)
    model = GPTModel(c).train()
    model.activation_checkpointing = recompute == "full"
    if mode == "pure":
        to_pure(model)
    ids = torch.randint(0, c.vocab_size, (B, T))
    held = sum(p.nbytes for p in model.parameters())
    with LiveBytes(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            output = model(ids, labels=ids)  # logits and loss are held, as a training loop does
        forward_end, live.peak = live.now, 0
        output[1].backward()
    run = dict(precision=mode, recompute=recompute, optimizer="sgd", workspace=0, held_logits=True)
    estimate = estimate_memory(c, B, T, "bf16", **run)
    assert estimate["load_bytes"] == held
    assert estimate["forward_end_bytes"] - held == pytest.approx(forward_end, rel=0.03)
    assert estimate["backward_peak_bytes"] - held == pytest.approx(live.peak, rel=0.06)


def fused_loss(hidden, weight, targets, vocab_size):
    """cross_entropy.py's head and loss as on CUDA, with plain torch for the Triton kernel."""
    logits = hidden @ weight.t()
    nll = cross_entropy.cross_entropy(logits, targets, vocab_size)
    return nll, logits.copy_(logits.float().softmax(-1))  # sizes are what counts here


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size):
        output = fused_loss(hidden, weight, targets, vocab_size)
        cross_entropy._save(ctx, (hidden, weight, None, None), output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return cross_entropy._differentiate(ctx, grad, None)


@pytest.mark.parametrize("V", [4096, 640])
@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_peak_of_the_loss_whose_gradient_takes_the_logits_place(mode, V, monkeypatch):
    """Alive after the forward and at most in the backward of the loss, beside the hidden states."""
    monkeypatch.setattr(model_file, "head_cross_entropy", FusedLoss.apply)
    c, rows = tiny("gpt2", vocab_size=V, d_model=192, n_layers=1, tie_embeddings=False), 768
    setup = Setup(precision=mode, workspace=0)
    v = solve_all(c, 12, 64, setup)
    model = GPTModel(c).train()
    if mode == "pure":
        to_pure(model)
    hidden = torch.randn(rows, c.d_model, requires_grad=True)
    targets = torch.randint(0, V, (rows,))
    with LiveBytes(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model.nll(hidden, targets)
        held, live.peak = live.now, 0
        loss.backward(torch.ones_like(loss))
    cast_hidden = rows * 2 * c.d_model  # which the estimate has in A_ends
    assert held == cast_hidden + v["M_cast_head"] + v["M_loss_kept"]
    peak = live.peak - held + v["M_loss_kept"]
    assert peak == pytest.approx(v["M_loss_backward"], rel=0.03)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peak_of_a_prefill_on_cpu(kind):
    """Weights, cache and the widest moment of a block; without cuBLAS's fused GELU and RMSNorm."""
    c = tiny(kind, d_model=384, d_ff=1536, max_position_embeddings=256, head_dim=None)
    c = c.replace(norm="layernorm", activation="silu" if c.gated_mlp else "gelu")
    model, (B, T) = GPTModel(c).for_inference(torch.bfloat16), (2, 256)
    ids = torch.randint(0, c.vocab_size, (B, T))
    estimate = estimate_memory(c, B, T, "bf16", training=False, workspace=0)
    assert estimate["states"]["weights"] == sum(p.nbytes for p in model.parameters())
    with LiveBytes(model) as live, torch.no_grad():
        cache = DecodeCache(model, n_prompts=B, prompt_len=T, n_rows=B, max_len=0)
        filling = cache.filling(list(range(B)), [T] * B)
        model.logits(model.hidden(ids, cache=filling)[:, -1])
    assert estimate["peak_bytes"] - estimate["load_bytes"] == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("fused", [True, False])
def test_temporaries_of_the_optimizer_step(fused):
    c = tiny("llama", d_model=192)
    model = GPTModel(c)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=not fused)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with LiveBytes(model) as live:
        optimizer.step()
    v = solve_all(c, 1, 8, Setup(dtype="fp32", fused=fused))
    assert live.peak == pytest.approx(v["M_temporary"], rel=0.01, abs=2000)


@pytest.mark.parametrize("B, T, recompute", [(1, 16, "none"), (4, 64, "none"), (4, 64, "full")])
def test_timeline_equals_a_brute_force_simulation(B, T, recompute):
    """Allocate and free tensor by tensor what the timeline sums in closed form."""
    c = tiny("llama", n_layers=5)
    setup = Setup(recompute=recompute, workspace=0)
    v = solve_all(c, B, T, setup)
    alive, peaks = {}, {}

    def note(event):
        peaks[event] = sum(alive.values())

    alive |= {"weights": v["M_weights"], "optimizer": v["M_optimizer"], "shared": v["A_shared"]}
    for i in range(c.n_layers):
        alive[f"activation {i}"], alive[f"cast {i}"] = v["A_kept"], v["M_casts"]
        note(f"forward of block {i + 1}")
    alive["ends"], alive["head cast"], alive["loss"] = (
        v["A_ends"],
        v["M_cast_head"],
        v["M_loss_forward"],
    )
    note("logits and loss")
    if recompute == "full":
        for i in range(c.n_layers):
            del alive[f"cast {i}"]
    alive["loss"] = v["M_loss_kept"]
    note("end of forward")
    alive["loss"] = v["M_loss_backward"]
    note("backward of the loss")
    del alive["loss"]
    alive["head gradient"] = 4 * c.vocab_size * c.d_model
    del alive["head cast"], alive["ends"]
    for i in reversed(range(c.n_layers)):
        alive[f"activation {i}"], alive[f"cast {i}"] = v["A_block"], v["M_casts"]
        alive["passing"] = v["A_backward"]
        note(f"backward of block {i + 1}")
        del alive[f"activation {i}"], alive[f"cast {i}"], alive["passing"]
        alive[f"gradient {i}"] = 4 * v["n_block"]
    timeline = {e["event"]: e["bytes"] for e in estimate_memory(c, B, T, **vars(setup))["timeline"]}
    for event, size in peaks.items():
        assert timeline[event] == pytest.approx(size, abs=20), event


def test_constants_are_those_of_the_files_that_need_torch():
    assert formulas.VOCAB_MULTIPLE == model_file.VOCAB_MULTIPLE
    assert formulas.CHUNK_TOKENS == scoring.CHUNK_TOKENS


def test_rest_of_the_allocators_blocks():
    """By hand, MiB: c10/cuda/CUDACachingAllocator keeps what exceeds 1 MiB for others."""
    for times, sizes, expected in (
        (1, (0.5,), 0),
        (3, (39.0625,), 3 * 0.9375),  # segments of 40
        (1, (36.5,), 0),  # 1.5 of 38 are left for others
        (2, (14.5,), 0),
        (4, (4.875,), 0.5),  # all four in one segment of 20
        (3, (4.875,), 0),
        (1, (18.5, 1.25), 0.25),  # the second in what the first left
        (1, (26.0, 25.0), 1.0),
    ):
        assert formulas.slack(times, *(size * 2**20 for size in sizes)) == expected * 2**20


# What torch 2.11 allocated on H100s, case by case: benchmarks/memory.py measured it
WITHIN = {"prefill": 0.01, "score": 0.01, "train": 0.03, "lora": 0.03, "fsdp": 0.05}


def measured(name):
    records = json.loads((ROOT / "benchmarks/results" / name).read_text())["records"]
    return [r for r in records if "error" not in r["measured"]]


MEMORY = measured("memory.json") + measured("memory-fsdp.json")


@pytest.mark.parametrize("record", MEMORY, ids=lambda record: record["name"])
def test_memory_measured_on_a_gpu(record):
    case = memory_benchmark.Case(**record["case"])
    within = 0.05 if case.recompute == "full" else WITHIN[case.kind]
    for stage, estimate in memory_benchmark.estimate(case).items():
        if stage in ("load", "decode", "step_peak", "peak"):
            tolerance = within if stage == "peak" else max(within, 0.025)
            assert estimate == pytest.approx(record["measured"][stage], rel=tolerance), stage


def test_the_matrix_of_measured_cases_is_whole():
    assert {r["name"] for r in measured("memory.json")} == {
        c.name for c in memory_benchmark.matrix()
    }
    assert len(MEMORY) >= 60


def test_parts_sum_to_the_peak_and_the_peak_is_the_highest_event():
    runs = ({}, {"recompute": "full"}, {"lora_rank": 8}, {"dp": 8, "zero": 3}, {"tp": 8})
    for run in runs:
        memory = estimate_memory(load_config("llama3.2-1b"), 2, 1024, "bf16", **run)
        assert sum(memory["parts"].values()) == memory["peak_bytes"]
        assert memory["peak_bytes"] == max(event["bytes"] for event in memory["timeline"])
        for event in memory["timeline"]:
            assert sum(event["parts"].values()) == event["bytes"]
            assert min(event["parts"].values()) > 0
            grown = event["parts"].get("gradients", 0)
            assert grown <= memory["states"]["gradients"] + len(event["parts"])


# ---------------------------------------------------------------------------------------------
# GPUs, roofline, what fits


def test_find_gpu():
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100 80GB PCIe": "a100-pcie",
        "Tesla V100-SXM2-32GB": "v100-32gb",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "Tesla T4": "t4",
        "h100": "h100",
    }
    assert {name: find_gpu(name).name for name in names} == names
    for unknown in (
        "cpu",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):
        assert find_gpu(unknown) is None


def test_turning_batches_and_ideal_decode():
    for name, batch in (("a100", 153), ("h100", 295), ("h200", 206)):
        turning = compute.turning_batch(find_gpu(name), Setup(training=False))
        assert turning == pytest.approx(batch, abs=0.6)
    perfect = dict(ceilings=compute.Ceilings(1.0, 1.0, 1.0, 0.0), compiled=True)
    c = load_config("llama3-8b")
    ideal = roofline(c, find_gpu("h200"), 1, 1024, 2, **perfect)
    assert ideal["decode_tokens_per_second"] == pytest.approx(317, rel=0.01)
    products = estimate_flops(c, 1, 2048)["forward_causal"] / find_gpu("h200").bf16_flops
    assert products < roofline(c, find_gpu("h200"), 1, 2048, **perfect)["prefill_seconds"]


TIMES = [r for r in measured("roofline.json") if r["shape"][1] not in ("llama3.2-1b", "13b")]


@pytest.mark.parametrize("record", TIMES, ids=lambda record: "-".join(map(str, record["shape"])))
def test_times_measured_on_a_gpu(record):
    """Of shapes that the default ceilings were not fitted to."""
    kind, config, B, T = record["shape"]
    new, context = (T, T) if kind == "prefill" else (1, T + 1)
    c, setup = load_config(config), Setup(training=False)
    seconds = compute.pass_seconds(c, find_gpu("h100"), B, new, context, setup)["seconds"]
    assert seconds == pytest.approx(record["measured"]["seconds"], rel=0.15)


def test_largest_equals_a_linear_search():
    for answer in range(40):
        assert compute.largest(lambda n, answer=answer: n <= answer, 32) == min(answer, 32)


def test_what_fits_is_the_last_that_fits():
    c, gpu = load_config("llama3.2-1b"), find_gpu("a100")
    for setup in (Setup(), Setup(recompute="full"), Setup(training=False)):
        best = compute.largest_fits(c, gpu, 1, 2048, setup)

        def peak(b, t, setup=setup):
            return estimate_memory(c, b, t, **vars(setup))["peak_bytes"]

        budget = compute.usable_memory(gpu)
        assert peak(best["batch_size"], 2048) <= budget < peak(best["batch_size"] + 1, 2048)
        assert peak(1, best["seq_len"]) <= budget < peak(1, best["seq_len"] + 1)


def test_fewest_gpus_shards_a_7b_and_refuses_what_never_fits():
    c, gpu = load_config("7b"), find_gpu("h100")
    n, stage = compute.fewest_gpus(c, gpu, 1, 2048, Setup())
    assert n > 1 and stage > 0
    assert compute.fewest_gpus(load_config("llama3-70b"), find_gpu("t4"), 8, 8192, Setup()) is None


# ---------------------------------------------------------------------------------------------
# The command line


def command(*arguments):
    program = [sys.executable, "compute.py", *arguments]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_json_has_the_promised_fields():
    report = json.loads(command("--config", "7b", "--seq-len", "2048", "--json").stdout)
    assert report["parameters"]["total"] == report["parameters"]["active"] == 6_738_415_616
    assert report["flops"]["forward"] == 29_261_612_187_648
    assert report["flops"]["forward_causal"] < report["flops"]["forward"]
    assert report["flops"]["training"] == 3 * report["flops"]["forward"]
    assert report["memory"]["peak_bytes"] == sum(report["memory"]["parts"].values())


def test_explain_prints_each_formula_with_numbers_that_give_its_value():
    lines = command("--config", "qwen3-8b", "--explain", "--training").stdout.splitlines()
    shown = [i for i, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(shown) > 50
    for i in shown:
        _, numbers, value = (line.strip("= ").split(" byte")[0] for line in lines[i + 1 : i + 4])
        names = {"pairs": formulas.pairs, "slack": formulas.slack, "max": max, "min": min}
        value = float(value.removesuffix(" FLOP").replace(",", ""))
        assert eval(numbers, names) == pytest.approx(value, rel=1e-9), lines[i]


def test_every_kind_of_input(tmp_path):
    load_config("gpt2").save_pretrained(tmp_path / "ours")
    (tmp_path / "my.yaml").write_text("n_layers: 2\nd_model: 64\nn_heads: 4\n")
    (tmp_path / "gpu.yaml").write_text(
        "bf16_flops: 1.0e+14\nfp32_flops: 1.0e+13\nbandwidth: 1.0e+12\nmemory: 5.0e+10\n"
    )
    for arguments in (
        ("--config", tmp_path / "ours"),
        ("--config", tmp_path / "ours" / "config.json", "--training"),
        ("--config", tmp_path / "my.yaml", "--gpu", tmp_path / "gpu.yaml"),
        ("--config", "7b", "--fits"),
        ("--params", "7e9"),
    ):
        result = command(*map(str, arguments))
        assert result.returncode == 0 and len(result.stdout.splitlines()) > 5, result.stderr
    assert "124,439,808" in command("--config", str(tmp_path / "ours")).stdout


def test_wrong_input_gets_one_line_and_exit_2(tmp_path):
    (tmp_path / "step.pt").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"")
    (tmp_path / "bad.yaml").write_text("flops: 3\n")
    for arguments, expected in (
        (("--config", tmp_path / "step.pt"), f"python checkpoint.py inspect {tmp_path}/step.pt"),
        (("--config", tmp_path / "run"), f"python checkpoint.py inspect {tmp_path}/run"),
        (("--config", "8b"), "presets are"),
        (("--config", "7b", "--gpu", "z9"), "no GPU named 'z9'"),
        (("--config", "7b", "--gpu", tmp_path / "bad.yaml"), "bf16_flops"),
        (("--config", "7b", "--tp", "5"), "tp 5"),
        (("--config", "7b", "--dtype", "int8", "--training"), "LoRA"),
        (("--config", "7b", "--fsdp", "--zero", "1"), "contradicts"),
        ((), "--config"),
    ):
        result = command(*map(str, arguments))
        assert result.returncode == 2 and expected in result.stderr, (arguments, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    assert command("--config", "gpt2", "--plot", str(path)).returncode == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_start_up_is_quick():
    times = []
    for _ in range(5):  # processor time: a busy machine is not our doing
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command("--config", "7b").returncode == 0
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert min(times) < 0.3, times


def test_neither_compute_nor_config_imports_torch():
    allowed = set(sys.stdlib_module_names) | {"config", "formulas", "yaml", "matplotlib", "cli"}
    for name in ("compute.py", "formulas.py", "config.py"):
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {node.module.split(".")[0]}
            else:
                continue
            assert found <= allowed, (name, found)
    program = (
        "import compute, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

"""costs/formulas.py: activations against autograd's own and published formulas; the allocator."""

import pytest
import torch
from small_models import KINDS, LATENT, MEGATRON, MIXTURES, hf_model, megatron, tiny, to_pure

import model as model_file
from backends import scoring
from config import GPTConfig
from costs import formulas, symbols
from costs.symbols import Setup, solve_all
from model import GPTModel


def test_constants_are_those_of_the_files_that_need_torch():
    assert symbols.VOCAB_MULTIPLE == model_file.VOCAB_MULTIPLE
    assert symbols.CHUNK_TOKENS == scoring.CHUNK_TOKENS


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


# ---------------------------------------------------------------------------------------------
# Activations that autograd keeps on CPU


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
        # values as wide as keys: on CPU no fast attention takes others, on CUDA they are widened
        alike = {"dense_layers": ()} if kind in MIXTURES else {}
        alike |= {"v_head_dim": 18} if kind in LATENT else {}
        c = tiny(kind, n_layers=layers, **alike)
        torch.manual_seed(0)
        model = GPTModel(c).train() if ours else hf_model(c, "cpu", attn_implementation="sdpa")
        if mode == "pure":
            model = to_pure(model) if ours else model.bfloat16()
        body = model.hidden if ours else lambda ids, m=model: m.base_model(ids, use_cache=False)
        ids = torch.randint(0, c.vocab_size, (B, T))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            sizes.append(saved_bytes(model, body, ids))
    return c, (sizes[1] - sizes[0]) / (B * T)


@pytest.mark.parametrize("mode", ["fp32", "autocast", "pure"])
# Apart from what attention on CPU holds of a soft cap, and from layers that are unlike
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"mistral", "gemma2", "smollm3"}))
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
    RMSNorm keeps beyond CUDA's fused one, its normalised output; and the mask of a window."""
    extra = 0.0
    if mode == "autocast":
        extra += solve_all(c, 2, 64, Setup())["M_casts"] / 128
        extra += 2 * c.shared_gate * c.d_model / 128
    if mode == "pure":
        extra += 4 * c.n_experts * c.d_model / 128  # a router's weight in float32
    if c.norm == "rmsnorm":
        extra += (2 * c.pre_norm + 2 * c.post_norm) * 4 * c.d_model
    if c.qk_norm_type == "rmsnorm":
        extra += c.qk_norm * 4 * (c.n_heads + c.n_kv_heads) * c.head_dim
    extra += 4 * ((c.kv_lora_rank or 0) + (c.q_lora_rank or 0))
    if c.n_expert_groups > 1:  # how groups were chosen, which is let go with the choice
        extra += 17 * c.n_expert_groups + 8 * c.n_expert_groups_per_token
    if c.sliding_window:
        extra += (4 if mode == "fp32" else 2) * 64 / 2
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

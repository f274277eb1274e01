"""Mixtures of experts as trainers keep them: transformers' models under the names of torchtitan,
DeepSpeed and Megatron, by the rules that these document, against transformers' own logits."""

import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from checkpoint_files import CONFIGS, logits, make_model
from megatron_files import core_state, of_experts, ranks, torch_dist
from trained_files import refusal

import checkpoint
from config import config_from_hf

transformers = pytest.importorskip("transformers")

V = 61
IDS = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(0))
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SIZES |= dict(moe_intermediate_size=24, num_experts_per_tok=2, pad_token_id=None)
SIZES |= dict(bos_token_id=None, eos_token_id=None)
QWEN = dict(num_experts=4, head_dim=16, norm_topk_prob=True)
DEEPSEEK = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, n_group=2)
DEEPSEEK |= dict(num_key_value_heads=4, n_routed_experts=4, topk_group=1, first_k_dense_replace=1)


def made(model_type, **case):
    """(a transformers model, its weights a matrix for each expert, its config with us)."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | case))
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.12)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    weights = {}
    for name, t in theirs.eval().state_dict().items():
        stem, _, last = name.rpartition(".experts.")
        if stem and last == "gate_up_proj":
            weights[f"{stem}.experts.gate"], weights[f"{stem}.experts.up"] = t.chunk(2, dim=1)
        elif stem and last == "down_proj":
            weights[f"{stem}.experts.down"] = t
        else:
            weights[name] = t
    return theirs, weights, config_from_hf(config.to_dict()).replace(dropout=0.0)


@torch.no_grad()
def same(path, theirs, config):
    wanted = theirs(IDS).logits
    found = checkpoint.load_model(path, "float32", config=config)(IDS)[0]
    assert wanted.std() > 0.3
    return (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.std().item())


def renamed(weights, names):
    """By pairs of (theirs, new), each a part of a name."""
    found = {}
    for name, t in weights.items():
        for old, new in names:
            name = name.replace(old, new)
        found[name] = t.contiguous().clone()
    return found


def save_dcp(weights, path):
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save(weights, checkpoint_id=path, no_dist=True)
    return path


# ---------------------------------------------------------------------------------------------
# torchtitan

TITAN = (
    ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("model.norm", "norm"),
    ("model.layers", "layers"), ("self_attn", "attention"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("mlp.gate.e_score_correction", "moe.expert"),
    ("mlp.gate.", "moe.router.gate."), ("mlp.experts.gate", "moe.experts.w1"),
    ("mlp.experts.up", "moe.experts.w3"), ("mlp.experts.down", "moe.experts.w2"),
    ("mlp.shared_experts", "moe.shared_experts"), ("mlp.", "feed_forward."),
    ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"), ("q_proj", "wq"),
    ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo"), ("q_a_proj", "wq_a"),
    ("q_a_layernorm", "q_norm"), ("q_b_proj", "wq_b"), ("kv_a_proj_with_mqa", "wkv_a"),
    ("kv_a_layernorm", "kv_norm"), ("kv_b_proj", "wkv_b"),
)  # fmt: skip
NOW = (
    ("output.", "lm_head."), ("moe.expert_bias", "moe.expert_bias_E"),
    ("moe.experts.w1", "moe.routed_experts.inner_experts.w1_EFD"),
    ("moe.experts.w2", "moe.routed_experts.inner_experts.w2_EDF"),
    ("moe.experts.w3", "moe.routed_experts.inner_experts.w3_EFD"),
)  # fmt: skip


@pytest.mark.parametrize("case", [dict(q_lora_rank=12), dict(q_lora_rank=None)])
def test_torchtitans_deepseek(tmp_path, case):
    theirs, weights, config = made("deepseek_v3", **DEEPSEEK, **case)
    old = renamed(weights, TITAN)
    assert {"layers.1.moe.experts.w1", "layers.1.moe.expert_bias"} <= old.keys()
    assert same(save_dcp(old, tmp_path / "step-1"), theirs, config)
    new = save_dcp(renamed(old, NOW), tmp_path / "step-2")
    assert same(new, theirs, config)
    converted = checkpoint.convert(new, tmp_path / "out", config)
    assert same(converted, theirs, None)
    assert "no config" in refusal(new)
    wrong = config.replace(kv_lora_rank=12)
    assert "kv_down_proj.weight (file [20, 32], model [16, 32])" in refusal(new, wrong)


def test_torchtitans_qwen3(tmp_path):
    """Whose routers have a bias that balances their load, of which Qwen's config knows nothing."""
    theirs, weights, config = made("qwen3_moe", **QWEN)
    path = save_dcp(renamed(weights, TITAN), tmp_path / "step-1")
    assert same(path, theirs, config)
    biases = {f"layers.{i}.moe.expert_bias": torch.zeros(4) for i in range(3)}
    path = save_dcp(renamed(weights, TITAN) | biases, tmp_path / "step-2")
    assert "unexpected: blocks.0.mlp.router.choice_bias" in refusal(path, config)
    assert same(path, theirs, config.replace(router_choice_bias=True))
    biases["layers.1.moe.expert_bias"] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    path = save_dcp(renamed(weights, TITAN) | biases, tmp_path / "step-3")
    assert not same(path, theirs, config.replace(router_choice_bias=True))


# ---------------------------------------------------------------------------------------------
# DeepSpeed


def save_deepspeed(tag, weights, wrap=True):
    """Each expert of each layer in a file; the rest, routers too, in `module`."""
    tag.mkdir(parents=True)
    module, experts = {}, {}
    at = ".deepspeed_moe.experts.deepspeed_experts."
    for name, t in weights.items():
        stem, _, part = name.rpartition(".experts.")
        if stem and wrap:
            layer = int(name.split(".")[2])
            for e, own in enumerate(t):
                full = f"{stem}{at}{e}.{part}_proj.weight"
                experts.setdefault((layer, e), {})[full] = own.clone()
        else:
            module[name.replace(".mlp.gate.", ".mlp.deepspeed_moe.gate.wg.")] = t.clone()
    torch.save({"module": module, "global_steps": 7}, tag / "mp_rank_00_model_states.pt")
    for (layer, e), own in experts.items():
        torch.save(own, tag / f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt")
    (tag / "expp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"is not needed")
    (tag.parent / "latest").write_text(tag.name)
    return tag


def test_deepspeeds_files_of_experts(tmp_path):
    theirs, weights, config = made("qwen3_moe", **QWEN)
    tag = save_deepspeed(tmp_path / "run/global_step7", weights)
    assert same(tag, theirs, config) and same(tmp_path / "run", theirs, config)
    ckpt = checkpoint.open(tag, config)
    assert (ckpt.kind, ckpt.step) == ("deepspeed", 7) and checkpoint.is_finished(tag)
    assert len(ckpt.fingerprint) == 64
    theirs.config.save_pretrained(tag)
    assert same(tag, theirs, None)
    file, whole = (tag / f"layer_1_expert_{e}_mp_rank_00_model_states.pt" for e in (2, 3))
    content = file.read_bytes()
    file.unlink()
    assert "model.layers.1.mlp.experts.2.gate_proj.weight" in refusal(tag)
    for bad, match in (
        (content[:-50], "truncated or still being written"),
        (whole.read_bytes(), "and so does another file"),
    ):
        file.write_bytes(bad)
        assert match in refusal(tag)
    file.write_bytes(content)
    (tag / "mp_rank_00_model_states.pt").unlink()
    assert "of experts under ZeRO 3" in refusal(tag)


def test_deepspeed_without_files_of_experts(tmp_path):
    """transformers' own module, which keeps the experts of a layer in two tensors."""
    theirs, _, config = made("qwen3_moe", **QWEN)
    tag = save_deepspeed(tmp_path / "global_step7", theirs.state_dict(), wrap=False)
    said = torch.load(tag / "mp_rank_00_model_states.pt")["module"]
    said = {name.replace("deepspeed_moe.gate.wg", "gate"): t for name, t in said.items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in said
    torch.save({"module": said, "global_steps": 7}, tag / "mp_rank_00_model_states.pt")
    assert same(tag, theirs, config)


# ---------------------------------------------------------------------------------------------
# Megatron

LLAMA = CONFIGS["llama"].replace(n_layers=4)
MIXTURES = {
    "mixtral": LLAMA.replace(n_experts=4, n_experts_per_token=2, router_norm=True),
    "qwen2": LLAMA.replace(
        n_experts=4, n_experts_per_token=3, d_ff_expert=24, d_ff_shared=40, shared_gate=True
    ),
    "deepseek": LLAMA.replace(
        n_experts=8, n_experts_per_token=2, d_ff_expert=24, d_ff_shared=24, dense_layers=(0,),
        router_score="sigmoid", router_norm=True, router_scale=2.5, router_choice_bias=True,
        n_expert_groups=2, expert_group_score="top2",
    ),
}  # fmt: skip


def right(path, config):
    ckpt = checkpoint.open(path)
    assert ckpt.config == config and ckpt.kind == "megatron", (ckpt.config, config, ckpt.problem)
    return torch.equal(logits(ckpt.load("float32")), logits(make_model(config)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_megatrons_files_of_ranks(tmp_path, kind):
    """Tensor, pipeline and expert parallel; experts as modules or as numbered weights of one."""
    config = MIXTURES[kind]
    state, said = core_state(make_model(config)), of_experts(config)
    for i, (T, P, E) in enumerate([(1, 1, 1), (1, 1, 2), (2, 2, 1), (2, 1, 4), (2, 2, 2)]):
        assert right(ranks(tmp_path / f"{i}", state, config, T, P, E=E, **said), config), (T, P, E)
    grouped = {
        re.sub(r"local_experts\.(\d+)\.linear_fc(\d)\.weight", r"linear_fc\2.weight\1", n): t
        for n, t in state.items()
    }
    assert any(name.endswith("mlp.experts.linear_fc1.weight3") for name in grouped)
    assert right(ranks(tmp_path / "grouped", grouped, config, 1, 2, **said), config)


@pytest.mark.parametrize("kind", MIXTURES)
def test_megatrons_torch_dist(tmp_path, kind):
    config = MIXTURES[kind]
    state, said = core_state(make_model(config)), of_experts(config)
    for i, (stacked, halves) in enumerate([(1, 0), (0, 1), (1, 1), (0, 0)]):
        if stacked and config.dense_layers:  # layers that differ are not stacked
            continue
        path = torch_dist(tmp_path / f"{i}", state, config, stacked, 1, halves, **said)
        assert right(path, config), (stacked, halves)


def test_ranks_of_experts_that_are_missing(tmp_path):
    config = MIXTURES["mixtral"]
    state, said = core_state(make_model(config)), of_experts(config)
    path = ranks(tmp_path, state, config, 1, 1, E=4, **said)
    (path / "mp_rank_00_003").rename(tmp_path / "away")
    assert "expert_model_parallel_size 4, there are files of 3" in refusal(path)
    (tmp_path / "away").rename(path / "mp_rank_00_003")
    (path / "mp_rank_00_001").rename(tmp_path / "away")
    assert "lacks the file of tensor rank 0, stage 0, rank 1 of experts" in refusal(path)
    (tmp_path / "away").rename(path / "mp_rank_00_001")
    assert right(path, config)
    fused = {n: t for n, t in state.items() if ".experts." not in n}  # of an old grouped product
    fused |= {f"decoder.layers.{i}.mlp.experts.weight1": torch.ones(32, 384) for i in range(4)}
    odd = ranks(tmp_path / "odd", fused, config, 1, 1, **said)
    assert "unexpected: decoder.layers.0.mlp.experts.weight1" in refusal(odd)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_score_function", "tanh"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "sinkhorn"]),
        ("moe_router_enable_expert_bias", True),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_layer_freq", "x"),
        ("moe_layer_freq", [1]),
        ("moe_router_topk", "x"),
        ("expert_tensor_parallel_size", 2),
    ],
)
def test_megatrons_settings_without_a_native_form(tmp_path, name, value):
    config = MIXTURES["mixtral"]
    state, said = core_state(make_model(config)), of_experts(config) | {name: value}
    assert name in refusal(ranks(tmp_path, state, config, 1, 1, **said))

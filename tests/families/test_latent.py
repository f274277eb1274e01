"""Latent attention, with and without experts, against transformers' own eager models, from their
files; what caches keep of it; and what is refused."""

import json

import pytest
import torch
from family_checks import (
    IDS,
    check_caches,
    check_logits,
    check_padded_logits,
    check_saved,
    pairs_of,
)

import checkpoint
from backends import Sampling
from backends.engine import generate
from backends.kvcache import DecodeCache, PrefixCache
from config import config_from_hf
from families.convert import FAMILIES
from families.llama import UnsupportedArchitecture

transformers = pytest.importorskip("transformers")

LATENT = dict(num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=20, v_head_dim=12)
LATENT |= dict(qk_nope_head_dim=10, qk_rope_head_dim=8)
EXPERTS = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
BIASED = dict(attention_bias=True)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(type="longrope", factor=4.0, short_factor=[1.0, 1.1, 1.2, 1.3])
LONGROPE |= dict(long_factor=[1.5, 1.8, 2.1, 2.4])
CASES = {  # each switches on, or off, what its family can
    "youtu": [
        LATENT,
        LATENT
        | BIASED
        | dict(q_lora_rank=None, v_head_dim=20, tie_word_embeddings=False, rms_norm_eps=1e-3)
        | dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.3)),
    ],
    "minicpm3": [
        LATENT | dict(dim_model_base=48),
        LATENT
        | BIASED
        | dict(v_head_dim=None, scale_emb=3, scale_depth=None, dim_model_base=None)
        | dict(mlp_bias=True, tie_word_embeddings=False),
        LATENT
        | dict(rope_scaling=LONGROPE, original_max_position_embeddings=16)
        | dict(q_lora_rank=None, scale_depth=0.9, qk_nope_head_dim=7),
    ],
    "deepseek_v2": [
        LATENT | EXPERTS,
        LATENT
        | EXPERTS
        | BIASED
        | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, q_lora_rank=None)
        | dict(first_k_dense_replace=1, routed_scaling_factor=2.0),
        LATENT
        | EXPERTS
        | dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=0.7), v_head_dim=20)
        | dict(n_group=4, topk_group=2, first_k_dense_replace=2),  # groups that greedy ignores
    ],
    "deepseek_v3": [
        LATENT | EXPERTS | dict(n_group=4, topk_group=2),
        LATENT
        | EXPERTS
        | BIASED
        | dict(n_group=1, topk_group=1, n_shared_experts=2, norm_topk_prob=False)
        | dict(first_k_dense_replace=0, q_lora_rank=None),
        LATENT
        | EXPERTS
        | dict(rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0))
        | dict(n_group=2, topk_group=1, first_k_dense_replace=1),
    ],
    "glm4_moe_lite": [
        LATENT | EXPERTS,
        LATENT
        | EXPERTS
        | dict(n_group=4, topk_group=2, mlp_layer_types=["sparse", "dense", "sparse", "dense"]),
    ],
}
NAMES = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
SIMPLER = {("glm4_moe_lite", 0): "deepseek_v3"}  # which has all its features


def test_every_family_of_latent_attention_is_compared():
    assert CASES.keys() == {n for n, family in FAMILIES.items() if "kv_lora_rank" in family.keys}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pairs_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("name, i", NAMES)
def test_logits_padded_and_through_every_cache(pairs, name, i):
    theirs, _, ours = pairs(name, i)
    check_logits(theirs, ours)
    check_padded_logits(theirs, ours, "left")
    check_padded_logits(theirs, ours, "right")
    check_caches(theirs, ours)


@pytest.mark.parametrize("name, i", NAMES)
def test_saved_and_loaded_by_transformers_bit_for_bit(pairs, name, i, tmp_path):
    theirs, _, ours = pairs(name, i)
    check_saved(theirs, ours, tmp_path, SIMPLER.get((name, i)))


# ---------------------------------------------------------------------------------------------
# What caches keep


@torch.no_grad()
def test_a_token_leaves_one_latent_a_layer(pairs):
    _, _, ours = pairs("deepseek_v3", 0)
    c = ours.config
    cache = DecodeCache(ours, n_prompts=2, prompt_len=9, n_rows=3, max_len=5)
    assert cache.k[0].shape == (3, 1, 5, 24 + 8) and cache.prompt_k[0].shape == (2, 1, 9, 24 + 8)
    assert cache.v == cache.prompt_v == dict.fromkeys(range(c.n_layers))
    assert c.cache_dim == 32
    prefix = PrefixCache(ours, 9)
    assert prefix.k[0].shape == (1, 4, 9, 18) and prefix.v[0].shape == (1, 4, 9, 12)


@pytest.mark.parametrize("name, i", [("youtu", 1), ("deepseek_v2", 1), ("deepseek_v3", 0)])
@torch.no_grad()
def test_greedy_text_from_latents_is_that_without_a_cache(pairs, name, i):
    """Prompts of several lengths, rows that refill: the tokens of whole passes, which make keys and
    values of every latent."""
    _, _, ours = pairs(name, i)
    prompts = [IDS[0, :n].tolist() for n in (3, 17, 1, 30)]
    sampling = Sampling(max_new_tokens=8)
    found = {s.prompt_index: s.token_ids for s in generate(ours, prompts, sampling, batch_size=3)}
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(8):
            ids.append(ours(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert found[index] == ids[len(prompt) :], index


def test_kimi_k2_is_a_deepseek_v3(pairs, tmp_path):
    """Its model_type is its own, its code DeepSeek's."""
    _, folder, ours = pairs("deepseek_v3", 1)
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert torch.equal(checkpoint.load_model(tmp_path, "float32")(IDS)[0], ours(IDS)[0])


@pytest.mark.parametrize("name", ["youtu", "minicpm3", "deepseek_v3"])
@torch.no_grad()
def test_weights_alone_need_the_config_of_their_family(pairs, tmp_path, name):
    _, folder, ours = pairs(name, 0)
    file = tmp_path / "weights.safetensors"
    file.symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"has no config, .* those of a model_type .*{name}"):
        checkpoint.load_model(file, "float32")
    loaded = checkpoint.load_model(file, "float32", config=ours.config)
    assert torch.equal(loaded(IDS)[0], ours(IDS)[0])


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("youtu", {"rope_interleave": None}, "rope_interleave None"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name, changes, what):
    with pytest.raises(UnsupportedArchitecture, match=what):
        config_from_hf({"model_type": name} | changes)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("deepseek_v3", {"kv_lora_rank": None}, "is of latent attention: set kv_lora_rank"),
        ("youtu", {"v_head_dim": None}, "lacks v_head_dim"),
        ("youtu", {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, not 7"),
        ("minicpm3", {"scale_depth": "deep"}, "scale_depth must be a number"),
        ("youtu", {"qk_nope_head_dim": [8]}, "of another type than youtu has"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "must say dense or sparse of 47 layers"),
        ("deepseek_v2", {}, "n_experts_per_token"),
    ],
)
def test_malformed_values(name, changes, what):
    with pytest.raises(ValueError, match=what):
        config_from_hf({"model_type": name} | changes)


def test_weights_in_fp8_with_a_scale_for_each_block(pairs, tmp_path):
    """DeepSeek-V3's and Kimi-K2's releases; without the config that says so nobody knows."""
    from safetensors.torch import load_file, save_file

    _, folder, ours = pairs("deepseek_v3", 0)
    state = load_file(folder / "model.safetensors")
    plain = dict(state)
    for key in [key for key in state if "proj" in key and state[key].dim() == 2]:
        state[key] = state[key].to(torch.float8_e4m3fn)
        state[f"{key}_scale_inv"] = torch.full((1, 1), 0.5)
        plain[key] = state[key].float() * 0.5
    save_file(state, tmp_path / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": fp8}))
    loaded = checkpoint.load_model(tmp_path, "float32").state_dict()
    save_file(plain, folder / "model.safetensors")
    wanted = checkpoint.load_model(folder, "float32").state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in wanted.items())
    (tmp_path / "config.json").write_text(json.dumps(values))
    for config in (None, ours.config):
        with pytest.raises(ValueError, match="quantised by FP8 with a scale for each block"):
            checkpoint.load_model(tmp_path, config=config)

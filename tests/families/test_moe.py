"""Mixtures of experts against transformers' own eager models, from their files."""

import pytest
import torch
from family_checks import (
    IDS,
    SIZES,
    check_caches,
    check_logits,
    check_padded_logits,
    check_saved,
    pairs_of,
)

import checkpoint
from config import config_from_hf
from families.llama import UnsupportedArchitecture
from families.mixtures import FAMILIES

transformers = pytest.importorskip("transformers")

QWEN = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
SHARED = dict(shared_expert_intermediate_size=40)
GLM = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=24)
CASES = {  # each switches on, or off, what its family can
    "mixtral": [
        dict(num_local_experts=5, num_experts_per_tok=2),
        dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=8, head_dim=24)
        | dict(tie_word_embeddings=True, router_aux_loss_coef=0.5, hidden_act="gelu"),
    ],
    "granitemoe": [
        dict(num_local_experts=5, num_experts_per_tok=3, attention_multiplier=0.4),
        dict(num_local_experts=4, num_experts_per_tok=4, attention_bias=True)
        | dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=3.0),
    ],
    "olmoe": [
        dict(num_experts=6, num_experts_per_tok=3),
        dict(num_experts=6, num_experts_per_tok=1, norm_topk_prob=True, attention_bias=True),
    ],
    "qwen2_moe": [
        QWEN | SHARED,
        QWEN | SHARED | dict(norm_topk_prob=True, decoder_sparse_step=2, qkv_bias=False),
        QWEN | SHARED | dict(mlp_only_layers=[0, 3], tie_word_embeddings=True),
    ],
    "qwen3_moe": [
        QWEN | dict(norm_topk_prob=True, head_dim=24),
        QWEN | dict(mlp_only_layers=[1], head_dim=16, attention_bias=True, rope_theta=1e6),
    ],
    "glm4_moe": [
        GLM | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5, n_shared_experts=2),
        GLM | dict(use_qk_norm=True, attention_bias=True, first_k_dense_replace=2),
        GLM | dict(norm_topk_prob=False, first_k_dense_replace=0, partial_rotary_factor=1.0),
    ],
}
NAMES = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]


def test_every_mixture_is_compared():
    """test_hf_latent.py compares those of latent attention."""
    latent = {name for name, family in FAMILIES.items() if "kv_lora_rank" in family.keys}
    assert CASES.keys() == FAMILIES.keys() - latent


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pairs_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("name, i", NAMES)
def test_logits(pairs, name, i):
    theirs, _, ours = pairs(name, i)
    check_logits(theirs, ours)


@pytest.mark.parametrize("name, i", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits(pairs, name, i, side):
    theirs, _, ours = pairs(name, i)
    check_padded_logits(theirs, ours, side)


@pytest.mark.parametrize("name, i", NAMES)
def test_logits_through_every_cache(pairs, name, i):
    theirs, _, ours = pairs(name, i)
    check_caches(theirs, ours)


@pytest.mark.parametrize("name, i", NAMES)
def test_saved_and_loaded_by_transformers_bit_for_bit(pairs, name, i, tmp_path):
    theirs, _, ours = pairs(name, i)
    check_saved(theirs, ours, tmp_path)


# ---------------------------------------------------------------------------------------------
# Other forms of the same weights


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_stacked_as_in_memory(pairs, tmp_path, name, turned):
    """What trainers save is transformers' state dict, where experts are stacked, gate and up in
    one; other classes have these the other way round."""
    theirs, folder, ours = pairs(name, 0)
    state = theirs.state_dict()
    stacks = [key for key in state if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacks
    for key in stacks if turned else []:
        state[key] = state[key].transpose(1, 2).contiguous()
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded = checkpoint.load_model(tmp_path, "float32")
    for (key, p), q in zip(loaded.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_layers_that_guess_further_ahead_are_left_out(pairs, tmp_path):
    """GLM-4.5's and DeepSeek-V3's files end with one."""
    from safetensors.torch import load_file, save_file

    _, folder, ours = pairs("glm4_moe", 0)
    state = load_file(folder / "model.safetensors")
    last = {
        key.replace("layers.3.", "layers.4."): t.clone()
        for key, t in state.items()
        if "layers.3." in key
    }
    last |= {f"model.layers.4.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm")}
    last |= {"model.layers.4.eh_proj.weight": torch.ones(64, 128)}
    save_file(state | last, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(checkpoint.load_model(tmp_path, "float32")(IDS)[0], ours(IDS)[0])


def test_converted_in_bfloat16_a_router_chooses_as_before(pairs, tmp_path):
    """The bias that it chooses by stays float32 beside weights in 16 bits."""
    from safetensors.torch import load_file

    theirs, _, _ = pairs("glm4_moe", 0)
    theirs.to(torch.bfloat16)
    biases = {key: b for key, b in theirs.named_buffers() if key.endswith("correction_bias")}
    for b in biases.values():
        b.data = torch.randn(b.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.float()
    path = checkpoint.convert(tmp_path / "theirs", tmp_path / "ours")
    state, wanted = (
        load_file(path / "model.safetensors"),
        load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert state.keys() == wanted.keys()
    for key, t in wanted.items():
        assert state[key].dtype == t.dtype and torch.equal(state[key], t), key
    assert {wanted[key].dtype for key in biases} == {torch.float32}


# ---------------------------------------------------------------------------------------------
# Keys of config.json


@pytest.mark.parametrize("name", CASES)
def test_an_absent_key_means_what_it_means_to_transformers(name):
    """One after the other is left out of values of which none is a class's own."""
    said = dict(mlp_only_layers=[2], decoder_sparse_step=2, first_k_dense_replace=3, topk_group=2)
    said |= dict(num_experts_per_tok=3, router_aux_loss_coef=0.3, norm_topk_prob=True, n_group=4)
    said |= dict(shared_expert_intermediate_size=40, n_shared_experts=3, routed_scaling_factor=2.0)
    said |= dict(moe_intermediate_size=24, use_qk_norm=True, qkv_bias=False, attention_bias=True)
    said |= {FAMILIES[name].keys["n_experts"][0]: 24}
    for absent in (None, *(key for key in said if key != "n_group")):  # two groups of one are none
        values = {key: value for key, value in (SIZES | said).items() if key != absent}
        theirs = transformers.AutoConfig.for_model(name, **values)
        ours = config_from_hf({"model_type": name} | values)
        assert ours == config_from_hf(theirs.to_dict()), absent


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_are_counted_under_both_names(name, key):
    """transformers 4 wrote one, transformers 5 the other."""
    config = config_from_hf({"model_type": name, key: 20, "num_hidden_layers": 2})
    assert config.n_experts == 20
    theirs = transformers.AutoConfig.for_model(name, **{key: 20, "num_hidden_layers": 2})
    assert config == config_from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window True"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv 8\.0"),
        ("qwen2_moe", {"num_experts": 0}, "a mixture without experts"),
    ],
)
def test_what_a_mixture_cannot_say_is_left_to_transformers(name, changes, what):
    with pytest.raises(UnsupportedArchitecture, match=what):
        config_from_hf({"model_type": name} | changes)

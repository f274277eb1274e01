"""Every family beside GPT-2's and Llama's against transformers' own eager model, from its files."""

import numpy as np
import pytest
import torch
from family_checks import (
    IDS,
    SIZES,
    T,
    V,
    biases_of_choices,
    check_caches,
    check_logits,
    check_padded_logits,
    check_saved,
    pairs_of,
    tolerance,
)

import checkpoint
from backends.continuations import Continuations, plan_batches, score_continuations
from config import GPTConfig, config_from_hf
from distributed import Dist
from families.convert import FAMILIES as ALL_FAMILIES
from families.dense import FAMILIES
from families.llama import UnsupportedArchitecture
from formats import naming, stored
from model import GPTModel

transformers = pytest.importorskip("transformers")

WIDE = dict(head_dim=32)
BIASED = dict(attention_bias=True)
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=8.0)
ONE_MORE = dict(rope_theta=3e4)


def longrope(pairs, original, **more):
    short, long = [1.0 + i / 9 for i in range(pairs)], [1.5 + i / 3 for i in range(pairs)]
    scaling = dict(type="longrope", short_factor=short, long_factor=long)
    return dict(rope_scaling=scaling | more, original_max_position_embeddings=original)


CASES = {  # each switches on, or off, what its family can
    "olmo": [{}, BIASED | dict(clip_qkv=0.5, tie_word_embeddings=True)],
    "olmo2": [{}, BIASED | dict(rms_norm_eps=1e-3) | ONE_MORE],
    "olmo3": [
        dict(sliding_window=8),
        dict(
            sliding_window=8,
            layer_types=TYPES,
            rope_parameters=dict(
                full_attention=YARN | dict(rope_theta=1e5),
                sliding_attention=dict(rope_type="default", rope_theta=1e5),
            ),
        ),
    ],
    "gpt_neox": [
        {},
        dict(use_parallel_residual=False, rotary_pct=1.0, rotary_emb_base=500),
        dict(attention_bias=False, hidden_act="gelu_new", rope_scaling=LINEAR),
    ],
    "gemma": [{}, BIASED | dict(num_key_value_heads=1, tie_word_embeddings=False) | ONE_MORE],
    "gemma2": [
        dict(sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0),
        dict(
            sliding_window=8,
            layer_types=TYPES,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
    ],
    "gemma3_text": [
        dict(sliding_window=8, sliding_window_pattern=3, query_pre_attn_scalar=17),
        dict(sliding_window=8, layer_types=TYPES, final_logit_softcapping=3.0, rope_scaling=LINEAR),
        dict(sliding_window=8, rope_theta=500.0, rope_local_base_freq=100.0),
    ],
    "phi": [{}, dict(partial_rotary_factor=0.25, num_key_value_heads=4, hidden_act="gelu")],
    "phi3": [
        {},
        dict(sliding_window=8, partial_rotary_factor=0.5, tie_word_embeddings=True),
        longrope(8, 64),
        longrope(8, 16),
        longrope(4, 16, attention_factor=1.3) | dict(partial_rotary_factor=0.5),
    ],
    "smollm3": [
        {},
        BIASED | dict(mlp_bias=True, no_rope_layers=[0, 1, 1, 0], tie_word_embeddings=False),
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8),
    ],
    "granite": [
        dict(attention_multiplier=0.25),
        BIASED
        | dict(
            mlp_bias=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.4,
            residual_multiplier=0.22,
            logits_scaling=3.0,
        ),
    ],
    "stablelm": [
        {},
        dict(use_qkv_bias=True, qk_layernorm=True),
        dict(use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5),
    ],
    "glm": [{}, dict(attention_bias=False, partial_rotary_factor=1.0)],
    "glm4": [{}, dict(attention_bias=False, partial_rotary_factor=0.25)],
    "cohere": [
        dict(logit_scale=0.5),
        BIASED | dict(use_qk_norm=True, logit_scale=0.3, tie_word_embeddings=False),
    ],
    "cohere2": [
        dict(sliding_window=8, logit_scale=0.5),
        BIASED | dict(sliding_window=8, layer_types=TYPES, logit_scale=1.5),
    ],
    "nanochat": [dict(final_logit_softcapping=2.0), BIASED | dict(final_logit_softcapping=None)],
    "nemotron": [{}, BIASED | dict(mlp_bias=True, partial_rotary_factor=1.0, hidden_act="gelu")],
    "arcee": [{}, BIASED | dict(mlp_bias=True, hidden_act="silu")],
    "seed_oss": [
        dict(attention_dropout=0.0),
        dict(attention_bias=False, attention_out_bias=True, mlp_bias=True, head_dim=16),
    ],
    "hunyuan_v1_dense": [dict(head_dim=16), BIASED | dict(head_dim=24, tie_word_embeddings=True)],
    "ernie4_5": [{}, dict(use_bias=True, tie_word_embeddings=False)],
    "starcoder2": [{}, dict(use_bias=False, sliding_window=8, tie_word_embeddings=False)],
}
for family in ("gemma", "gemma2", "gemma3_text", "glm", "glm4", "seed_oss", "ernie4_5"):  # or 128
    CASES[family] = [WIDE | case for case in CASES[family]]
NAMES = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
# What has no feature of its own is written as a family that is simpler
SIMPLER = {("phi3", 0): "llama", ("glm", 1): "llama", ("granite", 0): "llama"}
SIMPLER |= {("seed_oss", 0): "glm", ("ernie4_5", 0): "llama", ("ernie4_5", 1): "smollm3"}


def test_every_family_is_compared():
    assert CASES.keys() == FAMILIES.keys()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pairs_of(CASES, tmp_path_factory)


def make_llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, d_model=64, d_ff=96, n_layers=4, n_heads=4, n_kv_heads=2)
    rest = dict(max_position_embeddings=64, norm="rmsnorm", position="rope", gated_mlp=True)
    return GPTModel(GPTConfig(**sizes, **rest, bias=False, activation="silu")).eval()


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
    check_saved(theirs, ours, tmp_path, SIMPLER.get((name, i)))


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_defaults_of_the_class(name):
    """What a file does not say is what transformers' class makes of its absence."""
    said = {"head_dim": 128} if name == "glm4_moe" else {}  # its width is no multiple of its heads
    said |= {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}  # its class's is none
    theirs = transformers.AutoConfig.for_model(name, **said)
    config = config_from_hf({"model_type": name} | said)
    assert config == config_from_hf(theirs.to_dict())
    # without which transformers cannot make the models of these
    if name == "hunyuan_v1_dense":
        theirs.head_dim = theirs.hidden_size // theirs.num_attention_heads
    if name in ("nemotron", "deepseek_v2"):
        theirs.num_key_value_heads = theirs.num_attention_heads
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs)
    wanted = theirs.num_parameters() + sum(b.numel() for b in biases_of_choices(theirs).values())
    ours = GPTModel.on_meta(config)
    assert sum(p.numel() for p in ours.parameters()) == wanted


def test_buffers_of_old_files_are_left_out(pairs, tmp_path):
    """Pythia's hold masks and frequencies beside the weights."""
    from safetensors.torch import load_file, save_file

    _, folder, ours = pairs("gpt_neox", 0)
    state = load_file(folder / "model.safetensors")
    for i in range(4):
        name = f"gpt_neox.layers.{i}.attention"
        state |= {f"{name}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
        state |= {f"{name}.masked_bias": torch.tensor(-1e9)}
        state |= {f"{name}.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(checkpoint.load_model(tmp_path, "float32")(IDS)[0], ours(IDS)[0])


@pytest.mark.parametrize("model_type", ["llama", "cohere"])
def test_names_that_two_families_share_follow_the_config(tmp_path, model_type):
    """Cohere's rotary pairs are neighbours, Llama's are not, under the same names."""
    inner = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj"
    inner += " mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm"
    keys = ["model.embed_tokens", *(f"model.layers.0.{module}" for module in inner.split())]
    tensor = stored.whole(tmp_path, 0, torch.float32, (4, 4))
    tensors = {f"{key}.weight": tensor for key in keys}
    assert naming.identify(tensors, [model_type])[1] == model_type
    assert naming.identify(tensors)[1] == "llama"
    assert naming.identify({"transformer.wte.weight": tensor}, [model_type])[1] is None
    if model_type == "cohere":  # which has no second norm; without a config nobody knows
        del tensors["model.layers.0.post_attention_layernorm.weight"]
        assert naming.identify(tensors, [model_type])[1] == "cohere"
        assert naming.identify(tensors)[1] is None


@pytest.mark.parametrize("name", ["glm", "phi3", "gemma2"])
def test_a_family_under_the_names_of_llama_is_refused(pairs, tmp_path, name):
    """Else GLM's neighbouring pairs of channels would be turned as Llama's are."""
    _, folder, _ = pairs(name, 0)
    checkpoint.write_weights(make_llama(), make_llama().config, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="its weights have names that are not known here"):
        checkpoint.load_model(tmp_path)
    loaded = checkpoint.load_model(tmp_path, "float32", config=make_llama().config)
    assert torch.equal(loaded(IDS)[0], make_llama()(IDS)[0])


@pytest.mark.parametrize(
    ("name", "i"),
    [
        ("phi3", 0),
        ("glm", 0),
        ("glm", 1),
        ("gemma2", 0),
        ("gpt_neox", 1),
        ("cohere", 0),
        ("olmo", 0),
    ],
)
@torch.no_grad()
def test_weights_alone_need_the_config_of_their_family(pairs, tmp_path, name, i):
    _, folder, ours = pairs(name, i)
    file = tmp_path / "weights.safetensors"
    file.symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match="has no config"):
        checkpoint.load_model(file, "float32")
    loaded = checkpoint.load_model(file, "float32", config=ours.config)
    assert torch.equal(loaded(IDS)[0], ours(IDS)[0])


@torch.no_grad()
def test_text_of_a_model_that_sees_images_too(tmp_path):
    """Gemma 3's larger releases: the vision tower is left where it lies."""
    sizes = SIZES | dict(num_hidden_layers=3, sliding_window=8, head_dim=32)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=sizes | dict(vocab_size=120),
        vision_config=vision | dict(image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        image_token_index=110,
        boi_token_index=111,
        eoi_token_index=112,
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.set_attn_implementation("eager")
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    ckpt = checkpoint.open(tmp_path)
    assert ckpt.native and not any("vision" in name for name in ckpt.tensors)
    wanted = theirs(input_ids=IDS).logits
    assert (ckpt.load("float32")(IDS)[0] - wanted).abs().max() <= tolerance(wanted)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial rotary positions of Olmo2"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 40}, "layer type 'chunked_attention'"),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "by type of layer"),
        ("glm", {"rope_parameters": {"chunked_attention": {"rope_theta": 1}}}, "type of layer"),
        ("cohere", {"is_causal": False}, "is_causal False"),
        ("gemma3", {"text_config": {"is_causal": False}}, "is_causal False"),
        ("granite", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear' of Phi3"),
        ("starcoder2", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name, changes, what):
    with pytest.raises(UnsupportedArchitecture, match=what):
        config_from_hf({"model_type": name} | changes)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("gemma2", {"hidden_size": "wide"}, "d_model must be a positive integer, not 'wide'"),
        ("olmo", {"clip_qkv": 0}, "clip_qkv must be positive"),
        ("granite", {"logits_scaling": [2]}, "logits_scaling must be a number"),
        ("phi3", longrope(3, 16), "has 3 numbers for 48 pairs"),
        ("phi", {"partial_rotary_factor": 0.3}, "must be an even number of channels"),
        ("stablelm", {"use_qkv_bias": "yes"}, "qkv_bias must be true or false"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "of another type than smollm3 has"),
        ("gemma2", {"layer_types": TYPES}, "layer_types has 4 entries for 26 layers"),
        ("gemma2", {"layer_types": [[]]}, "of another type than gemma2 has"),
        ("olmo3", {"num_hidden_layers": 3, "layer_types": TYPES}, "has 4 entries for 3 layers"),
    ],
)
def test_malformed_values(name, changes, what):
    with pytest.raises(ValueError, match=what):
        config_from_hf({"model_type": name} | changes)


def test_null_is_false():
    c = config_from_hf(
        {"model_type": "gemma2", "tie_word_embeddings": None, "attention_bias": None}
    )
    assert (c.tie_embeddings, c.qkv_bias, c.o_bias) == (False, False, False)


def test_older_keys_of_gemma_3():
    """As transformers 4 wrote them."""
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 4}
    c = config_from_hf({"model_type": "gemma3_text"} | old)
    assert (c.rope_theta, c.local_rope_theta, c.rope_scaling["factor"]) == (5e5, 2e4, 8.0)
    assert [c.layer_rope(i) for i in range(4)] == ["local", "global"] * 2
    assert c == config_from_hf(transformers.AutoConfig.for_model("gemma3_text", **old).to_dict())


@torch.no_grad()
def test_a_prefix_turns_by_the_longest_row_after_it(pairs):
    """LongRoPE's frequencies are those of the longest row; alone, the prefix would be short."""
    theirs, _, ours = pairs("phi3", 3)
    assert ours.config.rope_scaling["original_max_position_embeddings"] == 16
    row, dist = IDS[0].numpy(), Dist(0, 1, 0, torch.device("cpu"))
    for length in (T - 1, 14):
        own, target = [row[12:length]], [row[length : length + 1]]
        rows = Continuations([row[:12]], np.zeros(1, dtype=int), own, target)
        got = score_continuations(ours, rows, plan_batches(rows, max_tokens=64), dist).tokens[0]
        wanted = theirs(IDS[:1, :length]).logits[0, -1].log_softmax(-1)[row[length]].item()
        assert abs(got - wanted) < 1e-5, (length, got, wanted)

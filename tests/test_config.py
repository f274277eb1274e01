"""config.py: presets, validation, and Hugging Face's config classes both ways."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config import GPTConfig, config_from_hf, load_config, presets
from families.convert import config_to_hf
from families.llama import UnsupportedArchitecture

LLAMA = dict(norm="rmsnorm", position="rope", gated_mlp=True, bias=False, activation="silu")
SIZES = dict(vocab_size=97, max_position_embeddings=64, n_layers=3, n_heads=4, d_model=64, d_ff=96)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"n_experts": 4, "n_experts_per_token": 2}
ROUND_TRIPS = {
    "gpt2": GPTConfig(**SIZES, activation="gelu_new"),
    "gpt2 erf untied": GPTConfig(**SIZES, activation="gelu", tie_embeddings=False, dropout=0.0),
    "llama": GPTConfig(**SIZES, **LLAMA, n_kv_heads=2, tie_embeddings=False, rope_theta=5e5),
    "llama biased yarn": GPTConfig(**SIZES, **(LLAMA | {"bias": True}), rope_scaling=YARN),
    "mistral": GPTConfig(**SIZES, **LLAMA, sliding_window=8, head_dim=24),
    "qwen2": GPTConfig(**SIZES, **LLAMA, qkv_bias=True),
    "qwen2 window": GPTConfig(
        **SIZES, **LLAMA, qkv_bias=True, sliding_window=8, full_attention_layers=(0,)
    ),
    "qwen3": GPTConfig(**SIZES, **LLAMA, qk_norm=True, head_dim=32, tie_embeddings=False),
    "mixtral": GPTConfig(
        **SIZES, **LLAMA, n_experts=4, n_experts_per_token=2, router_norm=True, router_loss=0.1
    ),
}
NO_HUGGING_FACE_FORM = {
    "gpt2 without biases": GPTConfig(**SIZES, bias=False),
    "gpt2 grouped": GPTConfig(**SIZES, n_kv_heads=2),
    "layernorm and rope, without biases": GPTConfig(**SIZES, position="rope", bias=False),
    "rmsnorm and learned": GPTConfig(**SIZES, norm="rmsnorm"),
    "llama ungated, norms without weights": GPTConfig(
        **SIZES, **(LLAMA | {"gated_mlp": False}), norm_weight=False
    ),
    "parallel, with norms behind": GPTConfig(
        **SIZES, **LLAMA, parallel_residual=True, post_norm=True
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_through_transformers(name, tmp_path):
    """Ours → config.json → transformers' class → its own config.json → ours."""
    transformers = pytest.importorskip("transformers")
    config = ROUND_TRIPS[name].replace(dropout=0.0)
    config.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == name.split()[0]
    values = theirs.to_dict()
    values.pop("roseval", None)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text(json.dumps(values))
    assert GPTConfig.from_pretrained(tmp_path / "theirs") == config
    assert GPTConfig.from_pretrained(tmp_path) == config
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("name", NO_HUGGING_FACE_FORM)
def test_no_hugging_face_form(name, tmp_path):
    config = NO_HUGGING_FACE_FORM[name]
    assert config_to_hf(config) is None
    config.save_pretrained(tmp_path, note="native")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in written and written["note"] == "native"
    assert GPTConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_defaults_of_transformers_classes(name):
    """An empty config of each family means what transformers means by it."""
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoConfig.for_model(name)
    config = config_from_hf(hf.to_dict())
    assert config.vocab_size == hf.vocab_size and config.n_layers == hf.num_hidden_layers
    assert config.d_model == hf.hidden_size and config.n_heads == hf.num_attention_heads
    assert config.tie_embeddings == hf.tie_word_embeddings
    if name != "gpt2":
        assert config.n_kv_heads == hf.num_key_value_heads and config.d_ff == hf.intermediate_size
        assert config.norm_eps == hf.rms_norm_eps
        derived = hf.hidden_size // hf.num_attention_heads
        assert config.head_dim == (getattr(hf, "head_dim", None) or derived)
        assert config.rope_theta == hf.rope_parameters["rope_theta"]


def test_older_fields_of_config_json():
    """rope_scaling with `type` and rope_theta at the top, as files of transformers 4 have them."""
    old = {
        "model_type": "llama",
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    config = config_from_hf(old)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.n_kv_heads == 4 and not config.tie_embeddings
    assert config_from_hf(old | {"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "falcon"}, "'falcon' has no native form"),
        ({"model_type": None}, "no native form"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_is_not_expressed_is_refused(tmp_path, changes, match):
    values = config_to_hf(ROUND_TRIPS["llama"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedArchitecture, match=match) as error:
        GPTConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_gpt2_attention_variants_are_refused():
    values = config_to_hf(ROUND_TRIPS["gpt2"])
    with pytest.raises(UnsupportedArchitecture, match="attention scaling"):
        config_from_hf(values | {"scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"n_layers": 2.0}, "n_layers must be a positive integer"),
        ({"n_layers": True}, "n_layers must be a positive integer"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"d_model": 100, "n_heads": 7}, "d_model 100 does not divide into n_heads 7"),
        ({"n_kv_heads": 5}, "n_heads 12 is not a multiple of n_kv_heads 5"),
        ({"position": "rope", "head_dim": 63}, "even head_dim"),
        ({"activation": "mish"}, "activation must be one of"),
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"position": "alibi"}, "position must be one of"),
        ({"n_experts": 4}, "n_experts_per_token 0 must lie in 1..4"),
        (EXPERTS | {"n_experts_per_token": 5}, "n_experts_per_token 5 must lie in 1..4"),
        (EXPERTS | {"mlp_bias": True}, "mlp_bias must be false: experts have no biases"),
        (EXPERTS | {"n_expert_groups": 3}, "4 experts must divide into n_expert_groups 3"),
        (EXPERTS | {"n_expert_groups_per_token": 2}, "n_expert_groups 1, of which"),
        (EXPERTS | {"n_expert_groups": 4}, "1 groups of 1 experts are fewer than n_experts_per_t"),
        (
            EXPERTS
            | {"n_expert_groups": 4, "n_expert_groups_per_token": 2, "expert_group_score": "top2"},
            "top2 needs groups of two",
        ),
        (EXPERTS | {"expert_group_score": "sum"}, "expert_group_score must be one of"),
        (EXPERTS | {"router_score": "relu"}, "router_score must be one of"),
        (EXPERTS | {"router_scale": 0}, "router_scale must be positive"),
        (EXPERTS | {"router_loss": -1}, "router_loss must be 0 or more"),
        (EXPERTS | {"shared_gate": True}, "shared_gate needs a shared expert"),
        (EXPERTS | {"dense_layers": [0.5]}, "dense_layers must be layer numbers"),
        ({"d_ff_shared": 8}, "d_ff_shared needs experts: n_experts is 0"),
        ({"router_norm": True}, "router_norm needs experts"),
        ({"d_ff_expert": 8}, "d_ff_expert needs experts"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        GPTConfig(**fields)


def test_defaults_are_rosetrainers():
    c = GPTConfig()
    assert (c.vocab_size, c.max_position_embeddings, c.n_layers, c.n_heads) == (32000, 1024, 12, 12)
    assert (c.d_model, c.d_ff, c.dropout, c.activation) == (768, 3072, 0.1, "gelu")
    assert (c.n_kv_heads, c.head_dim, c.qkv_bias, c.tie_embeddings) == (12, 64, True, True)


def test_frozen_and_hashable():
    config = ROUND_TRIPS["llama biased yarn"]
    assert hash(config) == hash(config.replace())
    with pytest.raises(AttributeError):
        config.n_layers = 3
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_layer_window():
    config = ROUND_TRIPS["qwen2 window"]
    assert [config.layer_window(i) for i in range(3)] == [None, 8, 8]


def test_load_config(tmp_path):
    assert load_config("gpt2").vocab_size == 50257
    (tmp_path / "mine.yaml").write_text("vocab_size: 97\nn_layers: 2\n")
    assert load_config(tmp_path / "mine.yaml").n_layers == 2
    ROUND_TRIPS["qwen3"].save_pretrained(tmp_path)
    assert load_config(tmp_path) == ROUND_TRIPS["qwen3"]
    assert load_config(tmp_path / "config.json") == ROUND_TRIPS["qwen3"]
    (tmp_path / "config.json").write_text(json.dumps(ROUND_TRIPS["gpt2"].to_dict()))
    assert load_config(tmp_path) == ROUND_TRIPS["gpt2"]


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_have_a_hugging_face_form(name):
    assert config_to_hf(load_config(name)) is not None


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.yaml", "vocab_size: [", "is not YAML"),
        ("a.yaml", "- 1\n", "must hold"),
        ("a.yaml", "vocabulary: 7\n", "unknown field 'vocabulary'"),
        ("a.yaml", "vocab_size: many\n", "a.yaml: vocab_size must be a positive integer"),
        ("a.yaml", "3: 4\nvocabulary: 7\n", "unknown field"),
        ("a.yaml", "norm_eps: 1e-5x\n", "a.yaml: norm_eps must be a number, not '1e-5x'"),
        ("a.yaml", "dropout: [0.1]\n", r"a.yaml: dropout must be a number, not \[0.1\]"),
        ("a.yaml", "dropout: true\n", "a.yaml: dropout must be a number, not True"),
        ("a.yaml", "rope_theta: .inf\n", "a.yaml: rope_theta must be a number, not inf"),
        ("a.yaml", "rope_theta: 0\n", "a.yaml: .*rope_theta 0 be positive"),
        ("a.yaml", "norm_eps: -1e-5\n", "a.yaml: .*norm_eps -1e-05 be 0 or more"),
        ("a.yaml", "n_layers: 2.5\n", "a.yaml: n_layers must be a positive integer, not 2.5"),
        ("a.yaml", 'n_layers: "2.0"\n', "a.yaml: n_layers must be a positive integer, not '2.0'"),
        ("a.yaml", "n_experts: some\n", "a.yaml: n_experts must be"),
        ("a.yaml", "n_layers: 1000000\n", "a.yaml: n_layers must be 10,000 at most"),
        ("a.yaml", "vocab_size: 1e30\n", "a.yaml: vocab_size must be a positive integer"),
        ("a.yaml", f"d_model: {10**30}\n", "a.yaml: d_model must be 2,147,483,647 at most"),
        ("a.yaml", "head_dim: 0\n", "a.yaml: head_dim must be a positive integer, not 0"),
        ("a.yaml", "sliding_window: 1e3\n", "a.yaml: sliding_window must be a positive integer"),
        ("a.yaml", "dropout: .nan\n", "a.yaml: dropout must be a number, not nan"),
        ("a.yaml", "rope_theta: -5\n", "a.yaml: .*rope_theta -5 be positive"),
        ("a.yaml", "rope_theta: 1e999\n", "a.yaml: rope_theta must be a number, not '1e999'"),
        ("a.yaml", "norm_eps: 2024-05-01\n", "a.yaml: norm_eps must be a number, not datetime"),
        ("a.yaml", 'bias: "false"\n', "a.yaml: bias must be true or false, not 'false'"),
        ("a.yaml", "tie_embeddings: 1\n", "a.yaml: tie_embeddings must be true or false, not 1"),
        ("a.yaml", "tie_embeddings:\n", "a.yaml: tie_embeddings must be true or false, not None"),
        ("a.yaml", "full_attention_layers: 3\n", "a.yaml: full_attention_layers must be"),
        ("a.yaml", "activation: [gelu]\n", "a.yaml: activation must be one of"),
        ("config.json", '{"model_type": "gpt2", "n_embd": "wide"}', "config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "holds list"),
        ("config.json", '{"roseval": {"n_layer": 2}}', "unknown field 'n_layer'"),
        ("config.json", "", "is not JSON"),
    ],
)
def test_bad_files(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["1e-05", '"1e-05"', "'0.00001'", "1.0e-05"])
def test_numbers_that_yaml_reads_as_text(tmp_path, text):
    """PyYAML takes 1e-05, as JSON and Python print it, for text."""
    (tmp_path / "a.yaml").write_text(f"norm_eps: {text}\nrope_theta: 5e5\nn_layers: '3'\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.norm_eps, config.rope_theta, config.n_layers) == (1e-5, 5e5, 3)
    assert config == GPTConfig(norm_eps=1e-5, rope_theta=5e5, n_layers=3)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "match"),
    [
        ({"rope_type": "linear"}, "type linear lacks 'factor'"),
        ({"rope_type": "linear", "factor": None}, "type linear lacks 'factor'"),
        ({"rope_type": "yarn"}, "type yarn lacks 'factor'"),
        ({"rope_type": "linear", "factor": "big"}, r"\['factor'\] must be a number, not 'big'"),
        ({"rope_type": "linear", "factor": 0}, r"\['factor'\] must be positive, not 0"),
        ({"rope_type": "linear", "factor": -2.0}, r"\['factor'\] must be positive, not -2"),
        ({"rope_type": "linear", "factor": "nan"}, r"\['factor'\] must be a number, not 'nan'"),
        ({"rope_type": "linear", "factor": [4]}, r"\['factor'\] must be a number, not \[4\]"),
        (YARN | {"beta_fast": [32]}, r"\['beta_fast'\] must be a number"),
        (YARN | {"original_max_position_embeddings": -1}, "must be positive, not -1"),
        ({"rope_type": "llama3", "factor": 8.0}, "type llama3 lacks 'low_freq_factor'"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor must be less than"),
        ({}, "rope_type'] must be one of"),
        ({"rope_type": ["linear"]}, "rope_type'] must be one of"),
        ([4.0], "must be a mapping"),
        ("linear", "must be a mapping"),
        (4.0, "must be a mapping"),
    ],
)
def test_malformed_rope_scaling(tmp_path, scaling, match):
    (tmp_path / "a.yaml").write_text(json.dumps({"position": "rope", "rope_scaling": scaling}))
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path / "a.yaml")
    assert "a.yaml: rope_scaling" in str(error.value) and "\n" not in str(error.value)
    values = config_to_hf(ROUND_TRIPS["llama"]) | {"rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if scaling != {}:  # in Hugging Face's files the same as none
        with pytest.raises(ValueError, match="json: rope_scaling"):
            load_config(tmp_path)


def test_rope_scaling_given_as_text(tmp_path):
    fields = "position: rope\nrope_scaling: {rope_type: linear, factor: 2e0}\n"
    (tmp_path / "a.yaml").write_text(fields)
    assert load_config(tmp_path / "a.yaml").rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"rope_theta": "high"}, "rope_theta must be a number, not 'high'"),
        ({"rope_theta": [1]}, "rope_theta must be a number"),
        ({"rms_norm_eps": {}}, "norm_eps must be a number"),
        ({"hidden_size": None}, "d_model must be a positive integer, not None"),
        ({"hidden_act": ["silu"]}, "of another type than llama has"),
        ({"rope_parameters": "none"}, "rope_scaling must be a mapping"),
    ],
)
def test_wrong_types_in_a_hugging_face_config(tmp_path, changes, match):
    values = config_to_hf(ROUND_TRIPS["llama"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="presets are 13b"):
        load_config("gpt5")
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_config_imports_no_torch():
    root = Path(__file__).resolve().parent.parent
    code = "import sys, config; config.load_config('7b'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_replace_lets_follow_what_was_derived():
    """A preset made wider by flags must not keep the head width of the narrow one."""
    small = GPTConfig(d_model=32, n_heads=4)
    wide = small.replace(d_model=256)
    assert (wide.head_dim, wide.n_kv_heads) == (64, 4)
    assert small.replace(n_heads=8).n_kv_heads == 8
    assert small.replace(bias=False).qkv_bias is False
    assert small.replace(d_model=256, head_dim=8).head_dim == 8
    grouped = GPTConfig(d_model=32, n_heads=4, n_kv_heads=2, head_dim=16, qkv_bias=False)
    changed = grouped.replace(d_model=64, bias=True)
    assert (changed.head_dim, changed.n_kv_heads, changed.qkv_bias) == (16, 2, False)


def test_a_saved_config_is_read_as_it_was(tmp_path):
    """`bias`, where the biases of all layers are given, is in no config of Hugging Face's."""
    gemma = LLAMA | dict(bias=True, qkv_bias=False, o_bias=False, mlp_bias=False, dropout=0.0)
    gemma |= dict(activation="gelu_new", norm_offset=True, embedding_scale=8.0)
    config = GPTConfig(**SIZES, **gemma)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma"
    assert GPTConfig.from_pretrained(tmp_path) == config

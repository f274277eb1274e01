"""families/llama.py against transformers' classes: absent fields, older names."""

import json
import os

import pytest
import torch
import transformers
from builders import save_model, saved_checkpoint, tiny_model

import checkpoint
from config import GPTConfig, config_from_hf
from families.llama import FAMILIES, UnsupportedArchitecture

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
# Every value that a class has a default for is another here
LLAMA = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    hidden_act="gelu",
    max_position_embeddings=64,
    rms_norm_eps=0.1,
    rope_theta=100.0,
    tie_word_embeddings=True,
    attention_dropout=0.25,
)
WINDOW = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
GPT2 = dict(
    vocab_size=97,
    n_positions=64,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_inner=80,
    activation_function="relu",
    resid_pdrop=0.25,
    layer_norm_epsilon=0.1,
    tie_word_embeddings=False,
)
SAID: dict[str, dict] = {
    "gpt2": GPT2,
    "llama": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "mistral": LLAMA | dict(sliding_window=8),
    "mixtral": LLAMA | dict(sliding_window=8, num_local_experts=4, num_experts_per_tok=3),
    "qwen2": LLAMA | WINDOW | dict(head_dim=16),
    "qwen3": LLAMA | WINDOW | dict(attention_bias=True),
    "qwen3 of listed layers": LLAMA
    | WINDOW
    | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
}
ONE_LESS = [(name, field) for name, said in SAID.items() for field in (None, *said)]

# The default does not go with the other values: refused, as by transformers, or left to it
NOT_TOGETHER = ("n_head",)


def as_transformers_reads(values, folder):
    """The config that AutoConfig makes of a config.json."""
    (folder / "config.json").write_text(json.dumps(values))
    return transformers.AutoConfig.from_pretrained(folder)


def expected(hf) -> dict:
    """GPTConfig's fields, from the attributes of a config of transformers'."""
    if hf.model_type == "gpt2":
        return dict(
            vocab_size=hf.vocab_size,
            max_position_embeddings=hf.n_positions,
            n_layers=hf.n_layer,
            n_heads=hf.n_head,
            n_kv_heads=hf.n_head,
            d_model=hf.n_embd,
            d_ff=hf.n_inner or 4 * hf.n_embd,
            dropout=hf.resid_pdrop,
            activation=hf.activation_function,
            norm_eps=hf.layer_norm_epsilon,
            tie_embeddings=hf.tie_word_embeddings,
        )
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    window = None if hf.model_type == "llama" else hf.sliding_window
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    attention_bias = getattr(hf, "attention_bias", False)
    return dict(
        qkv_bias=hf.model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=getattr(hf, "mlp_bias", False),
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        n_layers=hf.num_hidden_layers,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        d_model=hf.hidden_size,
        d_ff=hf.intermediate_size,
        dropout=hf.attention_dropout,
        activation=hf.hidden_act,
        norm_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=None,
        sliding_window=window,
        full_attention_layers=() if window is None else full,
        n_experts=getattr(hf, "num_local_experts", 0),
        n_experts_per_token=getattr(hf, "num_experts_per_tok", 0),
    )


@pytest.mark.parametrize(("name", "absent"), ONE_LESS)
def test_an_absent_field_means_what_it_means_to_transformers(name, absent, tmp_path):
    """One field after the other is left out of a config.json whose values are no class's own."""
    values = {"model_type": name.split()[0], **SAID[name]}
    values.pop(absent, None)
    grouped = absent == "num_key_value_heads" and name != "llama"
    listed = absent == "num_hidden_layers" and "layer_types" in values
    if absent in NOT_TOGETHER or grouped or listed:
        with pytest.raises(ValueError):
            config_from_hf(values)
        return
    wanted = expected(as_transformers_reads(values, tmp_path))
    config = config_from_hf(values)
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_nothing_is_the_class_itself(family, tmp_path):
    hf = as_transformers_reads({"model_type": family}, tmp_path)
    wanted = expected(hf)
    config = config_from_hf({"model_type": family})
    assert {key: getattr(config, key) for key in wanted} == wanted


SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"}
SIZES |= {"num_attention_heads", "num_key_value_heads", "attention_bias", "mlp_bias"}
SIZES |= {"n_embd", "n_layer", "n_head", "n_inner", "n_positions"}  # weights of other shapes
UNTIED = [(name, "tie_word_embeddings") for name in SAID if name != "gpt2"]  # has no head
SAME_WEIGHTS = [
    (name, field)
    for name, field in ONE_LESS
    if not (field in SIZES or name == "mixtral" or (name, field) in UNTIED)
]
SAME_WEIGHTS.remove(("qwen3 of listed layers", "use_sliding_window"))  # transformers breaks there


def drawn(hf):
    """A model of a config, whose predictions are sensitive to every weight."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights of each family's config, saved by transformers, once."""
    folders = {}

    def of(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("family")
            hf = transformers.AutoConfig.for_model(name.split()[0], **SAID[name])
            drawn(hf).save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return of


def logits_of_both(folder, ids=IDS):
    """(ours, transformers') of a directory, both in float32."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ckpt = checkpoint.open(folder)
    assert ckpt.native
    with torch.no_grad():
        return ckpt.load("float32")(ids)[0], theirs(ids).logits


@pytest.mark.parametrize(("name", "absent"), SAME_WEIGHTS)
def test_logits_without_one_field_are_those_of_transformers(name, absent, saved, tmp_path):
    for file in saved(name).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    values = {"model_type": name.split()[0], **SAID[name]}
    values.pop(absent, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = logits_of_both(tmp_path)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_mistral_without_a_word_of_its_window_has_one_of_4096(tmp_path):
    """Beyond 4,096 tokens it shows."""
    values = dict(LLAMA, model_type="mistral", num_hidden_layers=1, max_position_embeddings=8192)
    hf = as_transformers_reads(values, tmp_path)
    drawn(hf).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = torch.randint(0, 97, (1, 4200), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits_of_both(tmp_path, ids)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    everything = checkpoint.load_model(
        tmp_path, "float32", config=checkpoint.open(tmp_path).config.replace(sliding_window=None)
    )
    with torch.no_grad():
        assert (everything(ids)[0] - theirs).abs().max() > 1e-3


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7.0}}),
        ("llama", {"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 7.0}}),
        ("llama", {"rope_scaling": LINEAR | {"rope_theta": 50.0}}),
        ("llama", {"rope_scaling": LINEAR | {"type": "yarn"}}),
        ("llama", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 32}),
        ("mistral", {"layer_types": ["full_attention"] * 3}),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("mistral", {"layer_types": None}),
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"mlp_bias": True, "attention_bias": False}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen2", {"max_window_layers": 0}),
        ("qwen2", {"max_window_layers": 9}),
        ("gpt2", {"hidden_size": 32, "n_embd": 48}),
        ("gpt2", {"num_attention_heads": 2}),
    ],
    ids=str,
)
def test_fields_that_two_places_say(name, changes, saved, tmp_path):
    """Which of them counts is what transformers makes of it."""
    for file in saved(name).glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    values = {"model_type": name, **SAID[name], **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = logits_of_both(tmp_path)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": False},
        {"per_layer_config": {"0": {"hidden_act": "relu"}}},
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5.0}},
    ],
    ids=str,
)
def test_what_changes_the_function_and_has_no_word_is_refused(changes):
    with pytest.raises(UnsupportedArchitecture):
        config_from_hf({"model_type": "qwen3", **LLAMA, **changes})


@pytest.mark.parametrize("types", [["full_attention"], ["chunked_attention"] * 3, "sliding"])
def test_layer_types_that_do_not_name_every_layer(types):
    with pytest.raises(ValueError, match="layer_types must say"):
        config_from_hf({"model_type": "qwen2", **LLAMA, **WINDOW, "layer_types": types})


# ---------------------------------------------------------------------------------------------
# Directories of ours that somebody changed


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"max_position_embeddings": 2048},
        {"rms_norm_eps": 0.1},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_a_directory_that_transformers_saved_again(change, tmp_path, capsys):
    """transformers keeps our "roseval" block and changes its own fields: those count."""
    ours = saved_checkpoint(tmp_path / "run", kind="llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    for name, value in change.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "again")
    assert "roseval" in json.loads((tmp_path / "again/config.json").read_text())
    native, theirs = logits_of_both(tmp_path / "again", IDS)
    torch.testing.assert_close(native, theirs, atol=1e-3, rtol=1e-4)
    said = capsys.readouterr().err
    assert "again/config.json: its fields were changed" in said and said.count("note:") == 1


def test_a_vocabulary_that_transformers_made_larger(tmp_path, capsys):
    ours = saved_checkpoint(tmp_path / "run", kind="gpt")
    model = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    model.resize_token_embeddings(264)
    model.save_pretrained(tmp_path / "again")
    native, theirs = logits_of_both(tmp_path / "again", IDS)
    assert native.shape[-1] == 264 == checkpoint.open(tmp_path / "again").vocab_size
    torch.testing.assert_close(native, theirs, atol=1e-3, rtol=1e-4)
    assert "vocab_size 264, not 257" in capsys.readouterr().err


def test_what_was_not_changed_is_passed_over_in_silence(tmp_path, capsys):
    for kind in ("gpt", "llama", "windowed"):
        ours = saved_checkpoint(tmp_path / kind, kind=kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
        model.save_pretrained(tmp_path / kind / "again")
        assert checkpoint.open(ours).config == checkpoint.open(tmp_path / kind / "again").config
    assert capsys.readouterr().err.count("note:") == 0


def test_a_changed_family_is_left_to_transformers(tmp_path):
    ours = saved_checkpoint(tmp_path / "run", kind="llama")
    values = json.loads((ours / "config.json").read_text())
    changed = values | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UnsupportedArchitecture, match="rope_type"):
        GPTConfig.from_json(changed, "config.json")


def test_a_block_alone_is_read_and_a_broken_one_beside_fields_is_not(tmp_path, capsys):
    model = tiny_model("gpt", bias=False)  # no architecture of transformers' computes this
    path = save_model(model, tmp_path)
    assert "model_type" not in json.loads((path / "config.json").read_text())
    assert checkpoint.open(path).config == model.config
    values = {"model_type": "gpt2", **GPT2, "roseval": {"from_the_future": 1}}
    assert GPTConfig.from_json(values, "some/config.json") == config_from_hf(
        {"model_type": "gpt2", **GPT2}
    )
    assert "the block cannot be read" in capsys.readouterr().err


def test_a_file_changed_under_its_manifest_is_noticed(tmp_path):
    """Weights of the same size: the manifest's own hash would stand for others."""
    path = saved_checkpoint(tmp_path / "run")
    before = checkpoint.fingerprint(path)
    weights, manifest = path / "model.safetensors", path / "manifest.json"
    written = manifest.stat().st_mtime_ns
    os.utime(weights, ns=(written + 1, written + 1))  # a copy, made file by file
    assert checkpoint.fingerprint(path) == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(written + 2, written + 2))
    with pytest.raises(ValueError, match="was changed after manifest"):
        checkpoint.fingerprint(path)
    manifest.unlink()
    assert checkpoint.fingerprint(path) != before


def test_a_feature_that_the_block_does_not_name_is_a_difference_too(tmp_path, capsys):
    """The block leaves out what says nothing: biases of the MLP alone are in one of the two."""
    path = saved_checkpoint(tmp_path, kind="llama")
    values = json.loads((path / "config.json").read_text())
    assert "mlp_bias" not in values["roseval"]
    config = GPTConfig.from_json(values | {"mlp_bias": True}, "config.json")
    assert config.mlp_bias and not config.bias
    assert "mlp_bias True, not False" in capsys.readouterr().err

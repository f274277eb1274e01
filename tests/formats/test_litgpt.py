"""formats/litgpt.py: model_config.yaml, read strictly, and the forms of lit_model.pth."""

import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
import yaml
from trained_files import copied, difference, refusal

import checkpoint
from config import GPTConfig
from tokenizer import build_tokenizer

NAME = "litgpt-llama/step-00000040"


@pytest.fixture
def llama(tmp_path):
    return copied(NAME, tmp_path)


def edit(path, **fields):
    file = path / "model_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | fields))


def test_the_config_is_told_whole(llama):
    config = checkpoint.open(llama).config
    assert (config.rope_theta, config.norm_eps, config.n_kv_heads) == (500000, 1e-6, 2)
    assert config.rope_scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    assert config.vocab_size == 61, "the padded one, which it trains"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"parallel_residual": True}, "parallel_residual = True"),
        ({"rotary_percentage": 0.25}, "rotary_percentage = 0.25"),
        ({"scale_embeddings": True}, "scale_embeddings"),
        ({"n_expert": 4}, "n_expert = 4"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_interleave": True}, "rope_interleave"),
        ({"norm_qk": True, "norm_qk_type": "olmo2"}, "norm_qk_type"),
        ({"something_new": 3}, "something_new = 3"),
        ({"name": "Gemma-2b"}, "norms of 'Gemma-2b'"),
        ({"mlp_class_name": "LLaMAMoE"}, "LLaMAMoE"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 1}}, "rope_adjustments"),
        ({"n_head": None}, "lacks what says n_heads"),
        ({"n_head": "four"}, "n_heads must be"),
        ({"n_layer": 3}, "missing|n_layers is 3"),
        ({"n_head": 8}, "of another shape|n_heads"),
    ],
)
def test_what_has_no_native_form_is_refused_by_name(llama, fields, match):
    edit(llama, **fields)
    assert re.search(match, refusal(llama))


def test_defaults_of_older_files_are_litgpts(llama):
    """rotary_percentage 0.25 and a parallel residual, where a file says neither."""
    file = llama / "model_config.yaml"
    said = yaml.safe_load(file.read_text())
    for name in ("rotary_percentage", "parallel_residual"):
        file.write_text(yaml.safe_dump({k: v for k, v in said.items() if k != name}))
        assert name in refusal(llama)


def test_without_config_or_with_one_given(llama):
    config = checkpoint.open(llama).config
    (llama / "model_config.yaml").unlink()
    assert "lacks model_config.yaml" in refusal(llama)
    assert checkpoint.is_finished(llama) is False
    assert difference(llama, NAME, config) <= 1e-5
    (llama / "model_config.yaml").write_text("- a list\n")
    assert "must hold `field: value` lines" in refusal(llama)


def test_flat_weights_sharded_weights_and_the_file_itself(llama, tmp_path):
    state = torch.load(llama / "lit_model.pth")["model"]
    assert difference(llama / "lit_model.pth", NAME) <= 1e-5
    torch.save({f"_orig_mod.{name}": t for name, t in state.items()}, llama / "lit_model.pth")
    assert difference(llama, NAME) <= 1e-5
    (llama / "lit_model.pth").unlink()
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save({"model": state}, checkpoint_id=llama / "lit_model.pth", no_dist=True)
    torch.save({"step_count": 40}, llama / "lit_model.pth/meta.pt")
    assert difference(llama, NAME) <= 1e-5
    (found,) = checkpoint.list_checkpoints(llama.parent)
    assert (found.name, found.step, found.kind) == ("step-00000040", 40, "litgpt")
    (llama / "lit_model.pth/.metadata").unlink()
    assert checkpoint.is_finished(llama) is False and "no .metadata" in refusal(llama)


def test_its_tokenizer_lies_beside_it(llama):
    build_tokenizer("byte").save(llama)
    assert checkpoint.open(llama).tokenizer == llama
    assert checkpoint.open(llama / "lit_model.pth").tokenizer == llama


def test_the_old_order_needs_the_heads(tmp_path):
    """Rows by groups: another number of them would be another model, so none is guessed."""
    old = copied("litgpt-old/final", tmp_path)
    config = checkpoint.open(old).config
    (old / "model_config.yaml").unlink()
    model = checkpoint.load_model(old, "float32", config=config)
    with pytest.raises(ValueError, match=r"lacks model_config\.yaml"):
        checkpoint.open(old).load_weights(model)
    checkpoint.load_weights(old, model)  # the model says it
    assert difference(old, "litgpt-old", config) <= 1e-5


def test_gpt2_names_are_not_taken_for_gpt2(llama):
    assert checkpoint.open(llama).layout == "native"
    state = torch.load(llama / "lit_model.pth")["model"]
    torch.save(state, llama.parent / "weights.pt")
    with pytest.raises(ValueError, match=r"has no config|not known"):
        checkpoint.load_model(llama.parent / "weights.pt")
    config = GPTConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=4, d_ff=24)
    with pytest.raises(ValueError, match=r"not known|missing"):
        checkpoint.load_model(llama.parent / "weights.pt", config=config)

"""formats/layouts.py: whose names these are, and whether the tensors fit the model."""

import pytest
import torch
from checkpoint_files import (
    CONFIGS,
    good_file,
    make_model,
    refused,
    rosetrainer_state,
)

from checkpoint import (
    load_model,
    save_checkpoint,
)
from formats import layouts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_weights_are_named(tmp_path, value):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 4] = value
    refused(good_file(tmp_path / "a.pt", rosetrainer_state(model)), "NaN or Inf: blocks.1.mlp.fc2")
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    refused(path, r"1 of 28 tensors hold NaN or Inf: transformer.h.1.mlp.c_proj.weight")


def test_overflow_of_the_target_dtype_counts_as_inf(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    path = good_file(tmp_path / "a.pt", rosetrainer_state(model))
    load_model(path, "bfloat16")
    with pytest.raises(ValueError, match=r"Inf: blocks.0.mlp.fc1.weight"):
        load_model(path, "float16")


def test_keys_shapes_and_dtypes(tmp_path):
    model = make_model()
    state = rosetrainer_state(model)
    del state["ln_f.weight"], state["blocks.1.ln1.bias"]
    state["extra.weight"] = torch.ones(2)
    state["blocks.0.mlp.fc1.weight"] = torch.ones(40, 32)
    state["blocks.0.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    state["blocks.1.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.complex64)
    path = good_file(tmp_path / "a.pt", state)
    refused(path, "2 missing: blocks.1.ln1.bias, ln_f.weight")
    refused(path, "1 unexpected: extra.weight")
    refused(path, r"blocks.0.mlp.fc1.weight \(file \[40, 32\], model \[48, 32\]\)")
    refused(path, r"out_proj.weight \(int8\), blocks.1.attn.out_proj.weight \(complex64\)")
    bigger = model.config.replace(n_layers=4, vocab_size=98)
    with pytest.raises(ValueError) as error:
        load_model(good_file(tmp_path / "b.pt"), config=bigger)
    said = str(error.value)
    assert "24 missing: blocks.2.ln1.weight" in said and said.count("blocks.") == 5 and "…" in said
    assert "(file [97, 32], model [98, 32])" in said


def test_missing_head_is_fine_only_if_tied(tmp_path):
    for name, fine in (("gpt2", True), ("gpt2 untied", False)):
        model = make_model(CONFIGS[name])
        state = rosetrainer_state(model)
        del state["lm_head.weight"]
        config = model.config.to_dict()
        path = tmp_path / f"{name}.pt"
        torch.save({"model": state, "step": 1, "config": config}, path)
        if fine:
            load_model(path)
        else:
            refused(path, "1 missing: lm_head.weight")


def test_wrappers_are_stripped_only_when_every_name_has_them(tmp_path):
    state = rosetrainer_state(make_model())
    state["module.ln_f.weight"] = state.pop("ln_f.weight")
    refused(
        good_file(tmp_path / "a.pt", state), "1 missing: ln_f.weight; 1 unexpected: module.ln_f"
    )


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ("token_embedding.weight", "native"),
        ("transformer.wte.weight transformer.h.0.attn.c_attn.weight", "gpt2"),
        ("wte.weight h.0.attn.c_attn.weight", "gpt2"),
        ("model.embed_tokens.weight model.layers.0.self_attn.q_proj.weight", "llama"),
        ("transformer.wte.weight transformer.h.0.attn.qkv.weight", None),  # litgpt
        ("transformer.wte.weight transformer.h.0.attn.c_q.weight", None),  # nanochat
        ("model.embed_tokens.weight model.layers.0.self_attn.qkv_proj.weight", None),  # Phi-3
        ("tok_embeddings.weight layers.0.attention.wq.weight", None),  # Meta, torchtitan
        ("gpt_neox.embed_in.weight gpt_neox.layers.0.attention.query_key_value.weight", None),
        ("", None),
    ],
)
def test_an_embedding_alone_is_no_layout(names, layout):
    assert layouts.recognise(dict.fromkeys(names.split(), (8, 24))) == layout
    if layout == "gpt2":
        assert layouts.recognise(dict.fromkeys(names.split(), (24, 8))) == "nanogpt"

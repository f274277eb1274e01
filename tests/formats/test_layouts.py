"""formats/layouts.py: whose names these are, and whether the tensors fit the model."""

import re
import tracemalloc

import pytest
import torch
from checkpoint_files import (
    CONFIGS,
    good_file,
    logits,
    make_model,
    nanogpt_file,
    refused,
    rosetrainer_state,
)

import checkpoint
from checkpoint import (
    load_model,
    save_checkpoint,
)
from formats import layouts, naming


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_weights_are_named(tmp_path, value):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 4] = value
    refused(good_file(tmp_path / "a.pt", rosetrainer_state(model)), "NaN or Inf: blocks.1.mlp.fc2")
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    refused(path, r"1 of 28 tensors hold NaN or Inf: transformer.h.1.mlp.c_proj.weight")


def test_overflow_of_the_target_dtype_is_not_the_files_fault(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    path = good_file(tmp_path / "a.pt", rosetrainer_state(model))
    load_model(path, "bfloat16")
    with pytest.raises(ValueError, match=r"fc1.weight holds 1e\+06, which overflows float16"):
        load_model(path, "float16")


def test_keys_shapes_and_dtypes(tmp_path):
    model = make_model()
    state = rosetrainer_state(model)
    del state["ln_f.weight"], state["blocks.1.ln1.bias"]
    state["extra.weight"] = torch.ones(2)
    state["blocks.1.mlp.fc1.weight"] = torch.ones(40, 32)
    state["blocks.0.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    state["blocks.1.attn.out_proj.weight"] = torch.ones(32, 32, dtype=torch.complex64)
    path = good_file(tmp_path / "a.pt", state)
    refused(path, "2 missing: blocks.1.ln1.bias, ln_f.weight")
    refused(path, "1 unexpected: extra.weight")
    refused(path, r"blocks.1.mlp.fc1.weight \(file \[40, 32\], model \[48, 32\]\)")
    refused(path, r"out_proj.weight \(int8\), blocks.1.attn.out_proj.weight \(complex64\)")
    state["blocks.1.mlp.fc1.weight"] = torch.ones(48, 32)
    for i in range(9):
        state[f"more.{i}"] = torch.ones(2)
    refused(good_file(tmp_path / "b.pt", state), "10 unexpected: extra.weight, .*more.3, …")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 4}, "n_layers is 4 in the config, 2 in the tensors"),
        ({"n_layers": 1}, "n_layers is 1 in the config, 2 in the tensors"),
        ({"n_layers": 9999}, "n_layers is 9,999 in the config"),
        ({"vocab_size": 2 * 10**9}, "vocab_size is 2,000,000,000 in the config, 97 in the"),
        ({"d_ff": 10**9}, "d_ff is 1,000,000,000 in the config, 48 in the tensors"),
        ({"d_model": 2 * 10**9}, "d_model is 2,000,000,000 in the config, 32 in the tensors"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 64 in .* 32 in the"),
        ({"n_kv_heads": 1}, "(n_heads.*head_dim is 48 in the config, 96 in the tensors)"),
        ({"head_dim": 10**9}, "head_dim is 12,000,000,000 in the config, 96 in the tensors"),
    ],
)
@pytest.mark.parametrize("layout", ["native", "gpt2", "nanogpt", "llama"])
def test_a_config_that_the_tensors_contradict(tmp_path, changes, said, layout):
    """Before anything is made of its sizes: within the memory that a tiny model needs."""
    path = tmp_path / "a.pt"
    if layout == "native":
        good_file(path)
    elif layout == "nanogpt":
        config = CONFIGS["gpt2"].replace(d_ff=128)
        said = said.replace("48 in the tensors", "128 in the tensors")
        nanogpt_file(make_model(config), path)
    else:
        kind = CONFIGS[layout].replace(n_kv_heads=4) if layout == "llama" else CONFIGS[layout]
        path = save_checkpoint(make_model(kind), None, None, 0, 1, 1.0, tmp_path)
    config = checkpoint.open(path).config
    if layout == "llama" and "max_position_embeddings" in changes:
        return  # nothing in the file is as long
    if "d_model" in changes:
        changes = changes | {"head_dim": 8}
    wrong = config.replace(**changes)
    tracemalloc.start()
    refused(path, said, config=wrong)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    note = checkpoint.inspect(path, wrong)["note"]
    assert "in the tensors" in note and "\n" not in note


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


GPT2_BLOCK = "ln_1 ln_2 attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
LLAMA_BLOCK = "input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
LLAMA_BLOCK += " self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
NATIVE_BLOCK = "ln1 ln2 attn.qkv_proj attn.out_proj mlp.fc1 mlp.fc2"


ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
TWO_NORMS = "input_layernorm post_attention_layernorm"
FAMILIES = {  # whole blocks under names of their own
    "phi3": f"{TWO_NORMS} self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
    "phi": f"input_layernorm {ATTENTION.replace('o_proj', 'dense')} mlp.fc1 mlp.fc2",
    "olmo2": LLAMA_BLOCK.replace("input_layernorm", "post_feedforward_layernorm"),
    "gemma2": f"{LLAMA_BLOCK} pre_feedforward_layernorm post_feedforward_layernorm",
    "cohere": f"input_layernorm {ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj",
    "olmo": f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj",
    "glm": f"{TWO_NORMS} {ATTENTION} mlp.gate_up_proj mlp.down_proj",
    "starcoder2": f"{TWO_NORMS} {ATTENTION} mlp.c_fc mlp.c_proj",
    "nemotron": f"{TWO_NORMS} {ATTENTION} mlp.up_proj mlp.down_proj",
    "nanochat": f"{ATTENTION} mlp.fc1 mlp.fc2",
    "gpt_neox": f"{TWO_NORMS} attention.query_key_value attention.dense"
    " mlp.dense_h_to_4h mlp.dense_4h_to_h",
}


def names_of(embedding, block, modules):
    return [f"{embedding}.weight", *(f"{block}.{module}.weight" for module in modules.split())]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (names_of("token_embedding", "blocks.0", NATIVE_BLOCK), "native"),
        (names_of("transformer.wte", "transformer.h.0", GPT2_BLOCK), "gpt2"),
        (names_of("wte", "h.0", GPT2_BLOCK), "gpt2"),
        (names_of("model.embed_tokens", "model.layers.0", LLAMA_BLOCK), "llama"),
        (names_of("embed_tokens", "layers.0", LLAMA_BLOCK), "llama"),
        (names_of("other.wte", "transformer.h.0", GPT2_BLOCK), None),
        (names_of("token_embedding", "blocks.1", NATIVE_BLOCK), None),
        ([], None),
    ],
)
def test_a_layout_is_a_whole_block_of_names(names, layout):
    assert naming.recognise(dict.fromkeys(names, (8, 24))) == layout
    if layout == "gpt2":
        assert naming.recognise(dict.fromkeys(names, (24, 8))) == "nanogpt"
    for missing in names if layout else ():
        known = layout if layout == "native" and "ln" in missing else None  # not all have norms
        assert naming.recognise(dict.fromkeys(set(names) - {missing}, (8, 24))) == known


def names_of_family(family):
    if family == "gpt_neox":
        return names_of("gpt_neox.embed_in", "gpt_neox.layers.0", FAMILIES[family])
    return names_of("model.embed_tokens", "model.layers.0", FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_layout_is_a_whole_block_of_names_and_its_config(family):
    names = names_of_family(family)
    shapes = dict.fromkeys(names, (8, 24))
    assert naming.recognise(shapes, [family]) == family
    assert naming.recognise(shapes, ["no such family", family]) == family
    assert naming.recognise(shapes) == ("llama" if family == "gemma2" else None)
    bare = dict.fromkeys((name.partition(".")[2] for name in names), (8, 24))
    assert naming.recognise(bare, [family]) == family
    for missing in names:
        assert naming.recognise(dict.fromkeys(set(names) - {missing}, (8, 24)), [family]) is None


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3", "glm"}))  # some are Llamas too
def test_names_of_a_family_under_another_config(tmp_path, family):
    state = {name: torch.ones(4, 4) for name in names_of_family(family)}
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"those of a model_type .*\b{family}\b") as error:
        load_model(tmp_path / "a.pt", "float32", config=small_llama())
    assert "a.pt" in str(error.value) and "\n" not in str(error.value)
    note = checkpoint.inspect(tmp_path / "a.pt")["note"]
    assert "has no config" in note
    assert "need a config of their family" in note or family == "gemma2"


def small_llama():
    sizes = {"vocab_size": 4, "d_model": 4, "d_ff": 4, "n_layers": 1, "n_heads": 1}
    return CONFIGS["llama"].replace(**sizes, n_kv_heads=1, head_dim=None)


OTHERS = {  # what stands in the files of others: an embedding like GPT-2's or Llama's is in many
    "litgpt's": "transformer.wte transformer.h.0.norm_1 transformer.h.0.attn.qkv",
    "nanochat's": "transformer.wte transformer.h.0.attn.c_q transformer.h.0.attn.c_proj",
    "Meta's (Llama, llama2.c, torchtitan)": "tok_embeddings layers.0.attention.wq",
    "Falcon's or BLOOM's": "transformer.h.0.self_attention.query_key_value",
    "GPT-J's": "transformer.wte transformer.h.0.attn.q_proj transformer.h.0.mlp.fc_in",
    "OPT's": "model.decoder.embed_tokens model.decoder.layers.0.self_attn.q_proj",
    "Megatron's": "decoder.layers.0.self_attention.linear_qkv",
    "OLMo-core's": "embeddings blocks.0.attention.w_q",
    "those of a PEFT adapter": "base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    "GPTQ or AWQ": "model.embed_tokens model.layers.0.self_attn.q_proj.qweight",
}
LIKE_LLAMA = {  # and all of Llama's names
    "those of a mixture of experts": "mlp.experts.0.linear",
    "those of a model_type qwen3_moe or olmoe": "mlp.experts.0.up_proj",
}


@pytest.mark.parametrize("owner", [*OTHERS, *LIKE_LLAMA])
def test_others_are_refused_by_name(tmp_path, owner):
    if owner in OTHERS:
        names = [
            name + ".weight" * (not name.endswith("qweight")) for name in OTHERS[owner].split()
        ]
    else:
        block = f"{LLAMA_BLOCK} {LIKE_LLAMA[owner]}"
        names = names_of("model.embed_tokens", "model.layers.0", block)
    state = {name: torch.ones(4, 4) for name in names}
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=re.escape(owner)) as error:
        load_model(tmp_path / "a.pt", "float32", config=small_llama())
    assert "a.pt" in str(error.value) and "\n" not in str(error.value)
    sure = checkpoint.inspect(tmp_path / "a.pt")["layout"]
    assert sure == ("llama" if owner in LIKE_LLAMA else None)


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "blocks compiled": lambda name: re.sub(r"(h\.\d+)\.", r"\1._orig_mod.", name),
    "blocks checkpointed": lambda n: re.sub(r"(h\.\d+)\.", r"\1._checkpoint_wrapped_module.", n),
    "FSDP": lambda name: (
        "_fsdp_wrapped_module."
        + re.sub(r"(h\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    ),
    "DDP of compiled": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning, compiled": lambda name: f"model._orig_mod.{name}",
    "deeper": lambda name: f"net.gpt.{name}",
    "DeepSpeed in Lightning": lambda name: f"_forward_module.model.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("layout", ["nanogpt", "native", "llama"])
def test_wrappers_in_names(tmp_path, wrapper, layout):
    wrap, model = WRAPPED[wrapper], make_model(CONFIGS["llama" if layout == "llama" else "gpt2"])
    state = {name: t.clone() for name, t in layouts.views(model, layout)}
    if layout != "nanogpt":
        wrap = lambda n, f=wrap: f(n.replace("blocks.", "h.").replace("layers.", "h.")).replace(  # noqa: E731
            "h.", "layers." if layout == "llama" else "blocks."
        )
    torch.save({"model": {wrap(name): t for name, t in state.items()}}, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", "float32", config=model.config)
    assert torch.equal(logits(loaded), logits(model))


def test_wrappers_that_make_two_names_one(tmp_path):
    state = rosetrainer_state(make_model())
    state["_orig_mod.ln_f.weight"] = state["ln_f.weight"].clone()
    refused(good_file(tmp_path / "a.pt", state), "holds ln_f.weight twice, wrapped and not")


def test_names_of_many_words(tmp_path):
    """A million words before a name: each costs nothing."""
    for word in ("module.", "a.", "_orig_mod."):
        torch.save({"model": {word * 10**6 + "w": torch.ones(2)}}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "has no config, and its weights have names that are not known")


def test_averaged_weights_count_their_updates(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(make_model())
    path = good_file(tmp_path / "a.pt", averaged.state_dict())
    assert torch.equal(logits(load_model(path, "float32")), logits(make_model()))


def test_names_reach_no_terminal_raw(tmp_path):
    state = rosetrainer_state(make_model()) | {"\x1b]0;owned\x07\n": torch.ones(2)}
    with pytest.raises(ValueError, match="1 unexpected") as error:
        load_model(good_file(tmp_path / "a.pt", state))
    assert str(error.value).isprintable() and "owned" in str(error.value)
    state["y" * 10**6] = torch.ones(2)
    with pytest.raises(ValueError, match="2 unexpected") as error:
        load_model(good_file(tmp_path / "b.pt", state))
    assert len(str(error.value)) < 1500

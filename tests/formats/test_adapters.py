"""PEFT adapters: logits and merged weights of the real peft, from the files that it writes."""

import json
import shutil

import adapter_files
import pytest
import torch
from adapter_files import adapted, logits, save, saved_adapter, saved_base
from checkpoint_files import nanogpt_file
from safetensors.torch import load_file, save_file

import checkpoint
from formats import adapters, layouts, naming

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = dict(
    use_rslora=True,
    rank_pattern={"gate_proj": 2, r"layers\.0\.self_attn\.q_proj": 5},
    alpha_pattern={"q_proj": 3},
)
HEADS = ["embed_tokens", "lm_head"]
CASES = {  # base, whether it is tied, peft's options
    "plain": ("llama", False, dict(target_modules=ALL, lora_alpha=16)),
    "patterns": ("llama", False, dict(target_modules=["q_proj", "gate_proj"]) | PATTERNS),
    "all linear": ("llama", False, dict(target_modules="all-linear")),
    "a pattern": (
        "llama",
        False,
        dict(target_modules=r".*layers\.1\.(self_attn|mlp)\.(v|up)_proj"),
    ),
    "one layer": ("llama", False, dict(target_modules=["k_proj"], layers_to_transform=[1])),
    "without one": (
        "llama",
        False,
        dict(target_modules=["k_proj"], exclude_modules=["layers.1.self_attn.k_proj"]),
    ),
    "dora": ("llama", False, dict(target_modules=["q_proj", "down_proj", *HEADS], use_dora=True)),
    "embeddings": ("llama", False, dict(target_modules=["q_proj", *HEADS])),
    "saved": ("llama", False, dict(target_modules=["q_proj"], modules_to_save=[*HEADS, "norm"])),
    "rows": ("llama", False, dict(target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "rows by module": (
        "llama",
        False,
        dict(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [1]},
        ),
    ),
    "rows, tied": ("llama", True, dict(target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "embedding, tied": ("llama", True, dict(target_modules=["q_proj", "embed_tokens"])),
    "head, tied": ("llama", True, dict(target_modules=["q_proj", "lm_head"])),
    "both, tied": (
        "llama",
        True,
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "saved, tied": ("llama", True, dict(target_modules=["q_proj"], modules_to_save=HEADS[:1])),
    "saved both, tied": (
        "llama",
        True,
        dict(target_modules=["q_proj"], modules_to_save=HEADS[:1], ensure_weight_tying=True),
    ),
    "larger vocabulary": ("llama", True, dict(target_modules=["q_proj"], resized=104)),
    "larger and saved": (
        "llama",
        False,
        dict(target_modules=["q_proj"], modules_to_save=HEADS, resized=104),
    ),
    "gpt2": ("gpt2", True, dict(target_modules=["c_attn", "c_proj", "c_fc"])),
    "gpt2 dora": (
        "gpt2",
        True,
        dict(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
    ),
    "gpt2 positions": ("gpt2", True, dict(target_modules=["c_attn", "wpe", "wte"], bias="all")),
    "gpt2 biases": (
        "gpt2",
        True,
        dict(target_modules=["c_attn"], lora_bias=True, bias="lora_only", modules_to_save=["ln_f"]),
    ),
    "qwen2": (
        "qwen2",
        True,
        dict(target_modules=["q_proj", "v_proj", "up_proj"], bias="lora_only"),
    ),
    "qwen2 biases": ("qwen2", True, dict(target_modules=["q_proj", "k_proj"], lora_bias=True)),
    "neox": ("neox", False, dict(target_modules=["query_key_value", "dense", "dense_h_to_4h"])),
    "neox dora": (
        "neox",
        False,
        dict(target_modules=["query_key_value", "embed_in", "lm_head"], use_dora=True),
    ),
    "neox saved": (
        "neox",
        False,
        dict(target_modules=["query_key_value"], bias="all", modules_to_save=["lm_head"]),
    ),
    "cohere": ("cohere", True, dict(target_modules=["q_proj", "k_proj", "up_proj"], use_dora=True)),
    "opt": (
        "opt",
        True,
        dict(target_modules=["q_proj", "fc1"], modules_to_save=["final_layer_norm"]),
    ),
}
APART = {"embedding, tied", "head, tied", "both, tied", "saved, tied", "saved both, tied"}
APART |= {"larger vocabulary", "gpt2 positions"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{(kind, tied): path}"""
    folder = tmp_path_factory.mktemp("bases")
    kinds = sorted({(kind, tie) for kind, tie, _ in CASES.values()})
    return {(kind, tie): saved_base(folder, kind, tie) for kind, tie in kinds}


@pytest.fixture
def lora(tmp_path, bases):
    """An adapter over q and v of a Llama, to be spoilt."""
    return saved_adapter(tmp_path / "lora", bases["llama", False])


def merged_by_peft(model):
    """{name: tensor} of merge_and_unload."""
    return dict(model.merge_and_unload().named_parameters())


def views(ckpt, model):
    """Our weights by transformers' names, as adapters see them."""
    layout = adapters.merging.places(ckpt._opened.adapter, model)
    return {name: place.part.get() for name, place in layout.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_weights_are_pefts(name, bases, tmp_path):
    kind, tie, options = CASES[name]
    theirs = adapted(bases[kind, tie], **options)
    path, wanted = save(theirs, tmp_path / "lora"), logits(theirs)
    ckpt = checkpoint.open(path)
    model = ckpt.load("float32")
    scale = max(1.0, wanted.abs().max().item())
    assert (logits(model) - wanted).abs().max() <= 1e-5 * scale
    base = logits(ckpt.base.load("float32"))
    assert (base - wanted[..., : base.shape[-1]]).abs().max() > 0.03  # it says something
    assert ckpt.native == (kind != "opt") and ckpt.kind == "adapter"
    if name not in APART:  # there, what PEFT merges is not what it computes
        merged = merged_by_peft(theirs)
        ours = views(ckpt, model)
        assert ours.keys() <= merged.keys() and len(ours) >= len(merged) - 1
        for tensor, values in ours.items():
            assert (values - merged[tensor]).abs().max() <= 1e-6, tensor


@pytest.mark.parametrize(
    "name", ["plain", "patterns", "dora", "gpt2 dora", "rows", "neox", "saved"]
)
def test_bits_of_a_bfloat16_merge_are_pefts(name, bases, tmp_path):
    """Into weights of the model's dtype, in float32, rounded once."""
    kind, tie, options = CASES[name]
    theirs = adapted(bases[kind, tie], torch.bfloat16, **options)
    path = save(theirs, tmp_path / "lora")
    ckpt = checkpoint.open(path)
    ours, merged = views(ckpt, ckpt.load("bfloat16")), merged_by_peft(theirs)
    for tensor, values in ours.items():
        assert torch.equal(values.bfloat16(), merged[tensor]), tensor  # norms are ours in float32


def test_a_base_of_any_format(bases, tmp_path):
    """GPT-2 as Hugging Face's, ours and nanoGPT's file: the adapter has transformers' names."""
    base = bases["gpt2", True]
    lora = saved_adapter(tmp_path / "lora", base, target_modules=["c_attn", "c_fc"])
    wanted = logits(checkpoint.load_model(lora, "float32"))
    model = checkpoint.load_model(base, "float32")
    ours = checkpoint.convert(base, tmp_path / "ours")
    nanogpt = tmp_path / "ckpt.pt"
    nanogpt_file(model, nanogpt)
    config = model.config  # nanoGPT's own activation is another
    for other in (ours, nanogpt):
        ckpt = checkpoint.open(lora, config if other is nanogpt else None, base=other)
        assert torch.equal(logits(ckpt.load("float32")), wanted)


@pytest.mark.slow
def test_every_familys_modules_have_transformers_names():
    """An adapter names modules as transformers' classes do; files of weights may not."""
    from test_hf_families import CASES as FAMILIES
    from test_hf_families import SIZES

    from config import config_from_hf
    from formats.adapter_config import AdapterConfig
    from model import GPTModel

    config = AdapterConfig.__new__(AdapterConfig)
    for family, cases in FAMILIES.items():
        case = {"model_type": family} | SIZES | cases[0]
        hf = adapter_files.transformers.AutoConfig.for_model(**case)
        with torch.device("meta"):
            theirs = adapter_files.transformers.AutoModelForCausalLM.from_config(hf)
        names = {n for n, _ in theirs.named_parameters()}
        adapter = adapters.Adapter(config, None, {}, naming.of_family(family))
        ours = adapters.merging.places(adapter, GPTModel.on_meta(config_from_hf(hf.to_dict())))
        assert ours.keys() - {"lm_head.weight"} == names - {"lm_head.weight"}, family


# ---------------------------------------------------------------------------------------------
# Where its base lies, what identifies it


def test_where_the_base_lies(tmp_path, bases, lora, monkeypatch):
    base = bases["llama", False]
    wanted = logits(checkpoint.load_model(lora, "float32"))

    def named(name):
        set_config(lora, base_model_name_or_path=name)

    named("org/small-llama")
    refused(lora, "names the base org/small-llama, which lies neither there nor beside", "--base")
    assert torch.equal(logits(checkpoint.open(lora, base=base).load("float32")), wanted)
    shutil.copytree(base, tmp_path / "small-llama")  # beside it, by its last name
    assert checkpoint.open(lora).base.path == tmp_path / "small-llama"
    named("elsewhere")
    monkeypatch.chdir(base.parent)
    named(base.name)  # from here
    assert torch.equal(logits(checkpoint.load_model(lora, "float32")), wanted)
    named(None)
    refused(lora, "does not name its base: give it with --base")
    with pytest.raises(ValueError, match="nowhere"):
        checkpoint.open(lora, base=tmp_path / "nowhere")


def test_an_adapter_of_an_adapter(tmp_path, lora, bases):
    other = tmp_path / "other"
    shutil.copytree(lora, other)
    for base in (lora, other):  # itself too
        set_config(other, base_model_name_or_path=str(base))
        refused(other, "which is an adapter itself: merge that one into its base first")
    with pytest.raises(ValueError, match="which is an adapter itself"):
        checkpoint.open(other, base=checkpoint.open(lora))


def test_fingerprint_tokenizer_and_record(tmp_path, lora, bases):
    """Base and adapter both count, wherever the base was named."""
    ckpt = checkpoint.open(lora)
    base = ckpt.base
    assert ckpt.fingerprint != base.fingerprint
    said = ckpt.describe()
    assert said["base"] == {"path": str(base.path), "fingerprint": base.fingerprint}
    assert "base" not in base.describe()
    other = tmp_path / "base"
    shutil.copytree(base.path, other)
    assert checkpoint.open(lora, base=other).fingerprint == ckpt.fingerprint
    (other / "tokenizer.json").write_text("{}")
    assert checkpoint.open(lora, base=other).tokenizer == other
    table = load_file(lora / "adapter_model.safetensors")
    table["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] += 1
    save_file(table, lora / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="was replaced or changed since it was opened"):
        ckpt.load("float32")
    assert checkpoint.open(lora).fingerprint != said["fingerprint"]
    handle = checkpoint.open(lora, base=other)
    shutil.copy(other / "config.json", other / "copy")
    (other / "copy").rename(other / "config.json")
    with pytest.raises(ValueError, match="was replaced or changed since it was opened"):
        handle.load("float32")


def test_listing_inspecting_converting(tmp_path, bases, lora, capsys):
    """A Trainer's steps, as PEFT and transformers leave them."""
    run = tmp_path / "run"
    for step in (20, 100):
        shutil.copytree(lora, run / f"checkpoint-{step}")
        assert checkpoint.is_finished(run / f"checkpoint-{step}") is None  # perhaps no Trainer's
        (run / f"checkpoint-{step}/trainer_state.json").write_text(f'{{"global_step": {step}}}')
        assert checkpoint.is_finished(run / f"checkpoint-{step}") is True
    (run / "checkpoint-7").mkdir()
    shutil.copy(lora / "adapter_model.safetensors", run / "checkpoint-7")
    assert checkpoint.is_finished(run / "checkpoint-7") is False
    assert not checkpoint.is_complete(run / "checkpoint-7")
    found = [(i.step, i.kind, i.path.name) for i in checkpoint.list_checkpoints(run)]
    assert found[-2:] == [(20, "adapter", "checkpoint-20"), (100, "adapter", "checkpoint-100")]
    checkpoint.main(["inspect", str(run / "checkpoint-20"), "--verify"])
    said = capsys.readouterr().out
    assert f'base: "{bases["llama", False]}"' in said and "step: 20" in said and "verified" in said
    checkpoint.main(["convert", str(run / "checkpoint-20"), str(tmp_path / "merged")])
    wanted = logits(checkpoint.load_model(lora, "float32"))
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "merged", "float32")), wanted)
    model = checkpoint.load_model(bases["llama", False], "float32")
    checkpoint.load_weights(lora, model)  # as train.py --init-from does
    assert torch.equal(logits(model), wanted)


# ---------------------------------------------------------------------------------------------
# What is wrong with it


def set_config(path, **values):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(path, *said):
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path, "float32")
    text = str(error.value)
    assert "\n" not in text and str(path) in text, text
    for part in said:
        assert part in text, text


REFUSED = {
    "peft_type": ("IA3", "only LORA is read"),
    "task_type": ("SEQ_CLS", "no causal language model"),
    "init_lora_weights": ("pissa", "path_initial_model_for_weight_conversion"),
    "target_parameters": (["mlp.experts.down_proj"], "fused experts"),
    "layer_replication": ([[0, 1], [0, 2]], "repeats layers"),
    "alora_invocation_tokens": ([1, 2], "acts on some tokens only"),
    "arrow_config": ({"top_k": 2}, "routes tokens"),
    "kasa_config": ({"beta": 1e-4}, "kasa_config"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora"),
    "monteclora_config": ({"a": 1}, "monteclora_config"),
    "megatron_config": ({"a": 1}, "megatron_config"),
    "use_qalora": (True, "use_qalora"),
    "a_switch_of_tomorrow": (True, "a_switch_of_tomorrow is True"),
    "r": (0, "r must be a positive integer"),
    "lora_alpha": ("many", "lora_alpha must be a number"),
    "rank_pattern": ({"q_proj": 3}, "A of model.layers.0.self_attn.q_proj is [4, 32], not [3, 32]"),
    "alpha_pattern": ({"(": 3}, "is no pattern"),
    "target_modules": (["q_proj"], "has tensors, but target_modules does not name it"),
    "exclude_modules": ("(a+)+", "may take too long"),
    "modules_to_save": (["norm"], "which modules_to_save names"),
    "layers_to_transform": ([0], "has tensors, but target_modules does not name it"),
    "trainable_token_indices": ([3], "lacks the rows of trainable_token_indices"),
    "use_dora": (True, "lacks its magnitude"),
    "lora_bias": (True, "lacks its bias of B"),
    "bias": ("some", "bias must be none, all or lora_only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_numbers_is_refused_by_name(name, lora):
    value, said = REFUSED[name]
    set_config(lora, **{name: value})
    refused(lora, said)


def test_newer_switches_that_are_off_are_no_matter(lora):
    before = logits(checkpoint.load_model(lora, "float32"))
    set_config(lora, one=None, two=False, three=[], four={}, lora_dropout=0.5, inference_mode=False)
    assert torch.equal(logits(checkpoint.load_model(lora, "float32")), before)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def damaged(table, what):
    """Spoil the tensors of an adapter; what must be said of it."""
    if what == "missing":
        del table[f"{Q0}A.weight"]
        return "has one of its two matrices only"
    if what == "layer missing":
        del table[f"{Q0}A.weight"], table[f"{Q0}B.weight"]
        return "model.layers.0.self_attn.q_proj has no tensors, but target_modules names it"
    if what == "rank":
        table[f"{Q0}A.weight"] = table[f"{Q0}A.weight"][:2].clone()
        return "A of model.layers.0.self_attn.q_proj is [2, 32], not [4, 32]"
    if what == "NaN":
        table[f"{Q0}B.weight"][3, 1] = float("nan")
        return "1 of 4 tensors hold NaN or Inf: model.layers.0.self_attn.q_proj.weight"
    if what == "nowhere":
        table["base_model.model.score.weight"] = torch.zeros(2, 32)
        return "1 of its modules are none of the base's"
    if what == "leaf":
        table[f"{Q0}C.weight"] = torch.zeros(2)
        return "1 of its modules are none of the base's"
    if what == "prefix":
        table["model.norm.weight"] = torch.zeros(32)
        return "do not begin with base_model.model."
    if what == "integers":
        table[f"{Q0}A.weight"] = torch.ones(4, 32, dtype=torch.int8)
        return "is of type I8"
    table.clear()
    return "holds no tensors"


WAYS = ["missing", "layer missing", "rank", "NaN", "nowhere", "leaf", "prefix", "integers", "empty"]


@pytest.mark.parametrize("what", WAYS)
def test_damaged_tensors(what, lora):
    file = lora / "adapter_model.safetensors"
    table = load_file(file)
    said = damaged(table, what)
    save_file(table, file)
    refused(lora, said)


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/roseval-was-here",)


def test_files_of_pickles(lora, tmp_path):
    """.bin as older versions write it: the same numbers; truncated and hostile ones are refused."""
    wanted = logits(checkpoint.load_model(lora, "float32"))
    table = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    refused(lora, "is an adapter without its weights")
    file = lora / "adapter_model.bin"
    torch.save(table, file)
    assert torch.equal(logits(checkpoint.load_model(lora, "float32")), wanted)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(lora, "truncated")
    at = whole.index(table[f"{Q0}B.weight"].numpy().tobytes())
    file.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    refused(lora, "checksum")
    torch.save(table | {"x": Hostile()}, file)
    refused(lora, "made to run code")


def test_another_base(tmp_path, bases, lora):
    """Of other names, and of other shapes."""
    with pytest.raises(ValueError, match="4 of its modules are none of the base's"):
        checkpoint.open(lora, base=bases["gpt2", True])
    file = tmp_path / "narrow/config.json"
    shutil.copytree(bases["llama", False], file.parent)
    wide = adapter_files.KINDS["llama"][1] | dict(hidden_size=64)
    config = adapter_files.transformers.LlamaConfig(**wide, tie_word_embeddings=False)
    adapter_files.transformers.LlamaForCausalLM(config).save_pretrained(file.parent)
    with pytest.raises(ValueError, match=r"A of .*q_proj is \[4, 32\], not \[4, 64\]"):
        checkpoint.open(lora, base=file.parent)


def test_lone_files_and_directories_without_a_config(lora):
    with pytest.raises(ValueError, match="a PEFT adapter: give its directory, with its config"):
        checkpoint.load_model(lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").unlink()
    refused(lora, "lacks adapter_config.json")


def test_fused_rows_are_the_right_ones(bases, lora):
    """By hand: q, k, v lie one below the other in one parameter of ours."""
    ckpt = checkpoint.open(lora)
    before, after = (c.load("float32").state_dict() for c in (ckpt.base, ckpt))
    table = load_file(lora / "adapter_model.safetensors")
    A, B = (table[f"{Q0}{x}.weight"] for x in "AB")
    moved = after["blocks.0.attn.qkv_proj.weight"] - before["blocks.0.attn.qkv_proj.weight"]
    assert (moved[:32] - 2 * B @ A).abs().max() < 1e-6  # s = alpha / r = 8 / 4
    assert not moved[32:48].any() and moved[48:].abs().max() > 0.01
    same = [name for name in before if "qkv_proj" not in name]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert dict(layouts.views(ckpt.load("float32"), "llama"))

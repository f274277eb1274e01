"""formats/huggingface.py: directories that transformers wrote, in every cut and of any family."""

import json

import numpy as np
import pytest
import torch
from checkpoint_files import (
    CONFIGS,
    IDS,
    logits,
    make_model,
    refused,
    safetensors_file,
)

import checkpoint
from checkpoint import (
    is_complete,
    load_model,
    save_checkpoint,
)
from formats import stored, tensorfiles
from model import GPTModel


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gpt2 without biases"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_directories_that_transformers_wrote(tmp_path, name, shard):
    transformers = pytest.importorskip("transformers")
    model = make_model(CONFIGS[name])
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_model(tmp_path / "theirs", "float32")
    assert isinstance(ours, GPTModel)
    assert (logits(ours) - logits(model)).abs().max().item() <= 1e-5


def test_sharded_pytorch_bin(tmp_path):
    """Hugging Face's older layout, GPT-2's bare backbone and its mask buffers included."""
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path / "ours")
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    state = {name.removeprefix("transformer."): stored.read_whole(t) for name, t in table.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool) for i in range(2)}
    names = sorted(state)
    theirs = tmp_path / "theirs"
    model.config.save_pretrained(theirs)
    weight_map = {}
    for part, chosen in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-{part:05d}-of-00002.bin"
        torch.save({name: state[name] for name in chosen}, theirs / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = theirs / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(load_model(theirs, "float32")), logits(model))
    (theirs / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 shards: pytorch_model-00002-of-00002.bin"):
        load_model(theirs)
    for bad in ("../pytorch_model.bin", "/etc/passwd", "..", "a/b.bin", 7):
        index.write_text(json.dumps({"weight_map": {"wte.weight": bad}}))
        with pytest.raises(ValueError, match="same directory"):
            load_model(theirs)
    for text in ('{"weight_map": []}', '{"weight_map": {}}', "{}"):
        index.write_text(text)
        refused(theirs, r"index\.json is no index of shards")
    index.write_text("{")
    refused(theirs, r"index\.json is not JSON")


@pytest.mark.parametrize(
    "family", ["vaultgemma", "phimoe", "gptj", "gpt_oss", "llama4_text", "opt"]
)
def test_other_architectures_through_transformers(tmp_path, family):
    """Soft caps, logit scales, biased heads, experts: the same logits as the own forward."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    more = {
        "vaultgemma": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None},
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "phimoe": {"num_local_experts": 4},
        "gpt_oss": {"num_local_experts": 4},
        "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    config = transformers.AutoConfig.for_model(family, **(sizes | more.get(family, {})))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path / "m")
    ckpt = checkpoint.open(tmp_path / "m")
    assert not ckpt.native and (ckpt.vocab_size, ckpt.context) == (97, 64)
    assert ckpt.format == "formats/huggingface.py" and ckpt.describe()["name"] == "m"
    assert ckpt.describe()["module"] == "transformers"
    model = ckpt.load("float32")
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert not model.supports_cache and model.vocab_size == 97 and model.max_positions == 64
    theirs.set_attn_implementation("eager")  # its SDPA drops Gemma-2's soft cap
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert torch.allclose(model.logits(model.hidden(IDS)), wanted, atol=1e-5)
        assert torch.allclose(model(IDS)[0], wanted, atol=1e-5)
        loss = model(IDS, labels=IDS)[1]
        assert abs(loss.item() - theirs(IDS, labels=IDS).loss.item()) < 1e-5
    assert is_complete(tmp_path / "m")
    assert (model.config is not None) == (family == "mixtral")
    assert ckpt.config == model.config
    note = checkpoint.inspect(tmp_path / "m")["note"]
    assert note is None if family == "mixtral" else f"'{family}' has no native form" in note
    with pytest.raises(ValueError, match="that transformers alone has"):
        checkpoint.convert(tmp_path / "m", tmp_path / "converted")


def shards_of(directory, n=2, stem="model", total=None):
    """model-00001-of-0000N.safetensors, … of make_model(), and who holds what."""
    model = make_model()
    path = save_checkpoint(model, None, None, 0, 1, 1.0, directory / "whole")
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    names, directory = sorted(table), directory / "cut"
    model.config.save_pretrained(directory)
    where = {}
    for i in range(n):
        file = f"{stem}-{i + 1:05d}-of-{total or n:05d}.safetensors"
        part = {name: stored.read_whole(table[name]) for name in names[i::n]}
        tensorfiles.write_safetensors(directory / file, part, torch.float32)
        where |= dict.fromkeys(part, file)
    return directory, where


def write_index(directory, where):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_the_index_decides_between_two_of_one_name(tmp_path):
    """Whatever the order of the names of files."""
    path, where = shards_of(tmp_path)
    write_index(path, where)
    right = logits(load_model(path, "float32"))
    assert torch.equal(right, logits(make_model()))
    for file in set(where.values()):  # into each shard a wrong copy of what the other one holds
        table = tensorfiles.open_safetensors(path / file)
        part = {n: stored.read_whole(t) for n, t in table.items()}
        name = next(n for n in where if where[n] != file)
        right_one = tensorfiles.open_safetensors(path / where[name])[name]
        part[name] = torch.full(right_one.shape, 9.0)
        tensorfiles.write_safetensors(path / file, part, torch.float32)
    assert torch.equal(logits(load_model(path, "float32")), right)
    (path / "model.safetensors.index.json").unlink()
    refused(path, "and so does .*no index says which")


def test_an_index_that_disagrees_with_its_files(tmp_path):
    path, where = shards_of(tmp_path)
    first, second = sorted(set(where.values()))
    moved = next(name for name in where if where[name] == first)
    write_index(path, where | {moved: second})
    refused(path, f"{second} lacks {moved}, which .*index.json says it holds")
    write_index(path, {n: file for n, file in where.items() if n != moved})
    refused(path, f"{first} holds {moved}, which .*index.json does not name")
    write_index(path, {n: file for n, file in where.items() if file == first})
    refused(path, f"does not name {second}, which lies beside it")
    write_index(path, where | {"more": "model-00003-of-00003.safetensors"})
    refused(path, "lacks 1 of 3 shards: model-00003-of-00003.safetensors")


def test_shards_without_an_index(tmp_path):
    path, where = shards_of(tmp_path, 3)
    assert torch.equal(logits(load_model(path, "float32")), logits(make_model()))
    assert checkpoint.expand_paths([path]) == [path] and checkpoint.is_complete(path)
    assert [info.kind for info in checkpoint.list_checkpoints(tmp_path)] == ["huggingface"]
    refused(path / min(where.values()), "is one shard of 3: give its directory")
    before = checkpoint.fingerprint(path)
    (path / "model-00002-of-00003.safetensors").rename(tmp_path / "aside")
    refused(path, "no index of its shards, and of 3 lacks 1: model-00002-of-00003.safetensors")
    (tmp_path / "aside").rename(path / "model-00002-of-00004.safetensors")
    refused(path, "shards of several models")
    (path / "model-00002-of-00004.safetensors").rename(path / "model-00002-of-00003.safetensors")
    assert checkpoint.fingerprint(path) == before


def test_links_into_a_cache(tmp_path):
    """As the hub's cache has them: the names of files stay inside, what they lead to does not."""
    path, where = shards_of(tmp_path)
    write_index(path, where)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(path.iterdir())):
        file.rename(tmp_path / f"blobs/{i}")
        file.symlink_to(f"../blobs/{i}")
    assert torch.equal(logits(load_model(path, "float32")), logits(make_model()))
    (path / max(where.values())).resolve().unlink()
    refused(path, "is a link to nothing")


def test_a_bad_config_is_said_when_it_is_asked_for(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").unlink()
    (path / "config.json").write_text('{"model_type": "gpt2", "n_embd": "wide"}')
    ckpt = checkpoint.open(path)
    assert ckpt.kind == "huggingface" and "not 'wide'" in checkpoint.inspect(path)["note"]
    with pytest.raises(ValueError, match=r"config\.json: n_embd must be a positive integer"):
        ckpt.load()
    loaded = load_model(path, "float32", config=CONFIGS["gpt2"])
    assert torch.equal(logits(loaded), logits(make_model()))


def test_quantised_safetensors_are_refused(tmp_path):
    config = CONFIGS["gpt2"]
    path = save_checkpoint(make_model(config), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").unlink()
    table = tensorfiles.open_safetensors(path / "model.safetensors")
    header, offset = {}, 0
    for name, t in table.items():
        end = offset + int(np.prod(t.shape))
        header[name] = {"dtype": "I8", "shape": t.shape, "data_offsets": [offset, end]}
        offset = end
    safetensors_file(path / "model.safetensors", header, bytes(offset))
    refused(path, r"28 of a type that is not float32, .*transformer.wte.weight \(I8\)")


SIZES_OF_OTHERS = {  # of a model that transformers alone runs, and of one that we do
    "num_hidden_layers": (10**6, r"num_hidden_layers is 1000000, but the checkpoint has \d+ tens"),
    "vocab_size": (10**12, r"vocab_size is 1000000000000, but no tensor .* more than 97"),
    "hidden_size": (2**31, "hidden_size is 2147483648, but no tensor"),
    "intermediate_size": (10**400, r"intermediate_size is 10{29}, but no tensor"),
    "num_local_experts": (10**9, "num_local_experts is 1000000000, but no tensor"),
}


@pytest.mark.parametrize("field", SIZES_OF_OTHERS)
@pytest.mark.parametrize("family", ["gemma2", "qwen2", "llava"])
def test_sizes_that_no_tensor_has(tmp_path, field, family):
    """Refused before transformers, or a list of the layers' windows, is made of them."""
    value, said = SIZES_OF_OTHERS[field]
    path = save_checkpoint(make_model(CONFIGS["qwen2"]), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").unlink()
    values = json.loads((path / "config.json").read_text()) | {"model_type": family}
    values |= {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
    del values["roseval"]
    sizes = {field: value, "max_window_layers": 10**12}
    values = {"text_config": values | sizes} if family == "llava" else values | sizes
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said) as error:
        load_model(path)
    assert "config.json" in str(error.value) and len(str(error.value)) < 400
    assert checkpoint.inspect(path)["note"] == str(error.value)
    loaded = load_model(path, "float32", config=CONFIGS["qwen2"])  # which is believed
    assert torch.equal(logits(loaded), logits(make_model(CONFIGS["qwen2"])))


def test_huge_index_and_config(tmp_path):
    path, where = shards_of(tmp_path)
    index = write_index(path, where)
    with index.open("ab") as f:
        f.truncate(65 << 20)
    refused(path, r"index\.json has more than 67,108,864 bytes")
    write_index(path, where)
    with (path / "config.json").open("ab") as f:
        f.truncate(9 << 20)
    refused(path, r"config\.json has more than 8,388,608 bytes")


def test_a_width_that_a_mixture_has_no_layer_for(tmp_path):
    """Of its dense layers, were there any: no tensor has it, and nothing is too large."""
    widths = {"n_experts": 4, "n_experts_per_token": 2, "d_ff_expert": 16, "d_ff": 9999}
    config = CONFIGS["qwen2"].replace(**widths)
    path = save_checkpoint(make_model(config), None, None, 0, 1, 1.0, tmp_path)
    assert load_model(path).config.d_ff == 9999

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
    index.write_text("{")
    with pytest.raises(ValueError, match="no index of shards"):
        load_model(theirs)


@pytest.mark.parametrize("family", ["vaultgemma", "granitemoe", "gptj", "mixtral", "opt"])
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
        "granitemoe": {"logits_scaling": 4.0},
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        "mixtral": {"num_local_experts": 4},
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


def test_a_name_in_two_shards_is_refused(tmp_path):
    state = {name: torch.ones(2) for name in ("a", "b")}
    torch.save(state, tmp_path / "1.bin")
    torch.save(state, tmp_path / "2.bin")
    weight_map = {"a": "1.bin", "b": "2.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, r"2\.bin holds [ab], and so does .*1\.bin")


def test_a_bad_config_is_said_when_it_is_asked_for(tmp_path):
    path = save_checkpoint(make_model(), None, None, 0, 1, 1.0, tmp_path)
    (path / "manifest.json").unlink()
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    ckpt = checkpoint.open(path)
    assert ckpt.kind == "huggingface" and "is missing" in checkpoint.inspect(path)["note"]
    with pytest.raises(ValueError, match=r"config\.json: field 'vocab_size' is missing"):
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

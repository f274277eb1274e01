"""checkpoint.py convert --to hf: transformers' own class opens it and gives our logits."""

import json

import pytest
import torch
from checkpoint_files import CONFIGS, IDS, make_model, nanogpt_file
from safetensors.torch import load_file
from trained_files import TRAINED

import checkpoint
from config import GPTConfig, load_config
from dataset import build_tokenizer
from families.convert import fields_from_hf
from families.dense import SIZES
from formats import conversion, tensorfiles

transformers = pytest.importorskip("transformers")

TRAINERS = ("litgpt-llama/step-00000040", "litgpt-neox/step-00000040", "litgpt-qwen3/step-00000040")
TRAINERS += ("llama2c-tied/ckpt.pt", "llama2c-untied/v1.bin", "torchtitan-llama3-1/step-10")
TRAINERS += ("torchtitan-qwen3-0/step-10", "deepspeed-3-fp32", "lightning/last.ckpt")
TRAINERS += ("olmo-core-qk/step20", "llmc/float32/model_00000030.bin")


@torch.no_grad()
def both_logits(ours, directory, ids, dtype=torch.float32):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return ours(ids)[0].float(), theirs.eval()(ids).logits.float()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainers_checkpoint_opens_in_transformers(name, tmp_path):
    home = TRAINED / name.split("/")[0]
    config = load_config(home / "config.yaml") if (home / "config.yaml").is_file() else None
    ckpt = checkpoint.open(TRAINED / name, config)
    out = conversion.to_hf(ckpt, tmp_path / "out", "float32", 5 * 10**9)
    assert {f.name for f in out.iterdir()} >= {"config.json", "model.safetensors"}
    said = json.loads((out / "config.json").read_text())
    assert "roseval" not in said and said["dtype"] == "float32"
    ids = torch.arange(24).view(2, 12) * 7 % ckpt.vocab_size
    ours, theirs = both_logits(ckpt.load("float32"), out, ids)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, ours.abs().max().item())
    again = checkpoint.open(out)
    assert again.kind == "huggingface"
    assert torch.equal(again.load("float32")(ids)[0], ckpt.load("float32")(ids)[0])


@pytest.mark.parametrize("name", ["gpt2", "llama biased", "mistral", "qwen2", "qwen3"])
def test_our_own_in_shards(name, tmp_path, capsys):
    """Shards, their index and the dtype that was asked for; the tokenizer goes along."""
    model, folder = make_model(CONFIGS[name]), tmp_path / "run"
    source = checkpoint.save_checkpoint(
        *(model, None, None, 0, 3, 1.0, folder), tokenizer=build_tokenizer("byte")
    )
    words = ["--to", "hf", "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    checkpoint.main(["convert", str(source), str(tmp_path / "out"), *words])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 1 and files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    tables = {file: load_file(tmp_path / "out" / file) for file in files}
    held = {key: file for file, table in tables.items() for key in table}
    assert held == index["weight_map"]
    sizes = [sum(t.numel() * 2 for t in table.values()) for table in tables.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 20_000 or len(t) == 1 for size, t in zip(sizes, tables.values()))
    assert {t.dtype for table in tables.values() for t in table.values()} == {torch.bfloat16}
    assert not (tmp_path / "out/manifest.json").exists()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]
    ours, theirs = both_logits(
        checkpoint.load_model(tmp_path / "out", "float32"), tmp_path / "out", IDS
    )
    assert (ours - theirs).abs().max() <= 1e-5
    rounded = checkpoint.load_model(source, "float32")(IDS)[0]
    assert 0 < (rounded - ours).abs().max() < 0.3  # to bfloat16, and nothing else


def test_an_adapter_is_merged(tmp_path):
    from adapter_files import IDS as ids
    from adapter_files import saved_adapter, saved_base

    lora = saved_adapter(tmp_path / "lora", saved_base(tmp_path), modules_to_save=["lm_head"])
    checkpoint.main(["convert", str(lora), str(tmp_path / "out"), "--to", "hf"])
    ours, theirs = both_logits(checkpoint.load_model(lora, "float32"), tmp_path / "out", ids)
    assert (ours - theirs).abs().max() <= 1e-5


def test_what_no_class_has_is_named_before_anything_is_written(tmp_path):
    """With the fewest of its features that stand in the way."""
    sizes = zip(SIZES.values(), (100, 64, 2, 4, 2, 32, 48), strict=True)
    olmo2 = fields_from_hf({"model_type": "olmo2", **dict(sizes)})
    said = {
        "embedding_scale 2.0": CONFIGS["gpt2"].replace(embedding_scale=2.0),
        "qk_norm True": CONFIGS["gpt2"].replace(qk_norm=True),
        "parallel_residual True": CONFIGS["qwen3"].replace(parallel_residual=True),
        "qk_norm_over 'heads'": GPTConfig(**olmo2 | {"qk_norm_over": "heads"}),
        "logit_softcap 30.0 and residual_scale 0.5": CONFIGS["gpt2"].replace(
            residual_scale=0.5, logit_softcap=30.0
        ),
    }
    for i, (words, config) in enumerate(said.items()):
        source = checkpoint.save_checkpoint(
            make_model(config), None, None, 0, i, 1.0, tmp_path / "r"
        )
        with pytest.raises(ValueError) as error:
            checkpoint.main(["convert", str(source), str(tmp_path / "out"), "--to", "hf"])
        text = str(error.value)
        assert f"no class of transformers has {words} together with the rest" in text, text
        assert str(source) in text
        assert {p.name for p in tmp_path.iterdir()} == {"r"}


def test_refusals(tmp_path, monkeypatch):
    nanogpt_file(
        make_model(CONFIGS["gpt2"].replace(d_ff=128, activation="gelu")), tmp_path / "a.pt"
    )
    words = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "out")]

    def refused(match, *more):
        with pytest.raises(ValueError, match=match):
            checkpoint.main([*words, *more])
        assert {p.name for p in tmp_path.iterdir()} - {"out"} == {"a.pt"}

    refused("--max-shard-size must be a size such as 5GB", "--to", "hf", "--max-shard-size", "1TB!")
    refused("--max-shard-size must be a size", "--to", "hf", "--max-shard-size", "0")
    refused("--dtype and --max-shard-size go with --to hf", "--dtype", "float32")
    refused("is no adapter: --base does not go with it", "--base", str(tmp_path))

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # interrupted in the midst of the weights
        patch.setattr(tensorfiles, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.main([*words, "--to", "hf"])
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    refused("exists already", "--to", "hf")
    words[-1] = str(tmp_path / "a.pt/out")
    refused("the new directory .*a.pt is no directory", "--to", "hf")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    assert conversion.bytes_of("2GiB") == 2 << 30 and conversion.bytes_of("1.5MB") == 1_500_000

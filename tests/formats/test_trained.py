"""Checkpoints of other trainers (tests/fixtures/trained): their own models' logits from their own
files, opened where they lie."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from trained_files import TRAINED, copied, difference, logits, wanted

import checkpoint
from config import load_config
from formats import dcp, stored

TITANS = ("llama3-0", "llama3-1", "qwen3-0", "qwen3-1")  # q, k, v apart or fused
ZERO = ("0-fp32", "1-bf16", "2-bf16", "3-fp32", "3-bf16")
FOUND = {
    "litgpt-llama/step-00000040": ("litgpt", 40),
    "litgpt-neox/step-00000040": ("litgpt", 40),
    "litgpt-qwen3/step-00000040": ("litgpt", 40),
    "litgpt-old/final": ("litgpt", None),
    "llama2c-tied/ckpt.pt": ("llama2.c", 200),
    "llama2c-tied/v0.bin": ("llama2.c", None),
    "llama2c-tied/v1.bin": ("llama2.c", None),
    "llama2c-untied/ckpt.pt": ("llama2.c", 200),
    "llama2c-untied/v0.bin": ("llama2.c", None),
    "llama2c-untied/v1.bin": ("llama2.c", None),
    **{f"torchtitan-{kind}/step-10": ("dcp", 10) for kind in TITANS},
    "olmo-core-plain/step20": ("olmo-core", 20),
    "olmo-core-qk/step20": ("olmo-core", 20),
    "lightning/last.ckpt": ("lightning", 3),
    **{f"deepspeed-{kind}": ("deepspeed", 1) for kind in ZERO},
    "deepspeed-0-fp32/global_step1": ("deepspeed", 1),
    **{
        f"megatron-{kind}/{form}": ("megatron", 10)
        for kind in ("gpt", "llama")
        for form in ("torch_dist", "legacy", "legacy/iter_0000010")
    },
    "trainer/checkpoint-1": ("huggingface", 1),
    "trainer/checkpoint-2": ("huggingface", 2),
    "accelerate/checkpoints/checkpoint_0": ("weights", 0),
    "accelerate-fsdp/checkpoint-5": ("dcp", 5),
    "litgpt-fsdp/step-00000040": ("litgpt", 40),
    "llmc/float32/model_00000030.bin": ("llm.c", 30),
    "llmc/bfloat16/model_00000030.bin": ("llm.c", 30),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_trainers_own_logits(name, tmp_path):
    path, home = TRAINED / name, TRAINED / name.split("/")[0]
    config = load_config(home / "config.yaml") if (home / "config.yaml").is_file() else None
    ckpt = checkpoint.open(path, config)
    assert (ckpt.kind, ckpt.step) == FOUND[name]
    got, expected = logits(ckpt.load("float32")), wanted(name)
    tolerance = 0.05 if name.startswith("llmc/bfloat16") else 1e-5
    assert got.shape == expected.shape and np.abs(got - expected).max() <= tolerance
    assert expected.std() > 0.3
    assert (checkpoint.is_finished(path) is False) == name.startswith("llmc")
    info = checkpoint.info_of(path)
    assert (info.kind, info.step) == FOUND[name] and checkpoint.is_complete(path)
    converted = checkpoint.convert(path, tmp_path / "out", config)
    assert np.abs(logits(checkpoint.load_model(converted, "float32")) - got).max() <= 1e-6
    model = checkpoint.load_model(converted, "float32")
    for p in model.parameters():
        p.data.zero_()
    checkpoint.load_weights(path, model)  # the model's config stands for the file's
    assert np.abs(logits(model) - got).max() <= 1e-6
    assert len(ckpt.fingerprint) == 64


@pytest.mark.parametrize("name", [n for n in FOUND if n.startswith(("torchtitan", "deepspeed"))])
def test_what_shapes_tell_is_told(name):
    """Where nothing says what the model is: the list of what cannot be seen."""
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(TRAINED / name)
    said = str(error.value)
    assert "no config" in said and "--config" in said and "\n" not in said
    if name.startswith("torchtitan"):
        assert "vocab_size=61, d_model=16, n_layers=2, d_ff=24" in said
        assert ("n_heads=4, n_kv_heads=2" in said) == ("qwen3" in name)  # from the norms' width
        assert ("not n_heads" in said) == ("llama3" in name) and "rope_theta" in said
    assert checkpoint.inspect(TRAINED / name)["note"] == said


DAMAGED = [n for n in FOUND if n.count("/") < 2 and not n.endswith("global_step1")]
MANY_FILES = ("megatron", "trainer", "accelerate", "litgpt-fsdp", "deepspeed-1")
OFTEN = [
    pytest.param(n, marks=pytest.mark.slow if n.startswith(MANY_FILES) else ()) for n in DAMAGED
]


@pytest.mark.parametrize("name", OFTEN)
def test_damaged_files_are_one_line(name, tmp_path):
    """Every file of a checkpoint, cut at many places, emptied, zeroed, swapped for a web page, and
    with single bytes changed: refused in one line that names it, or the very same numbers."""
    home = TRAINED / name.split("/")[0]
    config = load_config(home / "config.yaml") if (home / "config.yaml").is_file() else None
    path, expected = copied(name, tmp_path), wanted(name)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    generator = np.random.default_rng(0)
    for file in files:
        content = file.read_bytes()
        cuts = {0, 1, 20, len(content) // 3, len(content) // 2, len(content) - 1}
        bad = [content[:n] for n in sorted(cuts)] + [bytes(len(content)), b"<html>" + content]
        for at in generator.integers(0, len(content), 8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << generator.integers(0, 8)
            bad.append(bytes(flipped))
        for damaged in bad:
            file.write_bytes(damaged)
            try:
                got = logits(checkpoint.load_model(path, "float32", config=config))
            except ValueError as error:
                said = str(error)
                assert str(tmp_path) in said and "\n" not in said and len(said) < 2000, said
            else:
                same = got.shape == expected.shape and np.abs(got - expected).max() <= 1e-5
                # what has no checksum (safetensors' bytes neither), and settings that are text,
                # cannot be told
                unchecked = file.suffix in (".bin", ".safetensors", ".json", ".yaml")
                assert same or unchecked, f"{file.name} is taken for whole"
        file.write_bytes(content)
    assert (
        np.abs(logits(checkpoint.load_model(path, "float32", config=config)) - expected).max()
        <= 1e-5
    )


def generations(state):
    """(what, state dict) of torchtitan's names through the years, from those of now."""
    former = {n.replace(".qkv_linear", ""): t for n, t in state.items()}
    former["output.weight"] = former.pop("lm_head.weight")
    yield "2024", former | {"freqs_cis": torch.zeros(32, 2)}
    yield "before 2025-07", {f"model.{n}": t for n, t in former.items()}
    for head in ("output", "lm_head"):
        fused = {n.replace("lm_head", head): t for n, t in state.items() if "qkv_linear" not in n}
        for i in range(2):
            at = f"layers.{i}.attention.qkv_linear."
            rows = [state[f"{at}{name}.weight"].view(2, -1, 16) for name in ("wq", "wk", "wv")]
            fused[at + "wqkv.weight"] = torch.cat(rows, dim=1).reshape(-1, 16)  # by key head
        yield f"fused, {head}", fused


@pytest.mark.parametrize("kind", ["llama3-0", "qwen3-0"])
def test_every_generation_of_torchtitans_names(kind, tmp_path):
    name = f"torchtitan-{kind}"
    config = load_config(TRAINED / name / "config.yaml")
    state = {}
    for n, t in dcp.tensors_in(TRAINED / name / "step-10").items():
        now = n.replace("attention.w", "attention.qkv_linear.w").replace("qkv_linear.wo", "wo")
        state[now.replace("output", "lm_head")] = stored.read_whole(t)
    for what, named in generations(state):
        path = tmp_path / what / "step-10"
        with warnings.catch_warnings(action="ignore"):
            torch_dcp.save(named, checkpoint_id=path, no_dist=True)
        assert difference(path, name, config) <= 1e-5, what
    both = state | {"output.weight": state["lm_head.weight"] + 1}
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save(both, checkpoint_id=tmp_path / "both", no_dist=True)
    with pytest.raises(ValueError, match="under a second name"):
        checkpoint.open(tmp_path / "both", config)

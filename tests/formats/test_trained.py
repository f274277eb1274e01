"""Checkpoints of other trainers (tests/fixtures/trained): their own models' logits from their own
files, opened where they lie."""

from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from config import load_config

ROOT = Path(__file__).resolve().parent.parent / "fixtures/trained"
IDS = torch.arange(24).view(2, 12) * 7 % 61
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
    "llmc/float32/model_00000030.bin": ("llm.c", 30),
    "llmc/bfloat16/model_00000030.bin": ("llm.c", 30),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_trainers_own_logits(name, tmp_path):
    path, home = ROOT / name, ROOT / name.split("/")[0]
    config = load_config(home / "config.yaml") if (home / "config.yaml").is_file() else None
    ckpt = checkpoint.open(path, config)
    assert (ckpt.kind, ckpt.step) == FOUND[name]
    with torch.no_grad():
        got = ckpt.load("float32")(IDS)[0].numpy()
    wanted = np.load(home / "logits.npy")
    tolerance = 1e-5 if "bfloat16" not in name else 0.05
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= tolerance
    assert wanted.std() > 0.3
    assert checkpoint.is_finished(path) is not (True if "llmc" in name else False)
    (info,) = [checkpoint.info_of(path)]
    assert (info.kind, info.step) == FOUND[name]
    converted = checkpoint.convert(path, tmp_path / "out", config)
    with torch.no_grad():
        again = checkpoint.load_model(converted, "float32")(IDS)[0].numpy()
    assert np.abs(again - got).max() <= 1e-6
    assert len(ckpt.fingerprint) == 64

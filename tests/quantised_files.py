"""What the tests of quantised checkpoints share: the fixtures, and ways to change one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from formats import stored

FIXTURES = Path(__file__).resolve().parent / "fixtures/quantised"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def source(name: str) -> Path:
    """The directory of a fixture's model."""
    return FIXTURES / name / "model"


def wanted(name: str) -> dict[str, torch.Tensor]:
    """The matrices that the library itself dequantised."""
    return load_file(FIXTURES / name / "wanted.safetensors")


def dense(path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as they are read here."""
    tensors = checkpoint.open(path).tensors
    return {name: stored.read_whole(t).to(dtype) for name, t in tensors.items()}


def changed(folder, name, said=None, change=None):
    """A copy of a fixture: `said` over its quantization_config, `change(state)` on its tensors."""
    path = Path(shutil.copytree(source(name), Path(folder) / name, dirs_exist_ok=True))
    file = path / "config.json"
    values = json.loads(file.read_text())
    values.get("quantization_config", {}).update(said or {})
    file.write_text(json.dumps(values))
    if change:
        state = load_file(path / "model.safetensors")
        change(state)
        state = {key: t.contiguous() for key, t in state.items()}
        save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


def linear(folder, method, said, tensors, at="model.layers.0.mlp.down_proj"):
    """What one layer's tensors mean: they take a layer's place in a Llama that is otherwise whole.
    Its matrix in float32."""
    path = changed(folder, "fp8-block", said | {"quant_method": method}, change=lambda s: s.clear())
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] = said | {"quant_method": method}
    (path / "config.json").write_text(json.dumps(values))
    state = {f"{at}.{leaf}": t.contiguous() for leaf, t in tensors.items()}
    save_file(state | {"other.weight": torch.ones(400, 400)}, path / "model.safetensors")
    return dense(path)[f"{at}.weight"]


def one_line(path, match):
    """What is wrong is said in one line that names the directory."""
    with pytest.raises(ValueError, match=match) as error:
        checkpoint.open(path).load("float32")
    assert str(path) in str(error.value) and "\n" not in str(error.value)

"""What the tests of trainers' checkpoints share: the fixtures, and ways to damage a file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint

TRAINED = Path(__file__).resolve().parent / "fixtures/trained"
IDS = torch.arange(24).view(2, 12) * 7 % 61


def copied(name: str, folder: Path) -> Path:
    """folder/NAME: a fixture's checkpoint, to be changed."""
    source, target = TRAINED / name, Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    return Path(shutil.copy(source, target))


def wanted(name: str) -> np.ndarray:
    """The logits of the trainer's own model."""
    return np.load(TRAINED / name.split("/")[0] / "logits.npy")


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(IDS)[0].float().numpy()


def difference(path, name: str, config=None) -> float:
    """Between the logits of a checkpoint that is opened here and the trainer's."""
    model = checkpoint.load_model(path, "float32", config=config)
    return float(np.abs(logits(model) - wanted(name)).max())


def refusal(path, config=None) -> str:
    """The one line with which a checkpoint is refused; it names a file in the checkpoint."""
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(path, "float32", config=config)
    said = str(error.value)
    assert "\n" not in said and str(path) in said, said
    return said

"""backends/rehearsal.py: one layer of any model that is run by us, and nothing of it stays."""

import gc

import pytest
import torch
from small_models import KINDS, tiny

from backends.rehearsal import rehearse
from config import load_config
from model import GPTModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_layer_is_rehearsed(kind):
    rehearse(tiny(kind), "float32", CPU)


def test_of_a_large_model_one_layer(monkeypatch):
    """Its own width, and its vocabulary's rest by 64, by which kernels go."""
    seen, allocate = [], GPTModel.allocate
    monkeypatch.setattr(
        GPTModel, "allocate", lambda self, *args: seen.append(self.config) or allocate(self, *args)
    )
    rehearse(load_config("gpt2-xl"), "float32", CPU)
    assert [(c.n_layers, c.d_model, c.vocab_size) for c in seen] == [(1, 1600, 64 + 50257 % 64)]
    gc.collect()
    assert not any(isinstance(kept, GPTModel) for kept in gc.get_objects())


def test_without_memory_there_is_none(monkeypatch):
    def refuse(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(GPTModel, "allocate", refuse)
    rehearse(load_config("gpt2"), "float32", CPU)
    rehearse(None, "float32", CPU)

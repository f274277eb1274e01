"""backends/parallel.py, pipe.py and stages.py: models whose layers lie on several ranks have the
bits of a model on one, whatever fails meanwhile. Real ranks over gloo, many models in each run."""

import numpy as np
import pytest
import torch
from builders import error_of, run_ranks, save_model, saved_checkpoint
from small_models import KINDS, tiny

from backends.parallel import load
from costs.shards import cut
from distributed import Dist
from model import GPTModel

QUICK = ("gpt2", "gemma2", "deepseek_v3")  # tied and padded; windows and caps; latents and experts


def saved(folder, kind):
    """A checkpoint of five layers, whose weights tell tokens apart."""
    torch.manual_seed(1)
    model = GPTModel(tiny(kind, n_layers=5)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else torch.nn.init.normal_(p, std=0.5)
    return save_model(model, folder / kind, 1, tokenizer=None)


def shard_of(folder):
    ids = np.random.default_rng(0).integers(0, 131, 211).astype(np.uint16)
    np.save(folder / "x.npy", ids)
    return folder / "x.npy"


BITS = """
from sharded import check, open_shard
stream = open_shard({shard!r})
for path in {paths!r}:
    for size in {sizes}:
        n = check(path, dist, size, stream)
        if dist.is_main:
            say("same", n, size, path)
"""


def compare(folder, kinds, n, sizes):
    paths = [str(saved(folder, kind)) for kind in kinds]
    body = BITS.format(shard=str(shard_of(folder)), paths=paths, sizes=sizes)
    out = run_ranks(n, folder, body)
    lines = [line for line in out.stdout.splitlines() if line.startswith("same")]
    assert len(lines) == len(paths) * len(sizes), out.stdout


def test_two_ranks_to_a_model_have_the_bits_of_one(tmp_path):
    compare(tmp_path, QUICK, 2, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("n, sizes", [(2, (1, 2)), (4, (1, 2, 4))])
def test_every_family_in_groups_of_every_size(tmp_path, n, sizes):
    compare(tmp_path, KINDS, n, sizes)

"""backends/parallel.py, pipe.py and stages.py: models whose layers lie on several ranks have the
bits of a model on one, whatever fails meanwhile. Real ranks over gloo, many models in each run."""

import numpy as np
import pytest
import torch
from builders import run_ranks, save_model
from small_models import KINDS, tiny

from model import GPTModel
from quantisation.names import Quantisation

QUICK = ("gpt2", "gemma2", "deepseek_v3")  # tied and padded; windows and caps; latents and experts


def saved(folder, kind):
    """A checkpoint of five layers, whose weights tell tokens apart."""
    torch.manual_seed(1)
    model = GPTModel(tiny(kind, n_layers=5, vocab_size=160)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else torch.nn.init.normal_(p, std=0.5)
    return save_model(model, folder / kind, 1, tokenizer=None)


def shard_of(folder):
    ids = np.random.default_rng(0).integers(0, 131, 211).astype(np.uint16)
    np.save(folder / "x.npy", ids)
    return folder / "x.npy"


BITS = """
from quantisation.names import Quantisation
from sharded import check, check_rounded, open_shard
stream = open_shard({shard!r})
for path in {paths!r}:
    rules = [r for r in {rules} if "a8" not in r.rule or not any(x in path for x in {whole})]
    for size in {sizes}:
        n = check(path, dist, size, stream)
        check_rounded(path, dist, size, stream, rules)
        if dist.is_main:
            say("same", n, size, path)
"""
FEW = (Quantisation("rtn-w4-g16", embeddings=True, skip=("blocks.4.*",)),)
EVERY = (*FEW, *map(Quantisation, ("bf16", "rtn-w8", "fp8-b16", "rtn-w8a8", "fp8-a8")))
# whose activations are not rounded: mixtures and latent attention
WHOLE = [kind for kind in KINDS if tiny(kind).n_experts or tiny(kind).kv_lora_rank is not None]


def compare(folder, kinds, n, sizes, rules=FEW):
    paths = [str(saved(folder, kind)) for kind in kinds]
    places = {"shard": str(shard_of(folder)), "paths": paths}
    body = BITS.format(**places, sizes=sizes, rules=rules, whole=WHOLE)
    out = run_ranks(n, folder, body)
    lines = [line for line in out.stdout.splitlines() if line.startswith("same")]
    assert len(lines) == len(paths) * len(sizes), out.stdout


def test_two_ranks_to_a_model_have_the_bits_of_one(tmp_path):
    compare(tmp_path, QUICK, 2, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [KINDS[part::3] for part in range(3)], ids="abc")
@pytest.mark.parametrize("n, sizes", [(2, (2,)), (4, (1, 2, 4))])
def test_every_family_in_groups_of_every_size(tmp_path, n, sizes, kinds):
    compare(tmp_path, kinds, n, sizes, EVERY if n == 2 else FEW)


# ---------------------------------------------------------------------------------------------
# What fails

# Whichever rank of a group, whichever stage of the work: its memory holds no more than 2 rows.
SHORT_OF_MEMORY = """
import checkpoint
from backends import continuations
from backends.local import facts_of
from backends.parallel import in_groups, load
from sharded import ALONE, numbers, open_shard
ckpt, stream = checkpoint.open({path!r}), open_shard({shard!r})
facts, dist = facts_of(ckpt, None, "float32", "cpu"), in_groups(dist, 2, None, "float32")
cache, wanted = continuations.PrefixCache, None
for short, where in [(0, "through_blocks"), (1, "through_blocks"), (1, "nll"), (0, "prefix")]:
    model, calls = load(ckpt, "float32", dist), []
    def fails(real, n):
        def function(x, *args, **more):
            calls.append(len(x))
            if dist.rank == short and len(x) > n and len(calls) > {spared}:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(x, *args, **more)
        return function
    if where == "through_blocks":
        model.through_blocks = fails(model.through_blocks, 2)
    if where == "nll" and model.is_last:
        model.nll = fails(model.nll, 2 * 32)
    def alloc(model, *args):
        calls.append(0)
        if where == "prefix" and dist.rank == short and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return cache(model, *args)
    continuations.PrefixCache = alloc
    found = numbers(model, facts, dist, stream, batch=4)
    continuations.PrefixCache = cache
    batches = [v for name, v in found.items() if "batch" in name]
    say("found", dist.rank, short, where, *batches)
    same = numbers(ckpt.load("float32"), facts, ALONE, stream, batch=found["batch"])
    for name in ("nll", "token_nll", "seen"):
        assert found[name] == same[name], (short, where, name)
    again = numbers(load(ckpt, "float32", dist), facts, dist, stream, batch=4)
    wanted = wanted or again
    assert again == wanted, "whoever failed before is whole again"
"""


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_of_a_group(tmp_path):
    """All ranks agree on half the batch, and what comes out is what half the batch gives."""
    path = saved(tmp_path, "llama")
    body = SHORT_OF_MEMORY.format(path=str(path), shard=str(shard_of(tmp_path)), spared=3)
    out = run_ranks(2, tmp_path, body)
    lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("found")]
    by_rank = [[line[1:] for line in lines if line[0] == rank] for rank in "01"]
    assert (
        by_rank[0]
        == by_rank[1]
        == [  # batches of windows; of two kinds of rows; of samples
            ["0", "through_blocks", "2", "15", "15", "2", "2"],
            ["1", "through_blocks", "2", "15", "15", "2", "2"],
            ["1", "nll", "2", "60", "60", "4", "4"],
            ["0", "prefix", "4", "30", "60", "4", "4"],
        ]
    )


FAILS = """
import itertools
import checkpoint
from backends.local import facts_of
from backends.parallel import in_groups, load
from sharded import numbers, open_shard
ticks = itertools.count(int(time.monotonic()) + 1)
dist._watch.clock = (lambda: 0.0) if dist.rank == {failing} else (lambda: float(next(ticks)))
ckpt, stream = checkpoint.open({path!r}), open_shard({shard!r})
dist = in_groups(dist, 2, None, "float32")
model, calls = load(ckpt, "float32", dist), []
real = model.through_blocks
def through_blocks(x, *args):
    calls.append(x)
    if dist.rank == {failing} and len(calls) > 3:
        {how}
    return real(x, *args)
model.through_blocks = through_blocks
numbers(model, facts_of(ckpt, None, "float32", "cpu"), dist, stream, batch=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["hangs", "is killed", "raises"])
def test_a_rank_of_a_group_that_fails_ends_the_run_and_is_named(tmp_path, failing, how):
    ways = {"hangs": "time.sleep(10**6)", "is killed": "os.kill(os.getpid(), signal.SIGKILL)"}
    ways |= {"raises": "raise RuntimeError('the bus is down')"}
    path, shard = saved(tmp_path, "llama"), shard_of(tmp_path)
    body = FAILS.format(path=str(path), shard=str(shard), how=ways[how], failing=failing)
    err = run_ranks(2, tmp_path, body, code=1, timeout=4, cold=how == "is killed").stderr
    said = {
        "hangs": f"error: rank {failing} made no progress for 4 s; the run ends here",
        "is killed": f"rank      : {failing} (local_rank: {failing})",
        "raises": f"rank {failing}: RuntimeError: the bus is down",
    }
    assert said[how] in err, err

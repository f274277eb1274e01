"""What the tests of sharded models run on each rank: the three verbs, to be compared bit for bit.

found = numbers(load(ckpt, "float32", dist), facts, dist)
check(path, dist, size, stream)             # in groups of `size` ranks, and on this rank alone
check_rounded(path, dist, size, stream, rules)
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

import checkpoint
from backends import CacheOptions, Sampling, steady
from backends.continuations import Continuations
from backends.engine import Engine
from backends.local import Local, facts_of
from backends.parallel import in_groups, load
from backends.reference import open_reference
from backends.rows import Capacity
from costs.shards import shares, weight_bytes
from costs.symbols import Setup
from dataset import RandomWindows, Windows, open_stream
from distributed import Dist
from formats import filling
from quantisation.apply import Weights

steady.PIECE = 8
ALONE = Dist(0, 1, 0, torch.device("cpu"))
T = 32
SAMPLING = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=3)


def some_rows(choice_ids=(5, 80, 100)):
    """Rows after three prefixes, one of them empty, as short as any row can be among them."""
    g = np.random.default_rng(0)
    prefixes = [g.integers(0, 120, n) for n in (19, 0, 13)]
    prefix = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    ids = [g.integers(0, 120, n) for n in (3, 9, 1, 20, 4, 7, 7, 2, 12)]
    targets = [g.integers(0, 120, n) for n in (2, 0, 1, 5, 4, 1, 7, 0, 3)]
    return Continuations(prefixes, prefix, ids, targets, list(choice_ids) if choice_ids else None)


def prompts():
    g = np.random.default_rng(1)
    return [g.integers(0, 120, n).tolist() for n in (5, 1, 9, 3, 12, 2, 7, 4, 1)]


class Seen:
    """Makes a consumer of logits: their sum by place."""

    def __init__(self, n):
        self.n = n

    def __call__(self):
        self.sums = torch.zeros(self.n, dtype=torch.float64)
        return self.see

    def see(self, logits, targets, places):
        self.sums[places] = logits.double().sum(-1)


def numbers(model, facts, dist, stream, batch=4) -> dict:
    """Every number of the three verbs, as bytes or plain values, the same on every rank."""
    local, windows = Local(model, facts=facts, dist=dist), Windows(len(stream), T, 12)
    seen = Seen(len(windows) * T)
    totals = local.score_windows(stream, windows, batch, per_token=True, consumer=seen)
    found = {name: array.tobytes() for name, array in totals.arrays().items()}
    found |= {"token_nll": totals.token_nll.tobytes(), "seen": dist.sum(seen.sums).tobytes()}
    found["batch"] = local.ran()["batch_size"]
    totals = local.score_windows(stream, RandomWindows(len(stream), T, 1), batch)
    found["random"] = totals.nll.tobytes()
    for name, choice_ids in (("choices", (5, 80, 100)), ("targets", None)):
        rows = some_rows(choice_ids)
        seen = Seen(int(rows.target_offsets[-1]))
        scores = local.score_rows(rows, 60, greedy=True, consumer=seen)
        parts = scores.choices, scores.targets, scores.tokens, scores.greedy, scores.likeliest
        found[name] = [part.tobytes() for part in parts] + [dist.sum(seen.sums).tobytes()]
        found[f"{name} batch"] = local.ran()["batch_tokens"]
    ways = [("drawn", SAMPLING, None), ("greedy", Sampling(max_new_tokens=7), None)]
    if model.config.kv_lora_rank is None:
        ways.append(("of 8 bits", SAMPLING, "int8"))
    for name, sampling, local.cache in ((*way, CacheOptions(kind)) for *way, kind in ways):
        mine = local.generate(prompts(), sampling, 3, batch_size=batch, done={(0, 1), (3, 2)})
        mine = [(s.prompt_index, s.sample_index, s.token_ids, s.finish_reason) for s in mine]
        found[name] = sorted(sample for part in dist.gather(mine) for sample in part)
        found[f"{name} batch"] = local.ran()["batch_size"]
        assert len(found[name]) == 3 * len(prompts()) - 2, "each sample once"
    mine = [s.token_ids for s in local.generate(prompts()[:1], SAMPLING, 3, batch_size=batch)]
    found["of one prompt"] = sorted(ids for part in dist.gather(mine) for ids in part)
    return found


def served(model) -> list:
    """Tokens and their log-probabilities of prompts that come while others run; the longer ones,
    of several pieces, begin alike."""
    room = 31 if model.config.kv_lora_rank is None else 0  # latents are kept whole
    engine = Engine(model, Capacity(3, 40, 9, prompt_room=room, steady=True), logprobs=3)
    waiting, found = [*prompts()[:2], *(prompts()[4] * 2 + p for p in prompts()[:3])], []
    while waiting or engine.busy:
        if waiting:
            sampling = Sampling(4, temperature=len(waiting) % 2, seed=3)
            engine.submit(len(waiting), waiting.pop(), sampling, told=len(waiting) > 1)
        found += [tuple(token) for token in engine.step().tokens]
    return found


def check(path, dist, size, stream) -> int:
    """Groups of `size` ranks have the numbers of this rank alone, each reads its own layers, and
    they weigh what costs/shards.py says. How many numbers were compared."""
    ckpt = checkpoint.open(path)
    facts = facts_of(ckpt, None, "float32", "cpu")
    whole = ckpt.load("float32")
    wanted = numbers(whole, facts, ALONE, stream) | {"served": served(whole)}
    dist = in_groups(dist, size, ckpt.config, "float32")
    read, real = set(), filling.read

    def noting(stored, *more):
        read.add(next(name for name, tensor in ckpt.tensors.items() if tensor is stored))
        return real(stored, *more)

    filling.read = noting
    model = load(ckpt, "float32", dist)
    filling.read = real
    check_shares(ckpt, model, dist, dist.gather(read))
    found = numbers(model, facts, dist, stream) | {"served": served(model)}
    wrong = [name for name in wanted if found[name] != wanted[name]]
    assert not wrong, (path, size, wrong)
    return len(wanted)


def check_rounded(path, dist, size, stream, rules) -> None:
    """Weights rounded in groups of `size` ranks are those rounded on this rank alone, under one
    rule after another and then as they were, and so are their sizes; and so is what sets each apart
    from a reference, which the ranks of a group hold between them as well."""
    ckpt = checkpoint.open(path)
    facts = facts_of(ckpt, None, "float32", "cpu")
    groups = in_groups(dist, size, ckpt.config, "float32")
    whole, part = (Weights(load(ckpt, "float32", d), keep=True) for d in (ALONE, groups))
    windows = Windows(len(stream), T, 12)
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder), Path(dist.broadcast(folder)) / "together"
        against = [open_reference(str(path), "float32", facts) for _ in places]
        for rule in (*rules, None):
            found = []
            for weights, d, own, place in zip((whole, part), (ALONE, groups), against, places):
                local = Local(weights.under(rule), facts=facts, dist=d)
                totals, tokens = own.compare(local, stream, windows, 4, place)
                rows = local.score_rows(some_rows(), 60)
                arrays = totals.nll, tokens.kl, tokens.same_top, rows.choices, rows.targets
                found.append([*(a.tobytes() for a in arrays), local.ran().get("quantisation")])
            assert found[0] == found[1], (path, size, rule)
            assert (tokens.kl == 0).all() == (rule is None), (path, rule)
        dist.barrier()


def check_shares(ckpt, model, dist, read) -> None:
    """read: the names of the tensors that each rank read."""
    config, setup = ckpt.config, Setup(dtype="fp32", training=False, shard=dist.group_size)
    held = dist.gather(sum(p.numel() * p.element_size() for p in model.parameters()))
    groups = [held[i : i + dist.group_size] for i in range(0, dist.world_size, dist.group_size)]
    wanted = [weight_bytes(*share) for share in shares(config, setup)]
    assert groups == [wanted] * dist.n_groups, (ckpt.path, groups, wanted)
    own = [read[rank] for rank in dist.members]
    assert set().union(*own) == set(ckpt.tensors), ckpt.path
    twice = {name for i, a in enumerate(own) for b in own[:i] for name in a & b}
    tied = config.tie_embeddings and dist.group_size > 1
    assert len(twice) == tied, (ckpt.path, twice)  # an embedding that is a head as well
    blocks = [{name for name in names if ".layers." in name or ".h." in name} for names in own]
    assert all(blocks), "each has a layer"


def open_shard(path):
    return open_stream("fineweb_npy", [path], None)

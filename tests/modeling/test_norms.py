"""The residual stream, whose sums wait for the norm after them: the bits of sums made at once, in
every order of a block, and none made apart but where no norm follows."""

import pytest
import torch
from builders import tiny_model

from modeling.norms import Norm, Stream

KINDS = {
    "llama": {},
    "gpt": {},
    "parallel": {"parallel_residual": True},
    "one norm": {"parallel_residual": True, "shared_norm": True},
    "norms around": {"post_norm": True},
    "scaled": {"post_norm": True, "residual_scale": 0.5},
    "norms behind": {"pre_norm": False, "post_norm": True},
}


def model_of(name):
    return tiny_model("gpt" if name == "gpt" else "llama", n_layers=3, **KINDS[name])


def by_hand(model, x):
    """Blocks as their paper draws them, each sum made where it stands."""
    c, scale = model.config, model.config.residual_scale
    rope = model._ropes(torch.arange(x.shape[1]), x.shape[1]).get("global")
    for block in model.blocks:
        a = block.ln1_post(block.attn(block.ln1(x), rope, None, None)) * scale
        before = x if c.parallel_residual else x + a
        h = block.ln1(before) if c.shared_norm else block.ln2(before)
        x = x + a
        x = x + block.ln2_post(block.mlp(h)) * scale
    return x


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_bits_of_sums_made_at_once(name):
    model, ids = model_of(name), torch.arange(24).view(2, 12)
    positions = torch.arange(12)
    wanted = by_hand(model, model.embed(ids, positions))
    assert torch.equal(model.through_blocks(ids, positions, None).whole(), wanted)
    x = model.embed(ids, positions)
    for block in model.blocks:  # as a compiled block and a backward have them: whole
        x = block(x, model._ropes(positions, 12).get("global"))
        assert isinstance(x, torch.Tensor)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    "name, taken", [("llama", 6), ("gpt", 6), ("parallel", 3), ("norms around", 6), ("scaled", 6)]
)
@torch.no_grad()
def test_norms_take_over_all_sums_that_they_follow(name, taken, monkeypatch):
    """Of three layers' six, the last by the norm before the head; of parallel branches half."""
    calls, after = [], Norm.after
    monkeypatch.setattr(Norm, "after", lambda *args: calls.append(0) or after(*args))
    model_of(name).hidden(torch.arange(8)[None])
    assert len(calls) == taken


def test_with_gradients_every_block_gives_the_sum():
    model, seen = model_of("llama").train(), []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model.hidden(torch.arange(8)[None]).sum().backward()
    with torch.no_grad():
        model.hidden(torch.arange(8)[None])
    assert isinstance(seen[0], torch.Tensor) and isinstance(seen[1], Stream)

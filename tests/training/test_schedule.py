"""training/schedule.py against closed formulas, and transformers' WSD."""

import math

import pytest
import torch

from training.options import OptimizationOptions
from training.schedule import schedule

transformers = pytest.importorskip("transformers")


def factors(steps=100, warmup=10, **options):
    options = OptimizationOptions(num_steps=steps, warmup_steps=warmup, **options)
    factor = schedule(options)
    return [factor(step) for step in range(steps + 1)]


def test_cosine_and_linear():
    for step, got in enumerate(factors(lr_scheduler="cosine", min_lr_ratio=0.1)):
        done = (step - 10) / 90
        wanted = (step + 1) / 10 if step < 10 else 0.55 + 0.45 * math.cos(math.pi * done)
        assert got == pytest.approx(wanted, abs=1e-12)
    got = factors(lr_scheduler="linear", min_lr_ratio=0.0)
    assert got[55] == pytest.approx(0.5) and got[100] == 0.0
    assert factors(lr_scheduler="constant")[9:] == [1.0] * 92


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt", "exponential"])
def test_wsd_stays_and_then_decays(shape):
    got = factors(lr_scheduler="wsd", decay_steps=40, decay_shape=shape, min_lr_ratio=0.2)
    assert got[9:61] == [1.0] * 52 and got[60] > got[61]
    for step in range(60, 101):
        t = (step - 60) / 40
        down = {"linear": t, "cosine": (1 - math.cos(math.pi * t)) / 2, "sqrt": t**0.5}
        wanted = 0.2**t if shape == "exponential" else 1 - 0.8 * down[shape]
        assert got[step] == pytest.approx(wanted, abs=1e-12), step
    assert got[100] == pytest.approx(0.2)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_wsd_is_transformers(shape):
    """After the warm-up, which theirs begins at the least rate and a step earlier."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_wsd_schedule(
        optimizer, 10, 30, num_stable_steps=60, decay_type=shape, min_lr_ratio=0.1
    ).lr_lambdas[0]
    ours = factors(lr_scheduler="wsd", decay_steps=30, decay_shape=shape, min_lr_ratio=0.1)
    assert ours[10:] == pytest.approx([theirs(step) for step in range(10, 101)], abs=1e-12)


def test_rewarming_begins_where_the_cycle_before_ended():
    got = factors(200, lr_scheduler="cosine", rewarm=(100,), min_lr_ratio=0.1)
    assert got[:100] == factors(lr_scheduler="cosine", min_lr_ratio=0.1)[:100]
    for step in range(100, 201):
        n = step - 100
        warm = 0.1 + 0.9 * (n + 1) / 10
        cold = 0.55 + 0.45 * math.cos(math.pi * (n - 10) / 90)
        assert got[step] == pytest.approx(warm if n < 10 else cold, abs=1e-12), step
    thrice = factors(300, lr_scheduler="wsd", rewarm=(100, 150), decay_steps=20)
    assert thrice[99] < 0.2 and thrice[109:131] == [1.0] * 22 and thrice[159:281] == [1.0] * 122
    # a longer run, of which the first cycle is what was run before: nothing of it changes
    assert thrice[:100] == factors(lr_scheduler="wsd", decay_steps=20)[:100]


def test_a_state_holds_no_function():
    """What LambdaLR saves must be read again by weights_only."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    state = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(OptimizationOptions()))
    assert state.state_dict()["lr_lambdas"] == [None]


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(lr_scheduler="wsd", decay_steps=95), "--warmup-steps 10 and --decay-steps 95 do not"),
        (dict(rewarm=(100,)), "--rewarm: a cycle from step 100 to 100 has no steps"),
        (dict(rewarm=(50, 40)), "from step 50 to 40 has no steps"),
        (dict(lr_scheduler="wsd", rewarm=(15,), decay_steps=9), "the 15 steps of a cycle"),
        (dict(decay_steps=5), "--decay-steps goes with --lr-scheduler wsd"),
        (dict(decay_shape="linear"), "--decay-shape goes with --lr-scheduler wsd"),
        (
            dict(lr_scheduler="wsd", decay_shape="exponential", min_lr_ratio=0.0),
            "--decay-shape exponential needs a --min-lr-ratio above 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        factors(**options)

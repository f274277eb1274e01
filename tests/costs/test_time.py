"""costs/time.py against measured prefill and decode."""

import pytest
from small_models import measured

from config import load_config
from costs.flops import estimate_flops
from costs.gpus import find_gpu
from costs.symbols import Setup
from costs.time import Ceilings, pass_seconds, roofline, training_time, turning_batch


def test_turning_batches_and_ideal_decode():
    for name, batch in (("a100", 153), ("h100", 295), ("h200", 206)):
        turning = turning_batch(find_gpu(name), Setup(training=False))
        assert turning == pytest.approx(batch, abs=0.6)
    perfect = dict(ceilings=Ceilings(1.0, 1.0, 1.0, 0.0), compiled=True)
    c = load_config("llama3-8b")
    ideal = roofline(c, find_gpu("h200"), 1, 1024, 2, **perfect)
    assert ideal["decode_tokens_per_second"] == pytest.approx(317, rel=0.01)
    products = estimate_flops(c, 1, 2048)["forward_causal"] / find_gpu("h200").bf16_flops
    assert products < roofline(c, find_gpu("h200"), 1, 2048, **perfect)["prefill_seconds"]


TIMES = [r for r in measured("roofline.json") if r["shape"][1] not in ("llama3.2-1b", "13b")]


@pytest.mark.parametrize("record", TIMES, ids=lambda record: "-".join(map(str, record["shape"])))
def test_times_measured_on_a_gpu(record):
    """Of shapes that the default ceilings were not fitted to."""
    kind, config, B, T = record["shape"]
    new, context = (T, T) if kind == "prefill" else (1, T + 1)
    c, setup = load_config(config), Setup(training=False)
    seconds = pass_seconds(c, find_gpu("h100"), B, new, context, setup)["seconds"]
    assert seconds == pytest.approx(record["measured"]["seconds"], rel=0.15)


def test_training_time_follows_from_flops_and_mfu():
    c, gpu = load_config("7b"), find_gpu("h100")
    run = training_time(c, gpu, 2048, 1e9, n_gpus=8, assumed_mfu=0.5)
    per_token = estimate_flops(c, 1, 2048)["per_token"]["training"]
    seconds = 1e9 * per_token / (0.5 * 8 * gpu.bf16_flops)
    assert run["days"] * 86400 == pytest.approx(seconds)
    assert run["gpu_days"] == 8 * run["days"] and run[
        "tokens_per_second"
    ] * seconds == pytest.approx(1e9)
    assert training_time(c, gpu, 2048, 1e9, 8, 0.5, lora_rank=8)["days"] < run["days"]

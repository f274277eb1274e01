"""FLOPs that CUDA really executes, as FlopCounterMode sees flash attention's kernels.

    python -m pytest -q tests/gpu/test_compute_gpu.py

The counter takes no account of causality, so these are full-mask counts; flash attention's backward
computes the scores again: 3.5 x its forward instead of 3 x.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from config import config_to_hf, load_config
from costs.flops import estimate_flops
from costs.gpus import find_gpu
from model import GPTModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = ("gpt2", "llama3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b")


def counter_knows_grouped_queries() -> bool:
    try:
        return bool(sdpa_flop_count((1, 2, 4, 4), (1, 1, 4, 4), (1, 1, 4, 4)))
    except AssertionError:
        return False


def small(name):
    """Two layers and a vocabulary that needs no padding; widths as they are, and heads where this
    version of torch can count grouped queries."""
    c = load_config(name).replace(n_layers=2, vocab_size=1024, dropout=0.0)
    return c if counter_knows_grouped_queries() else c.replace(n_kv_heads=c.n_heads)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_our_training_step_executes_what_is_estimated(name, recompute):
    c, B, T = small(name), 2, 512
    with torch.device("cuda"):
        model = GPTModel(c).train()
        ids = torch.randint(0, c.vocab_size, (B, T))
    model.activation_checkpointing = recompute == "full"
    flops = estimate_flops(c, B, T, recompute=recompute)

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return model(ids, labels=ids)[1]

    with torch.no_grad():
        assert counted(forward) == flops["forward"]
    assert counted(lambda: forward().backward()) == flops["training_executed"]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_training_step_executes_what_is_estimated(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    c, B, T = small(name), 2, 512
    hf = AutoConfig.for_model(**config_to_hf(c))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16).train()
        ids = torch.randint(0, c.vocab_size, (B, T))
    angles = T * c.head_dim if c.position == "rope" else 0  # positions x frequencies, a product
    expected = estimate_flops(c, B, T)["training_executed"] + angles
    assert counted(lambda: model(ids, use_cache=False).logits.sum().backward()) == expected


def test_this_gpu_is_known():
    gpu = find_gpu(torch.cuda.get_device_name())
    assert gpu is not None, f"{torch.cuda.get_device_name()} is not in costs/gpus.py"
    total = torch.cuda.get_device_properties(0).total_memory
    assert gpu.memory == pytest.approx(total, rel=0.02), (gpu.memory, total)

"""costs/gpus.py: names of devices, and published MFUs."""

import pytest
from small_models import megatron

from config import GPTConfig, load_config
from costs.flops import count_parameters, estimate_flops
from costs.gpus import GPU, find_gpu, mfu


def test_find_gpu():
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100 80GB PCIe": "a100-pcie",
        "Tesla V100-SXM2-32GB": "v100-32gb",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "Tesla T4": "t4",
        "h100": "h100",
    }
    assert {name: find_gpu(name).name for name in names} == names
    for unknown in (
        "cpu",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):
        assert find_gpu(unknown) is None


# GPUs, batch, seconds, MFU: Korthikanti et al. 2022, table 5, A100 at 312 TFLOP/s
@pytest.mark.parametrize(
    "heads, width, layers, gpus, batch, seconds, published",
    [
        (64, 6144, 48, 8, 4, 1.10, 0.415),
        (96, 12288, 96, 64, 64, 13.75, 0.514),
        (128, 20480, 105, 280, 280, 37.83, 0.560),
        (160, 25600, 128, 512, 512, 71.49, 0.563),
    ],
)
def test_korthikanti_mfu(heads, width, layers, gpus, batch, seconds, published):
    flops = estimate_flops(megatron(heads, width, layers), batch, 2048)["training"]
    assert mfu(flops, seconds, gpus, find_gpu("a100")) == pytest.approx(published, abs=0.002)


def test_nanogpt_and_palm_mfu():
    flops = estimate_flops(load_config("gpt2"), 100, 1024)["training"]
    assert mfu(flops, 0.755, 1, find_gpu("a100")) == pytest.approx(0.3714, abs=0.0002)
    palm = GPTConfig(  # Chowdhery et al. 2022: 540B, multi-query, 238.3k tokens/s on 6,144 TPU v4
        vocab_size=256000, max_position_embeddings=2048, n_layers=118, n_heads=48, n_kv_heads=1,
        head_dim=256, d_model=18432, d_ff=4 * 18432, gated_mlp=True, activation="silu",
        position="rope", norm="rmsnorm", bias=False,
    )  # fmt: skip
    assert count_parameters(palm)["total"] / 1e9 == pytest.approx(540.35, abs=0.05)
    tpu = GPU("tpu-v4", "", 275e12, 0, 0, 0)
    rate = estimate_flops(palm, 1, 2048)["per_token"]["training"] * 238_300
    assert mfu(rate, 1.0, 6144, tpu) == pytest.approx(0.462, abs=0.001)

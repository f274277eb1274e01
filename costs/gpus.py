"""GPUs by name, with the peaks of their datasheets, and what a job reached of them.

gpu = find_gpu(torch.cuda.get_device_name())      # or find_gpu("h100"); None: not in the table
mfu(flops, seconds, n_gpus, gpu)
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Datasheet peaks, dense (no sparsity); memory as torch reports it, in bytes."""

    name: str
    words: str  # all of them occur in torch.cuda.get_device_name
    bf16_flops: float  # FLOP/s; FP16's where the chip has no BF16
    fp32_flops: float  # FLOP/s without TF32
    bandwidth: float  # bytes/s
    memory: float  # bytes


def _gpu(name, words, bf16, fp32, bandwidth, gib) -> GPU:
    """TFLOP/s, TB/s and GiB to plain units."""
    return GPU(name, words, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e12, gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # TFLOP/s bf16 and fp32, TB/s, GiB
        _gpu("h200", "H200", 989.4, 66.9, 4.8, 139.8),
        _gpu("h200-nvl", "H200 NVL", 835.5, 60.0, 4.8, 139.8),
        _gpu("gh200", "GH200", 989.4, 66.9, 4.0, 94.5),
        _gpu("h100", "H100", 989.4, 66.9, 3.35, 79.1),
        _gpu("h100-pcie", "H100 PCIE", 756.0, 51.2, 2.0, 79.1),
        _gpu("h100-nvl", "H100 NVL", 835.5, 60.0, 3.9, 93.1),
        _gpu("h800", "H800", 989.4, 66.9, 3.35, 79.1),
        _gpu("h20", "H20", 148.0, 44.0, 4.0, 95.1),
        _gpu("b200", "B200", 2250.0, 80.0, 8.0, 178.3),
        _gpu("a100", "A100 80GB", 312.0, 19.5, 2.039, 79.2),
        _gpu("a100-pcie", "A100 80GB PCIE", 312.0, 19.5, 1.935, 79.2),
        _gpu("a100-40gb", "A100", 312.0, 19.5, 1.555, 39.4),
        _gpu("a800", "A800", 312.0, 19.5, 2.039, 79.2),
        _gpu("l40s", "L40S", 362.0, 91.6, 0.864, 44.4),
        _gpu("l4", "L4", 121.0, 30.3, 0.3, 22.0),
        _gpu("a10g", "A10G", 70.0, 31.2, 0.6, 22.0),
        _gpu("a10", "A10", 125.0, 31.2, 0.6, 22.0),
        _gpu("a6000", "A6000", 154.8, 38.7, 0.768, 47.4),
        _gpu("6000-ada", "6000 ADA", 364.2, 91.1, 0.96, 47.4),
        _gpu("rtx4090", "RTX 4090", 165.2, 82.6, 1.008, 23.5),
        _gpu("rtx3090", "RTX 3090", 71.0, 35.6, 0.936, 23.6),
        _gpu("v100", "V100", 125.0, 15.7, 0.9, 15.8),
        _gpu("v100-32gb", "V100 32GB", 125.0, 15.7, 0.9, 31.7),
        _gpu("t4", "T4", 65.0, 8.1, 0.32, 14.6),
        _gpu("mi300x", "MI300X", 1307.4, 163.4, 5.3, 191.5),
    )
}
OTHER_CHIPS = {"LAPTOP", "MIG", "D"}  # namesakes with other peaks


def find_gpu(device_name: str) -> GPU | None:
    """The GPU of a table name ("h100") or a torch.cuda.get_device_name ("NVIDIA H100 80GB HBM3").

    The entry with most matching words wins; None for a chip that is not in the table.
    """
    if device_name.lower() in GPUS:
        return GPUS[device_name.lower()]
    words = set(re.split(r"[\s_-]+", device_name.upper()))
    if words & OTHER_CHIPS:
        return None
    found = [gpu for gpu in GPUS.values() if set(gpu.words.split()) <= words]
    return max(found, key=lambda gpu: len(gpu.words.split()), default=None)


def mfu(flops: float, seconds: float, n_gpus: int, gpu: GPU) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022): model FLOPs done over what the dense bf16
    peak allows. Evaluation counts `forward_causal`, training `training` of `estimate_flops`."""
    return flops / (seconds * n_gpus * gpu.bf16_flops)

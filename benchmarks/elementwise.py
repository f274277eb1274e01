"""gpu_kernels/elementwise.py beside PyTorch's own operations, eager, on one GPU.

    python benchmarks/elementwise.py --out benchmarks/results/elementwise.json

16,384 rows of bfloat16 products of three widths; medians of 50 calls after 5, timed by CUDA events.
Bandwidth counts each input read once and each output written once.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from gpu_kernels import elementwise  # noqa: E402
from gpu_kernels.elementwise import Terms  # noqa: E402
from modeling.rotary import rotate  # noqa: E402

ROWS = 16384
WIDTHS = {"gpt2": (768, 3072), "gpt2-xl": (1600, 6400), "7b": (4096, 11008)}
HALF = torch.bfloat16


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": {}}
    for name, (width, d_ff) in WIDTHS.items():
        for what, n_bytes, plain, ours in cases(width, d_ff):
            row = {"plain_ms": milliseconds(plain, True), "ours_ms": milliseconds(ours, False)}
            row["TB/s"] = n_bytes / row["ours_ms"] / 1e9
            report["cases"][f"{name} {what}"] = row
            print(
                f"{name:<8} {what:<10} {row['plain_ms']:7.3f} -> {row['ours_ms']:6.3f} ms"
                f"  {row['plain_ms'] / row['ours_ms']:5.1f}x  {row['TB/s']:.2f} TB/s"
            )
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def cases(width, d_ff):
    """(what, bytes moved at least, PyTorch's way, ours)"""
    x, w = torch.randn(ROWS, width, device="cuda"), torch.randn(width, device="cuda")
    yield (
        "RMSNorm",
        ROWS * width * 6,
        lambda: F.rms_norm(x, (width,), w, 1e-5).to(HALF),
        lambda: elementwise.norm(x, Terms(w, None, 1e-5, True), HALF),
    )
    yield (
        "LayerNorm",
        ROWS * width * 6,
        lambda: F.layer_norm(x, (width,), w, w, 1e-5).to(HALF),
        lambda: elementwise.norm(x, Terms(w, w, 1e-5, False), HALF),
    )
    h = torch.randn(ROWS, 2 * d_ff, device="cuda", dtype=HALF)
    yield (
        "SiLU gate",
        ROWS * d_ff * 6,
        lambda: F.silu(h[:, :d_ff]) * h[:, d_ff:],
        lambda: elementwise.gated(h, "silu"),
    )
    heads = torch.randn(16, ROWS // 16, 2 * width // 64, 64, device="cuda", dtype=HALF)
    angle = torch.randn(1, ROWS // 16, 1, 32, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    yield (
        "rotary",
        heads.numel() * 4,
        lambda: rotate(heads, cos, sin),  # with gradients on: the plain twin
        lambda: elementwise.rotate_(heads, cos, sin),
    )


def milliseconds(call, gradients: bool) -> float:
    with torch.set_grad_enabled(gradients):
        times = []
        for i in range(55):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times += [start.elapsed_time(end)] if i >= 5 else []
    return statistics.median(times)


if __name__ == "__main__":
    cli.run(main)

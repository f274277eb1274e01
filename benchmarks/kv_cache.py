"""Decoding at long contexts with keys and values in bfloat16, int8 and fp8, in one run on one GPU.

    python benchmarks/kv_cache.py --out benchmarks/results/kv_cache.json        # a minute
    python benchmarks/kv_cache.py --only "sweep int8" --out …    # other constants of the kernel
    python benchmarks/kv_cache.py --small --out /tmp/k.json      # a CPU's rehearsal

A 7B Llama shape in bfloat16 with random weights; prompts of 2,048 random tokens, each its own, so
that none is shared; greedy. `few rows` are 32, `most rows` as many as fit beside the model with 256
new tokens by the engine's own reckoning, which evaluations use. Prefill: all prompts, to the first
token. Decoding: the mean of 48 steps under a CUDA graph, not compiled, after 8. The limit is what a
step reads at the datasheet's bandwidth: weights without the input embedding, and keys, values and
scales. `kernel`: attention of 32 rows over their prompts, one layer after another.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from generation import random_model, release, synchronize  # noqa: E402

import cli  # noqa: E402
from backends import Sampling  # noqa: E402
from backends.engine import Capacity, Engine, default_batch_size  # noqa: E402
from backends.kvcache import token_bytes  # noqa: E402
from benchmarks import cases  # noqa: E402
from config import load_config  # noqa: E402
from gpu_kernels import decode_attention as kernel  # noqa: E402
from gpu_kernels.kv_codes import DTYPES, Codes  # noqa: E402

KINDS = (None, "int8", "fp8")
ROWS, NEW, WARM, STEPS = 32, 256, 8, 48
PLAIN, CODES = ("BLOCK_BYTES", "WARPS", "STAGES"), ("CODE_BYTES", "CODE_WARPS", "CODE_STAGES")
SWEPT = ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3))


def decoded(model, gpu, prompt: int, rows: int, kind: str | None) -> dict:
    """Rows that go on from prompts of their own."""
    release()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    g, steps = np.random.default_rng(0), WARM + STEPS
    capacity = Capacity(rows, prompt, NEW, kv_dtype=kind)
    start = time.perf_counter()
    engine = Engine(model, capacity, features=frozenset())
    synchronize()
    setup = time.perf_counter() - start
    for i, ids in enumerate(g.integers(0, model.config.vocab_size, (rows, prompt)).tolist()):
        engine.submit(i, ids, Sampling(steps + 8))
    start = time.perf_counter()
    engine.step()
    synchronize()
    prefill = time.perf_counter() - start
    for _ in range(WARM):
        engine.step()
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    synchronize()
    step = (time.perf_counter() - start) / STEPS
    c = model.config
    seen = rows * (prompt + WARM + STEPS / 2) * c.n_layers * token_bytes(c, model.dtype, kind)
    weights = sum(p.nbytes for n, p in model.named_parameters() if n != "token_embedding.weight")
    limit = (weights + seen) / gpu.bandwidth
    result = {"rows": rows, "ms_per_step": step * 1e3, "tokens_per_s": rows / step}
    result |= {"share_of_limit": limit / step, "prefill_s": prefill, "setup_s": setup}
    result["cache_GB"] = (
        rows * (prompt - 1 + NEW) * c.n_layers * token_bytes(c, model.dtype, kind) / 1e9
    )
    if model.device.type == "cuda":
        result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def attention(gpu, small: bool, device: str, kind: str | None, way: tuple[int, int, int]) -> dict:
    """us of a layer. way: keys of a step of the kernel's loop, warps, stages."""
    B, G, D, P, S, layers = (4, 2, 32, 70, 8, 1) if small else (ROWS, 32, 128, 2048, 64, 3)
    dtype, plain = torch.bfloat16, torch.randn(B, G, P, D, device=device).bfloat16()
    q, new = (torch.randn(B, G, D, device=device).to(dtype) for _ in range(2))

    def room(length):
        if kind is None:
            return plain[:, :, :length].clone()
        return Codes.of(plain[:, :, :length], DTYPES[kind])

    kept = [[room(n) for n in (S, S, P, P)] for _ in range(layers)]
    own, full = (torch.full((B,), n, device=device) for n in (0, P))
    rows = torch.arange(B, device=device)
    tiles = kernel.plan_tiles(range(B), B, 1, dtype).to(device)
    names, before = CODES if kind else PLAIN, {n: getattr(kernel, n) for n in (*CODES, *PLAIN)}

    def run():
        for k, v, prompt_k, prompt_v in kept:
            prompts = prompt_k, prompt_v, full
            kernel.decode_attention(q, new, new, (k, v, own), prompts, rows, tiles, 1)

    try:
        for name, value in zip(names, (way[0] * D * (1 if kind else 2), *way[1:])):
            setattr(kernel, name, value)
        run()
        if device == "cpu":
            return {"us": 0.0}
        us = cases.seconds_under_graph(run) * 1e6 / layers
    finally:
        for name, value in before.items():
            setattr(kernel, name, value)
    each = 2 * D if kind is None else D + 4
    return {"us": us, "share_of_limit": 2 * B * G * P * each / gpu.bandwidth / us * 1e6}


def all_cases(small: bool, device: str, gpu):
    """(name, function)"""
    for kind in KINDS:
        for way in SWEPT if kind else SWEPT[:1]:
            name = f"sweep {kind or 'bf16'}, {', '.join(map(str, way))}"
            yield name, lambda a=(kind, way): attention(gpu, small, device, *a)
    for kind in KINDS:
        names = CODES if kind else PLAIN
        size, *rest = (getattr(kernel, name) for name in names)
        way = (size // (128 if kind else 256), *rest)
        name = f"kernel {kind or 'bf16'}"
        yield name, lambda a=(kind, way): attention(gpu, small, device, *a)
    config, prompt, held = load_config("7b"), 24 if small else 2048, {}
    if small:
        tiny = dict(vocab_size=128, n_layers=2, d_model=64, d_ff=96, n_heads=4, n_kv_heads=4)
        config = config.replace(**tiny, head_dim=16)

    def model():
        if not held:
            held["model"] = random_model(config, device)
        return held["model"]

    def most(kind):
        return 4 if small else default_batch_size(model(), prompt, NEW, kv_dtype=kind)

    for kind in KINDS:
        few, name = 2 if small else ROWS, kind or "bf16"
        yield f"few rows {name}", lambda a=(few, kind): decoded(model(), gpu, prompt, *a)
    for kind in KINDS:
        name = f"most rows {kind or 'bf16'}"
        yield name, lambda kind=kind: decoded(model(), gpu, prompt, most(kind), kind)


def line(name, result) -> str:
    words = [f"{name:24}"]
    if "error" in result:
        return f"{words[0]}  FAILED: {result['error']}"
    for key, form in (
        ("rows", "{:4d} rows"), ("tokens_per_s", "{:9,.0f} tok/s"),
        ("ms_per_step", "{:7.2f} ms/step"), ("us", "{:8.1f} us"), ("share_of_limit", "{:6.1%}"),
        ("prefill_s", "prefill {:5.2f} s"), ("cache_GB", "cache {:5.1f} GB"),
        ("peak_GiB", "{:5.1f} GiB"),
    ):  # fmt: skip
        if key in result:
            words.append(form.format(result[key]))
    return "  ".join(words)


def main(argv=None):
    args = cases.parser(__doc__, budget=150).parse_args(argv)
    device, gpu, report = cases.begin(args)
    cases.measure(all_cases(args.small, device, gpu), args, report, line)
    for which in ("few", "most"):
        found = [report["cases"].get(f"{which} rows {kind or 'bf16'}", {}) for kind in KINDS]
        speeds = [one.get("tokens_per_s") for one in found]
        if all(speeds):
            ratios = ", ".join(f"{k} {s / speeds[0]:.2f}" for k, s in zip(KINDS[1:], speeds[1:]))
            print(f"{which} rows, tokens/s beside bf16: {ratios}")


if __name__ == "__main__":
    cli.run(main)

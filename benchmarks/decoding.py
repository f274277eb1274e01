"""Where the time of a decode step goes: 200 rows of a 7B that go on from one 150-token prompt.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json              # a minute
    python benchmarks/decoding.py --small --out /tmp/d.json                           # a rehearsal

`profile`: torch.profiler over steps of an engine half-way through 256 new tokens, kernel by kernel,
the time between kernels, and what the host does meanwhile; `compiled` of 4 layers only, beside as
many eager ones, since compiling 32 takes most of a minute. `products`: a layer's four and the head,
by cuBLAS, of so many rows. `attention`: of a layer, over own keys of three lengths, with other
constants of the kernel (keys of a step of its loop, warps, stages, programs beyond which keys are
not split). `sampling`: temperature 0.8 and top-p 0.95, beside the plain operations. Times are of
CUDA graphs, replayed.
"""

import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from generation import SAMPLED, Size, random_model, release, synchronize  # noqa: E402

import cli  # noqa: E402
from backends import sampling  # noqa: E402
from backends.engine import Capacity, Engine  # noqa: E402
from benchmarks import cases  # noqa: E402
from config import load_config  # noqa: E402
from gpu_kernels import decode_attention, token_sampling  # noqa: E402

PROFILED = 6  # steps
TILES = ((64, 4, 2, 264), (64, 4, 2, 132), (64, 4, 3, 264), (32, 4, 2, 264), (32, 4, 3, 264))
TILES += ((64, 4, 1, 264), (128, 4, 1, 264), (64, 2, 2, 264), (32, 2, 2, 264))
DRAWS = ((2048, 8), (4096, 16), (1024, 4))


def half_way(model, size, compiled: bool) -> Engine:
    """An engine whose rows have half of their tokens."""
    g = np.random.default_rng(0)
    prompt = g.integers(0, model.config.vocab_size, size.prompt).tolist()
    features = sampling.features_of([SAMPLED])
    new = max(size.new, 64)
    drawn = replace(SAMPLED, max_new_tokens=new)
    capacity = Capacity(size.rows, size.prompt, new, prompts=1)
    engine = Engine(model, capacity, features=features, compiled=compiled)
    engine.submit("it", prompt, drawn, range(size.rows))
    for _ in range(new // 2):
        engine.step()
    synchronize()
    return engine


def profile(model, size, compiled: bool, shown: int = 24) -> dict:
    """Microseconds of a step, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    engine = half_way(model, size, compiled)
    start = time.perf_counter()
    for _ in range(2 * PROFILED):
        engine.step()
    synchronize()
    wall = (time.perf_counter() - start) / 2 / PROFILED
    waited, look = [], engine.rows.look

    def timed_look(ticket):
        begin = time.perf_counter()
        for event in engine.rows.done[ticket : ticket + 1]:
            event.synchronize()
        waited.append(time.perf_counter() - begin)
        return look(ticket)

    engine.rows.look = timed_look
    start = time.perf_counter()
    for _ in range(PROFILED):
        engine.step()
    host = (time.perf_counter() - start - sum(waited)) / PROFILED
    engine.rows.look = look
    result = {"ms_per_step": wall * 1e3, "host_ms": host * 1e3}
    if model.device.type != "cuda":
        return result
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
        synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    total, count = defaultdict(float), defaultdict(int)
    for begin, end, name in spans:
        total[name] += (end - begin) / PROFILED
        count[name] += 1
    busy = sum(total.values())
    span = (spans[-1][1] - spans[0][0]) / PROFILED
    for name in sorted(total, key=total.get, reverse=True)[:shown]:
        print(f"  {total[name]:9.1f} us {count[name] / PROFILED:6.1f} x  {name[:110]}")
    print(f"  {busy:9.1f} us busy of {span:.1f}, {sum(count.values()) / PROFILED:.0f} kernels")
    largest = sorted(total, key=total.get, reverse=True)[:shown]
    rows = {name[:110]: [round(total[name], 1), count[name] / PROFILED] for name in largest}
    return result | {"busy_us": busy, "span_us": span, "kernels": rows}


def products(config, rows: int, bandwidth: float) -> dict:
    """Microseconds of each product of a layer, and of the head; of weights that no cache holds."""
    c, inner = config, config.n_heads * config.head_dim
    shapes = {"qkv": (c.qkv_dim, c.d_model), "out": (c.d_model, inner)}
    shapes |= {"fc1": (c.d_ff * (1 + c.gated_mlp), c.d_model), "fc2": (c.d_model, c.d_ff)}
    shapes |= {"head": (c.vocab_size, c.d_model)}
    on_gpu = torch.cuda.is_available()
    result, device = {}, "cuda" if on_gpu else "cpu"
    for name, (n_out, n_in) in shapes.items():
        copies = max(2, 2**28 // (2 * n_out * n_in)) if on_gpu else 1
        weights = torch.randn(copies, n_out, n_in, device=device, dtype=torch.bfloat16) * 0.02
        x = torch.randn(rows, n_in, device=device, dtype=torch.bfloat16)

        def run(weights=weights, x=x):
            for weight in weights:
                F.linear(x, weight)

        us = cases.seconds_under_graph(run) * 1e6 / copies if on_gpu else 1.0
        result[name] = {"us": us, "share_of_bandwidth": 2 * n_out * n_in / bandwidth / us * 1e6}
    result["us"] = sum(one["us"] for name, one in result.items() if name != "head")
    return result


def attention(size, G: int, R: int, tile: tuple[int, ...]) -> dict:
    """Microseconds of a layer's decode step, by own tokens of each row."""
    B, D, S, P, dtype, device = size.rows, 128, size.new, size.prompt, torch.bfloat16, "cuda"
    layers = 4  # more than the 50 MB of cache hold
    k, v = (torch.randn(layers, B, G, S, D, dtype=dtype, device=device) for _ in range(2))
    q = torch.randn(B, G * R, D, dtype=dtype, device=device)
    new = torch.randn(B, G, D, dtype=dtype, device=device)
    prompt_k, prompt_v = (torch.randn(1, G, P, D, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.zeros(B, dtype=torch.int64, device=device)
    zeros = torch.zeros(B, dtype=torch.int64, device=device)
    prompts = prompt_k, prompt_v, torch.full((1,), P, device=device)
    tiles = decode_attention.plan_tiles([0] * B, 1, R, dtype).to(device)
    names = ("BLOCK_BYTES", "WARPS", "STAGES", "PROGRAMS")
    saved, result = [getattr(decode_attention, n) for n in names], {}

    def run():
        for i in range(layers):
            own = k[i], v[i], lengths
            decode_attention.decode_attention(q, new, new, own, prompts, zeros, tiles, S)

    def set_to(values):
        for name, value in zip(names, values):
            setattr(decode_attention, name, value)

    set_to((tile[0] * D * 2, *tile[1:]))
    try:
        for n in (S // 4, S // 2, S - 36):
            lengths.fill_(n)
            us = cases.seconds_under_graph(run) * 1e6 / layers
            tb_per_s = 2 * 2 * G * D * (B * n + P) / us / 1e6
            result[str(n)] = {"us": us, "tb_per_s": tb_per_s}
    finally:
        set_to(saved)
    result["us"] = result[str(S // 2)]["us"]
    return result


def drawing(size, V: int, how: tuple[int, int] | None) -> dict:
    """Microseconds to draw a token for each row; how: logits of a step of the kernel's loop, and
    warps, or by plain operations."""
    B, device = size.rows, "cuda"
    logits = torch.randn(B, V, device=device).bfloat16() * 3
    keys = torch.randint(2**31 - 1, (B, 2), device=device).int()
    position = torch.arange(B, device=device).int()
    columns = {"temperature": 0.8, "top_p": 0.95, "top_k": 0}
    columns = {n: torch.full((B,), columns[n], device=device) for n in columns}
    columns["top_k"] = columns["top_k"].int()
    features = sampling.features_of([SAMPLED])
    if how is None:
        plain = sampling.sample_plainly
        us = cases.seconds_under_graph(lambda: plain(logits, keys, position, columns, features))
        return {"us": us * 1e6}
    names = "BLOCK", "WARPS"
    saved = [getattr(token_sampling, name) for name in names]
    try:
        for name, value in zip(names, how):
            setattr(token_sampling, name, value)
        draw = sampling.sample_tokens
        us = cases.seconds_under_graph(lambda: draw(logits, keys, position, columns, features))
        same = draw(logits, keys, position, columns, features)
        plain = sampling.sample_plainly(logits, keys, position, columns, features)
        return {"us": us * 1e6, "same": int((same == plain).sum())}
    finally:
        for name, value in zip(names, saved):
            setattr(token_sampling, name, value)


def all_cases(small: bool, size, device: str):
    """(name, function)"""
    config, held = load_config("7b"), {}
    if small:
        tiny = {"n_layers": 2, "d_model": 64, "d_ff": 96, "n_heads": 4, "n_kv_heads": 4}
        config = config.replace(vocab_size=100, head_dim=16, **tiny)

    def model(layers):
        if layers not in held:
            held.clear()
            release()
            held[layers] = random_model(config.replace(n_layers=layers), device)
        return held[layers]

    def profiled(layers, compiled):
        return lambda: profile(model(layers), size, compiled)

    few = min(4, config.n_layers)
    yield "profile eager", profiled(config.n_layers, False)
    for rows in (size.rows, 192, 208, 256):
        yield f"products, {rows} rows", lambda rows=rows: products(config, rows, size.bandwidth)
    if device == "cuda":
        for tile in TILES:
            yield f"attention 32x1, {tile}", lambda tile=tile: attention(size, 32, 1, tile)
        for how in (None, *DRAWS):
            yield f"sampling 32,000, {how}", lambda how=how: drawing(size, 32000, how)
        yield "sampling 151,936", lambda: drawing(size, 151936, DRAWS[0])
    yield f"profile eager, {few} layers", profiled(few, False)
    yield f"profile compiled, {few} layers", profiled(few, True)


def line(name, result) -> str:
    words = [f"{name:36}"]
    if "error" in result:
        return f"{words[0]}  FAILED: {result['error']}"
    for key, value in result.items():
        if isinstance(value, float) and key != "whole_s":
            words.append(f"{key} {value:.2f}")
        elif isinstance(value, dict) and "us" in value:
            words.append(f"{key} " + " ".join(f"{one:.3g}" for one in value.values()))
        elif key == "same":
            words.append(f"{value} as by plain operations")
    return "  ".join(words)


def main(argv=None):
    args = cases.parser(__doc__, budget=150).parse_args(argv)
    device, _, report = cases.begin(args)
    size = Size(args.small, *cases.measured_limits())
    report["limits"] = {"bytes_per_s": size.bandwidth, "flop_per_s": size.rate}
    print(report["gpu"], report["limits"], flush=True)
    cases.measure(all_cases(args.small, size, device), args, report, line)


if __name__ == "__main__":
    cli.run(main)

"""Packed weights beside bfloat16 on one GPU: kernels, decoding, scoring, a 70B on one card.

    python benchmarks/quantised.py --only "kernel" --out benchmarks/results/quantised.json
    python benchmarks/quantised.py --only "decode 1 " --out …      # "decode 16 ", "decode 64 "
    python benchmarks/quantised.py --only "score 7b" --out …       # "score 70b"
    python benchmarks/quantised.py --only "step 1 " --out …        # where the time of a step goes
    python benchmarks/quantised.py --only "of 16" --out …          # groups of 16
    python benchmarks/quantised.py --small --out /tmp/q.json       # a CPU's rehearsal

Random codes, made on the card; no file is read. Results of several calls gather in one file.
Kernels: each matrix of a 7B, so many copies of it in one CUDA graph that none is found in the L2
cache; the limit is its packed bytes at the datasheet's bandwidth; the peers are cuBLAS in bfloat16
and PyTorch's own int4 product. `sweep` tries other constants of the kernel: none is ever chosen at
run time. Groups of 16, with float32 scales as K-quants' are: the packed product beside dequantising
for each. Decoding: the engine's step under a CUDA graph, one prompt of 64 tokens, 128 new ones, the
second of two times; `step` gives its kernels by name, from the profiler, the time that none fills,
and what its bytes take at the datasheet's bandwidth. Scoring: windows of 2,048 as eval.py runs
them, medians of passes after two. The 70B is packed layer by layer; beside it the rate of its own
matrix products in bfloat16, measured in the same minute. transformers' own int8 and fp8 layers need
packages or kernels from a hub, so its peer here is its bfloat16 model.
"""

import collections
import itertools
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from experts import seconds_of, windows  # noqa: E402
from generation import measure, peer_model, random_model, release  # noqa: E402

import cli  # noqa: E402
from backends import Sampling, scoring  # noqa: E402
from backends.engine import Capacity, Engine  # noqa: E402
from benchmarks import cases  # noqa: E402
from config import GPTConfig, load_config  # noqa: E402
from costs.flops import estimate_flops  # noqa: E402
from gpu_kernels import low_bit_matmul as low_bit  # noqa: E402
from model import GPTModel  # noqa: E402
from modeling.mlp import Linear  # noqa: E402
from quantisation.codes import Codes  # noqa: E402
from quantisation.linear import pack_model, packed_of, weight_bytes  # noqa: E402

STD = 0.02  # of the weights that random codes stand for
RULES = {"w8": (8, None), "w4 g128": (4, 128), "fp8": (0, None)}  # bits (0: e4m3), group
OF_16 = {"w8 g16": (8, 16), "w4 g16": (4, 16)}  # GGUF's Q6_K and Q3_K, as they lie in memory
SWEPT = {  # (programs, rows of weights, warps, stages) of codes of so many bits
    4: ((600, 64, 2, 3), (600, 64, 2, 2), (600, 64, 2, 4), (600, 64, 4, 3), (600, 128, 4, 3),
        (300, 64, 2, 3), (1200, 64, 2, 3), (600, 32, 2, 3)),
    8: ((256, 64, 4, 5), (256, 64, 4, 3), (256, 64, 4, 8), (256, 64, 2, 5), (256, 128, 4, 5),
        (128, 64, 4, 5), (512, 64, 4, 5), (256, 32, 2, 5)),
}  # fmt: skip


class Size:
    def __init__(self, small: bool):
        self.batch, self.window, self.passes = (2, 24, 2) if small else (4, 2048, 7)
        self.prompt, self.new = (12, 8) if small else (64, 128)
        self.shapes = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
        self.big_batch = 2 if small else 8
        if small:
            self.shapes = [(192, 128), (130, 128)]


def shapes(small: bool) -> tuple[GPTConfig, GPTConfig]:
    found = load_config("7b"), load_config("70b")
    if small:
        tiny = dict(vocab_size=128, n_layers=2, d_model=128, d_ff=192, n_heads=4, n_kv_heads=2)
        return tuple(c.replace(**tiny, head_dim=32) for c in found)
    return found


# ---------------------------------------------------------------------------------------------
# Random weights


def random_codes(N: int, K: int, rule: str, device) -> Codes:
    bits, group = (RULES | OF_16)[rule]
    group = min(group or K, K)
    shape, n_groups = (N, K), -(-K // group)
    if bits == 0:
        q = torch.randn(shape, device=device, dtype=torch.bfloat16) * 112
        q, std = q.clamp(-448, 448).to(torch.float8_e4m3fn), 112
    else:
        most = 2 ** (bits - 1)
        q = torch.randint(-most, most, shape, dtype=torch.int8, device=device)
        std = most / 3**0.5
    scales = torch.rand(N, n_groups, device=device).add(0.5) * (STD / std)
    scales = scales.bfloat16() if rule in RULES and group < K else scales
    return Codes("random", bits or 8, q, scales)


def packed_model(c: GPTConfig, rule: str, device) -> GPTModel:
    """Layer by layer on `device`; nothing dense of them is ever there."""
    model = GPTModel.on_meta(c.replace(dropout=0.0))
    layers = {n: m for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, Linear)}
    activations = "e4m3" if rule == "fp8" else None
    codes = ((n, [random_codes(*m.weight.shape, rule, device)]) for n, m in layers.items())
    pack_model(model, codes, dtype=torch.bfloat16, activations=activations)
    model.allocate(torch.bfloat16, device)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if p.dim() == 1 and name.endswith("weight") else p.data.normal_(std=STD)
    return model.for_inference(torch.bfloat16)


def built(c: GPTConfig, rule: str, device) -> GPTModel:
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return random_model(c, device) if rule == "bf16" else packed_model(c, rule, device)


# ---------------------------------------------------------------------------------------------
# Kernels


def us_of(run, n: int) -> float:
    """Microseconds of one of the n products that `run` does, replayed as a CUDA graph."""
    if not torch.cuda.is_available():
        return seconds_of(run, 2) / n * 1e6
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:]) * 1e3 / n


def of_limit(us: float, size: int, gpu) -> dict:
    """A product that reads so many bytes."""
    limit = size / gpu.bandwidth * 1e6
    return {"us": us, "tb_per_s": size / us / 1e6, "share_of_limit": limit / us}


def copies(size: int, small: bool) -> int:
    """How many weights of so many bytes are more than the L2 cache holds."""
    return 2 if small else max(2, -(-250_000_000 // size))


def packed_kernel(N, K, rule, rows, gpu, small, device) -> dict:
    first = packed_of(random_codes(N, K, rule, device))[0]
    size = first.words.numel() * 2 + first.scales.numel() * first.scales.element_size()
    weights = [
        first._replace(words=first.words.clone(), scales=first.scales.clone())
        for _ in range(copies(size, small))
    ]
    arrivals = low_bit.arrivals_of(first)
    x = torch.randn(rows, K, device=device).bfloat16()

    def run():
        for weight in weights:
            if device == "cuda":
                low_bit.low_bit_matmul(x, weight, arrivals)
            else:
                low_bit.matmul_plain(x, weight, None)

    us = us_of(run, len(weights))
    return of_limit(us, size, gpu)


def dequantised_kernel(N, K, rule, rows, gpu, small, device) -> dict:
    """Made dense for each product, as layers are that the kernel does not take."""
    weight = packed_of(random_codes(N, K, rule, device))[0]
    x, n = torch.randn(rows, K, device=device).bfloat16(), 4  # 2 N K bytes are written and read
    us = us_of(
        lambda: [F.linear(x, low_bit.dequantise(weight, torch.bfloat16)) for _ in range(n)], n
    )
    return {"us": us}


def bf16_kernel(N, K, rows, gpu, small, device) -> dict:
    size = 2 * N * K
    weights = [
        torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(copies(size, small))
    ]
    x = torch.randn(rows, K, device=device).bfloat16()
    us = us_of(lambda: [F.linear(x, weight) for weight in weights], len(weights))
    return of_limit(us, size, gpu)


def torch_kernel(N, K, rows, gpu, small, device) -> dict:
    """PyTorch's int4 product of groups of 128, as gpt-fast calls it."""
    q = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
    size = N * K // 2 + N * K // 128 * 4
    weights = [torch._convert_weight_to_int4pack(q, 8) for _ in range(copies(size, small))]
    scales = torch.randn(K // 128, N, 2, device=device).bfloat16()
    x = torch.randn(rows, K, device=device).bfloat16()
    us = us_of(
        lambda: [torch._weight_int4pack_mm(x, w, 128, scales) for w in weights], len(weights)
    )
    return of_limit(us, size, gpu)


def swept(N, K, rule, rows, constants, gpu, small, device) -> dict:
    (bits, _), (programs, *way) = RULES[rule], constants
    ways, wanted = low_bit.WAYS[bits], low_bit.PROGRAMS[bits]
    try:
        low_bit.WAYS[bits], low_bit.PROGRAMS[bits] = {64: low_bit.Way(*way)}, programs
        return packed_kernel(N, K, rule, rows, gpu, small, device)
    finally:
        low_bit.WAYS[bits], low_bit.PROGRAMS[bits] = ways, wanted


# ---------------------------------------------------------------------------------------------
# Whole models


def decoded(model: GPTModel, size: Size, rows: int, compiled: bool) -> dict:
    g = np.random.default_rng(0)
    prompts = g.integers(0, model.config.vocab_size, (1, size.prompt)).tolist()
    limits = np.full((1, rows), size.new)
    options = dict(n_samples=rows, batch_size=rows, compile=compiled, units=[range(1)])
    result = measure(model, prompts, limits, Sampling(), **options)
    result |= {"ms_per_step": result["seconds"] / size.new * 1e3}
    return result | {"weights_GB": weight_bytes(model) / 1e9}


def stepped(model: GPTModel, size: Size, rows: int, compiled: bool, gpu) -> dict:
    """A decode step by itself, and its kernels, those first that take most of it: times a step, us
    of all. span_ms: from the first kernel to the last, busy_ms: of the kernels."""
    g, n, timed = np.random.default_rng(0), 8, 12
    capacity = Capacity(rows, size.prompt, size.new)
    engine = Engine(model, capacity, features=frozenset(), compiled=compiled)
    prompt = g.integers(0, model.config.vocab_size, size.prompt).tolist()
    engine.submit("one", prompt, Sampling(size.new), range(rows))
    for _ in range(16):
        engine.step()
    wall = seconds_of(lambda: [engine.step() for _ in range(timed)], 3) / timed
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(n):
            engine.step()
        torch.cuda.synchronize()
    found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    us, times = collections.Counter(), collections.Counter()
    for event in found:
        us[event.name[:60]] += event.time_range.elapsed_us() / n
        times[event.name[:60]] += 1 / n
    span = max(e.time_range.end for e in found) - min(e.time_range.start for e in found)
    weights = weight_bytes(model) - model.token_embedding.weight.nbytes
    return {
        "ms_per_step": wall * 1e3,
        "span_ms": span / n / 1e3,
        "busy_ms": sum(us.values()) / 1e3,
        "limit_ms": weights / gpu.bandwidth * 1e3,
        "head_limit_ms": model.lm_head.weight.nbytes / gpu.bandwidth * 1e3,
        "kernels": {
            name: [round(times[name], 2), round(us[name], 2)] for name, _ in us.most_common()
        },
    }


@torch.no_grad()
def scored(model: GPTModel, size: Size, gpu, compiled: bool, batch: int) -> dict:
    inputs, targets = windows(model.config, size, batch, model.device)
    nll = scoring.nll_function(model, compiled)
    took = seconds_of(lambda: nll(inputs, targets, None), size.passes)
    flops = estimate_flops(model.config, batch, size.window)["forward_causal"]
    result = {"tokens_per_s": batch * size.window / took, "ms": took * 1e3}
    result |= {"tflops": flops / took / 1e12, "share_of_limit": flops / gpu.bf16_flops / took}
    if torch.cuda.is_available():
        result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result


@torch.no_grad()
def matrix_rate(c: GPTConfig, size: Size, gpu, device) -> dict:
    """A block's four products in bfloat16, of as many tokens as are scored at a time."""
    M = size.big_batch * size.window
    inner = c.n_heads * c.head_dim
    sides = (c.qkv_dim, c.d_model), (c.d_model, inner), (2 * c.d_ff, c.d_model), (c.d_model, c.d_ff)
    weights = [torch.randn(s, device=device, dtype=torch.bfloat16) * STD for s in sides]
    inputs = {K: torch.randn(M, K, device=device, dtype=torch.bfloat16) for _, K in sides}
    took = seconds_of(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights], size.passes)
    flops = sum(2 * M * w.numel() for w in weights)
    result = {"ms": took * 1e3, "tflops": flops / took / 1e12}
    return result | {"share_of_limit": flops / gpu.bf16_flops / took}


@torch.no_grad()
def peer_scored(c: GPTConfig, size: Size, gpu, device) -> dict:
    release()
    model = peer_model(c, device)
    inputs, targets = windows(c, size, size.batch, device)

    def loss(ids, wanted):
        logits = model(ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")

    run = torch.compile(loss) if device == "cuda" else loss
    took = seconds_of(lambda: run(inputs, targets), size.passes)
    flops = estimate_flops(c, size.batch, size.window)["forward_causal"]
    tokens = size.batch * size.window
    return {"tokens_per_s": tokens / took, "ms": took * 1e3, "tflops": flops / took / 1e12}


# ---------------------------------------------------------------------------------------------


def all_cases(small: bool, size: Size, device: str, gpu):
    """(name, function), a model at a time."""
    c7, c70 = shapes(small)
    common, ways = (gpu, small, device), ("compiled",) if device == "cuda" else ("eager",)
    for N, K in size.shapes:
        for rows in (1, 16, 64):
            name = f"kernel {N}x{K}, {rows} rows"
            yield f"{name}: bf16", lambda a=(N, K, rows): bf16_kernel(*a, *common)
            for rule in ("w8", "w4 g128"):
                args = N, K, rule, rows
                yield f"{name}: {rule}", lambda a=args: packed_kernel(*a, *common)
            if device == "cuda":
                yield f"{name}: torch w4 g128", lambda a=(N, K, rows): torch_kernel(*a, *common)
    for (N, K), rows, rule in itertools.product(size.shapes, (1, 16), OF_16):
        name, args = f"of 16, {N}x{K}, {rows} rows", (N, K, rule, rows)
        yield f"{name}: {rule}", lambda a=args: packed_kernel(*a, *common)
        yield f"{name}: {rule} dequantised", lambda a=args: dequantised_kernel(*a, *common)
    for rule in ("w8", "w4 g128") if device == "cuda" else ():
        for constants in SWEPT[RULES[rule][0]]:
            for (N, K), rows in itertools.product(size.shapes, (1, 16, 64)):
                name = f"sweep {rule} {N}x{K}, {rows} rows, {', '.join(map(str, constants))}"
                yield name, lambda a=(N, K, rule, rows, constants): swept(*a, *common)
    held: dict = {}

    def model(c, rule):
        if held.get("what") != (c, rule):
            held.clear()
            held.update(what=(c, rule), model=built(c, rule, device))
        return held["model"]

    def alone(function, *args):
        def run():
            held.clear()
            return function(*args)

        return run

    for rows in (1, 16, 64):
        for rule in ("bf16", "w8", "w4 g128", "fp8"):
            for way in ("eager", *ways) if device == "cuda" else ways:
                yield (
                    f"decode {rows} {way}: {rule}",
                    lambda a=(c7, rule), rows=rows, way=way: decoded(
                        model(*a), size, rows, way == "compiled"
                    ),
                )
    for rows, way, rule in itertools.product((1, 16), ("eager", *ways), ("bf16", "w8", "w4 g128")):
        if device == "cuda":
            yield (
                f"step {rows} {way}: {rule}",
                lambda a=(c7, rule), rows=rows, way=way: stepped(
                    model(*a), size, rows, way == "compiled", gpu
                ),
            )
    for rule in ("bf16", "fp8", "w8", "w4 g128"):
        for way in ("eager", *ways) if device == "cuda" else ways:
            yield (
                f"score 7b {way}: {rule}",
                lambda a=(c7, rule), way=way: scored(
                    model(*a), size, gpu, way == "compiled", size.batch
                ),
            )
    yield "score 7b: transformers bf16", alone(peer_scored, c7, size, gpu, device)
    yield "score 70b: matrix products in bf16", alone(matrix_rate, c70, size, gpu, device)
    for way in ways:
        yield (
            f"score 70b {way}: w4 g128",
            lambda way=way: scored(
                model(c70, "w4 g128"), size, gpu, way == "compiled", size.big_batch
            ),
        )


def line(name, result) -> str:
    words = [f"{name:44}"]
    if "error" in result:
        return f"{words[0]}  FAILED: {result['error']}"
    for key, form in (
        ("tokens_per_s", "{:10,.0f} tok/s"), ("ms_per_step", "{:7.3f} ms/step"),
        ("us", "{:8.2f} us"),
        ("ms", "{:8.1f} ms"), ("tb_per_s", "{:5.2f} TB/s"), ("tflops", "{:6.1f} TFLOP/s"),
        ("share_of_limit", "{:6.1%}"), ("weights_GB", "{:5.2f} GB"), ("peak_GiB", "{:5.1f} GiB"),
    ):  # fmt: skip
        if key in result:
            words.append(form.format(result[key]))
    if "kernels" in result:
        words.append(
            "span {span_ms:.3f} ms, busy {busy_ms:.3f}, limit {limit_ms:.3f}".format(**result)
        )
        words += [f"\n{us:10.1f} us {n:7.1f} {name}" for name, (n, us) in result["kernels"].items()]
    return "  ".join(words)


def summary(found: dict) -> None:
    """Ratios that are wanted, where both sides were measured."""
    for rows in (1, 16, 64):
        for way in ("eager", "compiled"):
            for rule, wanted in (("w8", 1.5), ("w4 g128", 2.2), ("fp8", None)):
                pair = [found.get(f"decode {rows} {way}: {r}", {}) for r in ("bf16", rule)]
                if all("ms_per_step" in p for p in pair):
                    ratio = pair[0]["ms_per_step"] / pair[1]["ms_per_step"]
                    end = f", wanted {wanted}" if wanted and rows < 64 else ""
                    print(f"decode {rows} {way}, {rule}: {ratio:.2f} x bf16{end}")
    for way in ("eager", "compiled"):
        for rule, wanted in (("fp8", ", wanted 1.35"), ("w8", ""), ("w4 g128", "")):
            pair = [found.get(f"score 7b {way}: {r}", {}) for r in ("bf16", rule)]
            if all("ms" in p for p in pair):
                print(f"score 7b {way}, {rule}: {pair[0]['ms'] / pair[1]['ms']:.2f} x bf16{wanted}")
        big = (
            found.get(f"score 70b {way}: w4 g128", {}),
            found.get("score 70b: matrix products in bf16", {}),
        )
        if all("tflops" in p for p in big):
            ratio = big[0]["tflops"] / big[1]["tflops"]
            print(f"score 70b {way}, w4 g128: {ratio:.3f} of the rate of its products, wanted 0.9")


def main(argv=None):
    args = cases.parser(__doc__, budget=150).parse_args(argv)
    device, gpu, report = cases.begin(args)
    cases.measure(all_cases(args.small, Size(args.small), device, gpu), args, report, line)
    summary(report["cases"])


if __name__ == "__main__":
    cli.run(main)

"""Prefill and decode times that compute.py predicts, against what GPTModel takes on this GPU.

    python benchmarks/roofline.py --out benchmarks/results/roofline.json       # one GPU, ~3 minutes
    python benchmarks/roofline.py --report --out FILE   # predict anew beside what FILE measured

Four small measurements come first: a bf16 matrix product, causal attention, a copy, a small kernel
in a CUDA graph. They are what the GPU can do; a model's kernels reach less of it, by how much the
calibration says: the times of two models, the smallest and the largest of one family, give the
fractions of the product's and the memory's peak and the time lost to each kernel. All other shapes
are the test. Attention's ceiling stays the measured one: these times do not determine it.

Prefill is an eager call that fills a cache and ends in the last token's logits; decode is one
step in a CUDA graph, up to the logits. Each shape runs in a forked process; random weights,
bfloat16. Shapes already in --out are not run again. --report needs no GPU.
"""

import argparse
import json
import os
import select
import signal
import statistics
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import compute
from backends.kvcache import DecodeCache
from benchmarks.generation import random_model
from config import load_config
from costs import formulas, symbols

# torch's CPU threads exist before the fork; the child neither waits for them nor takes their locks
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

SHAPE_SECONDS = 90
CALIBRATION = ("llama3.2-1b", "13b")
PREFILL = (  # preset, sequences, tokens
    ("gpt2-xl", 8, 1024),
    ("llama3.2-1b", 8, 2048),
    ("llama3.2-1b", 1, 4096),
    ("7b", 1, 2048),
    ("7b", 4, 4096),
    ("llama3-8b", 1, 2048),
    ("llama3-8b", 2, 8192),
    ("mistral-7b", 4, 1024),
    ("qwen2.5-7b", 2, 4096),
    ("qwen3-8b", 2, 2048),
    ("13b", 1, 4096),
)
DECODE = (  # preset, sequences, context
    ("gpt2-xl", 32, 512),
    ("llama3.2-1b", 1, 1024),
    ("llama3.2-1b", 64, 1024),
    ("7b", 1, 1024),
    ("7b", 16, 2048),
    ("llama3-8b", 1, 1024),
    ("llama3-8b", 8, 4096),
    ("llama3-8b", 64, 1024),
    ("llama3-8b", 256, 1024),
    ("mistral-7b", 16, 2048),
    ("qwen2.5-7b", 64, 4096),
    ("13b", 8, 2048),
)


def seconds_of(run, repeats=10) -> float:
    """Median of `repeats` calls, by CUDA events, after three that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graphed(run):
    """`run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_ceilings() -> dict:
    """FLOP/s of a product and of causal attention, bytes/s of a copy, seconds of a tiny kernel."""
    gpu = compute.find_gpu(torch.cuda.get_device_name())
    if gpu is None:
        raise ValueError(f"{torch.cuda.get_device_name()} is not in compute.GPUS")
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * n**3 / seconds_of(lambda: a @ b)
    B, H, T, D = 4, 32, 4096, 128
    q, k, v = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    took = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    attention = 4 * B * H * D * formulas.pairs(T, T) / took
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    small = torch.zeros(1024, device="cuda")

    def many():
        for _ in range(1000):
            small.add_(1.0)

    kernel = seconds_of(graphed(many)) / 1000
    return {
        "device": torch.cuda.get_device_name(),
        "gpu": gpu.name,
        "matmul_flops": product,
        "attention_flops": attention,
        "copy_bytes_per_second": copied,
        "matmul": product / gpu.bf16_flops,
        "attention": attention / gpu.bf16_flops,
        "memory": copied / gpu.bandwidth,
        "kernel_seconds": kernel,
    }


@torch.no_grad()
def measure_shape(kind: str, config: str, B: int, T: int) -> dict:
    c = load_config(config)
    model = random_model(c, "cuda")
    ids = torch.randint(0, c.vocab_size, (B, T), device="cuda")
    cache = DecodeCache(model, n_prompts=B, prompt_len=T, n_rows=B, max_len=8)
    slots = list(range(B))

    def prefill():
        return model.logits(model.hidden(ids, cache=cache.filling(slots, [T] * B))[:, -1])

    if kind == "prefill":
        return {"seconds": seconds_of(prefill)}
    cache.set_lengths(slots, [T] * B)  # random weights: what it holds does not change the time
    cache.assign(slots)
    token = ids[:, :1].clone()
    step = graphed(lambda: model.logits(model.hidden(token, cache=cache)[:, -1]))
    return {"seconds": seconds_of(step, repeats=30)}


def forked(function, *arguments) -> dict:
    """function(*arguments) in a process of its own, so that CUDA starts afresh."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SHAPE_SECONDS)
    text = os.read(reader, 65536).decode() if ready else ""
    if not text:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    return json.loads(text) if text else {"error": f"no answer within {SHAPE_SECONDS} s"}


def predict(kind, config, B, T, gpu, ceilings) -> dict:
    setup = symbols.Setup(training=False, dtype="bf16")
    new = T if kind == "prefill" else 1
    context = T if kind == "prefill" else T + 1
    return compute.pass_seconds(load_config(config), gpu, B, new, context, setup, False, ceilings)


def calibrate(records, gpu, start: compute.Ceilings) -> compute.Ceilings:
    """The ceilings of least squared relative error: each fitted one is moved up or down by a step,
    as long as that helps; then the step is halved, from 20% to 0.2%."""

    def loss(ceilings):
        predicted = [predict(*r["shape"], gpu, ceilings)["seconds"] for r in records]
        return sum((p / r["measured"]["seconds"] - 1) ** 2 for p, r in zip(predicted, records))

    best, step = start, 0.2
    while step > 0.002:
        moves = [
            replace(best, **{name: getattr(best, name) * factor})
            for name in ("matmul", "memory", "kernel_seconds")
            for factor in (1 + step, 1 / (1 + step))
        ]
        better = min(moves, key=loss)
        if loss(better) < loss(best):
            best = better
        else:
            step /= 2
    return best


def evaluate(report: dict) -> None:
    """Fit the calibration shapes, then predict every shape; what was measured stays."""
    m = report["ceilings"]
    gpu = compute.GPUS[m["gpu"]]
    ceilings = compute.Ceilings(m["matmul"], m["attention"], m["memory"], m["kernel_seconds"])
    good = [r for r in report["records"] if "error" not in r["measured"]]
    used = [r for r in good if r["shape"][1] in CALIBRATION]
    if used:
        ceilings = calibrate(used, gpu, ceilings)
    report["fitted"] = asdict(ceilings)
    for record in good:
        record["predicted"] = predicted = predict(*record["shape"], gpu, ceilings)
        record["error"] = predicted["seconds"] / record["measured"]["seconds"] - 1
        record["calibration"] = record["shape"][1] in CALIBRATION


def summary(report: dict) -> str:
    errors = [abs(r["error"]) for r in report["records"] if r.get("calibration") is False]
    if not errors:
        return "No shape beside those of the calibration was measured."
    return (
        f"{sum(e <= 0.15 for e in errors)} of {len(errors)} test shapes within 15%; median"
        f" {statistics.median(errors):.1%}, worst {max(errors):.1%}."
    )


def markdown(report: dict) -> str:
    m, fitted = report["ceilings"], report["fitted"]
    lines = [
        "# Roofline: predicted against measured",
        "",
        f"{m['device']}, torch {report['torch']}; `python benchmarks/roofline.py`. Measured alone:"
        f" product {m['matmul_flops'] / 1e12:.0f} TFLOP/s, causal attention"
        f" {m['attention_flops'] / 1e12:.0f} TFLOP/s, copy {m['copy_bytes_per_second'] / 1e12:.2f}"
        f" TB/s, smallest kernel {m['kernel_seconds'] * 1e6:.2f} µs.",
        "",
        f"Fitted to the shapes of {' and '.join(CALIBRATION)}: {fitted['matmul']:.2f} of the"
        f" datasheet's FLOP/s in products ({m['matmul']:.2f} alone), {fitted['memory']:.2f} of its"
        f" bandwidth ({m['memory']:.2f}), {fitted['kernel_seconds'] * 1e6:.2f} µs lost to each"
        f" kernel. Attention: {fitted['attention']:.2f}, as measured alone.",
        "",
        summary(report),
        "",
    ]
    columns = "model | sequences | tokens | predicted, ms | measured, ms | error | limit"
    lines.append(f"| | {columns} | |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in report["records"]:
        kind, config, B, T = r["shape"]
        if "error" in r["measured"]:
            lines.append(f"| {kind} | {config} | {B} | {T} | | {r['measured']['error']} | | | |")
            continue
        times = f"{r['predicted']['seconds'] * 1e3:.2f} | {r['measured']['seconds'] * 1e3:.2f}"
        limit, role = r["predicted"]["bound"], "calibration" if r["calibration"] else "test"
        row = f"{kind} | {config} | {B} | {T} | {times} | {r['error']:+.1%} | {limit} | {role}"
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", required=True, type=Path, help="JSON; the table goes beside it as .md")
    p.add_argument("--report", action="store_true", help="only predict --out's shapes again")
    args = p.parse_args()
    report = {"torch": torch.__version__, "records": []}
    if args.report or args.out.exists():
        report = json.loads(args.out.read_text())
    if not args.report:
        measure_all(report, args.out)
    evaluate(report)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(json.dumps(report["fitted"]), summary(report), sep="\n")


def measure_all(report: dict, path: Path) -> None:
    """The ceilings and each shape that `report` lacks, written to `path` as they come."""
    report["records"] = [r for r in report["records"] if "error" not in r["measured"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    if "ceilings" not in report:
        report["ceilings"] = forked(measure_ceilings)
        if "error" in report["ceilings"]:
            sys.exit(report["ceilings"]["error"])
    done = {tuple(r["shape"]) for r in report["records"]}
    for shape in [("prefill", *s) for s in PREFILL] + [("decode", *s) for s in DECODE]:
        if shape in done:
            continue
        measured = forked(measure_shape, *shape)
        report["records"].append({"shape": shape, "measured": measured})
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(shape, measured.get("error") or f"{measured['seconds'] * 1e3:.2f} ms", flush=True)


if __name__ == "__main__":
    main()

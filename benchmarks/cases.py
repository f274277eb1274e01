"""What benchmarks of many named cases share: flags, the report, the loop, a graph's time."""

import argparse
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import cli
from costs.gpus import GPU, find_gpu

START = time.perf_counter()
Case = tuple[str, Callable[[], dict]]


def parser(doc: str, budget: float) -> argparse.ArgumentParser:
    p = cli.parser(doc)
    p.add_argument("--out", type=Path, required=True, help="JSON; cases that are there are kept")
    p.add_argument("--small", action="store_true", help="tiny shapes: does every case run?")
    p.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    p.add_argument("--skip", nargs="+", default=[], help="cases whose name contains one of these")
    p.add_argument("--budget", type=float, default=budget, help="seconds: no case starts after it")
    return p


def begin(args: argparse.Namespace, **settings: Any) -> tuple[str, GPU | None, dict]:
    """(device, its card, for a rehearsal an H100, the report so far): what an earlier run on the
    same machine gave is kept."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise ValueError("no GPU here: --small rehearses on a CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else "h100"
    report = {"gpu": name, "torch": torch.__version__, "small": args.small, **settings}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    same = all(before.get(key) == value for key, value in report.items())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return device, find_gpu(name), report | {"cases": before["cases"] if before and same else {}}


def measure(cases: Iterable[Case], args, report: dict, line: Callable[[str, dict], str]) -> None:
    """Run the cases that are wanted, until the budget is spent: each is printed and written with
    those before it, and one that fails stops no other."""
    for name, run in cases:
        if not any(part in name for part in args.only) or any(part in name for part in args.skip):
            continue
        if time.perf_counter() - START > args.budget:
            print(f"{name:44}  skipped: the budget of {args.budget:g} s is spent", flush=True)
            continue
        start = time.perf_counter()
        try:
            result = run()
        except Exception as error:  # an edge: the other cases still have something to say
            traceback.print_exc()
            result = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        result["whole_s"] = time.perf_counter() - start
        report["cases"][name] = result
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(line(name, result), f" [{result['whole_s']:.0f} s]", flush=True)


def alone(function: Callable[..., dict], *args: Any) -> dict:
    """function(*args) in a process of its own, forked from one that has imported what the benchmark
    imports and never saw the GPU. What a library leaves behind is then no other's: after a capture
    that failed, CUDA's generator refuses all that follow."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as one:
        return one.submit(function, *args).result()


def seconds_of_calls(run: Callable[[], Any], times: int = 20) -> float:
    """Of one run of what no graph can hold, called so often in a row, as the GPU sees it."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def seconds_under_graph(run: Callable[[], Any], times: int = 20) -> float:
    """Of one run of what launches kernels, replayed so often from one CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def measured_limits() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; FLOP a second of one large bfloat16 product) of
    this card in this minute; on a CPU what an H100 gave."""
    if not torch.cuda.is_available():
        return 2.95e12, 736e12
    source, target = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    n, half = 8192, {"dtype": torch.bfloat16, "device": "cuda"}
    a, b = torch.randn(n, n, **half), torch.randn(n, n, **half)
    # not under a graph, where a copy is another kernel, of four fifths of the speed
    copied = 2 * source.numel() / seconds_of_calls(lambda: target.copy_(source))
    return copied, 2 * n**3 / seconds_of_calls(lambda: torch.mm(a, b))

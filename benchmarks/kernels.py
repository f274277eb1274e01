"""What a GPU does while a command of ours runs: top kernels, gaps, and the host's own time.

    python benchmarks/kernels.py --out results/kernels.json --name "perplexity 7B" -- \\
        eval.py --checkpoint-path … --compile on
    python benchmarks/kernels.py --device cpu … -- eval.py --device cpu …     # a CPU's rehearsal

The command runs in this process, under torch's profiler, which costs some microseconds a launch:
of small models rates are lower than without it. Of all that the GPU did the longest stretch is
shown in which it never rested for 0.2 s, so that loading and the figures at the end are left out.
`busy` is the share of that stretch in which any kernel ran; gaps are the rest, by how long each is.
Kernels are grouped by kind, products being cuBLAS's and CUTLASS's, and listed by name. `host` is
this process's processor time over the stretch's seconds: above 1, threads run beside the one that
launches.
"""

import importlib
import json
import re
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import cli  # noqa: E402

PAUSE = 0.2  # seconds: a longer rest is another phase
TOP = 12
KINDS = {  # of kernels, by what their names hold; the first that fits
    "products": r"gemm|cublas|cutlass|nvjet|xmma|addmm|::mm|matmul|linear",
    "attention": r"flash|fmha|attention|sdpa|decode_",
    "loss": r"cross_entropy|nll|logsumexp|softmax",
    "compiled and own elementwise": r"^triton|norm|rotary|silu|gate",
    "copies": r"memcpy|memset|copy_",
}
GAPS_US = (10, 100, 1000)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, required=True, help="JSON; other names' rows are kept")
    p.add_argument("--name", required=True, help="of the row")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="whose work is shown")
    p.add_argument("command", nargs="+", help="after --: script and flags")
    args = p.parse_args(argv)
    row = profiled(args.command, args.device)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report[args.name] = row
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(args.name, row)


def profiled(command: list[str], device: str) -> dict:
    import torch
    from torch.profiler import ProfilerActivity, profile

    script, *flags = command
    sys.argv = command
    run = importlib.import_module(script.removesuffix(".py")).main
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    times = Processor()
    with profile(activities=[activity], acc_events=True) as prof, times:
        run(flags)
    events = [
        (e.start_ns(), e.duration_ns(), e.name())
        for e in prof.profiler.kineto_results.events()
        if (e.device_type() == torch.autograd.DeviceType.CUDA) == on_gpu and e.duration_ns()
    ]
    row = {"command": [Path(word).name for word in command], "torch": torch.__version__}
    return row | {"gpu": torch.cuda.get_device_name() if on_gpu else None} | summary(events, times)


class Processor:
    """This process's processor time, sampled: [n, 2] of (the profiler's clock, seconds)."""

    def __enter__(self):
        import threading

        self.seen, self.over = [], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.over.wait(0.02):
            self.seen.append((time.time_ns(), time.process_time()))

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

    def between(self, start_ns: int, end_ns: int) -> float:
        when, used = np.array(self.seen, dtype=float).T
        return float(np.diff(np.interp([start_ns, end_ns], when, used))[0])


def summary(events: list[tuple[int, int, str]], times: Processor) -> dict:
    """events: (start, length, name), nanoseconds."""
    events = sorted(events)
    starts = np.array([start for start, _, _ in events])
    ends = np.maximum.accumulate([start + length for start, length, _ in events])
    rests = np.append(starts[1:] - ends[:-1], np.iinfo(np.int64).max)
    cuts = [0, *(np.flatnonzero(rests > PAUSE * 1e9) + 1).tolist()]
    first, last = max(pairwise(cuts), key=lambda cut: ends[cut[1] - 1] - starts[cut[0]])
    begin, end = int(starts[first]), int(ends[last - 1])
    seconds = (end - begin) / 1e9
    gaps = np.maximum(rests[first : last - 1], 0) / 1e9
    names, kinds, count = Counter(), Counter(), Counter()
    for _, length, name in events[first:last]:
        names[name] += length / 1e9
        count[name] += 1
        kinds[kind_of(name)] += length / 1e9
    edges = [0, *(us / 1e6 for us in GAPS_US), np.inf]
    return {
        "seconds": seconds,
        "busy": 1 - float(gaps.sum()) / seconds,
        "kernels": last - first,
        "host": times.between(begin, end) / seconds,
        "gaps": {
            f"below {us} us" if us else f"longer than {GAPS_US[-1]} us": float(
                gaps[(gaps >= low) & (gaps < high)].sum() / seconds
            )
            for us, low, high in zip((*GAPS_US, None), edges[:-1], edges[1:], strict=True)
        },
        "kinds": {kind: share / seconds for kind, share in kinds.most_common()},
        "top": [
            {"name": name[:100], "share": total / seconds, "calls": count[name],
             "us": 1e6 * total / count[name]}
            for name, total in names.most_common(TOP)
        ],
    }  # fmt: skip


def kind_of(name: str) -> str:
    fits = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(fits, "the rest")


def show(name: str, row: dict) -> None:
    print(f"\n{name}: {row['seconds']:.1f} s, {row['kernels']:,} kernels, busy {row['busy']:.1%}, "
          f"host {row['host']:.2f}")  # fmt: skip
    print("  gaps " + ", ".join(f"{which} {share:.1%}" for which, share in row["gaps"].items()))
    print("  " + ", ".join(f"{kind} {share:.1%}" for kind, share in row["kinds"].items()))
    for top in row["top"]:
        print(f"  {top['share']:6.1%} {top['calls']:>8,} × {top['us']:9.1f} us  {top['name']}")


if __name__ == "__main__":
    cli.run(main)

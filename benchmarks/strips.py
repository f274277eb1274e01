"""MMLU's rows laid end to end (backends/strips.py) beside padded batches of one prefix: seconds,
kernels, and how far the answers are apart.

    python benchmarks/strips.py --mmlu data/mmlu --out benchmarks/results/strips.json
    python benchmarks/strips.py … --small      # a CPU's rehearsal: two questions of each subject

Random weights made on the device, context 4,096, five-shot; of the larger models every n-th
question (EVERY). `first` is a layout's first pass, in which kernels are loaded, `again` its second;
padded batches go first, so what they load is there for strips. `mfu` is of `again` where there is
one. Then the strips that three ranks would be dealt are scored each alone, and their bits compared;
and of the first strips, and as many padded batches, the kernels that take longest.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import cli  # noqa: E402
import evaluation  # noqa: E402
from backends import Facts, local, strips  # noqa: E402
from backends.continuations import (  # noqa: E402
    deal_batches,
    plan_batches,
    score_continuations,
    unique_flops,
)
from config import load_config  # noqa: E402
from costs import gpus  # noqa: E402
from distributed import Dist  # noqa: E402
from mmlu_eval import MMLU  # noqa: E402
from model import GPTModel  # noqa: E402

EVERY = {"gpt2": 1, "gpt2-xl": 3, "7b": 8}
SIZES = (8192, 16384, 32768, 65536)  # tokens of a strip
CONTEXT, PADDED, TOP = 4096, 32768, 14


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--mmlu", type=Path, required=True, help="MMLU in its original layout")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, or a directory that holds it")
    p.add_argument("--models", nargs="+", choices=EVERY, default=list(EVERY))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--small", action="store_true", help="tiny models on the CPU, little work")
    args = p.parse_args(argv)
    device = torch.device("cpu") if args.small else torch.device("cuda", 0)
    report = {"torch": torch.__version__, "models": {}}
    if not args.small:
        report["gpu"] = torch.cuda.get_device_name()
    whole = rows_of(args)
    for name in args.models:
        rows = every_nth(whole, EVERY[name])
        model = make(name, device, args.small)
        report["models"][name] = found = compare(model, rows, Dist(0, 1, 0, device), name)
        print(name, json.dumps(found, indent=1), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        del model
        if not args.small:
            torch.cuda.empty_cache()


def rows_of(args):
    tokenizer = evaluation.open_tokenizer(args.tokenizer)
    facts = Facts("rows", tokenizer.vocab_size, CONTEXT, "bfloat16", "cuda", tokenizer)
    limit = 2 if args.small else None
    options = MMLU.Options(data_path=str(args.mmlu), num_few_shot=5, limit=limit)
    return MMLU.plan(options, facts).work.prepared[0].rows


def every_nth(rows, n: int):
    keep = np.arange(0, len(rows.ids), n)
    ids, targets = ([of[i] for i in keep] for of in (rows.ids, rows.targets))
    return replace(rows, prefix=rows.prefix[keep], ids=ids, targets=targets)


def make(name: str, device: torch.device, small: bool) -> GPTModel:
    config = load_config(name).replace(
        vocab_size=50257, max_position_embeddings=CONTEXT, dropout=0.0
    )
    if small:
        config = config.replace(n_layers=2, n_heads=2, n_kv_heads=2, d_model=64, d_ff=128)
    torch.manual_seed(0)
    with device:
        model = GPTModel(config)
    return model.for_inference(torch.float32 if small else torch.bfloat16)


def compare(model: GPTModel, rows, dist: Dist, name: str) -> dict:
    """Of each layout."""
    overhead, twice = local.batch_overhead(model, dist.device), EVERY[name] == 1
    padded = plan_batches(rows, PADDED, None, overhead)
    wanted, about = timed(model, rows, padded, dist, twice)
    out = {"every": EVERY[name], "padded": about}
    for size in SIZES:
        plan = strips.plan_strips(rows, size, None, overhead)
        found, about = timed(model, rows, plan, dist, twice)
        same = found.choices.argmax(-1) == wanted.choices.argmax(-1)
        out[f"strips of {size}"] = about | {
            "largest_difference_to_padded": float(np.abs(found.choices - wanted.choices).max()),
            "same_letter_as_padded": float(same.mean()),
        }
    plan = strips.plan_strips(rows, PADDED, None, overhead)
    whole, parts = score_continuations(model, rows, plan, dist), np.zeros(wanted.choices.shape)
    for share in deal_batches(rows, plan, 3):
        parts += score_continuations(model, rows, [plan[i] for i in share], dist).choices
    out["three_ranks_give_the_same_bits"] = bool(np.array_equal(parts, whole.choices))
    if dist.device.type == "cuda":
        for layout, some in (("strips", plan[:8]), ("padded", padded[:25])):
            out[f"kernels of {len(some)} {layout}"] = kernels(model, rows, some, dist)
    return out


def timed(model, rows, plan, dist: Dist, twice: bool) -> tuple:
    """(scores, seconds and sizes)"""
    on_gpu, about = dist.device.type == "cuda", {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for which in ("first", "again") if twice else ("first",):
        start = time.perf_counter()
        scores = score_continuations(model, rows, plan, dist)
        seconds = about[which] = round(time.perf_counter() - start, 3)
    about |= {"passes": len(plan), "tokens": sum(portion.tokens for portion in plan)}
    gpu = gpus.find_gpu(torch.cuda.get_device_name()) if on_gpu else None
    if gpu is not None:
        about["mfu"] = round(gpus.mfu(unique_flops(model.config, rows), seconds, 1, gpu), 3)
        about["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return scores, about


def kernels(model, rows, plan, dist: Dist) -> dict:
    """{name: [milliseconds, calls]} of those that take longest, and all of them together."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        score_continuations(model, rows, plan, dist)
    events = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    out = {"all": [round(sum(e.self_device_time_total for e in events) / 1e3, 2), 0]}
    for e in events[:TOP]:
        out[e.key[:120]] = [round(e.self_device_time_total / 1e3, 2), e.count]
    return out


if __name__ == "__main__":
    cli.run(main)

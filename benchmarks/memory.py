"""compute.py's memory estimates against what torch allocates, beside two other calculators.

    python benchmarks/memory.py --out benchmarks/results/memory.json           # one GPU, ~5 minutes
    python benchmarks/memory.py --only fsdp --out benchmarks/results/memory-fsdp.json    # two GPUs
    python benchmarks/memory.py --only compiled --out …     # train.py's default, as found; slow
    python benchmarks/memory.py --report --out FILE         # new estimates of what FILE measured

Each case runs in a process of its own, forked from one that has imported everything and has not
touched CUDA: two warm-up steps (AdamW's state appears in the first), then one that is measured. A
case that is already in --out is not run again; a Markdown table is written beside it. Training is
train.py's own loss and clipping. Cases estimated above 93% of the GPU's memory lose layers.
--report needs no GPU: after a change of compute.py it says what its formulas make of old records.

Peers, on the same cases: the formulas of EleutherAI's cookbook, calc/calc_transformer_mem.py, given
the true key/value ratio, MLP width and number of MLP matrices; and `accelerate estimate-memory`,
which counts neither activations nor, loading AutoModel, an untied LM head.
"""

import argparse
import json
import os
import select
import signal
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import compute
import train
from backends import scoring
from backends.kvcache import DecodeCache
from benchmarks.generation import random_model
from config import config_to_hf, load_config
from model import GPTModel

# torch's CPU threads exist before the fork; the child neither waits for them nor takes their locks
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

CASE_SECONDS = 90
COMPILED_SECONDS = 400


@dataclass(frozen=True)
class Case:
    """kind: train, lora, prefill, score, fsdp. precision: autocast or pure (bfloat16)."""

    config: str
    kind: str
    B: int
    T: int
    precision: str = "autocast"
    recompute: str = "none"
    fused: bool = True
    implementation: str = "roseval"
    compiled: bool = False
    layers: int = 0  # 0: the preset's

    @property
    def name(self) -> str:
        words = [self.config, self.kind, f"{self.B}x{self.T}"]
        if self.kind in ("train", "fsdp"):
            words += [self.precision, "fused" if self.fused else "foreach"]
        words += ["recompute"] * (self.recompute == "full") + ["compiled"] * self.compiled
        words += ["transformers"] * (self.implementation == "transformers")
        return " ".join(words)

    def model_config(self):
        c = load_config(self.config)
        return c.replace(n_layers=self.layers) if self.layers else c


SHAPES = (  # preset, and two batches of different length
    ("gpt2", (8, 256), (16, 1024)),
    ("gpt2-xl", (4, 256), (8, 1024)),
    ("llama3.2-1b", (4, 512), (4, 2048)),
    ("llama3-8b", (1, 512), (2, 2048)),
    ("qwen2.5-0.5b", (4, 512), (8, 2048)),
)


def matrix() -> list[Case]:
    """Every model x precision x recomputation x length, fused and foreach AdamW in turn."""
    cases = []
    for m, (config, *lengths) in enumerate(SHAPES):
        for p, precision in enumerate(("autocast", "pure")):
            for r, recompute in enumerate(("none", "full")):
                for t, (B, T) in enumerate(lengths):
                    run = dict(
                        precision=precision, recompute=recompute, fused=(m + p + r + t) % 2 == 0
                    )
                    cases.append(Case(config, "train", B, T, **run))
        cases.append(Case(config, "prefill", *lengths[1]))
        cases.append(Case(config, "score", *lengths[1]))
    hf = dict(implementation="transformers")
    cases += [
        Case("gpt2", "train", 16, 1024, precision="pure", **hf),
        Case("gpt2", "train", 16, 1024, **hf),
        Case("llama3.2-1b", "train", 4, 2048, precision="pure", **hf),
        Case("llama3.2-1b", "train", 4, 2048, **hf),
        Case("qwen3-0.6b", "train", 4, 2048, precision="pure", **hf),
        Case("qwen3-0.6b", "train", 4, 2048),
        Case("llama3.2-1b", "lora", 4, 2048, **hf),
        Case("llama3-8b", "lora", 2, 2048, **hf),
        Case("7b", "prefill", 4, 4096),
    ]
    return cases


def fsdp_cases() -> list[Case]:
    run = dict(implementation="transformers")
    return [
        Case("llama3.2-1b", "fsdp", 4, 2048, **run),
        Case("llama3.2-1b", "fsdp", 4, 2048, recompute="full", **run),
        Case("llama3-8b", "fsdp", 1, 2048, **run),
        Case("llama3-8b", "fsdp", 1, 2048, recompute="full", **run),
    ]


def compiled_cases() -> list[Case]:
    return [
        Case("gpt2", "train", 16, 1024, compiled=True),
        Case("llama3.2-1b", "train", 4, 2048, compiled=True),
    ]


# ---------------------------------------------------------------------------------------------
# Estimates: ours and the peers'


def estimate(case: Case) -> dict:
    c = case.model_config()
    if case.kind in ("prefill", "score"):
        e = compute.estimate_memory(c, case.B, case.T, "bf16", training=False)
        if case.kind == "score":
            return {"load": e["load_bytes"], "peak": e["scoring_bytes"]}
        return {"load": e["load_bytes"], "decode": e["decode_bytes"], "peak": e["peak_bytes"]}
    run = dict(recompute=case.recompute, fused=case.fused, implementation=case.implementation)
    run |= dict(precision=case.precision)
    if case.kind == "lora":
        run |= dict(lora_rank=16)
    if case.kind == "fsdp":
        run |= dict(dp=2, zero=3)
    e = compute.estimate_memory(c, case.B, case.T, "bf16", **run)
    stages = ("load", "forward_end", "backward_peak", "step_peak", "peak")
    return {stage: e[f"{stage}_bytes"] for stage in stages} | {"peak_at": e["peak_at"]}


def shrink_to_fit(case: Case, limit: float) -> Case:
    """Drop layers, two at a time, until the estimate is below `limit` bytes."""
    layers = load_config(case.config).n_layers
    while estimate(case)["peak"] > limit and layers > 2:
        layers -= 2
        case = replace(case, layers=layers)
    return case


def cookbook(case: Case) -> float:
    """Bytes by EleutherAI's formulas, mixed precision (its only mode with 16 bits)."""
    c, B, T = case.model_config(), case.B, case.T
    h, L, ratio = c.d_model, c.n_layers, c.n_kv_heads / c.n_heads
    n = 2 * c.vocab_size * h + h * T + 8 * h * L + 2 * h
    n += 2 * (1 + ratio) * L * h * h + (2 + c.gated_mlp) * L * h * c.d_ff
    if case.kind in ("prefill", "score"):
        cache = 2 * h * L * (T + 1) * B if case.kind == "prefill" else 0
        return 2 * n + 34 * T * B * h + cache
    per_token = 34 if case.recompute == "full" else 34 + 5 * c.n_heads * T / h
    states = n * (2 + 16 / 2) if case.kind == "fsdp" else n * (2 + 4 + 12)
    return states + T * B * h * L * per_token


def accelerate(case: Case) -> float | None:
    """Bytes that `accelerate estimate-memory --dtypes float16` (its 16-bit row) prints: "Training
    using Adam", or "Total Size" for inference."""
    try:
        from accelerate.commands.estimate import estimate_training_usage
        from accelerate.utils import calculate_maximum_sizes
        from transformers import AutoConfig, AutoModel
    except ImportError:
        return None
    with torch.device("meta"):
        model = AutoModel.from_config(
            AutoConfig.for_model(**config_to_hf(case.model_config())), dtype=torch.float32
        )
    total, _ = calculate_maximum_sizes(model)
    if case.kind in ("prefill", "score"):
        return total / 2
    return max(estimate_training_usage(total, "float16").values())


# ---------------------------------------------------------------------------------------------
# Measuring: everything below runs in the forked process


def build(case: Case):
    """The model on the GPU in float32, or with bfloat16 weights where the precision is pure."""
    c = case.model_config()
    if case.implementation == "roseval":
        with torch.device("cuda"):
            model = GPTModel(c).train()
        model.activation_checkpointing = case.recompute == "full"
        if case.precision == "pure":
            dtypes = model.inference_dtypes(torch.bfloat16)
            for name, p in model.named_parameters():
                p.data = p.data.to(dtypes[name])
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = AutoConfig.for_model(**config_to_hf(c))
    dtype = torch.bfloat16 if case.precision == "pure" or case.kind == "lora" else torch.float32
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            hf, dtype=dtype, attn_implementation="sdpa"
        ).train()
    model.config.use_cache = False
    if case.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Adapter(torch.nn.Module):
    """A frozen linear layer and its low-rank correction, kept in float32."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False, device="cuda")
        self.b = torch.nn.Linear(rank, base.out_features, bias=False, device="cuda")

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def add_adapters(model, rank: int):
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Adapter(child, rank))
    return model


def shard(model):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def measure_training(case: Case) -> dict:
    model = build(case)
    if case.kind == "lora":
        add_adapters(model, 16)
    if case.kind == "fsdp":
        shard(model)
    torch.cuda.empty_cache()
    figures = {"load": torch.cuda.memory_allocated()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=case.fused, foreach=not case.fused)
    ids = torch.randint(0, case.model_config().vocab_size, (case.B, case.T), device="cuda")
    amp = torch.autocast(
        "cuda",
        torch.bfloat16,
        enabled=case.kind == "lora" or (case.kind == "train" and case.precision == "autocast"),
    )
    if case.implementation == "roseval":
        losses, targets = train.Loss(model), ids.clone()
        if case.compiled:
            losses.compile(dynamic=False)

        def loss_fn(ids, targets):
            return losses(ids, targets)[0]

    else:

        def loss_fn(ids, labels):
            return model(ids, labels=labels).loss

        targets = ids
    allocated, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with amp:
            loss = loss_fn(ids, targets)
        figures |= {"forward_end": allocated(), "forward_peak": peak()}
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        figures |= {"backward_peak": peak(), "backward_end": allocated()}
        torch.cuda.reset_peak_memory_stats()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        figures["step_peak"] = peak()
        optimizer.zero_grad(set_to_none=True)
        del loss
    figures["peak"] = max(figures[f"{name}_peak"] for name in ("forward", "backward", "step"))
    return figures


@torch.no_grad()
def measure_inference(case: Case) -> dict:
    c = case.model_config()
    model = random_model(c, "cuda")
    torch.cuda.empty_cache()
    figures = {"load": torch.cuda.memory_allocated()}
    B, T = case.B, case.T
    ids = torch.randint(0, c.vocab_size, (B, T), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        if case.kind == "score":
            scoring.token_nll(model, model.hidden(ids).flatten(0, 1), ids.flatten())
        else:
            slots = list(range(B))
            cache = DecodeCache(model, n_prompts=B, prompt_len=T, n_rows=B, max_len=1)
            filling = cache.filling(slots, [T] * B)
            model.logits(model.hidden(ids, cache=filling)[:, -1]).float()
        figures["peak"] = torch.cuda.max_memory_allocated()
        if case.kind == "prefill":
            # the last position again: a learned table ends there
            cache.set_lengths(slots, [T - 1] * B)
            cache.assign(slots)
            torch.cuda.reset_peak_memory_stats()
            model.logits(model.hidden(ids[:, :1], cache=cache)[:, -1]).float()
            figures["decode"] = torch.cuda.max_memory_allocated()
            del cache, filling  # which holds the same
    return figures


def measure(case: Case) -> dict:
    torch.manual_seed(0)
    backends = [SDPBackend.FLASH_ATTENTION]
    if case.kind == "prefill":
        backends.append(SDPBackend.MATH)
    with sdpa_kernel(backends):
        inference = case.kind in ("prefill", "score")
        figures = measure_inference(case) if inference else measure_training(case)
    free, total = torch.cuda.mem_get_info()
    figures["reserved"] = torch.cuda.max_memory_reserved()
    figures["outside_torch"] = total - free - torch.cuda.memory_reserved()
    return figures


def child(case: Case, pipe: int, rank: int, world_size: int) -> None:
    """Measure, write one JSON line to the pipe, and leave without running anyone's clean-up."""
    try:
        torch.cuda.set_device(rank)
        if world_size > 1:
            torch.distributed.init_process_group(
                "nccl", init_method="tcp://127.0.0.1:29561", rank=rank, world_size=world_size
            )
        start = time.perf_counter()
        answer = measure(case) | {"seconds": round(time.perf_counter() - start, 1)}
    except Exception as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    os.write(pipe, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def run_case(case: Case) -> dict:
    """Rank 0's figures, from one forked process per GPU."""
    world_size = 2 if case.kind == "fsdp" else 1
    reader, writer = os.pipe()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            sink = writer if rank == 0 else os.open(os.devnull, os.O_WRONLY)
            child(case, sink, rank, world_size)
        pids.append(pid)
    os.close(writer)
    limit = COMPILED_SECONDS if case.compiled else CASE_SECONDS
    ready, _, _ = select.select([reader], [], [], limit)
    text = os.read(reader, 65536).decode() if ready else ""
    for pid in pids:
        if not text:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(reader)
    return json.loads(text) if text.strip() else {"error": f"no answer within {limit} s"}


# ---------------------------------------------------------------------------------------------
# The report


def error(record, key="peak") -> float | None:
    value = record["estimate"].get(key) if key in record["estimate"] else record.get(key)
    measured = record["measured"].get(key if key in record["measured"] else "peak")
    return None if value is None or not measured else value / measured - 1


def group_of(case: dict) -> str:
    if case["compiled"]:
        return "compiled"
    if case["kind"] in ("prefill", "score"):
        return "inference"
    if case["kind"] in ("lora", "fsdp"):
        return case["kind"]
    if case["implementation"] == "transformers":
        return "eager training, transformers' models"
    return "recomputation" if case["recompute"] == "full" else "eager training"


def summary_lines(records) -> list[str]:
    lines = [
        "| group | cases | median error | worst error | cookbook, median | accelerate, median |"
    ]
    lines.append("|---|---|---|---|---|---|")
    groups = dict.fromkeys(group_of(r["case"]) for r in records)
    for group in groups:
        chosen = [r for r in records if group_of(r["case"]) == group]
        columns = []
        for key in ("peak", "cookbook", "accelerate"):
            errors = [abs(e) for e in (error(r, key) for r in chosen) if e is not None]
            columns.append(errors or [float("nan")])
        ours, theirs = columns[0], [f"{statistics.median(c):.1%}" for c in columns[1:]]
        median, worst = statistics.median(ours), max(ours)
        lines.append(
            f"| {group} | {len(ours)} | {median:.2%} | {worst:.2%} | {theirs[0]} | {theirs[1]} |"
        )
    return lines


def markdown(report: dict) -> str:
    good = [r for r in report["records"] if "error" not in r["measured"]]
    lines = [
        "# Memory: estimated against allocated",
        "",
        f"{report['gpu']}, torch {report['torch']}; `{report['command']}`. GiB of"
        " `max_memory_allocated`, estimate / measured.",
        *(["", report["note"]] if "note" in report else []),
        "",
        "Reserved is more than allocated because torch's caching allocator keeps freed blocks for"
        " reuse (`torch.cuda.empty_cache()` returns those that are wholly free); outside is what"
        " CUDA's context, its kernels and libraries hold until the process ends. nvidia-smi shows"
        " reserved plus outside.",
        "",
        *summary_lines(good),
        "",
        "| case | layers | load | forward end | backward peak | step peak | peak | error |"
        " cookbook | accelerate | reserved | outside |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(r, key):
        if key not in r["estimate"] or key not in r["measured"]:
            return ""
        return f"{r['estimate'][key] / 2**30:.3f} / {r['measured'][key] / 2**30:.3f}"

    for r in good:
        cells = [cell(r, k) for k in ("load", "forward_end", "backward_peak", "step_peak", "peak")]
        errors = [error(r, k) for k in ("peak", "cookbook", "accelerate")]
        cells += ["" if e is None else f"{e:+.1%}" for e in errors]
        held = (r["measured"].get(k) for k in ("reserved", "outside_torch"))
        cells += ["" if n is None else f"{n / 2**30:.2f}" for n in held]
        layers = r["case"]["layers"] or "all"
        lines.append(f"| {r['name']} | {layers} | {' | '.join(cells)} |")
    for r in report["records"]:
        if "error" in r["measured"]:
            lines.append(f"\n{r['name']}: not measured: {r['measured']['error']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", required=True, type=Path, help="JSON; the table goes beside it as .md")
    p.add_argument("--only", choices=("matrix", "fsdp", "compiled"), default="matrix")
    p.add_argument("--match", default="", help="run only the cases whose name contains this")
    p.add_argument("--report", action="store_true", help="only estimate --out's cases again")
    p.add_argument("--gpu-gib", type=float, default=139.8, help="memory of the GPU (H200)")
    args = p.parse_args()
    if args.report:
        return estimate_again(args.out)
    cases = {"matrix": matrix, "fsdp": fsdp_cases, "compiled": compiled_cases}[args.only]()
    done = {}
    if args.out.exists():
        records = json.loads(args.out.read_text())["records"]
        done = {r["name"]: r for r in records if "error" not in r["measured"]}
    report = {
        "command": f"python benchmarks/memory.py --only {args.only}",
        "torch": torch.__version__,
        "records": list(done.values()),
    }
    for case in cases:
        if case.name in done or args.match not in case.name:
            continue
        case = shrink_to_fit(case, 0.93 * args.gpu_gib * 2**30)
        measured = run_case(case)
        record = {"name": case.name, "case": asdict(case), "estimate": estimate(case)}
        record |= {"cookbook": cookbook(case), "accelerate": accelerate(case), "measured": measured}
        report["records"].append(record)
        off = error(record)
        print(f"{case.name}: {measured.get('error') or f'{off:+.2%}'}", flush=True)
        report["gpu"] = gpu_name()
        write(report, args.out)
    if report["records"]:
        print_summary(report)


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def print_summary(report: dict) -> None:
    good = [r for r in report["records"] if "error" not in r["measured"]]
    print("\n".join(summary_lines(good)))


def estimate_again(path: Path) -> None:
    """What compute.py says today of the cases in `path`; what was measured stays."""
    report = json.loads(path.read_text())
    for record in report["records"]:
        case = Case(**record["case"])
        record["estimate"] = estimate(case)
        record["cookbook"] = cookbook(case)
        record["accelerate"] = accelerate(case) or record["accelerate"]
    write(report, path)
    print_summary(report)


def gpu_name() -> str:
    """Without touching CUDA, which a process that forks must not."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, timeout=20
        ).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown GPU"


if __name__ == "__main__":
    main()

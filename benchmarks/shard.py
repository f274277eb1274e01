"""A 70B Llama's shape on two cards, `--shard 2`: scoring, MMLU, generation, beside transformers
with accelerate's device_map="auto"; and a 7B on one card beside two that hold it between them.

    python benchmarks/shard.py --work /dev/shm --out benchmarks/results/shard.json --only make
    python benchmarks/shard.py --work /dev/shm --out … --only perplexity
    python benchmarks/shard.py --work /dev/shm --out … --only mmlu --mmlu data/mmlu
    python benchmarks/shard.py --work /dev/shm --out … --only generation
    python benchmarks/shard.py --work /dev/shm --out … --only seven
    python benchmarks/shard.py --work /dev/shm --out … --only peer
    python benchmarks/shard.py --work /tmp/w --out /tmp/s.json --small       # a CPU's rehearsal

`make` writes random bfloat16 weights (131 GiB, and 13 for the 7B) as sharded safetensors to --work;
each other part is meant for less than 200 s on two H100s. Perplexity is eval.py's own rate over 64
batches of 2 x 4096 random tokens; its share is of what both cards' products of 8192^3 matrices
reach together right after it, counting causal attention. Generation: 64 rows of one 512-token
prompt, and two such batches, which work in turns; the rate of decoding is that of the last 112 of
128 new tokens, and its share is of reading all weights once a step at both cards' measured copying.
Load seconds, and what the host holds beyond the page cache meanwhile, are those of generation's
ranks.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402
from config import GPTConfig, load_config  # noqa: E402
from costs.flops import estimate_flops  # noqa: E402

PARTS = ("make", "perplexity", "mmlu", "generation", "seven", "peer")
BATCH, WINDOW, BATCHES = 2, 4096, 64
ROWS, PROMPT, NEW, SHORT = 64, 512, 128, 16
POOL = 2**28  # random numbers, of which every matrix has a piece


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--work", type=Path, required=True, help="for the models: 144 GiB")
    p.add_argument("--out", type=Path, required=True, help="JSON; parts that are there are kept")
    p.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    p.add_argument("--mmlu", type=Path, help="MMLU in its original layout")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, or a directory that holds it")
    p.add_argument("--gpus", type=cli.positive_int, default=2, help="that hold the model (2)")
    p.add_argument("--small", action="store_true", help="tiny models, on a CPU")
    p.add_argument("--child", choices=("generation", "ceilings", "peer"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        return {"generation": draw, "ceilings": measure_ceilings, "peer": run_peer}[args.child](
            args
        )
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report["machine"] = machine() | {"date": time.strftime("%Y-%m-%d")}
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        start = time.perf_counter()
        report[name] = globals()[f"part_{name}"](args)
        report[name]["wall_seconds"] = round(time.perf_counter() - start, 1)
        args.out.write_text(json.dumps(report, indent=1) + "\n")  # nothing is lost
        print(name, json.dumps(report[name]), flush=True)


def shape(args, large: bool) -> GPTConfig:
    config = load_config("llama3-70b" if large else "7b")
    if not args.small:
        return config
    return config.replace(
        n_layers=4, d_model=64, n_heads=8, head_dim=8, d_ff=96, n_kv_heads=4, vocab_size=50000
    )


def folder(args, large: bool) -> Path:
    return args.work / ("shard-large" if large else "shard-7b")


# ---------------------------------------------------------------------------------------------
# The models


def part_make(args) -> dict:
    sizes = {folder(args, large).name: write(args, large) for large in (True, False)}
    tokens = np.random.default_rng(0).integers(0, 32000, 1 + BATCHES * BATCH * WINDOW)
    np.save(args.work / "shard.npy", tokens.astype(np.uint16))
    return {"bytes": sizes}


def write(args, large: bool) -> int:
    """A Hugging Face directory, a file for each layer, by several threads; its bytes."""
    import torch
    from safetensors.torch import save_file

    from formats import layouts
    from model import GPTModel

    config, place = shape(args, large), folder(args, large)
    place.mkdir(exist_ok=True)
    torch.manual_seed(0)
    pool = torch.empty(min(POOL, 2**20) if args.small else POOL, dtype=torch.bfloat16)
    pool.normal_(std=0.02)
    files: dict[str, dict] = {}
    for name, part in layouts.parts(GPTModel.on_meta(config), "llama"):
        layer = re.search(r"layers\.(\d+)\.", name)
        file = f"model-{layer[1] if layer else name.removesuffix('.weight')}.safetensors"
        files.setdefault(file, {})[name] = part.tensor.shape

    def fill(file):
        tensors = {}
        for name, size in files[file].items():
            t = torch.ones(size, dtype=torch.bfloat16)
            if len(size) > 1:
                flat, start = t.view(-1), hash(name) % 1000
                for at in range(0, len(flat), len(pool) - start):
                    piece = flat[at : at + len(pool) - start]
                    piece.copy_(pool[start : start + len(piece)])
            tensors[name] = t
        save_file(tensors, place / file, {"format": "pt"})
        return (place / file).stat().st_size

    with ThreadPoolExecutor(8) as threads:
        total = sum(threads.map(fill, files))
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(place, dtype="bfloat16")
    return total


# ---------------------------------------------------------------------------------------------
# Commands


def command(args, ranks: int, script: str, *words) -> list[str]:
    found = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found += [f"--nproc-per-node={ranks}", ROOT / script, *words]
    return [str(word) for word in [*found, *(["--device", "cpu"] if args.small else [])]]


def run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{words[5:8]} failed: {done.stdout[-500:]} {done.stderr[-1500:]}")
    return done.stdout


def record_of(args, ranks: int, shards: int, large: bool, script: str, *words) -> tuple[dict, dict]:
    """(cost, every array and metric) of a command's record."""
    results = args.work / f"shard-results-{time.time_ns()}"
    words = ["--checkpoint-path", folder(args, large), "--shard", shards, *words]
    run(command(args, ranks, script, *words, "--results-dir", results))
    (path,) = results.glob("*/*/*-*.json")
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as file:
        bits = {name: file[name].tobytes() for name in file.files}
    bits |= {name: metric["value"] for name, metric in record["metrics"].items()}
    return record["cost"], bits


def scoring_words(args, batches: int = BATCHES) -> list:
    window = 64 if args.small else WINDOW
    words = [
        "--data-mode",
        "fineweb_npy",
        "--val-npy",
        args.work / "shard.npy",
        "--seq-len",
        window,
    ]
    return [*words, "--batch-size", BATCH, "--max-tokens", 1 + batches * BATCH * window]


def told(cost: dict) -> dict:
    names = ("tokens_per_second", "seconds", "load_seconds", "peak_memory_bytes", "mfu")
    return {name: cost[name] for name in names}


def ceilings(args) -> dict:
    words = [
        sys.executable,
        __file__,
        "--child",
        "ceilings",
        "--work",
        args.work,
        "--out",
        args.out,
    ]
    words += ["--gpus", args.gpus, *(["--small"] if args.small else [])]
    return json.loads(run([str(word) for word in words]).splitlines()[-1])


def part_perplexity(args) -> dict:
    script = "eval.py", *scoring_words(args)
    cost, _ = record_of(args, args.gpus, args.gpus, True, *script)
    rates, config = ceilings(args), shape(args, True)
    per_token = estimate_flops(config, BATCH, WINDOW)["forward_causal"] / (BATCH * WINDOW)
    reached = cost["tokens_per_second"] * per_token
    return told(cost) | {"share_of_products": reached / rates["flops"], "ceilings": rates}


def part_mmlu(args) -> dict:
    if args.mmlu is None:
        raise ValueError("--only mmlu needs --mmlu DIR")
    words = ["--data-path", args.mmlu, "--num-few-shot", 5, "--limit", 2 if args.small else 8]
    words += ["--tokenizer-name", args.tokenizer]
    cost, bits = record_of(args, args.gpus, args.gpus, True, "mmlu_eval.py", *words)
    return told(cost) | {"rows": cost["rows"], "accuracy": bits["accuracy"]}


def part_seven(args) -> dict:
    """One card; two that hold the model between them; two models on two cards."""
    script, found, first = ("eval.py", *scoring_words(args)), {}, None
    for name, ranks, shards in (("1 card", 1, 1), ("2 cards, K=2", 2, 2), ("2 cards, K=1", 2, 1)):
        cost, bits = record_of(args, ranks, shards, False, *script)
        first = first or bits
        found[name] = told(cost) | {"same_bits": bits == first}
    return found


# ---------------------------------------------------------------------------------------------
# Generation, on each rank


def part_generation(args) -> dict:
    words = ["--child", "generation", "--work", args.work, "--out", args.out]
    words += ["--gpus", args.gpus, *(["--small"] if args.small else [])]
    found = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found += [f"--nproc-per-node={args.gpus}", __file__, *words]
    told = json.loads(run([str(word) for word in found]).splitlines()[-1])
    rates = ceilings(args)
    weights = sum(f.stat().st_size for f in folder(args, True).glob("*.safetensors"))
    for case in told["cases"].values():
        steps = case["decode_tokens_per_second"] / case["rows_of_a_step"]
        case["share_of_bandwidth"] = steps * weights / rates["bytes_per_second"]
    return told | {"ceilings": rates}


class HostMemory(threading.Thread):
    """The most anonymous memory of this process, seen often."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.most, self.over = self.now(), 0, threading.Event()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    def run(self):
        while not self.over.wait(0.02):
            self.most = max(self.most, self.now() - self.first)


def draw(args) -> None:
    import torch

    import checkpoint
    import distributed
    from backends import Sampling
    from backends.local import Local, facts_of
    from backends.parallel import in_groups, load

    small = args.small
    rows, prompt, new, short = (4, 16, 12, 4) if small else (ROWS, PROMPT, NEW, SHORT)
    dtype = "float32" if small else "bfloat16"
    with distributed.setup("cpu" if small else None, 600) as dist:
        ckpt = checkpoint.open(folder(args, True))
        dist = in_groups(dist, args.gpus, ckpt.config, dtype)
        if not small:
            torch.zeros(1, device=dist.device)
        watch = HostMemory()
        watch.start()
        start = time.perf_counter()
        model = load(ckpt, dtype, dist)
        seconds = time.perf_counter() - start
        watch.over.set()
        local = Local(model, facts=facts_of(ckpt, None, dtype, dist.device.type), dist=dist)
        ids = np.random.default_rng(1).integers(0, 32000, (2, prompt)).tolist()

        def timed(n_prompts: int, new: int) -> float:
            sampling = Sampling(temperature=0.8, max_new_tokens=new)
            dist.barrier()
            start = time.perf_counter()
            job = local.generate(ids[:n_prompts], sampling, rows, batch_size=rows, end_ids=())
            n = sum(len(sample.token_ids) for sample in job)
            total = int(dist.sum(torch.tensor([n], device=dist.device))[0])
            assert total == n_prompts * rows * new, total
            return time.perf_counter() - start

        cases = {}
        for name, n_prompts in (("one batch of rows", 1), ("two in turns", 2)):
            timed(n_prompts, short)
            before, after = timed(n_prompts, short), timed(n_prompts, new)
            tokens = n_prompts * rows * (new - short)
            cases[name] = {
                "rows_of_a_step": rows,
                "tokens_per_second": n_prompts * rows * new / after,
                "decode_tokens_per_second": tokens / (after - before),
            }
        memory = dist.gather((seconds, watch.most))
        peak = local.cost()["peak_memory_bytes"]
        if dist.is_main:
            loaded = {
                "load_seconds": max(s for s, _ in memory),
                "host_bytes": max(m for _, m in memory),
            }
            print(json.dumps({"cases": cases, "peak_memory_bytes": peak} | loaded))


# ---------------------------------------------------------------------------------------------
# Ceilings of all cards together, and the peer


def measure_ceilings(args) -> None:
    import torch

    n = 256 if args.small else 8192
    devices = [torch.device("cpu" if args.small else f"cuda:{i}") for i in range(args.gpus)]
    dtype = torch.float32 if args.small else torch.bfloat16
    each = [[torch.randn(n, n, device=d, dtype=dtype) for _ in range(3)] for d in devices]
    big = [
        torch.empty(2**20 if args.small else 2**31, dtype=torch.uint8, device=d) for d in devices
    ]
    other = [torch.empty_like(x) for x in big]

    def seconds(work, times) -> float:
        for repeat in (3, times):  # all cards at once: the host only launches
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            for d in devices:
                if d.type == "cuda":
                    torch.cuda.synchronize(d)
        return (time.perf_counter() - start) / times

    product = seconds(
        lambda: [torch.mm(a, b, out=c) for a, b, c in each], 10 if args.small else 1500
    )
    copied = seconds(lambda: [a.copy_(b) for a, b in zip(other, big)], 10 if args.small else 500)
    moved = sum(2 * x.numel() for x in big)
    found = {"flops": len(devices) * 2 * n**3 / product, "bytes_per_second": moved / copied}
    print(json.dumps(found))


def part_peer(args) -> dict:
    words = [sys.executable, __file__, "--child", "peer", "--work", args.work, "--out", args.out]
    words += ["--gpus", args.gpus, *(["--small"] if args.small else [])]
    return json.loads(run([str(word) for word in words]).splitlines()[-1])


def run_peer(args) -> None:
    """The same windows through AutoModelForCausalLM with sdpa, logits of a chunk at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    window, batches = (64, 4) if args.small else (WINDOW, 24)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder(args, True), dtype=torch.bfloat16, device_map="cpu" if args.small else "auto"
    ).eval()
    loaded = time.perf_counter() - start
    tokens = torch.from_numpy(np.load(args.work / "shard.npy").astype(np.int64))
    total = 0.0

    @torch.no_grad()
    def score(b):
        first = b * BATCH * window
        ids = tokens[first : first + BATCH * window + 1]
        x, y = ids[:-1].view(BATCH, window), ids[1:].view(-1)
        hidden = model.model(x.to(model.device), use_cache=False).last_hidden_state.flatten(0, 1)
        nats = 0.0
        for h, t in zip(hidden.split(2048), y.split(2048)):
            logits = model.lm_head(h).float()
            nats += torch.nn.functional.cross_entropy(logits, t.to(logits.device), reduction="sum")
        return nats.item()

    score(0)
    start = time.perf_counter()
    for b in range(batches):
        total += score(b)
    rate = batches * BATCH * window / (time.perf_counter() - start)
    peak = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    found = {
        "tokens_per_second": rate,
        "load_seconds": loaded,
        "peak_memory_bytes": max(peak or [0]),
    }
    print(json.dumps(found | {"loss": total / (batches * BATCH * window)}))


if __name__ == "__main__":
    cli.run(main)

"""A 70B Llama's shape on two cards, `--shard 2`: scoring, MMLU, generation, beside transformers
with accelerate's device_map="auto"; and a 7B on one card beside two that hold it between them.

    python benchmarks/shard.py --work /dev/shm --out … --only make perplexity generation peer
    python benchmarks/shard.py --work /dev/shm --out … --only mmlu seven --mmlu data/mmlu
    python benchmarks/shard.py --work /tmp/w --out /tmp/s.json --small --mmlu … # a CPU's rehearsal

`make` writes random bfloat16 weights (131 GiB, and 13 for the 7B, whose vocabulary holds GPT-2's)
as sharded safetensors to --work. It makes a tmpfs there large enough, where it may, and else the
70B's shape some layers less deep; its record says which. Each other part is meant for less than
150 s on two H100s. A part that fails loses none of the others; what runs says how it gets on in a
log beside --out.

Perplexity is eval.py's own rate over 64 batches of 2 x 4096 random tokens; its share is of what
both cards' products of 8192^3 matrices reach together right after it, counting causal attention.
Generation: 64 rows of one 512-token prompt, and two such batches, which work in turns; the rate of
decoding is that of the last 112 of 128 new tokens, and its share is of reading all weights once a
step at both cards' measured copying. Load seconds, and what the host holds beyond the page cache
meanwhile, are those of generation's ranks. The peer scores as many of the same batches as 40 s
allow.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402
from benchmarks.random_weights import is_written, make_room, n_bytes, write  # noqa: E402
from config import GPTConfig, load_config  # noqa: E402
from costs.flops import estimate_flops  # noqa: E402

PARTS = ("make", "perplexity", "mmlu", "generation", "seven", "peer")
BATCH, WINDOW, BATCHES = 2, 4096, 64
ROWS, PROMPT, NEW, SHORT = 64, 512, 128, 16
PEER_SECONDS = 40
SPARE = 2**30  # bytes of --work that are no model's
PATIENCE = 45  # seconds that a command has to end, once it is asked to


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--work", type=Path, required=True, help="for the models: 146 GiB")
    p.add_argument("--out", type=Path, required=True, help="JSON; parts that are there are kept")
    p.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    p.add_argument("--mmlu", type=Path, help="MMLU in its original layout")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, or a directory that holds it")
    p.add_argument("--gpus", type=cli.positive_int, default=2, help="that hold the model (2)")
    p.add_argument("--patience", type=float, default=170.0, help="seconds of a command (170)")
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
    failed = []
    for name in args.only:
        start = time.perf_counter()
        try:
            found = globals()[f"part_{name}"](args)
        except Exception as error:  # an edge: one of the parts
            found = {"failed": cli.reason_of(error)}
            failed.append(name)
        report[name] = found | {"wall_seconds": round(time.perf_counter() - start, 1)}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name]), flush=True)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; {log_of(args)} says more")


def shape(args, large: bool) -> GPTConfig:
    """Of the model that lies there, or is to."""
    if is_written(folder(args, large)):
        return GPTConfig.from_pretrained(folder(args, large))
    config = load_config("llama3-70b" if large else "7b").replace(dropout=0.0)
    if args.small:
        small = {"n_layers": 4, "d_model": 64, "n_heads": 8, "head_dim": 8, "d_ff": 96}
        config = config.replace(**small, n_kv_heads=4)
    return config if large else config.replace(vocab_size=51200)


def folder(args, large: bool) -> Path:
    return args.work / ("shard-large" if large else "shard-7b")


# ---------------------------------------------------------------------------------------------
# The models


def part_make(args) -> dict:
    configs = {folder(args, large): shape(args, large) for large in (True, False)}
    missing = sum(n_bytes(c) for place, c in configs.items() if not is_written(place))
    how = make_room(args.work, missing + SPARE) if missing else "they were there"
    short = missing + SPARE - shutil.disk_usage(args.work).free
    if missing and short > 0:
        place, large = next(iter(configs.items()))
        layer = n_bytes(large) - n_bytes(large.replace(n_layers=large.n_layers - 1))
        configs[place] = large.replace(n_layers=large.n_layers - -(-short // layer))
    models = {}
    for place, config in configs.items():
        start = time.perf_counter()
        if not is_written(place):
            write(config, place)
        models[place.name] = {"bytes": n_bytes(config), "layers": config.n_layers}
        models[place.name]["seconds"] = round(time.perf_counter() - start, 1)
    tokens = np.random.default_rng(0).integers(0, 32000, 1 + BATCHES * BATCH * WINDOW)
    np.save(args.work / "shard.npy", tokens.astype(np.uint16))
    return {"room": how, "models": models}


# ---------------------------------------------------------------------------------------------
# Commands


def torchrun(args, ranks: int, script: Path, *words) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run(args, [*launcher, script, *words])


def own(args, child: str) -> list:
    """This file, as a process that measures."""
    words = [Path(__file__), "--child", child, "--work", args.work, "--out", args.out]
    return [*words, "--gpus", args.gpus, *(["--small"] if args.small else [])]


def log_of(args) -> Path:
    return args.out.with_suffix(".log")


def run(args, words: list) -> str:
    """What a Python process writes, which is in the log as it comes, with a line every 10 s of what
    the cards do. ValueError where it fails, or takes more than --patience."""
    words = [sys.executable, *map(str, words)]
    with log_of(args).open("a") as log:
        begin, start = log.tell(), time.monotonic()
        print(f"{time.strftime('%X')} {' '.join(words[-24:])}", file=log, flush=True)
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(words, stdout=log, stderr=log, env=env) as process:
            while process.poll() is None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    seconds = time.monotonic() - start
                    print(f"{time.strftime('%X')} {seconds:.0f} s {cards()}", file=log, flush=True)
                    if seconds > args.patience + PATIENCE:
                        process.kill()
                    elif seconds > args.patience:
                        process.terminate()  # torchrun ends its ranks
        print(f"{time.strftime('%X')} ended with {process.returncode}", file=log, flush=True)
    with log_of(args).open() as log:
        log.seek(begin)
        said = log.read()
    if process.returncode:
        errors = [
            line for line in said.splitlines() if re.match(r"(\w*[Ee]rror|torch\..*Error)", line)
        ]
        raise ValueError(f"ended with {process.returncode}: {errors[:3] or said[-1500:]}")
    return said


def cards() -> str:
    """Memory and use of each, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = ["--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader"]
    done = subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True)
    return "; ".join(done.stdout.split("\n"))


def answer(said: str) -> dict:
    """The last line that is an object."""
    return json.loads([line for line in said.splitlines() if line.startswith("{")][-1])


def record_of(args, ranks: int, shards: int, large: bool, script: str, *words) -> tuple[dict, dict]:
    """(cost, every array and metric) of a command's record."""
    results = args.work / f"shard-results-{time.time_ns()}"
    words = ["--checkpoint-path", folder(args, large), "--shard", shards, *words]
    words += ["--results-dir", results, *(["--device", "cpu"] if args.small else [])]
    torchrun(args, ranks, ROOT / script, *words)
    (path,) = results.glob("*/*/*-*.json")
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as file:
        bits = {name: file[name].tobytes() for name in file.files}
    bits |= {name: metric["value"] for name, metric in record["metrics"].items()}
    return record["cost"], bits


def scoring_words(args) -> list:
    window = 64 if args.small else WINDOW
    words = [
        "--data-mode",
        "fineweb_npy",
        "--val-npy",
        args.work / "shard.npy",
        "--seq-len",
        window,
    ]
    return [*words, "--batch-size", BATCH, "--max-tokens", 1 + BATCHES * BATCH * window]


def mmlu_words(args, limit: int) -> list:
    if args.mmlu is None:
        raise ValueError("mmlu and seven need --mmlu DIR")
    words = ["--data-path", args.mmlu, "--num-few-shot", 5, "--limit", 1 if args.small else limit]
    return [*words, "--tokenizer-name", args.tokenizer]


def told(cost: dict) -> dict:
    names = ("tokens_per_second", "seconds", "warm_up_seconds", "load_seconds")
    return {name: cost.get(name) for name in (*names, "peak_memory_bytes", "mfu")}


def part_perplexity(args) -> dict:
    cost, _ = record_of(args, args.gpus, args.gpus, True, "eval.py", *scoring_words(args))
    rates, config = answer(run(args, own(args, "ceilings"))), shape(args, True)
    per_token = estimate_flops(config, BATCH, WINDOW)["forward_causal"] / (BATCH * WINDOW)
    reached = cost["tokens_per_second"] * per_token
    return told(cost) | {"share_of_products": reached / rates["flops"], "ceilings": rates}


def part_mmlu(args) -> dict:
    """Some questions of every subject."""
    words = "mmlu_eval.py", *mmlu_words(args, limit=8)
    cost, bits = record_of(args, args.gpus, args.gpus, True, *words)
    return told(cost) | {"rows": cost["rows"], "accuracy": bits["accuracy"]}


def part_seven(args) -> dict:
    """Two cards that hold the 7B between them, beside a whole one on each."""
    scripts = {
        "perplexity": ("eval.py", *scoring_words(args)),
        "mmlu": ("mmlu_eval.py", *mmlu_words(args, limit=100)),
    }
    found = {}
    for name, script in scripts.items():
        whole, wanted = record_of(args, 2, 1, False, *script)
        parts, bits = record_of(args, 2, 2, False, *script)
        ratio = parts["tokens_per_second"] / whole["tokens_per_second"]
        found[name] = {"K=1": told(whole), "K=2": told(parts), "ratio": ratio}
        found[name]["same_bits"] = bits == wanted
    return found


# ---------------------------------------------------------------------------------------------
# Generation, on each rank


def part_generation(args) -> dict:
    told = answer(torchrun(args, args.gpus, *own(args, "generation")))
    rates = answer(run(args, own(args, "ceilings")))
    for case in told["cases"].values():
        steps = case["decode_tokens_per_second"] / case["rows_of_a_step"]
        read = steps * n_bytes(shape(args, True))
        case["share_of_bandwidth"] = read / rates["bytes_per_second"]
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
    return answer(run(args, own(args, "peer")))


def run_peer(args) -> None:
    """The same windows through AutoModelForCausalLM with sdpa, logits of a chunk at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    window, start = 64 if args.small else WINDOW, time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder(args, True), dtype=torch.bfloat16, device_map="cpu" if args.small else "auto"
    ).eval()
    loaded = time.perf_counter() - start
    tokens = torch.from_numpy(np.load(args.work / "shard.npy").astype(np.int64))

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
    total, start, n = 0.0, time.perf_counter(), 0
    while n < BATCHES and (seconds := time.perf_counter() - start) < PEER_SECONDS:
        total, n = total + score(n), n + 1
        print(f"batch {n}, {seconds:.1f} s", flush=True)
    rate = n * BATCH * window / (time.perf_counter() - start)
    peak = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    found = {"tokens_per_second": rate, "batches": n, "load_seconds": loaded}
    found["devices"] = sorted(map(str, set(getattr(model, "hf_device_map", {}).values())))
    found["loss"] = total / (n * BATCH * window)
    print(json.dumps(found | {"peak_memory_bytes": max(peak, default=0)}))


if __name__ == "__main__":
    cli.run(main)

"""eval.py beside transformers' own model on one GPU: tokens a second, memory, time to a result.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 100_000_000
    python benchmarks/perplexity.py --data /dev/shm/bench.npy --work /dev/shm --out results.json

Random weights in bfloat16, saved as a Hugging Face directory that both sides load. Ours is the real
command, `eval.py`, its data loading and checkpoint included. The peer is AutoModelForCausalLM with
sdpa, whose logits go to cross-entropy in float32, timed after warm-up on batches that already lie
on the GPU, for about as long as ours, since cards slow down under load: eager; compiled, the usual
way (`model = torch.compile(model)`); and fused, the best way known to us (model and loss compiled
as one function, so that float32 logits are never written). Ours counts as in a job of 100M tokens:
the loop at its measured rate, and loading the checkpoint. The mean loss of the same windows is
printed for both sides. Tokens beyond a preset's vocabulary are wrapped around: that changes the
loss, not the work.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402

CASES = {  # preset: batch, window, tokens that eval.py scores, batches that the peer is timed on
    "gpt2": (32, 1024, 100_000_000, 600),
    "gpt2-xl": (32, 1024, 4_000_000, 96),
    "7b": (4, 4096, 1_000_000, 60),
}
JOB = 100_000_000  # tokens over which loading the checkpoint is spread
PEERS = ("eager", "compiled", "fused")


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="a shard of GPT-2 tokens")
    p.add_argument("--work", type=Path, required=True, help="for checkpoints: 14 GB for the 7B")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="beside which peers")
    p.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # the script calling itself
    args = p.parse_args(argv)
    if args.peer:
        print(json.dumps(measure_peer(args.models[0], args.data, args.work, args.peer)))
        return
    report = {"machine": machine()}
    for name in args.models:
        directory = save_random(name, args.work)
        rows = report[name] = {}
        for label, measure in measurements(name, directory, args):
            rows[label] = measure()
            args.out.write_text(json.dumps(report, indent=1))  # nothing is lost if the next fails
        print_table(name, rows)


def measurements(name, directory, args):
    """(label, function that measures it) of a model, in their order."""
    yield "eval.py", lambda: measure_ours(name, directory, args)
    for kind in args.peers:
        yield f"transformers {kind}", lambda kind=kind: peer_process(name, args, kind)
    for mode in ("on", "off") if name == "gpt2" else ():
        label = f"eval.py, 1M tokens, --compile {mode}"
        yield label, lambda mode=mode: measure_ours(name, directory, args, 1_000_000, mode)


def save_random(name, work) -> Path:
    import torch

    from config import load_config
    from formats import native
    from model import GPTModel

    directory = work / f"random-{name}"
    if (directory / "config.json").exists():
        return directory
    model = GPTModel.on_meta(load_config(name)).to(torch.bfloat16).to_empty(device="cuda")
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
    directory.mkdir(parents=True, exist_ok=True)
    native.write_weights(model, model.config, directory)
    return directory


def shard_for(name, data, work) -> Path:
    """The shard itself, or the part that is needed with ids wrapped into a smaller vocabulary."""
    from config import load_config

    vocab_size = load_config(name).vocab_size
    if vocab_size >= 50257:
        return data
    wrapped = work / f"wrapped-{vocab_size}.npy"
    if not wrapped.exists():
        tokens = np.load(data, mmap_mode="r")[: CASES[name][2] + 1]
        np.save(wrapped, (tokens % vocab_size).astype(np.uint16))
    return wrapped


def measure_ours(name, directory, args, tokens=None, mode="on") -> dict:
    batch, window, wanted, peer_batches = CASES[name]
    data = shard_for(name, args.data, args.work)
    results = args.work / "bench-results"
    command = [sys.executable, str(ROOT / "eval.py"), "--checkpoint-path", str(directory)]
    command += ["--data-mode", "fineweb_npy", "--val-npy", str(data), "--seq-len", str(window)]
    command += ["--batch-size", str(batch), "--max-tokens", str(tokens or wanted)]
    command += ["--results-dir", str(results), "--run-name", f"{name}-{tokens}-{mode}"]
    start = time.perf_counter()
    done = subprocess.run([*command, "--compile", mode], capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    record_path = next(
        Path(line.removeprefix("record: "))
        for line in done.stdout.splitlines()
        if line.startswith("record: ")
    )
    record = json.loads(record_path.read_text())
    cost, scored = record["cost"], record["data"]["tokens_scored"]
    arrays = np.load(record_path.with_suffix(".npz"))
    first = batch * peer_batches
    rate = cost["tokens_per_second"]
    return {
        "tokens_per_second": JOB / (JOB / rate + cost["load_seconds"]),
        "tokens_per_second_of_the_loop": rate,
        "peak_GiB": cost["peak_memory_bytes"] / 2**30,
        "mfu": cost["mfu"],
        "loss_of_the_peers_windows": arrays["nll"][:first].sum() / arrays["count"][:first].sum(),
        "load_seconds": cost["load_seconds"],
        "warm_up_seconds": cost["warm_up_seconds"],
        "loop_seconds": cost["seconds"],
        "launch_to_result_seconds": wall,
        "compiled": record["protocol"]["compiled"],
        "tokens": scored,
    }  # fmt: skip


def peer_process(name, args, kind) -> dict:
    command = [sys.executable, __file__, "--data", str(args.data), "--work", str(args.work)]
    command += ["--out", str(args.out), "--models", name, "--peer", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_peer(name, data, work, kind) -> dict:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    batch, window, _, n_batches = CASES[name]
    data = shard_for(name, data, work)
    tokens = np.load(data, mmap_mode="r")[: batch * window * n_batches + 1].astype(np.int64)
    inputs = torch.from_numpy(tokens[:-1]).view(n_batches, batch, window).cuda()
    targets = torch.from_numpy(tokens[1:]).view(n_batches, batch, window).cuda()
    model = AutoModelForCausalLM.from_pretrained(
        work / f"random-{name}", dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    ).eval()

    def loss(ids, wanted):
        logits = model(ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    if kind == "compiled":
        model = torch.compile(model)
    if kind == "fused":
        loss = torch.compile(loss)
    with torch.no_grad():
        for _ in range(3):
            loss(inputs[0], targets[0])
        torch.cuda.synchronize()
        ready = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses = [loss(x, y) for x, y in zip(inputs, targets)]
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return {
        "tokens_per_second": inputs.numel() / seconds,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "loss_of_the_peers_windows": float(torch.stack(losses).double().mean()),
        "ready_seconds": ready,
    }


def machine() -> dict:
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(name, rows):
    base = rows.get("transformers compiled", {}).get("tokens_per_second", float("nan"))
    print(f"\n{name}")
    for label, row in rows.items():
        if "error" in row:
            print(f"  {label:<38} {row['error'][-600:]}")
            continue
        print(
            f"  {label:<38} {row['tokens_per_second']:>11,.0f} tokens/s"
            f"  {row['tokens_per_second'] / base:5.2f}x  {row['peak_GiB']:6.2f} GiB"
            f"  loss {row['loss_of_the_peers_windows']:.5f}"
            f"  {row.get('launch_to_result_seconds', row.get('ready_seconds')):6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)

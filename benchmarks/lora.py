"""train.py --lora-rank beside PEFT over transformers' model on one GPU: tokens/s, peak memory.

    python benchmarks/lora.py --work /dev/shm --out results.json        # 7B, 4 x 2048, rank 64
    python benchmarks/lora.py --work /dev/shm --peers eager compiled --quantise rtn-w4-g128 --out …

Random weights in bfloat16, adapters in float32 over all seven matrices of a block, autocast, blocks
recomputed on both sides, fused AdamW, gradients clipped. Ours is train.py itself, its data loading
and its log included; the peer is PEFT's model in a plain loop over batches that already lie on the
GPU, with sdpa: eager, as Trainer runs it, and with each of its layers compiled. The median of the
steps after the first third counts, for all sides alike. --quantise: ours over packed weights too,
as the side "packed". --peft: a folder to import PEFT from.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS, PEERS = ("ours", "packed"), ("eager", "compiled")
LR = 2e-4


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--work", type=Path, required=True, help="14 GB for the 7B")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--config", default="7b")
    p.add_argument("--batch-size", type=cli.positive_int, default=4)
    p.add_argument("--seq-len", type=cli.positive_int, default=2048)
    p.add_argument("--rank", type=cli.positive_int, default=64)
    p.add_argument("--train-embeddings", action="store_true")
    p.add_argument("--no-recompute", action="store_true")
    p.add_argument("--steps", type=cli.positive_int, default=24)
    p.add_argument("--compile", choices=("auto", "off"), default="auto", help="of ours")
    p.add_argument("--peers", nargs="*", choices=PEERS, default=["eager"])
    p.add_argument("--quantise", metavar="RULE", help="ours over weights that are packed so, too")
    p.add_argument("--seconds", type=float, default=120, help="a side may take (120)")
    p.add_argument("--peft", help="folder to import PEFT from")
    p.add_argument("--side", choices=OURS + PEERS, help=argparse.SUPPRESS)  # calls itself
    args = p.parse_args(argv)
    if args.side:
        print(json.dumps(ours(args) if args.side in OURS else peer(args)))
        return
    report = {"machine": machine(), "case": {n: str(v) for n, v in vars(args).items()}}
    save_base(args)
    for side in ("ours", *args.peers, *(["packed"] if args.quantise else [])):
        report[side] = measured(side, sys.argv[1:] if argv is None else argv, args.seconds)
        args.out.write_text(json.dumps(report, indent=1))  # nothing is lost if the next fails
    print_table(report)


def measured(side: str, argv: list[str], seconds: float) -> dict:
    """What a side says in a process of its own, or its error."""
    command = [sys.executable, __file__, *argv, "--side", side]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return {"error": f"not done after {seconds:g} s: {str(error.stderr or '')[-500:]}"}
    if done.returncode:
        return {"error": done.stderr[-1500:]}
    row = json.loads(done.stdout.splitlines()[-1])
    return row | {"seconds": time.perf_counter() - start}


def save_base(args: argparse.Namespace) -> None:
    """The frozen model as a checkpoint, and random tokens."""
    import torch

    import checkpoint
    from config import load_config
    from model import GPTModel

    config = load_config(args.config)
    rng = np.random.default_rng(0)
    n = args.batch_size * args.seq_len * 16 + 1
    np.save(args.work / "lora.npy", rng.integers(0, config.vocab_size, n).astype(np.uint16))
    if (args.work / "lora-base" / "checkpoint-0").exists():
        return
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GPTModel(config).for_inference(torch.bfloat16)
    checkpoint.save_checkpoint(model, None, None, 0, 0, 0.0, args.work / "lora-base")


def ours(args: argparse.Namespace) -> dict:
    """train.py's own loop, in this process so that its peak of memory can be asked for."""
    import tempfile

    import train

    run = tempfile.mkdtemp(dir=args.work)
    words = ["--init-from", args.work / "lora-base/checkpoint-0", "--tokenizer-name", "byte"]
    words += ["--data-mode", "fineweb_npy", "--train-npy", args.work / "lora.npy"]
    words += ["--seq-len", args.seq_len, "--batch-size", args.batch_size, "--lr", LR]
    words += ["--lora-rank", args.rank, "--lora-targets", *TARGETS, "--compile", args.compile]
    words += ["--num-steps", args.steps, "--log-steps", 1, "--warmup-steps", 2]
    words += ["--eval-steps", args.steps, "--checkpoint-path", run, "--dtype", "bfloat16"]
    words += ["--quantise", args.quantise] if args.side == "packed" else []
    words += ["--train-embeddings"] * args.train_embeddings
    words += ["--use-activation-checkpoint"] * (not args.no_recompute)
    train.main([str(word) for word in words])
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    return row_of(rates)


def peer(args: argparse.Namespace) -> dict:
    """PEFT's model, eager or with its layers compiled."""
    if args.peft:
        sys.path.insert(0, args.peft)
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from config import config_to_hf, load_config

    torch.set_float32_matmul_precision("high")
    hf = AutoConfig.for_model(**config_to_hf(load_config(args.config)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(
            hf, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    if not args.no_recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = ["embed_tokens", "lm_head"] if args.train_embeddings else None
    adapters = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=list(TARGETS),
        modules_to_save=saved,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, adapters).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    if args.side == "compiled":
        for layer in model.base_model.model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(np.load(args.work / "lora.npy").astype(np.int64)).to(device)
    batches = tokens[:-1].view(-1, args.batch_size, args.seq_len)
    rates = []
    for step in range(args.steps):
        start = time.perf_counter()
        ids = batches[step % len(batches)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for all of it
        rates.append(ids.numel() / (time.perf_counter() - start))
    return row_of(rates)


def row_of(rates: list[float]) -> dict:
    import torch

    peak = torch.cuda.max_memory_allocated()
    return {
        "tokens_per_second": statistics.median(rates[len(rates) // 3 :]),
        "peak_GiB": peak / 2**30,
        "rates": rates,
    }


def print_table(report: dict) -> None:
    for side, row in report.items():
        if side in OURS + PEERS and "error" in row:
            print(f"  {side:<10} {row['error'][-800:]}")
        elif side in OURS + PEERS:
            rate, peak = row["tokens_per_second"], row["peak_GiB"]
            ratio = report["ours"].get("tokens_per_second", float("nan")) / rate
            print(
                f"  {side:<10} {rate:>9,.0f} tokens/s  {peak:6.2f} GiB  ours is {ratio:.2f}x"
                f"  ({row['seconds']:.0f} s in all)"
            )


if __name__ == "__main__":
    cli.run(main)

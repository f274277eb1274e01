"""Training on packed documents beside training without document masks, on one GPU: tokens/s of the
compiled step, bfloat16.

    python benchmarks/packing.py --out benchmarks/results/packing.json          # about two minutes

Both sides run train.py's own loss, backward pass, clipping and optimizer, in turns, on the same
random tokens; documents' lengths are log-normal, with a median of 500 tokens and a mean of 1,000,
and change from step to step. The goal is a ratio of 0.95 or more.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import train  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402
from config import GPTConfig, load_config  # noqa: E402
from dataset import Source, TokenStream  # noqa: E402
from distributed import Dist  # noqa: E402
from formats.documents import Mark  # noqa: E402
from model import GPTModel  # noqa: E402
from training.batches import Chopped, TrainBatches  # noqa: E402
from training.options import OptimizationOptions  # noqa: E402

END = 50256
SHAPES = {
    "124M, 32 x 1024": (load_config("gpt2").replace(dropout=0.0, bias=False), 32, 1024),
    "1B, 4 x 2048": (
        GPTConfig(
            vocab_size=50304, max_position_embeddings=2048, n_layers=16, n_heads=16, n_kv_heads=8,
            d_model=2048, d_ff=8192, dropout=0.0, activation="silu", norm="rmsnorm",
            position="rope", gated_mlp=True, bias=False, tie_embeddings=True,
        ),
        4, 2048,
    ),
}  # fmt: skip
MARK = Mark(END, opens=True)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    p.add_argument("--rounds", type=cli.positive_int, default=5)
    p.add_argument("--steps", type=cli.positive_int, default=8, help="of a round")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    found: dict = {"machine": machine()}
    for name in args.shapes:
        found[name] = row = measure(*SHAPES[name], args.rounds, args.steps)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{name}: concat {row['concat']:,.0f} tokens/s, document {row['document']:,.0f}: "
            f"{row['ratio']:.3f}; {row['documents_per_window']:.2f} documents a window; "
            f"first steps {', '.join(f'{t:.0f} s' for t in row['first_step'].values())}",
            flush=True,
        )


def documents_of(n_tokens: int) -> TokenStream:
    """Random ids, documents of log-normal lengths, each opened by an end of text."""
    dice = np.random.RandomState(0)
    lengths = np.maximum(1, dice.lognormal(np.log(500), 1.18, n_tokens // 300)).astype(np.int64)
    ids = dice.randint(0, END, n_tokens).astype(np.uint16)
    starts = np.append(0, np.cumsum(lengths))
    ids[starts[starts < n_tokens]] = END
    return TokenStream([Source("random", ids)])


def measure(config: GPTConfig, batch_size: int, seq_len: int, rounds: int, steps: int) -> dict:
    """Median tokens/s of each side's rounds, which take turns."""
    dist = Dist(0, 1, 0, torch.device("cuda", 0))
    amp = torch.autocast("cuda", torch.bfloat16)
    stream, sides, first = documents_of(2**22), {}, {}
    torch.manual_seed(0)
    model = GPTModel(config).cuda()
    optimizer, _ = train.make_optimizer(list(model.parameters()), OptimizationOptions())
    for side, mark in (("concat", None), ("document", MARK)):
        batches = TrainBatches([Chopped(stream, seq_len, mark)], batch_size, 1)
        total = 2 + rounds * steps
        sides[side] = (
            train.load_micro_batches(batches, range(total), dist),
            train.wrap(train.Loss(model), "on", dist),
        )

    def run(side, n):
        micro_batches, loss_fn = sides[side]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            train.backward(loss_fn, model, micro_batches, 1, amp, dist)
            train.clip(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for side in sides:
        first[side] = run(side, 1)
        run(side, 1)
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side, taken in seconds.items():
            taken.append(run(side, steps))
    rates = {s: steps * batch_size * seq_len / statistics.median(t) for s, t in seconds.items()}
    ends = int((stream.read(0, len(stream)) == END).sum())
    per_window = 1 + ends / (len(stream) / seq_len)
    return rates | {
        "ratio": rates["document"] / rates["concat"],
        "first_step": first,
        "seconds": seconds,
        "documents_per_window": per_window,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


if __name__ == "__main__":
    cli.run(main)

"""What a card itself gives in this minute: a model's matrix products alone, and its clocks.

    with Ceiling(config, tokens=16384) as ceiling, Clocks() as clocks:
        before = ceiling.flops_per_second(5.0)     # under load, at this temperature
        start = time.time()
        …                                          # what is measured, in processes of its own
        print(clocks.during(start, time.time()), before, ceiling.flops_per_second(5.0))

A card's datasheet, and a product on a cold one, promise more than any model can have: under load
it sinks its clock to stay within its power. The products are those of the model's shapes in
bfloat16, random numbers into buffers that are there, nothing between them. The process that runs
them stays while others measure, so that it can begin at once when they end; waiting, it launches
nothing and holds about 2 GB.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import GPTConfig  # noqa: E402

HEAD_ROWS = 4096  # of a product with the head: its output is large
BUSY = 90  # percent of its time that a sampled card was at work
SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")
Shape = tuple[int, int, int, int]


class Ceiling:
    """A process that multiplies when asked to."""

    def __init__(self, config: GPTConfig, tokens: int):
        given = json.dumps([shapes(config, tokens), tokens])
        self.process = subprocess.Popen(
            [sys.executable, __file__, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Ceiling":
        return self

    def __exit__(self, *error):
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def flops_per_second(self, seconds: float) -> float:
        """Over so many seconds of products."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def shapes(config: GPTConfig, tokens: int) -> list[Shape]:
    """(times, rows, channels in, channels out) of the products of one batch of so many tokens."""
    from model import GPTModel

    block = GPTModel.on_meta(config).blocks[0]
    each = [p.shape for p in block.parameters() if p.dim() == 2]
    products = [(config.n_layers, tokens, wide, out) for out, wide in each]
    rows = min(tokens, HEAD_ROWS)
    padded = -(-config.vocab_size // 64) * 64
    return [*products, (tokens // rows, rows, config.d_model, padded)]


def multiply(products: list[Shape], tokens: int) -> None:
    """For each line of seconds on standard input: FLOP/s of the products, as a line."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs, work = {}, []
    for times, rows, wide, out in products:
        if wide not in inputs:
            inputs[wide] = torch.randn(tokens, wide, device=device, dtype=dtype)
        weight = 0.02 * torch.randn(out, wide, device=device, dtype=dtype)
        result = torch.empty(rows, out, device=device, dtype=dtype)
        work.append((times, inputs[wide][:rows], weight.t(), result))
    flops = sum(2 * times * rows * wide * out for times, rows, wide, out in products)

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    for line in sys.stdin:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            for times, x, weight, result in work:
                for _ in range(times):
                    torch.mm(x, weight, out=result)
            synchronize()
            done += 1
        print(done * flops / (time.perf_counter() - start), flush=True)


class Clocks:
    """nvidia-smi in the background, asked twice a second; nothing where there is none."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float]]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Clocks":
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

    def _sample(self) -> None:
        query = ["nvidia-smi", f"--query-gpu={','.join(SAMPLED)}", "--id=0"]
        query += ["--format=csv,noheader,nounits"]
        while not self.over.wait(0.5):
            at = time.time()
            try:
                said = subprocess.run(query, capture_output=True, text=True).stdout
                self.samples.append((at, [float(word) for word in said.split(",")]))
            except (OSError, ValueError):  # no nvidia-smi, or a card that does not tell
                return

    def during(self, start: float, end: float) -> dict[str, Any]:
        """Medians while the card was busy, and how many samples that are."""
        seen = [values for at, values in self.samples if start <= at <= end and values[-1] >= BUSY]
        if not seen:
            return {"samples": 0}
        MHz, W, celsius, _ = map(statistics.median, zip(*seen, strict=True))
        return {"samples": len(seen), "MHz": MHz, "W": W, "celsius": celsius}


if __name__ == "__main__":
    multiply(*json.loads(sys.argv[1]))

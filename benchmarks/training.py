"""train.py beside nanoGPT's trainer on one GPU: GPT-2 124M, 32 x 1024 tokens a step, bfloat16.

    python benchmarks/training.py --data /dev/shm/bench.npy --work /dev/shm \\
        --peer "python nanogpt_train.py" --out results.json

`--peer` is a command that trains nanoGPT's model and prints `N tokens/s` lines; it is given the
shard, `bias` or `nobias`, and the number of steps. nanoGPT's default has no biases; both are run.
The median of the logged rates after warm-up counts, for the two sides alike.
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from benchmarks.perplexity import machine  # noqa: E402

BIASES = ("nobias", "bias")


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--peer", help="command of the peer")
    p.add_argument("--steps", type=cli.positive_int, default=120)
    p.add_argument("--biases", nargs="+", choices=BIASES, default=BIASES)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    rows = {"machine": machine()}
    for bias in args.biases:
        rows[f"train.py {bias}"] = rate_of(train_command(args.data, args.work, args.steps, bias))
        if args.peer:
            command = [*shlex.split(args.peer), str(args.data), bias, str(args.steps)]
            rows[f"nanoGPT {bias}"] = rate_of(command)
        args.out.write_text(json.dumps(rows, indent=1))  # nothing is lost if the next fails
    del rows["machine"]
    for label, row in rows.items():
        peer = rows.get(label.replace("train.py", "nanoGPT"), row).get("tokens_per_second")
        rate = row.get("tokens_per_second")
        ratio = f"{rate / peer:5.3f}x" if rate and peer else row.get("error", "")[-800:]
        print(f"  {label:<16} {rate or 0:>11,.0f} tokens/s  {ratio}")


def train_command(data: Path, work: Path, steps: int, bias: str) -> list[str]:
    """train.py on GPT-2 124M, its config written to `work`."""
    config = work / f"train-{bias}.yaml"
    text = (ROOT / "configs" / "gpt2.yaml").read_text().replace("dropout: 0.1", "dropout: 0.0")
    config.write_text(text.replace("gelu_new", "gelu") + f"bias: {str(bias == 'bias').lower()}\n")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    command += ["--data-mode", "fineweb_npy", "--train-npy", str(data), "--seq-len", "1024"]
    command += ["--batch-size", "32", "--num-steps", str(steps), "--log-steps", "10"]
    command += ["--eval-steps", "1000000", "--save-steps", "1000000", "--warmup-steps", "20"]
    return [*command, "--checkpoint-path", str(work / f"train-{bias}")]


def rate_of(command: list[str]) -> dict:
    """The median of the rates that a command prints, and all of them; or its error."""
    done = subprocess.run(command, capture_output=True, text=True)
    rates = [float(m.replace(",", "")) for m in re.findall(r"([\d,.]+) tokens/s", done.stdout)]
    if done.returncode or len(rates) < 5:
        return {"error": done.stdout[-500:] + done.stderr[-2000:]}
    return {"tokens_per_second": statistics.median(rates[3:]), "rates": rates}


if __name__ == "__main__":
    cli.run(main)

"""Scoring with Gemma-2-9B beside transformers' best, in one run on one GPU.

    python benchmarks/gemma.py --out benchmarks/results/gemma.json         # about 4 minutes

Random weights in bfloat16, 8,192 tokens a pass in windows of 2,048, as eval.py does it. Gemma caps
the scores of its attention, and every other layer sees a window: transformers computes that with
its `eager` attention, which holds all scores, and with `flex_attention`; `sdpa`, which leaves the
cap out and so computes another model, is timed to see what the cap costs. Model and loss of the
peer are compiled as one function. Medians of passes after warm-up.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from experts import Size, line, peer_model, score_ours, score_peer  # noqa: E402
from generation import random_model, release  # noqa: E402

import cli  # noqa: E402
from benchmarks import cases  # noqa: E402
from config import load_config  # noqa: E402

ATTENTIONS = ("flex_attention", "eager", "sdpa")


def main(argv=None):
    args = cases.parser(__doc__, budget=540).parse_args(argv)
    device, gpu, report = cases.begin(args)
    c, size = load_config("gemma-2-9b"), Size(args.small)
    if args.small:
        tiny = {"n_layers": 2, "d_model": 64, "d_ff": 96, "vocab_size": 128}
        c = c.replace(**tiny, full_attention_layers=(1,), embedding_scale=8.0)
    batch = size.batches[0]

    def ours(compiled):
        release()
        return score_ours(random_model(c, device), size, batch, gpu, compiled)

    def peers(attention):
        release()
        return score_peer(peer_model(c, device, attention), c, size, batch, gpu, True)

    all_cases = [("roseval, eager", lambda: ours(False)), ("roseval, compiled", lambda: ours(True))]
    for attention in ATTENTIONS:
        name = f"transformers {attention}, compiled"
        all_cases.append((name, lambda attention=attention: peers(attention)))
    cases.measure(all_cases, args, report, line)


if __name__ == "__main__":
    cli.run(main)

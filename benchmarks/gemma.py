"""Scoring with Gemma-2-9B beside transformers' best, in one run on one GPU.

    python benchmarks/gemma.py --out benchmarks/results/gemma.json         # about 4 minutes

Random weights in bfloat16, 8,192 tokens a pass in windows of 2,048, as eval.py does it. Gemma caps
the scores of its attention, and every other layer sees a window: transformers computes that with
its `eager` attention, which holds all scores, and with `flex_attention`; `sdpa`, which leaves the
cap out and so computes another model, is timed to see what the cap costs. Model and loss of the
peer are compiled as one function. Medians of passes after warm-up.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from experts import Size, line, peer_model, score_ours, score_peer  # noqa: E402
from generation import random_model, release  # noqa: E402

import cli  # noqa: E402
from config import load_config  # noqa: E402
from costs.gpus import find_gpu  # noqa: E402

ATTENTIONS = ("flex_attention", "eager", "sdpa")


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    c, size, name = load_config("gemma-2-9b"), Size(False), torch.cuda.get_device_name()
    gpu, batch = find_gpu(name), size.batches[0]
    report = {"gpu": name, "torch": torch.__version__, "cases": {}}

    def told(case, run):
        try:
            result = run()
        except Exception as error:  # an edge: the other cases still have something to say
            result = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        report["cases"][case] = result
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(line(case, result), flush=True)

    def ours(compiled):
        return score_ours(random_model(c, "cuda"), size, batch, gpu, compiled)

    def peers(attention):
        return score_peer(peer_model(c, "cuda", attention), c, size, batch, gpu, True)

    told("roseval, eager", lambda: ours(False))
    release()
    told("roseval, compiled", lambda: ours(True))
    for attention in ATTENTIONS:
        release()
        told(f"transformers {attention}, compiled", lambda a=attention: peers(a))


if __name__ == "__main__":
    cli.run(main)

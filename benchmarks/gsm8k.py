"""GSM8K side by side with lm-evaluation-harness: one run, one GPU, the same five-shot prompts.

    python benchmarks/gsm8k.py --data data/gsm8k --tokenizer data/gpt2 --out benchmarks/results

Random weights with GPT-2's vocabulary, saved in bfloat16 as a Hugging Face directory that both
sides load; they never say a stop string, so both sides draw 256 tokens, lm-eval's limit, for every
problem. Each side is a process of its own, timed from its start to its last line. The peer is
lm-eval's Hugging Face class, given our prompts, which is quicker than its own task machinery; it
gets every n-th problem (--peer-every) in full batches, at each batch size of --peer-batch, and the
time that it generates is scaled to all of them: its quickest batch size counts. In bfloat16 random
weights soon draw other tokens on the two sides; how far texts are alike is in the result.

--tokenizer: a directory with vocab.json and merges.txt. TIKTOKEN_CACHE_DIR, where set, is used by
our side, as users of `--tokenizer-name gpt2` would.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmlu import hflm_terms, make_in_child, offline, timed, tokenizer_name  # noqa: E402

from inputs import read_jsonl  # noqa: E402

CONTEXT = 4096
WANTED = 10


def peer(args):
    """lm-eval's Hugging Face model class over the prompts of every n-th problem."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tasks.word_problems import load_prompt, read_problems

    prompt = load_prompt("gsm8k")
    shots = prompt.shots_of(args.data)
    problems = read_problems(args.data, limit=args.limit)[:: args.peer_every]
    full = len(problems) // args.peer_batch[0] * args.peer_batch[0]  # batches
    problems = problems[: full or None]
    model = HFLM(**hflm_terms(args, "bfloat16", args.peer_batch[0], CONTEXT))
    how = {"until": list(prompt.stop), "do_sample": False, "temperature": 0.0}
    how["max_gen_toks"] = args.new_tokens
    requests = [
        Instance("generate_until", {}, (prompt.render(p, shots), dict(how)), 0, ("", i, 1))
        for i, p in enumerate(problems)
    ]
    start = time.perf_counter()
    texts = model.generate_until(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    names = [problem.name for problem in problems]
    told = {"seconds": seconds, "texts": dict(zip(names, texts, strict=True))}
    Path(args.result).write_text(json.dumps(told))


def ours(args, model_dir, work):
    """(seconds from start to table, record, {problem: text})"""
    results = work / f"ours-{time.time_ns()}"
    command = [sys.executable, "gsm8k_eval.py", "--checkpoint-path", model_dir]
    command += ["--data-path", args.data, "--tokenizer-name", tokenizer_name(args)]
    command += ["--dtype", "bfloat16", "--max-new-tokens", args.new_tokens]
    command += ["--results-dir", results, "--log-samples"]
    command += ["--limit", args.limit] if args.limit else []
    seconds, text = timed(command)
    path = next(results.glob("*/*/gsm8k-*.json"))
    samples = [row for _, _, row in read_jsonl(path.with_suffix(".jsonl"))]
    print(text[-700:])
    return seconds, json.loads(path.read_text()), samples


def shared_start(ours: str, theirs: str) -> float:
    """How much of the peer's text ours begins with."""
    return len(os.path.commonprefix((ours, theirs))) / max(len(theirs), 1)  # noqa: RUF071


def compare(args, work):
    """Yield the row each time that there is more in it."""
    model_dir = work / args.model
    make_in_child(args, args.model, model_dir, CONTEXT)
    row = {"model": args.model, "ours": [], "peers": [], "wanted": WANTED}
    for _ in range(args.repeat):
        seconds, record, samples = ours(args, model_dir, work)
        row["problems"] = record["metrics"]["accuracy"]["n"]
        row["ours"].append(record["cost"] | {"wall_seconds": seconds})
        row["ours_seconds"] = sorted(c["wall_seconds"] for c in row["ours"])[len(row["ours"]) // 2]
        print(f"roseval: {seconds:.1f} s from start to table", flush=True)
        yield row
    texts = {sample["id"]: sample["completion"] for sample in samples}
    for batch in args.peer_batch:
        result = work / f"peer-{batch}.json"
        command = [sys.executable, __file__, "--peer", model_dir, "--data", args.data]
        command += ["--tokenizer", args.tokenizer, "--result", result, "--peer-batch", batch]
        command += ["--peer-every", args.peer_every, "--new-tokens", args.new_tokens]
        command += ["--limit", args.limit] if args.limit else []
        seconds, _ = timed(command, offline())
        told = json.loads(result.read_text())
        whole = seconds - told["seconds"] + told["seconds"] * row["problems"] / len(told["texts"])
        alike = [shared_start(texts[name], text) for name, text in told["texts"].items()]
        row["peers"].append({
            "batch": batch, "problems": len(told["texts"]), "measured_seconds": seconds,
            "whole_seconds": whole, "alike_from_the_start": sum(alike) / len(alike),
        })  # fmt: skip
        row["speedup"] = min(p["whole_seconds"] for p in row["peers"]) / row["ours_seconds"]
        print(f"lm-eval, {batch} rows: {whole:.1f} s for all; {row['speedup']:.1f}x", flush=True)
        yield row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", required=True, help="GSM8K: train.jsonl and test.jsonl")
    p.add_argument("--tokenizer", required=True, help="directory of GPT-2's vocab.json, merges.txt")
    p.add_argument("--model", default="7b", help="a preset (7b)")
    p.add_argument("--new-tokens", type=int, default=256, help="of each answer (lm-eval's 256)")
    p.add_argument("--limit", type=int, help="problems")
    p.add_argument("--repeat", type=int, default=1, help="our runs; the median counts (1)")
    p.add_argument("--peer-every", type=int, default=8, help="the peer gets every n-th problem (8)")
    p.add_argument("--peer-batch", type=int, nargs="+", default=[32, 64], help="(32 64)")
    p.add_argument("--out", default="benchmarks/results")
    p.add_argument("--peer", help=argparse.SUPPRESS)  # these two: the script calling itself
    p.add_argument("--result", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.data, args.tokenizer = Path(args.data).resolve(), Path(args.tokenizer).resolve()
    if args.peer:
        return peer(args)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    about = {"gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    about["lm_eval"] = importlib.metadata.version("lm_eval")
    path = Path(args.out) / "gsm8k.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for row in compare(args, Path(work)):
            path.write_text(json.dumps({"about": about, "row": row}, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

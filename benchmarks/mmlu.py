"""MMLU side by side with lm-evaluation-harness: one run, one GPU, the same 14,042 prompts.

    python benchmarks/mmlu.py --data data/mmlu --tokenizer data/gpt2 --out benchmarks/results
    python benchmarks/mmlu.py --data data/mmlu --tokenizer data/gpt2 --models 7b --gpus 2

Random weights with GPT-2's vocabulary and a context of 4,096, so that nothing is truncated, saved
in bfloat16 as Hugging Face directories that both sides load. Each side is a process of its own,
timed from its start to its last line: imports, loading, prompts, tokenising, scoring, the table.
The peer's requests are built from our templates, which is quicker than its own task machinery. On
the larger models it gets every n-th question of every subject (--peer-every) and its scoring time
is scaled by the length of their prompts to all of them: whole subjects would not do, for one of
them, professional_law, is a quarter of all tokens. With --gpus, only roseval on so many GPUs is
run, and added to the model's row of an earlier run. With --no-peer the peer's figures of an earlier
run on the same GPU stay, under its date. The row is written after each step, so that what was
measured is kept.

--tokenizer: a directory with vocab.json and merges.txt. TIKTOKEN_CACHE_DIR, where set, is used by
our side, as users of `--tokenizer-name gpt2` would.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHOTS = 5
MODELS = {"gpt2": 1, "gpt2-xl": 8, "7b": 16}  # the peer gets every n-th question
PEER_BATCH = {"gpt2": 32, "gpt2-xl": 32, "7b": 16}
TARGETS = {"gpt2": 10, "gpt2-xl": 5, "7b": 5}
OF_THE_PEER = ("peer_seconds", "peer_measured_seconds", "peer_part", "peer_questions", "peer_batch")
OF_THE_PEER += ("target", "same_prediction", "largest_difference", "peer_date")


def make_model(name, directory, context):
    """Random weights of a preset with GPT-2's vocabulary, made on the GPU."""
    import torch

    from config import load_config
    from formats import native
    from model import GPTModel

    config = load_config(name).replace(
        vocab_size=50257, max_position_embeddings=context, dropout=0.0
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = GPTModel(config).to(torch.bfloat16)
    directory.mkdir(parents=True)
    native.write_weights(model, config, directory)


def make_in_child(args, name, directory, context):
    """The same in a process of its own, which leaves nothing on the GPU."""
    command = [sys.executable, ROOT / "benchmarks/mmlu.py", "--make", name, "--result", directory]
    command += ["--data", directory.parent, "--tokenizer", args.tokenizer, "--context", context]
    timed(command)


def tokenizer_name(args):
    """Of our side: what its users would say where tiktoken's files are at hand."""
    return "gpt2" if os.environ.get("TIKTOKEN_CACHE_DIR") else args.tokenizer


def hflm_terms(args, dtype, batch, context) -> dict:
    """What lm-eval's Hugging Face class is made with, from the directory --peer."""
    import torch

    return {
        "pretrained": str(args.peer),
        "tokenizer": str(args.tokenizer),
        "dtype": dtype,
        "batch_size": batch,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "max_length": context,
    }


# ---------------------------------------------------------------------------------------------
# The peer: this file, run as a process of its own


def peer(args):
    """lm-eval's Hugging Face model class over the five-shot prompts of every n-th question."""
    import numpy as np

    from tasks.questions import read_data
    from tasks.templates import load_template

    template = load_template("lm_eval")
    data = read_data(args.data, SHOTS)
    asked = data.questions[:: args.peer_every]
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(**hflm_terms(args, args.dtype, args.peer_batch, args.context))
    requests = []
    heads = {s: template.render_head(s, None, data.examples[s], "letter") for s in data.subjects}
    for i, q in enumerate(asked):
        context = heads[q.subject] + template.render_question(q)
        for letter in "ABCD":
            pair = (context, f" {letter}")
            requests.append(Instance("loglikelihood", {}, pair, "ABCD".index(letter), ("", i, 1)))
    loaded = time.perf_counter()
    values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    scored = time.perf_counter()
    values = np.array(values).reshape(-1, 4)
    right = values.argmax(-1) == np.array([q.answer for q in asked])
    print(f"accuracy {right.mean():.4f} of {len(right)}")
    result = {"questions": len(right), "score_seconds": scored - loaded, "every": args.peer_every}
    np.savez(args.result, logprobs=values)
    Path(args.result).with_suffix(".json").write_text(json.dumps(result))


# ---------------------------------------------------------------------------------------------
# Both sides, timed


def timed(command, env=None):
    """Wall-clock seconds of a process, start to exit; its output is shown if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, env=env
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
        raise RuntimeError(f"{' '.join(map(str, command))} failed with {done.returncode}")
    return seconds, done.stdout


def offline() -> dict:
    """The environment of a process that asks no hub."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run_ours(args, model_dir, work, gpus=1):
    results = work / f"ours-{gpus}-{time.time_ns()}"
    launch = [sys.executable]
    if gpus > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
    command = [*launch, "mmlu_eval.py", "--checkpoint-path", model_dir, "--data-path", args.data]
    command += ["--num-few-shot", SHOTS, "--tokenizer-name", tokenizer_name(args)]
    command += ["--dtype", args.dtype]
    seconds, text = timed([*command, "--results-dir", results])
    path = next(results.glob("*/*/mmlu-*.json"))
    record = json.loads(path.read_text())
    return seconds, record, path.with_suffix(".npz"), text


def run_peer(args, name, model_dir, work):
    every = args.peer_every or MODELS[name]
    result = work / f"peer-{name}.npz"
    batch = args.peer_batch or PEER_BATCH[name]
    command = [sys.executable, __file__, "--peer", model_dir, "--data", args.data]
    command += ["--result", result, "--tokenizer", args.tokenizer, "--dtype", args.dtype]
    command += ["--peer-every", every, "--peer-batch", batch, "--context", args.context]
    seconds, _ = timed(command, offline())
    return seconds, json.loads(result.with_suffix(".json").read_text()), result, batch


def part_of_the_work(data, every) -> float:
    """How much of all prompts, which the peer runs whole, every n-th has: in characters."""
    before = {
        subject: sum(len(e.question) + sum(map(len, e.choices)) for e in examples)
        for subject, examples in data.examples.items()
    }
    sizes = [before[q.subject] + len(q.question) + sum(map(len, q.choices)) for q in data.questions]
    return sum(sizes[::every]) / sum(sizes)


def beside_the_peer(args, name, model_dir, work, ours_seconds, arrays) -> dict:
    """The row's part about the peer: its time for all prompts, and whether it answers alike."""
    import numpy as np

    from tasks.questions import read_data

    seconds, told, peer_arrays, batch = run_peer(args, name, model_dir, work)
    part = part_of_the_work(read_data(args.data, SHOTS), told["every"])
    whole = seconds - told["score_seconds"] + told["score_seconds"] / part
    ours = np.load(arrays)["logprobs"][:: told["every"]]
    theirs = np.load(peer_arrays)["logprobs"]
    return {
        "peer_seconds": whole,
        "peer_measured_seconds": seconds,
        "peer_part": part,
        "peer_questions": told["questions"],
        "peer_batch": batch,
        "speedup": whole / ours_seconds,
        "target": TARGETS[name],
        "same_prediction": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


def compare(args, row, work):
    """Yield the model's row each time that there is more in it."""
    name = row["model"]
    model_dir = work / name
    make_in_child(args, name, model_dir, args.context)
    for gpus in args.gpus or [1] * args.repeat:
        seconds, record, arrays, text = run_ours(args, model_dir, work, gpus)
        cost = record["cost"] | {"wall_seconds": seconds}
        if args.gpus:
            row[f"gpus_{gpus}"] = cost
        else:
            row["ours"] = [*row.get("ours", []), cost]
            row["questions"] = record["metrics"]["accuracy"]["n"]
            row["ours_seconds"] = min(cost["wall_seconds"] for cost in row["ours"])
            if "peer_seconds" in row:
                row["speedup"] = row["peer_seconds"] / row["ours_seconds"]
        print(f"{name} roseval, {gpus} GPU: {seconds:.1f} s from start to table", flush=True)
        yield row
    print(text[-900:])
    if not (args.no_peer or args.gpus):
        row |= beside_the_peer(args, name, model_dir, work, row["ours_seconds"], arrays)
        print(f"{name} lm-eval: {row['peer_seconds']:.1f} s; speed-up {row['speedup']:.1f}")
        yield row
    timed(["rm", "-r", model_dir])


def report(rows, about) -> str:
    lines = [
        "# MMLU: roseval and lm-evaluation-harness",
        "",
        f"{about['gpu']}, torch {about['torch']}, lm-eval {about['lm_eval']}, {about['date']}. "
        "Five-shot, all 14,042 questions; seconds from process start to printed table; random "
        f"weights, context {about['context']:,}. The arithmetic limit: the GPU's dense rate for "
        "every prefix and every row once, the head where something is scored, no padding. "
        "`benchmarks/mmlu.py` made this file.",
        "",
        "| model | roseval, s | of it scoring, s | tokens/s | of the arithmetic limit | "
        "lm-eval, s | speed-up | wanted | same prediction |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        best = min(row["ours"], key=lambda cost: cost["wall_seconds"])
        mfu = "–" if best["mfu"] is None else f"{best['mfu']:.1%}"
        cells = [f"{row['model']} {row['dtype']}", f"{row['ours_seconds']:.1f}"]
        cells += [f"{best['seconds']:.2f}", f"{best['tokens_per_second']:,.0f}", mfu]
        if "speedup" in row:
            scaled = "" if row["peer_part"] > 0.999 else f" (from {row['peer_part']:.0%})"
            cells += [f"{row['peer_seconds']:.1f}{scaled}", f"{row['speedup']:.1f}×"]
            cells += [f"≥ {row['target']}×", f"{row['same_prediction']:.2%}"]
        else:
            cells += ["–"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    dates = {row["peer_date"] for row in rows if "peer_date" in row}
    if dates:
        lines += [
            "",
            f"lm-eval was run on {', '.join(sorted(dates))}, on such a GPU, and its answers "
            "compared with what we gave then.",
        ]
    for row in rows:
        one = min(row["ours"], key=lambda cost: cost["wall_seconds"])
        for gpus, cost in ((key[5:], row[key]) for key in row if key.startswith("gpus_")):
            lines += [
                "",
                f"{row['model']} on {gpus} GPUs: {cost['wall_seconds']:.1f} s, scoring "
                f"{cost['seconds']:.2f} s ({one['seconds'] / cost['seconds']:.2f}× of one).",
            ]
    return "\n".join(lines) + "\n"


def order_of(row):
    return list(MODELS).index(row["model"])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", required=True, help="MMLU in its original layout")
    p.add_argument("--tokenizer", required=True, help="directory of GPT-2's vocab.json, merges.txt")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--context", type=int, default=4096, help="1024 shows truncation (4096)")
    p.add_argument("--peer-every", type=int, help="the peer gets every n-th question only")
    p.add_argument("--peer-batch", type=int, help="the peer's batch size")
    p.add_argument("--no-peer", action="store_true")
    p.add_argument("--repeat", type=int, default=2, help="our runs; the fastest counts (2)")
    p.add_argument("--gpus", nargs="*", type=int, default=[], help="roseval on so many GPUs")
    p.add_argument("--out", default="benchmarks/results")
    p.add_argument("--peer", help=argparse.SUPPRESS)  # these three: the script calling itself
    p.add_argument("--make", help=argparse.SUPPRESS)
    p.add_argument("--result", help=argparse.SUPPRESS)
    args = p.parse_args()
    args.data, args.tokenizer = Path(args.data).resolve(), Path(args.tokenizer).resolve()
    if args.peer:
        return peer(args)
    if args.make:
        return make_model(args.make, Path(args.result), args.context)
    import importlib.metadata as metadata

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    about = {"gpu": gpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    about["context"] = args.context
    parts = ["mmlu", *(gpu or "cpu").lower().split()]
    parts += [str(args.context)] if args.context != 4096 else []
    parts += [args.dtype] if args.dtype != "bfloat16" else []
    path = Path(args.out) / ("-".join(parts) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {"rows": [], "about": {}}
    rows, date = before["rows"], before["about"].get("date")
    known = before["about"].get("lm_eval", "not run")
    about["lm_eval"] = known if args.no_peer else metadata.version("lm_eval")
    with tempfile.TemporaryDirectory() as work:
        for model in args.models:  # a model measured anew replaces its row, the others stay
            earlier = next((r for r in rows if r["model"] == model), None)
            if args.gpus and earlier is None:
                p.error(f"{path} has no row of {model} to add to: run it without --gpus first")
            begun = earlier if args.gpus else {"model": model, "dtype": args.dtype}
            if args.no_peer and not args.gpus and earlier:
                begun |= {name: earlier[name] for name in OF_THE_PEER if name in earlier}
                begun.setdefault("peer_date", date)
            for row in compare(args, begun, Path(work)):
                rows = sorted([r for r in rows if r["model"] != model] + [row], key=order_of)
                path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
                path.with_suffix(".md").write_text(report(rows, about))
    print(report(rows, about))


if __name__ == "__main__":
    main()

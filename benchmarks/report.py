"""How long the report takes for a large results directory, and the synthetic directory itself.

    python benchmarks/report.py                             # 1,000 checkpoints x 3 evaluations
    python benchmarks/report.py --checkpoints 36 --keep DIR # a small one to look at
    python benchmarks/report.py --checkpoints 3334 --browser  # 10,000 records; opens the page

The records have the sizes of real ones (14,042 questions, 164 tasks, 1,000 windows) and plausible
learning curves; examples have difficulties of their own, so paired comparisons mean something.
Prints one JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results import (  # noqa: E402
    config_hash,
    data_words,
    metric,
    new_record,
    save_record,
    share,
)
from stats import (  # noqa: E402
    choice_logprob,
    pass_at_k,
    pass_at_k_summary,
    ratio_stderr,
)
from tasks.confidence import measured  # noqa: E402

CATEGORIES = ("stem", "humanities", "social_sciences", "other")
FAILURES = ("wrong answer", "exception", "syntax error", "timeout", "memory", "sandbox")
SUBJECTS = [f"subject_{i:02d}" for i in range(57)]


def accuracy_of(correct):
    return share(int(correct.sum()), len(correct))


def jittered(rng, points: list[dict]) -> list[dict]:
    """A curve or bins of a record of its own, which no compression can take for another's."""
    return [
        {name: v * rng.uniform(0.98, 1) if isinstance(v, float) else v for name, v in p.items()}
        for p in points
    ]


def perplexity_record(rng, common, skill, world):
    count = np.full(1000, 1024)
    count[-1] = 300
    loss = 2.6 + 4.5 * (1 - skill) ** 2 + world["text"] + rng.normal(0, 0.02, 1000)
    nll = loss * count
    value = float(nll.sum() / count.sum())
    error = ratio_stderr(nll, count)
    metrics = {
        "loss": metric(value, error, 1000, "lower", "nats per token"),
        "perplexity": metric(float(np.exp(value)), float(np.exp(value) * error), 1000, "lower"),
        "bits_per_byte": metric(value / np.log(2) / 4.4, error / np.log(2) / 4.4, 1000, "lower"),
    }
    files = {}
    for name, part in (("wiki.txt", slice(0, 400)), ("code.txt", slice(400, 1000))):
        ratio = float(nll[part].sum() / count[part].sum())
        files[name] = {"loss": metric(ratio, ratio_stderr(nll[part], count[part]), 400)}
    protocol = {"window": 1024, "stride": 1024, "bos": False, "dtype": "bfloat16", "batch_size": 32}
    data = {"files": list(files), "hash": "d" * 64, "tokens": int(count.sum()), "bytes": 4_500_000}
    labels = {"start": "from token {:,}"}
    examples = {"unit": "windows", "scores": {"loss": "nll"}, "weight": "count", "labels": labels}
    words = ["window 1024", "stride 1024", "bfloat16", *data_words(data)]
    about = {"data": data, "examples": examples, "words": words, "breakdown": {"file": files}}
    record = new_record("perplexity", metrics, protocol, **about, **common)
    return record, {"nll": nll, "count": count, "start": np.arange(1000) * 1024}


def mmlu_record(rng, common, skill, world):
    subject, hard, gold = world["subject"], world["hard"], world["gold"]
    logits = rng.normal(0, 1, (len(gold), 4)).astype(np.float32)
    logits[np.arange(len(gold)), gold] += 3.2 * skill - hard
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    correct = logprobs.argmax(1) == gold
    if world["sure"] is None or rng.random() < 0.01:  # resampling costs more than all else here
        world["sure"] = measured(np.exp(logprobs.max(1)) ** 0.8, correct)
    sure, drawn, _ = world["sure"]
    drawn = {name: jittered(rng, points) for name, points in drawn.items()}
    overall = accuracy_of(correct)
    by_subject = {
        n: {"accuracy": accuracy_of(correct[subject == i])} for i, n in enumerate(SUBJECTS)
    }
    macro = float(np.mean([m["accuracy"]["value"] for m in by_subject.values()]))
    letters = {
        letter: {
            "predicted": float((logprobs.argmax(1) == i).mean()),
            "gold": float((gold == i).mean()),
        }
        for i, letter in enumerate("ABCD")
    }
    breakdown = {
        "category": {
            name: {"accuracy": accuracy_of(correct[subject % 4 == i])}
            for i, name in enumerate(CATEGORIES)
        },
        "subject": by_subject,
        "letter": letters,
        **drawn,
    }
    metrics = {"accuracy": overall, "accuracy_macro": metric(macro, unit="share")}
    metrics |= {name: sure[name] for name in ("ece", "brier")}
    protocol = {"template": "lm_eval", "scoring": "letter", "shots": 5, "dtype": "bfloat16"}
    data = {"files": ["mmlu"], "hash": "e" * 64}
    examples = {"unit": "questions", "scores": {"accuracy": "correct"}}
    examples |= {"labels": {"subject": "{}"}, "tie_break": {"accuracy": "gold_logprob"}}
    words = ["lm_eval", "letter", "5-shot", "bfloat16"]
    about = {"data": data, "examples": examples, "words": words, "breakdown": breakdown}
    record = new_record("mmlu", metrics, protocol, **about, **common)
    arrays = {"correct": correct, "logprobs": logprobs, "gold": gold}
    arrays |= {"gold_logprob": choice_logprob(logprobs, gold)}
    arrays |= {"subject": np.array(SUBJECTS)[subject]}
    return record, arrays


def humaneval_record(rng, common, skill, world):
    n = np.full(164, 20)
    c = rng.binomial(n, 1 / (1 + np.exp(3 * (world["task"] - 4 * skill + 3))))
    wrong = int((n - c).sum())
    shares = np.array([5, 3, 6 * (1 - skill), 0.6, 0.2, 0.02])
    kinds = rng.multinomial(wrong, shares / shares.sum())
    ks = {f"pass@{k}": k for k in (1, 10)}
    metrics = {k: metric(**pass_at_k_summary(n, c, ks[k]), unit="share") for k in ks}
    estimates = {name: pass_at_k(n, c, k) for name, k in ks.items()}
    failure = dict(zip(FAILURES, (int(x) for x in kinds)))
    protocol = {"num_samples": 20, "temperature": 0.8, "top_p": 0.95, "dtype": "bfloat16"}
    protocol |= {"sandbox": "A", "seed": 42}
    data = {"files": ["HumanEval.jsonl.gz"], "hash": "f" * 64}
    examples = {"unit": "tasks", "scores": {name: name for name in ks}}
    words = ["20 samples", "temperature 0.8", "top-p 0.95", "bfloat16", *data_words(data)]
    about = {"data": data, "examples": examples, "words": words, "breakdown": {"failure": failure}}
    record = new_record("humaneval", metrics, protocol, **about, **common)
    return record, {"n": n, "c": c} | estimates


MAKERS = {
    "perplexity": (perplexity_record, 2_100_000, 0.52),
    "mmlu": (mmlu_record, 1_400_000, 0.41),
    "humaneval": (humaneval_record, 30_000, 0.12),
}


def make_results(directory, checkpoints: int, runs: int = 3, questions: int = 14_042, seed=0):
    """Write a synthetic results directory: `checkpoints` in all, spread over `runs`, and one
    checkpoint without a step, as a published model to compare with would be."""
    rng = np.random.default_rng(seed)
    world = {
        "text": rng.normal(0, 0.4, 1000),
        "subject": np.sort(rng.integers(0, 57, questions)),
        "hard": rng.normal(1.2, 1, questions)
        + rng.normal(0, 0.5, 57).repeat(-(-questions // 57))[:questions],
        "gold": rng.integers(0, 4, questions),
        "task": rng.normal(0, 1, 164),
        "sure": None,  # calibration of the last record that was asked
    }
    names = ("baseline", "wider-mlp", "more-data", "long-context", "small-lr", "seed-2")
    per_run = -(-(checkpoints - 1) // runs)
    places = [(i % runs, i // runs + 1) for i in range(checkpoints - 1)]
    for run, index in [*places, (None, None)]:
        if run is None:
            skill, step, name, title = 0.7, None, "gpt2-xl", "published"
        else:
            step = round(index * 20_000 / per_run)
            skill = (0.8 + 0.06 * run) * (1 - np.exp(-3 * step / 20_000))
            name, title = f"checkpoint-{step}", names[run]
        fingerprint = config_hash({"run": title, "step": step})
        checkpoint = {"path": f"checkpoints/{title}/{name}", "name": name, "step": step}
        checkpoint |= {"tokens": step and step * 524_288, "fingerprint": fingerprint}
        for maker, speed, mfu in MAKERS.values():
            seconds = float(rng.normal(40, 1.5))
            cost = {"seconds": seconds, "tokens_per_second": float(rng.normal(speed, speed / 60))}
            cost |= {"mfu": float(rng.normal(mfu, 0.005)), "gpu": "NVIDIA H200", "world_size": 2}
            cost["peak_memory_bytes"] = int(rng.normal(1.2e9, 1e6))
            common = {"run": title, "checkpoint": checkpoint, "cost": cost}
            record, arrays = maker(rng, common, skill, world)
            save_record(directory, record, arrays)
    failed = checkpoint | {"name": "checkpoint-torn", "fingerprint": "0" * 64, "step": 20_500}
    reason = "checkpoint-torn/model.safetensors: header says 548,105,171 bytes, the file has 9,216"
    common = {"run": names[0], "checkpoint": failed, "status": "failed", "reason": reason}
    save_record(directory, new_record("perplexity", {}, {"window": 1024}, **common))


WAIT = 20  # seconds for all of its figures
STAMPS = """<script>
const seen = { tables: "main section", first_figures: ".main-svg", all: "html[data-figures]" };
setInterval(() => { for (const [name, selector] of Object.entries(seen)) {
  if (!document.querySelector(selector)) continue;
  document.body.dataset[name] = performance.now();
  delete seen[name];
} }, 20);
</script>"""


def opened(page: Path) -> dict[str, float]:
    """Seconds from the navigation until a headless Chromium has the page's tables, its first
    figures and all of them, by the page's own clock: to look on meanwhile would slow it."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(page.read_text().replace("<noscript>", f"{STAMPS}<noscript>", 1))
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.goto(copy.as_uri(), wait_until="commit", timeout=0)
        tab.wait_for_timeout(WAIT * 1000)
        stamps = tab.evaluate("({...document.body.dataset})")
        browser.close()
    return {name: round(float(milliseconds) / 1000, 2) for name, milliseconds in stamps.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--questions", type=int, default=14_042)
    parser.add_argument("--keep", help="make the directory here, or take what is there")
    parser.add_argument("--browser", action="store_true", help="open the page, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(args.keep or temporary) / "results"
        start = time.perf_counter()
        if not directory.exists():  # kept
            make_results(directory, args.checkpoints, args.runs, args.questions)
        made = time.perf_counter() - start
        command = [sys.executable, str(ROOT / "report.py"), str(directory)]
        times, cpu = [], []
        for _ in range(3):
            start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
        size = (directory / "report.html").stat().st_size
        pages = [opened(directory / "report.html") for _ in range(3)] if args.browser else []
    out = {"checkpoints": args.checkpoints, "records": 3 * args.checkpoints + 1}
    out |= {"report_seconds": [round(t, 2) for t in times], "page_bytes": size}
    out["cpu_seconds"] = [round(t, 2) for t in cpu]
    out |= {"opened": pages} if pages else {}
    out["load"] = os.getloadavg()[0]  # of others too: they share these processors
    print(json.dumps(out | {"making_seconds": round(made, 1)}))


if __name__ == "__main__":
    main()

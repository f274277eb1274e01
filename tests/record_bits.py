"""Every script's numbers to the bit, recorded before a change of the code and compared after it.

    python tests/record_bits.py /tmp/before.json            # on the old commit
    python tests/record_bits.py /tmp/after.json --against /tmp/before.json

Runs each script on small CPU fixtures, on one and on two ranks, and keeps every metric and the
sha256 of every array. Names of files, keys, times and code versions may differ; numbers may not.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import builders  # noqa: E402
from builders import torchrun  # noqa: E402

from config import GPTConfig  # noqa: E402


def make_fixtures(root: Path) -> None:
    builders.saved_checkpoint(root / "run", 10)
    builders.saved_checkpoint(root / "run", 20)
    builders.saved_checkpoint(root / "llama", 10, "llama")
    builders.saved_checkpoint(root / "windowed", 10, "windowed")
    model = builders.tiny_model("gpt", 7)
    config = {k: v for k, v in model.config.to_dict().items() if k in ROSETRAINER}
    (root / "old").mkdir()
    torch.save({"model": model.state_dict(), "step": 5, "config": config}, root / "old/a.pt")
    save_phimoe(root / "phimoe")
    text = "def f(x):\n    return x + 1\n" * 9
    (root / "a.txt").write_text(text)
    (root / "b.txt").write_text("naïve café — 数据 🙂\n" * 7)
    builders.token_shard(root / "x.npy")
    builders.small_mmlu(root / "mmlu")
    builders.small_humaneval(root / "problems.jsonl")
    samples = [
        {"task_id": f"Test/{i}", "completion": f"    return x + {i if i != 1 else 7}\n"}
        for i in range(3)
    ]
    (root / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (root / "sweep.yaml").write_text(
        f"perplexity: {{data-mode: fineweb_npy, val-npy: {root / 'x.npy'}, seq-len: 32}}\n"
        f"mmlu:\n  - {{data-path: {root / 'mmlu'}, num-few-shot: 1}}\n"
        f"  - {{data-path: {root / 'mmlu'}, num-few-shot: 2, template: continuation}}\n"
    )


ROSETRAINER = set(list(GPTConfig.__dataclass_fields__)[:8])


def save_phimoe(folder: Path) -> None:
    """A model that only transformers runs today."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=256,
    )
    PhimoeForCausalLM(config).save_pretrained(folder)


EVAL = ["--seq-len", "32", "--batch-size", "4", "--tokenizer-name", "byte"]
TEXT = ["--val-data", "{r}/a.txt", "{r}/b.txt"]
SHARD = ["--data-mode", "fineweb_npy", "--val-npy", "{r}/x.npy"]
MMLU = ["--data-path", "{r}/mmlu", "--tokenizer-name", "byte", "--log-samples"]
PROGRAMS = ["--data-path", "{r}/problems.jsonl", "--max-new-tokens", "12", "--workers", "1"]
PROGRAMS += ["--tokenizer-name", "byte"]
CASES = {  # name: (script, flags)
    "eval text": ("eval.py", ["--checkpoint-path", "{r}/run", *TEXT, *EVAL]),
    "eval shard": ("eval.py", ["--checkpoint-path", "{r}/llama", *SHARD, *EVAL]),
    "eval stride bos": (
        "eval.py",
        ["--checkpoint-path", "{r}/windowed", *TEXT, *EVAL, "--stride", "12", "--bos"],
    ),
    "eval random bf16": (
        "eval.py",
        ["--checkpoint-path", "{r}/old/a.pt", *SHARD, *EVAL, "--windows", "random", "--bf16"],
    ),
    "eval transformers": ("eval.py", ["--checkpoint-path", "{r}/phimoe", *SHARD, *EVAL]),
    "mmlu both": (
        "mmlu_eval.py",
        [
            *("--checkpoint-path", "{r}/run/checkpoint-10", *MMLU, "--num-few-shot", "2"),
            *("--template", "lm_eval", "continuation", "--permute-choices", "2"),
        ],
    ),
    "mmlu generate": (
        "mmlu_eval.py",
        ["--checkpoint-path", "{r}/llama", *MMLU, "--scoring", "generate", "letter"],
    ),
    "mmlu windowed": (
        "mmlu_eval.py",
        ["--checkpoint-path", "{r}/windowed", *MMLU, "--num-few-shot", "1"],
    ),
    "mmlu transformers": (
        "mmlu_eval.py",
        ["--checkpoint-path", "{r}/phimoe", *MMLU, "--num-few-shot", "1"],
    ),
    "humaneval greedy": (
        "humaneval_eval.py",
        ["--checkpoint-path", "{r}/run", *PROGRAMS],
    ),
    "humaneval sampled": (
        "humaneval_eval.py",
        [
            *("--checkpoint-path", "{r}/llama", *PROGRAMS, "--num-samples", "4"),
            *("--temperature", "0.8", "--top-k", "20", "--k", "2", "--batch-size", "3"),
        ],
    ),
    "humaneval transformers": (
        "humaneval_eval.py",
        [
            *("--checkpoint-path", "{r}/phimoe", *PROGRAMS, "--num-samples", "2"),
            *("--temperature", "0.8"),
        ],
    ),
    "sweep": (
        "sweep.py",
        [
            *("--checkpoint-path", "{r}/run", "--evaluations", "{r}/sweep.yaml"),
            *("--tokenizer-name", "byte", "--poll-seconds", "0.1"),
        ],
    ),
}
TRAIN = ["--tokenizer-name", "byte", "--train-data", "{r}/a.txt", "{r}/b.txt", "--num-steps", "4"]
TRAIN += ["--seq-len", "16", "--n-layers", "1", "--n-heads", "2", "--d-model", "16", "--d-ff", "32"]
TRAIN += ["--eval-steps", "2", "--val-ratio", "0.2", "--log-steps", "1", "--dropout", "0.1"]


def numbers_of(results_dir: Path) -> dict:
    """{checkpoint/evaluation/...: metrics, breakdown and array hashes} of a results folder."""
    found = {}
    for path in sorted(results_dir.rglob("*.json")):
        record = json.loads(path.read_text())
        protocol = record["protocol"]
        name = [record["checkpoint"]["name"], record["evaluation"]]
        name += [protocol.get("template"), protocol.get("scoring"), protocol.get("shots")]
        arrays = {}
        if record["files"].get("arrays"):
            with np.load(path.with_name(record["files"]["arrays"]["name"])) as npz:
                for key in npz.files:
                    array = npz[key]
                    arrays[key] = f"{array.dtype} {array.shape} " + digest(array.tobytes())
        values = {"metrics": record["metrics"], "breakdown": record["breakdown"], "arrays": arrays}
        values["status"] = record["status"]
        if record["files"].get("samples"):
            lines = path.with_name(record["files"]["samples"]["name"]).read_bytes()
            values["samples"] = digest(lines)
        found["/".join(map(str, name))] = plain_numbers(values)
    assert found, f"{results_dir} holds no records"
    return found


def plain_numbers(value):
    """Metrics as {value, stderr, n} or numbers: fields that describe a metric are no numbers, and
    files may lie anywhere."""
    if isinstance(value, dict):
        if value.keys() - {"better", "unit"} == {"value"}:
            return value["value"]
        return {
            k.rpartition("/")[2] if k.startswith("/") else k: plain_numbers(v)
            for k, v in value.items()
            if k not in ("better", "unit")
        }
    return [plain_numbers(v) for v in value] if isinstance(value, list) else value


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def record() -> dict:
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_fixtures(root)

        def fill(flags):
            return [flag.replace("{r}", str(root)) for flag in flags]

        for n in (0, 2):
            for name, (script, flags) in CASES.items():
                results = root / "results" / f"{name}-{n}".replace(" ", "-")
                print(f"{n or 1} rank(s): {name}", file=sys.stderr)
                where = ["--device", "cpu", "--results-dir", results]
                torchrun(n, script, *fill(flags), *where, cwd=root)
                out[f"{name}, {n or 1} rank(s)"] = numbers_of(results)
            print(f"{n or 1} rank(s): train", file=sys.stderr)
            target = root / f"trained-{n}"
            where = ["--device", "cpu", "--checkpoint-path", target]
            torchrun(n, "train.py", *fill(TRAIN), *where, cwd=root)
            weights = digest((target / "checkpoint-4/model.safetensors").read_bytes())
            lines = [json.loads(line) for line in (target / "log.jsonl").open()]
            for line in lines:
                line.pop("tokens_per_second", None)
            out[f"train, {n or 1} rank(s)"] = {"weights": weights, "log": lines}
        print("samples file, compute, checkpoint", file=sys.stderr)
        sampled = fill(["--samples-file", "{r}/samples.jsonl", "--data-path", "{r}/problems.jsonl"])
        torchrun(0, "humaneval_eval.py", *sampled, cwd=root)
        out["samples file"] = (root / "samples.jsonl_results.jsonl").read_text()
        for flags in (
            ["--config", "7b"],
            ["--config", "7b", "--training", "--fits"],
            ["--config", "mixtral-8x7b", "--json", "--gpu", "h200"],
            ["--config", "gpt2", "--explain"],
            ["--params", "7e9"],
        ):
            out[" ".join(["compute", *flags])] = digest(
                torchrun(0, "compute.py", *flags, cwd=root).stdout.encode()
            )
        where = ["inspect", root / "run/checkpoint-10"]
        inspected = torchrun(0, "checkpoint.py", *where, cwd=root).stdout
        out["inspect"] = re.sub(re.escape(str(root)), "", inspected)
    return json.loads(json.dumps(out))


def differences(a, b, where="") -> list[str]:
    """What differs of all that `a` has; what is new in `b` is no difference."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where} / {k}")]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a!r:.90} -> {b!r:.90}"]


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", type=Path)
    p.add_argument("--against", type=Path, help="an earlier recording")
    args = p.parse_args()
    found = record()
    args.out.write_text(json.dumps(found, indent=1))
    if args.against:
        lines = differences(json.loads(args.against.read_text()), found)
        print("\n".join(lines) if lines else "equal to the bit")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()

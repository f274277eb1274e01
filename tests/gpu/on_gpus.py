"""Commands of every verb on GPUs, and all that their records hold; and what is held already."""

import gc
import json

import numpy as np
import torch
from builders import small_humaneval, small_mmlu, token_shard, torchrun


def held() -> int:
    """Bytes on the GPU that tests before this one still hold; what nobody holds is freed."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def write_data(root) -> None:
    """What `commands` evaluate: tokens, questions, problems."""
    token_shard(root / "x.npy", n=200_000)
    small_mmlu(root / "mmlu", n=40)
    small_humaneval(root / "problems.jsonl", n=8)


def commands(root) -> dict:
    """{name: script and flags}; eval and MMLU, and what is drawn of bytes."""
    eval_words = ["eval.py", "--data-mode", "fineweb_npy", "--val-npy", root / "x.npy"]
    eval_words += ["--seq-len", "1024", "--batch-size", "4"]
    draw = ["humaneval_eval.py", "--data-path", root / "problems.jsonl", "--num-samples", "16"]
    draw += ["--temperature", "0.8", "--max-new-tokens", "64", "--workers", "2", "--k", "1"]
    draw += ["--batch-size", "16"]
    mmlu = ["mmlu_eval.py", "--data-path", root / "mmlu", "--num-few-shot", "5"]
    return {
        "eval": [*eval_words, "--compile", "off"],
        "eval compiled": [*eval_words, "--compile", "on"],
        "mmlu": mmlu,
        "letters": [*mmlu, "--scoring", "generate"],
        "humaneval": [*draw, "--compile", "off"],
        "humaneval compiled": [*draw, "--compile", "on"],
    }


def draws(words) -> bool:
    return words[0] == "humaneval_eval.py" or "generate" in words


def run(gpus, results, words, *more):
    """(the record, all that its arrays, metrics and samples hold) of a command on `gpus` ranks."""
    words = [*words, "--tokenizer-name", "byte", *more]
    out = torchrun(gpus, *words, "--results-dir", results, cold=True)
    assert "unbatched P2P" not in out.stderr
    (path,) = results.glob("*/*/*-*.json")
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as npz:
        bits = {name: npz[name].tobytes() for name in npz.files}
    samples = path.with_suffix("") / "samples.jsonl"
    return record, bits | {"metrics": record["metrics"]} | (
        {"samples": samples.read_bytes()} if samples.exists() else {}
    )

"""humaneval_eval.py on CUDA, end to end: the real command, its verdicts judged again from the file,
the same samples from a second run and from two GPUs.

ROSEVAL_DATA=... python -m pytest tests/gpu/test_humaneval_gpu.py    # two GPUs for the last part
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import results
from config import GPTConfig
from model import GPTModel
from tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random") / "checkpoint-10"
    directory.mkdir()
    torch.manual_seed(0)
    shape = {"n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_model": 256, "d_ff": 512}
    llama = {"norm": "rmsnorm", "activation": "silu", "position": "rope", "gated_mlp": True}
    llama |= {"bias": False, "tie_embeddings": False, "dropout": 0.0}
    config = GPTConfig(vocab_size=257, max_position_embeddings=2048, **shape, **llama)
    checkpoint.write_weights(GPTModel(config), config, directory, build_tokenizer("byte"))
    return directory


def draw(saved, data_dir, where, gpus=1):
    """The real command on 6 tasks, 8 samples each: (record, bytes of samples.jsonl)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={gpus}", ROOT / "humaneval_eval.py", "--checkpoint-path", saved]
    command += ["--data-path", data_dir / "HumanEval.jsonl.gz", "--limit", "6", "--k", "2"]
    command += ["--num-samples", "8", "--temperature", "0.8", "--max-new-tokens", "100"]
    command += ["--results-dir", where, "--compile", "off"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    (record,) = results.load_records(where)
    (samples,) = where.rglob("samples.jsonl")
    return record, samples


def test_drawn_on_a_gpu_and_judged_beside(saved, data_dir, tmp_path):
    record, samples = draw(saved, data_dir, tmp_path / "one")
    assert results.load_arrays(record)["n"].tolist() == [8] * 6
    assert record["metrics"].keys() == {"pass@1", "pass@2"}
    assert record["cost"]["gpu"] and record["cost"]["peak_memory_bytes"] > 0
    assert record["protocol"]["dtype"] == "bfloat16"
    # a samples file of these six tasks, judged without a model
    lines = data_dir.joinpath("HumanEval.jsonl.gz")
    command = [sys.executable, ROOT / "humaneval_eval.py", "--samples-file", samples]
    command += ["--data-path", lines, "--ignore-incomplete"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    again = Path(f"{samples}_results.jsonl").read_text().splitlines()
    kept = [(s["task_id"], s["completion"], s["passed"]) for s in results.load_samples(record)]
    assert len(kept) == 48 and len({completion for _, completion, _ in kept}) > 6
    assert kept == [(s["task_id"], s["completion"], s["passed"]) for s in map(json.loads, again)]
    # the same bytes from a second run, and from two GPUs
    for gpus in range(1, min(torch.cuda.device_count(), 2) + 1):
        _, other = draw(saved, data_dir, tmp_path / f"again-{gpus}", gpus)
        assert other.read_bytes() == samples.read_bytes(), f"{gpus} GPUs"

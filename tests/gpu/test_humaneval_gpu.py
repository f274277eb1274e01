"""humaneval_eval.py on CUDA, end to end: the real command, its verdicts judged again from the file,
the same samples from a second run and from two GPUs.

ROSEVAL_DATA=... python -m pytest tests/gpu/test_humaneval_gpu.py    # two GPUs for the last part
"""

import json
from pathlib import Path

import pytest
import torch
from builders import saved_checkpoint, torchrun

import results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    shape = {"n_layers": 4, "d_model": 256, "d_ff": 512, "max_position_embeddings": 2048}
    return saved_checkpoint(tmp_path_factory.mktemp("random"), kind="llama", std=None, **shape)


def draw(saved, data_dir, where, gpus=1):
    """The real command on 6 tasks, 8 samples each: (record, bytes of samples.jsonl)."""
    words = ["--checkpoint-path", saved, "--data-path", data_dir / "HumanEval.jsonl.gz"]
    words += ["--limit", "6", "--k", "2", "--num-samples", "8", "--temperature", "0.8"]
    words += ["--max-new-tokens", "100", "--results-dir", where, "--compile", "off"]
    print(torchrun(gpus, "humaneval_eval.py", *words, cold=True).stdout)
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
    words = ["--samples-file", samples, "--data-path", lines, "--ignore-incomplete"]
    torchrun(0, "humaneval_eval.py", *words, cold=True)
    again = Path(f"{samples}_results.jsonl").read_text().splitlines()
    kept = [(s["task_id"], s["completion"], s["passed"]) for s in results.load_samples(record)]
    assert len(kept) == 48 and len({completion for _, completion, _ in kept}) > 6
    assert kept == [(s["task_id"], s["completion"], s["passed"]) for s in map(json.loads, again)]
    # the same bytes from a second run, and from two GPUs
    for gpus in range(1, min(torch.cuda.device_count(), 2) + 1):
        _, other = draw(saved, data_dir, tmp_path / f"again-{gpus}", gpus)
        assert other.read_bytes() == samples.read_bytes(), f"{gpus} GPUs"

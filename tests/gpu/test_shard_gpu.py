"""--shard 2 on two GPUs over NCCL: the bits of one GPU in eval, MMLU and generation, of a model of
1B parameters, and the memory of each.

python -m pytest tests/gpu/test_shard_gpu.py        # two GPUs
"""

import json

import numpy as np
import pytest
import torch
from builders import CONFIGS, save_model, small_humaneval, small_mmlu, token_shard, torchrun

from costs.memory import estimate_memory
from costs.shards import shares, weight_bytes
from costs.symbols import Setup
from model import GPTModel

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SHAPE = {"n_layers": 16, "d_model": 2048, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64}
SHAPE |= {"d_ff": 8192, "vocab_size": 128256, "max_position_embeddings": 2048}
CONFIG = CONFIGS["llama"].replace(**SHAPE, tie_embeddings=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shard")
    torch.manual_seed(0)
    for name, config in (("run", CONFIG), ("bytes", CONFIG.replace(vocab_size=257, n_layers=5))):
        model = GPTModel.on_meta(config)
        model.allocate(torch.bfloat16, "cuda")
        for p in model.parameters():
            p.data.normal_(std=0.02) if p.dim() > 1 else p.data.fill_(1.0)
        save_model(model.cpu(), root / name, 1)
    del model
    torch.cuda.empty_cache()
    token_shard(root / "x.npy", n=200_000)
    small_mmlu(root / "mmlu", n=40)
    small_humaneval(root / "problems.jsonl", n=8)
    return root


def run(root, gpus, size, results, script, *words):
    """(the record, all that its arrays and metrics hold) of a command."""
    drawn = script == "humaneval_eval.py" or "generate" in words  # of bytes, or it ends at once
    model = root / ("bytes" if drawn else "run")
    words = [script, *words, "--checkpoint-path", model, "--tokenizer-name", "byte"]
    out = torchrun(gpus, *words, "--shard", size, "--results-dir", results, cold=True)
    assert "unbatched P2P" not in out.stderr
    (path,) = results.glob("*/*/*-*.json")
    record = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as npz:
        bits = {name: npz[name].tobytes() for name in npz.files}
    samples = path.with_suffix("") / "samples.jsonl"
    return record, bits | {"metrics": record["metrics"]} | (
        {"samples": samples.read_bytes()} if samples.exists() else {}
    )


def commands(root):
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


@pytest.mark.parametrize(
    "name",
    ["eval", "eval compiled", "mmlu", "letters", "humaneval", "humaneval compiled"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_that_hold_one_model_have_the_bits_of_one(root, tmp_path, name, dtype):
    script, *words = [*commands(root)[name], "--dtype", dtype]
    one, wanted = run(root, 1, 1, tmp_path / "one", script, *words)
    two, found = run(root, 2, 2, tmp_path / "two", script, *words)
    assert found == wanted
    assert two["cost"]["shard"] == 2 and two["resume_key"] == one["resume_key"]
    print(name, dtype, *(r["cost"]["tokens_per_second"] for r in (one, two)))


def test_memory_is_the_share_that_compute_says(root, tmp_path):
    words = commands(root)["eval"]
    record, _ = run(root, 2, 2, tmp_path, *words, "--dtype", "bfloat16")
    setup = Setup(dtype="bf16", training=False, shard=2)
    fullest = max(weight_bytes(*share) for share in shares(CONFIG, setup))
    whole = weight_bytes(CONFIG, Setup(dtype="bf16", training=False))
    peak = record["cost"]["peak_memory_bytes"]
    run_of = dict(training=False, dtype="bf16", shard=2)
    expected = estimate_memory(CONFIG, 4, 1024, **run_of)["scoring_bytes"]
    print("peak, estimated, whole, GiB:", *(n / 2**30 for n in (peak, expected, whole)))
    assert fullest < peak < expected * 1.1 and fullest < 0.7 * whole


def test_auto_takes_one_where_one_is_enough(root, tmp_path):
    script, *words = commands(root)["eval"]
    record, _ = run(root, 2, "auto", tmp_path, script, *words)
    assert record["cost"]["world_size"] == 2 and "shard" not in record["cost"]


# A rank of the group runs out of memory in the midst of drawing: both go on with half the rows.
SHORT_OF_MEMORY = """
import checkpoint
from backends import Sampling
from backends.local import Local, facts_of
from backends.parallel import in_groups, load
with distributed.setup("cuda", 600) as gpus:
    gpus = in_groups(gpus, 2, None, "bfloat16")
    ckpt = checkpoint.open({path!r})
    model = load(ckpt, "bfloat16", gpus)
    real, calls = model.through_blocks, []
    def through_blocks(x, *args):
        calls.append(x.shape)
        if gpus.rank == {short} and x.shape[0] > 8 and x.shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(x, *args)
    model.through_blocks = through_blocks
    local = Local(model, facts=facts_of(ckpt, None, "bfloat16", "cuda"), dist=gpus)
    prompts = [[5, 6, 7], [8, 9]]
    mine = list(local.generate(prompts, Sampling(max_new_tokens=8), 16, batch_size=16, end_ids=()))
    found = gpus.gather(len(mine))
    if gpus.is_main:
        print("found", local.ran()["batch_size"], sum(found))
"""


@pytest.mark.parametrize("short", [0, 1])
def test_memory_that_runs_out_on_one_of_two(root, tmp_path, short):
    places = "import sys\nsys.path[:0] = [{!r}]\nimport torch, cli, distributed\ndef main():\n"
    body = SHORT_OF_MEMORY.format(path=str(root / "run/checkpoint-1"), short=short)
    script = tmp_path / "short.py"
    from builders import ROOT

    lines = "\n".join("    " + line for line in body.strip().splitlines())
    script.write_text(places.format(str(ROOT)) + lines + "\ncli.run(main)\n")
    out = torchrun(2, script, cold=True)
    assert "found 8 32" in out.stdout, out.stdout

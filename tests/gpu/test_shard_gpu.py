"""--shard 2 on two GPUs over NCCL: the bits of one GPU in eval, MMLU and generation, of a model of
1B parameters, and the memory of each.

python -m pytest tests/gpu/test_shard_gpu.py        # two GPUs
"""

import pytest
import torch
from builders import CONFIGS, ROOT, save_model, torchrun
from on_gpus import commands, draws, run, write_data

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
    write_data(root)
    return root


def evaluate(root, gpus, size, results, words):
    # drawn of a model of bytes, or the first token ends the text
    model = root / ("bytes" if draws(words) else "run")
    return run(gpus, results, words, "--checkpoint-path", model, "--shard", size)


@pytest.mark.parametrize(
    "name",
    ["eval", "eval compiled", "mmlu", "letters", "humaneval", "humaneval compiled"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_that_hold_one_model_have_the_bits_of_one(root, tmp_path, name, dtype):
    words = [*commands(root)[name], "--dtype", dtype]
    one, wanted = evaluate(root, 1, 1, tmp_path / "one", words)
    two, found = evaluate(root, 2, 2, tmp_path / "two", words)
    assert found == wanted
    assert two["cost"]["shard"] == 2 and two["resume_key"] == one["resume_key"]
    print(name, dtype, *(r["cost"]["tokens_per_second"] for r in (one, two)))


@pytest.mark.parametrize("rule", ["rtn-w4-g128", "fp8-a8"])
@pytest.mark.parametrize("name", ["eval compiled", "mmlu", "humaneval"])
def test_packed_weights_too(root, tmp_path, name, rule):
    """And their sizes in memory are those of the whole."""
    words = [*commands(root)[name], "--dtype", "bfloat16", "--quantise", rule]
    one, wanted = evaluate(root, 1, 1, tmp_path / "one", words)
    two, found = evaluate(root, 2, 2, tmp_path / "two", words)
    assert found == wanted
    held = [record["protocol"]["quantisation"] for record in (one, two)]
    assert held[0] == held[1] and held[0]["packed"] == 4 * one["checkpoint"]["config"]["n_layers"]


def test_memory_is_the_share_that_compute_says(root, tmp_path):
    words = [*commands(root)["eval"], "--dtype", "bfloat16"]
    record, _ = evaluate(root, 2, 2, tmp_path, words)
    setup = Setup(dtype="bf16", training=False, shard=2)
    fullest = max(weight_bytes(*share) for share in shares(CONFIG, setup))
    whole = weight_bytes(CONFIG, Setup(dtype="bf16", training=False))
    peak = record["cost"]["peak_memory_bytes"]
    run_of = dict(training=False, dtype="bf16", shard=2)
    expected = estimate_memory(CONFIG, 4, 1024, **run_of)["scoring_bytes"]
    print("peak, estimated, whole, GiB:", *(n / 2**30 for n in (peak, expected, whole)))
    assert fullest < peak < expected * 1.1 and fullest < 0.7 * whole


def test_auto_takes_one_where_one_is_enough(root, tmp_path):
    record, _ = evaluate(root, 2, "auto", tmp_path, commands(root)["eval"])
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
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    script.write_text(places.format(str(ROOT)) + lines + "\ncli.run(main)\n")
    out = torchrun(2, script, cold=True)
    assert "found 8 32" in out.stdout, out.stdout

"""train.py --fsdp on two GPUs over NCCL, or on one: against DDP, resumed, compiled, and its memory
against compute.py's.

python -m pytest tests/gpu/test_fsdp_gpu.py -s      # about four minutes; -s: figures
"""

import json
import shutil

import pytest
import torch
from builders import CONFIGS, ROOT, token_shard, torchrun

import checkpoint
from costs.memory import estimate_memory

GPUS = min(2, torch.cuda.device_count())
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")

LARGE = CONFIGS["llama"].replace(
    n_layers=8, d_model=2048, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=8192, vocab_size=32000,
    max_position_embeddings=2048,
)  # fmt: skip
SMALL = CONFIGS["llama"].replace(n_layers=4, d_model=256, n_heads=4, n_kv_heads=2, d_ff=512)
MIXTURE = SMALL.replace(
    n_experts=4, n_experts_per_token=2, d_ff_expert=128, router_norm=True, router_loss=0.1
)
TIED = SMALL.replace(tie_embeddings=True)
KINDS = {"large": LARGE, "llama": SMALL, "mixture": MIXTURE, "tied": TIED}

# train.py, each rank of which says at its end what torch allocated at most
MEASURED = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import torch, cli, train
def main():
    train.main()
    print("peak", cli.rank(), torch.cuda.max_memory_allocated(), flush=True)
cli.run(main)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp")
    (root / "measured.py").write_text(MEASURED)
    token_shard(root / "train.npy", 2_000_000)
    token_shard(root / "val.npy", 20_000, seed=1)
    for name, config in KINDS.items():
        (root / f"{name}.yaml").write_text(json.dumps(config.to_dict()))
    return root


def run(root, kind, out, *more, seq_len=256, val=True):
    """Its log; the most bytes that each rank allocated."""
    flags = ["--config", root / f"{kind}.yaml", "--data-mode", "fineweb_npy", "--warmup-steps", 2]
    flags += ["--tokenizer-name", "byte", "--seq-len", seq_len, "--train-npy", root / "train.npy"]
    flags += ["--val-npy", root / "val.npy"] if val else []
    flags += ["--log-steps", 1, "--checkpoint-path", root / out, *more]
    done = torchrun(GPUS, root / "measured.py", *flags, cold=True)
    peaks = [line.split() for line in done.stdout.splitlines() if line.startswith("peak ")]
    lines = (root / out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], [int(peak) for _, _, peak in sorted(peaks)]


def losses(log):
    return [entry.get("loss", entry.get("val_loss")) for entry in log]


@pytest.mark.parametrize("kind", ["llama", "mixture", "tied"])
def test_float32_steps_are_those_of_ddp(root, kind):
    """Up to the order of sums, of which CUDA's backward kernels take another each time."""
    more = ["--no-amp", "--compile", "off", "--num-steps", 6, "--eval-steps", 3, "--lr", "1e-4"]
    ddp, _ = run(root, kind, f"ddp-{kind}", *more)
    fsdp, _ = run(root, kind, f"fsdp-{kind}", *more, "--fsdp", "--use-activation-checkpoint")
    assert len(ddp) == len(fsdp) == 8
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-5)
    one, two = (
        checkpoint.load_model(root / f"{how}-{kind}/checkpoint-6", "float32")
        for how in ("ddp", "fsdp")
    )
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind, how", [("llama", "on"), ("mixture", "off"), ("tied", "off")])
def test_resumed_in_bfloat16(root, kind, how):
    """The steps after a checkpoint, once more from there; and the same losses as DDP but for what
    is rounded."""
    more = ["--compile", how, "--num-steps", 6, "--eval-steps", 3, "--lr", "1e-4"]
    ddp, _ = run(root, kind, f"bf16-ddp-{kind}", *more)
    out = f"bf16-{kind}"
    straight, _ = run(root, kind, out, *more, "--fsdp")
    assert losses(straight) == pytest.approx(losses(ddp), rel=2e-3)
    shutil.rmtree(root / out / "checkpoint-6")
    again, _ = run(root, kind, out, *more, "--fsdp", "--resume")
    assert losses(again) == pytest.approx(losses(straight), rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_is_what_compute_py_says(root, recompute):
    """Of 0.6B parameters in bfloat16, eager; with what DDP takes and how fast both are."""
    more = ["--num-steps", 8, "--eval-steps", 8, "--batch-size", 4, "--compile", "off"]
    more += ["--use-activation-checkpoint"] if recompute == "full" else []
    for how in ([], ["--fsdp"]):
        out = f"memory-{recompute}-{len(how)}"
        log, peaks = run(root, "large", out, *more, *how, seq_len=2048, val=False)
        rate = sorted(entry["tokens_per_second"] for entry in log)[len(log) // 2]
        zero = 3 if how else 0
        estimate = estimate_memory(
            LARGE, 4, 2048, dtype="bf16", dp=GPUS, zero=zero, recompute=recompute
        )["peak_bytes"]
        gib = [round(n / 2**30, 2) for n in (*peaks, estimate)]
        print(f"\n{'fsdp' if how else 'ddp'}, recompute {recompute}: {rate:,.0f} tokens/s, "
              f"peaks {gib[:-1]} GiB, estimated {gib[-1]}")  # fmt: skip
        if how:
            assert max(peaks) == pytest.approx(estimate, rel=0.1)

"""Adapters on CUDA: what compute.py estimates, gradients beside float32's, compiled beside eager.

python -m pytest -q tests/gpu/test_lora_gpu.py
"""

import pytest
import torch
from builders import save_model, tiny_model
from on_gpus import held

import checkpoint
import train
from backends import scoring
from config import load_config
from costs.memory import estimate_memory
from model import GPTModel
from training import lora
from training.options import LoraOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def step_of(model, adapters, ids, optimizer=None):
    """A step as train.py takes it; the loss."""
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = train.Loss(model)(ids, ids)
    loss.backward()
    if optimizer:
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("whole", [False, True])
def test_peak_of_a_step_is_what_compute_says(recompute, whole):
    """Eight layers of a 7B's width: within 3%."""
    config, before = load_config("7b").replace(n_layers=8), held()
    model = GPTModel.on_meta(config)
    model.allocate(torch.bfloat16, CUDA)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    adapters = lora.adapt(model, "llama", LoraOptions(lora_rank=64, train_embeddings=whole))
    model.activation_checkpointing = recompute == "full"
    model.train()
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (2, 2048), device="cuda")
    torch.cuda.empty_cache()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step_of(model, adapters, ids, optimizer)
    peak = torch.cuda.max_memory_allocated() - before
    run = {"lora_rank": 64, "train_embeddings": whole, "recompute": recompute}
    estimate = estimate_memory(config, 2, 2048, "bf16", **run)
    print(
        f"{recompute} {whole}: measured {peak / 2**30:.3f} GiB, estimated", estimate["peak_bytes"]
    )
    assert estimate["peak_bytes"] == pytest.approx(peak, rel=0.05 if recompute == "full" else 0.03)


@pytest.mark.parametrize("kind, rule", [("llama", None), ("gpt", None), ("llama", "rtn-w4-g32")])
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_gradients_are_near_float32s(kind, rule, compiled, tmp_path):
    """Of the frozen half precision's fused GELU too, which must not pass the adapters by; and over
    packed weights, not all of which have adapters."""
    targets = ("q_proj", "v_proj", "down_proj") if rule else None
    options = LoraOptions(lora_rank=4, lora_targets=targets, quantise=rule)
    base = tiny_model(kind, d_model=64, d_ff=128, n_layers=3)
    for p in base.parameters():
        p.data = p.data.bfloat16().float()  # so that a rule makes the same codes of both
    path = save_model(base, tmp_path, 1)
    config, ids = checkpoint.open(path).config, torch.randint(257, (2, 64), device="cuda")
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model, adapters = lora.adapted(str(path), config, options, dtype, CUDA)
        for p in adapters.parameters():
            p.data.add_(torch.randn_like(p) * 0.05)
        if compiled and dtype == "bfloat16":
            scoring.compile_blocks(model, True)
        model.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model.nll(model.hidden(ids).flatten(0, 1), ids.flatten()).mean()
        loss.backward()
        found.append((loss.item(), [p.grad for p in adapters.parameters()]))
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
            quiet = model.nll(model.hidden(ids).flatten(0, 1), ids.flatten()).mean()
        assert quiet.item() == pytest.approx(loss.item(), rel=1e-2)  # B counts there as well
    (exact, wanted), (loss, got) = found
    assert loss == pytest.approx(exact, rel=2e-2)
    for a, b in zip(wanted, got, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95

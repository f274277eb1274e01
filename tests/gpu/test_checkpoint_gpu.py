"""Checkpoints on CUDA: straight to the device in the final dtype, with the head padded there.

python -m pytest tests/gpu/test_checkpoint_gpu.py
"""

import pytest
import torch

from checkpoint import load_checkpoint, load_model, save_checkpoint
from config import load_config
from model import GPTModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b"])
def test_load_to_the_device(tmp_path, name, dtype):
    config = load_config(name).replace(n_layers=4, vocab_size=50257)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPTModel(config)
    path = save_checkpoint(model, None, None, 0, 1, 1.0, tmp_path)
    wanted = {key: t.cpu() for key, t in model.state_dict().items()}
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model(path, dtype, "cuda")
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    state = loaded.state_dict()
    assert state.keys() == wanted.keys()
    for key, t in state.items():
        assert t.is_cuda and torch.equal(t.cpu(), wanted[key].to(t.dtype)), key
    head = loaded.lm_head.weight
    largest = head.numel() * head.element_size()
    copies = 1 if config.tie_embeddings else 2
    body = sum(t.numel() * t.element_size() for k, t in state.items() if t.shape != head.shape)
    assert held < 1.02 * (body + copies * largest) + (1 << 20)
    assert peak < held + 1.02 * largest + (64 << 20)  # the head once more, while it is padded
    logits = loaded(torch.arange(64, device="cuda")[None])[0]
    assert logits.shape == (1, 64, 50257) and logits.isfinite().all()


def test_resume_on_cuda_is_exact(tmp_path):
    config = load_config("gpt2").replace(n_layers=2, dropout=0.0)
    ids = torch.arange(512, device="cuda").view(2, 256)
    torch.use_deterministic_algorithms(True, warn_only=True)

    def fresh(seed):
        torch.manual_seed(seed)
        model = GPTModel(config).cuda()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(ids, labels=ids)[1].backward()
        optimizer.step()

    try:
        model, optimizer = fresh(0)
        step(model, optimizer)
        path = save_checkpoint(model, optimizer, None, 0, 1, 1.0, tmp_path)
        step(model, optimizer)
        again, optimizer2 = fresh(1)
        load_checkpoint(path, again, optimizer2)
        step(again, optimizer2)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, t in model.state_dict().items():
        assert torch.equal(t, again.state_dict()[key]), key

"""Features of the families on CUDA: scores of one pass and after a shared prefix, as on the CPU.

python -m pytest -q tests/gpu/test_families_gpu.py        # a minute: flex attention compiles
"""

import copy

import pytest
import torch
from builders import tiny_model

from backends.kvcache import PrefixCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTHS = {"max_position_embeddings": 300, "n_layers": 3, "d_model": 256, "d_ff": 512}
GEMMA = {"norm_offset": True, "post_norm": True, "embedding_scale": 16.0, "sliding_window": 40}
GEMMA |= {"full_attention_layers": (2,), "activation": "gelu_new", "head_dim": 256}
SHAPES = {
    "gemma2": GEMMA | {"attention_softcap": 4.0, "logit_softcap": 8.0},
    "gemma3": GEMMA | {"qk_norm": True, "local_rope_theta": 100.0},
    "olmo2": {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_over": "width"},
    "phi": {"norm": "layernorm", "parallel_residual": True, "shared_norm": True, "bias": True}
    | {"gated_mlp": False, "head_bias": True, "rotary_fraction": 0.5, "activation": "gelu_new"},
    "cohere": {"norm": "layernorm", "parallel_residual": True, "shared_norm": True}
    | {"qk_norm": True, "qk_norm_type": "layernorm", "qk_norm_over": "heads", "logit_scale": 0.5},
    "nanochat": {"norm_weight": False, "embedding_norm": True, "activation": "relu2"}
    | {"gated_mlp": False, "qk_norm": True, "qk_norm_after_rope": True, "logit_softcap": 6.0},
}


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_scores_equal_those_of_the_cpu(name, dtype, bound):
    """One pass of 150 tokens, and rows of 90 after a prefix of 60, in nats by target."""
    exact = tiny_model("llama", std=0.05, **WIDTHS, **SHAPES[name])
    model = copy.deepcopy(exact).cuda().for_inference(getattr(torch, dtype))
    ids = torch.randint(0, 257, (3, 150), generator=torch.Generator().manual_seed(0))
    ids[1:, :60] = ids[0, :60]
    targets = ids.roll(-1, dims=1)
    wanted = exact.nll(exact.hidden(ids).flatten(0, 1), targets.flatten()).view(3, 150)

    def error(hidden, start):
        rows = targets[:, start:].cuda().flatten()
        nats = model.nll(hidden.flatten(0, 1), rows).view(3, -1)
        return (nats.cpu() - wanted[:, start:]).abs().mean().item()

    assert error(model.hidden(ids.cuda()), 0) < bound
    prefix = PrefixCache(model, 60)
    model.hidden(ids[:1, :60].cuda(), cache=prefix.filling())
    assert error(model.hidden(ids[:, 60:].cuda(), cache=prefix), 60) < bound

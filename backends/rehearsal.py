"""One layer over a few tokens, beside the reading of weights: kernels are compiled or found, and
libraries and their handles made, for which the first batch of a model would wait.

    background.submit(rehearse, ckpt.config, "bfloat16", dist.device)
"""

import contextlib

import torch

from config import VOCAB_MULTIPLE, GPTConfig
from costs.shards import part
from model import GPTModel

TOKENS = 64


@torch.no_grad()
def rehearse(config: GPTConfig | None, dtype: str, device: torch.device) -> None:
    """A pass of a model of such layers, if any, whose weights are zeros. Where memory is short,
    none."""
    if config is None:
        return
    # so few that nothing is held, and as far from a multiple as all are: kernels go by that
    few = VOCAB_MULTIPLE + config.vocab_size % VOCAB_MULTIPLE
    model = GPTModel.on_meta(part(config, range(1)).replace(vocab_size=few))
    with contextlib.suppress(torch.OutOfMemoryError):
        model.allocate(getattr(torch, dtype), device)
        for weights in model.parameters():
            weights.zero_()
        model.for_inference(getattr(torch, dtype))
        n = min(TOKENS, config.max_position_embeddings)
        ids = torch.zeros(1, n, dtype=torch.int64, device=device)
        model.nll(model.hidden(ids).flatten(0, 1), ids.flatten())
        if device.type == "cuda":
            torch.cuda.synchronize(device)

"""Time of GPUs that hold one model between them, layer by layer (`--shard K`).

sharded_time(config, find_gpu("h100"), 2, 4096, Setup(training=False, shard=2))
"""

from config import GPTConfig
from costs.gpus import GPU
from costs.shards import shares, weight_bytes
from costs.symbols import Setup
from costs.time import Ceilings, pass_seconds


def sharded_time(
    c: GPTConfig, gpu: GPU, batch: int, seq_len: int, setup: Setup, n_batches: int = 64
) -> dict:
    """What setup.shard GPUs take that hold a model between them, to score n_batches of batch x
    seq_len tokens that stream through, and to draw a token for each of `batch` rows.

    Each is as fast as the slowest of them; filling the pipe costs shard - 1 batches more. In
    generation as many batches of rows go round as there are GPUs.
    """
    each = shares(c, setup)
    scoring, decode = [], []
    for share, own in each:
        seconds = pass_seconds(share, gpu, batch, seq_len, seq_len, own)["seconds"]
        if own.last:  # the head of every token, not of the last ones alone
            flops = 2 * batch * (seq_len - 1) * c.d_model * c.vocab_size
            peak = gpu.fp32_flops if own.dtype == "fp32" else gpu.bf16_flops
            seconds += flops / (Ceilings().matmul * peak)
        scoring.append(seconds)
        decode.append(pass_seconds(share, gpu, batch, 1, seq_len, own)["seconds"])
    fill = (len(each) - 1) / (n_batches + len(each) - 1)
    rate = batch * seq_len / max(scoring) * (1 - fill)
    return {
        "layers": [share.n_layers for share, _ in each],
        "weight_bytes": [int(weight_bytes(*share)) for share in each],
        "scoring_seconds": scoring,
        "batches": n_batches,
        "fill": fill,
        "scoring_tokens_per_second": rate,
        "decode_seconds": sum(decode),
        "decode_tokens_per_second": batch / max(decode),
    }

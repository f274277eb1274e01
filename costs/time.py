"""Time on one GPU: what a forward, a request and a training run take.

    roofline(config, find_gpu("h100"), batch=8, prompt=2048)["decode_tokens_per_second"]

Each operation takes the longer of its FLOPs and its bytes (roofline: Williams 2009), and every
kernel the time to start and to drain, which nothing hides: the next one needs its result.
benchmarks/roofline.py holds it against measured prefill and decode.
"""

from dataclasses import dataclass

from config import GPTConfig
from costs.flops import estimate_flops
from costs.formulas import PARAMETERS, PASS, pairs, solve
from costs.gpus import GPU
from costs.symbols import Setup, model_symbols


@dataclass(frozen=True)
class Ceilings:
    """What a model's kernels reach of a GPU's datasheet, as fractions, and the time of each kernel
    that is not of its FLOPs or bytes.

    benchmarks/roofline.py fits them to the GPU at hand; the defaults are an H100's, where a single
    8192^3 product reaches 0.74, a copy 0.88, and the smallest kernel takes 1.2 µs.
    """

    matmul: float = 0.60
    attention: float = 0.54  # measured alone, causal, 4096 tokens
    memory: float = 0.83
    kernel_seconds: float = 2.3e-6


TRAINING_MFU = 0.40  # assumed of a well-tuned dense run; give --mfu where it is known


def experts_touched(c: GPTConfig, tokens: int) -> float:
    """Experts of a layer that `tokens` tokens are expected to go through, if all are as likely."""
    if not c.n_experts:
        return 0.0
    return c.n_experts * (1 - (1 - c.n_experts_per_token / c.n_experts) ** tokens)


def mean_width_read(c: GPTConfig, tokens: int) -> float:
    """Width of the MLP that a pass of `tokens` reads, in the mean of all layers."""
    moe = sum(c.layer_experts(layer) > 0 for layer in range(c.n_layers))
    mixture = experts_touched(c, tokens) * c.d_ff_expert + c.d_ff_shared
    return ((c.n_layers - moe) * c.d_ff + moe * mixture) / c.n_layers


def pass_seconds(
    c: GPTConfig,
    gpu: GPU,
    batch: int,
    new: int,
    context: int,
    setup: Setup,
    compiled: bool = False,
    ceilings: Ceilings | None = None,
) -> dict:
    """Seconds of one forward of `new` tokens in each of `batch` sequences, which then hold
    `context` tokens each: in all, by operation, and what limits most of them."""
    v = solve(PARAMETERS, model_symbols(c, batch, new) | setup.symbols(c))
    ceilings = ceilings or Ceilings()
    before = context - new
    windows = [c.layer_window(layer) or context for layer in range(c.n_layers)]
    seen = sum(min(w, context) for w in windows) / c.n_layers
    full = sum(pairs(context, w) - pairs(before, w) for w in windows) / c.n_layers
    v |= {"X": seen, "P_pass": batch * full, "compiled": int(compiled)}
    v["f_read"] = mean_width_read(c, batch * new)
    peak = gpu.fp32_flops if v["c"] == 4 else gpu.bf16_flops
    seconds, bound = {}, {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    for name, flops, size, kernels in PASS:
        times = 1 if name == "head" else c.n_layers
        row = solve((("flops", flops), ("bytes", size), ("kernels", kernels)), v)
        efficiency = ceilings.attention if name == "attention" else ceilings.matmul
        limits = {
            "compute": times * row["flops"] / (efficiency * peak),
            "memory": times * row["bytes"] / (ceilings.memory * gpu.bandwidth),
            "launch": times * row["kernels"] * ceilings.kernel_seconds,
        }
        for reason in (max("compute", "memory", key=limits.__getitem__), "launch"):
            seconds[name] = seconds.get(name, 0.0) + limits[reason]
            bound[reason] += limits[reason]
    total = sum(seconds.values())
    return {"seconds": total, "bound": max(bound, key=bound.__getitem__), "operations": seconds}


def turning_batch(gpu: GPU, setup: Setup, c: GPTConfig | None = None) -> float:
    """Sequences from which decode is no longer limited by reading weights: P*bytes/(2*BW). c: as
    Setup.symbols asks for it."""
    v = setup.symbols(c)
    peak = gpu.fp32_flops if v["c"] == 4 else gpu.bf16_flops
    return peak * v["w_block"] / (2 * gpu.bandwidth)


def roofline(
    c: GPTConfig, gpu: GPU, batch: int, prompt: int, generated: int = 256, **settings
) -> dict:
    """Predicted prefill and decode: seconds, tokens/s, requests/s, what limits them.

    A request is a prompt of `prompt` tokens and `generated` new ones; decode is taken at the middle
    of them. Settings are those of `Setup`, `compiled` and `ceilings`.
    """
    how = {name: settings.pop(name) for name in ("compiled", "ceilings") if name in settings}
    setup = Setup(training=False, **settings)
    prefill = pass_seconds(c, gpu, batch, prompt, prompt, setup, **how)
    decode = pass_seconds(c, gpu, batch, 1, prompt + generated // 2, setup, **how)
    total = prefill["seconds"] + generated * decode["seconds"]
    return {
        "batch": batch,
        "prefill_seconds": prefill["seconds"],
        "prefill_tokens_per_second": batch * prompt / prefill["seconds"],
        "prefill_bound": prefill["bound"],
        "decode_seconds": decode["seconds"],
        "decode_tokens_per_second": batch / decode["seconds"],
        "decode_bound": decode["bound"],
        "requests_per_second": batch / total,
        "turning_batch": turning_batch(gpu, setup, c),
    }


def training_time(
    c: GPTConfig,
    gpu: GPU,
    seq_len: int,
    tokens: float,
    n_gpus: int = 1,
    assumed_mfu: float = TRAINING_MFU,
    lora_rank: int = 0,
) -> dict:
    """Tokens/s and days for `tokens` at a stated MFU, counting 3 x the full-mask forward, or what
    a frozen base leaves of it."""
    flops = estimate_flops(c, 1, seq_len, lora_rank=lora_rank)
    per_token = flops.get("training_lora", flops["training"]) / seq_len
    rate = assumed_mfu * n_gpus * gpu.bf16_flops / per_token
    days = tokens / rate / 86400
    return {"tokens_per_second": rate, "days": days, "gpu_days": days * n_gpus, "mfu": assumed_mfu}

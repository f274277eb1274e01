"""Batched sampling and greedy decoding beside transformers' `generate`, in one run on one GPU.

    python benchmarks/generation.py --out benchmarks/results/generation.json     # < 5 minutes
    python benchmarks/generation.py --small --out /tmp/g.json                    # a CPU's rehearsal

A 7B Llama shape in bfloat16 with random weights, 150-token prompts, 256 new tokens, temperature 0.8
and top-p 0.95. First come checks (float32 greedy tokens against a loop without a cache), then each
case twice, the second timed, that of mixed lengths once, after the others: prefill and decoding,
without building the rows (cache, compilation, graph capture: reported as set-up). The limit is what
steps must read, at the bandwidth of a copy in the same minute (`--bandwidth` gives another): the
weights without the input embedding, and the cache of what each row sees, a shared prompt once.
`limit_with_arithmetic` gives the products the longer of their reading and their FLOPs at a large
product's rate. Samples of mixed lengths need at least the steps of full rows. A case that fails is
reported and the others go on; cases that would start after `--budget` seconds are skipped.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import cli
from backends import Sampling, engine
from benchmarks import cases
from config import GPTConfig, load_config
from model import GPTModel

SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=0)
PEER_SAMPLING = {"temperature": SAMPLED.temperature, "top_p": SAMPLED.top_p}


def random_model(config: GPTConfig, device, dtype=torch.bfloat16) -> GPTModel:
    model = GPTModel.on_meta(config.replace(dropout=0.0))
    model.allocate(dtype, device)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if p.dim() == 1 and name.endswith("weight") else p.data.normal_(std=0.02)
    return model.for_inference(dtype)


class Limits:
    """Seconds that drawing takes at least: at this bandwidth, and at this rate of products too."""

    def __init__(self, config: GPTConfig, size: "Size"):
        c, word, self.size = config, 2, size
        inner = c.head_dim * c.n_heads
        layer = c.d_model * c.qkv_dim + inner * c.d_model + c.d_model * c.d_ff * (2 + c.gated_mlp)
        self.weights = c.n_layers * layer + c.vocab_size * c.d_model
        self.token = 2 * word * c.n_layers * c.n_kv_heads * c.head_dim

    def seconds(self, rows: int, prompts: float, limits: np.ndarray) -> tuple[float, float]:
        """Of samples of so many tokens each, by `rows` at a time that go on from `prompts` prompts:
        (with memory as the only limit, with arithmetic too)."""
        size, steps = self.size, limits.sum() / rows
        seen = steps * prompts * size.prompt + (limits * (limits - 1.0) / 2).sum()
        read, kept = 2 * self.weights / size.bandwidth, self.token * seen / size.bandwidth
        products = max(read, 2 * self.weights * rows / size.rate)
        return steps * read + kept, steps * products + kept


class SetupTimer:
    """Counts the seconds that building CachedRows takes, to leave them out."""

    def __init__(self):
        self.seconds, self.build = 0.0, engine.CachedRows

    def __call__(self, *args):
        start = time.perf_counter()
        rows = self.build(*args)
        synchronize()
        self.seconds += time.perf_counter() - start
        return rows

    def __enter__(self):
        engine.CachedRows = self
        return self

    def __exit__(self, *_):
        engine.CachedRows = self.build


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model, prompts, limits, sampling: Sampling, times_in_all=2, **options) -> dict:
    """Generate so often; seconds, tokens and tokens/s of the last time, set-up seconds of the first
    and last."""
    times = []
    each = [[replace(sampling, max_new_tokens=int(n)) for n in own] for own in limits]
    for _ in range(times_in_all):
        synchronize()
        with SetupTimer() as timer:
            start = time.perf_counter()
            tokens = sum(len(s.token_ids) for s in engine.generate(model, prompts, each, **options))
            synchronize()
        times.append((time.perf_counter() - start - timer.seconds, timer.seconds))
    assert tokens == limits.sum()
    (_, first_setup), (seconds, setup) = times[0], times[-1]
    return {
        "seconds": seconds, "tokens": int(tokens), "tokens_per_s": tokens / seconds,
        "first_setup_s": first_setup, "setup_s": setup,
    }  # fmt: skip


def ours(model, size, *, rows, n_prompts, n_samples, compiled, greedy=False, ragged=False):
    config, g = model.config, np.random.default_rng(0)
    prompts = g.integers(0, config.vocab_size, (n_prompts, size.prompt)).tolist()
    limits = np.full((n_prompts, n_samples), size.new)
    if ragged:  # as stop strings make them; uniform, so that the mean is known
        limits = g.integers(size.new // 8, size.new + 1, limits.shape)
    sampling = Sampling() if greedy else SAMPLED
    result = measure(
        model, prompts, limits, sampling, n_samples=n_samples, batch_size=rows, compile=compiled,
        units=[range(n_prompts)], times_in_all=1 if ragged else 2,
    )  # fmt: skip
    # at least one prompt is read each step, however the samples of several are mixed
    each = n_prompts if n_samples == 1 else 1
    memory, both = Limits(config, size).seconds(rows, each, limits)
    result["limit_tokens_per_s"] = result["tokens"] / memory
    result["limit_with_arithmetic"] = result["tokens"] / both
    result["share_of_limit"] = memory / result["seconds"]
    if ragged:
        result["rows_busy"] = result["tokens"] / rows / size.new  # steps of full rows, in lengths
    else:
        steps = n_prompts * n_samples / rows * size.new
        result["ms_per_step"] = result["seconds"] / steps * 1e3
    return result


# ---------------------------------------------------------------------------------------------
# The peer


def peer_model(config: GPTConfig, device):
    import transformers

    from config import config_to_hf

    values = config_to_hf(config.replace(dropout=0.0))
    kind = values.pop("model_type")
    hf = transformers.AutoConfig.for_model(kind, **values)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16).eval()


def peer_generate(config, size, rows, device, greedy=False) -> dict:
    model = peer_model(config, device)
    g = np.random.default_rng(0)
    ids = torch.tensor(g.integers(0, config.vocab_size, (1, size.prompt)), device=device)
    ids = ids.expand(rows, -1).contiguous()
    options = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, **PEER_SAMPLING}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
    seconds = 0.0
    for new in (min(8, size.new), size.new):
        synchronize()
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        synchronize()
        seconds = time.perf_counter() - start
    assert out.shape == (rows, size.prompt + size.new), out.shape
    tokens = rows * size.new
    return {
        "seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds,
        "ms_per_step": seconds / size.new * 1e3,
    }  # fmt: skip


def peer_batching(config, size, rows, device) -> dict:
    """transformers' continuous batching, every sample a request of its own."""
    from transformers import GenerationConfig

    model = peer_model(config, device)
    g = np.random.default_rng(0)
    prompts = [g.integers(0, config.vocab_size, size.prompt).tolist()] * rows
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": -1}
    options |= PEER_SAMPLING
    times, tokens = [], []
    for new in (8, size.new):  # each call builds its cache and graphs anew: the difference is steps
        generation = GenerationConfig(max_new_tokens=new, **options)
        synchronize()
        start = time.perf_counter()
        out = model.generate_batch(inputs=prompts, generation_config=generation)
        times.append(time.perf_counter() - start)
        tokens.append(sum(len(o.generated_tokens) for o in out.values()))
    assert tokens[1] == rows * size.new, tokens
    return {
        "seconds": times[1], "tokens": tokens[1], "whole_tokens_per_s": tokens[1] / times[1],
        "tokens_per_s": (tokens[1] - tokens[0]) / (times[1] - times[0]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Checks


@torch.no_grad()
def check_greedy(device, compiled: bool) -> dict:
    """float32 greedy tokens of a small model against a loop without a cache."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_model": 64}
    shape |= {"d_ff": 128, "norm": "rmsnorm", "position": "rope", "gated_mlp": True}
    model = GPTModel(GPTConfig(**shape, activation="silu", bias=False, dropout=0.0)).to(device)
    for p in model.parameters():
        p.mul_(5.0 if p.dim() == 2 else 1.0)
    model.for_inference(torch.float32)
    g = np.random.default_rng(3)
    prompts = [g.integers(0, 512, n).tolist() for n in (90, 1, 33, 64, 7, 120)]
    limits = [40, 70, 64, 5, 90, 33]
    options = {"n_samples": 3, "batch_size": 7, "compile": compiled}
    samples = list(engine.generate(model, prompts, [Sampling(n) for n in limits], **options))
    right = 0
    for i, n in enumerate(limits):
        ids = list(prompts[i])
        for _ in range(n):
            hidden = model.hidden(torch.tensor([ids], device=device))
            ids.append(int(model.logits(hidden[0, -1]).argmax()))
        wanted = ids[len(prompts[i]) :]
        right += sum(s.token_ids == wanted for s in samples if s.prompt_index == i)
    assert right == len(samples) == 18, f"{right} of {len(samples)} greedy sequences are right"
    return {"sequences_right": right}


# ---------------------------------------------------------------------------------------------


class Size:
    def __init__(self, small: bool, bandwidth: float, rate: float):
        self.prompt, self.new, self.rows = (12, 10, 6) if small else (150, 256, 200)
        self.bandwidth, self.rate = bandwidth, rate


def all_cases(small: bool, size, device):
    """(name, function) in the order of importance. Models are built once and dropped after use."""
    large, xl = load_config("7b"), load_config("gpt2-xl")
    if small:
        tiny = {"n_layers": 2, "d_model": 64, "d_ff": 96, "n_heads": 4, "n_kv_heads": 4}
        large, xl = (c.replace(vocab_size=100, head_dim=16, **tiny) for c in (large, xl))
    held = {}

    def model(config):
        if held.get("config") != config:
            held.clear()
            release()
            held.update(config=config, model=random_model(config, device))
        return held["model"]

    def of(config, **options):
        return lambda: ours(model(config), size, **options)

    def peer(function, *args):
        def run():
            held.clear()
            release()
            return function(*args)

        return run

    n = size.rows
    one = {"n_prompts": 1, "n_samples": n, "rows": n}
    eight = {"n_prompts": 8, "n_samples": n, "rows": n}
    single = {"n_prompts": 1, "n_samples": 1, "rows": 1, "greedy": True}
    apart = {"n_prompts": n, "n_samples": 1, "rows": n}
    some = {"n_prompts": 1, "n_samples": min(n, 64), "rows": min(n, 64)}
    yield "check eager", lambda: check_greedy(device, False)
    yield "7B 200 sampled, shared prompt, eager", of(large, **one, compiled=False)
    yield "7B 200 sampled, shared prompt, compiled", of(large, **one, compiled=True)
    yield "7B 8x200 of 32..256 tokens, eager", of(large, **eight, compiled=False, ragged=True)
    yield "peer 7B 200 sampled, generate", peer(peer_generate, large, size, n, device)
    yield "7B 1 greedy, compiled", of(large, **single, compiled=True)
    yield "check compiled", lambda: check_greedy(device, True)
    yield "7B 200 sampled, prompts apart, eager", of(large, **apart, compiled=False)
    yield "GPT-2 XL 64 sampled, eager", of(xl, **some, compiled=False)
    yield "peer GPT-2 XL 64 sampled, generate", peer(peer_generate, xl, size, some["rows"], device)
    if device == "cuda":  # on a CPU it takes most of the machine's memory
        yield "peer 7B 200 sampled, batching", peer(peer_batching, large, size, n, device)
    yield "GPT-2 XL 64 sampled, compiled", of(xl, **some, compiled=True)


def release():
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(name, result) -> str:
    words = [f"{name:44}"]
    if "error" in result:
        return words[0] + f"  FAILED: {result['error']}"
    for key, form in (
        ("tokens_per_s", "{:9,.0f} tok/s"), ("ms_per_step", "{:7.2f} ms/step"),
        ("limit_tokens_per_s", "limit {:7,.0f}"), ("share_of_limit", "{:6.1%}"),
        ("first_setup_s", "set-up {:5.1f} s first,"), ("setup_s", "{:4.1f} s again"),
        ("rows_busy", "{:5.2f} x length"), ("sequences_right", "{} sequences right"),
    ):  # fmt: skip
        if key in result:
            words.append(form.format(result[key]))
    return "  ".join(words)


def main(argv=None):
    p = cases.parser(__doc__, budget=285)
    p.add_argument("--bandwidth", type=float, help="bytes per second (a copy's, measured)")
    args = p.parse_args(argv)
    device, _, report = cases.begin(args)
    bandwidth, rate = cases.measured_limits()
    bandwidth = args.bandwidth or bandwidth
    report["limits"] = {"bytes_per_s": bandwidth, "flop_per_s": rate}
    print(f"{report['gpu']}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s")
    size = Size(args.small, bandwidth, rate)
    cases.measure(all_cases(args.small, size, device), args, report, line)
    summary(report["cases"])


def summary(found) -> None:
    for a, b in (
        ("7B 200 sampled, shared prompt, compiled", "peer 7B 200 sampled, generate"),
        ("7B 200 sampled, shared prompt, eager", "peer 7B 200 sampled, generate"),
        ("7B 200 sampled, shared prompt, compiled", "peer 7B 200 sampled, batching"),
        ("GPT-2 XL 64 sampled, compiled", "peer GPT-2 XL 64 sampled, generate"),
    ):
        speeds = [found.get(n, {}).get("tokens_per_s") for n in (a, b)]
        if all(speeds):
            print(f"{a}: {speeds[0] / speeds[1]:.1f} x {b}")


if __name__ == "__main__":
    cli.run(main)

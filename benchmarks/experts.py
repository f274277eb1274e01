"""Mixtures of experts beside transformers' best, in one run on one GPU.

    python benchmarks/experts.py --out benchmarks/results/experts.json     # about 8 minutes
    python benchmarks/experts.py --small --out /tmp/e.json                 # a CPU's rehearsal

Random weights in bfloat16: Qwen3-30B-A3B, and Mixtral 8x7B with as many of its layers as a card of
80 GB holds. Three kinds of cases: the experts of one layer alone, by groups and in the plain loop;
scoring, 8,192 and 16,384 tokens a pass in windows of 2,048, as eval.py does it; generation of a
sample of each of 64 prompts. The peer is transformers' model with sdpa and grouped experts (its
batched ones copy weights for each token: 1.5 TB of this), eager and compiled with its loss as one
function, and `generate`, with and without a static cache, which it compiles. Medians of passes
after warm-up; generation is timed the second time.

The limit is the datasheet's: FLOPs of a pass (attended pairs alone) at the peak for scoring and
prefill, for a step of decoding what it reads at the full bandwidth: all weights but the experts
that nobody is expected to choose, and the cache. A case that fails is reported, the others go on.
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from generation import measure, random_model, release, synchronize  # noqa: E402

import cli  # noqa: E402
from backends import Sampling, scoring  # noqa: E402
from benchmarks import cases  # noqa: E402
from config import GPTConfig, config_to_hf, load_config  # noqa: E402
from costs.flops import estimate_flops  # noqa: E402
from costs.symbols import Setup  # noqa: E402
from costs.time import Ceilings, experts_touched, pass_seconds  # noqa: E402
from gpu_kernels.experts import by_groups, by_loop  # noqa: E402

IDEAL = Ceilings(matmul=1.0, attention=1.0, memory=1.0, kernel_seconds=0.0)


class Size:
    def __init__(self, small: bool):
        self.batches, self.window = ((2, 3), 24) if small else ((4, 8), 2048)
        self.prompt, self.new, self.rows = (12, 8, 3) if small else (512, 128, 64)
        self.passes = 2 if small else 7


def shapes(small: bool) -> dict[str, GPTConfig]:
    qwen, mixtral = load_config("qwen3-30b-a3b"), load_config("mixtral-8x7b").replace(n_layers=20)
    if small:
        tiny = dict(vocab_size=128, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16)
        qwen = qwen.replace(**tiny, n_experts=16, d_ff=48, d_ff_expert=16)
        mixtral = mixtral.replace(**tiny, d_ff=48)
    return {"Qwen3-30B-A3B": qwen, "Mixtral, 20 layers": mixtral}


def seconds_of(run, passes: int) -> float:
    """The median of some passes, after two."""
    times = []
    for i in range(passes + 2):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times += [time.perf_counter() - start] if i > 1 else []
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------
# One layer's experts


@torch.no_grad()
def layer(c: GPTConfig, size: Size, tokens: int, way, device, gpu) -> dict:
    """`way` on random choices. The limit is that of FLOPs or of bytes, whichever takes longer."""
    E, K, C, width = c.n_experts, c.n_experts_per_token, c.d_model, c.d_ff_expert
    x = torch.randn(tokens, C, dtype=torch.bfloat16, device=device)
    fc1 = torch.randn(E, 2 * width, C, dtype=torch.bfloat16, device=device) * 0.02
    fc2 = torch.randn(E, C, width, dtype=torch.bfloat16, device=device) * 0.02
    chosen = torch.rand(tokens, E, device=device).topk(K).indices
    took = seconds_of(lambda: way(x, fc1, fc2, chosen, "silu", True), size.passes)
    flops, read = 6 * tokens * K * C * width, 6 * experts_touched(c, tokens) * C * width
    limit = max(flops / gpu.bf16_flops, read / gpu.bandwidth)
    return {"ms": took * 1e3, "tflops": flops / took / 1e12, "share_of_limit": limit / took}


# ---------------------------------------------------------------------------------------------
# Scoring


def windows(c: GPTConfig, size: Size, batch: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, c.vocab_size, (batch, size.window + 1), generator=g).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def scored(c: GPTConfig, size: Size, batch: int, gpu, run) -> dict:
    took = seconds_of(run, size.passes)
    flops = estimate_flops(c, batch, size.window)["forward_causal"]
    result = {"tokens_per_s": batch * size.window / took, "ms": took * 1e3}
    result["share_of_limit"] = flops / gpu.bf16_flops / took
    if torch.cuda.is_available():
        result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result


@torch.no_grad()
def score_ours(model, size: Size, batch: int, gpu, compiled: bool) -> dict:
    inputs, targets = windows(model.config, size, batch, model.device)
    nll = scoring.nll_function(model, compiled)
    return scored(model.config, size, batch, gpu, lambda: nll(inputs, targets, None))


@torch.no_grad()
def score_peer(model, c: GPTConfig, size: Size, batch: int, gpu, compiled: bool) -> dict:
    inputs, targets = windows(c, size, batch, model.device)

    def loss(ids, wanted):
        logits = model(ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")

    run = torch.compile(loss) if compiled else loss
    return scored(c, size, batch, gpu, lambda: run(inputs, targets))


# ---------------------------------------------------------------------------------------------
# Generation


def generated(c: GPTConfig, size: Size, gpu, tokens_per_s: float) -> dict:
    """With what the datasheet would let a prefill of the prompts and all steps take."""
    setup = Setup(training=False, dtype="bf16")
    middle = size.prompt + size.new // 2
    first = pass_seconds(c, gpu, size.rows, size.prompt, size.prompt, setup, True, IDEAL)
    step = pass_seconds(c, gpu, size.rows, 1, middle, setup, True, IDEAL)["seconds"]
    limit = size.rows * size.new / (first["seconds"] + size.new * step)
    return {"tokens_per_s": tokens_per_s, "share_of_limit": tokens_per_s / limit}


def generate_ours(model, size: Size, gpu, compiled: bool) -> dict:
    g = np.random.default_rng(0)
    prompts = g.integers(0, model.config.vocab_size, (size.rows, size.prompt)).tolist()
    limits = np.full((size.rows, 1), size.new)
    units = [range(size.rows)]
    options = dict(n_samples=1, batch_size=size.rows, compile=compiled, units=units)
    found = measure(model, prompts, limits, Sampling(temperature=0.8, top_p=0.95), **options)
    return found | generated(model.config, size, gpu, found["tokens_per_s"])


def generate_peer(model, c: GPTConfig, size: Size, gpu, static: bool) -> dict:
    g = np.random.default_rng(0)
    ids = torch.tensor(g.integers(0, c.vocab_size, (size.rows, size.prompt)), device=model.device)
    options = dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0, pad_token_id=0)
    options |= dict(attention_mask=torch.ones_like(ids), eos_token_id=None)
    options |= dict(max_new_tokens=size.new, min_new_tokens=size.new)
    options |= {"cache_implementation": "static"} if static else {}
    for _ in range(2):
        synchronize()
        start = time.perf_counter()
        out = model.generate(ids, **options)
        synchronize()
        took = time.perf_counter() - start
    assert out.shape == (size.rows, size.prompt + size.new), out.shape
    return generated(c, size, gpu, size.rows * size.new / took)


# ---------------------------------------------------------------------------------------------


def peer_model(c: GPTConfig, device, attention: str = "sdpa"):
    """transformers' model of random weights."""
    import transformers

    values = config_to_hf(c.replace(dropout=0.0))
    hf = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    ways = {"attn_implementation": attention}
    ways |= {"experts_implementation": "grouped_mm"} if c.n_experts else {}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, **ways)
    return model.eval()


def all_cases(small: bool, size: Size, device, gpu):
    """(name, function); a model is made once and dropped before the next."""
    held = {}

    def once(key, make):
        if held.get("key") != key:
            held.clear()
            release()
            held.update(key=key, model=make())
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return held["model"]

    for name, c in shapes(small).items():
        for tokens in (size.batches[0] * size.window, size.rows):
            for way in (by_groups, by_loop):
                args = c, size, tokens, way, device, gpu
                yield f"{name}: layer, {tokens} tokens, {way.__name__}", lambda a=args: layer(*a)

        def ours(c=c, name=name):
            return once(name, lambda: random_model(c, device))

        for mode in (False, True):
            word = "compiled" if mode else "eager"
            for b in size.batches if mode else size.batches[:1]:
                label = f"{name}: scoring, {b * size.window} tokens, {word}"
                yield label, lambda m=mode, b=b: score_ours(ours(), size, b, gpu, m)
            yield f"{name}: generation, {word}", lambda m=mode: generate_ours(ours(), size, gpu, m)

        def peer(c=c, name=name):
            return once((name, "peer"), lambda: peer_model(c, device))

        def compared(run, *how, c=c, peer=peer):
            return lambda: run(peer(), c, size, *how)

        label, (few, many) = f"{name}: transformers", size.batches
        for b, mode in ((few, False), (few, True), (many, True)):
            word = "compiled" if mode else "eager"
            how = score_peer, b, gpu, mode
            yield f"{label}, scoring, {b * size.window} tokens, {word}", compared(*how)
        yield f"{label}, generation", compared(generate_peer, gpu, False)
        yield f"{label}, generation, static cache", compared(generate_peer, gpu, True)
    held.clear()


def line(name: str, result: dict) -> str:
    words = [f"{name:62}"]
    if "error" in result:
        return words[0] + f"  FAILED: {result['error']:.300}"
    for key, form in (
        ("ms", "{:9.3f} ms"), ("tflops", "{:6.1f} TFLOP/s"), ("tokens_per_s", "{:9,.0f} tok/s"),
        ("peak_GiB", "{:6.2f} GiB"), ("share_of_limit", "{:6.1%} of the limit"),
    ):  # fmt: skip
        if key in result:
            words.append(form.format(result[key]))
    return "  ".join(words)


def main(argv=None):
    args = cases.parser(__doc__, budget=540).parse_args(argv)
    device, gpu, report = cases.begin(args)
    cases.measure(all_cases(args.small, Size(args.small), device, gpu), args, report, line)


if __name__ == "__main__":
    cli.run(main)

"""Quantised models of other libraries beside ours on one GPU: products, scoring, drawing.

    pip install --no-deps --target peers bitsandbytes torchao
    PYTHONPATH=peers python benchmarks/quantised_peers.py --out FILE.json
    python benchmarks/quantised_peers.py --small --out /tmp/q.json       # a CPU's rehearsal

Random weights of a 7B. The peer's model is transformers' with its linear layers put in by
bitsandbytes (LLM.int8, nf4 in blocks of 64) or torchao (int8 and int4 weights, 8-bit floats row by
row), as transformers' own integrations do it. Products: the four matrices of a layer, two layers,
replayed as a CUDA graph; torchao's are compiled, for which they are made. bitsandbytes' layers wait
for the GPU as they run, so that no graph holds them: called in a row, which their cases say
("eager"). Whole models run eager on both sides: windows of 2,048, medians of passes after two;
greedy draws of so many tokens from one prompt in every row, the second of two times. Each peer's
case has a process of its own. transformers' fp8 layers take their kernel from a hub and its GPTQ
layers want gptqmodel: neither runs without a network, and the case says so.
"""

import functools
import gc
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers.models.llama  # noqa: E402, F401 (once, for the processes of all peers)
from experts import seconds_of, windows  # noqa: E402
from generation import peer_model, release, synchronize  # noqa: E402
from quantised import Size, built, decoded, line, random_codes, scored, shapes, us_of  # noqa: E402
from torch import nn  # noqa: E402

import cli  # noqa: E402
from benchmarks import cases  # noqa: E402
from quantisation.linear import PackedLinear  # noqa: E402

OURS = {"ours bf16": "bf16", "ours w8": "w8", "ours w4 g128": "w4 g128", "ours fp8-a8": "fp8"}
PEERS = ("bf16", "bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "torchao int4 g128")
PEERS += ("torchao fp8-a8", "transformers fp8", "transformers gptq")
COPIES = 2  # layers whose products are timed together: more than the L2 cache holds


# ---------------------------------------------------------------------------------------------
# Their layers


def quantise(model: nn.Module, peer: str) -> nn.Module:
    """The linear layers of a model's blocks as a library has them."""
    library, _, kind = peer.partition(" ")
    if library == "bitsandbytes":
        _bitsandbytes(model, kind)
    elif library == "torchao":
        _torchao(model, kind)
    elif library == "transformers":
        _transformers(kind)
    return model


def _bitsandbytes(model: nn.Module, kind: str) -> None:
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "lm_head" in name:
            continue
        sides, weight = (layer.in_features, layer.out_features), layer.weight.data
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*sides, bias=False, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(
                weight.half().cpu(), requires_grad=False, has_fp16_weights=False
            )
        else:
            new = bnb.nn.Linear4bit(
                *sides, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(weight.device))
        layer.weight = None


def _torchao(model: nn.Module, kind: str) -> None:
    from torchao import quantization as ao

    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4 g128": lambda: ao.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        ),
        "fp8-a8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }[kind]()
    ao.quantize_(
        model, config, lambda layer, name: isinstance(layer, nn.Linear) and "lm_head" not in name
    )


def _transformers(kind: str) -> None:
    """Raises why its own layers do not run here."""
    if kind == "fp8":
        from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

        load_finegrained_fp8_kernel()
    else:
        import gptqmodel  # noqa: F401


# ---------------------------------------------------------------------------------------------
# Measurements


class Products(nn.Module):
    """A layer's matrices, so many times; each takes a row of its own inputs."""

    def __init__(self, layers, inputs):
        super().__init__()
        self.layers, self.inputs = nn.ModuleList(layers), inputs

    def forward(self, rows: int):
        return [layer(self.inputs[layer.in_features][:rows]) for layer in self.layers]


@torch.no_grad()
def products(what: str, sides, rows_of, device) -> dict:
    """Microseconds of a layer's products at each number of rows, under a graph where it can be."""
    release()
    sides = [side for _ in range(COPIES) for side in sides]
    inputs = {K: torch.randn(64, K, device=device).bfloat16() for _, K in sides}
    rule = OURS.get(what)
    if rule in (None, "bf16"):
        with torch.device(device):
            layers = [nn.Linear(K, N, bias=False, dtype=torch.bfloat16) for N, K in sides]
    else:
        form = "e4m3" if rule == "fp8" else None
        codes = (random_codes(N, K, rule, device) for N, K in sides)
        layers = [PackedLinear([c], torch.bfloat16, activations=form) for c in codes]
    model = Products(layers, inputs)
    run = quantise(model, what) if rule is None else model
    if "torchao" in what or rule == "fp8":
        run = torch.compile(model, dynamic=False)
    result = {}
    for rows in rows_of:
        run(rows)
        run(rows)
        each = functools.partial(run, rows)
        if _in_a_graph(what) or device == "cpu":
            result[f"us_{rows}"] = us_of(each, COPIES)
        else:
            result[f"us_{rows}"] = cases.seconds_of_calls(each) / COPIES * 1e6
    return result


def _in_a_graph(what: str) -> bool:
    return "bitsandbytes" not in what


@torch.no_grad()
def whole(config, peer: str, size: Size, rows_of, device) -> dict:
    """Scoring, and drawing at each number of rows, with transformers' model."""
    release()
    model = quantise(peer_model(config, device), peer)
    gc.collect()
    inputs, targets = windows(config, size, size.batch, device)

    def loss():
        logits = model(inputs, use_cache=False).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    took = seconds_of(loss, 3)
    result = {"tokens_per_s": size.batch * size.window / took, "ms": took * 1e3}
    held = (t for t in (*model.parameters(), *model.buffers()))
    result["weights_GB"] = sum(t.numel() * t.element_size() for t in held) / 1e9
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, size.prompt))
    for rows in rows_of:
        ids = torch.tensor(prompt, device=device).expand(rows, -1).contiguous()
        how = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
        how |= dict(attention_mask=torch.ones_like(ids))
        for new in (4, size.new):
            synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **how)
            synchronize()
            seconds = time.perf_counter() - start
        result[f"ms_per_step_{rows}"] = seconds / size.new * 1e3
    return result


@torch.no_grad()
def ours(config, rule: str, size: Size, rows_of, gpu, device) -> dict:
    """The same of our model."""
    model = built(config, rule, device)
    result = scored(model, size, gpu, False, size.batch)
    for rows in rows_of:
        found = decoded(model, size, rows, False)
        result[f"ms_per_step_{rows}"] = found["ms_per_step"]
        result["weights_GB"] = found["weights_GB"]
    return result


def all_cases(small: bool, size: Size, device: str, gpu):
    """(name, function), a model at a time."""
    config, rows_of = shapes(small)[0], (1, 16, 64)

    def alone(*case):
        def run():
            release()
            return cases.alone(*case)

        return run

    for what in OURS:
        yield f"products: {what}", lambda w=what: products(w, size.shapes, rows_of, device)
    for peer in PEERS[1:]:
        how = "" if _in_a_graph(peer) else ", eager"
        yield f"products{how}: {peer}", alone(products, peer, size.shapes, rows_of, device)
    for what, rule in OURS.items():
        yield f"model: {what}", lambda r=rule: ours(config, r, size, rows_of, gpu, device)
    for peer in PEERS:
        yield f"model: {peer}", alone(whole, config, peer, size, rows_of, device)


def line_of(name: str, result: dict) -> str:
    """One case, for people."""
    rest = [f"{k} {v:,.2f}" for k, v in result.items() if k.startswith(("us_", "ms_per_step_"))]
    return "  ".join([line(name, result), *rest])


def main(argv=None):
    p = cases.parser(__doc__, budget=150)
    p.add_argument("--new", type=int, default=24, help="tokens drawn")
    args = p.parse_args(argv)
    device, gpu, report = cases.begin(args)
    size = Size(args.small)
    size.passes, size.new = 3, 4 if args.small else args.new
    cases.measure(all_cases(args.small, size, device, gpu), args, report, line_of)


if __name__ == "__main__":
    cli.run(main)

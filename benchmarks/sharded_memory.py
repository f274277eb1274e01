"""Host memory that opening and filling a 7B sharded checkpoint takes, beyond the model itself.

    python benchmarks/sharded_memory.py --work W --out benchmarks/results/sharded_memory.json

Writes a torch.distributed.checkpoint of Llama 7B's shape (13.5 GB of bfloat16 in four .distcp
files, under torchtitan's names, whose rows of q and k are read in another order) with torch's own
writer to W, once, and a mapped file of the same size as the target: what the model's own weights
take and what the page cache holds is then no anonymous memory of the process, and the peak of its
RssAnon is all that reading costs. 27 GB of disk; a CPU is enough. `--load` then loads it as the
scripts do, into the process's own memory (13.5 GB more), and takes the model's bytes off the peak.
"""

import argparse
import json
import math
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed.checkpoint as torch_dcp

import checkpoint
from config import GPTConfig, load_config
from model import GPTModel

NAMES = {
    "token_embedding.weight": ["tok_embeddings.weight"],
    "attn.qkv_proj": ["attention.wq", "attention.wk", "attention.wv"],
    "attn.out_proj": ["attention.wo"],
    "mlp.fc1": ["feed_forward.w1", "feed_forward.w3"],
    "mlp.fc2": ["feed_forward.w2"],
    "ln1": ["attention_norm"],
    "ln2": ["ffn_norm"],
    "ln_f.weight": ["norm.weight"],
    "lm_head.weight": ["output.weight"],
}


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """torchtitan's names and shapes of a model."""
    shapes = {}
    for name, p in GPTModel.on_meta(config).named_parameters():
        block, inner = name.split(".")[1], ".".join(name.split(".")[2:-1])
        theirs = NAMES.get(name) or [f"layers.{block}.{part}.weight" for part in NAMES[inner]]
        for their in theirs:
            shapes[their] = (p.shape[0] // len(theirs), *p.shape[1:])
    return shapes


def write(folder: Path, config: GPTConfig) -> None:
    """The checkpoint; every tensor is the beginning of one file of normal numbers."""
    shapes = shapes_of(config)
    longest = max(map(math.prod, shapes.values()))
    source = folder.parent / "numbers.bin"
    numbers = torch.from_file(str(source), shared=True, size=longest, dtype=torch.bfloat16)
    for start in range(0, longest, 1 << 24):
        part = numbers[start : start + (1 << 24)]
        part.copy_(torch.randn(part.shape) * 0.02)
    state = {name: numbers[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    writer = torch_dcp.FileSystemWriter(folder, thread_count=4)
    with warnings.catch_warnings(action="ignore"):
        torch_dcp.save(state, storage_writer=writer, no_dist=True)
    source.unlink()


def on_a_mapped_file(config: GPTConfig, file: Path) -> GPTModel:
    """A GPTModel whose weights lie in a file that is mapped, which is not the process's memory."""
    model = GPTModel.on_meta(config)
    size = sum(p.numel() for p in model.parameters())
    flat, at = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16), 0
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            own = flat[at : at + p.numel()].view(p.shape)
            setattr(module, name, torch.nn.Parameter(own, requires_grad=False))
            at += p.numel()
    return model


class Peak:
    """The largest RssAnon of this process while the block runs, in bytes."""

    def __enter__(self):
        self.bytes, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.over.wait(0.005):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--config", default="7b")
    p.add_argument("--layers", type=int, help="fewer, where memory is short: what costs is a layer")
    p.add_argument("--load", action="store_true", help="and as the scripts do, into memory")
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    config, folder = load_config(args.config), args.work / "step-1000"
    config = config.replace(n_layers=args.layers or config.n_layers)
    if not (folder / ".metadata").exists():
        write(folder, config)
    files = sorted(folder.glob("*.distcp"))
    print(f"{len(files)} files, {sum(f.stat().st_size for f in files):,} bytes")
    model = on_a_mapped_file(config, args.work / "target.bin")
    imported, start = anonymous(), time.monotonic()
    with Peak() as opening:
        ckpt = checkpoint.open(folder, config)
        assert ckpt.config == config, (ckpt.config, config)
    opened = time.monotonic()
    with Peak() as filling:
        ckpt.load_weights(model)
    result = {
        "config": args.config,
        "layers": config.n_layers,
        "bytes": sum(f.stat().st_size for f in files),
        "files": len(files),
        "anonymous_before": imported,
        "anonymous_peak_open": opening.bytes,
        "anonymous_peak_fill": filling.bytes,
        "seconds_open": round(opened - start, 2),
        "seconds_fill": round(time.monotonic() - opened, 1),
        "torch": torch.__version__,
    }
    if args.load:
        del model
        with Peak() as loading:
            loaded = checkpoint.open(folder, config).load("bfloat16", "cpu")
        own = sum(p.numel() * p.element_size() for p in loaded.parameters())
        result["anonymous_peak_load_beyond_model"] = loading.bytes - own
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    (args.work / "target.bin").unlink()


if __name__ == "__main__":
    main()

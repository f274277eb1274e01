"""Loss and perplexity of checkpoints on text or token shards, each target scored exactly once.

    python eval.py --checkpoint-path checkpoints/ --val-data data/val.txt
    torchrun --nproc-per-node=8 eval.py --checkpoint-path ckpt.pt \\
        --data-mode fineweb_npy --val-npy 'data/edufineweb_val_*.npy' --batch-size 32

Takes checkpoints of rosetrainer, nanoGPT, Hugging Face and roseval. Prints loss (nats per token),
perplexity and bits per byte with a standard error, and writes one JSON record per checkpoint with
the whole protocol, and the loss of every window beside it. The same bits on any number of ranks.

    from eval import evaluate_perplexity
    result = evaluate_perplexity(model, tokenizer, val_data=["data/val.txt"])
    result["metrics"]["loss"]                # {"value": ..., "stderr": ..., "n": ...}

Reference: Hugging Face documents a perplexity of 19.44 for GPT-2 Large on WikiText-2's raw test
text with windows of 1024 and --stride 1024, and 16.44 with --stride 512.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

import cli
import command
import evaluation
import results
import stats
from backends import Backend, Facts
from backends.scoring import WindowTotals
from cli import printable
from dataset import RandomWindows, TokenStream, Windows, open_stream
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from formats.shards import RAW
from recording.runs import called

# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Options:
    """What is scored and how: flags, YAML keys and keywords."""

    data_mode: str = cli.option(
        "text", "text files or token shards", choices=("text", "fineweb_npy")
    )
    val_data: tuple[str, ...] = cli.option(
        (), "text: .txt, .jsonl, globs", nargs="+", metavar="FILE"
    )
    val_npy: tuple[str, ...] = cli.option(
        (), "shards: .npy or .bin, globs", nargs="+", metavar="FILE"
    )
    token_dtype: str | None = cli.option(
        None, "of .bin shards without a header; default: told by the ids", choices=tuple(RAW)
    )
    max_tokens: int | None = cli.option(None, "use the first tokens only", type=cli.positive_int)
    seq_len: int | None = cli.option(
        None, "window; default: 1024 or the context", type=cli.positive_int
    )
    stride: int | None = cli.option(
        None,
        "step between windows; default: the window (disjoint). Smaller: more context each",
        type=cli.positive_int,
    )
    bos: str = evaluation.bos_option("off")
    windows: str = cli.option(
        "exact",
        "random: rosetrainer's sampled, overlapping windows, to compare with old numbers",
        choices=("exact", "random"),
    )
    seed: int = cli.option(42, "of --windows random (42); exact ones draw nothing", type=int)
    batch_size: int = cli.option(8, "windows of a batch at most (8)", type=cli.positive_int)
    compile: str = evaluation.compile_option()

    def __post_init__(self):
        text = self.data_mode == "text"
        wanted, other = ("val_data", "val_npy") if text else ("val_npy", "val_data")
        mode = f"--data-mode {self.data_mode}"
        if getattr(self, other):
            raise ValueError(f"{cli.flag_of(other)} does not go with {mode}")
        if not getattr(self, wanted):
            raise ValueError(f"{mode} needs {cli.flag_of(wanted)} FILE …")
        if text and self.token_dtype:
            raise ValueError(f"--token-dtype does not go with {mode}")
        if self.windows == "random" and (self.stride or self.bos != "off"):
            raise ValueError("--windows random has no --stride and no --bos")

    @property
    def files(self) -> tuple[str, ...]:
        return self.val_data or self.val_npy


# ---------------------------------------------------------------------------------------------
# Plan: the tokens, and the windows over them


@dataclass(frozen=True)
class Scored:
    stream: TokenStream
    windows: Windows | RandomWindows
    batch_size: int


def plan(options: Options, facts: Facts) -> Plan:
    """The data as a model sees it, and what decides its numbers."""
    tokenizer, seq_len = facts.tokenizer, pick_window(options.seq_len, facts.context)
    stream = open_stream(
        options.data_mode,
        options.files,
        tokenizer,
        options.max_tokens,
        token_dtype=options.token_dtype,
    )
    stream.check_vocab(facts.vocab_size)
    random, bos = options.windows == "random", False
    windows: Windows | RandomWindows
    if random:
        windows = RandomWindows(len(stream), seq_len, options.seed)
    else:
        # without a BOS of its own, a tokenizer's end of text goes before the first token
        auto = options.bos == "auto" and tokenizer is not None and tokenizer.adds_bos
        bos = options.bos == "on" or auto
        windows = Windows(len(stream), seq_len, options.stride, bos)
    batch_size = min(options.batch_size, len(windows))
    protocol = {
        "data_mode": options.data_mode,
        "tokenizer": tokenizer and tokenizer.name,
        "tokenizer_fingerprint": tokenizer and tokenizer.fingerprint,
        "windows": options.windows,
        "window": seq_len,
        "stride": options.stride or seq_len,
        "bos": bos,
        "max_tokens": options.max_tokens,
        "seed": options.seed if random else None,
        "dtype": facts.dtype,
        "batch_size": batch_size,
    }
    data = {
        "files": list(stream.file_names),
        "hash": stream.fingerprint,
        "tokens": len(stream),
    }
    work = Scored(stream, windows, batch_size)
    return Plan(protocol, data, work, words_of(protocol))


def words_of(protocol: dict) -> tuple[str, ...]:
    return (
        f"window {protocol['window']}",
        f"stride {protocol['stride']}",
        *(["BOS"] if protocol["bos"] else []),
        *(["sampled windows"] if protocol["windows"] == "random" else []),
        protocol["dtype"],
    )


def pick_window(seq_len: int | None, context: int | None) -> int:
    if seq_len is None:
        return min(1024, context or 1024)
    if context and seq_len > context:
        raise ValueError(f"--seq-len {seq_len} exceeds the model's {context} positions")
    return seq_len


# ---------------------------------------------------------------------------------------------
# Run


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    """Score every window. Arrays hold nats and tokens by window, and by (window, file, special)."""
    stream, windows = plan.work.stream, plan.work.windows
    totals = backend.score_windows(stream, windows, plan.work.batch_size)
    nll, count = totals.by_window()
    first_target, _ = windows.target_span(np.arange(len(windows)))
    arrays = {"nll": nll, "count": count.astype(np.int64), "start": first_target}
    arrays |= {f"entry_{name}": array for name, array in totals.arrays().items()}
    return Outcome(
        metrics=metrics_of(totals, windows),
        breakdown={"file": by_file(totals, stream)},
        arrays=arrays,
        examples={
            "unit": "windows",
            "scores": {"loss": "nll"},
            "weight": "count",
            "labels": {"start": "from token {:,}"},
        },
        data={
            "tokens_scored": int(totals.tokens.sum()),
            "special_tokens_scored": int(totals.tokens[totals.special].sum()),
            "bytes": int(totals.bytes.sum()),
        },
    )


def metrics_of(totals: WindowTotals, windows: Windows | RandomWindows) -> dict:
    nll, count = totals.by_window()
    n = len(windows)
    if isinstance(windows, RandomWindows):  # rosetrainer's figure: the mean over windows
        loss, stderr = float((nll / count).mean()), float((nll / count).std(ddof=1) / n**0.5)
    else:
        loss, stderr = totals.loss, stats.ratio_stderr(nll, count)
    perplexity = float(np.exp(loss)) if loss < 700 else float("inf")
    metrics = {
        "loss": results.metric(loss, stderr, n, better="lower", unit="nats per token"),
        "perplexity": results.metric(perplexity, perplexity * stderr, n, better="lower"),
    }
    bits = totals.bits_per_byte
    if bits is not None:
        ratio = bits / loss if loss else 0.0
        metrics["bits_per_byte"] = results.metric(bits, stderr * ratio, n, better="lower")
    return metrics


def by_file(totals: WindowTotals, stream: TokenStream) -> dict:
    out = {}
    for i, name in enumerate(stream.file_names):
        part = totals.of_file(i)
        if part.tokens.sum():
            out[name] = {
                "loss": part.loss,
                "perplexity": part.perplexity,
                "tokens": int(part.tokens.sum()),
                "bits_per_byte": part.bits_per_byte,
            }
    return out


# ---------------------------------------------------------------------------------------------
# Output


def show(records: list[Result]) -> None:
    for record in records:
        print_record(record)


def print_record(record: Result) -> None:
    metrics, cost, data = record["metrics"], record["cost"], record["data"]
    info = record["checkpoint"]
    print(f"\n{printable(info['name'])}  ({printable(info['path'])})")
    print(f"avg_loss: {metrics['loss']['value']:.6f}")
    print(f"ppl: {metrics['perplexity']['value']:.4f}")
    print(f"stderr: {metrics['loss']['stderr']:.6f} (of avg_loss)")
    if "bits_per_byte" in metrics:
        print(f"bits_per_byte: {metrics['bits_per_byte']['value']:.6f}")
    print(f"tokens: {data['tokens_scored']:,} scored of {data['tokens']:,}")
    print(f"tokens_per_second: {cost['tokens_per_second']:,.0f}")
    if cost.get("mfu") is not None:
        print(f"mfu: {cost['mfu']:.1%}")
    if cost.get("peak_memory_bytes") is not None:
        print(f"peak_memory: {cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    files = record["breakdown"]["file"]
    if len(files) > 1:
        rows = [(printable(name), part) for name, part in files.items()]
        width = max(len(name) for name, _ in rows)
        for name, part in rows:
            print(f"  {name:<{width}}  loss {part['loss']:.6f}  ppl {part['perplexity']:.4f}")
    print(f"record: {record.place}", flush=True)


def print_table(records: list[dict]) -> None:
    names = called(records)
    width = max(map(len, names))
    print(f"\n{'checkpoint':<{width}}  {'step':>8}  {'loss':>9}  {'ppl':>11}  {'bits/byte':>9}")
    for name, record in zip(names, records, strict=True):
        metrics, info = record["metrics"], record["checkpoint"]
        step = "" if info["step"] is None else info["step"]
        bits = metrics.get("bits_per_byte", {}).get("value")
        print(
            f"{name:<{width}}  {step:>8}  {metrics['loss']['value']:>9.5f}  "
            f"{metrics['perplexity']['value']:>11.4f}  {'' if bits is None else f'{bits:>9.5f}'}"
        )


# ---------------------------------------------------------------------------------------------
# The evaluation


def check(options: Options) -> None:
    """The files are there and readable, whatever the tokenizer."""
    tokenizer, width = evaluation.open_tokenizer("byte"), options.token_dtype
    open_stream(options.data_mode, options.files, tokenizer, max_tokens=1, token_dtype=width)


PERPLEXITY = Evaluation(
    name="perplexity",
    script=__file__,
    Options=Options,
    plan=plan,
    run=run,
    show=show,
    table=print_table,
    check=check,
    samples="never",
    needs_tokenizer=lambda options: options.data_mode == "text",
)


def evaluate_perplexity(model: Any, tokenizer: Any, **options) -> Result:
    """results.py's record of a model on `options` (Options' fields); metrics loss, perplexity and
    bits_per_byte. tokenizer may be None for shards. Also dist, info and run: see Evaluation."""
    return PERPLEXITY(model, tokenizer, **options)


def main(argv=None):
    command.main(PERPLEXITY, argv, __doc__)


if __name__ == "__main__":
    cli.run(main)

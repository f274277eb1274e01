"""Loss and perplexity of checkpoints on text or token shards, each target scored exactly once.

    python eval.py --checkpoint-path checkpoints/ --val-data data/val.txt
    torchrun --nproc-per-node=8 eval.py --checkpoint-path ckpt.pt \\
        --data-mode fineweb_npy --val-npy 'data/edufineweb_val_*.npy' --batch-size 32

Takes every checkpoint that checkpoint.py opens. Prints loss (nats per token), perplexity and bits
per byte with a standard error, and writes one JSON record per checkpoint with the whole protocol,
and the loss of every window beside it. The same bits on any number of ranks. With --reference also
how far each token's distribution lies from another model's. --documents scores each document by
itself, as a model trained with document masks saw them.

    from eval import evaluate_perplexity
    result = evaluate_perplexity(model, tokenizer, val_data=["data/val.txt"])
    result["metrics"]["loss"]                # {"value": ..., "stderr": ..., "n": ...}

Reference: Hugging Face documents a perplexity of 19.44 for GPT-2 Large on WikiText-2's raw test
text with windows of 1024 and --stride 1024, and 16.44 with --stride 512.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import installed  # noqa: F401

import numpy as np

import cli
import command
import evaluation
import results
import stats
from backends import AnyWindows, Backend, Facts
from cli import printable
from evaluation import Evaluation, Folder, Outcome, Plan, Result
from formats.documents import document_starts, mark_of
from formats.shards import RAW
from recording.runs import called
from tasks import divergence
from tasks.windows import LENGTHS, Chunks

if TYPE_CHECKING:  # these load torch
    from backends.local import Local
    from backends.reference import Reference
    from backends.scoring import WindowTotals
    from dataset import Windows
    from formats.tokens import TokenStream

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
        None,
        "window; default: 1024 or the context; 2048 of --windows gptq, 512 of llama.cpp",
        type=cli.positive_int,
    )
    stride: int | None = cli.option(
        None,
        "step between windows; default: the window (disjoint). Smaller: more context each",
        type=cli.positive_int,
    )
    bos: str | None = evaluation.bos_option(None, "default: off; not of published --windows")
    windows: str = cli.option(
        "exact",
        "gptq, llama.cpp: those of published tables (tasks/windows.py); random: rosetrainer's "
        "sampled, overlapping ones, to compare with old numbers",
        choices=("exact", *LENGTHS, "random"),
    )
    documents: bool = cli.option(
        False, "a token sees its own document alone, in which positions count from 0"
    )
    seed: int = cli.option(42, "of --windows random (42); exact ones draw nothing", type=int)
    batch_size: int = cli.option(8, "windows of a batch at most (8)", type=cli.positive_int)
    reference: str | None = cli.option(
        None,
        "a checkpoint with which each is compared token by token: divergence, likeliest token. "
        "first: the first one named",
        metavar="PATH",
    )
    reference_dtype: str | None = cli.option(
        None, "of the reference; default: as --dtype", choices=sorted(cli.DTYPES)
    )
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
        if self.windows in LENGTHS and not text:
            raise ValueError(f"--windows {self.windows} tokenises text itself: --data-mode text")
        if self.windows != "exact" and (self.stride or self.bos):
            raise ValueError(f"--windows {self.windows} has no --stride and no --bos")
        if self.reference_dtype and not self.reference:
            raise ValueError("--reference-dtype goes with --reference PATH")
        if self.documents and self.windows != "exact":
            raise ValueError(f"--documents does not go with --windows {self.windows}")
        if self.documents and self.bos in ("on", "auto"):
            raise ValueError("--documents begin with what the data holds: it has no --bos")
        if self.documents and self.reference:
            raise ValueError("--documents does not go with --reference: compare without it")

    @property
    def files(self) -> tuple[str, ...]:
        return self.val_data or self.val_npy


# ---------------------------------------------------------------------------------------------
# Plan: the tokens, and the windows over them


@dataclass(frozen=True)
class Scored:
    stream: TokenStream
    windows: AnyWindows
    batch_size: int
    reference: Reference | None = None


def plan(options: Options, facts: Facts) -> Plan:
    """The data as a model sees it, and what decides its numbers."""
    from dataset import RandomWindows, Windows, open_stream

    tokenizer, published = facts.tokenizer, options.windows in LENGTHS
    seq_len = pick_window(options.seq_len or LENGTHS.get(options.windows), facts.context)
    stream = open_stream(
        options.data_mode,
        options.files,
        tokenizer,
        options.max_tokens,
        add_eos=not published,
        token_dtype=options.token_dtype,
    )
    stream.check_vocab(facts.vocab_size)
    random, bos, mark = options.windows == "random", False, None
    adds_bos = tokenizer is not None and tokenizer.adds_bos
    windows: AnyWindows
    if random:
        windows = RandomWindows(len(stream), seq_len, options.seed)
    elif published:
        bos = adds_bos
        windows = Chunks(options.windows, len(stream), seq_len, bos)
    else:
        # without a BOS of its own, a tokenizer's end of text goes before the first token
        auto = options.bos == "auto" and adds_bos
        bos = options.bos == "on" or auto
        if options.documents:
            mark = mark_of(stream, tokenizer, options.data_mode)
        windows = Windows(len(stream), seq_len, options.stride, bos, mark)
    batch_size = min(options.batch_size, len(windows))
    protocol = {
        "data_mode": options.data_mode,
        "tokenizer": tokenizer and tokenizer.name,
        "tokenizer_fingerprint": tokenizer and tokenizer.fingerprint,
        "windows": options.windows,
        "window": seq_len,
        "stride": options.stride or seq_len,  # of published ones too: side by side
        "bos": bos,
        "max_tokens": options.max_tokens,
        "seed": options.seed if random else None,
        "dtype": facts.dtype,
        "batch_size": batch_size,
    } | ({"documents": mark.words} if mark else {})
    data = {
        "files": list(stream.file_names),
        "hash": stream.fingerprint,
        "tokens": len(stream),
    }
    words, reference = words_of(protocol), None
    if options.reference:
        reference = plan_reference(options, facts, stream, seq_len)
        protocol["reference"] = reference.protocol
        words += (f"against {reference.ckpt.name} in {reference.dtype}",)
    return Plan(protocol, data, Scored(stream, windows, batch_size, reference), words)


KINDS = {"random": "sampled windows"} | {kind: f"{kind}'s windows" for kind in LENGTHS}


def words_of(protocol: dict) -> tuple[str, ...]:
    return (
        f"window {protocol['window']}",
        f"stride {protocol['stride']}",
        *(["BOS"] if protocol["bos"] else []),
        *([KINDS[protocol["windows"]]] if protocol["windows"] in KINDS else []),
        *(["within documents"] if "documents" in protocol else []),
        protocol["dtype"],
    )


def plan_reference(options: Options, facts: Facts, stream: TokenStream, seq_len: int) -> Reference:
    """The reference of these options, from its headers. ValueError where it is none for a model
    of these facts."""
    from backends.reference import open_reference

    dtype = cli.DTYPES.get(options.reference_dtype or facts.dtype, facts.dtype)
    reference = open_reference(options.reference or "", dtype, facts)
    own = reference.ckpt.tokenizer
    tokenizer = evaluation.open_tokenizer(own) if own else None
    reference.check(stream, seq_len, facts.tokenizer, tokenizer)
    return reference


def pick_window(seq_len: int | None, context: int | None) -> int:
    if seq_len is None:
        return min(1024, context or 1024)
    if context and seq_len > context:
        raise ValueError(f"--seq-len {seq_len} exceeds the model's {context} positions")
    return seq_len


# ---------------------------------------------------------------------------------------------
# Run


def run(backend: Backend, plan: Plan, folder: Folder) -> Outcome:
    """Score every window. Arrays hold nats and tokens by window, and by (window, file, special);
    where documents are told apart, by document too, and those are the examples."""
    stream, windows, reference = plan.work.stream, plan.work.windows, plan.work.reference
    asked, against = (stream, windows, plan.work.batch_size), divergence.Summary()
    mark = windows.mark
    if reference is None:
        totals = backend.score_windows(*asked, per_token=mark is not None)
    else:
        local = cast("Local", backend)  # --reference is refused with --endpoint
        totals, tokens = reference.compare(local, *asked, folder.root)
        against = divergence.summarise(tokens)
    nll, count = totals.by_window()
    first_target, _ = windows.target_span(np.arange(len(windows)))
    arrays = {"nll": nll, "count": count.astype(np.int64), "start": first_target}
    arrays |= {f"entry_{name}": array for name, array in totals.arrays().items()}
    unit, of = "windows", ""
    if mark is not None:
        unit, of = "documents", "document_"
        found = by_document(totals, windows, document_starts(stream, mark))
        arrays |= {of + name: array for name, array in found.items()}
    statistics = {"perplexity": {"score": "perplexity", "arrays": [of + "nll", of + "count"]}}
    if totals.bits_per_byte is not None and mark is None:
        of_text, name = totals.of_text(), "bits_per_byte"
        arrays |= of_text
        statistics[name] = {"score": name, "arrays": list(of_text)}
    return Outcome(
        metrics=metrics_of(totals, windows, arrays[of + "nll"], arrays[of + "count"])
        | against.metrics,
        breakdown={"file": by_file(totals, stream)} | against.breakdown,
        arrays=arrays | against.arrays,
        protocol={"reference": reference.about} if reference else {},
        examples={
            "unit": unit,
            "scores": {"loss": of + "nll"} | against.scores,
            "statistics": statistics,
            "weight": of + "count",
            "labels": {of + "start": "from token {:,}"},
        },
        data={
            "tokens_scored": int(totals.tokens.sum()),
            "special_tokens_scored": int(totals.tokens[totals.special].sum()),
            "bytes": int(totals.bytes.sum()),
        }
        | ({} if mark is None else {"documents_scored": len(arrays["document_nll"])}),
    )


def by_document(totals: WindowTotals, windows: Windows, starts: np.ndarray) -> dict:
    """nll [D] nats, count [D] targets and start [D], stream positions, of the documents of which
    something is scored, from `starts` of all. A document's first token counts as its own."""
    assert totals.token_nll is not None, "scored by token"
    count = np.diff(np.append(starts, windows.n_tokens))
    count[0] -= 1  # nothing comes before the stream's first token
    starts, count = starts[count > 0], count[count > 0]
    nats = windows.in_order(totals.token_nll)
    nll = np.add.reduceat(nats, np.append(0, np.cumsum(count)[:-1]))
    return {"nll": nll, "count": count, "start": starts}


def metrics_of(
    totals: WindowTotals, windows: AnyWindows, nll: np.ndarray, count: np.ndarray
) -> dict:
    """nll, count [n]: of windows or documents, whose losses are taken to be independent."""
    from dataset import Windows

    n = len(nll)
    if not isinstance(windows, Windows):  # rosetrainer's and GPTQ's figure: the mean over windows
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
    print(f"\n{called([record])[0]}  ({printable(info['path'])})")
    print(f"avg_loss: {metrics['loss']['value']:.6f}")
    print(f"ppl: {metrics['perplexity']['value']:.4f}")
    stderr, one = metrics["loss"]["stderr"], record["examples"]["unit"].removesuffix("s")
    undefined = f"undefined (there is one {one})"
    print(f"stderr: {undefined if math.isnan(stderr) else f'{stderr:.6f} (of avg_loss)'}")
    if "bits_per_byte" in metrics:
        print(f"bits_per_byte: {metrics['bits_per_byte']['value']:.6f}")
    if "kl" in metrics:
        about = record["protocol"]["reference"]
        print(f"against {printable(about['name'])} in {about['dtype']}, token by token:")
        print("\n".join(divergence.lines_of(record["breakdown"])))
    print(f"tokens: {data['tokens_scored']:,} scored of {data['tokens']:,}")
    if "documents_scored" in data:
        print(f"documents: {data['documents_scored']:,}, by which the stderr is taken")
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
    against = any("kl" in record["metrics"] for record in records)
    header = f"{'checkpoint':<{width}}  {'step':>8}  {'loss':>9}  {'ppl':>11}  {'bits/byte':>9}"
    print(f"\n{header}" + f"  {'KL':>9}  {'same top':>8}" * against)
    for name, record in zip(names, records, strict=True):
        metrics, info = record["metrics"], record["checkpoint"]
        step = "" if info["step"] is None else info["step"]
        bits = metrics.get("bits_per_byte", {}).get("value")
        row = f"{name:<{width}}  {step:>8}  {metrics['loss']['value']:>9.5f}  "
        row += f"{metrics['perplexity']['value']:>11.4f}  {'' if bits is None else f'{bits:>9.5f}'}"
        if "kl" in metrics:
            row += f"  {metrics['kl']['value']:>9.6f}  {metrics['same_top']['value']:>8.2%}"
        print(row)


# ---------------------------------------------------------------------------------------------
# The evaluation


def check(options: Options) -> None:
    """The files are there and readable, whatever the tokenizer, and the reference is one."""
    import checkpoint
    from dataset import open_stream

    tokenizer, width = evaluation.open_tokenizer("byte"), options.token_dtype
    open_stream(options.data_mode, options.files, tokenizer, max_tokens=1, token_dtype=width)
    if options.reference:
        checkpoint.open(options.reference)


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
    command.main(PERPLEXITY, argv, __doc__, first_as_reference)


def first_as_reference(args: argparse.Namespace) -> None:
    """`--reference first`, as the path of the first checkpoint named."""
    if args.reference == "first" and args.checkpoint_path:
        import checkpoint

        args.reference = str(checkpoint.expand_paths(args.checkpoint_path)[0])


if __name__ == "__main__":
    cli.run(main)

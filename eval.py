"""Loss and perplexity of checkpoints on text or token shards, each target scored exactly once.

    python eval.py --checkpoint-path checkpoints/ --val-data data/val.txt
    torchrun --nproc-per-node=8 eval.py --checkpoint-path ckpt.pt \\
        --data-mode fineweb_npy --val-npy 'data/edufineweb_val_*.npy' --batch-size 32

Takes checkpoints of rosetrainer, nanoGPT, Hugging Face and roseval. Prints loss (nats per token),
perplexity and bits per byte with a standard error, and writes one JSON record per checkpoint with
the whole protocol, and the loss of every window beside it. The same bits on any number of ranks.

Reference: Hugging Face documents a perplexity of 19.44 for GPT-2 Large on WikiText-2's raw test
text with windows of 1024 and --stride 1024, and 16.44 with --stride 512.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoint
import cli
import distributed
import results
import stats
from backends import scoring
from config import load_config
from costs.flops import estimate_flops
from dataset import RandomWindows, Windows, build_tokenizer, open_stream
from distributed import print0


def main(argv=None):
    args = parse(argv)
    paths = checkpoint.expand_paths(args.checkpoint_path)
    with distributed.setup(args.device, args.timeout) as dist, ThreadPoolExecutor(1) as background:
        dtype = cli.resolve_dtype(args, dist.device.type)
        if dtype == "float32":
            torch.set_float32_matmul_precision("highest")
        config = load_config(args.config) if args.config else None
        data, done = None, []
        for path in paths:
            start = time.perf_counter()
            model = checkpoint.load_model(path, dtype, dist.device, config)
            load_seconds = time.perf_counter() - start
            # hashing a large checkpoint takes seconds: beside the scoring, and on one rank only
            info = None
            if dist.is_main:
                info = background.submit(checkpoint.describe, path, model.config).result
            name = tokenizer_name(args, path, model.vocab_size)
            data = open_data(args, name and build_tokenizer(name), model, data)
            record, arrays = evaluate_perplexity(
                model,
                data,
                dist,
                dtype,
                batch_size=args.batch_size,
                compile_mode=args.compile,
                n_models=len(paths),
                checkpoint_info=info,
                run=args.run_name or run_name(path),
            )
            record["cost"]["load_seconds"] = load_seconds
            if dist.is_main:
                where = results.save_record(args.results_dir, record, arrays)
                print_record(record, where)
            done.append(record)
            del model
        if len(done) > 1:
            print_table(done)


def parse(argv):
    p = cli.parser(__doc__)
    cli.add_evaluation_flags(p)
    p.add_argument("--data-mode", choices=("text", "fineweb_npy"), default="text")
    p.add_argument("--val-data", nargs="+", metavar="FILE", help="text: .txt, .jsonl, globs")
    p.add_argument("--val-npy", nargs="+", metavar="FILE", help="shards: .npy or .bin, globs")
    p.add_argument("--max-tokens", type=cli.positive_int, help="use the first tokens only")
    p.add_argument("--seq-len", type=cli.positive_int, help="window; default: 1024 or the context")
    p.add_argument(
        "--stride",
        type=cli.positive_int,
        help="step between windows; default: the window (disjoint). Smaller: more context each",
    )
    p.add_argument("--bos", action="store_true", help="prepend BOS and score the first token too")
    p.add_argument(
        "--windows",
        choices=("exact", "random"),
        default="exact",
        help="random: rosetrainer's sampled, overlapping windows, to compare with old numbers",
    )
    args = p.parse_args(argv)
    wanted, other = ("val_data", "val_npy")[:: 1 if args.data_mode == "text" else -1]
    if getattr(args, other):
        p.error(f"--{other.replace('_', '-')} does not go with --data-mode {args.data_mode}")
    if not getattr(args, wanted):
        p.error(f"--data-mode {args.data_mode} needs --{wanted.replace('_', '-')} FILE …")
    if args.windows == "random" and (args.stride or args.bos):
        p.error("--windows random has no --stride and no --bos")
    args.files = getattr(args, wanted)
    return args


def run_name(path) -> str:
    return Path(path).resolve().parent.name or "checkpoints"


# ---------------------------------------------------------------------------------------------
# Data


class Data:
    """A token stream, the windows over it, and what is known of its tokens."""

    def __init__(self, stream, windows, tokenizer, vocab_size, protocol):
        self.stream, self.windows, self.tokenizer = stream, windows, tokenizer
        self.protocol = protocol
        self.token_bytes = np.zeros(vocab_size, dtype=np.int64)
        self.special = np.zeros(vocab_size, dtype=bool)
        if tokenizer is not None:
            n_bytes = tokenizer.token_bytes()[:vocab_size]
            self.token_bytes[: len(n_bytes)] = n_bytes
            self.special[[i for i in tokenizer.special_ids if i < vocab_size]] = True


def open_data(args, tokenizer, model, previous: Data | None) -> Data:
    """The data as a model sees it: `previous` again if tokenizer and window agree. `model`: itself,
    or its checkpoint.Shape."""
    seq_len = pick_window(args.seq_len, model)
    key = (tokenizer and tokenizer.fingerprint, seq_len, model.vocab_size)
    if previous is not None and previous.key == key:
        return previous
    stream = open_stream(args.data_mode, args.files, tokenizer, args.max_tokens)
    stream.check_vocab(model.vocab_size)
    if args.windows == "random":
        windows = RandomWindows(len(stream), seq_len, args.seed)
    else:
        windows = Windows(len(stream), seq_len, args.stride, args.bos)
    protocol = {
        "data_mode": args.data_mode,
        "tokenizer": tokenizer and tokenizer.name,
        "tokenizer_fingerprint": tokenizer and tokenizer.fingerprint,
        "windows": args.windows,
        "window": seq_len,
        "stride": args.stride or seq_len,
        "bos": args.bos,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    }
    data = Data(stream, windows, tokenizer, model.vocab_size, protocol)
    data.key = key
    return data


def tokenizer_name(args, path, vocab_size):
    """The one named, else the checkpoint's own, else GPT-2's. Shards need none to be scored: then
    None, and bits per byte is left out."""
    name = args.tokenizer_name or checkpoint.find_tokenizer(path)
    if name is None and args.data_mode != "text" and vocab_size not in (50257, 50304):
        return None
    return name or "gpt2"


def pick_window(seq_len: int | None, model) -> int:
    context = model.max_positions
    if seq_len is None:
        return min(1024, context or 1024)
    if context and seq_len > context:
        raise ValueError(f"--seq-len {seq_len} exceeds the model's {context} positions")
    return seq_len


# ---------------------------------------------------------------------------------------------
# Evaluation


def configuration_of(data: Data, dtype, batch_size) -> dict:
    """What decides the numbers. A tokenizer counts by its content: each checkpoint may hold a copy
    under a path of its own."""
    asked_for = data.protocol | {"dtype": dtype, "batch_size": min(batch_size, len(data.windows))}
    return {name: value for name, value in asked_for.items() if name != "tokenizer"}


def resume_key(fingerprint, data: Data, dtype, batch_size) -> str:
    """The resume_key of the record that evaluate_perplexity will return."""
    configuration = configuration_of(data, dtype, batch_size)
    code = results.running_code(__file__, checkpoint.READ_WITH)
    stream = data.stream.fingerprint
    return results.resume_key(fingerprint, "perplexity", configuration, stream, code)


def evaluate_perplexity(
    model,
    data: Data,
    dist,
    dtype,
    batch_size=8,
    compile_mode="auto",
    n_models=1,
    checkpoint_info=None,
    run="run",
):
    """Score every window of `data` with `model` on all ranks. Returns (record, arrays).

    The record is results.py's, metrics loss, perplexity and bits_per_byte; arrays hold nats and
    tokens by window, and by (window, file, special). Out of memory halves the batch, agreed by all
    ranks. dtype: the name of what the model was loaded in. n_models: how many checkpoints will
    share a compilation. checkpoint_info: what checkpoint.describe gives, or a function that will.
    """
    config = getattr(model, "config", None) if model.is_native else None
    windows, device = data.windows, dist.device
    batch_size = min(batch_size, len(windows))
    n_tokens = len(windows) * windows.seq_len * n_models  # of all ranks: any number decides alike
    compiled = scoring.should_compile(compile_mode, device, config, n_tokens)
    nll_fn = scoring.nll_function(model, compiled)
    seconds = {}

    def score(b):
        start = time.perf_counter()
        scoring.agree_on_memory(lambda: warm_up(nll_fn, windows, b, device), dist)
        seconds["warm_up"] = time.perf_counter() - start
        start = time.perf_counter()
        n_batches = -(-len(windows) // b)
        with cli.progress(n_batches, "perplexity", "batch") as bar:
            totals = scoring.score_windows(
                nll_fn, data.stream, windows, b, dist, data.token_bytes, data.special, bar
            )
        seconds["score"] = time.perf_counter() - start
        return totals

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    totals, used_batch_size = scoring.halve_until_it_fits(score, batch_size)
    if not np.isfinite(totals.nll).all():
        bad = totals.window[~np.isfinite(totals.nll)]
        raise ValueError(
            f"the model gives NaN or infinite losses, first in window {bad[0]}; no score is written"
        )
    protocol = data.protocol | {"dtype": dtype}
    record = results.new_record(
        "perplexity",
        metrics_of(totals, data),
        protocol | {"batch_size": used_batch_size, "compiled": compiled},
        run=run,
        checkpoint=checkpoint_info,
        configuration=configuration_of(data, dtype, batch_size),
        data=describe_data(data, totals),
        cost=cost_of(config, windows, totals, seconds, dist),
        breakdown={"file": by_file(totals, data.stream)},
        code=results.running_code(__file__, checkpoint.READ_WITH),
    )
    nll, count = totals.by_window()
    arrays = {"nll": nll, "count": count.astype(np.int64)}
    arrays |= {f"entry_{name}": getattr(totals, name) for name in totals.__dataclass_fields__}
    return record, arrays


def warm_up(nll_fn, windows, batch_size, device) -> None:
    """One batch of zeros: compiles, picks kernels, and shows whether memory suffices."""
    zeros = torch.zeros(batch_size, windows.seq_len, dtype=torch.int64, device=device)
    with torch.no_grad():
        nll_fn(zeros, zeros)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def metrics_of(totals, data) -> dict:
    nll, count = totals.by_window()
    n = len(data.windows)
    if isinstance(data.windows, RandomWindows):  # rosetrainer's figure: the mean over windows
        loss, stderr = float((nll / count).mean()), float((nll / count).std(ddof=1) / n**0.5)
    else:
        loss, stderr = totals.loss, stats.ratio_stderr(nll, count)
    perplexity = float(np.exp(loss)) if loss < 700 else float("inf")
    metrics = {
        "loss": {"value": loss, "stderr": stderr, "n": n},
        "perplexity": {"value": perplexity, "stderr": perplexity * stderr, "n": n},
    }
    if totals.bits_per_byte is not None:
        ratio = totals.bits_per_byte / loss if loss else 0.0
        metrics["bits_per_byte"] = {
            "value": totals.bits_per_byte,
            "stderr": stderr * ratio,
            "n": n,
        }
    return metrics


def by_file(totals, stream) -> dict:
    out = {}
    for i, name in enumerate(stream.file_names):
        part = totals.of_file(i)
        if part.tokens.sum():
            out[name] = {"loss": part.loss, "perplexity": part.perplexity}
            out[name] |= {"tokens": int(part.tokens.sum()), "bits_per_byte": part.bits_per_byte}
    return out


def describe_data(data, totals) -> dict:
    special = totals.special
    return {
        "files": list(data.stream.file_names),
        "hash": data.stream.fingerprint,
        "tokens": len(data.stream),
        "tokens_scored": int(totals.tokens.sum()),
        "special_tokens_scored": int(totals.tokens[special].sum()),
        "bytes": int(totals.bytes.sum()),
    }


def cost_of(config, windows, totals, seconds, dist) -> dict:
    flops = None
    if config is not None:
        flops = estimate_flops(config, len(windows), windows.seq_len)["forward_causal"]
    return {
        "seconds": seconds["score"],
        "warm_up_seconds": seconds["warm_up"],
        "tokens_per_second": int(totals.tokens.sum()) / seconds["score"],
    } | scoring.device_cost(dist, flops, seconds["score"])


# ---------------------------------------------------------------------------------------------
# Output


def print_record(record, where) -> None:
    metrics, cost, data = record["metrics"], record["cost"], record["data"]
    print0(f"\n{record['checkpoint']['name']}  ({record['checkpoint']['path']})")
    print0(f"avg_loss: {metrics['loss']['value']:.6f}")
    print0(f"ppl: {metrics['perplexity']['value']:.4f}")
    print0(f"stderr: {metrics['loss']['stderr']:.6f} (of avg_loss)")
    if "bits_per_byte" in metrics:
        print0(f"bits_per_byte: {metrics['bits_per_byte']['value']:.6f}")
    print0(f"tokens: {data['tokens_scored']:,} scored of {data['tokens']:,}")
    print0(f"tokens_per_second: {cost['tokens_per_second']:,.0f}")
    if cost["mfu"] is not None:
        print0(f"mfu: {cost['mfu']:.1%}")
    if cost["peak_memory_bytes"] is not None:
        print0(f"peak_memory: {cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    files = record["breakdown"]["file"]
    if len(files) > 1:
        width = max(len(name) for name in files)
        for name, part in files.items():
            print0(f"  {name:<{width}}  loss {part['loss']:.6f}  ppl {part['perplexity']:.4f}")
    print0(f"record: {where}")


def print_table(records) -> None:
    width = max(len(record["checkpoint"]["name"]) for record in records)
    print0(f"\n{'checkpoint':<{width}}  {'step':>8}  {'loss':>9}  {'ppl':>11}  {'bits/byte':>9}")
    for record in records:
        metrics, info = record["metrics"], record["checkpoint"]
        step = "" if info["step"] is None else info["step"]
        bits = metrics.get("bits_per_byte", {}).get("value")
        print0(
            f"{info['name']:<{width}}  {step:>8}  {metrics['loss']['value']:>9.5f}  "
            f"{metrics['perplexity']['value']:>11.4f}  {'' if bits is None else f'{bits:>9.5f}'}"
        )


if __name__ == "__main__":
    cli.run(main)

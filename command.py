"""The command of an evaluation: its flags, and each checkpoint measured, saved, then shown.

    def main(argv=None):
        command.main(PERPLEXITY, argv, __doc__)

What could spoil the result is refused before a model is loaded. A record is saved before a line of
it is printed, and printed when it could not be saved: then the command ends in one line.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import evaluation as frame
import headstart
import launcher
import stats
from cli import printable
from durable import check_writable
from evaluation import EndpointOptions, Evaluation, ModelOptions, Plans, Result
from quantisation.names import Quantisation, QuantiseOptions
from recording import sources
from recording.identity import run_directory
from recording.runs import called

if TYPE_CHECKING:  # these load torch
    from checkpoint import Checkpoint
    from distributed import Dist
    from quantisation.apply import Rounding, Weights
    from transformers_model import Model


@dataclass(frozen=True)
class AdapterOptions:
    """What is compared with each checkpoint in the same run."""

    adapter: tuple[str, ...] = cli.option(
        (),
        "PEFT adapters, or directories of them, each also evaluated over every checkpoint named",
        nargs="+",
        metavar="PATH",
    )


def main(
    evaluation: Evaluation,
    argv: list[str] | None,
    description: str | None,
    settle: Callable[[argparse.Namespace], None] = lambda args: None,
) -> None:
    """The command of an evaluation that takes checkpoints and nothing else. settle: what turns
    flags that speak of others into what they mean."""
    p = cli.parser(description)
    add_flags(p, evaluation)
    args = p.parse_args(argv)
    if not (args.checkpoint_path or args.endpoint):
        p.error("the following arguments are required: --checkpoint-path (or --endpoint)")
    settle(args)
    run_command(evaluation, args)


def add_flags(p: cli.Parser, evaluation: Evaluation) -> None:
    """Those of the models, of the evaluation and of the run."""
    kinds = evaluation.Options, cli.PrecisionOptions, cli.RunOptions
    cli.add_options(p, ModelOptions, AdapterOptions, QuantiseOptions, EndpointOptions, *kinds)
    if evaluation.samples == "asked":
        p.add_argument("--log-samples", action="store_true", help="keep every example's scores")


def run_command(evaluation: Evaluation, args: argparse.Namespace) -> None:
    """Every checkpoint named, one after the other, and after each the adapters over it, all of them
    under each rule of quantisation; or the model that is served."""
    if args.endpoint:
        return run_served(evaluation, args)
    cli.check_unused(args, cli.option_names(EndpointOptions), "only with --endpoint")
    models = cli.read_options(ModelOptions, args)
    over = cli.read_options(AdapterOptions, args).adapter
    rules = cli.read_options(QuantiseOptions, args).wanted
    options = cli.read_options(evaluation.Options, args)
    precision = cli.read_options(cli.PrecisionOptions, args)
    where = cli.read_options(cli.RunOptions, args)
    keep = evaluation.samples == "always" or getattr(args, "log_samples", False)
    variants = evaluation.variants(options)
    with headstart.loading(where.device):
        evaluation.check(options)
        import checkpoint
        import distributed

    paths = checkpoint.expand_paths(models.checkpoint_path)
    adapters = checkpoint.expand_paths(over)
    if models.base and all(checkpoint.info_of(path).kind != "adapter" for path in paths):
        raise ValueError("--base is for adapters, of which --checkpoint-path names none")
    check_results_dir(models, paths + adapters)
    with (
        distributed.setup(where.device, where.timeout) as dist,
        ThreadPoolExecutor(2) as background,
    ):
        of_path = (1 + len(adapters)) * len(rules)
        n_models, keep_base = len(paths) * of_path, of_path > (1 if rules[0] else 2)
        loader = Loader(frame.set_precision(precision, dist), keep_base, packs=not adapters)
        plans, done, pairs = [Plans(evaluation, variant) for variant in variants], [], []
        for path in paths:
            first: list[Result] = []
            for ckpt, rule in product(open_with_adapters(models, path, adapters), rules):
                made = measure_checkpoint(
                    plans, (ckpt, rule), models, loader, dist, background, n_models
                )
                save_and_show(evaluation, made, models.results_dir, keep, dist)
                done += map(dict, made)  # without what lies beside them
                if of_path > 1 or rule is not None:  # which keeps their arrays
                    pairs += zip(first or made, made)
                first = first or made
        if n_models > 1 and dist.is_main:
            from quantisation.comparison import print_differences, print_rules

            if rules[0] is not None:
                print_rules(pairs)
            else:
                evaluation.table(done)
            print_differences([pair for pair in pairs if pair[0] is not pair[1]])


# flags that say nothing of a served model
OF_CHECKPOINTS = ["checkpoint_path", "config", "base", "adapter", "dtype", "bf16", "no_amp"]
OF_CHECKPOINTS += cli.option_names(QuantiseOptions)
OF_CHECKPOINTS += ["device", "compile", "batch_size", "batch_tokens", "no_prefix_cache", "shard"]
OF_CHECKPOINTS += ["reference", "reference_dtype", "kv_dtype"]


def run_served(evaluation: Evaluation, args: argparse.Namespace) -> None:
    """The evaluation of a model behind an endpoint, in one process."""
    cli.check_unused(args, OF_CHECKPOINTS, "with checkpoints, not with --endpoint")
    models = cli.read_options(ModelOptions, args)
    served = cli.read_options(EndpointOptions, args)
    options = cli.read_options(evaluation.Options, args)
    keep = evaluation.samples == "always" or getattr(args, "log_samples", False)
    variants = evaluation.variants(options)
    evaluation.check(options)
    if launcher.launch().world_size > 1:
        raise ValueError("--endpoint is asked by one process, not by torchrun's: --concurrency N")
    if models.tokenizer_name is None:
        raise ValueError(
            "--endpoint needs --tokenizer-name PATH: the tokenizer of the model that is served"
        )
    run = models.run_name or "endpoints"
    check_writable(run_directory(models.results_dir, run), "--results-dir")
    tokenizer = frame.open_tokenizer(models.tokenizer_name)
    import distributed
    from backends.endpoint import connect

    with distributed.setup("cpu", args.timeout) as dist:
        backend = connect(
            served.endpoint or "",
            served.model,
            tokenizer,
            kind=served.server,
            concurrency=served.concurrency,
            timeout=served.request_timeout,
            dist=dist,
        )
        done = [
            frame.measure(
                evaluation,
                backend,
                evaluation.plan(variant, backend.facts),
                info=backend.info,
                run=run,
                rooms=("backends/endpoint.py",),
                results_dir=models.results_dir,
            )
            for variant in variants
        ]
        save_and_show(evaluation, done, models.results_dir, keep, dist)


def open_with_adapters(models: ModelOptions, path: Path, adapters: list[Path]) -> list[Checkpoint]:
    """The handles of a checkpoint and of each adapter over it."""
    base = models.opened(path)
    over = [models.opened(adapter, base) for adapter in adapters]
    for ckpt in over:
        if ckpt.base is None:
            raise ValueError(f"--adapter {ckpt.path} is no adapter: give it as --checkpoint-path")
    return [base, *over]


class Loader:
    """The models of one handle after another. An adapter over the base that is in memory is merged
    into it there, and taken out again for the next; so are weights rounded and put back: none are
    read twice. keep: there will be a next one of the same base. packs: codes of quantised files may
    stay codes, into which no adapter can be merged."""

    def __init__(self, dtype: str, keep: bool, packs: bool = True):
        self.dtype, self.keep, self.packs = dtype, keep, packs
        self.model: Model | None = None
        self.holds: Checkpoint | None = None  # whose weights these are, but for what `undo` undoes
        self.merged: Checkpoint | None = None  # what `undo` takes out, or `holds` itself
        self.undo: Callable[[], None] = lambda: None
        self.weights: Weights | None = None

    def load(self, ckpt: Checkpoint, dist: Dist, quantisation: Quantisation | None = None) -> Model:
        """The model of a handle, or this rank's part of it; it lasts until the next is asked
        for."""
        if self.weights is not None and self.merged is ckpt:
            return self.weights.under(quantisation)
        shares = ckpt.base is not None and ckpt.config == ckpt.base.config
        wanted = ckpt.base if shares and ckpt.base else ckpt
        held, rounding = self.model is not None and self.holds is wanted, None
        if held and self.weights is not None:
            self.weights.under(None)  # before an adapter is taken out of them
        self.weights = None
        if quantisation is not None and not held and ckpt.base is None:
            from quantisation.apply import Rounding

            rounding = Rounding(quantisation, self.keep)  # layer by layer, as they are read
        if self.model is None or self.merged is not ckpt:
            self._put(ckpt, wanted, dist, rounding)
        assert self.model is not None, "it was put there"
        if quantisation is None:
            return self.model
        from quantisation.apply import Weights

        self.weights = Weights(self.model, self.keep, rounding)
        return self.weights.under(quantisation)

    def _put(
        self, ckpt: Checkpoint, wanted: Checkpoint, dist: Dist, rounding: Rounding | None
    ) -> None:
        """Weights as the files say, or rounded as they are read. wanted: whose they are, the base
        of an adapter that is merged into them here."""
        from backends import parallel

        if self.model is not None and self.holds is wanted:
            self.undo()
        else:
            self.model = self.holds = None  # before memory is taken for another
            packed = None if self.packs else False
            self.model = parallel.load(wanted, self.dtype, dist, packed, rounding)
            self.holds = wanted
        self.undo = lambda: None
        if wanted is not ckpt:
            self.undo = ckpt.merge_into(self.model, self.keep)
        self.merged = ckpt


def check_results_dir(models: ModelOptions, paths: Iterable[Path]) -> None:
    """ValueError, on rank 0, which writes the records, if it cannot."""
    if cli.rank() == 0:
        for place in dict.fromkeys(models.run_of(path) for path in paths):
            check_writable(run_directory(models.results_dir, place), "--results-dir")


def save_and_show(
    evaluation: Evaluation, of_path: list[Result], results_dir: str, keep: bool, dist: Dist
) -> None:
    """Records first, then what people read, whatever became of the records. OSError, on every rank,
    where they could not be saved."""
    problem = None

    def save(results):
        for result in results:
            result.save(results_dir, keep)

    for step in (save, evaluation.show) if dist.is_main else ():
        try:
            step(of_path)
        except BrokenPipeError:  # nobody reads on: no fault of the records
            raise
        except OSError as error:
            problem = problem or error
    problem = dist.broadcast(problem)
    if problem is not None:
        raise problem


def measure_checkpoint(
    plans: list[Plans],
    asked: tuple[Checkpoint, Quantisation | None],
    models: ModelOptions,
    loader: Loader,
    dist: Dist,
    background: ThreadPoolExecutor,
    n_models: int,
) -> list[Result]:
    """A Result for each of the plans of one evaluation. asked: of which model, rounded how. Beside
    the loading, prompts are made and, on one rank, the checkpoint is hashed: both take seconds."""
    from backends.local import facts_of
    from backends.parallel import in_groups
    from formats import filling

    ckpt, quantisation = asked
    rooms = ["backends/local.py", *(["quantisation/apply.py"] if quantisation else [])]
    evaluation, options = plans[0].evaluation, plans[0].options
    start = time.perf_counter()
    sources.keep()
    at_once = quantisation if ckpt.base is None and not loader.keep else None
    packed = None
    if loader.packs and quantisation is None:
        packed = functools.partial(filling.block_bytes, ckpt, loader.dtype)
    dist = in_groups(dist, models.shard, ckpt.config, loader.dtype, at_once, packed)
    info = background.submit(ckpt.describe).result if dist.is_main else None
    needed = evaluation.needs_tokenizer(options)
    tokenizer = frame.pick_tokenizer(models.tokenizer_name, ckpt, needed)
    facts = facts_of(ckpt, tokenizer, loader.dtype, dist.device.type, quantisation)

    def make_plans():
        made = [each.of(facts) for each in plans]
        for plan in made:
            plan.prepare()
        return made

    planned = background.submit(make_plans)
    model = loader.load(ckpt, dist, quantisation)
    made = planned.result()
    background.submit(evaluation.code_version, *ckpt.rooms, *rooms)  # remembered for the record
    load_seconds = time.perf_counter() - start
    backend = frame.local_backend(options, model, facts, dist, n_models)
    done = []
    for plan in made:
        result = frame.measure(
            evaluation,
            backend,
            plan,
            info=info,
            run=models.run_of(ckpt.path),
            rooms=(*ckpt.rooms, *rooms),
            results_dir=models.results_dir,
        )
        result["cost"]["load_seconds"] = load_seconds
        done.append(result)
    return done


def print_head(record: Result, n: int, unit: str) -> None:
    """Of which checkpoint a record is, and what it was asked in which way."""
    info = record["checkpoint"]
    print(f"\n{printable(info['name'])}  ({printable(info['path'])})")
    print(f"{n:,} {unit}: {', '.join(map(printable, record['words']))}")
    if record["protocol"]["limit"]:
        print(f"A PART OF THE {unit.upper()} (--limit): not a score of the set")


def print_drawn(record: Result) -> None:
    """How fast samples were drawn, and where the record lies."""
    cost = record["cost"]
    print(
        f"drawn in {cost['seconds']:.1f} s: {cost['tokens']:,} tokens, "
        f"{cost['tokens_per_second']:,.0f}/s; {cost['samples_resumed']:,} were there already"
    )
    print(f"record: {record.place}", flush=True)


def print_shares(
    records: list[dict],
    names: list[str],
    width: int,
    as_text: Callable[[dict], str] = stats.show_share,
) -> None:
    """A line for each checkpoint, a column of `width` characters for each of these metrics, which
    are shares, or what `as_text` makes of them."""
    first = max(10, *map(len, called(records)))
    print(f"\n{'checkpoint':{first}}" + "".join(f"{name:>{width}}" for name in names))
    for name, record in zip(called(records), records, strict=True):
        cells = (as_text(record["metrics"][metric]) for metric in names)
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in cells))

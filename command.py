"""The command of an evaluation: its flags, and each checkpoint measured, saved, then shown.

    def main(argv=None):
        command.main(PERPLEXITY, argv, __doc__)

What could spoil the result is refused before a model is loaded. A record is saved before a line of
it is printed, and printed when it could not be saved: then the command ends in one line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import cli
import evaluation as frame
import stats
from durable import check_writable
from evaluation import Evaluation, ModelOptions, Plans, Result
from identity import run_directory
from runs import called

if TYPE_CHECKING:  # it loads torch
    from distributed import Dist


def main(evaluation: Evaluation, argv: list[str] | None, description: str | None) -> None:
    """The command of an evaluation that takes checkpoints and nothing else."""
    p = cli.parser(description)
    add_flags(p, evaluation)
    args = p.parse_args(argv)
    if not args.checkpoint_path:
        p.error("the following arguments are required: --checkpoint-path")
    run_command(evaluation, args)


def add_flags(p: cli.Parser, evaluation: Evaluation) -> None:
    """Those of the models, of the evaluation and of the run."""
    cli.add_options(p, ModelOptions, evaluation.Options, cli.PrecisionOptions, cli.RunOptions)
    if evaluation.samples == "asked":
        p.add_argument("--log-samples", action="store_true", help="keep every example's scores")


def run_command(evaluation: Evaluation, args: argparse.Namespace) -> None:
    """Every checkpoint named, one after the other."""
    models = cli.read_options(ModelOptions, args)
    options = cli.read_options(evaluation.Options, args)
    precision = cli.read_options(cli.PrecisionOptions, args)
    where = cli.read_options(cli.RunOptions, args)
    keep = evaluation.samples == "always" or getattr(args, "log_samples", False)
    variants = evaluation.variants(options)
    evaluation.check(options)
    import checkpoint
    import distributed

    paths = checkpoint.expand_paths(models.checkpoint_path)
    check_results_dir(models, paths)
    with (
        distributed.setup(where.device, where.timeout) as dist,
        ThreadPoolExecutor(2) as background,
    ):
        dtype = frame.set_precision(precision, dist)
        plans, done = [Plans(evaluation, variant) for variant in variants], []
        for path in paths:
            of_path = measure_checkpoint(plans, path, models, dtype, dist, background, len(paths))
            save_and_show(evaluation, of_path, models.results_dir, keep, dist)
            done += map(dict, of_path)  # without what lies beside them
        if len(paths) > 1 and dist.is_main:
            evaluation.table(done)


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
    path: Path,
    models: ModelOptions,
    dtype: str,
    dist: Dist,
    background: ThreadPoolExecutor,
    n_checkpoints: int,
) -> list[Result]:
    """A Result for each of the plans of one evaluation. Beside the loading, prompts are made and,
    on one rank, the checkpoint is hashed: both take seconds."""
    import checkpoint
    from backends.local import facts_of

    evaluation, options = plans[0].evaluation, plans[0].options
    start = time.perf_counter()
    ckpt = checkpoint.open(path, models.model_config())
    info = background.submit(ckpt.describe).result if dist.is_main else None
    needed = evaluation.needs_tokenizer(options)
    tokenizer = frame.pick_tokenizer(models.tokenizer_name, ckpt, needed)
    facts = facts_of(ckpt, tokenizer, dtype, dist.device.type)

    def make_plans():
        made = [each.of(facts) for each in plans]
        for plan in made:
            plan.prepare()
        return made

    planned = background.submit(make_plans)
    model = ckpt.load(dtype, dist.device)
    made = planned.result()
    load_seconds = time.perf_counter() - start
    backend = frame.local_backend(options, model, facts, dist, n_checkpoints)
    done = []
    for plan in made:
        result = frame.measure(
            evaluation,
            backend,
            plan,
            info=info,
            run=models.run_of(path),
            rooms=(ckpt.format, "backends/local.py"),
            results_dir=models.results_dir,
        )
        result["cost"]["load_seconds"] = load_seconds
        done.append(result)
    return done


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

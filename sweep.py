"""Every checkpoint of a directory through the evaluations of a YAML file, each once, on all GPUs.

    scripts/sweep_checkpoints.sh checkpoints/run                      # what is there, step by step
    torchrun --nproc-per-node=8 sweep.py --checkpoint-path checkpoints/run --watch --newest-first
    python report.py results

One process group for everything: a checkpoint is loaded once for all evaluations, the next one's
files are read ahead meanwhile, and start-up, tokenising and compiling are paid once. What is done
is known by the records' resume keys (checkpoint's content, evaluation, configuration, data, code),
so a second call does nothing, a killed sweep goes on at any number of ranks, and a checkpoint that
fails is recorded with its reason. Several sweeps of one directory share the work
(sweeping/lease.py).

`--watch` waits for more, as a training run saves them, and takes only whole ones: with the sign
that ends a save in their format (train.py's manifest, DCP's .metadata) or, where there is none,
unchanged for --poll-seconds. It ends at --until-step, after --quiet-seconds, or when a file STOP
appears beside the checkpoints or the results. Checkpoints are only ever read.

Exit codes are cli.py's, and 1 if a checkpoint failed.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import installed  # noqa: F401

import cli
import evaluation
import headstart
from bleu_eval import BLEU
from config import load_yaml
from eval import PERPLEXITY
from evaluation import Evaluation, ModelOptions, Result
from gsm8k_eval import GSM8K
from harness_eval import HARNESS
from humaneval_eval import HUMANEVAL
from mmlu_eval import MMLU
from quantisation.names import QuantiseOptions

if TYPE_CHECKING:  # these load torch
    from checkpoint import Checkpoint
    from distributed import Dist
    from quantisation.apply import Weights
    from sweeping.planner import Entry, Planner, Work
    from sweeping.served import Endpoint

SERVED = "endpoint"  # in the YAML, beside the evaluations
ROUNDING = cli.option_names(QuantiseOptions)
EVALUATIONS = (PERPLEXITY, MMLU, HUMANEVAL, GSM8K, BLEU, HARNESS)
SHARE_OF_MEMORY = 0.5  # of what is available, that reading ahead may fill


@dataclass(frozen=True)
class SweepOptions:
    """What is done again, waited for and written besides."""

    evaluations: str = cli.option("configs/sweep.yaml", "YAML", metavar="FILE")
    newest_first: bool = cli.option(False, "the latest checkpoints first")
    watch: bool = cli.option(False, "wait for more checkpoints")
    poll_seconds: float = cli.option(15.0, "between two looks (15)", type=float)
    until_step: int | None = cli.option(
        None, "leave later ones; end watching there", type=cli.positive_int
    )
    quiet_seconds: float | None = cli.option(
        None, "end watching after so long without news", type=float
    )
    force: bool = cli.option(False, "do again what is done")
    retry_failed: bool = cli.option(False, "do again what failed")
    lease_seconds: float = cli.option(60.0, "a silent sweep is dead (60)", type=float)
    log_samples: bool = cli.option(False, "keep every example's scores")
    lm_eval_json: bool = cli.option(False, "also in lm-eval's form, in lm_eval/")
    tensorboard: str | None = cli.option(None, "also log there", metavar="DIR")
    wandb: str | None = cli.option(None, "also log there", metavar="PROJECT")


@dataclass(frozen=True)
class SharedOptions:
    """Options of evaluations that do not say."""

    batch_size: int | None = cli.option(
        None, "of evaluations that do not say", type=cli.positive_int
    )
    seed: int | None = cli.option(None, "of evaluations that do not say", type=int)
    compile: str | None = cli.option(
        None, "of evaluations that do not say", choices=("auto", "on", "off")
    )


def main(argv=None):
    p = cli.parser(__doc__)
    kinds = ModelOptions, SharedOptions, SweepOptions, cli.PrecisionOptions, cli.RunOptions
    cli.add_options(p, *kinds)
    args = p.parse_args(argv)
    models, shared, options, precision, run = (cli.read_options(kind, args) for kind in kinds)
    cli.check_seconds(p, args, "poll_seconds", "quiet_seconds", "lease_seconds")
    if not options.watch:
        cli.check_unused(args, ("quiet_seconds",), "with --watch")
    if not (models.checkpoint_path or load_yaml(options.evaluations).get(SERVED)):
        p.error(
            "the following arguments are required: --checkpoint-path (or endpoint: in the YAML)"
        )
    with headstart.loading(run.device):
        import distributed
        from backends import parallel
        from sweeping.planner import Planner
        from sweeping.served import ServedSweep
    entries, endpoints = read_entries(options.evaluations, models, shared)
    with distributed.setup(run.device, run.timeout) as dist:
        dtype = evaluation.set_precision(precision, dist)
        models.model_config()  # ValueError now, rather than once for each checkpoint
        for entry in entries:
            entry.evaluation.check(entry.options)
            if entry.tokenizer_name:
                evaluation.open_tokenizer(entry.tokenizer_name)
        n_failed = 0
        if endpoints:
            served = ServedSweep(models, options, entries, dist)
            for endpoint in endpoints:
                served.ask(endpoint)
            n_failed = served.finish()
        if models.shard != "auto":  # what no checkpoint could be done with
            parallel.in_groups(dist, models.shard, None, dtype)
        if models.checkpoint_path:
            n_failed += sweep(Planner(models, options, entries, dtype, dist), dist)
    if n_failed:
        sys.exit(1)


# ---------------------------------------------------------------------------------------------
# The YAML file of evaluations


def read_entries(
    file: str, models: ModelOptions, shared: SharedOptions
) -> tuple[list[Entry], list[Endpoint]]:
    """The evaluations of --evaluations, with the options of their own scripts, and served models
    that are asked beside the checkpoints:

    perplexity: {val-data: val.txt, seq-len: 1024}    # eval.py --val-data val.txt --seq-len 1024
    mmlu:                                             # a list: one evaluation for each
      - {data-path: data/mmlu, num-few-shot: 5}
      - {data-path: data/mmlu, template: continuation}
    bleu: {…, quantise: [bf16, rtn-w8]}               # once for each rule
    endpoint: {url: http://host:8000, model: NAME, tokenizer-name: PATH}

    The model is loaded once for all, so what concerns it is said on this command line; so may be
    --tokenizer-name, --batch-size, --seed and --compile, for evaluations that do not say.
    """
    from sweeping.served import check_entries, read_endpoints

    known, entries = {e.name: e for e in EVALUATIONS}, []
    asked = load_yaml(file)
    served = asked.pop(SERVED, [])
    endpoints = read_endpoints(f"{file}: {SERVED}", served, models)
    for name, listed in asked.items():
        if name not in known:
            raise ValueError(f"{file}: {name!r} is no evaluation; there are {', '.join(known)}")
        for values in listed if isinstance(listed, list) else [listed]:
            if not isinstance(values, dict):
                raise ValueError(
                    f"{file}: {name} must hold `flag: value` lines, not {values!r:.60}"
                )
            entries += entries_of(f"{file}: {name}", known[name], values, models, shared)
    if not entries:
        raise ValueError(f"{file} names no evaluation; there are {', '.join(known)}")
    offered = {name for entry in entries for name in cli.option_names(entry.evaluation.Options)}
    for name, value in vars(shared).items():
        if value is not None and name not in offered:
            raise ValueError(f"{cli.flag_of(name)}: no evaluation that {file} names has it")
    entries = [entry.labelled(entries) for entry in entries]
    if endpoints:
        check_entries(f"{file}: {SERVED}", entries)
    return entries, endpoints


def entries_of(
    where: str, kind: Evaluation, values: dict, models: ModelOptions, shared: SharedOptions
) -> list[Entry]:
    """One for each variant of an evaluation's options, as its script would make of these flags."""
    from sweeping.planner import Entry

    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    own = {name: values.pop(name) for name in ("tokenizer_name",) if name in values}
    own = cli.convert_options(ModelOptions, own, where)
    rounding = {name: values.pop(name) for name in ROUNDING if name in values}
    rounding = cli.convert_options(QuantiseOptions, rounding, where)
    tokenizer_name = own.get("tokenizer_name") or models.tokenizer_name
    ours = (ModelOptions, SweepOptions, cli.PrecisionOptions, cli.RunOptions)
    for name in values:
        if any(name in cli.option_names(options) for options in ours):
            raise ValueError(f"{where}: {cli.flag_of(name)} belongs on sweep.py's command line")
    given = {name: value for name, value in vars(shared).items() if value is not None}
    given = {name: given[name] for name in given if name in cli.option_names(kind.Options)}
    given |= cli.convert_options(kind.Options, values, where)
    try:
        rules = cli.read_options(QuantiseOptions, rounding).wanted
        variants = kind.variants(cli.read_options(kind.Options, given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return [Entry(kind, options, tokenizer_name, rule) for rule in rules for options in variants]


# ---------------------------------------------------------------------------------------------
# The sweep, on all ranks


def sweep(planner: Planner, dist: Dist) -> int:
    """Work until nothing is left to do; returns how many evaluations failed. Rank 0 decides, and
    what it decides or runs into, every rank learns."""
    on_main(dist, planner.open)
    ahead = ReadAhead(planner.models)
    try:
        while work := on_main(dist, planner.next_work):
            if dist.local_rank == 0:
                ahead.start(work.ahead)
            do(planner, work, dist)
            on_main(dist, planner.close, work)
        return on_main(dist, planner.finish)
    finally:
        planner.release()


def on_main(dist: Dist, function: Callable, *args) -> Any:
    """function(*args) on rank 0 only; what it returns or raises, on every rank."""
    result, problem = None, None
    if dist.is_main:
        try:
            result = function(*args)
        except (ValueError, OSError) as error:  # told to all ranks, which then end alike
            problem = cli.first_line(error)
    result, problem = dist.broadcast((result, problem))
    if problem:
        raise ValueError(problem)
    return result


def do(planner: Planner, work: Work, dist: Dist) -> None:
    """Load, evaluate, record. Whatever goes wrong with this checkpoint ends here, on all ranks."""
    start, problem, opened = time.perf_counter(), None, None
    try:
        dist = planner.in_groups(work, dist)
        opened = load(planner, work, dist)
    except Exception as error:  # an edge: one checkpoint of a sweep
        problem = cli.reason_of(error)
    problem = next(filter(None, dist.gather(problem)), None)
    load_seconds = time.perf_counter() - start
    for label in planner.by_rule(work.pending):
        outcome = problem
        if opened is not None and problem is None:
            outcome = evaluate(planner.entries[label], opened, work, planner.models, dist)
        if isinstance(outcome, Result):
            outcome["cost"]["load_seconds"] = load_seconds
            on_main(dist, planner.save, work, label, outcome)
        else:
            on_main(dist, planner.fail, work, label, outcome)
    del opened
    if dist.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def load(planner: Planner, work: Work, dist: Dist) -> tuple[Weights, Checkpoint, dict]:
    """(weights, of the model or of this rank's part of it, handle, plans by label). There is no
    collective in here."""
    from backends import parallel
    from quantisation.apply import Rounding, Weights

    ckpt = planner.models.opened(work.path)
    rules, at_once = planner.rules(work), planner.rounded_at_once(work)
    rounding = Rounding(at_once) if at_once else None
    packed = None if rules == {None} else False
    model = parallel.load(ckpt, planner.dtype, dist, packed, rounding)
    plans = {label: planner.plan_of(planner.entries[label], ckpt) for label in work.pending}
    if ckpt.fingerprint != work.info["fingerprint"]:
        raise ValueError(f"{work.path} was replaced while it was read")
    return Weights(model, len(rules) > 1, rounding), ckpt, plans


def evaluate(
    entry: Entry, opened: tuple, work: Work, models: ModelOptions, dist: Dist
) -> Result | str:
    """The Result, or the reason why there is none, on every rank the same: where only some of them
    fail the run ends, as the others are in the midst of a collective."""
    weights, ckpt, plans = opened
    plan, facts = plans[entry.label]
    try:
        model = weights.under(entry.quantisation)
        # how many checkpoints will come is not known, and a resumed sweep must compile alike
        backend = evaluation.local_backend(entry.options, model, facts, dist, math.inf)
        return evaluation.measure(
            entry.evaluation,
            backend,
            plan,
            info=work.info,
            run=work.run,
            rooms=(*ckpt.rooms, *entry.rooms),
            results_dir=models.results_dir,
        )
    except Exception as error:  # an edge: one checkpoint of a sweep
        dist.agree_on_error(error)
        return cli.reason_of(error)


class ReadAhead:
    """Reads the next checkpoint's weights into the page cache, so that loading finds them there,
    and hashes them, so that its fingerprint is remembered."""

    def __init__(self, models: ModelOptions):
        self.models = models
        self.thread: threading.Thread | None = None

    def start(self, path: Path | None) -> None:
        if path and not (self.thread and self.thread.is_alive()):
            self.thread = threading.Thread(target=self._read, args=(path,), daemon=True)
            self.thread.start()

    def _read(self, path: Path) -> None:
        from formats import pt_files

        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        with contextlib.suppress(OSError):  # gone meanwhile
            files = [f for f in files if f.is_file() and not pt_files.NOT_WEIGHTS.fullmatch(f.name)]
            if sum(f.stat().st_size for f in files) < available_memory() * SHARE_OF_MEMORY:
                for file in files:
                    with open(file, "rb", buffering=0) as f:
                        while f.read(2**23):
                            pass
        with contextlib.suppress(Exception):  # an edge: what is wrong is said when it is its turn
            self.models.opened(path).fingerprint  # noqa: B018


def available_memory() -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        found = re.search(rb"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_bytes())
        return int(found[1]) * 1024 if found else 0
    except OSError:
        return 0


if __name__ == "__main__":
    cli.run(main)

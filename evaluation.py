"""The frame of every evaluation: checkpoints -> plan -> run -> record, and the command around it.

    PERPLEXITY = Evaluation("perplexity", __file__, Options, plan, run, show)
    evaluation.main(PERPLEXITY, argv, __doc__)                  # its command

An evaluation is a name, options and three functions: `plan(options, facts)`, all that is known
before a model runs; `run(backend, plan, folder)`, which asks the backend; `show(results)`, which
prints those of one checkpoint. Everything else happens here, once: process group, precision,
tokenizer, fingerprint, vocabulary and BOS checks, resume keys, journals, records, saving. sweep.py
goes through the same doors with many checkpoints and evaluations.

torch takes seconds to import: only the functions that open or run a model do.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
import results
from backends import Backend, Facts
from config import GPTConfig, load_config
from durable import Folder
from tokenizer import TOKENIZER_COPIES, Tokenizer, build_tokenizer

if TYPE_CHECKING:  # these load torch
    from checkpoint import Checkpoint
    from distributed import Dist

# what a record says of its checkpoint, or a function that gives it once it is known
Info = dict | Callable[[], dict] | None

# ---------------------------------------------------------------------------------------------
# What an evaluation consists of


@dataclass(frozen=True)
class Plan:
    """All that is known before a model runs, and so the same for every model of one kind.

    protocol: what was asked for, in full; all of it but the tokenizer's name decides the numbers.
    data: the record's `data`, with its hash. work: what `run` needs. words: the protocol in words.
    prepare: work that can go on while weights load, called once before `run`.
    """

    protocol: dict
    data: dict
    work: Any
    words: tuple[str, ...] = ()
    prepare: Callable[[], Any] = lambda: None

    @property
    def configuration(self) -> dict:
        """What decides the numbers, the data among them: two sets under one protocol are two
        records. A tokenizer counts by its content: each checkpoint may hold a copy under a path of
        its own."""
        asked = {name: value for name, value in self.protocol.items() if name != "tokenizer"}
        return asked | {"data": self.data.get("hash")}

    @property
    def config_hash(self) -> str:
        return results.config_hash(self.configuration)


@dataclass(frozen=True)
class Outcome:
    """What `run` found: parts of a record (results.SCHEMA), and what lies beside it.

    metrics, breakdown, examples, arrays: the record's. protocol, data, cost: additions to the
    plan's and the backend's. samples: gives one dict an example, when they are wanted. shown: what
    `show` needs and the record does not keep.
    """

    metrics: dict
    breakdown: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)
    examples: dict | None = None
    protocol: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    words: tuple[str, ...] = ()
    samples: Callable[[], Iterable[dict]] | None = None
    shown: Any = None


@dataclass(frozen=True)
class Evaluation:
    """See the file's docstring. script: its file. Options: a frozen dataclass of cli.option fields.

    check: ValueError for what is wrong whatever the model (no data, no sandbox). variants: the
    options of each record where one command makes several. table: prints all checkpoints' records.
    needs_tokenizer: whether these options need one. samples: whether one line an example is
    kept "always", with --log-samples ("asked"), or "never". programs: files that are started
    instead of imported, whose code counts too. recount: {metrics, examples, arrays} that options
    ask of a loaded record beyond its key, from what it keeps; ValueError if that is lost.
    """

    name: str
    script: str
    Options: type
    plan: Callable[[Any, Facts], Plan]
    run: Callable[[Backend, Plan, Folder], Outcome]
    show: Callable[[list[Result]], None]
    check: Callable[[Any], Any] = lambda options: None
    variants: Callable[[Any], list] = lambda options: [options]
    table: Callable[[list[dict]], None] = lambda records: None
    needs_tokenizer: Callable[[Any], bool] = lambda options: True
    samples: str = "asked"
    recount: Callable[[Any, dict], dict | None] = lambda options, record: None
    programs: tuple[str, ...] = ()

    def code_version(self, *rooms: str) -> str:
        """Of the code that makes its numbers, `rooms` being the format and the backend."""
        return results.running_code(self.script, (*rooms, *self.programs), results.ROOT)

    def __call__(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        *,
        dist: Dist | None = None,
        info: Info = None,
        run: str = "run",
        results_dir: str | Path | None = None,
        **options,
    ) -> Result:
        """The Result of a model in memory: GPTModel or transformers' behind its interface. options:
        of Options. info, results_dir: see measure. All ranks of `dist` call this alike."""
        from backends.local import facts_in_memory

        chosen = cli.read_options(self.Options, options)
        unknown = options.keys() - set(cli.option_names(self.Options))
        if unknown:
            raise TypeError(f"{self.name} has no option {', '.join(sorted(unknown))}")
        backend = local_backend(chosen, model, facts_in_memory(model, tokenizer), dist)
        plan = self.plan(chosen, backend.facts)
        return measure(self, backend, plan, info=info, run=run, results_dir=results_dir)


class Result(dict):
    """A record, and what lies beside it: arrays by name, `samples()` or None, and `shown`."""

    def __init__(
        self, record: dict, arrays: dict, samples: Callable[[], Iterable[dict]] | None, shown: Any
    ):
        super().__init__(record)
        self.arrays, self.samples, self.shown = arrays, samples, shown
        self.path: Path | None = None  # once it is saved

    def save(self, results_dir: str | Path, with_samples: bool = True) -> Path:
        """Into the results directory; the record's path."""
        samples = self.samples() if self.samples and with_samples else None
        self.path = results.save_record(results_dir, self, self.arrays, samples)
        return self.path


# ---------------------------------------------------------------------------------------------
# One evaluation of one model


def resume_key(evaluation: Evaluation, plan: Plan, fingerprint: str, *rooms: str) -> str:
    """What the record to come will be known by: the same key, the same numbers."""
    code = evaluation.code_version(*rooms)
    data = plan.data.get("hash")
    return results.resume_key(fingerprint, evaluation.name, plan.config_hash, data, code)


def local_backend(
    options: Any, model: Any, facts: Facts, dist: Dist | None = None, n_jobs: float = 1
) -> Backend:
    """A torch model as the verbs, compiled or not as the options say; n_jobs: see Local."""
    from backends.local import Local

    compile = getattr(options, "compile", "auto")
    return Local(model, facts=facts, dist=dist, compile=compile, n_jobs=n_jobs)


def measure(
    evaluation: Evaluation,
    backend: Backend,
    plan: Plan,
    *,
    info: Info = None,
    run: str = "run",
    rooms: tuple[str, ...] = ("backends/local.py",),
    results_dir: str | Path | None = None,
) -> Result:
    """The Result of one plan on one model. Every rank calls it alike and gets the same.

    info: what the record says of the checkpoint, on rank 0, or a function that gives it: it is
    called as late as can be, since a fingerprint takes seconds. rooms: the files of the format and
    of the backend, whose code counts. results_dir: where the record will be saved, for journals.
    """
    dist = backend.dist

    @functools.cache
    def checkpoint_info():
        return dist.broadcast(results.checkpoint_of(info) if dist.is_main else None)

    def place():
        about = checkpoint_info()
        key = resume_key(evaluation, plan, about["fingerprint"], *rooms)
        path = record_path(evaluation, plan, about, run, results_dir)
        return path.with_suffix(""), key

    plan.prepare()
    folder = Folder(dist, place if results_dir is not None else None)
    try:
        outcome = evaluation.run(backend, plan, folder)
    finally:
        folder.close()
    data = plan.data | outcome.data
    record = results.new_record(
        evaluation.name,
        outcome.metrics,
        plan.protocol | backend.ran() | outcome.protocol,
        run=run,
        checkpoint=checkpoint_info(),
        configuration=plan.configuration,
        data=data,
        cost=backend.cost() | outcome.cost,
        breakdown=outcome.breakdown,
        code=evaluation.code_version(*rooms),
        examples=outcome.examples,
        words=[*plan.words, *outcome.words, *results.data_words(data)],
    )
    return Result(record, outcome.arrays, outcome.samples, outcome.shown)


def record_path(
    evaluation: Evaluation, plan: Plan, info: dict, run: str, results_dir: str | Path
) -> Path:
    """Where the record of a plan will lie."""
    about = run, info["name"], info["fingerprint"], evaluation.name, plan.config_hash
    return results.record_path(results_dir, *about)


class Plans:
    """The plans of some options: models of one kind (Facts.kind) share one."""

    def __init__(self, evaluation: Evaluation, options: Any):
        self.evaluation, self.options = evaluation, options
        self._made: tuple[tuple, Plan] | None = None  # Facts.kind, and the plan for it

    def of(self, facts: Facts) -> Plan:
        if self._made is None or self._made[0] != facts.kind:
            self._made = facts.kind, self.evaluation.plan(self.options, facts)
        return self._made[1]


# ---------------------------------------------------------------------------------------------
# What every evaluation checks


def resolve_bos(bos: str, tokenizer: Tokenizer) -> bool:
    """Whether BOS comes before each prompt: on, off, or auto, as the tokenizer itself does."""
    if bos == "on" and tokenizer.bos_token_id is None:
        raise ValueError(f"--bos on: tokenizer {tokenizer.name} has no BOS token")
    return tokenizer.adds_bos if bos == "auto" else bos == "on"


def check_vocabulary(highest: int, facts: Facts) -> None:
    """ValueError if the tokenizer gives a token that the model does not have."""
    if highest >= facts.vocab_size:
        raise ValueError(
            f"tokenizer {facts.tokenizer.name} gives token {highest}, the model has "
            f"{facts.vocab_size}: name the tokenizer that it was trained with (--tokenizer-name)"
        )


_tokenizers: dict = {}


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Every checkpoint may hold a copy of its run's tokenizer: one of them is opened, once."""
    key: Any = str(name)
    if Path(name).is_dir():
        files = [Path(name) / file for file in TOKENIZER_COPIES]
        key = tuple((f.name, hashlib.sha256(f.read_bytes()).digest()) for f in files if f.is_file())
    if key not in _tokenizers:
        _tokenizers[key] = build_tokenizer(name)
    return _tokenizers[key]


def pick_tokenizer(name: str | None, ckpt: Checkpoint, needed: bool) -> Tokenizer | None:
    """The one named, else the checkpoint's own, else GPT-2's. Where none is needed and the
    vocabulary is not GPT-2's, None."""
    chosen = name or ckpt.tokenizer
    is_gpt2 = ckpt.vocab_size in (50257, 50304)  # the latter as nanoGPT pads it
    if chosen is None and not needed and not is_gpt2:
        return None
    return open_tokenizer(chosen or "gpt2")


# ---------------------------------------------------------------------------------------------
# The command


def bos_option(default: str = "auto") -> str:
    return cli.option(
        default,
        "BOS before each prompt; auto: as the tokenizer does by itself; --bos alone: on "
        f"(default: {default})",
        nargs="?",
        const="on",
        choices=("auto", "on", "off"),
    )


def compile_option() -> str:
    help = "torch.compile; auto: on CUDA, if the job is long enough to repay it"
    return cli.option("auto", help, choices=("auto", "on", "off"))


@dataclass(frozen=True)
class ModelOptions:
    """Which models, and where their records go: flags of every evaluation, and of a sweep."""

    checkpoint_path: tuple[str, ...] = cli.option(
        (),
        "checkpoint files or directories, globs, or a directory of checkpoints",
        nargs="+",
        metavar="PATH",
    )
    config: str | None = cli.option(
        None, "the model's shape, for old checkpoint files that hold none"
    )
    tokenizer_name: str | None = cli.option(
        None, "byte, a tiktoken name or a local directory; default: the checkpoint's own, else gpt2"
    )
    results_dir: str = cli.option("results", "where records go (results)")
    run_name: str | None = cli.option(
        None, "default: the name of the checkpoints' parent directory"
    )

    def run_of(self, path: Path) -> str:
        return self.run_name or Path(path).resolve().parent.name or "checkpoints"

    def model_config(self) -> GPTConfig | None:
        return load_config(self.config) if self.config else None


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
    """Every checkpoint named, one after the other: measured, saved, shown."""
    models = cli.read_options(ModelOptions, args)
    options = cli.read_options(evaluation.Options, args)
    variants = evaluation.variants(options)
    evaluation.check(options)
    import checkpoint
    import distributed

    paths = checkpoint.expand_paths(models.checkpoint_path)
    with distributed.setup(args.device, args.timeout) as dist, ThreadPoolExecutor(2) as background:
        dtype = set_precision(cli.read_options(cli.PrecisionOptions, args), dist)
        plans, done = [Plans(evaluation, variant) for variant in variants], []
        for path in paths:
            of_path = measure_checkpoint(plans, path, models, dtype, dist, background, len(paths))
            if dist.is_main:
                keep = evaluation.samples == "always" or getattr(args, "log_samples", False)
                for result in of_path:
                    result.save(models.results_dir, keep)
                evaluation.show(of_path)
            done += map(dict, of_path)  # without what lies beside them
        if len(paths) > 1 and dist.is_main:
            evaluation.table(done)


def set_precision(precision: cli.PrecisionOptions, dist: Dist) -> str:
    """The dtype by name; float32 is the reference, without TF32."""
    import torch

    dtype = precision.resolve(dist.device.type)
    if dtype == "float32":
        torch.set_float32_matmul_precision("highest")
    return dtype


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
    tokenizer = pick_tokenizer(models.tokenizer_name, ckpt, evaluation.needs_tokenizer(options))
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
    backend = local_backend(options, model, facts, dist, n_checkpoints)
    done = []
    for plan in made:
        result = measure(
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

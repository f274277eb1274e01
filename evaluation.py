"""The frame of every evaluation: a model -> plan -> run -> record.

    PERPLEXITY = Evaluation("perplexity", __file__, Options, plan, run, show)
    result = PERPLEXITY(model, tokenizer, val_data=["val.txt"])     # from Python
    command.main(PERPLEXITY, argv, __doc__)                         # its command

An evaluation is a name, options and three functions: `plan(options, facts)`, all that is known
before a model runs; `run(backend, plan, folder)`, which asks the backend; `show(results)`, which
prints those of one checkpoint. Everything else happens here, once: process group, precision,
tokenizer, fingerprint, vocabulary and BOS checks, resume keys, journals, records, saving.
command.py and sweep.py go through the same doors, with one evaluation and with many.

torch takes seconds to import: only the functions that open or run a model do.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
import results
from backends import SERVERS, Backend, Facts
from config import GPTConfig, load_config
from durable import Folder
from quantisation.names import Quantisation
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
    prepare: work that can go on while weights load, called once before `run`. name: what its
    records are called, where one evaluation asks several sets; default: the evaluation's.
    """

    protocol: dict
    data: dict
    work: Any
    words: tuple[str, ...] = ()
    prepare: Callable[[], Any] = lambda: None
    name: str | None = None

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

    def of_weights(self, quantisation: Quantisation | None) -> Plan:
        """The same work, asked of a model whose weights are rounded so."""
        if quantisation is None:
            return self
        protocol = self.protocol | {"quantisation": quantisation.protocol}
        return replace(self, protocol=protocol, words=(*self.words, *quantisation.words))


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
        plan = self.plan(chosen, backend.facts).of_weights(backend.facts.quantisation)
        return measure(self, backend, plan, info=info, run=run, results_dir=results_dir)


class Result(dict):
    """A record, and what lies beside it: arrays by name, `samples()` or None, and `shown`."""

    def __init__(
        self, record: dict, arrays: dict, samples: Callable[[], Iterable[dict]] | None, shown: Any
    ):
        super().__init__(record)
        self.arrays, self.samples, self.shown = arrays, samples, shown
        self.path: Path | None = None  # once it is saved

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return cli.printable(self.path or "not saved")

    def save(self, results_dir: str | Path, with_samples: bool = True) -> Path:
        """Into the results directory; the record's path."""
        samples = self.samples() if self.samples and with_samples else None
        self.path = results.save_record(results_dir, self, self.arrays, samples)
        return self.path


# ---------------------------------------------------------------------------------------------
# One evaluation of one model


def resume_key(evaluation: Evaluation, plan: Plan, info: dict, *rooms: str) -> str:
    """What the record to come will be known by: the same key, the same numbers. info: what it says
    of the checkpoint."""
    code, data = evaluation.code_version(*rooms), plan.data.get("hash")
    name = plan.name or evaluation.name
    return results.resume_key(info, name, plan.config_hash, data, code)


def local_backend(
    options: Any, model: Any, facts: Facts, dist: Dist | None = None, n_jobs: float = 1
) -> Backend:
    """A torch model as the verbs, as the options say; n_jobs: see Local."""
    from backends.local import Local

    how = {name: getattr(options, name) for name in ("compile", "cache") if hasattr(options, name)}
    return Local(model, facts=facts, dist=dist, n_jobs=n_jobs, **how)


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
        assert results_dir is not None, "without one there is no place"
        path = record_path(evaluation, plan, about, run, results_dir) if dist.is_main else None
        path = dist.broadcast(path)  # what lies there may change between two looks
        return path.with_suffix(""), resume_key(evaluation, plan, about, *rooms)

    plan.prepare()
    folder = Folder(dist, place if results_dir is not None else None, results_dir)
    try:
        outcome = evaluation.run(backend, plan, folder)
    finally:
        folder.close()
    data = plan.data | outcome.data
    record = results.new_record(
        plan.name or evaluation.name,
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
    record = {"run": run, "checkpoint": info, "evaluation": plan.name or evaluation.name}
    record |= {"data": plan.data, "config_hash": plan.config_hash}
    return results.record_path(results_dir, record)


class Plans:
    """The plans of some options: models of one kind (Facts.kind) share one."""

    def __init__(self, evaluation: Evaluation, options: Any):
        self.evaluation, self.options = evaluation, options
        self._made: tuple[tuple, Plan] | None = None  # Facts.kind, and the plan for it

    def of(self, facts: Facts) -> Plan:
        if self._made is None or self._made[0] != facts.kind:
            self._made = facts.kind, self.evaluation.plan(self.options, facts)
        return self._made[1].of_weights(facts.quantisation)


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


def closing_words(protocol: dict) -> tuple[str, ...]:
    """What the words of most protocols end with: BOS, precision, and that it is a part of a set."""
    limit = protocol["limit"]
    return (
        *(["BOS"] if protocol["bos"] else []),
        protocol["dtype"],
        *([f"keys and values {protocol['kv_dtype']}"] if "kv_dtype" in protocol else []),
        *([f"limit {limit}: not a score"] if limit else []),
    )


GPT2_VOCABULARIES = (50257, 50304)  # the latter as nanoGPT pads it
_tokenizers: dict = {}


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Every checkpoint may hold a copy of its run's tokenizer: one of them is opened, once."""
    key: Any = str(name)
    if Path(name).is_dir():
        files = [Path(name) / file for file in TOKENIZER_COPIES]
        key = tuple((f.name, hashlib.sha256(f.read_bytes()).digest()) for f in files if f.is_file())
    elif Path(name).is_file():
        there = Path(name).stat()
        key = (key, there.st_size, there.st_mtime_ns, there.st_ino)
    if key not in _tokenizers:
        _tokenizers[key] = build_tokenizer(name)
    return _tokenizers[key]


def pick_tokenizer(name: str | None, ckpt: Checkpoint, needed: bool) -> Tokenizer | None:
    """The one named, else the checkpoint's own, else GPT-2's where the vocabulary is GPT-2's: with
    any other, its numbers would mean nothing. Without one: ValueError if it is needed, else None.
    """
    chosen, size = name or ckpt.tokenizer, ckpt.vocab_size
    # Pythia has 50,304 of its own; of those that transformers runs, only the true size counts
    if chosen is None and size in (GPT2_VOCABULARIES if ckpt.native else GPT2_VOCABULARIES[:1]):
        chosen = "gpt2"
    if chosen is None and needed:
        raise ValueError(
            f"{ckpt.path} has no tokenizer files, and its vocabulary of {size:,} is not "
            "GPT-2's: name the tokenizer that it was trained with (--tokenizer-name)"
        )
    return open_tokenizer(chosen) if chosen else None


# ---------------------------------------------------------------------------------------------
# Options that evaluations share


def bos_option(default: str | None = "auto", help: str = "") -> Any:
    return cli.option(
        default,
        "BOS before each prompt; auto: as the tokenizer does by itself; --bos alone: on "
        f"({help or f'default: {default}'})",
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
    base: str | None = cli.option(
        None, "the base of checkpoints that are adapters; default: as they name it", metavar="PATH"
    )
    tokenizer_name: str | None = cli.option(
        None,
        "byte, a tiktoken name or a local directory; default: the checkpoint's own, else gpt2 for "
        "a vocabulary of GPT-2's size",
    )
    shard: int | str = cli.option(
        1,
        "processes that hold one model between them, layer by layer, where a GPU is too small for "
        "it; auto: as few as hold it (1)",
        type=cli.shards,
        metavar="K",
    )
    results_dir: str = cli.option("results", "where records go (results)")
    run_name: str | None = cli.option(
        None, "default: the name of the checkpoints' parent directory"
    )

    def run_of(self, path: Path) -> str:
        return self.run_name or Path(path).resolve().parent.name or "checkpoints"

    def model_config(self) -> GPTConfig | None:
        return load_config(self.config) if self.config else None

    def opened(self, path: Path, base: Checkpoint | None = None) -> Checkpoint:
        """The handle of a checkpoint; base: the handle below an adapter, where there is one."""
        import checkpoint

        return checkpoint.open(path, self.model_config(), base or self.base)


@dataclass(frozen=True)
class EndpointOptions:
    """A served model instead of checkpoints: flags of every evaluation."""

    endpoint: str | None = cli.option(
        None,
        "a served model, at OpenAI's /v1/completions, instead of checkpoints: http://host:8000, "
        "say. A key comes from the environment's ROSEVAL_API_KEY",
        metavar="URL",
    )
    model: str | None = cli.option(None, "its name there; default: the only one", metavar="NAME")
    server: str | None = cli.option(None, "its kind; default: found by asking", choices=SERVERS)
    concurrency: int = cli.option(16, "requests under way (16)", type=cli.positive_int)
    request_timeout: float = cli.option(600.0, "seconds that an answer may take (600)", type=float)

    def __post_init__(self):
        if not 0 < self.request_timeout <= threading.TIMEOUT_MAX:
            raise ValueError("--request-timeout must be a positive number of seconds")


def set_precision(precision: cli.PrecisionOptions, dist: Dist) -> str:
    """The dtype by name; float32 is the reference, without TF32."""
    import torch

    dtype = precision.resolve(dist.device.type)
    if dtype == "float32":
        torch.set_float32_matmul_precision("highest")
    return dtype

"""Every checkpoint of a directory through the evaluations of a YAML file, each once, on all GPUs.

    scripts/sweep_checkpoints.sh checkpoints/run                      # what is there, step by step
    torchrun --nproc-per-node=8 sweep.py --checkpoint-path checkpoints/run --watch --newest-first
    python report.py results

One process group for everything: a checkpoint is loaded once for all evaluations, the next one's
files are read ahead meanwhile, and start-up, tokenising and compiling are paid once. What is done
is known by the records' resume keys (checkpoint's content, evaluation, configuration, data, code),
so a second call does nothing, a killed sweep goes on at any number of ranks, and a checkpoint that
fails is recorded with its reason. Several sweeps of one directory share the work (lease.py).

`--watch` waits for more, as a training run saves them, and takes only whole ones: with a manifest
(train.py's), or unchanged for --poll-seconds. It ends at --until-step, after --quiet-seconds, or
when a file STOP appears beside the checkpoints or the results. Checkpoints are only ever read.

Exit codes are cli.py's, and 1 if a checkpoint failed.
"""

import contextlib
import hashlib
import io
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import cli
import dataset
import distributed
import eval as perplexity_eval
import humaneval_eval
import mmlu_eval
import results
from config import load_config, load_yaml
from distributed import print0
from sandbox.judge import Sandbox
from sweeping.lease import Leases
from sweeping.ledger import Ledger
from tasks.programs import read_problems
from tokenizer import build_tokenizer

SHARE_OF_MEMORY = 0.5  # of what is available, that reading ahead may fill
PARENT = os.getppid()
MANY = 1000  # checkpoints that share a compilation: no count, since resuming must decide alike


def main(argv=None):
    args = parse(argv)
    evaluations = read_evaluations(args)
    with distributed.setup(args.device, args.timeout) as dist:
        args.dtype_name = cli.resolve_dtype(args, dist.device.type)
        if args.dtype_name == "float32":
            torch.set_float32_matmul_precision("highest")
        args.model_config = load_config(args.config) if args.config else None
        for evaluation in evaluations:  # ValueError now, rather than once for each checkpoint
            evaluation.check_data()
            if evaluation.args.tokenizer_name:
                open_tokenizer(evaluation.args.tokenizer_name)
        n_failed = sweep(args, evaluations, dist)
    if n_failed:
        sys.exit(1)


def sweep(args, evaluations, dist) -> int:
    """Work until nothing is left to do; returns how many evaluations failed. Rank 0 decides, and
    what it decides or runs into, every rank learns."""
    planner = Planner(args, evaluations, dist)
    on_main(dist, planner.open)
    ahead = ReadAhead()
    try:
        while job := on_main(dist, planner.next_job):
            if dist.local_rank == 0:
                ahead.start(job.ahead)
            work(args, evaluations, dist, planner, job)
            on_main(dist, planner.close, job)
        return on_main(dist, planner.finish)
    finally:
        planner.release()


def on_main(dist, function, *args):
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


# ---------------------------------------------------------------------------------------------
# Flags, and the YAML file of evaluations


def parse(argv):
    p = cli.parser(__doc__)
    cli.add_evaluation_flags(p, batch_size=None)
    p.add_argument("--evaluations", default="configs/sweep.yaml", metavar="FILE", help="YAML")
    p.add_argument("--newest-first", action="store_true")
    p.add_argument("--watch", action="store_true", help="wait for more checkpoints")
    p.add_argument("--poll-seconds", type=float, default=15.0, help="between two looks (15)")
    p.add_argument(
        "--until-step", type=cli.positive_int, help="leave later ones; end watching there"
    )
    p.add_argument("--quiet-seconds", type=float, help="end watching after so long without news")
    p.add_argument("--force", action="store_true", help="do again what is done")
    p.add_argument("--retry-failed", action="store_true", help="do again what failed")
    p.add_argument("--lease-seconds", type=float, default=60.0, help="a silent sweep is dead (60)")
    p.add_argument("--log-samples", action="store_true", help="keep every example's scores")
    p.add_argument(
        "--lm-eval-json", action="store_true", help="also in lm-eval's form, in lm_eval/"
    )
    p.add_argument("--tensorboard", metavar="DIR", help="also log there")
    p.add_argument("--wandb", metavar="PROJECT", help="also log there")
    args = p.parse_args(argv)
    cli.check_seconds(p, args, "poll_seconds", "quiet_seconds", "lease_seconds")
    return args


NOT_IN_YAML = ("checkpoint-path", "config", "results-dir", "run-name", "dtype", "bf16", "no-amp")
NOT_IN_YAML += ("device", "timeout", "debug", "log-samples", "help")


def read_evaluations(args) -> list:
    """The evaluations of --evaluations, with the flags of their own scripts:

    perplexity: {val-data: val.txt, seq-len: 1024}    # eval.py --val-data val.txt --seq-len 1024
    mmlu:                                             # a list: one evaluation for each
      - {data-path: data/mmlu, num-few-shot: 5}
      - {data-path: data/mmlu, template: continuation}

    The model is loaded once for all, so what concerns it is said on this command line; so may be
    --tokenizer-name, --batch-size, --seed and --compile, for evaluations that do not say.
    """
    file, evaluations = args.evaluations, []
    shared = {"tokenizer-name": args.tokenizer_name, "batch-size": args.batch_size}
    shared |= {"seed": args.seed, "compile": None if args.compile == "auto" else args.compile}
    for kind, variants in load_yaml(file).items():
        if kind not in KINDS:
            raise ValueError(f"{file}: {kind!r} is no evaluation; there are {', '.join(KINDS)}")
        for flags in variants if isinstance(variants, list) else [variants]:
            if not isinstance(flags, dict):
                raise ValueError(f"{file}: {kind} must hold `flag: value` lines, not {flags!r:.60}")
            flags = {str(name).replace("_", "-"): value for name, value in flags.items()}
            for name in NOT_IN_YAML:
                if name in flags:
                    raise ValueError(f"{file}: {kind}: --{name} belongs on sweep.py's command line")
            argv = flags_to_argv(shared | flags)
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    made = KINDS[kind].from_flags(argv)
            except SystemExit:
                said = said.getvalue().strip().removeprefix("error: ")
                raise ValueError(f"{file}: {kind}: {said}") from None
            for evaluation in made:
                evaluation.asked = flags | evaluation.asked
            evaluations += made
    if not evaluations:
        raise ValueError(f"{file} names no evaluation; there are {', '.join(KINDS)}")
    for evaluation in evaluations:
        evaluation.label = label_of(evaluation, evaluations)
    return evaluations


def label_of(evaluation, evaluations) -> str:
    """Its kind, and the flags that set it apart from others of that kind."""
    others = [e.asked for e in evaluations if e.name == evaluation.name]
    asked = evaluation.asked.items()
    own = [f"{flag}={value}" for flag, value in asked if any(o.get(flag) != value for o in others)]
    return " ".join([evaluation.name, *own])


def flags_to_argv(flags: dict) -> list[str]:
    argv = ["--checkpoint-path", "-"]  # the scripts require one
    for name, value in flags.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is True:
            argv.append(f"--{name}")
        elif value not in (None, False):
            argv.append(f"--{name}={value}")
    return argv


# ---------------------------------------------------------------------------------------------
# The evaluations, each behind the same few functions


class Perplexity:
    name, script = "perplexity", perplexity_eval

    def __init__(self, args, flags):
        self.args, self.flags, self.asked = args, flags, {}
        self.data, self.dtype = None, None

    @classmethod
    def from_flags(cls, argv):
        return [cls(perplexity_eval.parse(argv), argv)]

    def check_data(self):
        files = self.args.files
        dataset.open_stream(self.args.data_mode, files, build_tokenizer("byte"), max_tokens=1)

    def prepare(self, path, shape, dtype, device_type):
        """What does not depend on the weights. `path`: of the checkpoint."""
        name = perplexity_eval.tokenizer_name(self.args, path, shape.vocab_size)
        tokenizer = name and open_tokenizer(name)
        self.data = perplexity_eval.open_data(self.args, tokenizer, shape, self.data)
        self.dtype = dtype

    def identify(self, fingerprint) -> tuple[str, str]:
        """(config_hash, resume_key) of the record to come."""
        what = self.data, self.dtype, self.args.batch_size
        configuration = perplexity_eval.configuration_of(*what)
        key = perplexity_eval.resume_key(fingerprint, *what)
        return results.config_hash(configuration), key

    def evaluate(self, model, dist, info, run, results_dir):
        """(record, arrays, function that makes the samples or None)"""
        record, arrays = perplexity_eval.evaluate_perplexity(
            model,
            self.data,
            dist,
            self.dtype,
            batch_size=self.args.batch_size,
            compile_mode=self.args.compile,
            n_models=MANY,
            checkpoint_info=info,
            run=run,
        )
        return record, arrays, None


class Mmlu:
    name, script = "mmlu", mmlu_eval

    def __init__(self, args, flags, template, scoring):
        self.args, self.flags = args, [*flags, template, scoring]
        self.asked = {"template": template, "scoring": scoring}  # a list of them is several
        self.maker, self.task = mmlu_eval.TaskMaker(args, template, scoring), None

    @classmethod
    def from_flags(cls, argv):
        args = mmlu_eval.parse(argv)
        return [cls(args, argv, *pair) for pair in mmlu_eval.combinations(args)]

    def check_data(self):
        a = self.args
        mmlu_eval.read_data(a.data_path, a.num_few_shot, a.split, a.subjects, a.limit)

    def prepare(self, path, shape, dtype, device_type):
        name = self.args.tokenizer_name or checkpoint.find_tokenizer(path) or "gpt2"
        tokenizer = open_tokenizer(name)
        self.task = self.maker.make(tokenizer, shape, dtype, device_type)

    def identify(self, fingerprint):
        return results.config_hash(self.task.configuration), self.task.resume_key(fingerprint)

    def evaluate(self, model, dist, info, run, results_dir):
        record = mmlu_eval.run_task(model, self.task, dist, info, run)
        return record, record["_arrays"], record["_samples"]


class HumanEval:
    name, script = "humaneval", humaneval_eval

    def __init__(self, args, flags):
        self.args, self.flags, self.asked = args, flags, {}
        self.options = humaneval_eval.options_of(args)
        self.problems, self.tokenizer, self.asked_for = None, None, None

    @classmethod
    def from_flags(cls, argv):
        args = humaneval_eval.parse(argv)
        if args.samples_file:
            raise ValueError("humaneval: --samples-file judges without a model: no sweep")
        return [cls(args, argv)]

    def check_data(self):
        self.problems = read_problems(self.args.data_path, self.args.limit)
        with Sandbox(1, **self.options["sandbox"]):
            pass  # where no sandbox works, this says so

    def prepare(self, path, shape, dtype, device_type):
        name = self.args.tokenizer_name or checkpoint.find_tokenizer(path) or "gpt2"
        self.tokenizer = open_tokenizer(name)
        n = self.args.num_samples
        self.asked_for = humaneval_eval.configure(shape, self.tokenizer, dtype, n, **self.options)

    def identify(self, fingerprint):
        config = results.config_hash(humaneval_eval.configuration_of(self.asked_for))
        return config, humaneval_eval.resume_key(fingerprint, self.asked_for, self.problems)

    def evaluate(self, model, dist, info, run, results_dir):
        record = humaneval_eval.evaluate_humaneval(
            model,
            self.tokenizer,
            self.args.data_path,
            self.args.num_samples,
            **self.options,
            ks=self.args.k,
            compile_mode=self.args.compile,
            workers=self.args.workers,
            results_dir=results_dir,
            dist=dist,
            checkpoint_info=info,
            run=run,
        )
        return record, record["_arrays"], record["_samples"]


KINDS = {"perplexity": Perplexity, "mmlu": Mmlu, "humaneval": HumanEval}
_tokenizers = {}


def open_tokenizer(name):
    """Every checkpoint may hold a copy of its run's tokenizer: one of them is opened, once."""
    key = str(name)
    if Path(name).is_dir():
        files = [Path(name) / file for file in checkpoint.TOKENIZER_COPIES]
        content = [(f.name, hashlib.sha256(f.read_bytes()).digest()) for f in files if f.is_file()]
        key = tuple(content)
    if key not in _tokenizers:
        _tokenizers[key] = build_tokenizer(name)
    return _tokenizers[key]


# ---------------------------------------------------------------------------------------------
# One checkpoint, on all ranks


class Job(NamedTuple):
    """A checkpoint, and the evaluations (by index) that it lacks; rank 0 holds its lease."""

    path: Path
    files: tuple  # signature() when it was planned
    info: dict  # checkpoint.describe
    run: str
    pending: dict[int, str]  # index: resume_key
    ahead: Path | None  # likely to be next


def work(args, evaluations, dist, planner, job) -> None:
    """Load, evaluate, record. Whatever goes wrong with this checkpoint ends here, on all ranks."""
    start, problem, model = time.perf_counter(), None, None
    try:
        model = load(args, evaluations, dist, job)
    except Exception as error:  # an edge: one checkpoint of a sweep
        problem = reason_of(error)
    problem = next(filter(None, dist.gather(problem)), None)
    load_seconds = time.perf_counter() - start
    for index in job.pending:
        outcome = None
        if problem is None:
            outcome = evaluate(evaluations[index], model, dist, job, args.results_dir)
        if isinstance(outcome, tuple):
            outcome[0]["cost"]["load_seconds"] = load_seconds
            on_main(dist, planner.save, job, index, *outcome)
        else:
            on_main(dist, planner.fail, job.path, job.files, job.info, index, outcome or problem)
    del model
    if dist.device.type == "cuda":
        torch.cuda.empty_cache()


def load(args, evaluations, dist, job):
    """The model, with its evaluations prepared. There is no collective in here."""
    model = checkpoint.load_model(job.path, args.dtype_name, dist.device, args.model_config)
    shape = checkpoint.Shape(model.vocab_size, model.max_positions, model.supports_cache)
    for index in job.pending:
        evaluations[index].prepare(job.path, shape, args.dtype_name, dist.device.type)
    if checkpoint.fingerprint(job.path) != job.info["fingerprint"]:
        raise ValueError(f"{job.path} was replaced while it was read")
    return model


def evaluate(evaluation, model, dist, job, results_dir):
    """(record, arrays, samples), or the reason why there is none, on every rank the same: where
    only some of them fail the run ends, as the others are in the midst of a collective."""
    try:
        return evaluation.evaluate(model, dist, job.info, job.run, results_dir)
    except Exception as error:  # an edge: one checkpoint of a sweep
        dist.agree_on_error(error)
        return reason_of(error)


def reason_of(error: Exception) -> str:
    """One line; --debug shows where it came from."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    expected = isinstance(error, (ValueError, OSError))
    return cli.first_line(error) if expected else f"{type(error).__name__}: {cli.first_line(error)}"


class ReadAhead:
    """Reads the next checkpoint's weights into the page cache, so that loading finds them there."""

    def __init__(self):
        self.thread = None

    def start(self, path: Path | None) -> None:
        if path and not (self.thread and self.thread.is_alive()):
            self.thread = threading.Thread(target=self._read, args=(path,), daemon=True)
            self.thread.start()

    def _read(self, path: Path) -> None:
        files = [path] if path.is_file() else path.glob("*")
        with contextlib.suppress(OSError):  # gone meanwhile
            files = [f for f in files if not checkpoint.NOT_WEIGHTS.fullmatch(f.name)]
            if sum(f.stat().st_size for f in files) < available_memory() * SHARE_OF_MEMORY:
                for file in files:
                    with open(file, "rb", buffering=0) as f:
                        while f.read(2**23):
                            pass


def available_memory() -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024
    except (OSError, TypeError):
        return 0


# ---------------------------------------------------------------------------------------------
# What to do next: rank 0 alone


@dataclass
class Found:
    """A checkpoint as it lies there now; with other `files` it is another one."""

    path: Path
    files: tuple
    info: checkpoint.CheckpointInfo
    since: float  # monotonic, when these files were first seen
    settled: bool = False
    plan: dict | None = field(default=None, repr=False)  # {"info": ..., "keys": {index: (…)}}


def signature(path: Path) -> tuple | None:
    """(name, size, mtime, inode) of a checkpoint's files; None once it is gone."""
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        stats = [(p.name, p.stat()) for p in files]
    except OSError:
        return None
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats) or None


class Planner:
    """Sees checkpoints, records and the leases of other sweeps, and chooses."""

    def __init__(self, args, evaluations, dist):
        self.args, self.evaluations, self.dist = args, evaluations, dist
        self.found = {}  # path: Found
        self.looked = self.news = time.monotonic()  # when something last happened
        self.before, self.failed, self.n_gone = set(), set(), 0
        self.lease = None

    def open(self) -> None:
        args = self.args
        try:
            self.leases = Leases(Path(args.results_dir) / ".leases", args.lease_seconds)
            if probe := self.leases.take("probe"):
                probe.release()
        except OSError as error:
            raise ValueError(
                f"--results-dir {args.results_dir} cannot be written: {error.strerror}"
            ) from None
        self.ledger = Ledger(args, self.evaluations)
        self.look()
        if not (self.found or args.watch):
            checkpoint.expand_paths(args.checkpoint_path)  # says what is wrong

    # -- seeing -------------------------------------------------------------------------------

    def look(self) -> None:
        before, self.found, self.looked = self.found, {}, time.monotonic()
        for path in self._paths():
            files, known = signature(path), before.get(path)
            if known and known.files == files:
                self.found[path] = known
            elif files:
                self.found[path] = Found(path, files, checkpoint.info_of(path), time.monotonic())
                self.news = time.monotonic()
        for path in before.keys() - self.found.keys():
            if not before[path].settled:
                self.n_gone += 1
                say(before[path].info.name, "gone before it was evaluated")

    def _paths(self) -> list[Path]:
        paths = []
        for given in self.args.checkpoint_path:
            with contextlib.suppress(ValueError):  # --watch: there may be nothing yet
                paths += checkpoint.expand_paths([given])
        return paths

    def _in_order(self) -> list[Found]:
        until = self.args.until_step or float("inf")
        found = [f for f in self.found.values() if (f.info.step or 0) <= until]
        sign = -1 if self.args.newest_first else 1

        def key(f):  # one content is evaluated once, and not under the name of a link to it
            return f.info.step is None, sign * (f.info.step or 0), f.path.is_symlink()

        return sorted(found, key=key)

    def _is_ready(self, found: Found) -> bool:
        """Whole, or unchanged for so long that it will not become so: then it is tried, and fails.
        What other programs save grows under its final name, so a watcher lets it rest first."""
        if self.looked - found.since >= self.args.poll_seconds:
            return True
        if self.args.watch and found.info.kind != "roseval":
            return False
        return checkpoint.is_complete(found.path)

    # -- choosing -----------------------------------------------------------------------------

    def next_job(self) -> Job | None:
        """The next checkpoint that lacks something, its lease taken; waits for one if need be."""
        while True:
            self._check_launcher()
            if time.monotonic() - self.looked >= self.args.poll_seconds:
                self.look()
            if self.args.watch and (file := self._stop_file()):
                print0(f"{file} is there: the sweep ends")
                return None
            job, left = self._choose()
            if job or not (left or self._is_watching()):
                return job
            time.sleep(self.args.poll_seconds)

    def _choose(self) -> tuple[Job | None, int]:
        """(job, 0), or (None, how many checkpoints are not ready, or in others' hands)."""
        left, waiting = 0, [f for f in self._in_order() if not f.settled]
        for i, found in enumerate(waiting):
            if not self._is_ready(found):
                left += 1
                continue
            if found.plan is None and not self._make_plan(found):
                left += 1  # it changed under our eyes
                self.looked = -float("inf")
                continue
            if self._pending(found):
                info = found.plan["info"]
                lease = self.leases.take(info["fingerprint"][:32])
                if lease is None:
                    left += 1
                    continue
                # whoever had the lease until now may have done it
                pending = self._pending(found, on_disk=True)
                if pending:
                    self.lease = lease
                    ahead = next((f.path for f in waiting[i + 1 :] if self._may_need(f)), None)
                    run = self._run_of(found.path)
                    return Job(found.path, found.files, info, run, pending, ahead), 0
                lease.release()
            found.settled = True
        return None, left

    def _make_plan(self, found: Found) -> bool:
        """What each evaluation's record will be known by. What fails already here is recorded.
        False if the checkpoint is not what it was."""
        args, path, problems = self.args, found.path, {}
        info = {"path": str(path), "name": found.info.name, "step": found.info.step}
        found.plan = {"info": info, "keys": {}}
        try:
            shape = checkpoint.shape_of(path, args.model_config)
            found.plan["info"] = info = checkpoint.describe(path, args.model_config)
        except Exception as error:  # an edge: one checkpoint of a sweep
            problems = dict.fromkeys(range(len(self.evaluations)), reason_of(error))
        for index, evaluation in enumerate(self.evaluations):
            if index in problems:
                continue
            try:
                evaluation.prepare(path, shape, args.dtype_name, self.dist.device.type)
                found.plan["keys"][index] = evaluation.identify(info["fingerprint"])
            except Exception as error:  # the same edge
                problems[index] = reason_of(error)
        if signature(path) != found.files:
            found.plan = None
            return False
        for index, reason in problems.items():
            self.fail(path, found.files, found.plan["info"], index, reason)
        return True

    def _pending(self, found: Found, on_disk=False) -> dict[int, str]:
        """{index: resume_key} of the evaluations to make. on_disk: look for others' records too."""
        info, pending = found.plan["info"], {}
        for index, (config, key) in found.plan["keys"].items():
            name, run = self.evaluations[index].name, self._run_of(found.path)
            where = (self.args.results_dir, run, info["name"], info["fingerprint"], name, config)
            if on_disk:
                self.ledger.read(results.record_path(*where))
            if self.ledger.is_done(key):
                self.ledger.forget_failure(found.path, index)
                if key not in self.ledger.made:
                    self.before.add(key)
            elif self.ledger.has_failed(found.path, found.files, index):
                self._say_known(found.path, info, index)
            else:
                pending[index] = key
        return pending

    def _may_need(self, found: Found) -> bool:
        return found.plan is None or bool(self._pending(found))

    def _run_of(self, path: Path) -> str:
        return self.args.run_name or perplexity_eval.run_name(path)

    # -- ending -------------------------------------------------------------------------------

    def _is_watching(self) -> bool:
        """Whether more may come, when nothing is left to do."""
        args = self.args
        if not args.watch:
            return False
        if args.until_step and self._last_step() >= args.until_step:
            return False
        return not args.quiet_seconds or time.monotonic() - self.news < args.quiet_seconds

    def _last_step(self) -> int:
        return max((f.info.step or 0 for f in self.found.values()), default=0)

    def _stop_file(self) -> Path | None:
        folders = [*self.args.checkpoint_path, self.args.results_dir]
        return next((f for d in folders if (f := Path(d) / "STOP").exists()), None)

    def _check_launcher(self) -> None:
        """Workers whose torchrun was killed would watch for ever, and hold the GPUs."""
        left_alone = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        if left_alone or self.dist.is_orphan:
            raise ValueError("torchrun has ended; start the sweep again to go on")

    # -- recording ----------------------------------------------------------------------------

    def save(self, job: Job, index: int, record, arrays, samples) -> None:
        key = job.pending[index]
        assert record["resume_key"] == key, f"planned {key}, got {record['resume_key']}"
        keep = self.args.log_samples or record["evaluation"] == "humaneval"  # its script's way
        samples = samples() if samples and keep else None
        self.ledger.save(record, arrays, samples, job.path, index)
        self.failed.discard((job.path, index))
        say(job.info["name"], f"{self.evaluations[index].label}: {headline(record)}")

    def fail(self, path, files, info, index, reason) -> None:
        """Record a failure, unless it is the checkpoint's disappearance or replacement."""
        if signature(path) != files:
            return
        if self.ledger.has_failed(path, files, index):
            return self._say_known(path, info, index)
        self.ledger.fail(path, files, info, self._run_of(path), index, reason)
        self.failed.add((path, index))
        say(info["name"], f"{self.evaluations[index].label}: failed: {reason}")

    def _say_known(self, path, info, index) -> None:
        """Of a failure that an earlier sweep recorded, once."""
        if (path, index) not in self.failed:
            self.failed.add((path, index))
            reason = self.ledger.known_failure(path, index).get("reason")
            label = self.evaluations[index].label
            say(info["name"], f"{label}: failed before: {reason} (--retry-failed tries again)")

    def close(self, job: Job) -> None:
        self.release()
        if signature(job.path) == job.files:
            self.found[job.path].settled = True
        else:
            self.look()
        self.news = time.monotonic()

    def release(self) -> None:
        if self.lease:
            self.lease.release()
            self.lease = None

    def finish(self) -> int:
        """The last word; returns how many evaluations failed."""
        self.leases.clear()
        n_made, n_before, n_failed = len(self.ledger.made), len(self.before), len(self.failed)
        print0(f"evaluations: {n_made} made, {n_before} done before, {n_failed} failed")
        if self.n_gone:
            print0(f"{self.n_gone} checkpoints gone before their turn")
        if not n_made:
            print0("nothing was left to do (--force does it again)")
        print0(f"table: python report.py {self.args.results_dir}")
        return n_failed


# ---------------------------------------------------------------------------------------------
# Output


def say(checkpoint_name: str, text: str) -> None:
    print0(f"{checkpoint_name:<20}  {text}")


def headline(record) -> str:
    parts = []
    for name, metric in list(record["metrics"].items())[:3]:
        value, stderr = metric, None
        if isinstance(metric, dict):
            value, stderr = metric["value"], metric.get("stderr")
        parts.append(f"{name} {value:.5g}" + (f" ± {stderr:.2g}" if stderr else ""))
    return ", ".join(parts) + f"  ({record['cost']['seconds']:.1f} s)"


if __name__ == "__main__":
    cli.run(main)

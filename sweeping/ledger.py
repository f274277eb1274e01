"""What a sweep knows of its results directory: which work is done, and which failed and why.

    ledger = Ledger(args, evaluations)
    ledger.is_done(resume_key), ledger.has_failed(path, files, index)
    ledger.save(record, arrays, samples, path, index)       # and out to TensorBoard, W&B

Records are the only memory: nothing else is written down. An evaluation is known here by its name,
its flags and the file of its script.
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path

import durable
import results
from sweeping.export import to_lm_eval


class Ledger:
    """The records of the results directory: what is done, what failed. Writes more of them."""

    def __init__(self, args, evaluations):
        self.args, self.evaluations = args, evaluations
        self.done, self.made, self.failures = set(), set(), {}
        self.code = [results.running_code(e.script.__file__) for e in evaluations]
        self.trackers = open_trackers(args)
        for record in results.load_records(args.results_dir):
            self._note(record)

    def _note(self, record: dict) -> None:
        if record["status"] == "ok":
            self.done.add(record.get("resume_key"))
            self._export(record)
        else:
            path = os.path.abspath(record["checkpoint"].get("path") or "")
            self.failures[path, record["evaluation"], record.get("config_hash")] = record

    def read(self, path: Path) -> None:
        """A record that another sweep may have written since."""
        with contextlib.suppress(OSError, ValueError):
            self._note(results.load_record(path))

    def is_done(self, key: str) -> bool:
        return key in (self.made if self.args.force else self.done)

    def _failure(self, index) -> tuple[str, dict]:
        """(evaluation, configuration) that a failure is filed under: all that is known before a
        checkpoint can be opened."""
        evaluation = self.evaluations[index]
        return evaluation.name, {"flags": evaluation.flags, "dtype": self.args.dtype_name}

    def known_failure(self, path, index) -> dict | None:
        name, configuration = self._failure(index)
        key = os.path.abspath(path), name, results.config_hash(configuration)
        return self.failures.get(key)

    def has_failed(self, path, files, index) -> bool:
        """Whether these very files failed before, with the code that would evaluate them now."""
        known = self.known_failure(path, index)
        if known is None or known["protocol"].get("files") != digest(files):
            return False
        if known.get("failed_now"):
            return True
        retry = self.args.force or self.args.retry_failed
        return known.get("code_version") == self.code[index] and not retry

    def save(self, record, arrays, samples, path, index) -> None:
        where = results.save_record(self.args.results_dir, record, arrays, samples)
        self.forget_failure(path, index)
        self.done.add(record["resume_key"])
        self.made.add(record["resume_key"])
        self._export(record | {"_path": str(where)})
        name = self.evaluations[index].label.replace(" ", "_")  # two of a kind: two curves
        for log in self.trackers:
            log(record | {"evaluation": name})

    def fail(self, path, files, info, run, index, reason) -> None:
        name, configuration = self._failure(index)
        fingerprint = {"fingerprint": digest(files)}  # unless the checkpoint could be read
        record = results.new_record(
            name,
            {},
            configuration | {"files": digest(files)},
            run=run,
            checkpoint=fingerprint | info,
            configuration=configuration,
            code=self.code[index],
            status="failed",
            reason=reason,
        )
        where = results.save_record(self.args.results_dir, record)
        self.forget_failure(path, index, where)
        self._note(record | {"_path": str(where), "failed_now": True})

    def forget_failure(self, path, index, instead: Path | None = None) -> None:
        """An earlier failure of what now has a record (at `instead`)."""
        known = self.known_failure(path, index)
        if known:
            del self.failures[os.path.abspath(path), known["evaluation"], known["config_hash"]]
            if Path(known["_path"]) != instead:
                Path(known["_path"]).unlink(missing_ok=True)

    def _export(self, record) -> None:
        """--lm-eval-json: lm_eval/{run}/{checkpoint}/results_{evaluation}.json beside the runs."""
        if self.args.lm_eval_json:
            root, path = Path(self.args.results_dir), Path(record["_path"])
            place = root / "lm_eval" / path.parent.relative_to(root)
            durable.write_json(place / f"results_{path.name}", to_lm_eval(record))


def digest(files: tuple) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Trackers


def open_trackers(args) -> list:
    """Functions that take a record: its numbers go out under results.scalars' names, by step."""
    trackers = []
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package: pip install tensorboard") from None
        trackers.append(functools.partial(to_tensorboard, SummaryWriter, args.tensorboard, {}))
    if args.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs the package: pip install wandb") from None
        trackers.append(functools.partial(to_wandb, wandb, args.wandb, {}))
    return trackers


def to_tensorboard(writer_class, folder, writers, record) -> None:
    run = record["run"]
    if run not in writers:
        writers[run] = writer_class(str(Path(folder) / run))
    for name, value in results.scalars(record).items():
        writers[run].add_scalar(name, value, record["checkpoint"]["step"])
    writers[run].flush()


def to_wandb(wandb, project, runs, record) -> None:
    """Checkpoints may come in any order, so `step` is a number among the others, and the x axis."""
    run, info = record["run"], record["checkpoint"]
    if run not in runs:
        name = f"eval-{run}"
        runs[run] = wandb.init(
            project=project, name=name, id=name, resume="allow", reinit="create_new"
        )
        runs[run].define_metric("*", step_metric="step")
    position = {name: info[name] for name in ("step", "tokens") if info[name] is not None}
    runs[run].log(results.scalars(record) | position)

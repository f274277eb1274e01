"""What a sweep knows of its results directory: which work is done, and which failed and why.

    ledger = Ledger("results", entries, dtype, options)
    ledger.is_done(resume_key), ledger.has_failed(path, files, label)
    ledger.fill(entry, resume_key, run, about)              # what else was asked of a record there
    ledger.save(result, with_samples, path, label)          # and out to TensorBoard, W&B

Records are the only memory of work.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import checkpoint
import cli
import durable
import results
from distributed import print0
from evaluation import Result
from sweeping.export import to_lm_eval
from sweeping.trackers import Trackers, open_trackers


class Ledger:
    """The records of the results directory: what is done, what failed. Writes more of them."""

    def __init__(self, results_dir, entries, dtype: str, options, given=None):
        self.results_dir, self.options = results_dir, options
        # a failure is filed under what holds for all entries, too: --config and --base, if given
        self.shared = {"dtype": dtype} | {name: v for name, v in (given or {}).items() if v}
        self.entries = {entry.label: entry for entry in entries}
        self.done: dict[str, dict[str, Path]] = {}  # resume_key: {run: its record}
        self.made, self.failures = set(), {}
        logs = open_trackers(options.tensorboard, options.wandb)
        self.trackers = Trackers(Path(results_dir) / ".sent.jsonl", logs)
        for record in results.load_records(results_dir):
            self._note(record)

    def _note(self, record: dict) -> None:
        if record["status"] == "ok":
            self.done.setdefault(str(record.get("resume_key")), {})[record["run"]] = record["_path"]
            self._export(record)
        else:
            path = os.path.abspath(record["checkpoint"].get("path") or "")
            self.failures[path, record["evaluation"], record.get("config_hash")] = record

    def read(self, path: Path) -> None:
        """A record that another sweep may have written since."""
        with contextlib.suppress(OSError, ValueError):
            self._note(results.load_record(path))

    def is_done(self, key: str) -> bool:
        return key in (self.made if self.options.force else self.done)

    def save(self, result: Result, with_samples: bool, path: Path, label: str) -> None:
        where = result.save(self.results_dir, with_samples)
        self.forget_failure(path, label)
        self._forget_older_failures(path, result["evaluation"])
        self.made.add(result["resume_key"])
        self._note(result | {"_path": str(where)})
        self.trackers.send(result, label, again=True)

    # -- more of what is there ----------------------------------------------------------------

    def fill(self, entry: Any, key: str, run: str, about: dict) -> list[str]:
        """What is asked for beyond the key of a record that is done, from what is there: the record
        under this run's name too, metrics that its arrays give, its numbers to the trackers. In
        words, what was done. ValueError where that takes the model: samples that were not kept,
        arrays that are lost."""
        there, told = self.done[key], []
        record = results.load_record(there.get(run) or next(iter(there.values())))
        with_samples = self.options.log_samples and entry.evaluation.samples == "asked"
        if with_samples and "samples" not in record["files"]:
            raise ValueError("every example's scores were not kept")
        more = entry.evaluation.recount(entry.options, record)
        if run not in there or more:
            if run not in there:
                told.append(f"copied from run {record['run']}")
            if more:
                new = [name for name in more["metrics"] if name not in record["metrics"]]
                told.append(f"{', '.join(new)} added")
            arrays = results.load_arrays(record) | (more["arrays"] if more else {})
            samples = results.load_samples(record) or None
            record |= {"run": run, "checkpoint": about}
            record |= {"metrics": more["metrics"], "examples": more["examples"]} if more else {}
            path = results.save_record(self.results_dir, record, arrays, samples)
            record = results.load_record(path)
            self._note(record)
        if self.trackers.send(record, entry.label):
            told.append("sent to the trackers")
        return told

    # -- failures -----------------------------------------------------------------------------

    def _filed_under(self, label: str) -> tuple[str, dict]:
        """(evaluation, configuration) that a failure is filed under: all that is known before a
        checkpoint can be opened."""
        entry = self.entries[label]
        return entry.evaluation.name, entry.asked | self.shared

    def _code(self, label: str) -> str:
        """Of all that could open a checkpoint: who mends a format tries again what failed."""
        formats = [f"formats/{Path(str(reader.__file__)).name}" for reader in checkpoint.READERS]
        return self.entries[label].evaluation.code_version(*formats, "backends/local.py")

    def known_failure(self, path: Path, label: str) -> dict | None:
        name, configuration = self._filed_under(label)
        key = os.path.abspath(path), name, results.config_hash(configuration)
        return self.failures.get(key)

    def has_failed(self, path: Path, files: tuple, label: str) -> bool:
        """Whether these very files failed before, with the code that would evaluate them now."""
        known = self.known_failure(path, label)
        if known is None or known["protocol"].get("files") != digest(files):
            return False
        if known.get("failed_now"):
            return True
        retry = self.options.force or self.options.retry_failed
        return known.get("code_version") == self._code(label) and not retry

    def fail(self, path: Path, files: tuple, info: dict, run: str, label: str, reason: str) -> None:
        name, configuration = self._filed_under(label)
        fingerprint = {"fingerprint": digest(files)}  # unless the checkpoint could be read
        record = results.new_record(
            name,
            {},
            configuration | {"files": digest(files)},
            run=run,
            checkpoint=fingerprint | info,
            configuration=configuration,
            code=self._code(label),
            status="failed",
            reason=reason,
        )
        where = results.save_record(self.results_dir, record)
        self.forget_failure(path, label, where)
        self._note(record | {"_path": str(where), "failed_now": True})

    def forget_failure(self, path: Path, label: str, instead: Path | None = None) -> None:
        """An earlier failure of what now has a record (at `instead`)."""
        known = self.known_failure(path, label)
        if known:
            del self.failures[os.path.abspath(path), known["evaluation"], known["config_hash"]]
            if Path(known["_path"]) != instead:
                Path(known["_path"]).unlink(missing_ok=True)

    def _forget_older_failures(self, path: Path, evaluation: str) -> None:
        """Of schema version 1, which filed them under flags that nobody can compare with."""
        for key, record in list(self.failures.items()):
            if key[:2] == (os.path.abspath(path), evaluation) and record.get("_version") == 1:
                del self.failures[key]
                Path(record["_path"]).unlink(missing_ok=True)

    # -- other tools --------------------------------------------------------------------------

    def _export(self, record) -> None:
        """--lm-eval-json: lm_eval/{run}/{checkpoint}/results_{evaluation}.json beside the runs."""
        if self.options.lm_eval_json:
            root, path = Path(self.results_dir), Path(record["_path"])
            place = root / "lm_eval" / path.parent.relative_to(root)
            try:
                shaped = to_lm_eval(record)
            except Exception as error:  # an edge: one record of those that are there
                print0(cli.printable(f"{path}: not exported: {cli.reason_of(error)}"))
                return
            durable.write_json(place / f"results_{path.name}", shaped)


def digest(files: tuple) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()

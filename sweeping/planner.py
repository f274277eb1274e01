"""What a sweep does next: sees checkpoints, records and the leases of other sweeps, and chooses.

planner = Planner(models, options, entries, dtype, dist)       # on every rank
while work := planner.next_work():                             # rank 0: waits if need be
    planner.save(work, label, result)
    planner.close(work)
"""

import os
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import cli
import evaluation
import formats
from backends import Facts, parallel
from backends.local import facts_of
from checkpoint import Checkpoint
from config import GPTConfig
from distributed import Dist, print0
from evaluation import Evaluation, ModelOptions, Plan, Plans, Result
from formats import filling
from quantisation.names import Quantisation
from sweeping.lease import Lease, Leases
from sweeping.ledger import Ledger
from sweeping.seen import Seen, Shelf, signature

PARENT = os.getppid()

# ---------------------------------------------------------------------------------------------
# Entries of the YAML file


@dataclass(frozen=True, eq=False)
class Entry:
    """An evaluation with its options; `label` tells it from the others of a sweep."""

    evaluation: Evaluation
    options: Any
    tokenizer_name: str | None
    quantisation: Quantisation | None = None
    label: str = ""

    @property
    def asked(self) -> dict:
        """The options by name: all that is known of it before a checkpoint can be opened."""
        own = _flat(self.options) | {"tokenizer_name": self.tokenizer_name}
        rounded = self.quantisation
        more = (rounded.rule, rounded.embeddings, rounded.skip) if rounded else (None, False, ())
        return own | dict(zip(("quantise", "quantise_embeddings", "quantise_skip"), more))

    @property
    def rooms(self) -> tuple[str, ...]:
        """The files whose code counts, beside the format's."""
        return "backends/local.py", *(["quantisation/apply.py"] if self.quantisation else [])

    def labelled(self, entries: list["Entry"]) -> "Entry":
        """Its evaluation's name, and the options that set it apart from others of that name."""
        others = [e.asked for e in entries if e.evaluation is self.evaluation]
        own = [
            f"{name.replace('_', '-')}={_text(value)}"
            for name, value in self.asked.items()
            if value not in (None, ()) and any(other[name] != value for other in others)
        ]
        return replace(self, label=" ".join([self.evaluation.name, *own]))


def _flat(options) -> dict:
    values = {}
    for f in fields(options):
        value = getattr(options, f.name)
        values |= _flat(value) if hasattr(value, "__dataclass_fields__") else {f.name: value}
    return values


def _text(value) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text.replace("\n", "\\n")  # of stop strings, as they are given


class Work(NamedTuple):
    """A checkpoint, and the entries that it lacks; rank 0 holds its lease."""

    path: Path
    files: tuple  # signature() when it was planned
    info: dict  # what records say of it
    run: str
    pending: dict[str, str]  # label: resume_key
    ahead: Path | None  # likely to be next
    block_bytes: float | None = None  # see filling.block_bytes


# ---------------------------------------------------------------------------------------------
# Choosing


class Planner:
    """options: sweep.SweepOptions. All but plan_of and in_groups is rank 0's alone."""

    def __init__(
        self, models: ModelOptions, options: Any, entries: list[Entry], dtype: str, dist: Dist
    ):
        self.models, self.options, self.dtype, self.dist = models, options, dtype, dist
        self.entries = {entry.label: entry for entry in entries}
        self.plans = {entry.label: Plans(entry.evaluation, entry.options) for entry in entries}
        self.shelf = Shelf(models.checkpoint_path, options.watch, options.poll_seconds)
        self.before, self.failed, self.n_gone, self.n_filled = set(), set(), 0, 0
        self.lease: Lease | None = None

    def open(self) -> None:
        """Look around for the first time. ValueError for a results directory that cannot be
        written, and for paths without a checkpoint."""
        place = self.models.results_dir
        try:
            self.leases = Leases(Path(place) / ".leases", self.options.lease_seconds)
            if probe := self.leases.take("probe"):
                probe.release()
        except OSError as error:
            raise ValueError(f"--results-dir {place} cannot be written: {error.strerror}") from None
        entries, config = list(self.entries.values()), self.models.model_config()
        given = {"config": config and config.to_dict(), "base": self.models.base}
        self.ledger = Ledger(place, entries, self.dtype, self.options, given)
        self.look()
        if not self.options.watch:
            checkpoint.expand_paths(self.models.checkpoint_path)  # says of each what is wrong

    def look(self) -> None:
        for gone in self.shelf.look():
            self.n_gone += 1
            self.say(gone.path, "gone before it was evaluated")

    def plan_of(self, entry: Entry, ckpt: Checkpoint) -> tuple[Plan, Facts]:
        """What does not depend on the weights, the same on every rank."""
        needed = entry.evaluation.needs_tokenizer(entry.options)
        tokenizer = evaluation.pick_tokenizer(entry.tokenizer_name, ckpt, needed)
        rounded = entry.quantisation
        facts = facts_of(ckpt, tokenizer, self.dtype, self.dist.device.type, rounded)
        return self.plans[entry.label].of(facts), facts

    def in_groups(self, work: Work, dist: Dist) -> Dist:
        """The run as --shard groups it for this checkpoint, by what rank 0 saw of it: no rank is
        alone in the collective that this is."""
        config = work.info["config"]
        config = GPTConfig.from_dict(config) if work.info["module"] == "GPTModel" else None
        at_once = self.rounded_at_once(work)
        packed = (lambda: work.block_bytes) if self.rules(work) == {None} else None
        return parallel.in_groups(dist, self.models.shard, config, self.dtype, at_once, packed)

    def rules(self, work: Work) -> set[Quantisation | None]:
        """Those that a checkpoint is evaluated under; None among them: as it is."""
        return {self.entries[label].quantisation for label in work.pending}

    def rounded_at_once(self, work: Work) -> Quantisation | None:
        """The rule that weights are rounded by as they are read: the only one, and of no adapter,
        which is merged into weights first."""
        rules = self.rules(work)
        return next(iter(rules)) if len(rules) == 1 and "base" not in work.info else None

    def by_rule(self, labels: Iterable[str]) -> list[str]:
        """In their order, but those of one rule side by side, as they appear first."""
        rules = list(dict.fromkeys(entry.quantisation for entry in self.entries.values()))
        return sorted(labels, key=lambda label: rules.index(self.entries[label].quantisation))

    def next_work(self) -> Work | None:
        """The next checkpoint that lacks something, its lease taken; waits for one if need be."""
        while True:
            self._check_launcher()
            if self.shelf.is_due():
                self.look()
            if self.options.watch and (file := self._stop_file()):
                print0(f"{cli.printable(file)} is there: the sweep ends")
                return None
            work, left = self._choose()
            if work or not (left or self._is_watching()):
                return work
            time.sleep(self.options.poll_seconds)

    def _choose(self) -> tuple[Work | None, int]:
        """(work, 0), or (None, how many checkpoints are not ready, or in others' hands)."""
        left, waiting = 0, self.shelf.waiting(self.options.until_step, self.options.newest_first)
        for i, seen in enumerate(waiting):
            if not self.shelf.is_ready(seen):
                # a watcher does not stay for a save that may have been broken off
                left += not self.options.watch or checkpoint.is_finished(seen.path) is None
                continue
            if not seen.about and not self._make_plan(seen):
                left += 1  # it changed under our eyes
                self.shelf.looked = -float("inf")
                continue
            if self._pending(seen):
                lease = self.leases.take(seen.about["fingerprint"][:32])
                if lease is None:
                    left += 1
                    continue
                # whoever had the lease until now may have done it
                pending = self._pending(seen, on_disk=True)
                if pending:
                    self.lease = lease
                    ahead = next((s.path for s in waiting[i + 1 :] if self._may_need(s)), None)
                    run = self.models.run_of(seen.path)
                    more = pending, ahead, seen.block_bytes
                    return Work(seen.path, seen.files, seen.about, run, *more), 0
                lease.release()
            seen.settled = True
        return None, left

    def _make_plan(self, seen: Seen) -> bool:
        """What each entry's record will be known by. What fails already here is recorded. False if
        the checkpoint is not what it was."""
        path, problems, keys = seen.path, {}, {}
        about: dict = {"path": str(path), "name": seen.info.name, "step": seen.info.step}
        try:
            ckpt = self.models.opened(path)
            about = ckpt.describe()
            if self.models.shard == "auto" and self.dist.device.type == "cuda":
                seen.block_bytes = filling.block_bytes(ckpt, self.dtype)
        except Exception as error:  # an edge: one checkpoint of a sweep
            problems = dict.fromkeys(self.entries, cli.reason_of(error))
        for label, entry in self.entries.items():
            if label in problems:
                continue
            try:
                plan, _ = self.plan_of(entry, ckpt)
                rooms = *ckpt.rooms, *entry.rooms
                key = evaluation.resume_key(entry.evaluation, plan, about, *rooms)
                keys[label] = self._record_path(entry, plan, about, path), key
            except Exception as error:  # the same edge
                problems[label] = cli.reason_of(error)
        if signature(path) != seen.files:
            return False
        seen.about, seen.keys = about, keys
        for label, reason in problems.items():
            self._fail(path, seen.files, about, label, reason)
        for label in seen.keys:
            self._fill(seen, label)
        return True

    def _fill(self, seen: Seen, label: str) -> None:
        """Whatever is asked of a record that is done, and its key does not say: from what is there,
        or by doing it again."""
        key = seen.keys[label][1]
        if not self.ledger.is_done(key) or self.options.force:
            return
        try:
            run = self.models.run_of(seen.path)
            told = self.ledger.fill(self.entries[label], key, run, seen.about)
        except ValueError as error:
            seen.again.add(label)
            self.say(seen.path, f"{label}: done again: {cli.first_line(error)}")
            return
        if told:
            self.n_filled += 1
            self.say(seen.path, f"{label}: {', '.join(told)}")

    def _record_path(self, entry: Entry, plan: Plan, about: dict, path: Path) -> Path:
        run, place = self.models.run_of(path), self.models.results_dir
        return evaluation.record_path(entry.evaluation, plan, about, run, place)

    def _pending(self, seen: Seen, on_disk=False) -> dict[str, str]:
        """{label: resume_key} of the records to make. on_disk: look for others' records too."""
        pending = {}
        for label, (record, key) in seen.keys.items():
            if on_disk:
                self.ledger.read(record)
            if self.ledger.is_done(key) and (label not in seen.again or key in self.ledger.made):
                self.ledger.forget_failure(seen.path, label)
                if key not in self.ledger.made:
                    self.before.add(key)
            elif self.ledger.has_failed(seen.path, seen.files, label):
                self._say_known(seen.path, label)
            else:
                pending[label] = key
        return pending

    def _may_need(self, seen: Seen) -> bool:
        return not seen.about or bool(self._pending(seen))

    # -- ending -------------------------------------------------------------------------------

    def _is_watching(self) -> bool:
        """Whether more may come, when nothing is left to do."""
        options = self.options
        if not options.watch:
            return False
        if options.until_step and self.shelf.last_step >= options.until_step:
            return False
        quiet = time.monotonic() - self.shelf.news
        return not options.quiet_seconds or quiet < options.quiet_seconds

    def _stop_file(self) -> Path | None:
        folders = [*self.models.checkpoint_path, self.models.results_dir]
        return next((f for d in folders if (f := Path(d) / "STOP").exists()), None)

    def _check_launcher(self) -> None:
        """Workers whose torchrun was killed would watch for ever, and hold the GPUs."""
        left_alone = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        if left_alone or self.dist.is_orphan:
            raise ValueError("torchrun has ended; start the sweep again to go on")

    # -- recording ----------------------------------------------------------------------------

    def save(self, work: Work, label: str, result: Result) -> None:
        key = work.pending[label]
        assert result["resume_key"] == key, f"planned {key}, got {result['resume_key']}"
        kept = self.entries[label].evaluation.samples
        try:
            self.ledger.save(result, kept == "always" or self.options.log_samples, work.path, label)
        finally:  # a full disk does not cost the numbers
            self.say(work.path, f"{label}: {headline(result)}")
        self.failed.discard((work.path, label))

    def fail(self, work: Work, label: str, reason: str) -> None:
        self._fail(work.path, work.files, work.info, label, reason)

    def _fail(self, path, files, info, label, reason) -> None:
        """Record a failure, unless it is the checkpoint's disappearance or replacement."""
        if signature(path) != files:
            return
        if self.ledger.has_failed(path, files, label):
            self._say_known(path, label)
            return
        self.failed.add((path, label))
        try:
            self.ledger.fail(path, files, info, self.models.run_of(path), label, reason)
        except ValueError as error:  # of a name that no folder can have, say
            reason = f"{reason} (not recorded: {cli.first_line(error)})"
        self.say(path, f"{label}: failed: {reason}")

    def _say_known(self, path, label) -> None:
        """Of a failure that an earlier sweep recorded, once."""
        if (path, label) not in self.failed:
            self.failed.add((path, label))
            reason = (self.ledger.known_failure(path, label) or {}).get("reason")
            self.say(path, f"{label}: failed before: {reason} (--retry-failed tries again)")

    def close(self, work: Work) -> None:
        self.release()
        if signature(work.path) == work.files:
            self.shelf.seen[work.path].settled = True
        else:
            self.look()
        self.shelf.news = time.monotonic()

    def release(self) -> None:
        if self.lease:
            self.lease.release()
            self.lease = None

    def finish(self) -> int:
        """The last word; returns how many evaluations failed."""
        self.leases.clear()
        n_made, n_before, n_failed = len(self.ledger.made), len(self.before), len(self.failed)
        print0(f"evaluations: {n_made} made, {n_before} done before, {n_failed} failed")
        for seen in self.shelf.seen.values():
            if not seen.settled and checkpoint.is_finished(seen.path) is False:
                print0(f"{seen.path}: its save was not finished: not evaluated")
        if self.n_gone:
            print0(f"{self.n_gone} checkpoints gone before their turn")
        if self.n_filled:
            print0(f"{self.n_filled} of those done before were given what they lacked")
        elif not n_made:
            print0("nothing was left to do (--force does it again)")
        print0(f"table: python report.py {shlex.quote(cli.printable(self.models.results_dir))}")
        return n_failed

    def say(self, path: Path, text: str) -> None:
        """A line about a checkpoint: its name, or its path where others have that name too."""
        name = formats.name_of(path)
        called = path if self.shelf.names[name] > 1 else name
        print0(f"{cli.printable(called):<20}  {cli.printable(text)}")


def headline(record: dict) -> str:
    """The first metrics and the time they took."""
    parts = []
    for name, metric in list(record["metrics"].items())[:3]:
        stderr = metric.get("stderr")
        known = stderr is not None and stderr == stderr and stderr > 0  # NaN of one example
        parts.append(f"{name} {metric['value']:.5g}" + (f" ± {stderr:.2g}" if known else ""))
    return ", ".join(parts) + f"  ({record['cost']['seconds']:.1f} s)"

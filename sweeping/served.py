"""Served models of a sweep: what its checkpoints are asked, asked of an endpoint each.

    endpoint: [{url: http://host:8000, model: NAME, tokenizer-name: PATH, concurrency: 16}]

Records, resuming and failures are those of checkpoints: what is done is not asked again, what a
server cannot do truthfully is a failure with its reason, and the others go on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
import evaluation
import results
from distributed import Dist, print0
from durable import check_writable
from evaluation import EndpointOptions, ModelOptions
from sweeping.ledger import Ledger
from sweeping.planner import Entry, headline

ROOM = "backends/endpoint.py"
NOT_SERVED = "reference", "no_prefix_cache"  # options that say nothing of a served model


@dataclass(frozen=True)
class Endpoint:
    """A served model, as the YAML names it."""

    options: EndpointOptions
    tokenizer_name: str


def read_endpoints(where: str, listed: Any, models: ModelOptions) -> list[Endpoint]:
    """Those of the YAML's `endpoint`, one or several. ValueError for what is wrong with them."""
    found = []
    for values in listed if isinstance(listed, list) else [listed]:
        if not isinstance(values, dict) or not values.get("url"):
            raise ValueError(f"{where} must hold `url: http://host:8000`, not {values!r:.60}")
        named = {str(name).replace("-", "_"): value for name, value in values.items()}
        tokenizer = named.pop("tokenizer_name", models.tokenizer_name)
        if not tokenizer:
            raise ValueError(f"{where} needs tokenizer-name: the tokenizer of the served model")
        named["endpoint"] = named.pop("url")
        options = cli.convert_options(EndpointOptions, named, where)
        found.append(Endpoint(cli.read_options(EndpointOptions, options), str(tokenizer)))
    return found


def check_entries(where: str, entries: list[Entry]) -> None:
    """ValueError for what no served model can be asked."""
    for entry in entries:
        if entry.quantisation is not None:
            raise ValueError(f"{where}: {entry.label}: the weights of a served model are its own")
        for name in NOT_SERVED:
            if getattr(entry.options, name, None):
                raise ValueError(f"{where}: {entry.label}: {cli.flag_of(name)} wants checkpoints")


class ServedSweep:
    """options: sweep.SweepOptions. In one process: an endpoint is asked by one."""

    def __init__(self, models: ModelOptions, options: Any, entries: list[Entry], dist: Dist):
        if dist.world_size > 1:
            raise ValueError("endpoint: is asked by one process; sweep it without torchrun")
        self.models, self.options, self.dist = models, options, dist
        self.entries = {entry.label: entry for entry in entries}
        self.run = models.run_name or "endpoints"
        check_writable(models.results_dir, "--results-dir")
        Path(models.results_dir).mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(models.results_dir, entries, "served", options)
        self.n_before = self.n_failed = 0

    def ask(self, endpoint: Endpoint) -> None:
        """All evaluations of one served model."""
        from backends.endpoint import connect

        asked = endpoint.options
        url = asked.endpoint or ""
        try:
            backend = connect(
                url,
                asked.model,
                evaluation.open_tokenizer(endpoint.tokenizer_name),
                kind=asked.server,
                concurrency=asked.concurrency,
                timeout=asked.request_timeout,
                dist=self.dist,
            )
        except (ValueError, OSError) as error:
            info = {"path": url, "name": asked.model or url}
            for label in self.entries:
                self._fail(info, label, cli.first_line(error))
            return
        for label in self.entries:
            try:
                self._evaluate(backend, label)
            except Exception as error:  # an edge: one evaluation of a sweep
                self._fail(backend.info, label, cli.reason_of(error))

    def _evaluate(self, backend: Any, label: str) -> None:
        entry, info = self.entries[label], backend.info
        plan = entry.evaluation.plan(entry.options, backend.facts)
        key = evaluation.resume_key(entry.evaluation, plan, results.checkpoint_of(info), ROOM)
        if self.ledger.is_done(key):
            self.n_before += 1
            return
        found = evaluation.measure(
            entry.evaluation,
            backend,
            plan,
            info=info,
            run=self.run,
            rooms=(ROOM,),
            results_dir=self.models.results_dir,
        )
        kept = entry.evaluation.samples == "always" or self.options.log_samples
        self.ledger.save(found, kept, Path(info["path"]), label)
        self._say(info, f"{label}: {headline(found)}")

    def _fail(self, info: dict, label: str, reason: str) -> None:
        """Recorded, and tried again by the next sweep: a server is not what it was."""
        self.n_failed += 1
        self.ledger.fail(Path(info["path"]), (), info, self.run, label, reason)
        self._say(info, f"{label}: failed: {reason}")

    def _say(self, info: dict, text: str) -> None:
        print0(f"{cli.printable(info['name']):<20}  {cli.printable(text)}")

    def finish(self) -> int:
        """The last word; returns how many evaluations failed."""
        made, before = len(self.ledger.made), self.n_before
        print0(f"served models: {made} made, {before} done before, {self.n_failed} failed")
        return self.n_failed

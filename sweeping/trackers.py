"""Where a sweep's numbers also go: TensorBoard and Weights & Biases, each asked for by a flag.

    trackers = Trackers("results/.sent.jsonl", open_trackers("runs", None))
    trackers.send(record, "mmlu")               # to each that it has not been sent to before

What was sent is remembered beside the records: a tracker asked for later gets what is there, once.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import cli
import results
from distributed import print0
from durable import dumps, encode
from recording import trackers
from recording.runs import Place, place_of


def open_trackers(
    tensorboard: str | None, wandb_project: str | None
) -> dict[str, Callable[[dict], None]]:
    """{where: a function that takes a record}: its numbers go out under results.scalars' names, by
    step, to the tracker's run of the record's run."""
    starts = trackers.trackers(tensorboard, wandb_project)
    return {where: functools.partial(_tell, where, start, {}) for where, start in starts.items()}


def _tell(where: str, start: trackers.Start, logs: dict[str, trackers.Log], record: dict) -> None:
    run, info, numbers = record["run"], record["checkpoint"], results.scalars(record)
    on_wandb = where.startswith("wandb")
    if run not in logs:
        logs[run] = start(f"eval-{run}" if on_wandb else run, None)
    if on_wandb and info["tokens"] is not None:
        numbers["tokens"] = info["tokens"]
    logs[run](numbers, info["step"])


class Trackers:
    """Trackers, and what each of them has: a line of `memory` for each record that was sent."""

    def __init__(self, memory: Path, logs: dict[str, Callable[[dict], None]]):
        self.memory, self.logs = memory, logs
        self.sent: set[tuple] = set()  # (where, run, label, resume_key)
        self.places: dict[tuple, Place] = {}  # (where, run over there): whose it is
        if logs and memory.exists():
            for line in memory.read_bytes().split(b"\n"):
                self._recall(line)

    def _recall(self, line: bytes) -> None:
        try:
            where, there, place, *what = json.loads(line)
            self.sent.add((where, *what))
            self.places.setdefault((where, there), tuple(place))
        except (ValueError, TypeError):  # torn: what it tells of is sent once more
            return

    def send(self, record: dict, label: str, again: bool = False) -> int:
        """To each tracker that does not have it, or to all; how many took it. label: tells the
        evaluation from others of its kind: two of a kind are two curves."""
        name, taken = label.replace(" ", "_"), 0
        for where, log in self.logs.items():
            what = record["run"], label, record["resume_key"]
            if again or (where, *what) not in self.sent:
                there = self._run_over_there(where, record)
                try:
                    log(record | {"run": there, "evaluation": name})
                except Exception as error:  # an edge: other people's programs and networks
                    print0(cli.printable(f"{where}: not sent: {cli.reason_of(error)}"))
                    continue
                taken += 1
                self.sent.add((where, *what))
                line = dumps([where, there, place_of(record), *what], separators=(",", ":"))
                with open(self.memory, "ab") as memory:  # several sweeps may append
                    memory.write(encode("\n" + line))  # after a torn one too
        return taken

    def _run_over_there(self, where: str, record: dict) -> str:
        """The run's name, or as much of its directory as tells it from those that are there."""
        run, place = record["run"], place_of(record)
        ends = ["/".join(place[n:]) for n in range(len(place) - 2, -1, -1)]
        if place[-1:] != (run,):  # somebody named it: it may lie in several directories
            place, ends = (run,), []
        names = [run, *ends]
        free = (n for n in names if _is_same(self.places.get((where, n), place), place))
        there = next(free, names[-1])
        self.places.setdefault((where, there), place)
        return there


def _is_same(a: Place, b: Place) -> bool:
    """Whether two paths may be one directory, named from elsewhere."""
    shared = min(len(a), len(b))
    return a[len(a) - shared :] == b[len(b) - shared :]

"""Where a sweep's numbers also go: TensorBoard and Weights & Biases, each asked for by a flag.

    trackers = Trackers("results/.sent.jsonl", open_trackers("runs", None))
    trackers.send(record, "mmlu")               # to each that it has not been sent to before

What was sent is remembered beside the records: a tracker asked for later gets what is there, once.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import results
from distributed import print0
from durable import dumps, encode
from recording.runs import Place, place_of


def open_trackers(
    tensorboard: str | None, wandb_project: str | None
) -> dict[str, Callable[[dict], None]]:
    """{where: a function that takes a record}: its numbers go out under results.scalars' names, by
    step."""
    trackers: dict[str, Callable[[dict], None]] = {}
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package: pip install tensorboard") from None
        log = functools.partial(to_tensorboard, SummaryWriter, tensorboard, {})
        trackers[f"tensorboard {Path(tensorboard).resolve()}"] = log
    if wandb_project:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs the package: pip install wandb") from None
        log = functools.partial(to_wandb, wandb, wandb_project, {})
        trackers[f"wandb {wandb_project}"] = log
    return trackers


def to_tensorboard(writer_class: Any, folder: str, writers: dict, record: dict) -> None:
    """Scalars by step, a writer for each run."""
    run = record["run"]
    if run not in writers:
        writers[run] = writer_class(str(Path(folder) / run))
    for name, value in results.scalars(record).items():
        writers[run].add_scalar(name, value, record["checkpoint"]["step"])
    writers[run].flush()


def to_wandb(wandb: Any, project: str, runs: dict, record: dict) -> None:
    """Checkpoints may come in any order, so `step` is a number among the others, and the x axis."""
    run, info = record["run"], record["checkpoint"]
    if run not in runs:
        name = f"eval-{run}".replace("/", "-")  # no path
        runs[run] = wandb.init(
            project=project, name=name, id=name, resume="allow", reinit="create_new"
        )
        runs[run].define_metric("*", step_metric="step")
    position = {name: info[name] for name in ("step", "tokens") if info[name] is not None}
    runs[run].log(results.scalars(record) | position)


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

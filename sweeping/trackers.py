"""Where a sweep's numbers also go: TensorBoard and Weights & Biases, each asked for by a flag."""

import functools
from pathlib import Path
from typing import Any

import results


def open_trackers(tensorboard: str | None, wandb_project: str | None) -> list:
    """Functions that take a record: its numbers go out under results.scalars' names, by step."""
    trackers = []
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package: pip install tensorboard") from None
        trackers.append(functools.partial(to_tensorboard, SummaryWriter, tensorboard, {}))
    if wandb_project:
        try:
            import wandb
        except ImportError:
            raise ValueError("--wandb needs the package: pip install wandb") from None
        trackers.append(functools.partial(to_wandb, wandb, wandb_project, {}))
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
        name = f"eval-{run}"
        runs[run] = wandb.init(
            project=project, name=name, id=name, resume="allow", reinit="create_new"
        )
        runs[run].define_metric("*", step_metric="step")
    position = {name: info[name] for name in ("step", "tokens") if info[name] is not None}
    runs[run].log(results.scalars(record) | position)

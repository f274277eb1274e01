"""TensorBoard and Weights & Biases, each asked for by a flag: where numbers also go.

    for where, start in trackers("runs", "project").items():    # what is not installed is refused
        log = start("my-run", {"lr": 3e-4})                     # a run over there
        log({"train/loss": 2.5}, 100)                           # its numbers of step 100

train.py tells them its losses, a sweep its records (sweeping/trackers.py). Without a network,
`WANDB_MODE=offline` keeps a run in ./wandb until `wandb sync` sends it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, Any], int | None], None]  # (numbers by name, their step)
Start = Callable[..., Log]  # (the run's name, what it is made with, what tells it from namesakes)


def trackers(
    tensorboard: str | None, wandb_project: str | None, wandb_flag: str = "--wandb"
) -> dict[str, Start]:
    """{where: what starts a run there, or goes on with one of that name}. ValueError for a package
    that is not installed."""
    found: dict[str, Start] = {}
    if tensorboard:
        found[f"tensorboard {Path(tensorboard).resolve()}"] = to_tensorboard(tensorboard)
    if wandb_project:
        found[f"wandb {wandb_project}"] = to_wandb(wandb_project, wandb_flag)
    return found


def to_tensorboard(folder: str) -> Start:
    """A writer for each run, in a folder of its name."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package: pip install tensorboard") from None

    def start(run: str, config: dict | None = None, key: str = "") -> Log:
        writer = SummaryWriter(str(Path(folder) / run))

        def log(numbers: dict[str, Any], step: int | None) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log

    return start


def to_wandb(project: str, flag: str = "--wandb") -> Start:
    """Steps may come in any order, and again after a kill, which its own step would not allow: so
    `step` is a number among the others, and the x axis."""
    try:
        import wandb
    except ImportError:
        raise ValueError(f"{flag} needs the package: pip install wandb") from None

    def start(run: str, config: dict | None = None, key: str = "") -> Log:
        name = run.replace("/", "-")  # no path
        about = {"project": project, "name": name, "id": f"{name}-{key}" if key else name}
        there = wandb.init(**about, config=config, resume="allow", reinit="create_new")
        there.define_metric("*", step_metric="step")

        def log(numbers: dict[str, Any], step: int | None) -> None:
            there.log(numbers if step is None else numbers | {"step": step})

        return log

    return start

"""What a training run's checkpoint holds, saved whole and taken up again.

state = TrainingState(model, optimizer, scheduler, tokenizer, adapters=None)
resume(state, find_latest(run, dist))       # the last complete one, if any
save(state, batches, loss, options.run, dist)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import cli
from distributed import Dist, print0
from formats import native, row_shards
from model import GPTModel
from tokenizer import Tokenizer
from training import shards
from training.batches import TrainBatches
from training.lora import Adapters
from training.options import RunOptions


@dataclass
class TrainingState:
    """step: how many have been taken."""

    model: GPTModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    tokenizer: Tokenizer
    adapters: Adapters | None = None  # what is trained, where the model is frozen
    step: int = 0

    def write(self, directory: Path) -> None:
        """What was trained, and the tokenizer."""
        if self.adapters:
            self.adapters.write(directory)
            self.tokenizer.save(directory)
        else:
            checkpoint.write_weights(self.model, self.model.config, directory, self.tokenizer)


def find_latest(run: RunOptions, dist: Dist) -> Path | None:
    """The last complete checkpoint that rank 0 sees, if any. ValueError where a run would write
    over an earlier one without --resume, and for hosts that see other files."""
    directory = Path(run.checkpoint_path)
    found = checkpoint.list_checkpoints(directory) if dist.is_main and directory.is_dir() else []
    path = dist.broadcast(found[-1].path if found else None)
    if path is None:
        return None
    if not run.resume:
        raise ValueError(f"{directory} has checkpoints: --resume goes on from {path.name}")
    if not path.is_dir():
        raise ValueError(
            f"{path} is there for rank 0 and not here: --checkpoint-path must be on a file system "
            "that all hosts share"
        )
    return path


def resume(state: TrainingState, path: Path) -> None:
    """Load a checkpoint, which find_latest found."""
    parts = state.optimizer, state.scheduler
    if row_shards.is_sharded(state.model):
        state.step = shards.resume(state, path)
    elif state.adapters:
        state.step = state.adapters.resume(path, *parts)
    else:
        _, state.step, _ = checkpoint.load_checkpoint(path, state.model, *parts)
    print0(f"resuming from {cli.printable(path)}, step {state.step}")


def save(
    state: TrainingState, batches: TrainBatches, loss: float, run: RunOptions, dist: Dist
) -> None:
    """checkpoint-{step}, by rank 0, for which the others wait; by all if the model is sharded."""
    sharded = row_shards.is_sharded(state.model)
    if sharded and not dist.is_main:
        shards.write(state, None, dist)
    if dist.is_main:
        tokens = batches.tokens(state.step)
        base = state.adapters.frozen if state.adapters else {}
        values = {
            "epoch": int(batches.epochs(state.step)[0]),
            "step": state.step,
            "loss": loss,
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "extra": {"tokens": tokens} | base,
        }
        write: Callable[[Path], native.Entries | None] = state.write
        if sharded:
            values |= {"optimizer": shards.plain_optimizer(state.optimizer)}
            values |= {"moments": shards.about_moments(state.optimizer, dist)}
            write = functools.partial(shards.write, state, dist=dist)
        path = native.save_state(values, run.checkpoint_path, write, run.keep)
        print0(f"step {state.step}: saved {cli.printable(path)}")
    dist.barrier()

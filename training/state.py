"""What a training run's checkpoint holds, saved whole and taken up again.

state = TrainingState(model, optimizer, scheduler, tokenizer, adapters=None)
resume(state, options.run)                  # from the last complete one, if any
save(state, batches, loss, options.run, dist)
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import cli
from distributed import Dist, print0
from formats import native
from model import GPTModel
from tokenizer import Tokenizer
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


def resume(state: TrainingState, run: RunOptions) -> None:
    """Load the last complete checkpoint, if any. Refuses to write over an earlier run without
    --resume."""
    directory = Path(run.checkpoint_path)
    found = checkpoint.list_checkpoints(directory) if directory.is_dir() else []
    if found and not run.resume:
        raise ValueError(f"{directory} has checkpoints: --resume goes on from {found[-1].name}")
    if not found:
        return
    path, parts = found[-1].path, (state.optimizer, state.scheduler)
    if state.adapters:
        state.step = state.adapters.resume(path, *parts)
    else:
        _, state.step, _ = checkpoint.load_checkpoint(path, state.model, *parts)
    print0(f"resuming from {cli.printable(path)}, step {state.step}")


def save(
    state: TrainingState, batches: TrainBatches, loss: float, run: RunOptions, dist: Dist
) -> None:
    """checkpoint-{step}, by rank 0, for which the others wait."""
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
        path = native.save_state(values, run.checkpoint_path, state.write, run.keep)
        print0(f"step {state.step}: saved {cli.printable(path)}")
    dist.barrier()

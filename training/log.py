"""What a training run says: lines on the terminal, log.jsonl, and trackers if asked.

    log = Log("run/log.jsonl", range(first_step, 1000), every=10, tokens_per_step=65536, dist=dist)
    log.step(done, loss, norm, lr)          # after each step; written every 10 and at the last
    log.validation(done, val_loss)
    log.restart_clock(done)                 # validation and saving are not training time

A line of log.jsonl is {step, loss, lr, grad_norm, tokens_per_second, mfu} or {step, val_loss};
losses are in nats a token, mfu is there on GPUs whose speed is known, and router_loss, the
load-balancing loss of a mixture of experts, where training adds some of it. With --packing a line
before the first step has packing.Counts.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import cli
import durable
from distributed import Dist, print0
from recording import trackers
from training.packing import Counts


class Log:
    """Of a run, or of what a resumed run has left to do; all ranks call it alike.

    steps: those that will be taken. mfu: f(seconds of a step) -> model FLOPs utilisation or None.
    sent_to: on rank 0, where its numbers go besides.
    """

    def __init__(
        self,
        path: str | Path,
        steps: range,
        every: int,
        tokens_per_step: int,
        dist: Dist,
        mfu: Callable[[float], float | None] = lambda seconds: None,
        sent_to: Mapping[str, trackers.Log] | None = None,
    ):
        self.path, self.every, self.last_step = Path(path), every, steps.stop
        self.tokens_per_step, self.mfu, self.sent_to = tokens_per_step, mfu, sent_to or {}
        self.dist = dist
        if dist.is_main:
            self._cut_after(steps.start)
        self.restart_clock(steps.start)

    def _cut_after(self, step: int) -> None:
        """A resumed run repeats the steps since its checkpoint: their lines are written again."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill tore
                    continue
                if entry["step"] <= step:
                    kept.append(line + "\n")
        durable.write_atomic(self.path, "".join(kept))

    def restart_clock(self, step: int) -> None:
        """Seconds count from here, after `step` steps."""
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)
        self.clock_step, self.clock = step, time.perf_counter()

    def step(
        self,
        step: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
        lr: float,
        router_loss: torch.Tensor | None = None,
        scored: torch.Tensor | None = None,
    ) -> None:
        """After step number `step`, from 1: this rank's losses, the gradients' norm and the share
        of positions that are targets (None: all), still on the device. ValueError for a loss that
        is not finite."""
        if step % self.every and step != self.last_step:
            return
        whole = mean_loss(loss, scored, self.dist)  # the only device sync
        if not math.isfinite(whole):
            raise ValueError(
                f"the loss is {whole} at step {step}: nothing was saved since; lower --lr"
            )
        grad_norm = float(norm)
        seconds = (time.perf_counter() - self.clock) / max(1, step - self.clock_step)
        entry = {
            "step": step,
            "loss": whole,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": self.tokens_per_step / seconds,
        }
        if router_loss is not None:
            entry["router_loss"] = mean_over_ranks(router_loss, self.dist)
        mfu = self.mfu(seconds)
        if mfu is not None:
            entry["mfu"] = mfu
        self._write(entry)
        print0(
            f"step {step}/{self.last_step}  loss {whole:.4f}  lr {lr:.2e}  "
            f"norm {grad_norm:.2f}  {entry['tokens_per_second']:,.0f} tokens/s"
            + ("" if router_loss is None else f"  router {entry['router_loss']:.4f}")
            + ("" if mfu is None else f"  mfu {mfu:.1%}")
        )
        self.clock_step, self.clock = step, time.perf_counter()

    def packing(self, step: int, way: str | None, counts: Sequence[Counts]) -> None:
        """Before the first step: what became of each source's documents."""
        for part in counts if step == 0 else ():
            self._write({"step": 0, "packing": way, **dataclasses.asdict(part)})

    def validation(self, step: int, loss: float) -> None:
        """The loss over the validation data after step number `step`."""
        self._write({"step": step, "val_loss": loss})
        print0(f"step {step}: val_loss {loss:.6f}  val_ppl {math.exp(min(loss, 700)):.4f}")

    def _write(self, entry: dict) -> None:
        if self.dist.is_main:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
            for where, log in self.sent_to.items():
                numbers = {f"train/{name}": v for name, v in entry.items() if name != "step"}
                try:
                    log(numbers, entry["step"])
                except Exception as error:  # an edge: other people's programs and networks
                    print0(cli.printable(f"{where}: not sent: {cli.reason_of(error)}"))


def mean_loss(loss: torch.Tensor, scored: torch.Tensor | None, dist: Dist) -> float:
    """Nats a target, over all ranks, of a rank's nats a position and the share of targets."""
    share = 1.0 if scored is None else mean_over_ranks(scored, dist)
    return mean_over_ranks(loss, dist) / share if share else 0.0


def mean_over_ranks(loss: torch.Tensor, dist: Dist) -> float:
    return float(dist.sum(loss.double()[None])[0]) / dist.world_size

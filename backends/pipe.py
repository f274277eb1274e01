"""A group of ranks that hold one model between them, and what they send each other.

    dist = sharded(dist, 2)                 # two neighbouring ranks to a model
    pipe = dist.pipe                        # None where each rank has a whole one
    x = pipe.receive(B, T, C)               # the residual stream, of the layers before
    pipe.send(x)                            # to the layers after
    pipe.sum(tokens)                        # what one of them knows, to all

Plain sends and receives of torch.distributed, over NCCL or gloo. Nothing is rounded on its way, and
each rank works with whole weights, so a sample has the bits that one rank alone would give it.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from costs.symbols import SENT_AHEAD
from distributed import COLLECTIVE_TIMEOUT, MADE, Dist

T = TypeVar("T")


class GroupOutOfMemory(torch.OutOfMemoryError):
    """On one rank of a group: all of them raise it, at the same point of their work."""


def sharded(dist: Dist, size: int) -> Dist:
    """The same run with groups of `size` ranks. A collective: all ranks call it alike. ValueError
    where the run cannot be cut into such groups."""
    if dist.world_size % size:
        raise ValueError(
            f"--shard {size} needs {size} processes, or a multiple, not {dist.world_size}: "
            f"torchrun --nproc-per-node={size} …"
        )
    dist = replace(dist, pipe=None)
    return replace(dist, pipe=_open_pipe(dist, size)) if size > 1 else dist


def _open_pipe(dist: Dist, size: int) -> "Pipe":
    """Every rank makes all connections, its own among them, in one order. Each has a group of its
    own, since NCCL does in turn whatever is asked of one group."""
    if size not in MADE:
        pipe = Pipe(dist, size)
        for first in range(0, dist.world_size, size):
            ranks = range(first, first + size)
            for a, b in itertools.pairwise(ranks):
                link = torch_dist.new_group([a, b], timeout=COLLECTIVE_TIMEOUT)
                pipe.after = link if a == dist.rank else pipe.after
                pipe.before = link if b == dist.rank else pipe.before
            group = torch_dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)
            pipe.group = group if dist.rank in ranks else pipe.group
        MADE[size] = pipe
    return MADE[size]


class Pipe:
    """What one rank of a group sends to the next, and what all of them tell each other.

    stage: which one of the group's `size` ranks this is. Messages have no header: both sides know
    from the plan of the work, which is the same on all ranks of a group, what comes next. So a rank
    whose memory runs out goes on with the plan, sending tensors of the right shape that mean
    nothing (`attempt`), until all agree that it failed (`settle`).
    """

    before: torch_dist.ProcessGroup | None = None  # with the rank that holds the layers before
    after: torch_dist.ProcessGroup | None = None
    group: torch_dist.ProcessGroup | None = None

    def __init__(self, dist: Dist, size: int):
        self.dist, self.size, self.stage = dist, size, dist.rank % size
        self.device, self.failed = dist.device, False
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        self._received: torch.cuda.Event | None = None

    @property
    def is_last(self) -> bool:
        """Whether this rank makes logits, which the others never see."""
        return self.stage == self.size - 1

    def room(self, *shape: int) -> torch.Tensor:
        """For a float32 tensor that another rank waits for, or sends."""
        x = self.attempt(lambda: torch.empty(shape, device=self.device))
        if x is None:
            try:
                return torch.empty(shape, device=self.device)
            except torch.OutOfMemoryError:
                raise RuntimeError(f"no memory for the {shape} numbers between two ranks") from None
        return x

    def receive(self, *shape: int) -> torch.Tensor:
        """The next tensor, float32, of the rank before."""
        x = self.receive_into(self.room(*shape))
        if x.is_cuda:  # the host runs ahead of the GPU by one tensor, and waits here if anywhere
            before, self._received = self._received, torch.cuda.Event()
            self._received.record()
            if before is not None:
                with self.dist.waiting():
                    before.synchronize()
        return x

    def receive_into(self, x: torch.Tensor) -> torch.Tensor:
        work = torch_dist.irecv(x, group=self.before, group_src=0)
        assert work is not None, "of this group"
        with self.dist.waiting():
            work.wait()
        return x

    def send(self, x: torch.Tensor) -> None:
        """To the rank after, without waiting for it unless SENT_AHEAD others are on their way."""
        while len(self._sent) >= SENT_AHEAD:
            self._wait(*self._sent.popleft())
        x = x.contiguous()
        self._sent.append((torch_dist.isend(x, group=self.after, group_dst=1), x))

    def hand_on(self, x: torch.Tensor) -> None:
        """The same of a tensor that is written again: by what the GPU does after it was taken."""
        work = torch_dist.isend(x, group=self.after, group_dst=1)
        assert work is not None, "of this group"
        with self.dist.waiting():
            work.wait()

    def _wait(self, work: Any, x: torch.Tensor) -> None:
        with self.dist.waiting():
            if not x.is_cuda:
                work.wait()
            while x.is_cuda and not work.is_completed():  # NCCL's wait() is the stream's alone
                time.sleep(0.0005)

    def sum(self, x: torch.Tensor) -> Callable[[], None]:
        """Begin to add up x over the group, in place; call what is returned before it is read."""
        work: Any = torch_dist.all_reduce(x, group=self.group, async_op=True)

        def wait():
            with self.dist.waiting():
                work.wait()

        return wait

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        """function(*args); None where memory runs out, of which `settle` tells."""
        try:
            return function(*args)
        except torch.OutOfMemoryError:
            self.failed = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def settle(self) -> bool:
        """Once a plan is done: whether this rank's memory held it. Nothing is on its way then."""
        while self._sent:
            self._wait(*self._sent.popleft())
        enough, self.failed = not self.failed, False
        return enough

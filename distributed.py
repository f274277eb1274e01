"""One process per GPU under torchrun, or a single plain process: the same code runs in both.

    with distributed.setup() as dist:
        for unit in dist.shard(n_units):        # fixed units of work, dealt round-robin
            values[unit] = ...                  # a dense float64 vector, zeros elsewhere
            dist.bump()                         # "still working", once a batch
        values = dist.sum(values)               # every rank has every value

Why results have the same bits on any number of ranks: units are cut before they are dealt, every
unit's values land in slots of their own, and the all-reduce adds zeros to them, which is exact.

Why nothing hangs: there are no collectives between `bump`s. Each rank has a watch thread with its
own connection to torchrun's store. A rank is dead when it neither bumps nor waits in a collective
for `timeout` seconds; then the others end the run and name it. A slow rank is waited for.

A model that is larger than one GPU is held by a group of neighbouring ranks (backends/pipe.py):
`dist.shard` deals units to groups then, all ranks of one having the same, and `dist.mine` deals to
ranks what needs no model.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist

import cli
import launcher
from durable import cache_folder

if TYPE_CHECKING:
    from backends.pipe import Pipe

T = TypeVar("T")

# A collective waits for the slowest rank as long as that takes; the watch threads end the wait
# when a rank is dead, which a collective's own timeout could not tell from being slow.
COLLECTIVE_TIMEOUT = timedelta(days=30)
# torchrun's store is there before its workers are: one that is not reached was killed meanwhile
# (torch may take twice as long to give up)
CONNECT_TIMEOUT = timedelta(minutes=1)
LOOK = 1 << 32  # in a rank's counter: the thread has looked; below it, how often the rank got on


@dataclass(frozen=True)
class Dist:
    """This process among the others. device: where its model runs."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    _watch: "Watch | None" = field(default=None, repr=False)
    pipe: "Pipe | None" = field(default=None, repr=False)  # to the others of its group, if any

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group_size(self) -> int:
        """Ranks that hold one model between them."""
        return self.pipe.size if self.pipe else 1

    @property
    def n_groups(self) -> int:
        """Models that work side by side."""
        return self.world_size // self.group_size

    @property
    def group(self) -> int:
        """Which of them this rank has a part of."""
        return self.rank // self.group_size

    @property
    def members(self) -> range:
        """The ranks of this group."""
        return range(self.group * self.group_size, (self.group + 1) * self.group_size)

    def shard(self, n_units: int) -> range:
        """The units of 0..n-1 that are this rank's model's; over all groups each appears once."""
        return range(self.group, n_units, self.n_groups)

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those that are this rank's, of work that needs no model; over all ranks each once."""
        return items[self.rank :: self.world_size]

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        """function(*args). In a group, None where memory runs out: the others count on this rank to
        go on with the plan that all of them follow, and learn of it at its end."""
        return self.pipe.attempt(function, *args) if self.pipe else function(*args)

    def bump(self) -> None:
        """Call once a batch: from the first call to the next collective the rank is watched."""
        if self._watch:
            self._watch.bump()

    @property
    def is_orphan(self) -> bool:
        """Whether torchrun is gone: a rank that would run for ever should end then."""
        return bool(self._watch and self._watch.store_is_gone)

    def sum(self, values: torch.Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
        """Elementwise sum over the ranks of a float64 or int64 array, as numpy on every rank.

        Exact where at most one rank's element is not zero. CUDA tensors go through NCCL.
        """
        tensor = torch.as_tensor(values)
        assert tensor.dtype in (torch.float64, torch.int64), tensor.dtype
        with self._waiting():
            if self.world_size > 1:
                tensor = tensor.clone()
                torch_dist.all_reduce(tensor)
            return tensor.cpu().numpy()

    def gather(self, obj: Any) -> list:
        """Every rank's picklable object, in rank order, on every rank."""
        with self._waiting():
            objects = [obj] * self.world_size
            if self.world_size > 1:
                torch_dist.all_gather_object(objects, obj, group=_gloo_group())
            return objects

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's picklable object on every rank."""
        return self.gather(obj if self.is_main else None)[0]

    def barrier(self) -> None:
        """Returns once every rank is here."""
        self.gather(None)

    def agree_on_error(self, error: Exception, patience: float = 60.0) -> None:
        """Returns once every rank has come here, so that all are out of the work that failed; the
        error of a rank alone is raised again, for the others may wait for it in a collective."""
        if self._watch:
            self._watch.meet(error, patience)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it this rank waits for another one, as long as that takes."""
        if self._watch is None:
            yield
            return
        before, self._watch.resting = self._watch.resting, True
        try:
            yield
        finally:
            self._watch.resting = before
            self._watch.bumps += 1

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a hung kernel is no progress: still watched here
        if self._watch:
            self._watch.rest()
        yield


MADE: dict[Any, Any] = {}  # groups of processes, and what consists of them, once they are made


def _gloo_group() -> torch_dist.ProcessGroup | None:
    """Python objects travel over gloo: the default group is NCCL's where there are GPUs."""
    if torch_dist.get_backend() == "gloo":
        return None
    if "gloo" not in MADE:
        MADE["gloo"] = torch_dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return MADE["gloo"]


@contextlib.contextmanager
def setup(device: str | None = None, timeout: float = 120) -> Iterator[Dist]:
    """Join the other ranks of torchrun, if any, and yield a Dist; leave cleanly on the way out.

    device: "cpu", "cuda", or None for CUDA where there is one. timeout: seconds without progress
    after which a rank counts as dead. Raises ValueError for a device that is not there, and for
    ranks that cannot find each other (launcher.check_launch).
    """
    rank, world_size, local_rank, launched = launcher.check_launch()
    _keep_compiled()
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.cuda.synchronize()  # makes the context: seconds that belong to no checkpoint
    elif launched and "OMP_NUM_THREADS" not in os.environ:
        # torchrun gives each of several ranks one thread, and thread count can change last bits
        torch.set_num_threads(1)
    if world_size == 1:
        yield Dist(rank, world_size, local_rank, chosen)
        return
    store = _join(rank, world_size, chosen)
    watch = Watch(store, rank, world_size, timeout)
    watch.start()
    try:
        yield Dist(rank, world_size, local_rank, chosen, watch)
        torch_dist.barrier(group=_gloo_group())  # nobody tears down while others still talk
    finally:
        watch.stop()
    torch_dist.destroy_process_group()
    MADE.clear()


def _keep_compiled() -> None:
    """What torch.compile makes is kept for the next run. Torch's own place is below /tmp, which is
    emptied, and in a container gone with it."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (
        kept := cache_folder("inductor", make=True)
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)


def pick_device(name: str | None, local_rank: int) -> torch.device:
    """The device of a rank of this host: cpu, cuda, or None for cuda where there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"rank {local_rank} of this host has no GPU: torch sees {count}. Start as many "
            "processes (torchrun --nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", local_rank)


def _join(rank: int, world_size: int, device: torch.device) -> torch_dist.Store:
    """Initialise the process group and return a store connection for the watch thread."""
    # what ranks of a group send each other goes through groups of two, in turn as it should
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    store, _, _ = next(torch_dist.rendezvous("env://", rank, world_size, timeout=CONNECT_TIMEOUT))
    store.set_timeout(timedelta(minutes=30))
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch_dist.PrefixStore("roseval", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    _gloo_group()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch_dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))


class Watch:
    """The watch thread of one rank. Counters live in the store; each rank adds to its own only.

    timeout: seconds without progress after which a rank counts as dead.
    """

    def __init__(self, store: torch_dist.Store, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.store = torch_dist.PrefixStore(
            f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        self.interval, self.clock = min(2.0, timeout / 8), time.monotonic
        self.bumps, self.seen_bumps, self.resting = 0, 0, True
        # by rank: how often it had got on, since when; how often it has looked, since when
        self.last_moves: dict[int, tuple[int, float, int, float]] = {}
        self.meetings, self.store_is_gone = 0, False
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Look every `interval` seconds, until `stop`."""
        self.thread.start()

    def stop(self) -> None:
        """No rank is dead from here on."""
        self.stopped.set()
        self.thread.join()

    def bump(self) -> None:
        """This rank works, and has just got on."""
        self.bumps += 1
        self.resting = False

    def rest(self) -> None:
        """No bumps are due: loading, compiling, or waiting for the others."""
        self.resting = True

    def meet(self, error: Exception, patience: float) -> None:
        """Wait until all ranks have come here; after `patience` seconds raise `error`. This is no
        collective: the others may be inside one that this rank will never enter."""
        self.rest()
        self.meetings += 1
        name, end = f"meeting {self.meetings}", time.monotonic() + patience
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.world_size:
            if time.monotonic() > end:
                raise error
            time.sleep(0.05)

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                dead = self.silent_rank()
            except RuntimeError:  # the store went with torchrun, which is ending the run, or dead
                self.store_is_gone = True
                return
            if dead is not None and not self.stopped.is_set():
                self._end_run(dead)

    def silent_rank(self) -> int | None:
        """Say that this rank lives, if it does, and find one whose counter has not moved for
        `timeout` seconds of this process's clock, which is compared with no other. In training all
        ranks stand still where one does: it is the one whose process says nothing, if one is."""
        counts, now = self._exchange(), self.clock()
        silent, stopped = [], []
        for rank, (moves, looks) in enumerate(counts):
            known, since, known_looks, seen = self.last_moves.get(rank, (-1, now, -1, now))
            since = now if moves != known else since
            seen = now if looks != known_looks else seen
            self.last_moves[rank] = moves, since, looks, seen
            if now - since > self.timeout:
                silent.append(rank)
            if now - seen > self.timeout / 2:
                stopped.append(rank)
        return (stopped or silent)[0] if silent else None

    def _exchange(self) -> list[tuple[int, int]]:
        """Of each rank, how often it had got on and how often its watch thread has looked: one
        number in the store."""
        alive = self.resting or self.bumps != self.seen_bumps
        self.seen_bumps = self.bumps
        self.store.add(str(self.rank), LOOK + (1 if alive else 0))
        counts = [self.store.add(str(r), 0) for r in range(self.world_size)]
        return [(count % LOOK, count // LOOK) for count in counts]

    def _end_run(self, dead: int) -> None:
        if self.store.add("reported", 1) == 1:
            print(
                f"error: rank {dead} made no progress for {self.timeout:g} s; the run ends here "
                "(if that rank is stopped, once torchrun has killed it: 30 s more)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)  # the main thread may be inside a collective that will never return


def print0(*args: Any, **kwargs: Any) -> None:
    """print on rank 0 only."""
    if cli.rank() == 0:
        print(*args, **kwargs, flush=True)

"""--shard: the first rank has the clients, and the others do the same work, turn by turn.

    leader = Leader(dist)               # on the first rank, when the others are there too
    leader.tell(news)                   # before each turn: what came in
    leader.end()                        # the others end as well

    Follower(dist).follow(work)         # on the others, until then

All that a turn needs is what came in before it (serving/work.py): this is told from host to host
over gloo, so that no GPU waits for a client, and nobody's patience has an end. A rank that dies is
noticed at once, wherever the others are: each has a thread that waits for nothing else.
"""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from distributed import Dist
from serving.work import News, Work

FOR_EVER = timedelta(days=3650)
END, DISMISSAL = -1, -2  # in the place of a message's size: all went well, or the first rank failed
PATIENCE = 10.0  # seconds in which a lost connection is known to be a rank's end
GRACE = 2.0  # seconds that another rank has to fail first, for torchrun names who does


class Line:
    """Messages between the first rank and the others: a number, and bytes if it is positive."""

    def __init__(self, dist: Dist):
        self.dist, self.group = dist, torch_dist.new_group(backend="gloo", timeout=FOR_EVER)

    def send(self, to: int, size: int, data: torch.Tensor | None = None) -> None:
        torch_dist.send(torch.tensor([size]), to, group=self.group)
        if data is not None:
            torch_dist.send(data, to, group=self.group)

    def receive(self, of: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """RuntimeError where that rank has ended."""
        data = torch.empty(size, dtype=dtype)
        torch_dist.recv(data, of, group=self.group)
        return data


class Leader:
    """See the file's docstring. A collective with Follower's."""

    def __init__(self, dist: Dist):
        self._line, self._others = Line(dist), range(1, dist.world_size)
        self._threads: list[threading.Thread] = []
        self._loss: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._over = False

    def watch(self, on_loss: Callable[[Exception], object]) -> None:
        """From now on: on_loss is called where a rank dies, in another thread."""

        def wait_for(rank: int) -> None:
            try:
                self._line.receive(rank, 1, torch.int64)  # it says no more than that it ends
            except RuntimeError:
                loss = ConnectionError(f"rank {rank} has ended, and the server with it")
                self._loss.put(loss)
                on_loss(loss)

        for rank in self._others:
            self._threads.append(threading.Thread(target=wait_for, args=(rank,), daemon=True))
            self._threads[-1].start()

    def cause_of(self, error: Exception) -> Exception:
        """The loss of a rank, if that is why the work met an error."""
        if isinstance(error, RuntimeError):
            with contextlib.suppress(queue.Empty):
                return self._loss.get(timeout=PATIENCE)
        return error

    def tell(self, news: News) -> None:
        """What all take in before their next turn."""
        data = None
        if news:
            data = torch.frombuffer(bytearray(pickle.dumps(news)), dtype=torch.uint8)
        for rank in self._others:
            self._line.send(rank, 0 if data is None else len(data), data)

    def end(self) -> None:
        """There are no more turns. Returns when all have said that they heard it."""
        for rank in self._others:
            self._line.send(rank, END)
        for thread in self._threads:
            thread.join()
        self._over = True

    def dismiss(self) -> None:
        """Those that still run end at once, for this rank has failed."""
        for rank in () if self._over else self._others:  # who has ended does not listen
            with contextlib.suppress(RuntimeError):
                self._line.send(rank, DISMISSAL)


class Follower:
    """See the file's docstring. Signals are the first rank's, who drains."""

    def __init__(self, dist: Dist):
        for number in (signal.SIGTERM, signal.SIGINT):  # torchrun and terminals send them to all
            signal.signal(number, signal.SIG_IGN)
        self._line, self._dist = Line(dist), dist
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def follow(self, work: Work) -> None:
        """Turns, until the first rank ends. What they tell is told there."""
        while (news := self._hear()) is not None:
            work.take(news)
            work.score()
            work.step()
        self._thread.join()

    def _hear(self) -> News | None:
        with self._dist.waiting():
            return self._news.get()

    def _read(self) -> None:
        """All that the first rank tells; the end of this process where that rank fails."""
        try:
            while (size := int(self._line.receive(0, 1, torch.int64))) >= 0:
                data = self._line.receive(0, size, torch.uint8) if size else None
                self._news.put([] if data is None else pickle.loads(data.numpy().tobytes()))
            if size == END:
                self._news.put(None)
                self._line.send(0, END)
                return
            time.sleep(GRACE)
        except RuntimeError:
            time.sleep(GRACE)
            if self._dist.rank == 1:  # one speaks for all
                line = "error: rank 0 has ended, and the server with it"
                print(line, file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait for what never comes

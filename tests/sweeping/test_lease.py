"""sweeping/lease.py: one owner at a time, whatever clocks say, and however an owner dies."""

import json
import multiprocessing
import os
import signal
import threading
import time

from builders import wait_for

from sweeping import lease

NEVER_SILENT = 1e6  # seconds


def test_a_lease_has_one_owner_and_dies_with_silence(tmp_path):
    """Clocks of the observer's own; the machine's clock and the files' times say nothing."""
    now = [1000.0]
    ours = lease.Leases(tmp_path, seconds=0.6)
    theirs = lease.Leases(tmp_path, seconds=0.6, clock=lambda: now[0])
    held = ours.take("a")
    assert theirs.take("a") is None and theirs.take("b") is not None
    for stamp in (0, 4e9):  # 1970, 2096
        os.utime(held.path, (stamp, stamp))
        now[0] += 100
        before = held.path.read_bytes()
        wait_for(lambda before=before: held.path.read_bytes() != before)  # a beat
        assert theirs.take("a") is None
    held.released.set()  # its owner hangs
    held.thread.join()
    held.path.write_text(json.dumps({"owner": ["another machine", "ns", 1, "1"]}))
    assert theirs.take("a") is None
    now[0] += 0.5
    assert theirs.take("a") is None
    now[0] += 0.2
    taken = theirs.take("a")
    assert taken and taken.path != held.path and ours.take("a") is None
    taken.release()
    ours.take("a").release()
    assert [p.name for p in tmp_path.iterdir()] == ["b.0"]
    dead = {"owner": [*lease._this_process()[:2], 2**22 + 1, "1"]}
    (tmp_path / "c.3").write_text(json.dumps(dead))
    ours.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["b.0"]


def test_of_many_that_find_a_dead_lease_one_gets_it(tmp_path):
    for trial in range(20):
        (tmp_path / f"{trial}.7").write_text("")
        crowd = [lease.Leases(tmp_path, seconds=-1) for _ in range(8)]
        won, barrier = [], threading.Barrier(8)

        def take(leases, trial=trial, won=won, barrier=barrier):
            barrier.wait()
            held = leases._held(str(trial))
            if held and max(held) == 7 and (mine := leases.take(str(trial))):
                won.append(mine)
                time.sleep(0.05)

        threads = [threading.Thread(target=take, args=(leases,)) for leases in crowd]
        [t.start() for t in threads]
        [t.join() for t in threads]
        # seconds=-1 makes the living look dead as well; then the later one holds a higher number
        numbers = [int(mine.path.suffix[1:]) for mine in won]
        assert won and len(set(numbers)) == len(numbers)
        [mine.release() for mine in won]


def hold(folder):
    lease.Leases(folder, NEVER_SILENT).take("a")
    while True:
        signal.pause()


def test_a_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(tmp_path,), daemon=True)
    process.start()
    held = tmp_path / "a.0"
    wait_for(lambda: held.exists() and held.read_bytes())  # its first beat
    mine = lease.Leases(tmp_path, NEVER_SILENT)
    assert mine.take("a") is None
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: mine.take("a"))  # a zombie until it is joined
    process.join()

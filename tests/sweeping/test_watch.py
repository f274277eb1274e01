"""sweep.py --watch: what comes, when it is whole, and when it ends."""

import os
import threading
import time

import torch
from builders import PATIENCE, saved_checkpoint, tiny_model, wait_for
from small_sweeps import expected, flags, run_sweep

import results
import sweep
from sweeping.seen import Shelf


def watch_in_thread(run_dir, data, *more):
    done = {}
    argv = flags(run_dir, data, "results", "--watch", "--poll-seconds", "0.3", *more)

    def target():
        try:
            sweep.main(argv)
            done["code"] = 0
        except BaseException as error:
            done["code"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, done


def finished(run_dir):
    try:
        records = results.load_records(run_dir.parent / "results")
    except ValueError:
        return set()
    return {(r["checkpoint"]["name"], r["evaluation"]) for r in records if r["status"] == "ok"}


def test_watch_takes_what_comes_once_it_is_whole_and_stops_on_a_file(tmp_path, data, monkeypatch):
    run_dir, looks, pieces = tmp_path / "run", [], []
    look = Shelf.look

    def watched(shelf):
        looks.append(shelf)
        if pieces:
            with open(run_dir / "checkpoint-20.pt", "ab") as f:
                f.write(pieces.pop(0))
        return look(shelf)

    monkeypatch.setattr(Shelf, "look", watched)
    byte = ["--tokenizer-name", "byte"]
    thread, done = watch_in_thread(run_dir, data, *byte)  # before the trainer made the directory
    saved_checkpoint(run_dir, 10)
    wait_for(lambda: finished(run_dir) == expected([10]))
    # a clock that jumps: files from the future and the past, and time.time() days off
    monkeypatch.setattr(time, "time", lambda: 4e9)
    for stamp in (4e9, 1):
        for file in (run_dir / "checkpoint-10").iterdir():
            os.utime(file, (stamp, stamp))
        so_far = len(looks)
        wait_for(lambda so_far=so_far: len(looks) > so_far + 1)
    # a file that grows under its final name, between any two looks: torch.save's
    model = tiny_model(seed=20)
    state = {"model_state_dict": model.state_dict(), "config": model.config.to_dict()}
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    size = len(whole) // 8 + 1
    pieces += [whole[start : start + size] for start in range(0, len(whole), size)]
    wait_for(lambda: finished(run_dir) == expected([10, 20]))
    assert not pieces
    (tmp_path / "torn.pt").write_bytes(whole[:-1000])  # and never more: tried once, and recorded
    (tmp_path / "torn.pt").rename(run_dir / "checkpoint-30.pt")
    wait_for(lambda: len(results.load_records(tmp_path / "results")) == 6)
    (run_dir / "STOP").touch()
    thread.join(PATIENCE)
    assert not thread.is_alive() and done["code"].code == 1
    failed = [r for r in results.load_records(tmp_path / "results") if r["status"] == "failed"]
    assert {r["checkpoint"]["name"] for r in failed} == {"checkpoint-30"}


def test_watch_ends_at_a_step_or_after_quiet(run_dir, data):
    start = time.monotonic()
    assert run_sweep(run_dir, data, "--watch", "--until-step", "20")[0] == 0
    assert finished(run_dir) == expected([10, 20])
    assert run_sweep(run_dir, data, "--watch", "--quiet-seconds", "1")[0] == 0
    assert finished(run_dir) == expected() and time.monotonic() - start > 1

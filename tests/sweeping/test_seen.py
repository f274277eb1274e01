"""sweeping/seen.py: which checkpoints have come, changed, gone and are whole, on real files."""

import os
import shutil

import pytest
import torch
from builders import saved_checkpoint, set_clock, tiny_model
from trained_files import copied

from sweeping import seen
from sweeping.seen import Shelf, signature


@pytest.fixture
def clock(monkeypatch):
    """The shelf's time.monotonic, to be set forward."""
    now = [1000.0]
    set_clock(monkeypatch, seen, monotonic=lambda: now[0])
    return now


def save_pt(path):
    model = tiny_model()
    torch.save({"model_state_dict": model.state_dict(), "config": model.config.to_dict()}, path)
    return path


def names(waiting):
    return [seen.path.name for seen in waiting]


def test_a_signature_tells_files_apart(tmp_path):
    path = save_pt(tmp_path / "a.pt")
    before = signature(path)
    assert before == signature(path) and signature(tmp_path / "gone.pt") is None
    stat = path.stat()
    other = tmp_path / "b.pt"
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)  # the same name, size and time
    assert signature(path) != before
    folder = saved_checkpoint(tmp_path, 1)
    before = signature(folder)
    (folder / "more.json").write_text("{}")
    assert signature(folder) != before
    (tmp_path / "empty").mkdir()
    assert signature(tmp_path / "empty") is None


@pytest.mark.parametrize("beside", ["config.json", "tokenizer.json", "merges.txt"])
def test_what_lies_beside_a_file_and_is_read_with_it_counts(beside, tmp_path):
    """A config that was corrected, a tokenizer that came later: what failed is tried again."""
    file, folder = tmp_path / "model.pt", tmp_path / "checkpoint-1"
    file.write_bytes(b"weights")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = signature(file), signature(folder)
    (tmp_path / beside).write_text("{}")
    after = signature(file), signature(folder)
    assert after[0] != before[0]
    assert (after[1] != before[1]) == (beside != "config.json")  # a directory holds its own
    (tmp_path / beside).write_text('{"another": 1}')
    assert signature(file) != after[0]


def test_in_the_order_of_their_steps(tmp_path):
    for step in (9, 100, 20):
        saved_checkpoint(tmp_path, step)
    save_pt(tmp_path / "final.pt")
    (tmp_path / "checkpoint-best").symlink_to("checkpoint-20")
    shelf = Shelf([tmp_path], watch=False, poll_seconds=1)
    shelf.look()
    steps = ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    waiting = names(shelf.waiting(None, newest_first=False))
    assert [name for name in waiting if name in steps] == steps
    assert waiting.index("checkpoint-best") > waiting.index("checkpoint-20")  # a link comes after
    assert waiting[-1] == "final.pt" and shelf.last_step == 100  # without a step: last
    newest = names(shelf.waiting(None, newest_first=True))
    assert [name for name in newest if name in steps] == steps[::-1] and newest[-1] == "final.pt"
    some = names(shelf.waiting(20, newest_first=False))
    assert "checkpoint-100" not in some and "checkpoint-20" in some and "final.pt" in some
    settled = shelf.seen[tmp_path / "checkpoint-9"]
    settled.settled = True
    assert "checkpoint-9" not in names(shelf.waiting(None, newest_first=False))


def test_what_changed_is_another_checkpoint_and_what_went_is_told_once(tmp_path, clock):
    one, two = saved_checkpoint(tmp_path, 1), saved_checkpoint(tmp_path, 2)
    shelf = Shelf([tmp_path], watch=True, poll_seconds=10)
    assert shelf.look() == [] and shelf.news == 1000 and not shelf.is_due()
    first = shelf.seen[one]
    first.settled = first.about = True
    clock[0] += 10
    assert shelf.is_due() and shelf.look() == []
    assert shelf.seen[one] is first and shelf.news == 1000  # nothing new
    saved_checkpoint(tmp_path, 1, seed=5)
    clock[0] += 10
    shelf.look()
    assert shelf.seen[one] is not first and not shelf.seen[one].settled
    assert shelf.seen[one].about == {} and shelf.news == 1020
    shelf.seen[one].settled = True
    shutil.rmtree(one)  # its work was done: no loss
    shutil.rmtree(two)
    assert [gone.path for gone in shelf.look()] == [two]
    assert shelf.look() == [] and not shelf.seen


def test_paths_that_are_not_there_yet(tmp_path):
    shelf = Shelf([tmp_path / "later"], watch=True, poll_seconds=1)
    assert shelf.look() == [] and not shelf.seen and shelf.last_step == 0
    saved_checkpoint(tmp_path / "later", 3)
    shelf.look()
    assert shelf.last_step == 3


@pytest.mark.parametrize("watch", [False, True])
def test_what_is_whole_is_ready(tmp_path, clock, watch):
    """With a manifest at once; other programs' files once they have rested, where more may come;
    and a torn one too, to be tried and recorded."""
    ours, theirs = saved_checkpoint(tmp_path, 1), save_pt(tmp_path / "b.pt")
    torn = saved_checkpoint(tmp_path, 2)
    (torn / "model.safetensors").write_bytes(b"torn")
    shelf = Shelf([tmp_path], watch, poll_seconds=10)

    def ready():
        shelf.look()
        return {path.name for path, seen in shelf.seen.items() if shelf.is_ready(seen)}

    at_once = {ours.name} if watch else {ours.name, "b.pt"}
    assert ready() == at_once
    clock[0] += 9
    assert ready() == at_once
    with theirs.open("ab") as f:  # it grows
        f.write(b"more")
    clock[0] += 1
    assert ready() == at_once | {torn.name}
    clock[0] += 9
    assert ready() == at_once | {torn.name}
    clock[0] += 1
    assert ready() == {ours.name, torn.name, "b.pt"}


def test_a_watcher_waits_for_the_sign_of_a_save(tmp_path, clock):
    """However long a file rests: what DCP, DeepSpeed, litgpt and llm.c write last must be there.
    Then it is taken at once."""
    dcp = copied("torchtitan-qwen3-0/step-10", tmp_path / "a")
    zero = copied("deepspeed-3-fp32", tmp_path / "b")
    llmc = copied("llmc/float32/model_00000030.bin", tmp_path / "c")
    litgpt = copied("litgpt-llama/step-00000040", tmp_path / "d")
    away = {dcp / ".metadata": dcp, litgpt / "model_config.yaml": litgpt}
    contents = {file: file.read_bytes() for file in away}
    for file in away:
        file.unlink()
    (zero / "latest").write_text("global_step0")
    shelf = Shelf([p.parent for p in (dcp, zero, llmc, litgpt)], watch=True, poll_seconds=10)
    shelf.look()
    assert shelf.seen.keys() == {dcp, zero, llmc, litgpt}
    clock[0] += 1000
    shelf.look()
    assert not any(map(shelf.is_ready, shelf.seen.values()))
    for file, content in contents.items():
        file.write_bytes(content)
    (zero / "latest").write_text("global_step1")
    (llmc.parent / "DONE_00000030").touch()
    shelf.look()
    assert all(map(shelf.is_ready, shelf.seen.values()))
    part = next((zero / "global_step1").glob("*_rank_1_*optim*"))
    before = signature(zero)
    part.write_bytes(part.read_bytes()[:-1])
    assert signature(zero) != before, "files in folders are looked at"
    shelf.look()
    assert not shelf.is_ready(shelf.seen[zero])
    no_watch = Shelf([dcp.parent], watch=False, poll_seconds=10)
    (dcp / ".metadata").unlink()
    no_watch.look()
    clock[0] += 1000
    no_watch.look()
    assert no_watch.is_ready(no_watch.seen[dcp]), "tried, so that it fails with its reason"

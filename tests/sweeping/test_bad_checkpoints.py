"""One bad checkpoint of a directory ends as its own failure, whatever is wrong with it: a listing,
a sweep and a watch go on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import run_ranks, run_to_end, saved_checkpoint, torchrun
from small_sweeps import expected, flags, numbers, run_sweep, start_words

import checkpoint
import results
import sweep
from formats import native
from sweeping.seen import signature

TEXTS = ["[" * 200_000, '"x"', "", '{"x":' + "9" * 5000 + "}", "\udcff\udcfe{"]  # surrogates: bytes
FILES = ["config.json", "manifest.json", "tokenizer.json", "model.safetensors", "trainer_state.pt"]


def malformed(folder):
    """folder with a checkpoint for each way of being wrong; returns their names."""
    good, n = saved_checkpoint(folder / ".made", 1), 0

    def spoil(change, keep_manifest=False):
        nonlocal n
        n += 1
        path = shutil.copytree(good, folder / f"bad-{n}")
        if not keep_manifest:
            (path / "manifest.json").unlink()
        change(path)

    def write(name, content):
        def change(path):
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes(content)

        return change

    def replace(name, make):
        def change(path):
            (path / name).unlink(missing_ok=True)
            make(path / name)

        return change

    def state(name, **fields):
        def change(path):
            values = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps(values | fields))

        return change

    for name in FILES:
        for text in TEXTS:
            spoil(write(name, text.encode(errors="surrogateescape")), name == "manifest.json")
        for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)):
            spoil(replace(name, make))
        spoil(replace(name, lambda path: path.symlink_to("/dev/zero")))
    for value in ("x", [1], {}, 10**30):
        spoil(state("manifest.json", step=value), True)
        spoil(state("manifest.json", files=value), True)
        spoil(state("manifest.json", files={"model.safetensors": value}), True)
        for field in ("n_head", "n_layer", "vocab_size", "model_type", "roseval"):
            spoil(state("config.json", **{field: value}))
    for i, value in enumerate(([1], {"model": torch.zeros(1)}, {3: torch.zeros(1)}, "x")):
        torch.save(value, folder / f"odd{i}.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "step": "x", "config": [1]}, folder / "odd.pt")
    (folder / "self").symlink_to("self")
    shutil.rmtree(folder / ".made")
    return [path.name for path in folder.iterdir()]


@pytest.fixture(scope="module")
def bad_ones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed") / "run"
    malformed(folder)
    saved_checkpoint(folder, 10)
    return folder


def test_a_listing_goes_on(bad_ones):
    lines = torchrun(0, "checkpoint.py", "list", bad_ones).stdout.splitlines()
    assert any("checkpoint-10" in line and " roseval " in line for line in lines)
    unreadable = [line for line in lines if " unreadable " in line]
    assert len(unreadable) > 4 and all(line.endswith(")") for line in unreadable)
    assert any("odd0.pt  (" in line and "holds a list" in line for line in unreadable)


def test_a_watch_goes_on(bad_ones, data):
    """And none of them is waited for for ever."""
    flags = yaml.safe_load((data / "e.yaml").read_text())
    del flags["mmlu"]
    (bad_ones.parent / "e.yaml").write_text(yaml.safe_dump(flags))
    more = ["--watch", "--quiet-seconds", "0.1", "--evaluations", bad_ones.parent / "e.yaml"]
    out = run_to_end(start_words(bad_ones, data, *more), 1)
    assert "Traceback" not in out.stderr and out.stderr.count("\n") < 5, out.stderr[-2000:]
    records = results.load_records(bad_ones.parent / "results")
    assert "ok" in {r["status"] for r in records if r["checkpoint"]["name"] == "checkpoint-10"}
    failed = [r for r in records if r["status"] == "failed"]
    assert len(failed) > 30 and all(r["reason"] and "\n" not in r["reason"] for r in failed)


# ---------------------------------------------------------------------------------------------
# What nobody foresaw

SURPRISES = [
    TypeError("'int' object\x1b[2J is not iterable"),
    KeyError("bytes"),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    MemoryError(),
    PermissionError(13, "Permission denied", "config.json"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
]


PLACES = [("open", error) for error in SURPRISES]
PLACES += [(where, SURPRISES[0]) for where in ("recognises", "glance", "check_manifest")]


@pytest.mark.parametrize(
    "where, error", PLACES, ids=lambda v: v if isinstance(v, str) else repr(v)[:9]
)
def test_an_error_of_any_kind_is_that_checkpoints(run_dir, data, monkeypatch, capsys, where, error):
    real = getattr(native, where)

    def surprising(path, *more):
        if Path(path).name == "checkpoint-20":
            raise error
        return real(path, *more)

    monkeypatch.setattr(native, where, surprising)
    found = checkpoint.list_checkpoints(run_dir)
    assert {info.name for info in found} == {f"checkpoint-{step}" for step in (10, 20, 30)}
    checkpoint.main(["list", str(run_dir)])
    watch = ["--watch", "--until-step", "30"] if where == "glance" else []
    code, records = run_sweep(run_dir, data, *watch)
    said = capsys.readouterr().out
    good = {k for k, v in numbers(records).items() if v[0] == "ok"}
    failed = [r for r in records if r["status"] == "failed"]
    if where == "glance":  # what a listing shows is not needed to evaluate
        assert code == 0 and good == expected() and " unreadable " in said
        return
    assert code == 1 and good == expected([10, 30]) and len(failed) == 2
    if not isinstance(error, (ValueError, OSError)):
        assert all(type(error).__name__ in r["reason"] for r in failed)
    assert "\x1b" not in said and "checkpoint-20         perplexity: failed: " in said


def test_debug_shows_where_it_came_from(run_dir, data, monkeypatch, capsys):
    monkeypatch.setattr(native, "open", lambda *_: [][0])
    monkeypatch.setattr("sys.argv", ["sweep.py", "--debug"])
    assert run_sweep(run_dir, data, "--debug", "--until-step", "10")[0] == 1
    assert "IndexError: list index out of range" in capsys.readouterr().err


def test_ctrl_c_still_ends_a_sweep(run_dir, data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(run_dir, data)


def test_a_directory_that_may_not_be_read_is_a_failure(tmp_path, monkeypatch):
    path = saved_checkpoint(tmp_path, 1)
    real = Path.iterdir

    def iterdir(self):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert signature(path) == (("Permission denied", 0, 0, 0),)  # there, and as it was
    assert signature(tmp_path / "nowhere") is None


def test_odd_names_are_names(tmp_path, data, capsys):
    """Printed so that they steer nothing; recorded in folders of their own, none too long."""
    odd = [
        "esc\x1b]0;t\x07",
        "line\nerror: x",
        "rtl\u202e",
        "m²",
        "x" * 240,
        "é" * 110,
        "udc\udcff",
    ]
    for i, name in enumerate(odd):
        saved_checkpoint(tmp_path / "made", i).rename(tmp_path / name)
    (tmp_path / "made").rmdir()
    checkpoint.main(["list", str(tmp_path)])
    code, records = run_sweep(tmp_path, data, name=f"{tmp_path.name}-results")
    said = capsys.readouterr().out
    assert code in (0, 1) and len({r["checkpoint"]["name"] for r in records}) == len(odd)
    assert all(c.isprintable() or c == "\n" for c in said) and said.encode()
    assert not any(line.startswith("error") for line in said.splitlines())


def test_a_run_of_dots_alone_has_a_folder_all_the_same(tmp_path, data):
    path = saved_checkpoint(tmp_path / "made", 1)
    run = tmp_path / "..."
    run.mkdir()
    path.rename(run / path.name)
    code, records = run_sweep(run, data)
    assert code == 0 and records
    assert {record["run"] for record in records} == {"..."}


def test_paths_that_hold_nothing_are_said_before_anything_is_done(run_dir, data):
    words = flags(run_dir, data)
    words.insert(words.index(str(run_dir)) + 1, str(run_dir.parent / "nowhere"))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        sweep.main(words)
    assert not list((run_dir.parent / "results").glob("*/*"))


def test_checkpoints_of_one_name_are_told_apart_in_what_is_printed(tmp_path, data, capsys):
    for i, name in enumerate(("expA", "expB")):
        (tmp_path / name).mkdir()
        saved_checkpoint(tmp_path / name / "run", 1, seed=i)
    words = flags(tmp_path / "expA/run", data)
    words.insert(words.index("--evaluations"), str(tmp_path / "expB/run"))
    sweep.main(words)
    said = capsys.readouterr().out
    for name in ("expA", "expB"):
        assert f"{tmp_path}/{name}/run/checkpoint-1  perplexity: loss " in said


# ---------------------------------------------------------------------------------------------
# On several ranks


def test_ranks_agree_where_one_of_them_alone_fails(tmp_path, data):
    """To open, to load, to plan: nobody waits for it in a collective."""
    run = tmp_path / "run"
    for step in range(1, 5):
        saved_checkpoint(run, step)
    words = flags(run, data)
    body = f"""
        import checkpoint, sweep
        from evaluation import Plans
        real_open, real_load, real_of = checkpoint.open, checkpoint.Checkpoint.load, Plans.of
        alone = dist.rank == 1
        def opened(path, *more):
            if alone and path.name == "checkpoint-1": raise RecursionError("too deep")
            return real_open(path, *more)
        def load(self, *where, **how):
            if alone and self.name == "checkpoint-2": raise KeyError("bytes")
            model = real_load(self, *where, **how)
            model.checkpoint = self.name
            return model
        checkpoint.open, checkpoint.Checkpoint.load = opened, load
        from contextlib import nullcontext
        distributed.setup = lambda *_: nullcontext(dist)
        try:
            sweep.main({words!r})
        except SystemExit as stop:
            say("code", stop.code)
    """
    out = run_ranks(2, tmp_path, body, cold=True)  # it looks at its parent from the start
    assert out.stdout.count("code 1") == 2, out.stderr
    records = results.load_records(tmp_path / "results")
    reasons = {r["checkpoint"]["name"]: r["reason"] for r in records if r["reason"]}
    assert reasons == {
        "checkpoint-1": "RecursionError: too deep",
        "checkpoint-2": "KeyError: 'bytes'",
    }
    good = {k for k, v in numbers(records).items() if v[0] == "ok"}
    assert good == expected([3, 4])

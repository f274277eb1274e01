"""recording/runs.py: where records lie, and which experiment is which under one name."""

import os
import random

import pytest
from made_up_records import make_record

from recording.runs import called, told_apart, walk

RECORD = make_record()


def record(path, step=1, fingerprint="a", run=None, time="2026-01-01", status="ok", name=None):
    """Of a checkpoint at `path`; its run is called like the directory, unless somebody says."""
    info = {"path": path, "name": name or path.rpartition("/")[2].partition(".")[0], "step": step}
    run = run or (os.path.dirname(path).rpartition("/")[2])
    made = RECORD | {"run": run, "checkpoint": info | {"fingerprint": fingerprint * 64}}
    return made | {"status": status, "environment": {"time": time}}


def names(*records):
    return [(r["run"], r["checkpoint"]["name"], r["checkpoint"]["step"]) for r in records]


@pytest.mark.parametrize(
    "paths, labels",
    [
        (["run/c-1", "run/c-2"], ["run", "run"]),
        (["expA/run/c", "expB/run/c"], ["expA/run", "expB/run"]),
        (["/x/a/run/c", "/x/b/run/c", "/y/b/run/c"], ["a/run", "x/b/run", "y/b/run"]),
        # the same directory, named from elsewhere
        (["run/c-1", "/home/me/run/c-2", "../me/run/c-3", "./run/c-4"], ["run"] * 4),
        (["run/c", "/a/run/c", "/b/run/c"], ["run", "a/run", "b/run"]),  # of which is not said
    ],
)
def test_runs_of_one_name_are_told_apart_by_directory(paths, labels):
    found = told_apart([record(path, step=i) for i, path in enumerate(paths)])
    assert [r["run"] for r in found] == labels


def test_a_run_that_somebody_named_may_lie_in_several_directories():
    """Unless that would show two checkpoints as one."""
    phases = [record("one/c", step=1, run="all"), record("two/c", step=2, run="all")]
    assert [r["run"] for r in told_apart(phases)] == ["all", "all"]
    clash = [*phases, record("three/c", step=2, fingerprint="b", run="all")]
    assert [r["run"] for r in told_apart(clash)] == ["all (one)", "all (two)", "all (three)"]


def test_a_file_that_is_written_again_and_again_is_a_curve():
    steps = [record("out/ckpt.pt", step, f) for step, f in ((250, "a"), (500, "b"), (750, "c"))]
    assert names(*told_apart(steps)) == [("out", "ckpt", step) for step in (250, 500, 750)]


def test_what_was_trained_anew_is_another_curve():
    before = [record("out/c", s, f, time="2026-01-01") for s, f in ((1, "a"), (2, "b"))]
    after = [record("out/c", s, f, time="2026-01-02") for s, f in ((1, "c"), (2, "d"), (3, "e"))]
    oldest = record("out/c", 1, "f", time="2025-01-01")
    failed = record("out/c", 1, "0", time="2026-01-03", status="failed")
    found = told_apart([*before, *after, oldest, failed])
    assert [r["run"] for r in found] == [
        *["out (earlier)"] * 2,
        *["out"] * 3,
        "out (earlier 2)",
        "out",
    ]


def test_without_a_step_the_content_gives_the_name():
    found = told_apart([record("out/ckpt.pt", None, f) for f in "ab"])
    assert names(*found) == [("out", "ckpt-aaaaaaaa", None), ("out", "ckpt-bbbbbbbb", None)]


def test_no_two_checkpoints_look_alike_and_the_order_of_records_plays_no_part():
    rng = random.Random(0)
    for _ in range(200):
        n, contents = rng.randrange(2, 8), {}
        for i in range(n):
            path = f"{rng.choice(['', 'a/', '/a/', 'b/a/', '../'])}{rng.choice(['run', 'x'])}/c"
            run = rng.choice([None, None, "run", "mine"])
            made = record(path, rng.choice([1, 2, None]), "abcdef01"[i], run, f"2026-01-0{i + 1}")
            contents[made["checkpoint"]["fingerprint"]] = made
        records = list(contents.values())
        found = told_apart(records)
        assert len(set(names(*found))) == n, names(*found)
        order = rng.sample(range(n), n)
        assert told_apart([records[i] for i in order]) == [found[i] for i in order]
        for before, after in zip(records, found, strict=True):
            assert after["checkpoint"]["path"] == before["checkpoint"]["path"]


def test_a_table_calls_them_by_name_or_by_path():
    found = [record("a/run/c\x1b"), record("b/run/d"), record("c/run/d")]
    assert called(found) == ["c\\x1b", "b/run/d", "c/run/d"]


# ---------------------------------------------------------------------------------------------
# Where they lie


def test_folders_behind_links_are_walked_once(tmp_path):
    root, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    for folder in (root / "a", root / "a-b", root / ".hidden", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.json").write_text("{}")
    (root / "0link").symlink_to(root / "a")  # the folder itself is there too
    (root / "one").symlink_to(elsewhere)
    (root / "two").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (root / "a/self").symlink_to(".")
    (root / "gone").symlink_to("nowhere")
    found = [os.path.join(d, name) for d, names in walk(root) for name in names]
    wanted = ["a/x.json", "a-b/x.json", "gone", "one/deep/x.json"]
    assert sorted(os.path.relpath(path, root) for path in found) == sorted(wanted)
    assert [d for d, _ in walk(root)] == [
        str(root / d) if d else str(root) for d in ("", "a", "a-b", "one", "one/deep")
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unread = []
    assert [d for d, _ in walk(tmp_path, unread)] == [str(tmp_path), str(tmp_path / "b")]
    assert unread == [(str(tmp_path / "a"), f"{tmp_path / 'a'}: Permission denied")]

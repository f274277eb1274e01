"""results.py against scipy, fractions, brute force, and processes that are really killed."""

import glob
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import builders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import durable
import results
from durable import Journal, read_journal

ROOT = Path(results.__file__).parent


# --- Files


def test_write_atomic_replaces_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    durable.write_atomic(path, "old")
    durable.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["x.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # readable by whom the umask lets


def test_json_is_strict_and_takes_numpy():
    obj = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), -math.inf],
        "i": np.int64(3),
        "b": np.bool_(True),
        "a": np.array([[1.5, np.nan]]),
        "p": Path("x/y"),
        1: (1, 2),
    }
    text = durable.dumps(obj)
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} in strict JSON")}
    back = json.loads(text, **refuse)
    assert back == {
        "nan": None,
        "inf": [None, None],
        "i": 3,
        "b": True,
        "a": [[1.5, None]],
        "p": "x/y",
        "1": [1, 2],
    }
    with pytest.raises(TypeError):
        durable.dumps({"x": object()})


def test_broken_unicode_survives(tmp_path):
    durable.write_json(tmp_path / "x.json", {"text": "é \ud800 \u2028 \n"})
    assert json.loads((tmp_path / "x.json").read_bytes())["text"] == "é \ud800 \u2028 \n"


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    """A file-size limit fails in the middle of a write, as a full disk does."""
    path = tmp_path / "x.bin"
    durable.write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"nothing was written: '.*x\.bin'") as caught:
            durable.write_atomic(path, b"n" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing was written"):
        durable.write_atomic(tmp_path / "file" / "x.json", "{}")  # the parent is a file
    directory = tempfile.mkdtemp()  # below /tmp itself: an unprivileged user can reach it
    os.chmod(directory, 0o555)
    euid = os.geteuid()
    try:
        if euid == 0:
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=r"Permission denied; nothing was written"):
            durable.write_atomic(Path(directory) / "x.json", "{}")
        assert os.listdir(directory) == []
    finally:
        os.seteuid(euid)
        shutil.rmtree(directory)


# --- Journal


def test_journal_round_trip_and_single_writer(tmp_path):
    path = tmp_path / "new" / "j"
    records = [{"i": i, "text": "line\nbreak é" * i} for i in range(50)]
    with Journal(path) as journal:
        assert journal.records == [] and journal.bad == 0
        for record in records:
            journal.append(record)
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(path)
        assert read_journal(path) == (records, 0)  # readable while it grows
    with Journal(path) as journal:
        assert journal.records == records
        journal.append("last")
    assert read_journal(path) == ([*records, "last"], 0)
    assert read_journal(tmp_path / "none") == ([], 0)


def test_journal_cut_at_every_byte(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal:
        for i in range(4):
            journal.append({"i": i})
    data = path.read_bytes()
    ends = [0] + [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        with Journal(path) as journal:
            assert [r["i"] for r in journal.records] == list(range(whole))
            assert journal.bad == (cut not in ends)
            journal.append({"i": "new"})
        kept, bad = read_journal(path)
        assert [r["i"] for r in kept] == [*range(whole), "new"] and bad == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_journal_damage_costs_only_the_damaged_lines(data):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "j"
        with Journal(path) as journal:
            for i in range(10):
                journal.append({"i": i})
        raw = bytearray(path.read_bytes())
        hit = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.integers(0, 255).filter(lambda b: b != raw[hit]))
        line = raw[:hit].count(b"\n")
        newline = raw[hit] == 10
        raw[hit] = new
        path.write_bytes(raw)
        kept, bad = read_journal(path)
        lost = {line, line + 1} if newline else {line}
        assert [r["i"] for r in kept] == [i for i in range(10) if i not in lost]
        assert bad == 2 - newline if new == 10 else bad == 1


def test_journal_on_a_full_disk_ends_with_a_whole_record(tmp_path):
    path = tmp_path / "j"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        journal.append({"i": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="nothing was written"):
                journal.append({"i": 1, "x": "x" * 2000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert read_journal(path) == ([{"i": 0}], 0)
        journal.append({"i": 2})
    assert read_journal(path) == ([{"i": 0}, {"i": 2}], 0)


WRITER = """
import sys
from durable import Journal
with Journal(sys.argv[1]) as journal:
    i = len(journal.records)
    while True:
        journal.append({"i": i, "x": "x" * (i % 3000)})
        print(i, flush=True)
        i += 1
"""


def kill_writers(path, rounds, seed):
    """Kill -9 an appending process again and again; what it reported as appended must be there."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(int(rng.integers(1, 60))):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        reported = int(rest[-1]) if rest else reported
        numbers = [r["i"] for r in read_journal(path)[0]]
        assert numbers == list(range(len(numbers))) and len(numbers) > reported


def test_journal_survives_kill_9(tmp_path):
    kill_writers(tmp_path / "j", rounds=4, seed=0)


@pytest.mark.slow
def test_journal_survives_kill_9_many_times(tmp_path):
    kill_writers(tmp_path / "j", rounds=60, seed=1)


# --- Records


def make_record(**changes):
    fields = {
        "evaluation": "mmlu",
        "metrics": {"accuracy": {"value": 0.5, "stderr": 0.1, "n": 26}, "ece": 0.25},
        "protocol": {"shots": 5, "dtype": "float32"},
        "run": "base",
        "checkpoint": {"name": "checkpoint-10", "step": 10, "fingerprint": "ab" * 32},
        "data": {"hash": "d" * 64},
        "cost": {"seconds": 2.0},
        "breakdown": {"category": {"stem": {"accuracy": {"value": 0.4, "stderr": None, "n": 9}}}},
        "code": "c" * 64,
    }
    fields.update(changes)
    return results.new_record(fields.pop("evaluation"), fields.pop("metrics"), **fields)


def test_record_round_trip(tmp_path):
    record = make_record()
    arrays = {"correct": np.array([True, False]), "logprobs": np.random.rand(2, 4)}
    path = results.save_record(tmp_path, record, arrays, [{"q": "é"}, {"q": 2}])
    hashed = results.config_hash(record["protocol"])
    directory = tmp_path / "base" / "checkpoint-10-abababab"
    assert path == directory / f"mmlu-{hashed[:8]}.json"
    assert sorted(p.suffix for p in directory.iterdir()) == [".json", ".jsonl", ".npz"]
    loaded = results.load_record(path)
    assert {k: v for k, v in loaded.items() if k not in ("_path", "files")} == {
        k: v for k, v in json.loads(durable.dumps(record)).items() if k != "files"
    }
    back = results.load_arrays(loaded)
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[k], arrays[k]) for k in arrays)
    assert results.load_samples(loaded) == [{"q": "é"}, {"q": 2}]
    assert results.load_records(tmp_path) == [loaded]


def test_resave_of_a_loaded_record_is_the_same_file(tmp_path):
    path = results.save_record(tmp_path, make_record())
    first = path.read_bytes()
    assert results.save_record(tmp_path, results.load_record(path)) == path
    assert path.read_bytes() == first


def test_documented_pandas_line_reads_records(tmp_path):
    pandas = pytest.importorskip("pandas")
    results.save_record(tmp_path / "results", make_record())
    results.save_record(
        tmp_path / "results", make_record(evaluation="perplexity", metrics={"a": 1})
    )
    files = glob.glob(str(tmp_path / "results/*/*/*.json"))
    table = pandas.json_normalize([json.load(open(p)) for p in files])  # noqa: SIM115
    row = table[table["evaluation"] == "mmlu"].iloc[0]
    assert row["metrics.accuracy.value"] == 0.5 and row["checkpoint.step"] == 10


def test_arrays_of_another_write_are_refused(tmp_path):
    path = results.save_record(tmp_path, make_record(), {"x": np.arange(3)})
    record = results.load_record(path)
    path.with_suffix(".npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the arrays that"):
        results.load_arrays(record)
    path.with_suffix(".npz").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        results.load_arrays(record)


def test_unreadable_files_are_skipped_with_their_reasons(tmp_path):
    good = results.save_record(tmp_path, make_record())
    folder = good.parent
    (folder / "torn.json").write_text(good.read_text()[:100])
    (folder / "foreign.json").write_text('{"a": 1}')
    (folder / "list.json").write_text("[1]")
    (folder / "empty.json").write_text("")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    newer = json.loads(good.read_text()) | {"schema_version": 99}
    (folder / "newer.json").write_text(json.dumps(newer))
    wrong = json.loads(good.read_text()) | {"metrics": []}
    (folder / "wrong.json").write_text(json.dumps(wrong))
    for name, field in (("key", {"resume_key": []}), ("data", {"data": {"hash": {}}})):
        (folder / f"{name}.json").write_text(json.dumps(json.loads(good.read_text()) | field))
    (folder / ".tmp-1-2").write_text("{")
    (folder / "deep.json").write_text("[" * 200_000)
    skipped = []
    assert [r["_path"] for r in results.load_records(tmp_path, skipped)] == [str(good)]
    reasons = {Path(path).name: reason for path, reason in skipped}
    assert reasons.keys() == {
        "torn.json",
        "foreign.json",
        "list.json",
        "empty.json",
        "binary.json",
        "newer.json",
        "wrong.json",
        "deep.json",
        "key.json",
        "data.json",
    }
    assert "99" in reasons["newer.json"] and "update" in reasons["newer.json"]
    assert "metrics" in reasons["wrong.json"]
    assert "'data.hash' must be text" in reasons["data.json"]
    with pytest.raises(ValueError, match="no such directory"):
        results.load_records(tmp_path / "nowhere")


@pytest.mark.parametrize("run", ["../../etc", "a/b", ".hidden", "name with spaces", "run-é.1"])
def test_record_path_stays_inside(run):
    path = results.record_path("R", run, "checkpoint-1", "f" * 64, "mmlu", "c" * 64)
    assert len(path.parts) == 4 and ".." not in path.parts and not path.parts[1].startswith(".")
    assert path.name == "mmlu-cccccccc.json" and path.parts[2] == "checkpoint-1-ffffffff"


def test_nameless_runs_are_refused():
    with pytest.raises(ValueError, match="needs a name"):
        results.record_path("R", "...", "c", "f" * 64, "mmlu", "c" * 64)


def test_keys_depend_on_what_they_should():
    a = results.config_hash({"x": 1, "y": [1.5, np.int64(2)]})
    assert a == results.config_hash({"y": (1.5, 2), "x": 1})
    assert a != results.config_hash({"x": 1, "y": [1.5, 3]})
    parts = ["fingerprint", "mmlu", {"shots": 5}, "data", "code"]
    key = results.resume_key(*parts)
    assert key == results.resume_key(*parts[:2], results.config_hash({"shots": 5}), *parts[3:])
    for i in range(5):
        changed = [*parts[:i], {"shots": 4} if i == 2 else "other", *parts[i + 1 :]]
        assert results.resume_key(*changed) != key
    record = make_record()
    assert record["resume_key"] == results.resume_key(
        "ab" * 32, "mmlu", record["protocol"], "d" * 64, "c" * 64
    )


def test_code_version_follows_every_form_of_import(tmp_path):
    counts = {
        "job.py": "import os\nimport room\n"
        "def f():\n    from lazy import x\n    import rooms.deep.well\n",
        "room.py": "import cellar, numpy\nfrom rooms import north\n",
        "cellar.py": "import room  # a cycle",
        "lazy.py": "x = 1",
        "rooms/__init__.py": "",
        "rooms/north.py": "from rooms.south import thing\nfrom . import east\n",
        "rooms/south.py": "thing = 1",
        "rooms/east.py": "from .west import thing",
        "rooms/west.py": "thing = 2",
        "rooms/deep/__init__.py": "",
        "rooms/deep/well.py": "import checkpoint",
        "checkpoint.py": "from formats import a, b\n",
        "formats/a.py": "from formats import shared",
        "formats/shared.py": "",
    }
    others = {
        "unrelated.py": "y = 1",
        "rooms/unused.py": "z = 1",
        "formats/b.py": "a = 2",
        "README.md": "hello",
        "cli.py": "flags = 1",
    }
    for name, text in (counts | others).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "room.py").write_text(counts["room.py"] + "import cli\n")

    def version():
        return results.code_version(tmp_path / "job.py", ("formats/a.py",))

    base = version()
    for name in counts | others:
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "\nnew = 1\n")
        assert (version() != base) == (name in counts), name
        (tmp_path / name).write_text(before)
    assert results.code_version(tmp_path / "job.py") != base  # another format opened it


def test_what_prints_does_not_count(tmp_path):
    job = tmp_path / "job.py"
    text = "def score():\n    return 1\n\n\ndef show(records):\n    print({})\n\n\n"
    text += "def print_table(x):\n    print(x, {})\n\n\nif __name__ == '__main__':\n    show({})\n"
    job.write_text(text.format(1, 2, 3))
    base = results.code_version(job)
    job.write_text(text.format(4, 5, 6))
    assert results.code_version(job) == base
    job.write_text(text.format(1, 2, 3).replace("return 1", "return 2"))
    assert results.code_version(job) != base


LOADED = """
import sys
sys.path.insert(0, {root!r})
import {script}, cli
try:
    {script}.main({argv!r})
finally:
    files = [getattr(m, "__file__", None) or "" for m in list(sys.modules.values())]
    print("LOADED", *[f for f in files if f.startswith({root!r}) and "/." not in f], sep="\\n")
"""


@pytest.mark.parametrize("script", ["eval", "mmlu_eval", "humaneval_eval"])
def test_code_version_sees_every_module_that_a_script_loads(script, tmp_path):
    saved = builders.saved_checkpoint(tmp_path / "run")
    argv = ["--checkpoint-path", saved, "--device", "cpu", "--results-dir", tmp_path / "results"]
    argv += {
        "eval": [
            *("--data-mode", "fineweb_npy", "--seq-len", "16"),
            *("--val-npy", builders.token_shard(tmp_path / "x.npy")),
        ],
        "mmlu_eval": ["--data-path", builders.small_mmlu(tmp_path / "mmlu")],
        "humaneval_eval": [
            *("--max-new-tokens", "4"),
            *("--data-path", builders.small_humaneval(tmp_path / "p.jsonl")),
        ],
    }[script]
    program = LOADED.format(root=str(ROOT), script=script, argv=[str(word) for word in argv])
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200
    )
    assert out.returncode == 0, out.stderr
    loaded = {Path(line) for line in out.stdout.split("LOADED\n")[1].splitlines()}
    record = results.load_records(tmp_path / "results")[0]
    chosen = ("formats/tensorfiles.py", "formats/layouts.py")
    if script == "humaneval_eval":
        chosen += tuple(f"sandbox/{name}.py" for name in ("worker", "jail", "frames"))
    counted = set(results.code_files(ROOT / f"{script}.py", chosen))
    assert record["code_version"] == results.code_version(ROOT / f"{script}.py", chosen)
    left_out = {str(path.relative_to(ROOT)) for path in loaded - counted}
    doors = [name for name in left_out if name.split("/")[0] in ("formats", "backends")]
    assert left_out - {*doors} == {"cli.py"}, left_out
    assert not {*doors} & {*chosen}


def test_environment_names_no_host():
    environment = results.environment()
    text = json.dumps(environment)
    assert os.uname().nodename not in text and str(ROOT) not in text
    assert environment["packages"]["numpy"] == np.__version__
    assert environment["time"].endswith("Z") and environment["code"].split(":")[0] in (
        "git",
        "sources",
    )
    assert results.ROOT == ROOT


def test_importing_results_needs_no_torch():
    code = "import sys, results; results.environment(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_scalars_are_flat_and_stable():
    flat = results.scalars(json.loads(durable.dumps(make_record())))
    assert flat == {
        "mmlu/accuracy": 0.5,
        "mmlu/accuracy_stderr": 0.1,
        "mmlu/ece": 0.25,
        "mmlu/category/stem/accuracy": 0.4,
        "mmlu/cost/seconds": 2.0,
    }


def test_lm_eval_shape(tmp_path):
    shaped = results.to_lm_eval(json.loads(durable.dumps(make_record())))
    assert shaped["results"]["mmlu"]["acc,none"] == 0.5
    assert shaped["results"]["mmlu"]["acc_stderr,none"] == 0.1
    assert shaped["results"]["mmlu_stem"]["acc_stderr,none"] == "N/A"
    assert shaped["n-shot"] == {"mmlu": 5, "mmlu_stem": 5}
    assert shaped["n-samples"]["mmlu_stem"] == {"original": 9, "effective": 9}
    assert shaped["higher_is_better"]["mmlu"] == {"acc": True, "ece": False}
    make_table = pytest.importorskip("lm_eval.utils", exc_type=ImportError).make_table
    table = make_table(shaped)
    assert "mmlu_stem" in table and "0.5" in table

"""recording/sources.py: what changes a code version, held against what the scripts really load."""

import gc
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import builders
import pytest

import results
from recording import sources

ROOT = Path(sources.__file__).parent.parent


def test_code_version_follows_every_form_of_import(tmp_path):
    counts = {
        "job.py": "import os\nimport room\nif TYPE_CHECKING:\n    import unrelated\n"
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
        return sources.code_version(tmp_path / "job.py", ("formats/a.py",))

    base = version()
    for name in counts | others:
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "\nnew = 1\n")
        assert (version() != base) == (name in counts), name
        (tmp_path / name).write_text(before)
    assert sources.code_version(tmp_path / "job.py") != base  # another format opened it


def test_sources_that_are_kept_count_as_they_were(tmp_path, monkeypatch):
    job, room = tmp_path / "job.py", tmp_path / "room.py"
    job.write_text("import room\n")
    room.write_text("x = 1\n")
    monkeypatch.setattr(sources, "_KEPT", {})
    monkeypatch.setattr(sources, "source_files", lambda: [job, room])
    base = sources.code_version(job)
    sources.keep()
    room.write_text("x = 2\n")
    sources.keep()  # of another checkpoint: the code that runs is still the one of the start
    assert sources.code_version(job) == base
    sources._KEPT.clear()
    assert sources.code_version(job) != base


def test_threads_that_ask_at_once_do_not_meet():
    """Python 3.11's parser loses count where a collection of garbage within it lets in another."""
    paths = sources.source_files()[:8] * 2
    gc.callbacks.append(let_others := lambda *told: time.sleep(0))
    sources._imports_and_hash.cache_clear()
    try:
        with ThreadPoolExecutor(4) as threads:
            several = list(threads.map(sources.code_version, paths))
    finally:
        gc.callbacks.remove(let_others)
    assert several == [sources.code_version(path) for path in paths]
    assert gc.isenabled()


def test_what_prints_does_not_count(tmp_path):
    job = tmp_path / "job.py"
    text = "def score():\n    return 1\n\n\ndef show(records):\n    print({})\n\n\n"
    text += "def print_table(x):\n    print(x, {})\n\n\nif __name__ == '__main__':\n    show({})\n"
    job.write_text(text.format(1, 2, 3))
    base = sources.code_version(job)
    job.write_text(text.format(4, 5, 6))
    assert sources.code_version(job) == base
    job.write_text(text.format(1, 2, 3).replace("return 1", "return 2"))
    assert sources.code_version(job) != base


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
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=builders.PATIENCE
    )
    assert out.returncode == 0, out.stderr
    loaded = {Path(line) for line in out.stdout.split("LOADED\n")[1].splitlines()}
    record = results.load_records(tmp_path / "results")[0]
    chosen = ("formats/native.py", "backends/local.py")
    if script == "humaneval_eval":  # programs that are started, not imported
        chosen += ("sandbox/worker.py", "sandbox/jail.py")
    counted = set(sources.code_files(ROOT / f"{script}.py", chosen))
    assert record["code_version"] == sources.code_version(ROOT / f"{script}.py", chosen)
    left_out = {str(path.relative_to(ROOT)) for path in loaded - counted}
    doors = [name for name in left_out if name.split("/")[0] in ("formats", "backends")]
    assert left_out - {*doors} == {*sources.WITHOUT_NUMBERS}, left_out
    assert not {*doors} & {*chosen}

"""Scripts started by an interpreter that lacks packages: one line with the remedy, or a traceback
where the fault is ours."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import installed

import pytest
from builders import ROOT, saved_checkpoint
from test_house import FOLDERS, ROOMS

BARE = [sys.executable, "-S", "-E"]  # the standard library alone
COMMANDS = sorted(p.name for p in ROOT.glob("*.py") if "    cli.run(main)\n" in p.read_text()[-60:])
COMMANDS += ["scripts/make_corpus.py", "scripts/serve_bench.py", "scripts/cot_shots.py"]


def run(words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def said(out) -> str:
    """The one line of an error that a user can mend."""
    assert out.returncode == 2 and not out.stdout, out.stderr
    assert out.stderr.startswith("error: ") and out.stderr.count("\n") == 1, out.stderr
    return out.stderr


def test_every_command_without_its_packages_is_one_line(tmp_path):
    assert {"eval.py", "train.py", "checkpoint.py", "sweep.py", "compute.py"} <= {*COMMANDS}
    for script in COMMANDS:
        out = run([*BARE, ROOT / script, "--help"], cwd=tmp_path)
        if script == "compute.py":  # which counts without any
            assert out.returncode == 0 and "--config" in out.stdout, out.stderr
            continue
        line = said(out)
        assert "numpy is not installed for" in line or "torch is not installed for" in line
        assert f"source {ROOT}/.venv/bin/activate" in line
        assert f"bash {ROOT}/scripts/install.sh" in line


def test_a_shell_script_too(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    sweep = ["bash", ROOT / "scripts/sweep_checkpoints.sh", tmp_path]
    assert "is not installed" in said(run(sweep, env=os.environ | {"PYTHON": str(python)}))


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment of an interpreter that finds all that is installed here but torch."""
    folder = tmp_path_factory.mktemp("site")
    (site,) = (Path(place) for place in sys.path if (Path(place) / "torch/__init__.py").is_file())
    for path in site.iterdir():
        if not path.name.startswith("torch"):
            (folder / path.name).symlink_to(path)
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_what_is_imported_late_too(without_torch, tmp_path):
    """The checkpoint is opened once the flags are read, and a file of settings by PyYAML."""
    path = saved_checkpoint(tmp_path / "run")
    (tmp_path / "x.txt").write_text("abc")
    words = [sys.executable, "-S", ROOT / "eval.py", "--checkpoint-path", path, "--val-data"]
    line = said(run([*words, tmp_path / "x.txt"], env=without_torch))
    assert "torch is not installed for" in line
    (tmp_path / "own.yaml").write_text("&a n_layers: 2\n")
    assert "yaml is not" in said(
        run([*BARE, ROOT / "compute.py", "--config", tmp_path / "own.yaml"])
    )
    traced = run([*words, tmp_path / "x.txt", "--debug"], env=without_torch)
    assert traced.returncode == 2 and "Traceback" in traced.stderr
    assert traced.stderr.endswith(line)


@pytest.mark.parametrize("name, where", [("stats", "early"), ("checkpoint", "late")])
def test_a_module_of_ours_that_is_not_there_is_a_traceback(name, where, tmp_path):
    (tmp_path / "x.txt").write_text("abc")
    flags = ["eval.py", "--checkpoint-path", "c", "--val-data", str(tmp_path / "x.txt")]
    code = f"import runpy, sys; sys.modules[{name!r}] = None; sys.path.insert(0, {str(ROOT)!r}); "
    code += f"sys.argv = {flags!r}; runpy.run_path({str(ROOT / 'eval.py')!r}, run_name='__main__')"
    out = run([sys.executable, "-c", code])
    assert out.returncode == 1 and "Traceback" in out.stderr and name in out.stderr
    assert "is not installed" not in out.stderr
    assert out.stderr.startswith("rank 0: Traceback") == (where == "late")


@pytest.mark.parametrize(
    "code, importer, words",
    [
        ("import numqy", "eval.py", None),  # misspelt, as a module of ours may be
        ("import chekpoint", "formats/native.py", None),
        ("import numpy.no_such_part", "eval.py", None),  # which is there: another version
        ("import sacrebleu_", "eval.py", None),
        ("import wandb", "recording/trackers.py", "wandb is not installed: pip install wandb"),
        ("import sklearn", "training/neighbours.py", "pip install scikit-learn"),
        ("import filelock_", ".venv/lib/site-packages/torch/hub.py", "filelock_ is not installed"),
        ("import filelock_", "/usr/lib/python3/torch/hub.py", "filelock_ is not installed for"),
        ("1 / 0", "eval.py", None),
        ("from stats import nothing", "eval.py", None),
    ],
)
def test_whose_fault_it_is(code, importer, words, monkeypatch):
    for name in ("wandb", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)  # not to be found
    with pytest.raises((ImportError, ZeroDivisionError)) as caught:
        exec(compile(code, str(ROOT / importer), "exec"), {})
    found = installed.missing(caught.value)
    assert found is None if words is None else words in found


def test_every_package_that_we_import_is_known():
    known = {*installed.NEEDED.split(), *installed.OPTIONAL, *FOLDERS, *sys.stdlib_module_names}
    known |= {path.stem for path in ROOT.glob("*.py")}
    for path in [*ROOMS, *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= known, f"{path}:{node.lineno}"

"""streams.py: what is printed never costs what was computed, in real processes."""

import ast
import os
import subprocess
import sys

import pytest
from builders import PATIENCE, ROOT, saved_checkpoint, small_mmlu, torchrun

import results

COMMANDS = ["eval", "mmlu_eval", "humaneval_eval", "compute", "train", "sweep", "report"]
COMMANDS += ["checkpoint"]

# prints before and after it writes a file, which must not get the number of a closed descriptor
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
import cli
def main():
    print("21.74% \\u00b1 1.69%", os.fsdecode(b"\\xff"), flush=True)
    print("\\u0394", file=sys.stderr)
    with open("work", "w") as file:
        assert file.fileno() > 2
        file.write("done")
    print("x" * 200_000)
    print("end")
cli.run(main)
"""


@pytest.fixture
def shell(tmp_path):
    """Run `script` under a shell's redirections: (exit code, standard output, standard error)."""
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))

    def run(redirections, **environment):
        command = f"{sys.executable} script.py {redirections}"
        out = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            timeout=PATIENCE,
        )
        assert (tmp_path / "work").read_text() == "done", out.stderr
        return out.returncode, out.stdout, out.stderr.decode()

    return run


FULL = "error: standard output: No space left on device; part of what was printed is lost\n"


@pytest.mark.parametrize(
    "redirections, code, said",
    [
        (">&-", 0, "Δ\n"),
        ("<&- >&-", 0, "Δ\n"),
        ("<&- >&- 2>&-", 0, ""),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">/dev/full", 2, "Δ\n" + FULL),
        (">/dev/full 2>/dev/full", 2, ""),
        ("", 0, "Δ\n"),
    ],
)
def test_the_work_is_done_wherever_the_words_go(redirections, code, said, shell):
    found, out, err = shell(redirections, PYTHONIOENCODING="utf-8")
    assert (found, err) == (code, said)
    assert out.endswith(b"end\n") == (redirections in ("", "2>&-", "2>/dev/full"))


@pytest.mark.parametrize(
    "encoding, pm", [("ascii", b"?"), ("latin-1", b"\xb1"), ("cp1252", b"\xb1")]
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding, pm, shell):
    code, out, err = shell("", PYTHONIOENCODING=encoding)
    assert code == 0 and out.splitlines()[0] == b"21.74% " + pm + b" 1.69% ?"
    assert err == "\\u0394\n"


def test_a_reader_that_lags_behind_a_pipe_that_does_not_block(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as whoever shares the pipe may have set it
    words = [sys.executable, "script.py"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=writer) as process, open(reader, "rb") as f:
        os.close(writer)
        assert f.read().endswith(b"end\n")
    assert process.returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_starts_behind_it(name):
    """By its last statement, and there is no other start."""
    starts = [
        ast.unparse(node.body)
        for node in ast.parse((ROOT / f"{name}.py").read_bytes()).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    assert len(starts) == 1 and starts[0].endswith("cli.run(main)")


def test_a_record_is_there_though_not_a_word_could_be_printed(tmp_path):
    """Nor written down under the locale: names and paths are not ASCII."""
    questions, saved = small_mmlu(tmp_path / "q", n=2), saved_checkpoint(tmp_path / "ré")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--checkpoint-path", saved, "--data-path", questions, "--results-dir", tmp_path / "ö"]
    more = ["--template", "lm_eval", "zh"]  # read as UTF-8
    with open("/dev/full", "w") as full:
        environment = os.environ | ascii_only
        options = {"stdout": full, "env": environment, "code": 2}
        out = torchrun(0, "mmlu_eval.py", *flags, *more, **options)
    assert out.stderr == FULL
    assert len(results.load_records(tmp_path / "ö")) == 2
    assert len(list((tmp_path / "ö").rglob("mmlu-differences-*"))) == 1

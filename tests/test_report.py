"""report.py: the command."""

import os
import signal
import subprocess
import sys

from builders import PATIENCE, command, started, wait_for
from made_up_records import ROOT, run_report, save

SUFFIXES = ("csv", "html", "md")


def test_errors_are_one_line_and_exit_2(tmp_path):
    wrong = ["--rows", "-1"], ["--examples", "-1"], ["--watch", "0"], ["--watch", "nan"]
    for arguments in ([tmp_path / "nowhere"], ["--compare", "x", "y"], ["--sort"], *wrong):
        out = run_report(*arguments)
        assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    for words, said in (
        ("--seed 0", "--seed goes with --compare A B"),
        ("--compare x y --rows 20", "--rows goes without --compare"),
        ("results --compare x y", "--compare takes two places: what is results?"),
    ):
        out = run_report(*words.split())
        assert out.returncode == 2 and said in out.stderr and out.stderr.count("\n") == 1
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    out = run_report(tmp_path, "--sort", "acuracy")
    assert out.returncode == 2 and "there are step, accuracy" in out.stderr


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    save(tmp_path / "results", "mmlu", {"accuracy": 0.5})
    (tmp_path / "file").write_text("")
    out = run_report(tmp_path / "results", "--out", tmp_path / "file")
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "--out FOLDER" in out.stderr


def test_a_name_that_is_no_text(tmp_path):
    """Bytes of another encoding: every file is written, and the page's data can be read."""
    folder = tmp_path / os.fsdecode(b"l\xf6c")
    save(folder, "mmlu", {"accuracy": 0.5})
    out = run_report(folder)
    assert out.returncode == 0 and "l\\udcf6c/report.html" in out.stdout, out.stderr
    assert {path.name for path in folder.glob("report.*")} == {"report." + s for s in SUFFIXES}


def test_an_empty_directory_is_no_error(tmp_path):
    out = run_report(tmp_path)
    assert out.returncode == 0 and "no results yet" in out.stdout
    assert (tmp_path / "report.html").exists()


def test_without_plotly_the_install_command_is_named(tmp_path):
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    code = (
        "import sys; sys.modules['plotly'] = sys.modules['plotly.offline'] = None\n"
        f"import cli, report; cli.run(lambda: report.main([{str(tmp_path)!r}]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and "pip install plotly" in out.stderr
    assert (tmp_path / "report.csv").exists() and (tmp_path / "report.md").exists()
    out = run_report(tmp_path, "--no-html")
    assert out.returncode == 0


def test_watch_rewrites_the_report(tmp_path):
    save(tmp_path, "mmlu", {"accuracy": 0.5})
    said = tmp_path / "said"
    watching = command(0, "report.py", tmp_path, "--no-html", "--watch", "0.2")
    with open(said, "w") as out, started(watching, stdout=out) as process:
        wait_for(lambda: "0.5000 *" in said.read_text())
        save(tmp_path, "mmlu", {"accuracy": 0.75}, step=2)
        wait_for(lambda: "0.7500 *" in said.read_text())
        assert "0.7500" in (tmp_path / "report.md").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130

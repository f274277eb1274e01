"""cli.py: one dataclass is the flags, a YAML file's keys and the keywords. Exit codes and signals
are in tests/test_distributed.py."""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cli
import launcher


@dataclass(frozen=True)
class Drawing:
    temperature: float = cli.option(0.0, "0: greedy", type=float)
    stop: tuple[str, ...] = cli.option(
        (), "ends", nargs="*", type=lambda text: text.replace("\\n", "\n")
    )

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 or more, not {self.temperature:g}")


@dataclass(frozen=True)
class Options:
    data_path: str = cli.option(help="a file", metavar="FILE")
    n_shots: int = cli.option(5, "examples", type=int)
    limit: int | None = cli.option(None, "the first", type=cli.positive_int)
    drawing: Drawing = Drawing(temperature=0.5)
    names: tuple[str, ...] = cli.option((), "only these", nargs="+")
    bos: str = cli.option("auto", "BOS", nargs="?", const="on", choices=("auto", "on", "off"))
    truncate: bool = cli.option(False, "cut")
    strip: bool = cli.option(True, "strip", action=argparse.BooleanOptionalAction)
    secret: int = 3  # no option: no flag


@pytest.fixture
def parse():
    p = cli.parser("What it does.")
    cli.add_options(p, Options)
    return lambda *words: cli.read_options(Options, p.parse_args([str(word) for word in words]))


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
TORCHRUN |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
FLAGS = "--data-path x --n-shots 0 --limit 1_000 --temperature 0.8 --stop \\nclass b --names a b "
FLAGS += "--bos --truncate --no-strip"
YAML = {
    "data_path": "x",
    "n_shots": 0,
    "limit": "1_000",
    "temperature": 0.8,
    "stop": ["\\nclass", "b"],
    "names": ["a", "b"],
    "bos": True,  # as YAML reads the word on
    "truncate": True,
    "strip": False,
}
VALUES = Options("x", 0, 1000, Drawing(0.8, ("\nclass", "b")), ("a", "b"), "on", True, False)


def test_flags_yaml_keys_and_keywords_are_one_list(parse):
    assert parse(*FLAGS.split(" ")) == VALUES
    converted = cli.convert_options(Options, YAML, "e.yaml")
    assert cli.read_options(Options, converted) == VALUES
    keywords = converted | {"names": ["a", "b"]}  # a list is as good as a tuple
    assert cli.read_options(Options, keywords) == VALUES
    assert cli.option_names(Options) == list(YAML)
    assert hash(VALUES)  # lists have become tuples


def test_defaults(parse):
    wanted = Options("x")
    assert parse("--data-path", "x") == wanted
    assert cli.read_options(Options, {"data_path": "x"}) == wanted
    assert wanted.drawing.temperature == 0.5  # the instance's, not the class's


def test_help_says_each_default_once():
    p = cli.parser("What it does.")
    shown = [("size", 8, "rows"), ("share", 0.95, "95% of it"), ("kind", "auto", "auto: by itself")]
    shown += [("rate", 6e-4, None), ("wait", 600.0, "seconds (600)"), ("name", None, "a name")]
    for name, default, help in shown:
        p.add_argument(f"--{name}", default=default, help=help and help.replace("%", "%%"))
    p.add_argument("--switch", action="store_true", help="on")
    lines = [" ".join(line.split()[2:]) for line in p.format_help().splitlines() if "  --" in line]
    assert lines == [
        "rows (8)",
        "95% of it (0.95)",
        "auto: by itself",
        "(0.0006)",
        "seconds (600)",
        "a name",
        "",
    ]
    assert p.format_help().endswith("--switch       on\n")


@pytest.mark.parametrize(
    "words, given",
    [
        ("--data-path x", "data_path"),
        ("--data-path x --n-shots 5 --bos auto --strip", "data_path n_shots bos strip"),
        ("--data-path x --names a --no-strip --temperature 0", "data_path names strip temperature"),
        ("--data-path=x --limit=3 --truncate", "data_path limit truncate"),
    ],
)
def test_what_a_command_line_gives_whatever_its_value(words, given):
    p = cli.parser("What it does.")
    cli.add_options(p, Options)
    p.set_defaults(limit=7)  # as a file of settings does
    for _ in range(2):
        args = p.parse_args(words.split())
        assert args.given == set(given.split())
        assert args.limit == (3 if "limit" in given else 7) and args.bos == "auto"


def test_an_instance_gives_the_defaults():
    p = cli.parser("")
    cli.add_options(p, Drawing(0.25, ("end",)))
    read = cli.read_options(Drawing(0.25, ("end",)), p.parse_args([]))
    assert read == Drawing(0.25, ("end",))
    assert cli.read_options(Drawing(0.25, ("end",)), {"stop": ()}) == Drawing(0.25, ())


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "required: --data-path"),
        ("--data-path x --n-shots 1.5", "argument --n-shots: invalid int value: '1.5'"),
        ("--data-path x --limit 0", "argument --limit: needs a positive whole number, not '0'"),
        ("--data-path x --bos maybe", "argument --bos: invalid choice: 'maybe'"),
        ("--data-path x --names", "argument --names: expected at least one argument"),
        ("--data-path x --secret 1", "unrecognized arguments: --secret 1"),
        ("--data x", "required: --data-path"),  # no abbreviations
    ],
)
def test_wrong_flags_are_one_line_of_rank_0(words, said, parse, capsys, monkeypatch):
    for rank, lines in ((0, 1), (1, 0)):
        for name, value in (TORCHRUN | {"RANK": str(rank)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            parse(*words.split())
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.splitlines()) == lines
        assert not lines or (err.startswith("error: ") and said in err and "--help" in err)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"n_shots": 1.5}, "--n-shots: needs a number, not '1.5'"),
        ({"n_shots": "many"}, "--n-shots: needs a number, not 'many'"),
        ({"n_shots": None}, "--n-shots: needs one value, not None"),
        ({"n_shots": [1, 2]}, "--n-shots: needs one value, not [1, 2]"),
        ({"n_shots": True}, "--n-shots: needs one value, not True"),
        ({"limit": -1}, "--limit: needs a positive whole number, not '-1'"),
        ({"data_path": {"a": 1}}, "--data-path: needs one value"),
        ({"bos": "maybe"}, "--bos: must be one of auto, on, off, not 'maybe'"),
        ({"names": []}, "--names: needs a value"),
        ({"names": ["a", None]}, "--names: needs one value, not None"),
        ({"truncate": "yes"}, "--truncate: needs true or false, not 'yes'"),
        ({"strip": 0}, "--strip: needs true or false, not 0"),
        ({"temperature": "hot"}, "--temperature: needs a number, not 'hot'"),
        ({"secret": 1}, "there is no option --secret"),
        ({"n_shot": 1}, "there is no option --n-shot"),
    ],
)
def test_wrong_values_of_a_file_are_one_line(values, said):
    with pytest.raises(ValueError) as error:
        cli.convert_options(Options, values, "e.yaml: task")
    line = str(error.value)
    assert line.startswith("e.yaml: task: ") and said in line and "\n" not in line


@pytest.mark.parametrize(
    "name, given, read",
    [
        ("bos", False, "off"),
        ("bos", "auto", "auto"),
        ("limit", None, None),
        ("names", "a", ("a",)),
        ("names", [1, 2.5], ("1", "2.5")),
        ("stop", [], ()),
        ("data_path", 7, "7"),
        ("n_shots", "7", 7),
    ],
)
def test_values_of_a_file_are_read_as_flags_would_be(name, given, read):
    assert cli.convert_options(Options, {name: given}, "e.yaml") == {name: read}


@pytest.mark.parametrize("name, default", [("path", None), ("paths", ()), ("folder", "results")])
def test_an_empty_text_is_no_value(name, default, capsys):
    """A variable that is not set, in quotes: of a path Python would make this folder."""
    several = {"nargs": "+"} if default == () else {}
    text = cli.option(default, "a path", **several)
    options = dataclasses.make_dataclass("Options", [(name, Any, text)], frozen=True)
    p = cli.parser("What it does.")
    cli.add_options(p, options)
    for words in ([f"--{name}", ""], [f"--{name}="]):
        with pytest.raises(SystemExit):
            p.parse_args(words)
        assert f"--{name}: is empty: give a value, or leave it out" in capsys.readouterr().err
    for value in ("", ["a", ""]) if several else ("",):
        with pytest.raises(ValueError, match=f"y: --{name}: is empty"):
            cli.convert_options(options, {name: value}, "y")
    assert p.parse_args([f"--{name}", " "]) and p.parse_args([])


def test_an_empty_text_where_it_is_the_default():
    options = dataclasses.make_dataclass("Options", [("kwargs", str, cli.option("", "K=V"))])
    p = cli.parser("What it does.")
    cli.add_options(p, options)
    assert p.parse_args(["--kwargs", ""]).kwargs == ""
    assert cli.convert_options(options, {"kwargs": ""}, "y") == {"kwargs": ""}


def test_an_options_own_checks_speak_of_flags(parse):
    for make in (
        lambda: parse("--data-path", "x", "--temperature", "-1"),
        lambda: cli.read_options(Options, {"data_path": "x", "temperature": -1.0}),
    ):
        with pytest.raises(ValueError, match="--temperature must be 0 or more, not -1"):
            make()


def test_what_a_dataclass_needs_must_be_given():
    with pytest.raises(TypeError, match="data_path"):
        cli.read_options(Options, {})


@pytest.mark.parametrize(
    "flags, device, dtype",
    [
        ({}, "cpu", "float32"),
        ({}, "cuda", "bfloat16"),
        ({"dtype": "fp16"}, "cpu", "float16"),
        ({"bf16": True}, "cpu", "bfloat16"),
        ({"no_amp": True}, "cuda", "float32"),
        ({"no_amp": True, "dtype": "fp32"}, "cuda", "float32"),
    ],
)
def test_precision(flags, device, dtype):
    assert cli.PrecisionOptions(**flags).resolve(device) == dtype


def test_precisions_that_contradict():
    with pytest.raises(ValueError, match="--dtype fp16 and --no-amp contradict each other"):
        cli.PrecisionOptions(dtype="fp16", no_amp=True).resolve("cpu")


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_timeout_that_no_thread_can_wait_for(seconds):
    with pytest.raises(ValueError, match="--timeout must be a positive number of seconds"):
        cli.RunOptions(timeout=seconds)


# ---------------------------------------------------------------------------------------------
# Who started this process

ALONE = launcher.Launch()


@pytest.fixture
def environment(monkeypatch):
    """Set nothing of a launcher's variables but these."""
    for name in (*TORCHRUN, *launcher.COPIES):
        monkeypatch.delenv(name, raising=False)

    def fill(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return fill


def without(*names):
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_ranks_are_those_that_can_meet(environment):
    assert launcher.check_launch() == ALONE and cli.rank() == 0
    environment(TORCHRUN)
    assert launcher.check_launch() == launcher.Launch(1, 2, 1, True) and cli.rank() == 1


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, which srun did not start
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"},
        {"RANK": ""},
    ],
    ids=str,
)
def test_what_is_true_of_a_process_alone_is_no_fault(values, environment):
    environment(values)
    assert launcher.check_launch() == ALONE


@pytest.mark.parametrize(
    "values, said",
    [
        ({"RANK": "1"}, "RANK=1 in the environment, without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, without RANK, MASTER_ADDR"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 in the environment, without RANK"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "RANK=1 and WORLD_SIZE=2 in the environment, without",
        ),
        (without("MASTER_PORT"), "unset RANK and WORLD_SIZE and LOCAL_RANK to run as one process"),
        (
            TORCHRUN | {"RANK": "2"},
            "RANK=2 and WORLD_SIZE=2 and LOCAL_RANK=1 in the environment",
        ),
        (TORCHRUN | {"RANK": "-1"}, "which is no rank of a run: start all ranks with torchrun"),
        (TORCHRUN | {"RANK": "one"}, "RANK=one"),
        (TORCHRUN | {"WORLD_SIZE": "1"}, "RANK=1 and LOCAL_RANK=1 in the environment, which is no"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 copies of this (SLURM_STEP_NUM_TASKS)"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "RANK": "0"}, "mpirun started 2 copies of this"),
    ],
    ids=str,
)
def test_half_a_launcher_is_refused_and_heard(values, said, environment):
    """By every process, as rank 0 of one: whoever stays silent leaves nobody to speak."""
    environment(values)
    assert launcher.launch() == ALONE and cli.rank() == 0
    with pytest.raises(ValueError) as error:
        launcher.check_launch()
    assert said in str(error.value) and "torchrun" in str(error.value)
    environment(TORCHRUN)
    assert launcher.check_launch().world_size == 2


@pytest.mark.parametrize("seconds, right", [(None, 1), (0.5, 1), (0, 0), (-1, 0), (math.nan, 0)])
def test_seconds_to_wait_for(seconds, right, capsys):
    args = argparse.Namespace(poll_seconds=seconds)
    if right:
        return cli.check_seconds(cli.parser(""), args, "poll_seconds")
    with pytest.raises(SystemExit):
        cli.check_seconds(cli.parser(""), args, "poll_seconds")
    assert "--poll-seconds must be a positive number of seconds" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Text of others


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é 中文 😀", "plain é 中文 😀"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),  # CSI, OSC
        ("\x9b2J\x9d0;x\x9c", "\\x9b2J\\x9d0;x\\x9c"),  # the same in one character each
        ("a\nerror: b\r\x0b\x85\u2028c\td", "a error: b    c d"),  # no line of ours
        ("\0\x08\x7f", "\\x00\\x08\\x7f"),
        ("\u202eevil\u2066\u200f", "\\u202eevil\\u2066\\u200f"),  # bidirectional
        ("\ud800\udcff", "\\ud800\\udcff"),
        (Path("a\x1bb"), "a\\x1bb"),
        (ValueError("no"), "no"),
        (None, "None"),
    ],
)
def test_text_of_others_cannot_steer_a_terminal(text, shown):
    assert cli.printable(text) == shown
    assert shown.isprintable() and shown.encode()


def test_text_of_several_lines_keeps_them():
    assert cli.printable("a\x1b[2J\té\ud800\n\r", lines=True) == "a\\x1b[2J\té\\ud800\n\\r"


def test_errors_are_printed_so(parse, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse("--data-path", "x", "--n-shots", "\x1b[2J")
    monkeypatch.setattr(sys, "argv", ["x", "--debug"])
    cli._report(ValueError("a\x1b]0;x\x07\nb"))
    err = capsys.readouterr().err
    assert err.isascii() and "\x1b" not in err and err.count("error: ") == 2
    assert err.endswith("error: a\\x1b]0;x\\x07 b\n") and "Error: a\\x1b]0;x" in err


def test_why_one_of_many_was_not_done(capsys, monkeypatch):
    assert cli.reason_of(ValueError("a.pt is torn\nand more")) == "a.pt is torn"
    assert cli.reason_of(OSError(2, "No such file", "a")) == "[Errno 2] No such file: 'a'"
    assert cli.reason_of(RuntimeError("shapes")) == "RuntimeError: shapes"
    assert cli.reason_of(KeyError()) == "KeyError: KeyError"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["x", "--debug"])
    try:
        _ = [][0]
    except IndexError as error:
        assert cli.reason_of(error).startswith("IndexError: ")
    assert "Traceback" in capsys.readouterr().err

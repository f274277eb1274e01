"""command.py: the command of an evaluation, on one made for the purpose and on ours."""

import json
import os
import resource
import shutil
import sys
import tempfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    PATIENCE,
    run_to_end,
    save_model,
    saved_checkpoint,
    small_humaneval,
    small_mmlu,
    tiny_model,
    token_shard,
)
from builders import command as command_words
from test_evaluation import LETTERS, OURS, SCRIPTS, plan, run

import checkpoint
import cli
import command
import evaluation
import results
import sweep
import train
from durable import Folder
from mmlu_eval import MMLU

# ---------------------------------------------------------------------------------------------
# Options are flags, keywords and a file's keys


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_a_flag_a_key_and_a_keyword(script, monkeypatch):
    kind, given = OURS[script], []
    monkeypatch.setattr(command, "run_command", lambda each, args: given.append((each, args)))
    needed = ["--val-data", "x"] if script == "eval" else ["--data-path", "x"]
    SCRIPTS[script].main(["--checkpoint-path", "c", "d", *needed])
    [(found, args)] = given
    assert found is kind
    names = set(cli.option_names(kind.Options))
    assert names <= vars(args).keys()
    shared = (evaluation.ModelOptions, command.AdapterOptions, evaluation.EndpointOptions)
    shared += (command.QuantiseOptions, cli.PrecisionOptions, cli.RunOptions)
    offered = {name for options in shared for name in cli.option_names(options)} | names
    extra = {"mmlu_eval": {"log_samples"}, "humaneval_eval": {"samples_file", "ignore_incomplete"}}
    assert vars(args).keys() - {"given"} == offered | extra.get(
        script, set()
    )  # and nothing does nothing
    values = {name: getattr(args, name) for name in names}
    read = cli.read_options(kind.Options, args)
    assert read == cli.read_options(kind.Options, values)
    written = {n: v for n, v in values.items() if v not in (None, ())}
    assert read == cli.read_options(kind.Options, cli.convert_options(kind.Options, written, "y"))
    for f in fields(kind.Options):
        for own in fields(f.default) if is_dataclass(f.default) else [f]:
            assert own.metadata.get("help"), f"{own.name} says nothing of itself"


# What cli.py and train.py look for before there are options; and flags of one mode, as --help says
UNREAD = {"debug", "train_config"}
OF_A_CHAT = {"chat_template_args", "fewshot_as_turns", "system_prompt"}
OF_A_MODE = {
    "eval": {"seed", "reference_dtype"},
    "mmlu_eval": OF_A_CHAT,
    "humaneval_eval": OF_A_CHAT,
    "sweep": {"retry_failed", "quiet_seconds"},
    "train": {"wandb_project", "wandb_run_name", "train_embeddings"}
    | {"lora_alpha", "lora_dropout", "lora_rs", "lora_targets", "decay_shape", "decay_steps"}
    | {"quantise", "quantise_skip"},  # of the weights below adapters
}


@pytest.mark.parametrize("script", [*SCRIPTS, "train", "sweep"])
def test_no_flag_is_offered_that_nobody_reads(script, inputs, tmp_path, monkeypatch):
    """A run with the flags as they are by default reads each of them, wherever it goes."""
    read, offered = set(), set()
    monkeypatch.setattr(cli, "read_options", recording(cli.read_options, read, offered))
    if script == "train":
        flags = "--use-toy-data --seq-len 64 --num-steps 3 --warmup-steps 1"
        train.main([*flags.split(), "--checkpoint-path", str(tmp_path / "t")])
    elif script == "sweep":
        saved_checkpoint(tmp_path / "run")
        task = {"val-npy": f"{tmp_path}/x.npy", "data-mode": "fineweb_npy", "seq-len": 32}
        (tmp_path / "e.yaml").write_text(json.dumps({"perplexity": task}))
        flags = f"--evaluations {tmp_path}/e.yaml --results-dir {tmp_path}/r --device cpu"
        sweep.main([*flags.split(), "--checkpoint-path", str(tmp_path / "run")])
    else:
        SCRIPTS[script].main([*inputs[script], str(saved_checkpoint(tmp_path / "run"))])
    assert offered - read - UNREAD == OF_A_MODE.get(script, set())


def recording(read_options, read, offered):
    """cli.read_options, whose answers note which of their fields are looked at."""

    def looked_at(self, name):
        caller = sys._getframe(1)
        copied = caller.f_globals["__name__"] == "dataclasses"
        if not copied and caller.f_code.co_name != "__post_init__":
            read.add(name)
        return object.__getattribute__(self, name)

    def wrapped(kind, values):
        options = read_options(kind, values)
        cls = type(options)
        offered.update(f.name for f in fields(cls) if "help" in f.metadata)
        watched = type(cls.__name__, (cls,), {"__getattribute__": looked_at})
        object.__setattr__(options, "__class__", watched)
        return options

    return wrapped


def test_mmlu_offers_no_seed_and_no_compilation():
    """It draws nothing, and is always eager."""
    assert not {"seed", "compile"} & set(cli.option_names(MMLU.Options))


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def inputs(tmp_path):
    """{script: its flags}, for a .pt of bare weights that need --config, and the config's file."""
    model = tiny_model("llama")
    torch.save({"model": model.state_dict(), "step": 5}, tmp_path / "old.pt")
    config = {k: v for k, v in model.config.to_dict().items() if k != "norm_eps"}
    (tmp_path / "shape.yaml").write_text(json.dumps(config))  # JSON is YAML
    small_mmlu(tmp_path / "mmlu"), small_humaneval(tmp_path / "p.jsonl")
    token_shard(tmp_path / "x.npy")
    own = {
        "eval": f"--data-mode fineweb_npy --val-npy {tmp_path}/x.npy --seq-len 32",
        "mmlu_eval": f"--data-path {tmp_path}/mmlu --limit 2",
        "humaneval_eval": f"--data-path {tmp_path}/p.jsonl --max-new-tokens 3 --workers 1 "
        f"--judge-timeout {PATIENCE}",
    }
    shared = f" --device cpu --tokenizer-name byte --results-dir {tmp_path}/r --checkpoint-path"
    return {script: (flags + shared).split() for script, flags in own.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_config_reaches_the_model(script, inputs, tmp_path):
    """Of checkpoint files that hold none: weights, record and key."""
    words = [*inputs[script], str(tmp_path / "old.pt")]
    with pytest.raises(ValueError, match="--config"):
        SCRIPTS[script].main(words)
    assert not (tmp_path / "r").exists()
    SCRIPTS[script].main([*words, "--config", str(tmp_path / "shape.yaml")])
    (record,) = results.load_records(tmp_path / "r")
    assert record["checkpoint"]["config"]["position"] == "rope"
    assert record["checkpoint"]["step"] == 5 or record["checkpoint"]["name"] == "old"
    saved = saved_checkpoint(tmp_path / "saved", kind="llama", seed=0)
    SCRIPTS[script].main([*inputs[script], str(saved)])
    (same,) = (r for r in results.load_records(tmp_path / "r") if r["run"] == "saved")
    assert same["metrics"] == record["metrics"]
    a, b = results.load_arrays(same), results.load_arrays(record)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--checkpoint-path c --concurrency 16", "--concurrency goes only with --endpoint"),
        ("--endpoint http://x --shard 1", "--shard goes with checkpoints"),
        ("--endpoint http://x --device cpu", "--device goes with checkpoints"),
    ],
)
def test_a_flag_counts_as_given_at_its_default(words, said):
    """Nothing would come of it, and that is said at any value."""
    with pytest.raises(ValueError, match=said):
        letters(*words.split())


def letters(*argv):
    command.main(LETTERS, [str(word) for word in argv], "Letters.")


def test_checkpoints_are_measured_saved_and_shown(tmp_path, capsys):
    """In the order of their steps, each saved before it is shown; then the table of them all."""
    for step in (20, 3):
        saved_checkpoint(tmp_path / "a run", step)
    flags = ["--device", "cpu", "--results-dir", tmp_path / "r", "--checkpoint-path"]
    letters(*flags, tmp_path / "a run")
    records = results.load_records(tmp_path / "r")
    assert {(r["run"], r["checkpoint"]["name"]) for r in records} == {
        ("a run", "checkpoint-3"),
        ("a run", "checkpoint-20"),
    }
    assert all(r["cost"]["load_seconds"] > 0 for r in records)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["checkpoint-3", "checkpoint-20", "all 2"]
    assert not any(results.load_samples(r) for r in records)
    one = tmp_path / "a run/checkpoint-3"
    letters(*flags, one, "--log-samples", "--run-name", "other", "--prompt", "zz", "--bf16")
    assert "all" not in capsys.readouterr().out
    (record,) = (r for r in results.load_records(tmp_path / "r") if r["run"] == "other")
    assert len(results.load_samples(record)) == 1
    assert (record["protocol"]["prompt"], record["protocol"]["dtype"]) == ("zz", "bfloat16")


def test_a_plan_is_made_once_for_checkpoints_of_one_kind(tmp_path, capsys):
    for step, changes in ((1, {}), (2, {}), (3, {"vocab_size": 300})):
        saved_checkpoint(tmp_path / "run", step, **changes)
    made = []
    counted = replace(LETTERS, plan=lambda *args: made.append(args[1].name) or plan(*args))
    flags = ["--device", "cpu", "--results-dir", tmp_path / "r", "--checkpoint-path"]
    command.main(counted, [str(x) for x in (*flags, tmp_path / "run")], "Letters.")
    assert made == ["checkpoint-1", "checkpoint-3"]
    assert len(results.load_records(tmp_path / "r")) == 3


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "--checkpoint-path"),
        ("--checkpoint-path nowhere", "nowhere"),
        ("--checkpoint-path checkpoint-1 --config nothing", "nothing"),
        ("--checkpoint-path checkpoint-1 --bf16 --no-amp", "contradict"),
        ("--checkpoint-path checkpoint-1 --tokenizer-name no/where", "no/where"),
        ("--checkpoint-path checkpoint-1 --limit 0", "--limit"),
    ],
)
def test_wrong_input_is_said_and_nothing_is_written(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved_checkpoint(tmp_path, 1)
    with pytest.raises((ValueError, SystemExit)) as error:
        letters("--device", "cpu", *words.split())
    assert said in str(error.value) + capsys.readouterr().err
    assert not Path("results").exists()


# ---------------------------------------------------------------------------------------------
# Nothing that was computed is lost


def run_of(tmp_path, evaluation=LETTERS, results_dir="r", *more):
    saved = saved_checkpoint(tmp_path / "run", 1)
    words = ["--device", "cpu", "--results-dir", tmp_path / results_dir, "--checkpoint-path", saved]
    command.main(evaluation, [str(word) for word in (*words, *more)], "Letters.")


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError, KeyboardInterrupt])
def test_a_record_is_saved_before_a_line_of_it_is_shown(error, tmp_path):
    def show(records):
        raise error(28, "not a word")

    with pytest.raises(error):
        run_of(tmp_path, replace(LETTERS, show=show))
    assert len(results.load_records(tmp_path / "r")) == 1


def test_a_disk_that_fills_up_costs_no_numbers(tmp_path, capsys):
    """A file-size limit stands for it. The journal goes first, then the rest; all is shown."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(backend, plan, folder):
        folder.known()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        folder.append({"too": "long"})
        folder.append({"given": "up"})
        folder.write("values.txt", "one line and another\n")
        return replace(run(backend, plan, Folder(backend.dist, None)), samples=None)

    def show(records):
        print("shown", *(record.place for record in records))

    try:
        with pytest.raises(OSError, match=r"nothing was written: '.*/letters-"):
            run_of(tmp_path, replace(LETTERS, run=fill, show=show))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert out == "shown not saved\n"
    first, second = err.splitlines()
    assert "/journal-" in first and "the work goes on" in first and "/values.txt" in second
    assert results.load_records(tmp_path / "r") == []
    run_of(tmp_path, replace(LETTERS, show=show))  # there is room again
    assert len(results.load_records(tmp_path / "r")) == 1


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link", "a run's file"])
def test_where_no_record_can_be_saved_nothing_is_loaded(kind, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run").write_text("")
    names = {"a file": "file", "below a file": "file/a/b", "a dangling link": "link"}
    monkeypatch.setattr(checkpoint, "open", lambda *args: pytest.fail("too late"))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"--results-dir .* is no directory"):
        run_of(tmp_path, LETTERS, names.get(kind, "r"))
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "run")}
    assert after == before


def without_a_name(*words, **options):
    """A command by a user whom nobody knows, without a home, who may read everything and write
    little. Without the right to become one: our own user, without a home."""
    can = os.geteuid() == 0 and shutil.which("setpriv")
    user = "setpriv --reuid 12345 --regid 12345 --clear-groups"
    user += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    homeless = {name: value for name, value in os.environ.items() if "HOME" not in name}
    words = [*(user.split() if can else ()), *command_words(0, *words)]
    return run_to_end(words, None, env=homeless, **options), can


def test_a_user_without_a_home_or_a_name(inputs, tmp_path):
    """The fingerprint of a foreign file is remembered in a home, where there is one."""
    place = Path(tempfile.mkdtemp())  # pytest's own folders are for our user alone
    for name in ("old.pt", "shape.yaml", "x.npy"):
        shutil.copy(tmp_path / name, place)
    flags = "--checkpoint-path old.pt --config shape.yaml --data-mode fineweb_npy --val-npy x.npy "
    flags += "--tokenizer-name byte --seq-len 32 --device cpu --results-dir"
    try:
        place.chmod(0o777)
        out, can = without_a_name("eval.py", *flags.split(), "r", cwd=place)
        assert (out.returncode, out.stderr) == (0, "")
        assert len(results.load_records(place / "r")) == 1
        assert not list(place.glob("~*"))
        if can:
            place.chmod(0o755)
            out, _ = without_a_name("eval.py", *flags.split(), "s", cwd=place)
            assert (out.returncode, out.stdout) == (2, "")
            assert out.stderr.startswith(f"error: --results-dir s/{place.name} cannot be written")
    finally:
        shutil.rmtree(place)


# ---------------------------------------------------------------------------------------------
# What a checkpoint is called, and what it ran under


def test_a_checkpoint_has_its_name_however_it_is_reached(tmp_path, monkeypatch):
    saved = saved_checkpoint(tmp_path / "run", 1)
    (saved / "inner").mkdir()
    (tmp_path / "run/latest").symlink_to(saved)
    places = {saved: [".", "./", f"{saved}/.", f"{saved}/", "../checkpoint-1", "inner/.."]}
    places |= {saved / "inner": ["..", "../", "../inner/.."], tmp_path / "run/latest": ["."]}
    names = set()
    for number, (cwd, given) in enumerate(places.items()):
        monkeypatch.chdir(cwd)
        for i, path in enumerate(given):
            out = tmp_path / f"r{number}{i}"
            letters("--device", "cpu", "--results-dir", out, "--checkpoint-path", path)
            (record,) = results.load_records(out)
            names.add((record["run"], record["checkpoint"]["name"], record["checkpoint"]["step"]))
    assert names == {("run", "checkpoint-1", 1)}


def test_a_name_of_nothing_but_dots(tmp_path, capsys):
    saved = saved_checkpoint(tmp_path / "...", 1).rename(tmp_path / ".../....")
    for _ in range(2):
        letters("--device", "cpu", "--results-dir", tmp_path / "r", "--checkpoint-path", saved)
    (record,) = results.load_records(tmp_path / "r")
    assert (record["run"], record["checkpoint"]["name"]) == ("...", "....")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_config_that_was_used_is_a_part_of_what_was_measured(script, inputs, tmp_path):
    """Given with --config, or in a config.json beside the file: the wrong one, then the right."""
    words = [*inputs[script], str(tmp_path / "old.pt"), "--config", str(tmp_path / "shape.yaml")]
    config = json.loads((tmp_path / "shape.yaml").read_text())
    wrong = config | {"rope_theta": 5e5}
    for values in (wrong, config, wrong):
        (tmp_path / "shape.yaml").write_text(json.dumps(values))
        SCRIPTS[script].main(words)
    records = results.load_records(tmp_path / "r")
    assert sorted(r["checkpoint"]["config"]["rope_theta"] for r in records) == [1e4, 5e5]
    assert len({r["resume_key"] for r in records}) == 2
    assert len({r["config_hash"] for r in records}) == 1
    for record in records:
        results.load_arrays(record), results.load_samples(record)  # its own


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_tokenizer_is_guessed(script, inputs, tmp_path):
    """Text for a model whose vocabulary is not GPT-2's, without a tokenizer's files."""
    saved = save_model(tiny_model(vocab_size=65536), tmp_path / "run", 1, tokenizer=None)
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 50)
    words = [word for word in inputs[script] if word not in ("--tokenizer-name", "byte")]
    if script == "eval":
        shards = [*words, str(saved)]  # these need none
        SCRIPTS[script].main(shards)
        words = ["--val-data", str(tmp_path / "a.txt"), *words[words.index("--seq-len") :]]
    with pytest.raises(ValueError, match=r"its vocabulary of 65,536 is not GPT-2's: name the"):
        SCRIPTS[script].main([*words, str(saved)])

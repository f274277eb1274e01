"""evaluation.py: what all evaluations share, on one made for the purpose and on ours."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    CPU,
    PATIENCE,
    ROOT,
    Rank,
    run_ranks,
    saved_checkpoint,
    small_humaneval,
    small_mmlu,
    tiny_model,
    token_shard,
)

import cli
import durable
import eval as eval_script
import evaluation
import humaneval_eval
import mmlu_eval
import results
from backends import Facts
from backends.local import Local
from eval import PERPLEXITY
from evaluation import Evaluation, Folder, Outcome, Plan, Plans, measure
from humaneval_eval import HUMANEVAL
from mmlu_eval import MMLU
from tokenizer import build_tokenizer

SCRIPTS = {"eval": eval_script, "mmlu_eval": mmlu_eval, "humaneval_eval": humaneval_eval}
OURS = {"eval": PERPLEXITY, "mmlu_eval": MMLU, "humaneval_eval": HUMANEVAL}


@pytest.fixture(scope="module")
def byte():
    return build_tokenizer("byte")


# ---------------------------------------------------------------------------------------------
# An evaluation of its own: counts how often letters are the likeliest after a prompt


@dataclass(frozen=True)
class Options:
    prompt: str = cli.option("a", "what is asked")
    limit: int | None = cli.option(None, "no more than", type=cli.positive_int)
    compile: str = evaluation.compile_option()


def plan(options, facts):
    protocol = {"prompt": options.prompt, "dtype": facts.dtype, "tokenizer": facts.tokenizer.name}
    ids = facts.tokenizer.encode(options.prompt)
    evaluation.check_vocabulary(max(ids), facts)
    return Plan(protocol, {"hash": "d" * 64, "files": ["x"]}, list(ids), ("words",))


def run(backend, plan, folder):
    done = folder.known()
    folder.append({"prompt": plan.protocol["prompt"]})
    with torch.no_grad():
        hidden = backend.model.hidden(torch.tensor([plan.work]))[0, -1]
        value = float(backend.model.logits(hidden)[: plan.work[0]].sum())
    folder.write("values.txt", f"{value:g}\n")
    return Outcome(
        metrics={"value": results.metric(value, 0.5, 1)},
        arrays={"values": np.array([value])},
        protocol={"resumed": len(done)},
        samples=lambda: [{"value": value}],
        shown=plan,
    )


def show(records):
    print(*(f"{r['checkpoint']['name']}: {r.path.name}" for r in records))


SCRIPT = ROOT / "eval.py"  # whose code counts: one of the house
LETTERS = Evaluation(
    "letters", SCRIPT, Options, plan, run, show, table=lambda records: print("all", len(records))
)


# ---------------------------------------------------------------------------------------------
# Plans and keys

FACTS = Facts("a", 257, 256, "float32", tokenizer=build_tokenizer("byte"))


def test_models_of_one_kind_share_a_plan():
    made = []
    counted = replace(LETTERS, plan=lambda *args: made.append(args) or plan(*args))
    plans = Plans(counted, Options())
    first = plans.of(FACTS)
    assert plans.of(replace(FACTS, name="b")) is first and len(made) == 1
    twin = build_tokenizer("byte")  # another object of the same content
    assert plans.of(replace(FACTS, tokenizer=twin)) is first and len(made) == 1
    for change in (
        {"vocab_size": 300},
        {"context": 64},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"shares_prefixes": False},
        {"lacks": (("rows", "it cannot"),)},
        {"tokenizer": None},
    ):
        other = replace(FACTS, **change)
        assert other.kind != FACTS.kind
        if other.tokenizer:
            assert plans.of(other) is not first and plans.of(other) is plans.of(other)
            assert plans.of(FACTS) is not first
            first = plans.of(FACTS)


def test_a_tokenizers_place_is_no_part_of_the_configuration():
    one = Plan({"tokenizer": "run/checkpoint-1", "bos": False}, {}, None)
    two = Plan({"tokenizer": "run/checkpoint-2", "bos": False}, {}, None)
    assert one.config_hash == two.config_hash
    assert one.config_hash != Plan({"bos": True}, {}, None).config_hash


def test_two_sets_of_data_under_one_protocol_are_two_records(byte, tmp_path):
    """Neither takes the other's place."""
    for n in (150, 200):
        shard = token_shard(tmp_path / f"{n}.npy", n)
        options = {"data_mode": "fineweb_npy", "val_npy": (shard,), "seq_len": 16, "batch_size": 2}
        PERPLEXITY(tiny_model(), None, **options).save(tmp_path / "r")
    records = results.load_records(tmp_path / "r")
    assert sorted(r["data"]["tokens"] for r in records) == [150, 200]
    assert len({json.dumps(r["protocol"]) for r in records}) == 1


def test_the_format_and_the_backend_count_in_the_key_and_other_rooms_do_not(byte):
    made = plan(Options(), FACTS)
    keys = {
        evaluation.resume_key(PERPLEXITY, made, "f" * 64, *rooms)
        for rooms in (
            ("formats/tensorfiles.py", "backends/local.py"),
            ("formats/layouts.py", "backends/local.py"),
            ("formats/tensorfiles.py",),
            ("formats/tensorfiles.py", "backends/local.py"),
        )
    }
    assert len(keys) == 3
    assert evaluation.resume_key(PERPLEXITY, made, "e" * 64, "backends/local.py") not in keys


def test_the_key_of_a_record_is_the_one_that_was_planned(byte, tmp_path):
    """Of each of our evaluations, as a sweep plans it."""
    shard, mmlu = token_shard(tmp_path / "x.npy", 200), small_mmlu(tmp_path / "mmlu")
    problems = small_humaneval(tmp_path / "p.jsonl", 1)
    options = {
        PERPLEXITY: {"data_mode": "fineweb_npy", "val_npy": (str(shard),), "seq_len": 32},
        MMLU: {"data_path": str(mmlu)},
        HUMANEVAL: {"data_path": str(problems), "sampling": humaneval_eval.Sampling(4)},
    }
    info = {"name": "checkpoint-1", "fingerprint": "f" * 64}
    for each, values in options.items():
        backend, rooms = Local(tiny_model(), byte), ("backends/local.py",)
        made = each.plan(each.Options(**values), backend.facts)
        key = evaluation.resume_key(each, made, "f" * 64, *rooms)
        record = measure(each, backend, made, info=info, rooms=rooms)
        assert (record["resume_key"], record["config_hash"]) == (key, made.config_hash)
        path = evaluation.record_path(each, made, info, "run", tmp_path / "r")
        assert record.save(tmp_path / "r") == path == record.path
        loaded = results.load_record(path)
        assert loaded["words"] == record["words"] and loaded["examples"]["unit"]
        for metric, name in loaded["examples"]["scores"].items():
            assert metric in loaded["metrics"] and name in results.load_arrays(loaded)


# ---------------------------------------------------------------------------------------------
# A model in memory


def test_the_result_of_a_model_in_memory(byte, tmp_path):
    model = tiny_model()
    result = LETTERS(model, byte, prompt="abc", run="mine")
    assert (result["run"], result["checkpoint"]["name"]) == ("mine", "in-memory")
    assert result["protocol"] == {"prompt": "abc", "dtype": "float32", "tokenizer": "byte"} | {
        "resumed": 0
    }
    assert result.arrays["values"][0] == result["metrics"]["value"]["value"]
    assert result.shown.protocol["prompt"] == "abc" and result.path is None
    assert list(tmp_path.iterdir()) == []
    path = result.save(tmp_path, with_samples=False)
    assert results.load_samples(results.load_record(path)) == []
    result.save(tmp_path)
    assert results.load_samples(results.load_record(path)) == result.samples()
    json.dumps(result)  # a record is plain data; what lies beside it is no part


def test_an_unknown_option_is_no_option(byte):
    with pytest.raises(TypeError, match="letters has no option prompts"):
        LETTERS(tiny_model(), byte, prompts="abc")
    for kind, needed in ((MMLU, {"data_path": "x"}), (PERPLEXITY, {"val_data": ("x",)})):
        with pytest.raises(TypeError, match="no option add_bos"):
            kind(tiny_model(), byte, add_bos=True, **needed)


def test_what_is_said_of_the_checkpoint_is_asked_once_and_late(byte, tmp_path):
    asked = []

    def info():
        asked.append("info")
        return {"name": "c-1", "fingerprint": "f" * 64}

    slow = replace(LETTERS, run=lambda *args: asked.append("run") or run(*args))
    result = slow(tiny_model(), byte, info=info)
    assert asked == ["run", "info"] and result["checkpoint"]["name"] == "c-1"
    asked.clear()
    slow(tiny_model(), byte, info=info, results_dir=tmp_path)
    assert asked == ["run", "info"]


# ---------------------------------------------------------------------------------------------
# Where interrupted work goes on


def folder_of(path, key="k" * 64, rank=0, world_size=1):
    return Folder(Rank(rank, world_size, 0, CPU), lambda: (Path(path), key))


def test_a_folder_without_a_place_keeps_nothing():
    folder = Folder(Rank(0, 1, 0, CPU), None)
    assert folder.known() == [] and folder.path is None
    folder.append({"a": 1})
    folder.write("x.txt", "text")
    folder.close()


def test_entries_are_known_again_under_the_same_key(tmp_path):
    folder = folder_of(tmp_path)
    assert folder.known() == []
    folder.append({"a": 1})
    folder.close()
    again = folder_of(tmp_path)
    assert again.known() == [{"a": 1}]
    again.append({"a": 2})
    again.close()
    other = folder_of(tmp_path, key="other" * 10)
    assert other.known() == []
    other.close()
    assert folder_of(tmp_path).known() == [{"a": 1}, {"a": 2}]


def test_the_journals_of_all_ranks_are_read_and_one_is_written(tmp_path):
    for rank in range(3):
        folder = folder_of(tmp_path, rank=rank, world_size=3)
        folder.known()
        folder.append({"rank": rank})
        folder.write("values.txt", f"of rank {rank}")
        folder.close()
    assert (tmp_path / "values.txt").read_text() == "of rank 0"
    alone = folder_of(tmp_path)
    assert sorted(e["rank"] for e in alone.known()) == [0, 1, 2]
    with pytest.raises(ValueError, match="another process is writing"):
        folder_of(tmp_path).known()
    alone.close()


RESUMING = """
from test_evaluation import LETTERS
from tokenizer import build_tokenizer
info = {{"name": "c", "fingerprint": "f" * 64}} if dist.is_main else None
result = LETTERS(
    builders.tiny_model(), build_tokenizer("byte"), dist=dist, info=info, results_dir={folder!r}
)
result.pop("environment"), result["cost"].clear()
say("found", result["protocol"]["resumed"], result["resume_key"], sorted(result.items()))
"""


def test_ranks_share_what_was_there_and_get_the_same_record(tmp_path):
    keys, journals = set(), 0
    for ranks in (2, 3):
        out = run_ranks(ranks, tmp_path, RESUMING.format(folder=str(tmp_path / "r")))
        lines = [x.split(" ", 2) for x in out.stdout.splitlines() if x.startswith("found")]
        assert len(lines) == ranks and len({rest for *_, rest in lines}) == 1, out.stdout
        assert {int(resumed) for _, resumed, _ in lines} == {journals}
        keys.add(lines[0][2].split()[0])
        journals += ranks
    assert len(keys) == 1
    folder = next((tmp_path / "r").rglob("values.txt")).parent
    entries = [durable.read_journal(path)[0] for path in sorted(folder.glob("journal-*"))]
    assert [len(own) for own in entries] == [2, 2, 1]


# ---------------------------------------------------------------------------------------------
# What every evaluation checks


class Tokenizer:
    name, bos_token_id, adds_bos = "theirs", 1, True


def test_bos_is_auto_on_or_off(byte):
    adds, has, none = Tokenizer(), Tokenizer(), Tokenizer()
    has.adds_bos = none.adds_bos = False
    none.bos_token_id = None
    asked = {bos: [evaluation.resolve_bos(bos, t) for t in (adds, has)] for bos in ("auto", "on")}
    assert asked == {"auto": [True, False], "on": [True, True]}
    assert not any(evaluation.resolve_bos("off", t) for t in (adds, has, none))
    assert not evaluation.resolve_bos("auto", none)
    with pytest.raises(ValueError, match="--bos on: tokenizer theirs has no BOS token"):
        evaluation.resolve_bos("on", none)


def test_a_vocabulary_that_is_too_small():
    evaluation.check_vocabulary(256, FACTS)
    with pytest.raises(ValueError, match="byte gives token 257, the model has 257: name the"):
        evaluation.check_vocabulary(257, FACTS)


class Handle:
    def __init__(self, tokenizer=None, vocab_size=257):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size


def test_which_tokenizer(monkeypatch):
    monkeypatch.setattr(evaluation, "open_tokenizer", lambda name: f"opened {name}")
    pick = evaluation.pick_tokenizer
    assert pick("byte", Handle("run/c-1"), True) == "opened byte"  # the one named
    assert pick(None, Handle("run/c-1"), False) == "opened run/c-1"  # else its own
    assert pick(None, Handle(), True) == "opened gpt2"  # else GPT-2's
    for size in (50257, 50304):
        assert pick(None, Handle(vocab_size=size), False) == "opened gpt2"
    assert pick(None, Handle(), False) is None  # none is needed, and GPT-2's would be wrong


def test_copies_of_a_tokenizer_are_opened_once(tmp_path):
    one, two = saved_checkpoint(tmp_path, 1), saved_checkpoint(tmp_path, 2)
    opened = evaluation.open_tokenizer(one)
    assert evaluation.open_tokenizer(two) is opened
    assert evaluation.open_tokenizer("byte") is evaluation.open_tokenizer("byte")


# ---------------------------------------------------------------------------------------------
# Options are flags, keywords and a file's keys


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_a_flag_a_key_and_a_keyword(script, monkeypatch):
    kind, given = OURS[script], []
    monkeypatch.setattr(evaluation, "run_command", lambda each, args: given.append((each, args)))
    needed = ["--val-data", "x"] if script == "eval" else ["--data-path", "x"]
    SCRIPTS[script].main(["--checkpoint-path", "c", "d", *needed])
    [(found, args)] = given
    assert found is kind
    names = set(cli.option_names(kind.Options))
    assert names <= vars(args).keys()
    shared = (evaluation.ModelOptions, cli.PrecisionOptions, cli.RunOptions)
    offered = {name for options in shared for name in cli.option_names(options)} | names
    extra = {"mmlu_eval": {"log_samples"}, "humaneval_eval": {"samples_file", "ignore_incomplete"}}
    assert vars(args).keys() == offered | extra.get(script, set())  # and nothing does nothing
    values = {name: getattr(args, name) for name in names}
    read = cli.read_options(kind.Options, args)
    assert read == cli.read_options(kind.Options, values)
    written = {n: v for n, v in values.items() if v not in (None, ())}
    assert read == cli.read_options(kind.Options, cli.convert_options(kind.Options, written, "y"))
    for f in fields(kind.Options):
        assert f.metadata.get("help") or f.name == "sampling", f"{f.name} says nothing of itself"


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


def letters(*argv):
    evaluation.main(LETTERS, [str(word) for word in argv], "Letters.")


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
    evaluation.main(counted, [str(x) for x in (*flags, tmp_path / "run")], "Letters.")
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


def test_float32_is_the_reference(tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        dist = Rank(0, 1, 0, CPU)
        assert evaluation.set_precision(cli.PrecisionOptions(bf16=True), dist) == "bfloat16"
        assert torch.get_float32_matmul_precision() == "medium"
        assert evaluation.set_precision(cli.PrecisionOptions(), dist) == "float32"
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_frame_loads_torch_only_when_a_model_runs():
    code = "import sys, evaluation, humaneval_eval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""evaluation.py: what all evaluations share, on one made for the purpose and on ours."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    CPU,
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
        evaluation.resume_key(PERPLEXITY, made, {"fingerprint": "f" * 64}, *rooms)
        for rooms in (
            ("formats/tensorfiles.py", "backends/local.py"),
            ("formats/layouts.py", "backends/local.py"),
            ("formats/tensorfiles.py",),
            ("formats/tensorfiles.py", "backends/local.py"),
        )
    }
    assert len(keys) == 3
    other = {"fingerprint": "e" * 64}
    assert evaluation.resume_key(PERPLEXITY, made, other, "backends/local.py") not in keys


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
        key = evaluation.resume_key(each, made, info, *rooms)
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
    path = Path("run/c-1")

    def __init__(self, tokenizer=None, vocab_size=257, native=True):
        self.tokenizer, self.vocab_size, self.native = tokenizer, vocab_size, native


def test_which_tokenizer(monkeypatch):
    """GPT-2's is never guessed for another vocabulary: that it is large enough says nothing."""
    monkeypatch.setattr(evaluation, "open_tokenizer", lambda name: f"opened {name}")
    pick = evaluation.pick_tokenizer
    assert pick("byte", Handle("run/c-1"), True) == "opened byte"  # the one named
    assert pick(None, Handle("run/c-1"), False) == "opened run/c-1"  # else its own
    for size in (50257, 50304):
        for needed in (True, False):
            assert pick(None, Handle(vocab_size=size), needed) == "opened gpt2"
    assert pick(None, Handle(vocab_size=50257, native=False), True) == "opened gpt2"
    # Pythia's padded size; OPT's, whose ids are GPT-2's shifted; RoBERTa's; one token more
    others = [Handle(vocab_size=50304, native=False)]
    others += [Handle(vocab_size=n) for n in (257, 50258, 50265, 50272, 65536, 128256, 151936)]
    for handle in others:
        assert pick(None, handle, False) is None  # none is needed
        with pytest.raises(ValueError, match="run/c-1 has no tokenizer files") as error:
            pick(None, handle, True)
        assert f"{handle.vocab_size:,}" in str(error.value) and "--tokenizer-name" in str(
            error.value
        )
        assert pick("byte", handle, True) == "opened byte"


def test_copies_of_a_tokenizer_are_opened_once(tmp_path):
    one, two = saved_checkpoint(tmp_path, 1), saved_checkpoint(tmp_path, 2)
    opened = evaluation.open_tokenizer(one)
    assert evaluation.open_tokenizer(two) is opened
    assert evaluation.open_tokenizer("byte") is evaluation.open_tokenizer("byte")


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

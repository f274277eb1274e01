"""results.py: records written, found again, refused, and those of version 1 read as version 2."""

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from made_up_records import VERSION_1, make_record

import durable
import results

ROOT = Path(results.__file__).parent


def test_record_round_trip(tmp_path):
    record = make_record()
    arrays = {"correct": np.array([True, False]), "logprobs": np.random.rand(2, 4)}
    path = results.save_record(tmp_path, record, arrays, [{"q": "é"}, {"q": 2}])
    hashed = results.config_hash(record["protocol"])
    directory = tmp_path / "base" / "checkpoint-10-abababab"
    assert path == directory / f"mmlu-{hashed[:8]}.json"
    assert sorted(p.suffix for p in directory.iterdir()) == [".json", ".jsonl", ".npz"]
    loaded = results.load_record(path)
    assert {k: v for k, v in loaded.items() if k[0] != "_" and k != "files"} == {
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
        tmp_path / "results", make_record(evaluation="perplexity", metrics={"a": results.metric(1)})
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


# ---------------------------------------------------------------------------------------------
# Metrics, and fields that must be as the schema says


def test_a_share_has_the_error_of_a_proportion():
    right = np.random.default_rng(0).random(57) < 0.3
    found = results.share(int(right.sum()), 57)
    error = scipy.stats.sem(right.astype(float))
    assert found == {
        "value": right.mean(),
        "stderr": pytest.approx(error),
        "n": 57,
        "better": "higher",
        "unit": "share",
    }
    assert results.metric(3) == {"value": 3, "better": "higher"}
    with pytest.raises(AssertionError, match="'lower' or 'higher'"):
        results.metric(3, better="up")


def test_words_of_the_data():
    assert results.data_words({"tokens": 1003, "files": ["a/x.npy"]}) == ["1,003 tokens", "x.npy"]
    assert results.data_words({"files": ["a", "b"]}) == ["2 files"]
    assert results.data_words({"files": 57, "tokens": None}) == []


UNSAID = {"unit": "questions", "scores": {"accuracy": "correct"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": {"accuracy": 0.5}}, "metric 'accuracy' must be an object with value and"),
        ({"metrics": {"accuracy": {"value": 1}}}, "metric 'accuracy' must be an object with"),
        ({"metrics": {"a": {"value": 1, "better": "more"}}}, "metric 'a' must be an object with"),
        ({"status": "fine"}, "field 'status' must be 'ok' or 'failed'"),
        ({"words": "5-shot"}, "field 'words' must be a list of texts"),
        ({"words": [5]}, "field 'words' must be a list of texts"),
        ({"examples": {"scores": {"accuracy": "correct"}}}, "field 'examples' is not what"),
        ({"examples": UNSAID | {"scores": {}}}, "field 'examples' is not what"),
        ({"examples": UNSAID | {"weight": 3}}, "field 'examples' is not what"),
        ({"examples": UNSAID | {"tie_break": ["x"]}}, "field 'examples' is not what"),
        ({"examples": UNSAID | {"labels": {"x": "{:>99999999999}"}}}, "field 'examples' is not"),
        ({"examples": UNSAID | {"labels": {"x": "{0.__class__}"}}}, "field 'examples' is not what"),
    ],
)
def test_a_record_that_does_not_say_what_its_numbers_are(change, message, tmp_path):
    path = results.save_record(tmp_path, make_record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        results.load_record(path)
    with pytest.raises(AssertionError):
        results.save_record(tmp_path, make_record(metrics={"accuracy": 0.5}))


# ---------------------------------------------------------------------------------------------
# Version 1


def version_1():
    return {(r["evaluation"], r["checkpoint"]["step"]): r for r in results.load_records(VERSION_1)}


def test_version_1_says_what_its_numbers_are():
    records = version_1()
    assert len(records) == 6 and {r["_version"] for r in records.values()} == {1}
    assert {r["schema_version"] for r in records.values()} == {2}
    perplexity, mmlu, humaneval = (records[n, 10] for n in ("perplexity", "mmlu", "humaneval"))
    stored = json.loads(Path(mmlu["_path"]).read_text())
    assert stored["schema_version"] == 1 and "words" not in stored
    for name, metric in mmlu["metrics"].items():
        old = stored["metrics"][name]
        assert metric["value"] == (old["value"] if isinstance(old, dict) else old)
    better = {n: m["better"] for r in records.values() for n, m in r["metrics"].items()}
    assert {n for n, b in better.items() if b == "lower"} == {
        *("loss", "perplexity", "bits_per_byte", "ece", "brier", "ties")
    }
    assert perplexity["metrics"]["loss"]["unit"] == "nats per token"
    assert perplexity["words"] == ["window 32", "stride 32", "float32", "1,003 tokens", "x.npy"]
    assert mmlu["words"] == ["lm_eval", "letter", "1-shot", "float32", "1,287 tokens"]
    assert humaneval["words"][:3] == ["4 samples", "temperature 0.8", "top-p 0.95"]


def test_version_1_arrays_hold_what_version_2_keeps():
    for (evaluation, _), record in version_1().items():
        arrays = results.load_arrays(record)
        examples = record["examples"]
        for name, array in examples["scores"].items():
            scores, weight = arrays[array], arrays.get(examples.get("weight"), None)
            mean = scores.mean() if weight is None else scores.sum() / weight.sum()
            assert mean == pytest.approx(record["metrics"][name]["value"], rel=1e-12), name
        labels = examples["labels"].keys() & arrays.keys()
        assert labels == {{"perplexity": "start", "mmlu": "subject"}.get(evaluation, "task_id")}
        if evaluation == "mmlu":
            logprobs = arrays["logprobs"] - np.log(np.exp(arrays["logprobs"]).sum(1))[:, None]
            right = logprobs[np.arange(18), arrays["gold"]]
            assert arrays["gold_logprob"] == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("stride, bos", [(32, False), (12, False), (12, True)])
def test_version_1_windows_start_where_version_2_says(stride, bos):
    from dataset import Windows
    from recording.version_1 import arrays_from_version_1

    windows = Windows(1003, 32, stride, bos)
    ids = np.arange(len(windows))
    protocol = {"window": 32, "stride": stride, "bos": bos, "windows": "exact"}
    found = arrays_from_version_1(
        {"protocol": protocol, "metrics": {}}, {"nll": np.zeros(len(ids))}
    )
    assert np.array_equal(found["start"], windows.target_span(ids)[0])


def test_version_1_is_never_rewritten(tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(VERSION_1, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for record in results.load_records(folder):
        results.load_arrays(record), results.scalars(record)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("change", [{"metrics": [1]}, {"protocol": 3}, {"data": "x"}])
def test_version_1_of_the_wrong_kind_is_refused(change, tmp_path):
    (path,) = VERSION_1.glob("*/checkpoint-10-*/mmlu*.json")
    other = tmp_path / "x.json"
    other.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="must be an object"):
        results.load_record(other)

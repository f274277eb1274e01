"""eval.py --reference as users start it: the record, the columns, the same bits on two ranks."""

import re
from pathlib import Path

import numpy as np
import pytest
from builders import error_of, saved_checkpoint, token_shard, torchrun

import checkpoint
import eval
import results
import sweep
from checkpoint import Checkpoint

FLAGS = ["--data-mode", "fineweb_npy", "--seq-len", "32", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run/checkpoint-10, -20, -30; large/checkpoint-10 of another vocabulary; x.npy"""
    folder = tmp_path_factory.mktemp("place")
    for step in (10, 20, 30):
        saved_checkpoint(folder / "run", step)
    saved_checkpoint(folder / "large", vocab_size=300)
    token_shard(folder / "x.npy")
    return folder


def words(place, name, *flags):
    data = ["--val-npy", place / "x.npy", "--results-dir", place / name]
    return [str(word) for word in (*FLAGS, *data, *flags)]


def records(place, name):
    found = results.load_records(place / name)
    return {r["checkpoint"]["name"]: r for r in found}


def test_each_column_against_the_first(place, capsys, monkeypatch):
    """The first one against itself, the others against it; the reference is loaded twice, once as
    a column and once as what they are compared with."""
    loaded, load = [], Checkpoint.load
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoint,
            "load",
            lambda self, *a, **more: loaded.append(self.name) or load(self, *a, **more),
        )
        eval.main(words(place, "first", "--checkpoint-path", place / "run", "--reference", "first"))
    assert sorted(loaded) == ["checkpoint-10", "checkpoint-10", "checkpoint-20", "checkpoint-30"]
    out = capsys.readouterr().out
    found = records(place, "first")
    assert [found[f"checkpoint-{n}"]["metrics"]["kl"]["value"] == 0 for n in (10, 20, 30)] == [
        *(True, False, False)
    ]
    first, other = found["checkpoint-10"], found["checkpoint-20"]
    assert first["config_hash"] == other["config_hash"]  # one table
    about = other["protocol"]["reference"]
    fingerprint = checkpoint.open(place / "run/checkpoint-10").fingerprint
    assert (about["name"], about["fingerprint"]) == ("checkpoint-10", fingerprint)
    assert about["dtype"] == "float32"
    assert "against checkpoint-10 in float32" in other["words"]
    metrics = other["metrics"]
    change = metrics["loss"]["value"] - first["metrics"]["loss"]["value"]
    assert metrics["ln_ppl_ratio"]["value"] == pytest.approx(change, rel=1e-6)
    assert next(iter(metrics)) == "loss" and metrics["same_top"]["unit"] == "share"
    arrays = results.load_arrays(other)
    assert len(arrays["token_kl"]) == other["data"]["tokens_scored"]
    mean = arrays["kl"].sum() / arrays["count"].sum()
    assert mean == pytest.approx(metrics["kl"]["value"]) and mean > 0
    assert arrays["token_kl"].mean() == pytest.approx(mean, rel=1e-4)
    table = re.findall(r"^checkpoint-\d0 .*%$", out, re.M)
    assert len(table) == 3 and table[0].endswith("0.000000   100.00%")
    assert out.count("against checkpoint-10 in float32, token by token:") == 3
    kld = other["breakdown"]["divergence"]["Mean KLD"]
    assert f"{kld['value']:.6f}" in out and kld["stderr_tokens"] != kld["stderr"]


def test_without_a_reference_nothing_is_new(place):
    """The record, its key and its place are those that it had."""
    eval.main(words(place, "plain", "--checkpoint-path", place / "run/checkpoint-20"))
    eval.main(
        words(
            *(place, "against", "--checkpoint-path", place / "run/checkpoint-20"),
            *("--reference", place / "run/checkpoint-10"),
        )
    )
    plain = records(place, "plain")["checkpoint-20"]
    against = records(place, "against")["checkpoint-20"]
    assert "reference" not in plain["protocol"] and "kl" not in plain["metrics"]
    assert plain["config_hash"] != against["config_hash"]
    for name, metric in plain["metrics"].items():
        assert against["metrics"][name] == metric, name


def test_two_ranks_give_the_same_bits(place):
    """Two make the states and one reads them; one makes its own."""
    flags = ["--checkpoint-path", place / "run/checkpoint-20", "--stride", "12"]
    flags += ["--reference", place / "run/checkpoint-10"]
    torchrun(2, "eval.py", *words(place, "two", *flags))
    [states] = (place / "two/.references").iterdir()
    assert sorted(p.name for p in states.iterdir()) == ["journal-0", "journal-1", "states"]
    times = (states / "states").stat().st_mtime_ns
    two = records(place, "two")["checkpoint-20"]
    with_both = results.load_arrays(two)
    eval.main(words(place, "two", *flags))  # alone, from what two ranks kept
    assert (states / "states").stat().st_mtime_ns == times
    eval.main(words(place, "one", *flags))
    for name in ("two", "one"):
        record = records(place, name)["checkpoint-20"]
        assert record["metrics"] == two["metrics"]
        assert record["breakdown"] == two["breakdown"]
        arrays = results.load_arrays(record)
        assert arrays.keys() == with_both.keys()
        assert all(np.array_equal(arrays[key], with_both[key]) for key in arrays)


def test_the_precision_of_the_reference(place):
    """bfloat16 against float32 of the same weights: the floor under any other figure."""
    one = place / "run/checkpoint-10"
    flags = ["--checkpoint-path", one, "--reference", one, "--dtype", "bfloat16"]
    eval.main(words(place, "same", *flags))
    eval.main(words(place, "floor", *flags, "--reference-dtype", "fp32"))
    same, floor = (records(place, name)["checkpoint-10"] for name in ("same", "floor"))
    assert same["metrics"]["kl"]["value"] == 0
    assert 0 < floor["metrics"]["kl"]["value"] < 0.1
    assert floor["protocol"]["reference"]["dtype"] == "float32"
    assert floor["protocol"]["dtype"] == "bfloat16"


def test_a_sweep_with_a_reference(place, tmp_path):
    """Of the YAML file; one that cannot be compared fails alone."""
    options = [f"val-npy: {place / 'x.npy'}", "data-mode: fineweb_npy", "seq-len: 32"]
    options += ["batch-size: 4", f"reference: {place / 'run/checkpoint-10'}"]
    (tmp_path / "e.yaml").write_text(f"perplexity: {{{', '.join(options)}}}\n")
    paths = [place / "run/checkpoint-10", place / "run/checkpoint-20", place / "large"]
    argv = ["--checkpoint-path", *paths, "--evaluations", tmp_path / "e.yaml", "--device", "cpu"]
    with pytest.raises(SystemExit):
        sweep.main([*map(str, argv), "--results-dir", str(tmp_path / "r")])
    found = results.load_records(tmp_path / "r")
    values = [r["metrics"]["kl"]["value"] for r in found if r["status"] == "ok"]
    assert len(values) == 2 and values.count(0) == 1
    assert ["vocabulary of 257" in r["reason"] for r in found if r["status"] != "ok"] == [True]


def test_what_is_wrong_is_one_line(place):
    """Before anything is loaded: exit 2, no record."""
    good = ["--checkpoint-path", place / "run/checkpoint-10"]
    line = error_of(
        "eval.py", *words(place, "no", *good, "--reference", place / "large/checkpoint-10")
    )
    assert "has a vocabulary of 300, checkpoint-10 one of 257" in line
    line = error_of("eval.py", *words(place, "no", *good, "--reference", place / "lost"))
    assert "lost" in line
    line = error_of("eval.py", *words(place, "no", *good, "--reference-dtype", "bf16"))
    assert line == "error: --reference-dtype goes with --reference PATH"
    served = ["--endpoint", "http://x", "--reference", place / "run/checkpoint-10"]
    text = ["--val-data", Path(__file__), "--results-dir", place / "no"]
    line = error_of("eval.py", *map(str, [*served, *text]))
    assert line == "error: --reference goes with checkpoints, not with --endpoint"
    assert not list((place / "no").rglob("*.json"))

"""Served models in a sweep's YAML: the records of the commands, done once, and what fails."""

import pytest
import yaml
from builders import saved_checkpoint, small_mmlu, tiny_model, token_shard
from stub_server import StubServer

import mmlu_eval
import report
import results
import sweep
from endpoints.client import Client


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=1024, n_layers=1)


@pytest.fixture
def data(tmp_path):
    """{evaluation: its flags} of small data."""
    token_shard(tmp_path / "x.npy", 301)
    small_mmlu(tmp_path / "mmlu", ["anatomy"])
    perplexity = {"data-mode": "fineweb_npy", "val-npy": str(tmp_path / "x.npy"), "seq-len": 32}
    return {
        "perplexity": perplexity,
        "mmlu": {"data-path": str(tmp_path / "mmlu"), "num-few-shot": 1},
    }


def run(folder, asked, *more):
    """(exit code, records)"""
    file, code = folder / "e.yaml", 0
    file.write_text(yaml.safe_dump(asked))
    words = ["--device", "cpu", "--evaluations", file, "--results-dir", folder / "r", *more]
    try:
        sweep.main([*map(str, words)])
    except SystemExit as stop:
        code = stop.code
    return code, results.load_records(folder / "r")


def named(records):
    """{(checkpoint, evaluation): record}, each there once."""
    found = {(r["checkpoint"]["name"], r["evaluation"]): r for r in records}
    assert len(found) == len(records)
    return found


def test_a_served_model_is_evaluated_beside_checkpoints(model, data, tmp_path, capsys):
    path = saved_checkpoint(tmp_path / "run")
    with StubServer(model, context=1024) as server:
        asked = data | {"endpoint": {"url": server.url, "tokenizer-name": "byte"}}
        code, records = run(tmp_path, asked, "--checkpoint-path", path)
        records = named(records)
        assert code == 0 and set(records) == {
            (name, e) for name in ("tiny", "checkpoint-10") for e in ("perplexity", "mmlu")
        }
        assert "served models: 2 made, 0 done before, 0 failed" in capsys.readouterr().out
        n_asked = len(server.bodies)
        code, again = run(tmp_path, asked)
        assert code == 0 and named(again) == records
        assert "0 made, 2 done before" in capsys.readouterr().out
        assert len(server.bodies) - n_asked < n_asked  # the probe
        mmlu = data["mmlu"]
        words = ["--endpoint", server.url, "--tokenizer-name", "byte", "--num-few-shot", "1"]
        words += ["--data-path", mmlu["data-path"], "--results-dir", str(tmp_path / "alone")]
        mmlu_eval.main(words)
    (alone,) = results.load_records(tmp_path / "alone")
    served = records["tiny", "mmlu"]
    assert served["resume_key"] == alone["resume_key"] and served["metrics"] == alone["metrics"]
    report.main([str(tmp_path / "r")])
    shown = capsys.readouterr().out
    assert "tiny" in shown and "checkpoint-10" in shown


def test_what_a_server_cannot_do_fails_alone(model, data, tmp_path, capsys):
    """Perplexity without scores of prompts; answers are there."""
    with StubServer(model, lie="null", context=1024) as server:
        asked = data | {"endpoint": [{"url": server.url, "tokenizer-name": "byte"}]}
        asked["mmlu"] |= {"scoring": "generate"}
        code, records = run(tmp_path, asked)
        records = named(records)
        assert code == 1 and records["tiny", "mmlu"]["status"] == "ok"
        failed = records["tiny", "perplexity"]
        assert failed["status"] == "failed" and "log-probabilities" in failed["reason"]
        server.lie = None  # mended, it is tried again
        code, records = run(tmp_path, asked)
    assert code == 0 and {r["status"] for r in records} == {"ok"}
    assert {r["evaluation"] for r in records} == {"perplexity", "mmlu"}


def test_a_server_that_is_not_there(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Client.__init__, "__defaults__", (1, 600.0, 0.001))
    asked = data | {"endpoint": {"url": "http://127.0.0.1:9", "tokenizer-name": "byte"}}
    code, records = run(tmp_path, asked)
    assert code == 1 and len(records) == 2
    assert {r["status"] for r in records} == {"failed"}
    assert "served models: 0 made, 0 done before, 2 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "endpoint, more, message",
    [
        ({"model": "m"}, {}, "must hold `url"),
        ("http://h:1", {}, "must hold `url"),
        ({"url": "http://h:1"}, {}, "needs tokenizer-name"),
        ({"url": "http://h:1", "tokenizer-name": "byte", "what": 1}, {}, "no option --what"),
        ({"url": "http://h:1", "tokenizer-name": "byte", "concurrency": 0}, {}, "--concurrency"),
        ({"url": "http://h:1", "tokenizer-name": "byte"}, {"quantise": ["rtn-w8"]}, "its own"),
        ({"url": "http://h:1", "tokenizer-name": "byte"}, {"reference": "x"}, "wants checkpoints"),
    ],
)
def test_refused_in_one_line(endpoint, more, message, data, tmp_path):
    asked = data | {"endpoint": endpoint}
    asked["perplexity"] |= more
    with pytest.raises(ValueError, match=message):
        run(tmp_path, asked)

"""The probe's verdict on servers that others wrote: quick, on what they answered once (fixtures/
served, made by make_served.py), and slow, on themselves, where ROSEVAL_SERVERS names their
environments."""

import json
from pathlib import Path

import numpy as np
import pytest
from peers import COMMANDS, place_of, serving
from recorded import RecordedTokenizer, Replayer

import mmlu_eval
import results
from backends import Sampling
from checkpoint import load_model
from endpoints.client import Client
from endpoints.probing import probe
from tokenizer import build_tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "served"
FILES = sorted(FIXTURES.glob("*.json"))
# route, token ids, letters, streams, stop, and what is said of scores
VERDICTS = {
    "vllm": ("/v1/completions", True, "by id", True, "kept", ""),
    "transformers": ("/v1/completions", False, "", True, "kept", "no log-probabilities of the pro"),
    "llama.cpp": ("/completion", True, "by id", True, "cut", "llama.cpp gives none"),
    "llama-cpp-python": (
        *("/v1/completions", False, "likeliest", False, "cut"),
        "19 log-probabilities come back for 19 tokens and one more",
    ),
}


def check_verdict(probed, name, kind):
    """All of them repeat a sample by its seed, and read texts as our tokenizer does."""
    assert probed.samples and probed.seed
    if kind == "chat":
        assert probed.server == "chat" and probed.route == "/v1/chat/completions"
        assert probed.scores and not probed.letters and not probed.token_ids
        return
    assert probed.server == name and probed.tokenizer in ("token ids", "counts of tokens")
    found = (probed.route, probed.token_ids, probed.letters, probed.streams, probed.stop)
    assert found == VERDICTS[name][:5] and probed.scores.startswith(VERDICTS[name][5])
    if not probed.scores:
        assert probed.against_generation and not probed.greedy
    assert probed.adds_bos is False  # SmolLM2 has none before a text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_verdict_on_recorded_answers(file):
    assert file.stat().st_size <= 200 << 10
    found = json.loads(file.read_text())
    tokenizer = RecordedTokenizer(said=found["tokenizer"])
    with Replayer(found["said"]) as server:
        client = Client(server.url)
        probed, route = probe(client, "smollm2", tokenizer, found["kind"])
    assert server.unknown == []
    check_verdict(probed, found["server"], found["kind"])
    if route.streams:  # each token's time is known where they come one by one
        told = [timing for timing in client.timings if timing.first is not None]
        assert told and all(len(timing.gaps) <= timing.tokens for timing in told)


def test_every_server_was_recorded():
    assert {file.stem for file in FILES} == {*COMMANDS, *(f"{name}-chat" for name in COMMANDS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_verdict_on_the_server_itself(name):
    tokenizer = build_tokenizer(place_of("ROSEVAL_MODEL"))
    with serving(name) as url:
        for kind in (None, "chat"):
            probed, route = probe(Client(url), "smollm2", tokenizer, kind)
            check_verdict(probed, name, kind)
            drawn = route.draw("Say yes.", Sampling(max_new_tokens=4))
            assert drawn.text and drawn.finish in ("stop", "length")


@pytest.mark.slow
def test_vllm_finds_on_mmlu_what_we_find(tmp_path, data_dir):
    """Letters by one generated token's values, by their ids; whole choices by echo."""
    place = place_of("ROSEVAL_MODEL")
    model, tokenizer = load_model(place, "float32", "cpu"), build_tokenizer(place)
    with serving("vllm") as url:
        for scoring, limit in (("letter", 10), ("continuation", 3)):
            words = ["--endpoint", url, "--tokenizer-name", place, "--subjects", "global_facts"]
            words += ["--data-path", data_dir / "mmlu", "--limit", limit, "--scoring", scoring]
            words += ["--num-few-shot", 2, "--results-dir", tmp_path / scoring]
            mmlu_eval.main([*map(str, words)])
            (record,) = results.load_records(tmp_path / scoring)
            arrays = results.load_arrays(record)
            wanted = mmlu_eval.evaluate_mmlu(
                *(model, tokenizer, data_dir / "mmlu", 2),
                scoring=scoring, limit=limit, subjects=("global_facts",),
            )  # fmt: skip
            difference = np.abs(arrays["logprobs"] - wanted.arrays["logprobs"]).max()
            print(f"{scoring}: {limit} questions, nats differ by {difference:.1e} at most")
            np.testing.assert_array_equal(arrays["predicted"], wanted.arrays["predicted"])
            assert difference < 1e-3
            about = record["protocol"]["endpoint"]
            assert (about["server"], about["letters"]) == ("vllm", "by id")
            if scoring == "letter":
                assert record["cost"]["requests"] == limit

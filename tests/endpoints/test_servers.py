"""The probe's verdict on servers that others wrote: quick, on what they answered once (fixtures/
served, made by make_served.py), and slow, on themselves, where ROSEVAL_SERVERS names their
environments."""

import json
from pathlib import Path

import pytest
from peers import COMMANDS, place_of, serving
from recorded import RecordedTokenizer, Replayer

from backends import Sampling
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

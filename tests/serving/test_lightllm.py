"""lightllm's /generate as OpenCompass asks and reads it, and /metrics."""

import json

import numpy as np
import pytest
import torch
from servers import serving

from backends import Sampling
from endpoints.client import Client
from endpoints.native import Lightllm
from tokenizer import build_tokenizer


def test_samples_and_errors(client):
    status, said = client.ask(
        "/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 5, "return_details": True}}
    )
    (choice,) = client.complete(prompt="ab", max_tokens=5, temperature=0, logprobs=0)
    assert status == 200 and said["generated_text"] == [choice["text"]]
    assert (said["count_output_tokens"], said["prompt_tokens"]) == (5, 2)
    values = choice["logprobs"]["token_logprobs"]
    assert [token["logprob"] for token in said["tokens"]] == values
    assert said["tokens"][-1]["cumlogprob"] == pytest.approx(np.mean(values))
    drawn = {"do_sample": True, "seed": 3, "best_of": 2, "max_new_tokens": 4}
    _, said = client.ask("/generate", {"inputs": [97, 98], "parameters": drawn})
    wanted = client.complete(prompt="ab", n=2, seed=3, max_tokens=4)
    assert said["generated_text"] == [own["text"] for own in wanted]
    assert said["finish_reason"] == [own["finish_reason"] for own in wanted]
    for body in ({"inputs": "a"}, {"inputs": 1, "parameters": {}}, {"parameters": {}},
                 {"inputs": "a", "parameters": {"guided_json": "x"}}):  # fmt: skip
        status, said = client.ask("/generate", body)
        assert status == 417 and said["message"]


def test_a_stream_in_lightllms_shape(client):
    for parameters in ({"max_new_tokens": 9}, {"max_new_tokens": 24, "stop_sequences": ["e", "="]},
                       {"do_sample": True, "seed": 5, "max_new_tokens": 1}):  # fmt: skip
        body = {"inputs": "ab", "parameters": parameters}
        _, whole = client.ask("/generate", body)
        with client.open("/generate_stream", body) as reply:
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            lines = reply.read().decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data:{") for line in lines)
        told = [json.loads(line.removeprefix("data:")) for line in lines]
        assert "".join(one["token"]["text"] for one in told) == whole["generated_text"][0]
        assert [one["finished"] for one in told] == [False] * (len(told) - 1) + [True]
        assert told[-1]["finish_reason"] == whole["finish_reason"]
        counts = [one["token"]["count_output_tokens"] for one in told]
        assert counts == [*range(1, whole["count_output_tokens"] + 1)]
    many = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}
    assert client.ask("/generate_stream", many)[0] == 417


def test_our_own_client_reads_it(client, model):
    """The route for lightllm's servers, against ours in that shape."""
    asked = Client(client.url)
    route = Lightllm(asked, "any", build_tokenizer("byte"))
    whole = route.draw([97, 98], Sampling(max_new_tokens=7))
    route.streams = True
    assert route.draw([97, 98], Sampling(max_new_tokens=7)) == whole
    assert asked.timings[-1].tokens == 7 and len(asked.timings[-1].gaps) <= 6


@torch.no_grad()
def test_prompts_are_scored_as_opencompass_reads_them(checkpoint_path, model):
    """Its perplexity: the mean over all tokens but the first."""
    prompt = [104, 101, 108, 108, 111, 108]
    body = {"inputs": "hellol", "parameters": {"max_new_tokens": 1}}
    with serving(checkpoint_path, return_all_prompt_logprobs=True) as (client, _):
        _, said = client.ask("/generate", body)
    assert said["prompt_token_ids"] == prompt and said["count_output_tokens"] == 1
    told = [
        pair[1][str(after)] for pair, after in zip(said["prompt_logprobs"], prompt[1:], strict=True)
    ]
    assert [pair[0] for pair in said["prompt_logprobs"]] == prompt[:-1]
    logits = model.logits(model.hidden(torch.tensor([prompt])))[0].log_softmax(-1)
    wanted = [logits[i, after].item() for i, after in enumerate(prompt[1:])]
    assert told == pytest.approx(wanted, abs=1e-4)


def test_metrics_count(client):
    def read():
        with client.open("/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines
                if not line.startswith("#")}  # fmt: skip

    before = read()
    body = {"prompt": "abc", "max_tokens": 2, "temperature": 0, "n": 3, "echo": True, "logprobs": 1}
    _, said = client.ask("/v1/completions", body)
    after = read()
    key = 'roseval_requests_total{route="/v1/completions",status="200"}'
    assert after[key] == before.get(key, 0) + 1
    drawn = said["usage"]["completion_tokens"]
    for name, more in (("prompt", 3), ("scored", 3), ("drawn", drawn)):
        key = f"roseval_{name}_tokens_total"
        assert after[key] == before[key] + more, name
    assert after["roseval_sequences_unfinished"] == 0

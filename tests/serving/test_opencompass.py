"""Requests as OpenCompass' client classes make them (opencompass/models/: OpenAI, OpenAISDK,
LightllmAPI, LightllmChatAPI), and curl's, beside the same asked plainly."""

import json
import shutil
import subprocess

import pytest

MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


def greedy_chat(client, **more):
    body = {"messages": MESSAGES, "temperature": 0} | more
    status, said = client.ask("/v1/chat/completions", body)
    assert status == 200, said
    return said["choices"][0]


def test_openai_by_requests(client):
    """The whole URL of chats, nulls among the fields, the key twice."""
    body = {"model": "checkpoint-10", "messages": MESSAGES, "max_tokens": 8, "n": 1}
    body |= {"logprobs": False, "top_logprobs": None, "stop": None, "temperature": 0.0}
    key = {"Authorization": "Bearer EMPTY", "api-key": "EMPTY"}
    status, said = client.ask("/v1/chat/completions", body, key)
    assert status == 200
    assert said["choices"][0]["message"] == greedy_chat(client, max_tokens=8)["message"]
    assert said["usage"]["completion_tokens"] <= 8


def test_openai_sdk(client):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    theirs = openai.OpenAI(base_url=f"{client.url}/v1/", api_key="EMPTY", max_retries=0)
    query = {"model": "checkpoint-10", "max_tokens": 8, "n": 1, "messages": MESSAGES}
    query |= {"temperature": 0, "extra_body": {}, "timeout": 600}
    found = theirs.chat.completions.create(**query).choices[0]
    wanted = greedy_chat(client, max_tokens=8)
    assert (found.message.content, found.finish_reason) == (
        *(wanted["message"]["content"], wanted["finish_reason"]),
    )
    parts = theirs.chat.completions.create(**query, stream=True)  # OpenAISDKStreaming
    said = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(said) == wanted["message"]["content"]


def test_lightllm_generates_and_chats(client):
    kwargs = {"do_sample": False, "ignore_eos": False, "max_new_tokens": 6}
    status, said = client.ask("/generate", {"inputs": "ab", "parameters": kwargs})
    (choice,) = client.complete(prompt="ab", max_tokens=6, temperature=0)
    assert status == 200 and said["generated_text"] == [choice["text"]]
    status, said = client.ask("/v1/chat/completions", {"messages": MESSAGES})  # nothing else
    assert status == 200 and said["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(client):
    body = {"prompt": "ab", "max_tokens": 8, "seed": 1, "stream": True}
    words = ["curl", "-sN", f"{client.url}/v1/completions", "-d", json.dumps(body)]
    out = subprocess.run(
        [*words, "-H", "Content-Type: application/json"], capture_output=True, text=True, check=True
    ).stdout
    *events, done = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert done == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text == client.complete(prompt="ab", max_tokens=8, seed=1)[0]["text"]

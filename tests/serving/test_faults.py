"""What a server refuses, in whose shape, and what it does when clients go away."""

import http.client
import json
import math
import socket
from urllib.parse import urlsplit

import pytest
from builders import save_model, tiny_model, wait_for
from servers import Client, serving

REFUSED = [  # (body, the field, the code)
    ({"prompt": "a", "max_tokenz": 5}, "max_tokenz", "unsupported"),
    ({"prompt": "a", "best_of": 2}, "best_of", None),
    ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "unsupported"),
    ({"prompt": "a", "stream_options": {"what": 1}}, "stream_options.what", "unsupported"),
    ({"prompt": "a", "echo": True, "stream": True}, "echo", "unsupported"),
    ({"prompt": "a", "n": 0}, "n", None),
    ({"prompt": "a", "n": True}, "n", None),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", None),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", None),
    ({"prompt": "a", "temperature": -1}, "temperature", None),
    ({"prompt": "a", "temperature": math.nan}, "temperature", None),
    ({"prompt": "a", "top_p": 0}, "top_p", None),
    ({"prompt": "a", "logprobs": 21}, "logprobs", None),
    ({"prompt": "a", "stop": [1]}, "stop", None),
    ({"prompt": "a", "seed": "x"}, "seed", None),
    ({"prompt": "a" * 257}, "prompt", "context_length_exceeded"),
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": [257]}, "prompt", None),
    ({"prompt": [-1]}, "prompt", None),
    ({"prompt": [1, True]}, "prompt", None),
    ({"prompt": [[1], 2]}, "prompt", None),
    ({"prompt": {"a": 1}}, "prompt", None),
    ({}, "prompt", None),
    ({"prompt": ["a"] * 2000}, "prompt", None),
    ({"prompt": ["a"] * 600, "n": 2}, "n", None),
    (b"", None, None),
    (b"[1]", None, None),
    (b'{"prompt": "a", "prompt": "b"}', None, None),
    (b"[" * 100_000, None, None),
    (b'{"prompt": ' + b"1" * 9000 + b"}", None, None),
    (b"\xff", None, None),
]


def test_what_is_wrong_is_named(client, service):
    for body, param, code in REFUSED:
        status, said = client.ask("/v1/completions", body)
        assert status == 400, (body, said)
        error = said["error"]
        assert (error["param"], error["code"]) == (param, code), (body, error)
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    status, said = client.ask("/v1/completions", {"prompt": "a", "model": "other"})
    assert status == 404 and said["error"]["code"] == "model_not_found"
    for path, body, status in (("/v1/what", None, 404), ("/v1/completions", None, 405)):
        found, said = client.ask(path, body)
        assert found == status and said["error"]["message"]
    assert service.unfinished == 0 and client.complete(prompt="a", max_tokens=1)


@pytest.mark.parametrize(
    "messages",
    [None, [], ["a"], [{"role": "user", "content": 1}], [{"content": "a"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]],
)  # fmt: skip
def test_messages_that_are_none(client, messages):
    status, said = client.ask("/v1/chat/completions", {"messages": messages})
    assert status == 400 and said["error"]["param"].startswith("messages")


def test_text_that_is_no_unicode_comes_back(client):
    (choice,) = client.complete(prompt="a\ud800", max_tokens=0, echo=True)
    assert choice["text"] == "a\ud800"


def test_neutral_fields_of_others_are_taken(client):
    body = {"best_of": 1, "repetition_penalty": 1.0, "logprobs": None, "user": "me", "min_p": 0}
    assert client.complete(prompt="a", max_tokens=1, **body)
    assert client.ask("/v1/completions", {"prompt": "a", "min_p": False})[0] == 400


def test_a_client_that_leaves_frees_its_rows(client, service):
    """Waiting for the whole, and in the middle of a stream; others go on."""
    where = urlsplit(client.url)
    for stream in (False, True):
        body = json.dumps({"prompt": "a", "n": 900, "max_tokens": 255, "stream": stream})
        line = http.client.HTTPConnection(where.hostname, where.port)
        line.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if stream:
            assert line.getresponse().readline().startswith(b"data: ")
        wait_for(lambda: service.unfinished > 800)
        line.sock.shutdown(socket.SHUT_RDWR)
        line.close()
        wait_for(lambda: service.unfinished == 0)
        wait_for(lambda: not service.work.engine.requests)
    assert client.complete(prompt="a", max_tokens=2)


def test_too_many_are_told_to_come_again(client, service):
    where = urlsplit(client.url)
    body = json.dumps({"prompt": "a", "n": 1000, "max_tokens": 255})
    line = http.client.HTTPConnection(where.hostname, where.port)
    line.request("POST", "/v1/completions", body)
    wait_for(lambda: service.unfinished > 900)
    with client.open("/v1/completions", {"prompt": "a", "n": 200}) as reply:
        assert reply.status == 429 and int(reply.headers["Retry-After"]) >= 1
        assert json.load(reply)["error"]["type"] == "rate_limit_error"
    line.close()
    wait_for(lambda: service.unfinished == 0)


def test_keys_bodies_and_a_model_of_nan(tmp_path, checkpoint_path):
    with serving(checkpoint_path, key="secret", max_body=1000, max_rows=2) as (client, _):
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer secre"}):
            status, said = client.ask("/v1/models", headers=headers)
            assert status == 401 and said["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer secret"}
        assert client.ask("/v1/models", headers=key)[0] == 200
        assert client.ask("/health")[0] == 200
        status, said = client.ask("/v1/completions", {"prompt": "a" * 1000}, key)
        assert status == 413 and "1,000" in said["error"]["message"]
    model = tiny_model()
    model.blocks[0].ln1.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"), serving(save_model(model, tmp_path)):
        pass


def test_an_engine_that_broke_says_so(checkpoint_path):
    """Whoever waits is told, and so is who asks later."""
    with serving(checkpoint_path) as (client, service):
        service.work.engine.step = lambda: 1 / 0
        status, said = client.ask("/v1/completions", {"prompt": "a"})
        assert status == 500 and said["error"]["type"] == "server_error"
        assert isinstance(service.error, ZeroDivisionError)
        assert Client(client.url).ask("/health")[0] == 503
        assert client.ask("/v1/completions", {"prompt": "a"})[0] == 503

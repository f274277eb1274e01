"""A server of this process: real HTTP on loopback, in a thread."""

import contextlib
import json
import threading
import urllib.error
import urllib.request

import pytest
import torch
from builders import PATIENCE, wait_for

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

import cli
import serve
from distributed import Dist
from serving.routes import Door, make_app
from serving.service import Service

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Client:
    """What a server at a URL answers."""

    def __init__(self, url):
        self.url = url

    def open(self, path, body=None, headers=()):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        asked = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **dict(headers)}
        )
        try:
            return urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            return error

    def ask(self, path, body=None, headers=()):
        """(status, what its JSON says)"""
        with self.open(path, body, headers) as reply:
            return reply.status, json.load(reply)

    def complete(self, **body):
        """The choices of a completion."""
        status, said = self.ask("/v1/completions", body)
        assert status == 200, said
        return said["choices"]

    def stream(self, path, **body):
        """The chunks of a stream, [DONE] among them."""
        with self.open(path, body | {"stream": True}) as reply:
            lines = reply.read().decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        words = [line.removeprefix("data: ") for line in lines]
        return [word if word == "[DONE]" else json.loads(word) for word in words]


@contextlib.contextmanager
def serving(path, key=None, **options):
    """(Client, Service) of a checkpoint, while the block runs."""
    options = serve.Options(checkpoint_path=str(path), port=0, **options)
    dist = Dist(0, 1, 0, torch.device("cpu"))
    served, work = serve.open_model(options, cli.PrecisionOptions(), dist)
    service = Service(work, options.max_queue)
    with serve.bind(options.host, 0) as listener:
        door = Door(key, options.max_body, options.return_all_prompt_logprobs)
        config = uvicorn.Config(make_app(served, service, door), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive())
            yield Client("http://{}:{}".format(*listener.getsockname()[:2])), service
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"

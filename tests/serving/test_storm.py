"""Mixed requests with injected faults: malformed and huge ones, clients that leave, more of them
than rows, an engine without memory. Each gets an answer, right or said to be wrong, and the server
stays up."""

import http.client
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch
from builders import wait_for
from servers import serving

import cli

CLIENTS = 24
GOOD = [
    ("/v1/completions", {"prompt": "ab", "max_tokens": 5, "temperature": 0}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 7, "seed": 3, "n": 2}),
    ("/v1/completions", {"prompt": "abc", "max_tokens": 1, "echo": True, "logprobs": 1,
                         "temperature": 0}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "seed": 1, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4,
                              "seed": 2}),
    ("/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 4}}),
    ("/tokenize", {"prompt": "ab"}),
]  # fmt: skip
BAD = [  # body, the statuses that it may have
    (b"{", {400}),
    (b'{"prompt": "' + b"a" * 3000 + b'"}', {413}),
    (b'{"prompt": "a", "what": 1}', {400}),
    (b"\xff\xfe", {400}),
    (json.dumps({"prompt": "a" * 300}).encode(), {400}),
    (json.dumps({"prompt": ["a"] * 100, "n": 20}).encode(), {400, 429}),
    (b"", {400}),
]


def post(line, path, body):
    line.request("POST", path, body, {"Content-Type": "application/json"})
    reply = line.getresponse()
    return reply.status, reply.read()


def meant(path, data):
    """What an answer says, without its name and time; of numbers, as many digits as batches leave
    the same."""
    text = data.decode()
    lines = text.split("\n\n") if text.startswith("data: ") else [text]
    found = []
    for line in filter(None, lines):
        word = line.removeprefix("data: ")
        one = {} if word == "[DONE]" else json.loads(word, parse_float=lambda x: round(float(x), 3))
        found.append({k: v for k, v in one.items() if k not in ("id", "created")})
    return sorted(map(json.dumps, found))


def storm(client, service, n, seed, shortages):
    """(how many were answered as they should, how many were told to come again, how many left)"""
    where = urlsplit(client.url)

    def connect():
        return http.client.HTTPConnection(where.hostname, where.port, timeout=300)

    expected = [meant(path, post(connect(), path, json.dumps(body))[1]) for path, body in GOOD]
    step, work = [0], service.work

    def fail_sometimes():
        """Every so many steps of whichever engine is there."""
        engine, real = work.engine, type(work.engine).step

        def step_of(*args):
            step[0] += 1
            if step[0] % 97 == 0 and shortages:
                raise torch.OutOfMemoryError("injected")
            return real(engine)

        engine.step = step_of

    make = work.make_engine

    def make_engine():
        work.engine = make()
        fail_sometimes()
        return work.engine

    work.make_engine = make_engine
    fail_sometimes()

    def one(i):
        rng = random.Random(seed * 1_000_003 + i)
        kind = rng.random()
        line = connect()
        try:
            if kind < 0.15:
                body, statuses = rng.choice(BAD)
                status, data = post(line, "/v1/completions", body)
                assert status in statuses, (status, data)
                assert json.loads(data)["error"]["message"]
                return "refused"
            if kind < 0.3:  # leaves, before or after the first piece
                body = {"prompt": "a", "n": 3, "max_tokens": 200, "stream": rng.random() < 0.5}
                line.request("POST", "/v1/completions", json.dumps(body))
                if body["stream"] and rng.random() < 0.5:
                    line.getresponse().readline()
                line.sock.shutdown(socket.SHUT_RDWR)
                return "left"
            which = rng.randrange(len(GOOD))
            path, body = GOOD[which]
            status, data = post(line, path, json.dumps(body))
            if status in (429, 503) or b"out of memory: try again" in data:
                return "again"
            assert status == 200 and meant(path, data) == expected[which], (path, status, data)
            return "answered"
        finally:
            line.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        outcomes = list(pool.map(one, range(n)))
    wait_for(lambda: service.unfinished == 0)
    wait_for(lambda: not service.work.engine.requests)
    assert service.error is None and client.ask("/health")[0] == 200
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}, step[0]


@pytest.mark.parametrize("n", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_storm(n, checkpoint_path, monkeypatch):
    notes = []
    monkeypatch.setattr(cli, "note", notes.append)
    with serving(checkpoint_path, max_body=2000, max_queue=60, max_rows=4) as (client, service):
        found, steps = storm(client, service, n, seed=n, shortages=True)
        print(found, steps, "steps")
        assert sum(found.values()) == n and found["answered"] > n / 4
        if steps > 97:
            assert any("out of memory" in note for note in notes)
        (choice,) = client.complete(prompt="ab", max_tokens=3, temperature=0)
        assert choice["finish_reason"] in ("stop", "length")


def test_scores_without_memory_are_told_to_come_again(checkpoint_path, monkeypatch):
    asked = {"prompt": "abc", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    with serving(checkpoint_path) as (client, service):
        whole = client.complete(**asked)
        failing = [True]

        def score(*about):
            if failing:
                failing.pop()
                raise torch.OutOfMemoryError("injected")
            return real(*about)

        import serving.work as room

        real = room.score_prompts
        monkeypatch.setattr(room, "score_prompts", score)
        with client.open("/v1/completions", asked) as reply:
            assert reply.status == 503 and int(reply.headers["Retry-After"]) >= 1
        assert client.complete(**asked) == whole
        failing += [True] * 20  # no more than so often in a row
        statuses = [client.ask("/v1/completions", asked)[0] for _ in range(6)]
        assert statuses[:4] == [503] * 4 and set(statuses[4:]) <= {500, 503}
        wait_for(lambda: service.error is not None)
        assert client.ask("/health")[0] == 503

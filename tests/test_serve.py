"""serve.py as a command: its line, its errors, SIGTERM; and OpenAI's own client."""

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import command, save_model, saved_checkpoint, started, tiny_model, wait_for

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import cli
import serve
from backends import CacheOptions
from distributed import Dist


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved_checkpoint(tmp_path_factory.mktemp("serve"))


def ask(url, body):
    with urllib.request.urlopen(f"{url}/v1/completions", json.dumps(body).encode()) as reply:
        return json.load(reply)


@pytest.mark.slow
def test_sigterm_finishes_what_is_on_its_way(path):
    words = command(0, "serve.py", "--checkpoint-path", path, "--port", 0, "--device", "cpu")
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        line = process.stdout.readline()
        assert line.startswith("checkpoint-10 on http://127.0.0.1:"), process.stderr.read()
        url = re.search(r"http://[\d.:]+", line)[0]
        whole = {"prompt": "a", "n": 12, "max_tokens": 60, "temperature": 0}
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(ask, url, whole)
            wait_for(lambda: b"unfinished 12" in urllib.request.urlopen(f"{url}/metrics").read())
            process.send_signal(signal.SIGTERM)
            assert len(reply.result()["choices"]) == 12
        assert process.wait() == 128 + signal.SIGTERM
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_server_on_each_rank(path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        base = taken.getsockname()[1]
    words = command(2, "serve.py", "--checkpoint-path", path, "--port-base", base)
    with started([*words, "--device", "cpu"], stdout=subprocess.PIPE) as process:
        lines = sorted(process.stdout.readline() for _ in range(2))
        urls = [re.search(r"http://[\d.:]+", line)[0] for line in lines]
        assert urls == [f"http://127.0.0.1:{base + i}" for i in range(2)]
        body = {"prompt": "ab", "max_tokens": 9, "seed": 1}
        texts = {ask(url, body)["choices"][0]["text"] for url in urls}
        assert len(texts) == 1
        process.send_signal(signal.SIGTERM)
        process.wait()


def test_errors_are_one_line(path, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bare = save_model(tiny_model(), tmp_path, tokenizer=None)
        for step in (10, 20):
            shutil.copytree(path, tmp_path / f"runs/checkpoint-{step}")
        for words, said in (
            (["--checkpoint-path", path, "--port", port], f"--port {port}: Address already in use"),
            (["--checkpoint-path", path, "--port", 99999], "--port 99999"),
            (["--checkpoint-path", path, "--host", "300.1.1.1"], "--host 300.1.1.1"),
            (["--checkpoint-path", tmp_path / "no"], "no"),
            (
                ["--checkpoint-path", tmp_path / "runs"],
                "runs holds 2 checkpoints; a server has one",
            ),
            (["--checkpoint-path", bare], "has no tokenizer files"),
            (["--checkpoint-path", path, "--context", 300], "the model has 256 positions"),
            (
                ["--checkpoint-path", path, "--max-new-tokens", 257],
                "a prompt and its answer have 256",
            ),
            (["--checkpoint-path", path, "--port", 0, "--port-base", 0], "without --port-base"),
            (["--checkpoint-path", path, "--bos", "on"], "has no BOS token"),
        ):
            own = [*map(str, words), *([] if "--port" in words else ["--port", "0"])]
            with pytest.raises((ValueError, OSError), match=re.escape(said)):
                serve.main([*own, "--device", "cpu"])


def test_keys_and_values_of_8_bits(path):
    """A model of its own name, whose rows keep them so."""
    options = serve.Options(checkpoint_path=str(path), cache=CacheOptions("int8"))
    precision = cli.PrecisionOptions()
    served, work = serve.open_model(options, precision, Dist(0, 1, 0, torch.device("cpu")))
    assert served.name == "checkpoint-10-kv-int8"
    assert work.engine.rows.cache.k[0].codes.dtype == torch.int8


def test_what_it_needs_is_named(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(ValueError, match="pip install starlette uvicorn"):
        serve.main(["--checkpoint-path", str(path)])

"""Servers that others wrote, each in an environment of its own, serving one real model on loopback.

    with serving("vllm") as url: ...              # skipped where it is not there

ROSEVAL_SERVERS: a directory of virtual environments by the names below (scripts/served_peers.sh
makes them). ROSEVAL_MODEL: SmolLM2-135M-Instruct as a Hugging Face directory; ROSEVAL_GGUF: its
GGUF file. Each is called "smollm2", so that nothing of this machine is in what is recorded.
"""

import contextlib
import os
import socket
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from builders import PATIENCE, started, wait_for

LLAMA_CPP = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.model_alias, p.port, p.n_ctx, p.n_parallel = "smollm2.gguf", {"smollm2"}, int(
    sys.argv[1]), 4096, 2
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.warmup, p.endpoint_props = False, True
server = xllamacpp.Server(p)
while True:
    time.sleep(60)
"""
VLLM = "serve smollm2 --dtype float32 --max-model-len 2048 --enforce-eager --port"
GGUF = "--model smollm2.gguf --model_alias smollm2 --n_ctx 2048 --n_threads 1 --logits_all True"
COMMANDS = {  # the environment's program and its words, a port following
    "vllm": ["bin/vllm", *VLLM.split()],
    "transformers": [
        "bin/python", "-m", "transformers.cli.transformers", "serve", "smollm2",
        "--device", "cpu", "--dtype", "float32", "--port",
    ],
    "llama.cpp": ["bin/python", "-c", LLAMA_CPP],
    "llama-cpp-python": ["bin/python", "-m", "llama_cpp.server", *GGUF.split(), "--port"],
}  # fmt: skip
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def place_of(variable):
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"needs servers of others: set {variable} (tests/endpoints/peers.py)")
    return Path(found).resolve()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/v1/models").status == 200
    except urllib.error.HTTPError as error:
        return error.code != 503  # a model that is being loaded
    except OSError:
        return False


@contextlib.contextmanager
def serving(name):
    """The URL of one of COMMANDS."""
    environment = place_of("ROSEVAL_SERVERS") / name
    if not environment.is_dir():
        pytest.skip(f"ROSEVAL_SERVERS has no environment {name}")
    port, words = free_port(), COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "smollm2").symlink_to(place_of("ROSEVAL_MODEL"))
        Path(folder, "smollm2.gguf").symlink_to(place_of("ROSEVAL_GGUF"))
        Path(folder, "hub").mkdir()
        own = {"HF_HUB_CACHE": f"{folder}/hub", "HOME": folder}
        words = [environment / words[0], *words[1:], str(port)]
        with (
            open(Path(folder, "log"), "w") as log,
            started(
                words, cwd=folder, env=os.environ | VARIABLES | own, stdout=log, stderr=log
            ) as process,
        ):
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(url) or process.poll() is not None)
            assert process.poll() is None, Path(folder, "log").read_text()[-3000:]
            yield url


assert PATIENCE >= 300, "vLLM takes minutes to start on a CPU"

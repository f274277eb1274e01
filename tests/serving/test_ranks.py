"""serve.py --shard: a model that two ranks hold answers as one that a process has alone, to the
last bit; what fails on one rank is known to both. Real ranks over gloo."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch
import transformers
import warm
from builders import PATIENCE, ROOT, is_there, saved_checkpoint, torchrun, wait_for
from servers import Client, serving

import cli
import serve
from backends import CacheOptions
from distributed import Dist

LONG = "What many prompts begin with is computed once. " * 12  # pieces of 256 tokens

# Each rank says in files who it is, and after each turn what it has left to do. A file tells it
# that its memory runs out, or that it computes NaN, in its next step.
RANK = """
import os, sys
from datetime import timedelta
from pathlib import Path
sys.path[:0] = [{root!r}]
import cli, distributed, serve
import torch
from serving.work import Work

folder, rank = Path({folder!r}), os.environ["RANK"]
bind, load, step, fault = serve.bind, serve.load, Work.step, folder / f"fault-{{rank}}"

def say(name, text):
    (folder / f"{{name}}-{{rank}}.new").write_text(text)
    os.replace(folder / f"{{name}}-{{rank}}.new", folder / f"{{name}}-{{rank}}")

def bind_and_say(host, port):
    listener = bind(host, port)
    say("url", "http://{{}}:{{}}".format(*listener.getsockname()))
    return listener

def load_and_fail(*args):
    model, dist = load(*args)
    real = model.through_blocks
    def through_blocks(*args):
        what = fault.read_text() if fault.exists() else ""
        if what:
            fault.unlink()
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        stream = real(*args)
        if what == "nan":
            stream.add(stream.whole() * float("nan"))
        return stream
    model.through_blocks = through_blocks
    return model, dist

def step_and_say(self):
    told = step(self)
    left = len(self.engine.requests), len(self._drawing), len(self._scoring)
    if left != getattr(self, "left", None):
        self.left = left
        say("left", str(left))
    return told

serve.bind, serve.load, Work.step = bind_and_say, load_and_fail, step_and_say
{more}
say("pids", f"{{os.getpid()}} {{os.getppid()}}")

def main():
    serve.main(sys.argv[1:])
    say("code", "0")

cli.run(main)
"""


class Ranks:
    """A server of two ranks, as its clients and whoever watches its processes see it."""

    def __init__(self, folder, ended):
        self.folder, self.ended = folder, ended

    @property
    def client(self):
        return Client(self.said("url", 0))

    def said(self, name, rank):
        path = self.folder / f"{name}-{rank}"
        return path.read_text() if path.exists() else None

    def pid(self, rank):
        return int(self.said("pids", rank).split()[0])

    @property
    def launcher(self):
        return int(self.said("pids", 0).split()[1])

    def has_left(self, rank):
        """(requests of the engine, prompts drawn from, prompts that wait for scores)"""
        return self.said("left", rank)

    def wait_until_idle(self):
        wait_for(lambda: all(self.has_left(rank) == "(0, 0, 0)" for rank in (0, 1)))

    def fails(self, rank, what):
        (self.folder / f"fault-{rank}").write_text(what)


FIRST = "checkpoint-10 on {}/v1: context 1,024, answers to 1,024 tokens, 8 rows, float32, "
FIRST += "no chat template, over 2 processes"


def own_lines(err):
    """What the ranks say for themselves, of all that torchrun writes."""
    return [line for line in err.splitlines() if line.startswith(("error", "note", "rank "))]


def cold_run(words, ranks, patience):
    """warm.run in new interpreters."""
    out = torchrun(ranks, *words, code=None, cold=True)
    return out.returncode, out.stdout, out.stderr


@contextlib.contextmanager
def ranks_serving(folder, path, *words, more="", cold=False):
    """Ranks, while the block runs, at whose end it has ended them."""
    script = folder / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), folder=str(folder), more=textwrap.dedent(more)))
    words = [script, "--checkpoint-path", path, "--shard", 2, "--port", 0, *words]
    with ThreadPoolExecutor(1) as pool:
        run = cold_run if cold else warm.run
        ended = pool.submit(run, [*words, "--device", "cpu"], 2, PATIENCE)
        ranks = Ranks(folder, ended)

        def answers():
            with contextlib.suppress(OSError):
                return ranks.said("url", 0) and ranks.client.ask("/health")[0] == 200
            return ended.done()

        try:
            wait_for(answers)
            assert not ended.done(), ended.result()
            yield ranks
            ended.result(PATIENCE)
        finally:
            for rank in () if ended.done() else (0, 1):
                with contextlib.suppress(OSError):
                    os.kill(ranks.pid(rank), signal.SIGKILL)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    changes = {"n_layers": 4, "max_position_embeddings": 1024}
    return saved_checkpoint(tmp_path_factory.mktemp("ranks"), kind="llama", **changes)


DRAWN = [
    {"prompt": "Once upon", "max_tokens": 12, "temperature": 0, "logprobs": 3},
    {"prompt": [LONG + "One.", LONG + "Two."], "max_tokens": 9, "n": 2, "seed": 5, "top_p": 0.9},
    {"prompt": LONG, "max_tokens": 7, "temperature": 0},
    {"prompt": "a b", "max_tokens": 40, "seed": 7, "stop": ["a", "9"], "logprobs": 0},
    {"prompt": ["x", [5, 6, 7]], "max_tokens": 5, "seed": 1, "top_k": 9, "n": 3, "logprobs": 20},
]
SCORED = [
    {"prompt": LONG, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2},
    {"prompt": [LONG + w for w in "abcd"], "max_tokens": 0, "echo": True, "logprobs": 1},
    {"prompt": "both", "max_tokens": 4, "seed": 2, "echo": True, "logprobs": 5},
]


def answers(client):
    """Those that are drawn at the same time, those that are scored one after the other, and pieces
    of a stream."""
    with ThreadPoolExecutor(len(DRAWN)) as pool:
        found = list(pool.map(lambda body: client.complete(**body), DRAWN))
    found += [client.complete(**body) for body in SCORED]
    chunks = client.stream("/v1/completions", **DRAWN[1], logprobs=2)
    pieces = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        pieces.setdefault(choice["index"], []).append((choice["text"], choice["logprobs"]))
    generated = {"inputs": "ab", "parameters": {"max_new_tokens": 3, "do_sample": False}}
    return found, pieces, chunks[-1], client.ask("/generate", generated)


@pytest.fixture(scope="module")
def wanted(path):
    """Of a process that has the model alone."""
    with serving(path) as (client, _):
        return answers(client)


def leave(ranks, body):
    """A client that goes away as soon as both ranks have its request."""
    where = urlsplit(ranks.client.url)
    line = http.client.HTTPConnection(where.hostname, where.port)
    line.request("POST", "/v1/completions", json.dumps(body))
    wait_for(lambda: all(ranks.has_left(rank) not in (None, "(0, 0, 0)") for rank in (0, 1)))
    line.sock.shutdown(socket.SHUT_RDWR)
    line.close()


def test_two_ranks_answer_as_one(path, wanted, tmp_path):
    """And what fails in one request is that request's, on whichever rank it fails. SIGTERM to
    torchrun finishes what is on its way, and both ranks end well."""
    with ranks_serving(tmp_path, path) as ranks:
        client = ranks.client
        assert answers(client) == wanted
        for stream in (False, True):
            leave(ranks, {"prompt": "a", "n": 200, "max_tokens": 900, "stream": stream})
            ranks.wait_until_idle()
        for rank in (0, 1):
            for prompt in (LONG, "a"):  # while a prompt is computed; in a step
                ranks.fails(rank, "memory")
                with client.open("/v1/completions", {"prompt": prompt, "max_tokens": 3}) as reply:
                    assert reply.status == 503 and b"out of memory" in reply.read()
                ranks.wait_until_idle()
            ranks.fails(rank, "memory")  # scores take half as much at a time
            assert client.complete(**SCORED[0]) == wanted[0][len(DRAWN)]
        for body in ({"max_tokens": 3}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
            ranks.fails(1, "nan")
            status, said = client.ask("/v1/completions", {"prompt": "a", **body})
            assert status == 500 and "NaN" in said["error"]["message"]
        assert client.ask("/v1/completions", {"prompt": "a", "n": 0})[0] == 400
        assert answers(client) == wanted
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(client.complete, prompt="a", n=30, max_tokens=30, seed=1)
            wait_for(lambda: ranks.has_left(1) != "(0, 0, 0)")
            os.kill(ranks.pid(0), signal.SIGTERM)
            assert len(last.result()) == 30
    code, out, err = ranks.ended.result()
    assert code == 0 and out.splitlines()[0] == FIRST.format(client.url), (code, out)
    assert [line[:19] for line in own_lines(err)] == ["note: out of memory"], err


def test_a_rank_that_dies_ends_the_server_by_name(path, tmp_path):
    """Whoever waits is told."""
    with ranks_serving(tmp_path, path) as ranks, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "n": 200, "max_tokens": 900}
        reply = pool.submit(ranks.client.ask, "/v1/completions", body)
        wait_for(lambda: ranks.has_left(1) not in (None, "(0, 0, 0)"))
        os.kill(ranks.pid(1), signal.SIGKILL)
        status, said = reply.result()
        assert status == 500 and said["error"]["message"] == "the engine has ended"
    code, _, err = ranks.ended.result()
    assert code == 1 and own_lines(err) == ["error: rank 1 has ended, and the server with it"], err


@pytest.mark.parametrize(
    "n, words, said",
    [
        (1, ["--shard", "2"], "a server of --shard 2 is 2 processes, not 1: torchrun --nproc-per"),
        (4, ["--shard", "2"], "not 4: torchrun --nproc-per-node=2 serve.py --shard 2 …, once for"),
        (4, ["--shard", "8"], "a server of --shard 8 is 8 processes, not 4"),
        (2, [], "2 processes, and a server of one: start it without torchrun, or with --port-base"),
        (2, ["--shard", "2", "--port-base", "1"], "--port-base is a whole model on each GPU"),
        (1, ["--shard", "auto", "--port-base", "1"], "--port-base is a whole model on each GPU"),
    ],
)
def test_so_many_processes_are_no_server(path, monkeypatch, n, words, said):
    """Said before they look for each other."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": str(n)}
    for name, value in places.items() if n > 1 else ():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(said)):
        serve.main(["--checkpoint-path", str(path), "--device", "cpu", *words])


def test_auto_is_one_process_where_there_is_no_gpu(path):
    options = serve.Options(checkpoint_path=str(path), shard="auto")
    _, work = serve.open_model(options, cli.PrecisionOptions(), Dist(0, 1, 0, torch.device("cpu")))
    assert work.dist.pipe is None


# ---------------------------------------------------------------------------------------------
# In new interpreters, as users start them: `how` is a signal, and whose it is


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM launcher", "SIGINT launcher", "SIGTERM 1"])
def test_signals_finish_what_is_on_its_way(path, tmp_path, how):
    """The others' ranks leave signals to the first one, and torchrun fails of any signal."""
    with ranks_serving(tmp_path, path, cold=True) as ranks, ThreadPoolExecutor(1) as pool:
        last = pool.submit(ranks.client.complete, prompt="a", n=30, max_tokens=90, seed=1)
        wait_for(lambda: ranks.has_left(1) not in (None, "(0, 0, 0)"))
        number, _, whom = how.partition(" ")
        whom = ranks.launcher if whom == "launcher" else ranks.pid(int(whom))
        os.kill(whom, getattr(signal, number))
        if whom == ranks.pid(1):
            assert len(last.result()) == 30 == len(ranks.client.complete(prompt="b", n=30))
            os.kill(ranks.launcher, signal.SIGTERM)
        assert len(last.result()) == 30
    code, _, err = ranks.ended.result()
    assert code == 1 and not own_lines(err), err
    assert [ranks.said("code", rank) for rank in (0, 1)] == ["0", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("how", ["SIGKILL 0", "SIGKILL 1", "SIGSTOP 1"])
def test_a_rank_that_is_gone_is_named(path, tmp_path, how, busy):
    with ranks_serving(tmp_path, path, "--timeout", 8, cold=True) as ranks:
        body = {"prompt": "a", "n": 200, "max_tokens": 900}
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(ranks.client.ask, "/v1/completions", body) if busy else None
            if busy:
                wait_for(lambda: ranks.has_left(1) not in (None, "(0, 0, 0)"))
            number, whom = how.split()
            os.kill(ranks.pid(int(whom)), getattr(signal, number))
            code, _, err = ranks.ended.result(PATIENCE)
            assert code == 1, err
            (line,) = own_lines(err)
            assert line.startswith(f"error: rank {whom} {'has' if 'KILL' in how else 'made no'} ")
            if reply is not None and how == "SIGKILL 1":
                assert reply.result()[0] == 500
            elif reply is not None:
                assert isinstance(reply.exception(), OSError), "the connection was lost"


@pytest.mark.slow
def test_nobody_waits_too_long_for_a_client(path, tmp_path):
    """However short the patience of collectives and of those who watch the ranks."""
    more = """
    from backends import pipe
    pipe.COLLECTIVE_TIMEOUT = distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=10)
    """
    with ranks_serving(tmp_path, path, "--timeout", 5, more=more) as ranks:
        body = {"prompt": "ab", "max_tokens": 5, "temperature": 0}
        before = ranks.client.complete(**body)
        time.sleep(25)
        assert ranks.client.complete(**body) == before
        os.kill(ranks.pid(0), signal.SIGTERM)
    assert ranks.ended.result()[0] == 0


@pytest.mark.slow
def test_a_server_ends_with_its_launcher(path, tmp_path):
    with ranks_serving(tmp_path, path, cold=True) as ranks:
        os.kill(ranks.launcher, signal.SIGKILL)
    _, _, err = ranks.ended.result()
    assert own_lines(err) == ["error: torchrun has ended, and the server with it"], err
    wait_for(lambda: not any(is_there(ranks.pid(rank)) for rank in (0, 1)))


@pytest.mark.slow
def test_rounded_weights_and_8_bits_of_keys_and_values(path, tmp_path):
    rule = "rtn-w4-g16-asym"
    with serving(path, quantise=rule, cache=CacheOptions("int8")) as (client, _):
        wanted = answers(client)
    words = ["--quantise", rule, "--kv-dtype", "int8"]
    with ranks_serving(tmp_path, path, *words) as ranks:
        assert answers(ranks.client) == wanted
        os.kill(ranks.pid(0), signal.SIGTERM)
    assert ranks.ended.result()[0] == 0


@pytest.mark.slow
def test_what_is_no_server_is_one_line(path, tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    opt = tmp_path / "opt"
    transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)).save_pretrained(opt)
    words = ["serve.py", "--port", 0, "--device", "cpu", "--tokenizer-name", "byte"]
    for more, said in (
        (["--checkpoint-path", path, "--shard", "auto"], "2 processes, and a server of one: "),
        (["--checkpoint-path", opt, "--shard", 2], f"{opt} is run by transformers, whose models"),
        (["--checkpoint-path", path, "--shard", 2, "--port", 1 << 20], "cannot listen on --host"),
    ):
        out = torchrun(2, *words, *more, code=1)
        (line,) = own_lines(out.stderr)
        assert line.startswith(f"error: {said}"), line

"""serve.py on two GPUs: a model that both hold answers with the bits of one GPU's, a server on each
does too, and a rank that dies ends it by name. Without HTTP, so neither uvicorn nor starlette.

python -m pytest -q tests/gpu/test_ranks_gpu.py        # two GPUs
"""

import json

import pytest
import torch
from builders import CONFIGS, ROOT, save_model, torchrun

from model import GPTModel

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

DEVICE, CONTEXT = "cuda", 2048
SHAPE = {"n_layers": 9, "d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "head_dim": 64}
SHAPE |= {"d_ff": 2816, "vocab_size": 257, "max_position_embeddings": CONTEXT}

# serve.py, whose clients are in the process: the answers of each server lie in a file of its own.
SERVER = """
import asyncio, contextlib, json, os, signal, socket, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
import numpy as np
import cli, serve
from backends import Sampling
from serving.asked import Asked
from serving.fields import Refused
from serving.work import Work

folder, context, rank = Path({folder!r}), {context}, os.environ.get("LOCAL_RANK", "0")
step, turns, dies = Work.step, [0], {dies!r}

def step_or_die(self):
    turns[0] += self.engine.busy
    if rank == dies and turns[0] == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

def questions():
    g = np.random.default_rng(0)
    begins = [g.integers(0, 257, size).tolist() for size in (0, context // 7, context // 4)]
    drawn, scored = [], []
    for i in range(24):
        prompt = begins[i % 3] + g.integers(0, 257, int(g.integers(1, context // 6))).tolist()
        sampling = Sampling(24, temperature=(0.0, 0.9)[i % 2], top_p=0.9, seed=i)
        drawn.append(Asked([prompt], sampling, 1 + i % 2, logprobs=(None, 0, 3)[i % 3]))
        scored.append(Asked([prompt], Sampling(1), draws=False, logprobs=2, scores=True))
    return drawn, scored[::5]

async def answer(service, asked):
    come, found = asyncio.Queue(), {{}}
    jobs = service.submit(asked, come.put_nowait)
    while any(job.awaited for job in jobs) or not come.empty():
        _, event = await come.get()
        told = event._asdict() if isinstance(event, tuple) else vars(event)
        told = {{k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}}
        told = {{k: v for k, v in told.items() if k not in ("request", "prompt_index")}}
        if "token_id" in told:  # beside the likeliest come those that a neighbour wanted
            told["logprobs"] = [values[: 1 + (asked.logprobs or 0)] for values in told["logprobs"]]
        kind = f"{{type(event).__name__}} {{told.get('sample_index', 0)}}"
        found.setdefault(kind, []).append(told)
    return found

async def clients(service):
    drawn, scored = questions()
    service.start(asyncio.get_running_loop())
    together = await asyncio.gather(*(answer(service, asked) for asked in drawn))
    scores = [await answer(service, asked) for asked in scored]
    await asyncio.sleep({idle})  # longer than anybody who works may be silent
    again = [await answer(service, asked) for asked in drawn[:4]]
    await asyncio.to_thread(service.stop)
    return together, scores, again

def serve_these(options, listener, served, service):
    signal.set_wakeup_fd(-1)  # as serve.py and its server, which drains when torchrun says so
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(Refused):  # of an engine that has ended
        found = asyncio.run(clients(service))
    if service.error is not None:
        raise service.error
    (folder / f"answers-{{rank}}.json").write_text(json.dumps(found))

serve.check_installed, serve.bind = lambda: None, lambda host, port: socket.socket()
serve.serve, Work.step = serve_these, step_or_die
cli.run(serve.main)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    model = GPTModel(CONFIGS["llama"].replace(**SHAPE))
    for p in model.parameters():
        p.data.normal_(std=0.05) if p.dim() > 1 else p.data.fill_(1.0)
    return save_model(model, tmp_path_factory.mktemp("served"), 1)


def run(folder, path, gpus, *words, dies="", code=0):
    """(what the process wrote, {rank: answers})"""
    folder.mkdir()
    terms = {"root": str(ROOT), "folder": str(folder), "context": CONTEXT, "dies": dies, "idle": 8}
    (folder / "server.py").write_text(SERVER.format(**terms))
    words = ["--checkpoint-path", path, "--max-rows", 16, "--device", DEVICE, *words]
    words += ["--max-new-tokens", 32, "--timeout", 5]
    out = torchrun(gpus, folder / "server.py", *words, code=code, cold=True)
    found = sorted(folder.glob("answers-*.json"))
    return out, {f.stem[-1]: json.loads(f.read_text()) for f in found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("more", [[], ["--kv-dtype", "fp8", "--quantise", "rtn-w4-g128"]])
def test_two_gpus_that_hold_the_model_answer_as_one(path, tmp_path, dtype, more):
    words = ["--dtype", dtype, *more]
    _, wanted = run(tmp_path / "one", path, 0, *words)
    (together, scores, again) = wanted["0"]
    assert all("Failed 0" not in found for found in (*together, *scores, *again))
    assert together[:4] == again, "whoever runs beside them"
    _, found = run(tmp_path / "two", path, 2, *words, "--shard", 2)
    assert found == wanted
    if not more:
        _, found = run(tmp_path / "each", path, 2, *words, "--port-base", 8000)
        assert found == {"0": wanted["0"], "1": wanted["0"]}


@pytest.mark.parametrize("dies", ["0", "1"])
def test_a_rank_that_dies_is_named(path, tmp_path, dies):
    """While the other's GPU waits for it."""
    out, found = run(tmp_path / "dead", path, 2, "--shard", 2, dies=dies, code=1)
    assert f"error: rank {dies} has ended, and the server with it\n" in out.stderr and not found


def test_auto_refuses_more_than_it_needs(path, tmp_path):
    out, _ = run(tmp_path / "auto", path, 2, "--shard", "auto", code=1)
    assert "error: 2 processes, and a server of one: " in out.stderr

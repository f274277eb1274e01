"""Launch to first result, and where the seconds go: eval.py and mmlu_eval.py of a 124M checkpoint.

    python benchmarks/corpus.py --out /dev/shm/bench.npy --tokens 1_000_001
    python benchmarks/start.py --data /dev/shm/bench.npy --mmlu data/mmlu --tokenizer gpt2 \\
        --work /dev/shm --out benchmarks/results/start.json
    python benchmarks/start.py … --small          # a CPU's rehearsal, on a tiny model

From outside: seconds from the launch until the first line of the result can be read, and until the
command has ended, medians of --repeat runs, by plain Python, after one that warms the disk, and
under torchrun with one rank. From inside: the same command once more with a stamp after each phase
(PHASES), by a clock that both share; what a phase is given is the time since the stamp before it,
so phases that run side by side show as the one that ends last. Beside them, of the same minute, the
parts that no code of ours can shorten (BARE): what a command takes is to be read next to those.
--root times another checkout.
"""

import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("START_ROOT", Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402

FIRST_LINES = {"eval.py": "avg_loss:", "mmlu_eval.py": "micro"}  # of what a user waits for
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
    ],
}
BARE = {  # programs that end when they have done so much
    "python": "pass",
    "import numpy": "import numpy",
    "import torch": "import torch",
    "import torch, without the collector": "import gc; gc.disable(); import torch",
    "torch and its first product": "import torch as t; a = t.ones(64, 64, device=DEVICE); a @ a; "
    "t.cuda.synchronize() if a.is_cuda else None",
    "import triton": "import triton.language",
}
PHASES = {
    "python": "the interpreter, and under torchrun its agent",
    "flags": "what reads flags and data is imported",
    "torch": "torch and the rooms that use it, beside it the GPU's context",
    "process group": "device and ranks",
    "weights": "headers, tokenizer, weights on the device; beside them prompts",
    "prompts": "what of those is left",
    "first kernels": "a batch of zeros",
    "scored": "the work",
    "record": "saved",
    "printed": "the first line of the result",
    "ended": "the interpreter and the driver have cleaned up",
}


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="a shard of GPT-2 tokens")
    p.add_argument("--mmlu", type=Path, required=True, help="MMLU in its original layout")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, or a directory that holds it")
    p.add_argument("--work", type=Path, required=True, help="for the checkpoint and records")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--repeat", type=cli.positive_int, default=3)
    p.add_argument("--cases", nargs="+", choices=FIRST_LINES, default=list(FIRST_LINES))
    p.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    p.add_argument("--root", type=Path, default=ROOT, help="time the commands of this checkout")
    p.add_argument("--small", action="store_true", help="a tiny model, little work")
    args = p.parse_args(argv)
    report: dict[str, Any] = {"machine": machine(), "phases": PHASES}
    report |= {"bare": bare(args), "cases": {}}
    print(json.dumps(report["bare"]), flush=True)
    for script, launcher, command in cases(args):
        warming = launcher == args.launchers[0]
        runs = [
            timed(command, args.root, FIRST_LINES[script]) for _ in range(args.repeat + warming)
        ]
        runs = runs[warming:]
        case = report["cases"][f"{script}, {launcher}"] = {
            name: statistics.median(run[name] for run in runs) for name in runs[0]
        }
        case["runs"] = [run["first result"] for run in runs]
        if args.root == ROOT:  # another checkout may have no such phases
            case["inside"] = stamped(command, args.work / "stamps.json", FIRST_LINES[script])
        args.out.write_text(json.dumps(report, indent=1))  # nothing is lost if the next fails
        print(f"{script}, {launcher}: {json.dumps(case)}", flush=True)


def cases(args) -> Iterator[tuple[str, str, list[str]]]:
    """(script, launcher, command)"""
    checkpoint, small = save_model(args), ["--device", "cpu"] if args.small else []
    shared = ["--checkpoint-path", str(checkpoint), "--results-dir", str(args.work / "results")]
    shared += ["--tokenizer-name", args.tokenizer, *small]
    tokens, limit = ("2000", ["--limit", "1"]) if args.small else ("1000000", [])
    own = {
        "eval.py": [
            *("--data-mode", "fineweb_npy", "--val-npy", str(args.data), "--max-tokens", tokens),
            *("--seq-len", "1024", "--batch-size", "32"),
        ],
        "mmlu_eval.py": ["--data-path", str(args.mmlu), "--num-few-shot", "5", *limit],
    }
    for script in args.cases:
        for name in args.launchers:
            yield script, name, [*LAUNCHERS[name], script, *shared, *own[script]]


def save_model(args) -> Path:
    """Random weights of GPT-2's shape, or of two small layers, as a Hugging Face directory. Made in
    a process of its own, so that none of the GPU's memory stays taken."""
    name = "small" if args.small else "gpt2"
    program = (
        "import sys; from pathlib import Path; from benchmarks.perplexity import save_random\n"
        "from benchmarks.start import save_small\n"
        f"{'save_small' if args.small else 'save_random'}({name!r}, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(args.work)], check=True, cwd=ROOT)
    return args.work / f"random-{name}"


def save_small(name: str, work: Path) -> None:
    import torch

    from config import load_config
    from formats import native
    from model import GPTModel

    directory = work / f"random-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = GPTModel(load_config("gpt2").replace(n_layers=2, d_model=64, n_heads=2, d_ff=128))
    native.write_weights(model, model.config, directory)


def machine() -> dict[str, Any]:
    """Told by a process that ends: a context of our own would make the next one's start cheaper."""
    program = "import json; from benchmarks.perplexity import machine; print(json.dumps(machine()))"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(out.stdout) | {"cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}


# ---------------------------------------------------------------------------------------------
# From outside


def bare(args) -> dict[str, float | None]:
    """Median seconds, launch to end, of each program of BARE; None where it fails."""
    device, out = "cpu" if args.small else "cuda", {}
    for name, program in BARE.items():
        words, seconds = [sys.executable, "-c", program.replace("DEVICE", repr(device))], []
        for _ in range(args.repeat + 1):  # the first warms the disk
            start = time.time()
            done = subprocess.run(words, capture_output=True, cwd=ROOT)
            seconds.append(time.time() - start)
        out[name] = None if done.returncode else round(statistics.median(seconds[1:]), 3)
    return out


def timed(command: list[str], root: Path, first_line: str, **more: str) -> dict[str, float]:
    """Seconds from the launch until a line of the result begins so, and until the end."""
    start = time.time()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | more,
    )
    assert process.stdout and process.stderr, "pipes"
    first = None
    for line in process.stdout:
        if first is None and first_line in line:
            first = time.time() - start
    errors = process.stderr.read()
    assert process.wait() == 0 and first is not None, errors[-2000:]
    return {"first result": first, "ended": time.time() - start}


# ---------------------------------------------------------------------------------------------
# From inside: the same command, through this file


def stamped(command: list[str], file: Path, first_line: str) -> dict[str, float]:
    """Seconds of each phase."""
    at = next(i for i, word in enumerate(command) if word in FIRST_LINES)
    inside = [*command[:at], str(Path(__file__).resolve()), *command[at:]]
    start = time.time()
    outside = timed(inside, ROOT, first_line, START_STAMPS=str(file))
    stamps = {name: when - start for name, when in json.loads(file.read_text()).items()}
    stamps |= {"printed": outside["first result"], "ended": outside["ended"]}
    names = [name for name in PHASES if name in stamps]
    return {
        name: round(stamps[name] - (stamps[before] if before else 0.0), 3)
        for before, name in zip([None, *names], names)
    }


def run_with_stamps(file: Path, script: str, *flags: str) -> None:
    """A script as its command line starts it, whose phases are stamped as they end."""
    stamps = {"python": time.time()}

    def stamp(owner: Any, name: str, label: str) -> None:
        function: Callable = getattr(owner, name)

        def wrapped(*args, **kwargs):
            found = function(*args, **kwargs)
            stamps[label] = time.time()
            return found

        setattr(owner, name, wrapped)

    import command
    import evaluation
    import headstart

    loading = headstart.loading

    def load_and_stamp(device):
        """The rooms that hold the later phases load torch: they are there when it is."""
        stamps["flags"] = time.time()
        with loading(device):
            import distributed
            from backends.local import Local

            yield
        stamps["torch"] = time.time()
        stamp(distributed, "pick_device", "process group")
        stamp(Local, "_warm_up", "first kernels")
        stamp(Local, "score_windows", "scored")
        stamp(Local, "score_rows", "scored")

    import contextlib

    headstart.loading = contextlib.contextmanager(load_and_stamp)
    stamp(command.Loader, "load", "weights")
    stamp(evaluation, "local_backend", "prompts")
    stamp(evaluation.Result, "save", "record")
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        file.write_text(json.dumps(stamps))


if __name__ == "__main__":
    if "START_STAMPS" in os.environ:
        run_with_stamps(Path(os.environ["START_STAMPS"]), *sys.argv[1:])
    else:
        cli.run(main)

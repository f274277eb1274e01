"""Ranks under real torchrun processes: exact sums, and what happens when one of them fails."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT, command, torchrun

import cli
import distributed

LONG = 600  # seconds after which a test gives up; none asks how fast anything is


def script_of(tmp_path, body, timeout=8):
    """`body`, the inside of `with setup() as dist`, as a script."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, signal\nimport numpy as np, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import cli, distributed\n"
        "def main():\n"
        f"    with distributed.setup('cpu', timeout={timeout}) as dist:\n"
        + textwrap.indent(textwrap.dedent(body), " " * 8)
        + "\ncli.run(main)\n"
    )
    return script


def run(tmp_path, body, n, **options):
    done = torchrun(n, script_of(tmp_path, body, **options), code=None, timeout=LONG)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("n", [1, 3])
def test_each_unit_once_and_sums_are_exact(tmp_path, n):
    body = """
        values = torch.zeros(10, dtype=torch.float64)
        counts = torch.zeros(10, dtype=torch.int64)
        for unit in dist.shard(10):
            values[unit] = 1 / (unit + 3)
            counts[unit] += 1
            dist.bump()
        values, counts = dist.sum(values), dist.sum(counts)
        ranks = dist.gather({"rank": dist.rank})
        assert [r["rank"] for r in ranks] == list(range(dist.world_size))
        assert dist.broadcast(dist.rank) == 0
        if dist.is_main:
            print(values.tobytes().hex(), counts.tolist())
    """
    code, out, err = run(tmp_path, body, n)
    assert code == 0, err
    expected = np.array([1 / (unit + 3) for unit in range(10)])
    assert out.split(maxsplit=1)[0] == expected.tobytes().hex()
    assert out.split(maxsplit=1)[1].strip() == str([1] * 10)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_rank_ends_the_run_and_is_named(tmp_path, rank):
    body = f"""
        if dist.rank == {rank}:
            raise RuntimeError("the disk is on fire")
        dist.barrier()
    """
    code, _, err = run(tmp_path, body, 2)
    assert code == 1
    assert f"rank {rank}: RuntimeError: the disk is on fire" in err


def test_bad_input_is_one_line_from_rank_zero(tmp_path):
    code, _, err = run(tmp_path, 'raise ValueError("data.npy: no such file; give --val-npy")', 3)
    assert code == 1  # torchrun's own code: the workers' is 2
    assert re.search(r"exitcode\s*: 2 ", err)
    assert err.count("no such file") == 1
    assert "\nerror: data.npy: no such file; give --val-npy\n" in "\n" + err
    assert 'script.py", line' not in err  # no traceback of ours


def test_bad_input_of_one_rank_alone_is_heard(tmp_path):
    body = """
        if dist.rank == 1:
            raise ValueError("shard 7 is torn")
        dist.barrier()
    """
    code, _, err = run(tmp_path, body, 2)
    assert code == 1
    assert "error on rank 1: shard 7 is torn" in err


def test_a_silent_rank_is_named(tmp_path):
    hangs = """
        dist.bump()
        if dist.rank == 1:
            time.sleep(10000)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    code, _, err = run(tmp_path, hangs, 2)
    assert code == 1
    assert "error: rank 1 made no progress for 8 s; the run ends here" in err


class SharedCounters:
    """torch's store as far as a Watch needs it, for several in one process."""

    def __init__(self):
        self.values = Counter()

    def add(self, name, amount):
        self.values[name] += amount
        return self.values[name]


@pytest.fixture
def watches(monkeypatch):
    """Of two ranks with 10 s of patience, whose clock is the test's."""
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda prefix, store: store)
    store, now = SharedCounters(), [0.0]
    pair = [distributed.Watch(store, rank, 2, timeout=10) for rank in (0, 1)]
    for watch in pair:
        watch.clock = lambda: now[0]

    def look(seconds, who=pair):
        """Whom they find silent while they look once a second for so long."""
        seen = set()
        for _ in range(seconds):
            now[0] += 1
            seen |= {watch.silent_rank() for watch in who}
        return seen

    return *pair, look


def test_a_slow_rank_is_waited_for_and_a_silent_one_is_not(watches):
    first, second, look = watches
    first.bump(), second.bump()
    for _ in range(5):  # 45 s of work, a bump each 9 s
        first.rest()  # in a collective, where it waits for the slow one
        assert look(9) == {None}
        second.bump()
    assert look(10) == {None}
    look(2)  # its last bump is seen a look later, and 10 s after that it is dead
    assert look(100) == {1}
    second.rest()  # it loads or compiles: no bumps are due
    look(1)
    assert look(100) == {None}


def test_a_rank_that_is_gone_is_silent_although_it_rested(watches):
    first, _, look = watches
    assert look(30) == {None}  # both load
    assert look(9, who=[first]) == {None}  # the other's thread says no more that it lives
    look(3, who=[first])
    assert look(100, who=[first]) == {1}
    look(1)
    assert look(30) == {None}  # it was only stopped for a while


def test_a_killed_rank_ends_the_run(tmp_path):
    body = """
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    code, _, _ = run(tmp_path, body, 2)
    assert code == 1


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path):
    """SIGSTOP: the process lives, its sockets are open, nothing comes out of it."""
    body = """
        dist.bump()
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    code, _, err = run(tmp_path, body, 2)
    assert code == 1
    assert "error: rank 1 made no progress for 8 s" in err


def test_sigterm_ends_every_process(tmp_path):
    body = """
        os.write(1, f"pid {os.getpid()}\\n".encode())  # one write: the ranks share the pipe
        dist.bump()
        while True:
            time.sleep(0.05)
            dist.bump()
    """
    words = command(2, script_of(tmp_path, body, timeout=LONG))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=LONG)
    finally:
        for pid in [process.pid, *pids] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_exit_codes_of_a_plain_process(tmp_path):
    def code_of(body, *flags):
        script = tmp_path / "plain.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cli\n"
            f"def main():\n    {body}\ncli.run(main)\n"
        )
        words = [sys.executable, str(script), *flags]
        out = subprocess.run(words, capture_output=True, text=True, timeout=LONG)
        return out.returncode, out.stderr

    assert code_of("pass") == (0, "")
    assert code_of("raise ValueError('a\\n b')") == (2, "error: a b\n")
    assert "Traceback" in code_of("raise ValueError('a')", "--debug")[1]
    assert code_of("raise FileNotFoundError(2, 'No such file', 'x.npy')")[0] == 2
    code, err = code_of("raise OSError(28, 'No space left on device', 'x.json')")
    assert (code, err) == (2, "error: [Errno 28] No space left on device: 'x.json'\n")
    code, err = code_of("1 / 0")
    assert code == 1 and "rank 0: ZeroDivisionError" in err
    assert code_of("raise KeyboardInterrupt") == (130, "")
    kill = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(10000)"
    assert code_of(kill) == (143, "")
    flags = "cli.parser('x').parse_args(['--nope'])"
    assert code_of(flags)[0] == 2 and "Traceback" not in code_of(flags)[1]


@pytest.mark.parametrize("flags", [["--explain"], ["--json"]], ids=["long", "short"])
def test_a_reader_that_has_enough_ends_the_script_quietly(flags):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    words = [sys.executable, f"{ROOT}/compute.py", "--config", "7b", *flags]
    out = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=LONG)
    os.close(writer)
    assert (out.returncode, out.stderr) == (141, "")


def test_contradicting_precision_flags_are_refused():
    def dtype(*flags):
        p = cli.parser("x")
        cli.add_options(p, cli.PrecisionOptions)
        return cli.read_options(cli.PrecisionOptions, p.parse_args(flags)).resolve("cuda")

    assert dtype() == "bfloat16"
    assert dtype("--no-amp") == "float32"
    assert dtype("--bf16", "--dtype", "bf16") == "bfloat16"
    assert dtype("--dtype", "fp16") == "float16"
    with pytest.raises(ValueError, match="--bf16 and --no-amp contradict"):
        dtype("--bf16", "--no-amp")

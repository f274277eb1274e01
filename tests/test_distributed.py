"""Ranks under real torchrun processes: exact sums, and what happens when one of them fails."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def start(tmp_path, body, n, *flags, timeout=4):
    """Start `body` (the inside of `with setup() as dist`) as a script under torchrun."""
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*command, str(n), str(script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(tmp_path, body, n, **options):
    process = start(tmp_path, body, n, **options)
    try:
        out, err = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


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
    start_time = time.monotonic()
    code, _, err = run(tmp_path, body, 2)
    assert code == 1
    assert f"rank {rank}: RuntimeError: the disk is on fire" in err
    assert time.monotonic() - start_time < 30


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


def test_a_silent_rank_is_named_and_a_slow_one_waited_for(tmp_path):
    slow = """
        dist.bump()
        for _ in range(4 if dist.rank == 1 else 1):
            time.sleep(2.0 if dist.rank == 1 else 0.1)  # 8 s in all, 6 s allowed between bumps
            dist.bump()
        total = dist.sum(torch.ones(1, dtype=torch.float64))
        sys.stdout.write(f"sum {total}\\n")  # one write: ranks share the pipe
    """
    code, out, err = run(tmp_path, slow, 2, timeout=6)
    assert (code, out.count("sum [2.]")) == (0, 2), err

    hangs = """
        dist.bump()
        if dist.rank == 1:
            time.sleep(1000)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    start_time = time.monotonic()
    code, _, err = run(tmp_path, hangs, 2)
    assert code == 1
    assert "error: rank 1 made no progress for 4 s; the run ends here" in err
    assert time.monotonic() - start_time < 45


def test_a_killed_rank_ends_the_run(tmp_path):
    body = """
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    start_time = time.monotonic()
    code, _, _ = run(tmp_path, body, 2)
    assert code == 1
    assert time.monotonic() - start_time < 40


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
    assert "error: rank 1 made no progress for 4 s" in err


def test_sigterm_ends_every_process(tmp_path):
    body = """
        os.write(1, f"pid {os.getpid()}\\n".encode())  # one write: the ranks share the pipe
        dist.bump()
        while True:
            time.sleep(0.05)
            dist.bump()
    """
    process = start(tmp_path, body, 2, timeout=60)
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
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
        command = [sys.executable, str(script), *flags]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
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
    kill = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)"
    assert code_of(kill) == (143, "")
    flags = "cli.parser('x').parse_args(['--nope'])"
    assert code_of(flags)[0] == 2 and "Traceback" not in code_of(flags)[1]


@pytest.mark.parametrize("flags", [["--explain"], ["--json"]], ids=["long", "short"])
def test_a_reader_that_has_enough_ends_the_script_quietly(flags):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    command = [sys.executable, f"{ROOT}/compute.py", "--config", "7b", *flags]
    out = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (out.returncode, out.stderr) == (141, "")

"""Ranks that torchrun's agent starts and ends: exact sums, and what happens when one fails."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from builders import PATIENCE, ROOT, command, is_there, ranks_script, run_ranks, started
from torch.distributed import HashStore

from distributed import Watch, pick_device


def run(tmp_path, body, n, **options):
    """(exit code, output, errors) of `body`, the inside of `with setup() as dist`."""
    out = run_ranks(n, tmp_path, body, code=None, **options)
    return out.returncode, out.stdout, out.stderr


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


PATIENT = """
cli.time.sleep = lambda seconds: signal.pause()  # what the other ranks grant rank 0
raise ValueError("data.npy: no such file; give --val-npy")
"""


def test_bad_input_is_one_line_from_rank_zero(tmp_path):
    code, _, err = run(tmp_path, PATIENT, 3)
    assert code == 1  # torchrun's own code: the workers' is 2
    assert re.search(r"exitcode\s*: 2 ", err)
    assert err.count("no such file") == 1
    assert "\nerror: data.npy: no such file; give --val-npy\n" in "\n" + err
    assert 'ranks.py", line' not in err  # no traceback of ours


def test_a_gpu_that_is_not_there_is_refused_with_what_helps(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("cuda", 1).index == 1 and pick_device("cpu", 7).type == "cpu"
    with pytest.raises(
        ValueError, match=r"rank 2 .* torch sees 2\. .*nproc-per-node.*--device cpu"
    ):
        pick_device("cuda", 2)


def test_whoever_lost_the_failing_rank_leaves_the_word_to_it(tmp_path):
    """A disk that fills up under rank 0, which alone writes: its line, and no traceback of ranks
    that wait for it in a collective."""
    body = """
        dist.barrier()
        if dist.is_main:
            raise OSError(28, "No space left on device", "record.json")
        dist.barrier()
    """
    code, _, err = run(tmp_path, body, 3)
    assert code == 1 and "rank 1" not in err and "rank 2" not in err
    assert [line for line in err.splitlines() if "error:" in line] == [
        "error: [Errno 28] No space left on device: 'record.json'"
    ]


def test_bad_input_of_one_rank_alone_is_heard(tmp_path):
    body = """
        if dist.rank == 1:
            raise ValueError("shard 7 is torn")
        dist.barrier()
    """
    code, _, err = run(tmp_path, body, 2)
    assert code == 1
    assert "error on rank 1: shard 7 is torn" in err


def watches(world_size, timeout):
    """A Watch for each rank, over one store, and their clock, to be set forward."""
    store, now = HashStore(), [1000.0]
    ranks = [Watch(store, rank, world_size, timeout) for rank in range(world_size)]
    for watch in ranks:
        watch.clock = lambda: now[0]
    return ranks, now


def test_a_silent_rank_is_found_and_a_slow_one_waited_for():
    (main, slow), now = watches(2, timeout=6)
    slow.bump()
    for _ in range(4):  # 20 s in all
        for seconds in (2, 3):
            now[0] += seconds
            assert slow.silent_rank() is None and main.silent_rank() is None
        slow.bump()
    for _ in range(6):  # not a second more
        assert slow.silent_rank() is None and main.silent_rank() is None
        now[0] += 1
    now[0] += 1
    assert main.silent_rank() == 1
    slow.rest()  # in a collective no bumps are due
    for _ in range(9):
        now[0] += 4
        assert slow.silent_rank() is None and main.silent_rank() is None


def test_of_ranks_that_stand_still_the_stopped_one_is_named():
    """As in training: rank 0 waits in a collective of the library's, which no bump tells from work;
    rank 1's process, its watch thread with it, is stopped a moment later."""
    (main, stopped), now = watches(2, timeout=6)
    main.bump(), stopped.bump()
    assert stopped.silent_rank() is None and main.silent_rank() is None
    now[0] += 1
    stopped.bump()
    assert stopped.silent_rank() is None and main.silent_rank() is None
    found = None
    while found is None:
        now[0] += 1
        found = main.silent_rank()
    assert found == 1 and now[0] <= 1010


# A second goes by whenever rank 0 looks, and none for rank 1: so who waits for whom is certain.
HANGS = """
import itertools
ticks = itertools.count(int(time.monotonic()) + 1)
dist._watch.clock = (lambda: 0.0) if dist.rank else (lambda: float(next(ticks)))
if dist.rank == 1:
    dist.bump()
    {hang}
dist.sum(torch.ones(1, dtype=torch.float64))
"""


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(10**6)",
        # it lives, its sockets are open, and nothing comes out of it
        pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", marks=pytest.mark.slow),
    ],
    ids=["hangs", "stopped"],
)
def test_a_silent_rank_is_named_and_ends_the_run(tmp_path, hang):
    code, _, err = run(tmp_path, HANGS.format(hang=hang), 2, timeout=4)
    assert code == 1
    assert "error: rank 1 made no progress for 4 s; the run ends here" in err


def test_a_killed_rank_ends_the_run(tmp_path):
    body = """
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.sum(torch.ones(1, dtype=torch.float64))
    """
    code, _, _ = run(tmp_path, body, 2, cold=True)
    assert code == 1


def test_sigterm_ends_every_process(tmp_path):
    body = """
        say(f"pid {os.getpid()}")
        dist.bump()
        while True:
            time.sleep(0.05)
            dist.bump()
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command(2, ranks_script(tmp_path, body)), **pipes) as process:
        pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not any(map(is_there, pids))


def test_exit_codes_of_a_plain_process(tmp_path):
    def code_of(body, *flags):
        script = tmp_path / "plain.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport cli\n"
            f"def main():\n    {body}\ncli.run(main)\n"
        )
        command = [sys.executable, str(script), *flags]
        out = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        return out.returncode, out.stderr

    assert code_of("pass") == (0, "")
    assert code_of("raise ValueError('a\\n b')") == (2, "error: a b\n")
    assert "Traceback" in code_of("raise ValueError('a')", "--debug")[1]
    assert code_of("raise FileNotFoundError(2, 'No such file', 'x.npy')")[0] == 2
    code, err = code_of("raise OSError(28, 'No space left on device', 'x.json')")
    assert (code, err) == (2, "error: [Errno 28] No space left on device: 'x.json'\n")
    code, err = code_of("1 / 0")
    assert code == 1 and "rank 0: ZeroDivisionError" in err
    torch_says = "raise type('Failed', (RuntimeError,), {'__module__': 'torch._inductor.exc'})"
    code, err = code_of(f"{torch_says}('x.so: failed to map segment\\n of a noexec folder')")
    assert code == 2
    assert err == "error: torch.compile: x.so: failed to map segment; --compile off goes without\n"
    assert code_of("raise KeyboardInterrupt") == (130, "")
    kill = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)"
    assert code_of(kill) == (143, "")
    flags = "cli.parser('x').parse_args(['--nope'])"
    assert code_of(flags)[0] == 2 and "Traceback" not in code_of(flags)[1]


@pytest.mark.parametrize(
    "words",
    [
        ["compute.py", "--config", "7b", "--explain"],
        ["compute.py", "--config", "7b", "--json"],
        ["scripts/map.py"],
    ],
    ids=["long", "short", "map"],
)
def test_a_reader_that_has_enough_ends_the_script_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    command = [sys.executable, f"{ROOT}/{words[0]}", *words[1:]]
    out = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    os.close(writer)
    assert (out.returncode, out.stderr) == (141, "")

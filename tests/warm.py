"""Real processes that need not import torch first: forked from one that has done nothing else.

    code, stdout, stderr = warm.run(["eval.py", "--help"])      # python eval.py --help
    code, stdout, stderr = warm.run(["eval.py", …], ranks=2)    # torchrun --nproc-per-node=2 …

Importing takes seconds of every process that a test starts, and most tests ask what a script does
and not how Python starts it. So one process imports what the scripts import, and forks for each
script that is wanted: a process of its own with its own arguments, environment, folder and output,
in which the script is __main__. Ranks are started, watched and ended by torchrun's own agent.
builders.torchrun(…, cold=True) starts a new interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = [str(ROOT), str(ROOT / "tests")]
IMPORTED = ("torch.distributed.run", "sweep", "train", "builders")  # not what needs no torch
LONGEST = 1 << 20  # bytes of a request


# ---------------------------------------------------------------------------------------------
# The side of the tests


@functools.cache
def _server() -> socket.socket:
    """A connection to the process that forks; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, __file__, str(theirs.fileno())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork has no threads but its own
    process = subprocess.Popen(
        words, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def run(words, ranks: int = 0, patience: float = 600) -> tuple[int, str, str]:
    """Run a script to its end, under torchrun with so many ranks, plainly if 0: its exit code,
    negative for a signal, and what it wrote."""
    request = {"words": [str(word) for word in words], "ranks": ranks}
    request |= {"environment": dict(os.environ), "folder": os.getcwd()}
    reader, writer = os.pipe()
    with (
        open(reader) as status,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        fds = [stdout.fileno(), stderr.fileno(), writer]
        socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        os.close(writer)
        begun = status.readline()
        assert begun, "the process of warm.py has ended"
        pid = int(begun)
        if not select.select([status], [], [], patience)[0]:
            _kill(pid)
            raise subprocess.TimeoutExpired(words, patience)
        code = int(status.readline())
        stdout.seek(0)
        stderr.seek(0)
        return code, stdout.read(), stderr.read()


def _kill(pid: int) -> None:
    import builders

    for one in [pid, *builders.descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# The process that forks


def next_request(server: socket.socket) -> dict:
    """Returns in a new process for each request; in this one never."""
    while True:
        data, fds, _, _ = socket.recv_fds(server, LONGEST, 3)
        if not data:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those of earlier requests
                pass
        if os.fork() == 0:
            server.close()
            keep(*fds)
            return json.loads(data)
        for fd in fds:
            os.close(fd)


def keep(stdout: int, stderr: int, status: int) -> None:
    """Fork again: the child returns, its parent tells its process id and how it ended."""
    if pid := os.fork():
        os.write(status, b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, b"%d\n" % code)
        os._exit(0)
    os.close(status)
    for fd, place in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, place)
        os.close(fd)


def run_script(*words: str) -> None:
    """As `python words…` does."""
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


def run_rank(*words: str) -> None:
    """run_script() where torchrun's agent called it: it takes a return for success."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # as python -u, by which it starts ranks
    try:
        run_script(*words)
    except SystemExit as stop:
        if stop.code:
            os._exit(stop.code if isinstance(stop.code, int) else 1)


def run_under_torchrun(ranks: int, words: list[str]) -> None:
    """torchrun's own main(), which forks its ranks."""
    from torch.distributed import run as torchrun

    read = torchrun.config_from_args

    def forking(args):
        config, _, (_unbuffered, *words) = read(args)
        config.start_method = "fork"
        return config, run_rank, words

    torchrun.config_from_args = forking
    torchrun.main(["--standalone", f"--nproc-per-node={ranks}", *words])


def main() -> None:
    sys.path[1:1] = PLACES
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that no fork copies all of it when it ends
    request = next_request(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["ranks"]:
        run_under_torchrun(request["ranks"], request["words"])
    else:
        run_script(*request["words"])


if __name__ == "__main__":
    main()

"""Starting and confining the two processes of a judgement: the zygote, and the one with the tests.

The zygote (jail.py) is a program of its own, so that what it forks inherits no memory of the tests.
The tests of a problem file are somebody else's program as well: before the first of them runs,
their process gives up root, the network, other programs, and all files but its folder and what it
may import. It keeps what it needs to judge: its pipes, and the socket to its zygote.
"""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any

from sandbox import jail, linux, namespaces

TESTS_MEMORY = 4 << 30  # bytes of address space; a hostile frame takes less (frames.py)
TESTS_FILE = 64 << 20  # bytes of a file that tests write
NEWEST = 1 << 30  # Landlock's ABI: the kernel's own


def start_zygote(config: dict, stdin: socket.socket) -> subprocess.Popen:
    """Start jail.py by itself; its standard input is a socket to us. config: as of jail.Cage."""
    python = os.path.realpath(sys.executable)  # past a virtual environment, to what is mounted
    proc = os.open("/proc", os.O_PATH)
    config = {"spare": None, "scratch": False, "landlock": NEWEST, **config, "proc": proc}
    options = ["-X", "no_debug_ranges", "-s", "-S", "-P", "-B"]
    account: dict[str, Any] = {}
    bubblewrap = []
    if config["tier"] == "B":
        bubblewrap, config["scratch"] = _bubblewrap(config["packages"], python)
        if (spare := config["spare"]) is not None:
            account = {"user": spare, "group": spare, "extra_groups": []}
    try:
        return subprocess.Popen(
            [*bubblewrap, python, *options, _file_of(jail), json.dumps(config)],
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "LD_BIND_NOW": "1"},  # or every candidate binds what it calls anew
            pass_fds=[proc],
            **account,
        )
    finally:
        os.close(proc)


def _file_of(module) -> str:
    return os.path.abspath(module.__file__)


def _bubblewrap(packages, python) -> tuple[list[str], bool]:
    """Tier B's command: as tier A's tree, made by the one program that may create namespaces; and
    whether there is a scratch, since older ones cannot bound it."""
    if not (bwrap := shutil.which("bwrap")):
        raise OSError("bwrap: not installed")
    tree = namespaces.interpreter_tree(packages)
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    programs = [python, os.path.dirname(_file_of(jail))]
    for path in sorted({*tree.bound, *programs}):
        arguments += ["--ro-bind", path, path]
    for path in tree.hidden:
        arguments += ["--tmpfs", path]
    for path in tree.packages:
        arguments += ["--ro-bind", path, path]
    for path in namespaces.DEVICES:
        arguments += ["--dev-bind", path, path]
    usage = subprocess.run([bwrap, "--help"], capture_output=True, text=True)
    scratch = "--size BYTES" in usage.stdout + usage.stderr
    if scratch:
        arguments += ["--size", str(namespaces.SCRATCH_BYTES), "--tmpfs", namespaces.SCRATCH]
    return [bwrap, *arguments, "--remount-ro", "/", "--chdir", "/"], scratch


def confine_tests(folder: str, spare: int | None, newest_landlock: int = NEWEST) -> list[str]:
    """Confine this process, which holds the tests, for good; what it is confined with.

    folder: where alone it may write, its working directory. spare: the id to become, of root.
    """
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [path for path in sys.path if path != ours]  # what we need of it is here
    for limit, value in (
        (resource.RLIMIT_AS, TESTS_MEMORY),
        (resource.RLIMIT_FSIZE, TESTS_FILE),
        (resource.RLIMIT_NPROC, jail.count_threads_allowed(spare is not None)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, hard))
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = folder  # the canary has asked for it before
    abi = min(linux.landlock_abi(), newest_landlock)
    active, ruleset = [], None
    if abi:
        tree = namespaces.interpreter_tree({})
        readable = [*tree.bound, *namespaces.DEVICES, *filter(os.path.isdir, sys.path)]
        ruleset = linux.landlock_ruleset(abi, readable, [], [folder, "/dev/null"])
    seccomp = None
    if linux.has_seccomp():
        with contextlib.suppress(linux.SetupError):  # an architecture without a table
            truncate = abi >= linux.TRUNCATION
            seccomp = linux.SeccompFilter(linux.PASS_DESCRIPTORS, truncate)
    if spare is not None:
        os.chown(folder, spare, spare)
        namespaces.keep_reachable(200)
        linux.become(spare)
        active.append("a uid of their own")
    linux.give_up_privileges()
    if ruleset is not None:
        linux.landlock_restrict(ruleset)
        os.close(ruleset)
        active.append(f"Landlock {abi}")
    if seccomp:
        seccomp.install()
        active.append("seccomp")
    return active

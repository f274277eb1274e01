"""headstart.py: the driver is asked for the context that torch would wait for, and nothing else."""

import gc
import subprocess
import sys
import threading

import pytest
from builders import ROOT

import distributed
import headstart


class Driver:
    """A libcuda that counts `gpus` and writes down what it is asked. cuInit: its status."""

    def __init__(self, gpus=2, status=0):
        self.gpus, self.status, self.asked = gpus, status, []

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, index):
        if index >= self.gpus:
            return 101
        device._obj.value = 70 + index  # a handle of its own
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.asked.append(device.value)
        return 0


def asked_of(driver, device, monkeypatch, **environment) -> tuple[list[int], list[str]]:
    """The contexts, and what is imported beside torch."""
    imported = []
    monkeypatch.setattr(headstart.importlib, "import_module", imported.append)

    def load(name):
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(headstart.ctypes, "CDLL", load)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = set(threading.enumerate())
    with headstart.loading(device):
        assert not gc.isenabled()
    assert gc.isenabled()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    return getattr(driver, "asked", []), imported


RANK_1 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("driver", "device", "environment", "wanted"),
    [
        (Driver(), None, {}, [70]),
        (Driver(), "cuda", RANK_1, [71]),
        (Driver(), "cpu", {}, []),
        (Driver(gpus=1), "cuda", RANK_1, []),  # torch says that there is no such GPU
        (Driver(status=100), None, {}, []),  # a driver without a GPU
        (object(), None, {}, []),  # a library of that name that is another
        (None, None, {}, []),
    ],
)
def test_the_context_of_this_ranks_gpu(driver, device, environment, wanted, monkeypatch):
    asked, imported = asked_of(driver, device, monkeypatch, **environment)
    assert asked == wanted
    assert imported == ["triton.runtime.cache"] * len(wanted), "where there is a GPU alone"


def test_the_collector_is_back_after_an_error():
    with pytest.raises(ValueError, match="no such file"), headstart.loading("cpu"):
        raise ValueError("no such file")
    assert gc.isenabled()


@pytest.mark.parametrize("script", ["eval.py", "mmlu_eval.py"])
def test_flags_are_read_before_torch_is_loaded(script):
    """What is wrong with them is said in the time that Python takes to start."""
    words = [
        sys.executable,
        "-X",
        "importtime",
        script,
        "--checkpoint-path",
        "a",
        "--batch-size",
        "x",
    ]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and "--batch-size" in out.stderr
    assert "torch" not in {line.split()[-1] for line in out.stderr.splitlines()}


# ---------------------------------------------------------------------------------------------
# What torch.compile makes is kept between runs (distributed.setup)

KEPT = "TORCHINDUCTOR_CACHE_DIR"


@pytest.mark.parametrize("own", [None, "/somewhere/else"])
def test_what_was_compiled_lies_in_the_home_or_where_the_user_says(own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(KEPT, own or "")
    if own is None:
        monkeypatch.delenv(KEPT)
    with distributed.setup("cpu"):
        wanted = own or str(tmp_path / "roseval/inductor")
        assert distributed.os.environ[KEPT] == wanted
    assert (tmp_path / "roseval/inductor").is_dir() == (own is None)


def test_where_no_home_can_be_written_torchs_own_place_is_left(tmp_path, monkeypatch):
    (tmp_path / "roseval").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(KEPT, "")
    monkeypatch.delenv(KEPT)
    with distributed.setup("cpu"):
        assert KEPT not in distributed.os.environ

"""Shared fixtures: the real data where ROSEVAL_DATA points, and the --slow switch."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent


# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# No verdict depends on how fast the machine is.
settings.register_profile("roseval", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("roseval")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the full batteries as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="a full battery: pytest --slow runs it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def problems(data_dir):
    """HumanEval, {task_id: problem}."""
    from tasks.problems import read_problems

    return read_problems(data_dir / "HumanEval.jsonl.gz")


@pytest.fixture
def five(problems, tmp_path):
    """Five of them in a file: its path, and {number: problem}."""
    import builders

    return builders.five_problems(problems, tmp_path)


@pytest.fixture(scope="session")
def gpt2(data_dir):
    """GPT-2's tokenizer."""
    from tokenizer import build_tokenizer

    return build_tokenizer(data_dir / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What a small sweep evaluates on (small_sweeps.py)."""
    import small_sweeps

    return small_sweeps.small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_dir(tmp_path):
    """The checkpoints of a small sweep, to spoil at will."""
    import small_sweeps

    return small_sweeps.small_run(tmp_path / "run")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data. Unset: the test is skipped; set but not there: it fails."""
    value = os.environ.get("ROSEVAL_DATA")
    if not value:
        pytest.skip("needs real data: set ROSEVAL_DATA to a folder with mmlu/, text/, …")
    path = Path(value).resolve()
    assert path.is_dir(), f"ROSEVAL_DATA={value} is not a folder"
    return path

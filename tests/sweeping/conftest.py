"""Small data, and a small run."""

import pytest
from small_sweeps import small_data, small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_dir(tmp_path):
    return small_run(tmp_path / "run")

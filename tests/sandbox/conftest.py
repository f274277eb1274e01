"""Sandboxes that the tests of a file share."""

import pytest

from sandbox.judge import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, timeout=20.0) as sandbox:  # on a busy machine too
        yield sandbox


@pytest.fixture(scope="module")
def hasty():
    """For programs that are to run out of time."""
    with Sandbox(workers=1, timeout=2.0) as sandbox:
        yield sandbox

"""Sandboxes that the tests of a file share."""

import pytest
from builders import PATIENCE
from small_programs import in_a_hurry

from sandbox.judge import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    """For programs that come to an end by themselves."""
    with Sandbox(workers=2, timeout=PATIENCE) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hasty():
    """For programs that are to run out of time, after 2 s."""
    with in_a_hurry(2.0) as sandbox:
        yield sandbox

"""What all tests of backends share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

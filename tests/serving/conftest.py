"""One server for all tests of this folder, and the model in it. It is tiny: threads would only wait
for each other."""

import pytest
import torch
from builders import saved_checkpoint
from servers import TEMPLATE, serving

from checkpoint import load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory):
    """A tiny llama whose tokenizer has a chat template."""
    path = saved_checkpoint(tmp_path_factory.mktemp("served"), kind="llama")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def model(checkpoint_path):
    return load_model(checkpoint_path, "float32", "cpu")


@pytest.fixture(scope="package")
def server(checkpoint_path):
    with serving(checkpoint_path) as (client, service):
        yield client, service


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture
def service(server):
    return server[1]

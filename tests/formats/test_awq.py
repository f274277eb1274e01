"""formats/awq.py: the order of numbers in a word, and forms that are not read."""

import pytest
import torch
from quantised_files import changed, linear, one_line

SAID = {"bits": 4, "group_size": 32, "version": "gemm"}
WORD = {"gemm": 0x75316420, "gemv": 0x76543210}  # of the codes 0, 1, … 7


@pytest.mark.parametrize("version", WORD)
def test_the_order_of_a_word(version, tmp_path):
    """Along the rows for one form, along the columns for the other."""
    word = torch.tensor(WORD[version], dtype=torch.int32)
    if version == "gemm":  # [K, N / 8]
        tensors = {"qweight": word.expand(32, 1), "qzeros": torch.zeros(1, 1, dtype=torch.int32)}
        found = linear(tmp_path, "awq", SAID, tensors | {"scales": torch.ones(1, 8).half()})
        assert torch.equal(found, torch.arange(8.0)[:, None].expand(8, 32))
    else:  # [N, K / 8], with room behind the zeros and scales
        tensors = {"qweight": word.expand(5, 4), "qzeros": word.expand(5, 1)}
        tensors["scales"] = torch.ones(5, 8).half()
        found = linear(tmp_path, "awq", SAID | {"version": "GEMV"}, tensors)
        assert torch.equal(found, torch.arange(8.0).repeat(4).expand(5, 32))


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"version": "gemv_fast"}, "version is 'gemv_fast', which is not read of awq"),
        ({"version": "marlin"}, "version is 'marlin'"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq'"),
        ({"bits": 3}, "bits is 3"),
        ({"group_size": 48}, r"scales .*is not that of 32 columns|scales .*96 columns"),
    ],
)
def test_forms_that_are_not_read(said, what, tmp_path):
    one_line(changed(tmp_path, "awq-gemm", said), what)

"""backends/scoring.py: sums by window and file against brute force, chunks of any size, compiled
and eager. Whole runs: tests/test_eval.py."""

import numpy as np
import torch
import torch.nn.functional as F
from builders import CPU, tiny_model

from backends import scoring
from dataset import Windows
from distributed import Dist

T = 32


def test_layout_of_windows_over_many_files():
    """Slots by brute force: 5 files of odd sizes, windows of 8, sliding by 3."""

    class Stream:
        file_starts = np.array([0, 1, 12, 13, 14, 40])

        def __len__(self):
            return 40

        def rows(self, starts, length):
            positions = starts[:, None] + np.arange(length)
            return np.where(positions < 40, positions % 7, 0)

    windows = Windows(40, 8, stride=3)
    special = np.zeros(7, dtype=bool)
    special[5] = True
    n_bytes = np.arange(7)
    dist = Dist(0, 1, 0, CPU)
    totals = scoring.score_windows(
        lambda ids, targets, windows: targets.clamp(min=0).float() + 1,
        Stream(),
        windows,
        4,
        dist,
        n_bytes,
        special,
    )
    assert totals.tokens.sum() == 39
    for f, (start, end) in enumerate(zip(Stream.file_starts, Stream.file_starts[1:])):
        for is_special in (False, True):
            wanted = [p % 7 for p in range(max(start, 1), end) if (p % 7 == 5) == is_special]
            mine = (totals.file == f) & (totals.special == is_special)
            assert totals.nll[mine].sum() == sum(v + 1 for v in wanted)
            assert totals.tokens[mine].sum() == len(wanted)
            assert totals.bytes[mine].sum() == sum(wanted)


def test_chunked_nll_equals_cross_entropy(monkeypatch):
    """Any chunk size, a vocabulary of odd size, ignored targets."""
    torch.manual_seed(0)
    model = tiny_model(std=None)
    hidden, targets = torch.randn(37, 32), torch.randint(257, (37,))
    targets[[0, 9, 36]] = -100
    wanted = F.cross_entropy(
        hidden @ model.lm_head.weight.T, targets, reduction="none", ignore_index=-100
    )
    for chunk in (1, 8, 37, 8192):
        monkeypatch.setattr(scoring, "CHUNK_TOKENS", chunk)
        with torch.no_grad():
            got = scoring.token_nll(model, hidden, targets)
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-5)


def test_compiled_scoring_equals_eager():
    """Sixteen layers share one compilation, and its numbers are eager's."""
    model = tiny_model(std=None, n_layers=16).for_inference(torch.float32)
    ids = torch.randint(257, (2, T))
    with torch.no_grad():
        eager = scoring.nll_function(model, False)(ids, ids)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = scoring.nll_function(model, True)(ids, ids)
        again = scoring.nll_function(model, False)(ids, ids)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(again, eager)  # what was compiled for one call is not for the next

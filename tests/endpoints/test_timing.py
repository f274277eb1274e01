"""endpoints/timing.py beside arithmetic by hand."""

import numpy as np
import pytest

from endpoints.timing import Timing, measures, summary, timed


def test_a_request_in_pieces():
    timing = timed(9.0, [0.5, 1.0, 2.0], tokens=4)  # two tokens in one piece
    assert timing == Timing(2.0, 0.5, (0.5, 1.0), 4)
    assert timing.per_token == pytest.approx(0.5)  # 1.5 s for the three after the first
    assert timed(3.0) == Timing(3.0) and timed(3.0).per_token is None
    assert timed(1.0, [1.0], tokens=1).per_token is None


def test_many_requests():
    rng = np.random.default_rng(0)
    timings = []
    for tokens in range(2, 60):
        arrivals = np.cumsum(rng.uniform(0.1, 1, tokens)).tolist()
        timings.append(timed(0.0, arrivals, tokens))
    timings += [timed(5.0), timed(1.0, [1.0], 1)]
    found = measures(timings)
    whole = sorted(t.whole for t in timings)
    assert found["latency_seconds"]["mean"] == pytest.approx(sum(whole) / len(whole))
    gaps = sorted(gap for t in timings for gap in t.gaps)
    at = 0.9 * (len(gaps) - 1)
    low, high = gaps[int(at)], gaps[int(at) + 1]
    assert found["inter_token_seconds"]["p90"] == pytest.approx(low + (at % 1) * (high - low))
    tpot = [(t.whole - t.first) / (t.tokens - 1) for t in timings[:58]]
    assert found["tpot_seconds"]["mean"] == pytest.approx(sum(tpot) / 58)
    assert found["ttft_seconds"]["p50"] == pytest.approx(
        float(np.median([t.first for t in timings if t.first is not None]))
    )
    assert measures([timed(2.0)]) == {"latency_seconds": summary([2.0])} and measures([]) == {}

"""How long answers took: each request's times, and what they amount to.

    timing = timed(whole=2.0, arrivals=[0.5, 1.0, 2.0], tokens=3)
    measures([timing, …])["ttft_seconds"]["p99"]

Terms are those of vLLM's `bench serve`: time to the first token (TTFT) is that to the first piece
of a stream, time per output token (TPOT) is what the others took on the average of a request,
inter-token latency is each gap between two pieces, of all requests together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of a request: whole, to its last token; first: to its first one, and gaps, between
    two pieces, where they came piece by piece. tokens: of the answer, None where nobody counted."""

    whole: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    tokens: int | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds of each token after the first."""
        if self.first is None or not self.tokens or self.tokens < 2:
            return None
        return (self.whole - self.first) / (self.tokens - 1)


def timed(whole: float, arrivals: Sequence[float] = (), tokens: int | None = None) -> Timing:
    """The Timing of an answer whose pieces arrived at these seconds, if it came in any."""
    if not arrivals:
        return Timing(whole, tokens=tokens)
    gaps = tuple(np.diff(arrivals).tolist())
    return Timing(arrivals[-1], arrivals[0], gaps, tokens)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and high percentiles (numpy's linear ones)."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}


def measures(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """{name: summary} of what is known of these requests."""
    columns = {
        "latency_seconds": [t.whole for t in timings],
        "ttft_seconds": [t.first for t in timings if t.first is not None],
        "tpot_seconds": [t.per_token for t in timings if t.per_token is not None],
        "inter_token_seconds": [gap for t in timings for gap in t.gaps],
    }
    return {name: summary(values) for name, values in columns.items() if values}

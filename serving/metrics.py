"""What a server has done and what it is at, as Prometheus reads it.

metrics = Metrics()
metrics.count("/v1/completions", 200)
metrics.text({"sequences_unfinished": 3}, {"prompt_tokens": 512})
"""

from collections import Counter
from collections.abc import Mapping

HELP = {
    "requests": "requests answered, by route and status",
    "prompt_tokens": "tokens of prompts taken in",
    "drawn_tokens": "tokens drawn",
    "scored_tokens": "tokens of prompts scored",
    "sequences_unfinished": "samples and prompts that are drawn, scored, or wait",
    "rows": "sequences that can be drawn at a time",
}
CONTENT_TYPE = "text/plain; version=0.0.4"


class Metrics:
    """Requests by route and status; routes are ours, so their number is small."""

    def __init__(self):
        self.requests: Counter[tuple[str, int]] = Counter()

    def count(self, route: str, status: int) -> None:
        self.requests[route, status] += 1

    def text(self, gauges: Mapping[str, int], counters: Mapping[str, int]) -> str:
        """All of it in Prometheus' text format, with the numbers of others."""
        by_route = {
            f'{{route="{route}",status="{status}"}}': n
            for (route, status), n in sorted(self.requests.items())
        }
        return "".join(
            [
                _family("requests", "counter", by_route),
                *(_family(name, "counter", {"": n}) for name, n in counters.items()),
                *(_family(name, "gauge", {"": n}) for name, n in gauges.items()),
            ]
        )


def _family(name: str, kind: str, values: Mapping[str, int]) -> str:
    full = f"roseval_{name}{'_total' if kind == 'counter' else ''}"
    lines = [f"# HELP {full} {HELP[name]}", f"# TYPE {full} {kind}"]
    lines += [f"{full}{labels} {n}" for labels, n in values.items()]
    return "\n".join(lines) + "\n"

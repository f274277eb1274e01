"""How far one model's predictions lie from another's, token by token: llama.cpp's statistics.

    found = Tokens(kl, nll, base_nll, same_top, window)     # an entry for each scored token
    for name, (value, by_window, by_token) in statistics(found).items(): ...
    percentiles(found.kl)["99.9%"]
    summarise(found)                                        # as a record has it

The names, the definitions and the errors `by_token` are those of llama.cpp's `llama-perplexity
--kl-divergence` (tools/perplexity/perplexity.cpp), which takes tokens to be independent. They are
not: `by_window` is the standard error with windows as clusters (stats.ratio_stderr), and the one to
quote. Base is the reference, Q the model compared with it. Standard library and numpy only.
"""

import math
from dataclasses import dataclass, field

import numpy as np

import results
from stats import ratio_stderr

# of the distributions over tokens, from the largest down, as llama.cpp prints them
PERCENTILES = {"max": 1.0, "99.9%": 0.999, "99%": 0.99, "95%": 0.95, "90%": 0.9, "75%": 0.75}
PERCENTILES |= {"median": 0.5, "25%": 0.25, "10%": 0.1, "5%": 0.05, "1%": 0.01, "0.1%": 0.001}
PERCENTILES |= {"min": 0.0}


@dataclass(frozen=True)
class Tokens:
    """One entry for each scored token, float64 unless said otherwise, in order of the stream.

    kl: divergence of the model's distribution from the reference's, nats. nll, base_nll: of the
    right token, nats, under the model and under the reference. same_top: bool, whether both think
    the same token the likeliest. window: int, of which window it is.
    """

    kl: np.ndarray
    nll: np.ndarray
    base_nll: np.ndarray
    same_top: np.ndarray
    window: np.ndarray

    @property
    def delta_p(self) -> np.ndarray:
        """How much more probable the right token became, in -1..1."""
        return np.exp(-self.nll) - np.exp(-self.base_nll)

    def by_window(self, values: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each window, in order of the windows."""
        return np.bincount(self.window, values)


# (value, standard error with windows as clusters, the same with tokens as independent)
Found = tuple[float, float, float]


def statistics(tokens: Tokens) -> dict[str, Found]:
    """llama.cpp's statistics by its own names; shares and Δp as such, not in percent.

    Errors are NaN where there are too few windows or tokens for one, or where none is defined."""
    count = tokens.by_window(np.ones(len(tokens.kl)))

    def error(values: np.ndarray) -> tuple[float, float]:
        return ratio_stderr(tokens.by_window(values), count), token_stderr(values)

    def mean(values: np.ndarray) -> Found:
        return (float(values.mean()), *error(values))

    def scaled(value: float, factor: float, values: np.ndarray) -> Found:
        by_window, by_token = error(values)
        return value, factor * by_window, factor * by_token

    q, base, change = tokens.nll, tokens.base_nll, tokens.delta_p
    ppl_q, ppl_base = _exp(q.mean()), _exp(base.mean())
    ratio = _exp(q.mean() - base.mean())
    rms = math.sqrt((change**2).mean())
    return {
        "Mean PPL(Q)": scaled(ppl_q, ppl_q, q),
        "Mean PPL(base)": scaled(ppl_base, ppl_base, base),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (correlation(q, base), math.nan, math.nan),
        "Mean ln(PPL(Q)/PPL(base))": mean(q - base),
        "Mean PPL(Q)/PPL(base)": scaled(ratio, ratio, q - base),
        "Mean PPL(Q)-PPL(base)": scaled(ppl_q - ppl_base, 1.0, ppl_q * q - ppl_base * base),
        "Mean KLD": mean(tokens.kl),
        "Mean Δp": mean(change),
        "RMS Δp": scaled(rms, 0.5 / rms if rms else math.nan, change**2),
        "Same top p": mean(tokens.same_top.astype(np.float64)),
    }


def token_stderr(values: np.ndarray) -> float:
    """Standard error of a mean [n], the entries being independent: sqrt((E[x^2] - E[x]^2) / (n-1)).

    Of a difference that is the propagated error with the covariance, and of a share the usual
    sqrt(p(1-p) / (n-1))."""
    n = len(values)
    return math.sqrt(values.var() / (n - 1)) if n > 1 else math.nan


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, NaN where one does not vary."""
    x, y = a - a.mean(), b - b.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale else math.nan


def percentiles(values: np.ndarray) -> dict[str, float]:
    """{name: value} of PERCENTILES, interpolated linearly between the two nearest entries."""
    found = np.quantile(values, list(PERCENTILES.values()), method="linear")
    return dict(zip(PERCENTILES, map(float, found)))


def _exp(nats: float) -> float:
    return float(np.exp(nats)) if nats < 700 else math.inf


# ---------------------------------------------------------------------------------------------
# Parts of a record


@dataclass(frozen=True)
class Summary:
    """What a comparison adds to a record (results.SCHEMA): metrics, breakdown, arrays by window and
    by token, and the scores of its examples, the windows."""

    metrics: dict[str, dict] = field(default_factory=dict)
    breakdown: dict[str, dict] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)


def summarise(tokens: Tokens) -> Summary:
    """Metrics have the errors by window; `divergence` of the breakdown has both, under llama.cpp's
    names, and `percentiles` the distributions over tokens."""
    found = statistics(tokens)
    spread = {"KLD": percentiles(tokens.kl), "Δp": percentiles(tokens.delta_p)}
    n = int(tokens.window.max()) + 1

    def metric(name: str, better: str = "lower", unit: str | None = None) -> dict:
        value, by_window, _ = found[name]
        return results.metric(value, by_window, n, better=better, unit=unit)

    metrics = {
        "kl": metric("Mean KLD", unit="nats per token"),
        "kl_median": results.metric(spread["KLD"]["median"], better="lower"),
        "kl_99": results.metric(spread["KLD"]["99%"], better="lower"),
        "same_top": metric("Same top p", "higher", "share"),
        "rms_delta_p": metric("RMS Δp", unit="share"),
        "ln_ppl_ratio": metric("Mean ln(PPL(Q)/PPL(base))"),
    }
    of_tokens = {
        name: {"value": value, "stderr": by_window, "stderr_tokens": by_token}
        for name, (value, by_window, by_token) in found.items()
    }
    arrays = {
        "kl": tokens.by_window(tokens.kl),
        "same_top": tokens.by_window(tokens.same_top),
        "ln_ppl_ratio": tokens.by_window(tokens.nll - tokens.base_nll),
        "token_kl": tokens.kl.astype(np.float32),
        "token_nll": tokens.nll.astype(np.float32),
        "token_base_nll": tokens.base_nll.astype(np.float32),
        "token_same_top": tokens.same_top,
    }
    scores = {name: name for name in ("kl", "same_top", "ln_ppl_ratio")}
    return Summary(metrics, {"divergence": of_tokens, "percentiles": spread}, arrays, scores)


# ---------------------------------------------------------------------------------------------
# For people

NAME = 32  # characters of the longest name
IN_PERCENT = ("Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean Δp", "RMS Δp", "Same top p", "Δp")


def lines_of(breakdown: dict) -> list[str]:
    """A record's statistics with both errors, and its percentiles, as llama.cpp prints them."""

    def show(name: str, value: float | None) -> str:
        if value is None or math.isnan(value):
            return ""
        return f"{value:.3%}" if name in IN_PERCENT else f"{value:.6f}"

    lines = [f"  {'':{NAME}}{'':>12} {'± windows':>11} {'± tokens':>11}"]
    for name, entry in breakdown["divergence"].items():
        value, *errors = (show(name, entry[key]) for key in ("value", "stderr", "stderr_tokens"))
        lines.append(f"  {name:{NAME}}{value:>12} {errors[0]:>11} {errors[1]:>11}".rstrip())
    columns = breakdown["percentiles"]
    lines.append(f"  {'':{NAME}}" + " ".join(f"{name:>12}" for name in columns).rstrip())
    for where in PERCENTILES:
        cells = " ".join(f"{show(name, at[where]):>12}" for name, at in columns.items())
        lines.append(f"  {where:>{NAME}}{cells}".rstrip())
    return lines

"""tasks/divergence.py against llama.cpp's own arithmetic, written out here a token at a time, and
against numbers counted by hand."""

import math

import numpy as np
import pytest

from tasks import divergence
from tasks.divergence import Tokens


def some_tokens(n=401, seed=0) -> Tokens:
    """Heavy-tailed, as divergences are, in windows of unequal length."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(1.5, 1.5, n)
    nll = np.abs(base + rng.normal(0.02, 0.3, n))
    kl = rng.lognormal(-4, 2, n)
    return Tokens(kl, nll, base, rng.random(n) < 0.93, np.sort(rng.integers(0, 23, n)))


def as_llama_cpp(t: Tokens) -> dict[str, tuple[float, float]]:
    """{name: (value, error)}: sums over tokens and what is made of them, as perplexity.cpp does."""
    n = len(t.kl)

    def mean_and_error(values):
        total, squares = math.fsum(values), math.fsum(v * v for v in values)
        mean = total / n
        return mean, math.sqrt((squares / n - mean * mean) / (n - 1))

    q, base = mean_and_error(t.nll), mean_and_error(t.base_nll)
    products = math.fsum(a * b for a, b in zip(t.nll, t.base_nll))
    covariance = (products / n - q[0] * base[0]) / (n - 1)
    ratio = q[0] - base[0], math.sqrt(q[1] ** 2 + base[1] ** 2 - 2 * covariance)
    ppl_q, ppl_base = math.exp(q[0]), math.exp(base[0])
    change = [math.exp(-a) - math.exp(-b) for a, b in zip(t.nll, t.base_nll)]
    squares = mean_and_error([d * d for d in change])
    rms = math.sqrt(squares[0])
    top = sum(t.same_top) / n
    both = (ppl_q * q[1]) ** 2 + (ppl_base * base[1]) ** 2 - 2 * ppl_q * ppl_base * covariance
    return {
        "Mean PPL(Q)": (ppl_q, ppl_q * q[1]),
        "Mean PPL(base)": (ppl_base, ppl_base * base[1]),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (covariance / (q[1] * base[1]), math.nan),
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": (math.exp(ratio[0]), math.exp(ratio[0]) * ratio[1]),
        "Mean PPL(Q)-PPL(base)": (ppl_q - ppl_base, math.sqrt(both)),
        "Mean KLD": mean_and_error(t.kl),
        "Mean Δp": mean_and_error(change),
        "RMS Δp": (rms, 0.5 / rms * squares[1]),
        "Same top p": (top, math.sqrt(top * (1 - top) / (n - 1))),
    }


@pytest.mark.parametrize("n", [100, 401])
def test_statistics_are_llama_cpps(n):
    tokens = some_tokens(n)
    found, wanted = divergence.statistics(tokens), as_llama_cpp(tokens)
    assert list(found) == list(wanted)
    for name, (value, error) in wanted.items():
        assert found[name][0] == pytest.approx(value, rel=1e-10), name
        assert found[name][2] == pytest.approx(error, rel=1e-7, nan_ok=True), name


def test_percentiles_are_llama_cpps():
    """`(1 - p) * values[i] + p * values[i + 1]` at i + p = fraction * (n - 1); of an even number,
    the median is the mean of the two in the middle."""
    values = some_tokens(350).kl
    ordered, found = sorted(values), divergence.percentiles(values)
    for name, fraction in divergence.PERCENTILES.items():
        i = int(fraction * (len(values) - 1))
        p = fraction * (len(values) - 1) - i
        upper = ordered[min(i + 1, len(values) - 1)]
        assert found[name] == pytest.approx((1 - p) * ordered[i] + p * upper, rel=1e-12), name
    assert found["max"] == max(values) and found["min"] == min(values)
    assert found["median"] == pytest.approx((ordered[174] + ordered[175]) / 2)
    hand = divergence.percentiles(np.array([4.0, 1.0, 2.0, 3.0]))
    assert (hand["median"], hand["75%"], hand["25%"]) == (2.5, 3.25, 1.75)
    assert hand["90%"] == pytest.approx(3.7) and hand["99.9%"] == pytest.approx(3.997)


def test_errors_by_window_by_leaving_one_out():
    """The jackknife over windows; a window repeated as another does not make it surer by tokens
    alone, which the other error takes it to do."""
    tokens = some_tokens(2000)
    found = divergence.statistics(tokens)
    windows = np.unique(tokens.window)
    left_out = []
    for window in windows:
        kept = tokens.window != window
        parts = (tokens.kl, tokens.nll, tokens.base_nll, tokens.same_top, tokens.window)
        left_out.append(divergence.statistics(Tokens(*(part[kept] for part in parts))))
    W = len(windows)
    for name, (_, by_window, _) in found.items():
        values = np.array([each[name][0] for each in left_out])
        jackknife = math.sqrt((W - 1) / W * np.sum((values - values.mean()) ** 2))
        if name.startswith("Cor"):
            assert math.isnan(by_window)
        else:
            assert by_window == pytest.approx(jackknife, rel=0.1), name
    repeated = Tokens(*(np.repeat(part, 9) for part in parts))
    again = divergence.statistics(repeated)["Mean KLD"]
    assert again[1] == pytest.approx(found["Mean KLD"][1])
    assert again[2] == pytest.approx(found["Mean KLD"][2] / 3, rel=0.01)


def test_a_model_against_itself():
    nll = some_tokens(50).nll
    same = Tokens(np.zeros(50), nll, nll, np.ones(50, bool), np.arange(50) // 10)
    found = divergence.statistics(same)
    for name in ("Mean KLD", "Mean ln(PPL(Q)/PPL(base))", "Mean PPL(Q)-PPL(base)", "Mean Δp"):
        assert found[name] == (0.0, 0.0, 0.0)
    assert found["RMS Δp"][0] == 0 and math.isnan(found["RMS Δp"][1])
    assert found["Same top p"] == (1.0, 0.0, 0.0)
    assert found["Cor(ln(PPL(Q)), ln(PPL(base)))"][0] == pytest.approx(1)
    one = Tokens(np.ones(1), np.ones(1), np.ones(1), np.ones(1, bool), np.zeros(1, int))
    assert all(
        math.isnan(error) for _, *errors in divergence.statistics(one).values() for error in errors
    )


def test_what_a_record_gets():
    tokens = some_tokens()
    summary = divergence.summarise(tokens)
    found = divergence.statistics(tokens)
    metrics = summary.metrics
    assert metrics["kl"]["value"] == found["Mean KLD"][0]
    assert metrics["kl"]["stderr"] == found["Mean KLD"][1]
    assert (metrics["kl"]["n"], metrics["kl"]["better"]) == (23, "lower")
    assert metrics["same_top"]["better"] == "higher"
    count = np.bincount(tokens.window)
    for name, array in summary.scores.items():
        ratio = summary.arrays[array].sum() / count.sum()
        assert ratio == pytest.approx(metrics[name]["value"], rel=1e-12)
    lines = divergence.lines_of(summary.breakdown)
    wanted = f"{found['Mean KLD'][0]:.6f}"
    assert any(line.split()[:3] == ["Mean", "KLD", wanted] for line in lines)
    assert any(line.split()[0] == "99.9%" for line in lines)

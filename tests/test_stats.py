"""stats.py against scipy, closed forms, enumeration and exact fractions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

import stats


def test_ratio_stderr_is_the_mean_error_for_equal_windows():
    nll = np.random.default_rng(0).normal(3, 1, 40)
    assert stats.ratio_stderr(nll * 8, np.full(40, 8)) == pytest.approx(scipy.stats.sem(nll))
    assert math.isnan(stats.ratio_stderr([1.0], [3]))
    padded = stats.ratio_stderr([*(nll * 8), 0, 0], [*np.full(40, 8), 0, 0])
    assert padded == pytest.approx(scipy.stats.sem(nll))


def test_ratio_stderr_covers_unequal_windows():
    """Simulated: the estimated error agrees with the spread of the ratio over many corpora."""
    rng = np.random.default_rng(0)
    count = rng.integers(1, 200, (2000, 60))
    window_mean = rng.normal(3, 0.5, count.shape)
    nll = count * window_mean
    values = nll.sum(1) / count.sum(1)
    errors = [stats.ratio_stderr(a, b) for a, b in zip(nll, count)]
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.05)


def test_proportion_stderr_is_that_of_the_mean():
    correct = np.random.default_rng(0).random(57) < 0.3
    error = stats.proportion_stderr(correct.mean(), 57)
    assert error == pytest.approx(scipy.stats.sem(correct.astype(float)))
    assert math.isnan(stats.proportion_stderr(1.0, 1))


def test_bootstrap_enumerated():
    """Three examples have 27 equally likely resamples: the quantiles are known exactly."""
    values = np.array([1.0, 5.0, 30.0])
    exact = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
    low, high = stats.bootstrap_ci(values, n=40_000, level=0.8)
    assert low == pytest.approx(np.quantile(exact, 0.1, method="inverted_cdf"))
    assert high == pytest.approx(np.quantile(exact, 0.9, method="inverted_cdf"))


def test_bootstrap_agrees_with_scipy_on_pairs():
    rng = np.random.default_rng(1)
    count = rng.integers(1, 50, 200).astype(float)
    nll = count * rng.normal(3, 0.4, 200)
    ours = stats.bootstrap_ci((nll, count), stats.ratio, n=20_000)
    theirs = scipy.stats.bootstrap(
        (nll, count),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx(theirs, abs=0.05 * width)
    assert ours == stats.bootstrap_ci((nll, count), stats.ratio, n=20_000)
    assert ours != stats.bootstrap_ci((nll, count), stats.ratio, n=20_000, seed=1)
    assert np.isnan(stats.bootstrap_ci(np.array([]))).all()


@pytest.mark.parametrize("df, within", [(1, 0.13), (2, 0.02), (4, 1e-3), (10, 1e-5), (300, 1e-9)])
def test_t_quantile(df, within):
    assert stats.t_quantile(0.975, df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=within)


def test_paired_difference_is_the_paired_t_interval():
    rng = np.random.default_rng(2)
    a = rng.normal(0, 1, 25)
    b = a + rng.normal(0.3, 0.2, 25)
    out = stats.paired_difference(a, b)
    theirs = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (out["low"], out["high"]) == pytest.approx((theirs.low, theirs.high), rel=1e-5)
    assert out["difference"] == pytest.approx(np.mean(b - a)) and out["n"] == 25
    assert out["sd"] == pytest.approx(np.std(b - a, ddof=1))
    tokens = stats.paired_difference(a * 7, b * 7, count=np.full(25, 7))
    assert tokens == pytest.approx(out)


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (10, 3), (3, 10), (7, 7), (0, 40), (900, 1000)])
def test_mcnemar_is_the_binomial_test(b, c):
    expected = scipy.stats.binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    assert stats.mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_flips_are_counted_one_by_one(seed):
    """Of answers in 0..3 or none, -1, and the table's other diagonal against scipy's binomial."""
    rng = np.random.default_rng(seed)
    gold, before = rng.integers(0, 4, 300), rng.integers(-1, 4, 300)
    after = np.where(rng.random(300) < 0.2, rng.integers(-1, 4, 300), before)
    wanted = dict.fromkeys(("rw", "wr", "rr", "ww", "changed", "other"), 0)
    for g, a, b in zip(gold, before, after):
        wanted["wr"[int(a == g)] + "wr"[int(b == g)]] += 1
        wanted["changed"] += a != b
        wanted["other"] += a != b and a != g and b != g
    found = stats.flips(before == gold, (after == gold).astype(float), (before, after))
    assert found["right_to_wrong"] == wanted["rw"] and found["wrong_to_right"] == wanted["wr"]
    assert found["both_right"] == wanted["rr"] and found["both_wrong"] == wanted["ww"]
    assert (
        found["answers_changed"]
        == wanted["changed"]
        == sum((wanted["rw"], wanted["wr"], found["wrong_to_wrong"]))
    )
    assert found["wrong_to_wrong"] == wanted["other"] and found["n"] == 300
    p = scipy.stats.binomtest(wanted["rw"], wanted["rw"] + wanted["wr"]).pvalue
    assert found["p"] == pytest.approx(p, rel=1e-12)
    assert "answers_changed" not in stats.flips(before == gold, after == gold)
    assert stats.flips([], [])["p"] == 1.0


def test_mcnemar_of_thousands_of_pairs_neither_overflows_nor_dawdles():
    assert stats.mcnemar_exact(7000, 7100) == pytest.approx(
        scipy.stats.binomtest(7000, 14100).pvalue, rel=1e-9
    )


def exact_pass_at_k(n, c, k):
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def test_pass_at_k_is_exact():
    worst = 0.0
    for n in [*range(1, 13), 200]:
        for k in {1, 2, 5, n // 2, n} - {0}:
            if k <= n:
                c = np.arange(n + 1)
                ours = stats.pass_at_k(np.full(n + 1, n), c, k)
                theirs = [float(exact_pass_at_k(n, int(i), k)) for i in c]
                worst = max(worst, np.abs(ours - theirs).max())
                assert ours[0] == 0 and ours[n] == 1
    assert worst < 1e-14


def test_pass_at_k_by_enumeration():
    passed = [True] * 2 + [False] * 4
    draws = list(itertools.combinations(passed, 3))
    assert stats.pass_at_k(6, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_what_it_cannot_estimate():
    with pytest.raises(ValueError, match=r"pass@10 .*1 of 2 have fewer, the least 5"):
        stats.pass_at_k([10, 5], [1, 1], 10)
    with pytest.raises(ValueError, match="at least 1"):
        stats.pass_at_k(5, 1, 0)
    with pytest.raises(ValueError, match="no tasks"):
        stats.pass_at_k_summary([], [], 1)
    with pytest.raises(AssertionError):
        stats.pass_at_k(5, 6, 1)


def test_pass_at_k_summary_and_ragged_n():
    n, c = [10, 20, 5], [3, 0, 5]
    out = stats.pass_at_k_summary(n, c, 5)
    scores = [float(exact_pass_at_k(*pair, 5)) for pair in zip(n, c)]
    assert out["value"] == pytest.approx(np.mean(scores))
    assert out["stderr"] == pytest.approx(scipy.stats.sem(scores)) and out["n"] == 3
    assert math.isnan(stats.pass_at_k_summary([5], [1], 1)["stderr"])


def test_examples_to_resolve_has_the_promised_power():
    n = stats.examples_to_resolve(0.05, 0.4)
    rng = np.random.default_rng(0)
    samples = rng.normal(0.05, 0.4, (4000, int(n)))
    p = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.02)
    assert stats.examples_to_resolve(0.0, 1.0) == math.inf


def test_choice_logprob_is_the_log_of_the_share():
    logprobs = np.log(np.random.default_rng(0).random((20, 4)))
    choice = np.arange(20) % 4
    share = np.exp(logprobs) / np.exp(logprobs).sum(1, keepdims=True)
    expected = np.log(share[np.arange(20), choice])
    assert stats.choice_logprob(logprobs, choice) == pytest.approx(expected)
    assert np.isnan(stats.choice_logprob(np.full((1, 4), -np.inf), np.array([2])))[0]


def test_a_share_as_text():
    assert stats.show_share({"value": 0.125, "stderr": 0.031}) == "12.50% ± 3.10%"
    assert stats.show_share({"value": 1.0, "stderr": 0.0}, 7) == "100.00% ± 0.00%"
    assert stats.show_share({"value": 0.5, "stderr": math.nan}, 7) == " 50.00%"  # of one example
    assert stats.show_share({"value": 0.5}) == "50.00%"


def test_majority_at_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(5)
    for _ in range(200):
        n = int(rng.integers(1, 10))
        drawn = rng.choice(["right", "a", "b", "c", None], n).tolist()
        k = int(rng.integers(1, n + 1))
        expected = []
        for subset in itertools.combinations(drawn, k):
            votes = [sum(x == y for y in subset) if x else 0 for x in ("right", "a", "b", "c")]
            tied = votes.count(max(votes))
            expected.append(Fraction(int(votes[0] == max(votes) > 0), tied))
        count = [drawn.count(name) for name in ("right", "a", "b", "c", None)]
        found = stats.majority_at_k(count[0], [c for c in count[1:4] if c], count[4], k)
        assert found == pytest.approx(float(sum(expected) / len(expected)), abs=1e-12)


def test_majority_at_1_is_the_share_of_right_answers_and_many_samples_are_no_trouble():
    assert stats.majority_at_k(3, [2, 1], 4, 1) == pytest.approx(0.3)
    assert stats.majority_at_k(0, [5], 0, 3) == 0
    assert stats.majority_at_k(5, [], 5, 10) == 1
    assert stats.majority_at_k(400, [300], 300, 500) == pytest.approx(1, abs=1e-3)
    assert 0.4 < stats.majority_at_k(500, [500], 0, 499) < 0.6
    with pytest.raises(ValueError, match="maj@3 needs at least 3"):
        stats.majority_at_k(1, [1], 0, 3)
    with pytest.raises(ValueError, match="at most 1,000"):
        stats.majority_at_k(900, [200], 0, 3)

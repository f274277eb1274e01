"""What the numbers mean: standard errors, intervals, paired tests, pass@k and maj@k.

    ratio_stderr(nll, count)            # of a loss per token, windows being clusters
    paired_difference(a, b)             # of two checkpoints on the same examples
    pass_at_k(n, c, k)                  # unbiased, of n samples of which c passed
    majority_at_k(right, wrong, 0, k)   # self-consistency, unbiased, of n samples' answers

Standard library and numpy only. Every function names its source.
"""

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def ratio_stderr(nll: ArrayLike, count: ArrayLike) -> float:
    """Standard error of the loss per token, sum(nll) / sum(count), with windows as clusters: tokens
    of one window are not independent, windows are taken to be. nll [n] nats, count [n] tokens.
    NaN for fewer than two windows. With count = 1 it is that of a plain mean.
    Source: the ratio estimator, Cochran, Sampling Techniques (1977), section 2.11 and chapter 6."""
    nll, count = np.asarray(nll, np.float64), np.asarray(count, np.float64)
    assert nll.shape == count.shape, f"nll {nll.shape} and count {count.shape} differ in shape"
    nll, count = nll[count > 0], count[count > 0]
    n = len(nll)
    if n < 2:
        return math.nan
    residual = nll - nll.sum() / count.sum() * count
    return float(math.sqrt(n / (n - 1) * (residual @ residual)) / count.sum())


def show_share(share: dict, width: int = 0) -> str:
    """A metric that is a share, as a percentage of `width` characters and its standard error, which
    a single example does not have: "12.50% ± 3.10%"."""
    stderr = share.get("stderr", math.nan)
    error = "" if math.isnan(stderr) else f" ± {stderr:.2%}"
    return f"{share['value']:{width}.2%}{error}"


def proportion_stderr(p: float, n: int) -> float:
    """Standard error of a share p of n right answers: sqrt(p(1-p)/(n-1)), the sample standard
    deviation over sqrt(n) as lm-eval reports it. NaN for n < 2."""
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def mean_stderr(scores: np.ndarray) -> float:
    """Standard error of the mean of scores [n], the examples being a sample of all there could be:
    the sample standard deviation over sqrt(n). NaN for n < 2. Source: Miller (2024), section 2.1.
    """
    return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """sum / sum along the last axis, 0/0 = NaN: the statistic of a loss per token."""
    with np.errstate(invalid="ignore"):
        return numerator.sum(axis=-1) / denominator.sum(axis=-1)


def bootstrap_ci(
    values: ArrayLike | tuple[ArrayLike, ...],
    statistic: Callable[..., np.ndarray] = _mean,
    n: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval (low, high) from n resamples of the examples, drawn with replacement.

    values: an array [examples], or a tuple of such arrays that are resampled together (pairs, or
    nll and count). statistic: gets each array as [resamples, examples] and reduces the last axis.
    The same seed gives the same interval. (NaN, NaN) without examples.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13."""
    arrays = [np.asarray(a) for a in (values if isinstance(values, tuple) else (values,))]
    size = len(arrays[0])
    assert all(a.shape == (size,) for a in arrays), f"shapes {[a.shape for a in arrays]}"
    if size == 0:
        return math.nan, math.nan
    rng, drawn = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // size)  # 16 MB of indices at a time
    for start in range(0, n, step):
        index = rng.integers(size, size=(min(step, n - start), size), dtype=np.int32)
        drawn.append(statistic(*(a[index] for a in arrays)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return float(low), float(high)


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t. Source: the expansion in 1/df, Abramowitz & Stegun 26.7.5; within
    0.1% for df >= 4 at p = 0.975, too small below (12% at df = 1)."""
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * df**4)
    )


def paired_difference(
    a: ArrayLike, b: ArrayLike, count: ArrayLike | None = None, level: float = 0.95
) -> dict[str, float]:
    """How far b lies from a on the same examples: {difference, stderr, low, high, sd, n}.

    a, b [n]: scores, or with `count` [n] the summed nats of windows of that many tokens; then the
    difference is in nats per token. sd is per example: stderr * sqrt(n), for
    `examples_to_resolve`. The interval is Student's t; NaN for fewer than two examples.
    Source: Miller, Adding Error Bars to Evals (2024), section 4.2; ratios as in `ratio_stderr`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"a {a.shape} and b {b.shape} are not the same examples"
    count = np.ones_like(a) if count is None else np.asarray(count, np.float64)
    kept = count > 0
    n = int(kept.sum())
    difference = float(ratio((b - a)[kept], count[kept])) if n else math.nan
    stderr = ratio_stderr(b - a, count)
    margin = t_quantile((1 + level) / 2, n - 1) * stderr if n > 1 else math.nan
    return {
        "difference": difference,
        "stderr": stderr,
        "low": difference - margin,
        "high": difference + margin,
        "sd": stderr * math.sqrt(n),
        "n": n,
    }


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value that b and c, the examples that only one of two models got right, come
    from a fair coin: min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2), in exact integers.
    Source: McNemar, Psychometrika 12 (1947); the exact form, Fagerland et al. (2013)."""
    b, c = int(b), int(c)
    term, below = 1, 0  # C(b + c, i), and their sum up to min(b, c)
    for i in range(min(b, c) + 1):
        below += term
        term = term * (b + c - i) // (i + 1)
    return min(1.0, 2 * below / 2 ** (b + c))


def flips(before: ArrayLike, after: ArrayLike, answers: tuple | None = None) -> dict:
    """What became of each example's verdict, 1 for right and 0 for wrong, from one model to another
    on the same examples [n]: {right_to_wrong, wrong_to_right, both_right, both_wrong, n, p}; p is
    `mcnemar_exact`'s. answers: what each answered, (before, after) [n] each: adds
    `answers_changed`, of right and wrong ones alike, and `wrong_to_wrong` among them.
    Source: Dutta et al., Accuracy is Not All You Need, arXiv:2407.09141 (2024)."""
    x, y = (np.asarray(verdicts).astype(bool) for verdicts in (before, after))
    assert x.shape == y.shape, f"before {x.shape} and after {y.shape} are not the same examples"
    lost, won = int((x & ~y).sum()), int((~x & y).sum())
    found: dict[str, float] = {"right_to_wrong": lost, "wrong_to_right": won}
    found["both_right"] = int((x & y).sum())
    found |= {"both_wrong": int((~x & ~y).sum()), "n": len(x), "p": mcnemar_exact(lost, won)}
    if answers is not None:
        changed = np.asarray(answers[0]) != np.asarray(answers[1])
        found["answers_changed"] = int(changed.sum())
        found["wrong_to_wrong"] = int((changed & ~x & ~y).sum())
    return found


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray | float:
    """1 - C(n-c, k) / C(n, k) for each task: the chance that one of k samples, out of n drawn of
    which c passed, passes. n, c: integers or arrays [tasks]. ValueError when k exceeds an n.
    Computed as 1 - prod_{j<k} (n-c-j)/(n-j), which neither overflows nor loses digits.
    Source: Chen et al., Evaluating Large Language Models Trained on Code (2021), eq. 1."""
    n, c = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(c, np.int64))
    if k < 1:
        raise ValueError(f"pass@{k}: k must be at least 1")
    if np.any(n < k):
        raise ValueError(
            f"pass@{k} needs at least {k} samples of every task; {int((n < k).sum())} of {n.size} "
            f"have fewer, the least {int(n.min())}: draw more samples or ask for a smaller k"
        )
    assert np.all((c >= 0) & (c <= n)), f"c must lie in 0..n: c {c}, n {n}"
    none_passes = np.ones(n.shape)
    for j in range(k):
        none_passes *= np.maximum(n - c - j, 0) / (n - j)
    return 1 - none_passes if n.ndim else float(1 - none_passes)


def pass_at_k_summary(n: ArrayLike, c: ArrayLike, k: int) -> dict[str, float]:
    """{value, stderr, n} over tasks: the mean of `pass_at_k` and the standard error of that mean,
    the tasks being a sample of all the tasks there could be (so it holds both the spread between
    tasks and that of the samples drawn). n, c [tasks]. Source: Miller (2024), sections 2.1, 3.1."""
    scores = np.atleast_1d(pass_at_k(n, c, k))
    if not len(scores):
        raise ValueError(f"pass@{k}: there are no tasks")
    return {"value": float(scores.mean()), "stderr": mean_stderr(scores), "n": len(scores)}


def examples_to_resolve(diff: float, sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """How many paired examples a two-sided test at level alpha needs to see a difference `diff`
    with the given power, when single differences have standard deviation `sd`:
    ((z_{1-alpha/2} + z_power) sd / diff)^2, rounded up; infinite for diff = 0.
    Source: Miller (2024), section 5 (the usual sample size of a paired test)."""
    if not diff or not math.isfinite(sd):
        return math.inf
    z = NormalDist().inv_cdf
    return float(math.ceil(((z(1 - alpha / 2) + z(power)) * sd / diff) ** 2))


def choice_logprob(logprobs: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """log-probability [n], in nats, of the choice [n] among those offered, whose log-probabilities
    [n, choices] need not add up to 1. NaN where all are impossible."""
    total = np.logaddexp.reduce(logprobs, axis=1)
    with np.errstate(invalid="ignore"):
        return logprobs[np.arange(len(choice)), np.asarray(choice, int)] - total


MOST_SAMPLES = 1000  # of a task: more subsets than float64 can count


def majority_at_k(right: int, wrong: Sequence[int], silent: int, k: int) -> float:
    """The chance that the answer given most often by k samples is the right one, the k being any
    of the n = right + sum(wrong) + silent drawn, all subsets alike: the unbiased estimate, where
    "the first k" would be one subset. right: samples with the right answer; wrong: samples with
    each wrong one; silent: those without an answer, which have no vote. Among answers given equally
    often one is taken at random; without any, nothing is right. ValueError for k > n, and for
    n > MOST_SAMPLES.

    Exact up to rounding: subsets are counted by generating functions, x to the power of their size;
    a tie with t others counts 1 / (t + 1), which is the integral of y^t over 0..1, taken by Gauss's
    rule. Self-consistency: Wang et al., arXiv:2203.11171 (2022).
    """
    n = right + sum(wrong) + silent
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs at least {k} samples of every task, not {n}")
    if n > MOST_SAMPLES:
        raise ValueError(f"maj@{k}: at most {MOST_SAMPLES:,} samples of a task, not {n:,}")
    return _majority(right, tuple(sorted(wrong)), silent, k)


@functools.lru_cache(maxsize=65536)
def _majority(right: int, wrong: tuple[int, ...], silent: int, k: int) -> float:
    won = 0.0
    for votes in range(1, min(right, k) + 1):
        others = k - votes
        ties = min(len(wrong), others // votes)  # at most: the degree of the integrand in y
        points, weights = np.polynomial.legendre.leggauss(ties // 2 + 1)
        for y, weight in zip((points + 1) / 2, weights / 2):
            ways = _choices(silent, others)  # [size]: subsets of everybody else, of each size
            for group in wrong:
                fewer = _choices(group, min(votes, others)).copy()
                fewer[votes:] *= y
                ways = np.convolve(ways, fewer)[: others + 1]
            if len(ways) > others:
                won += weight * math.comb(right, votes) * ways[others]
    return won / math.comb(right + sum(wrong) + silent, k)


@functools.cache
def _choices(group: int, most: int) -> np.ndarray:
    """Subsets of a group by their size, 0 to at most `most`."""
    return np.array([math.comb(group, i) for i in range(min(group, most) + 1)], np.float64)

"""Scores that are no mean over examples: their standard errors and paired tests, by the bootstrap.

    columns = np.column_stack([confidence, correct])        # what each example gives, [n, k]
    score_of("auroc", columns)
    spread("auroc", columns)                                # {stderr, low, high}
    spreads(("auroc", "ece"), columns)                      # of several, on the same draws
    paired("bleu", a, b)                                    # b against a: difference, interval, p

A score is a function of weighted examples, so that a resample is one row of weights: how often each
example was drawn. The same seed draws the same examples for every score and for both sides of a
pair, and those that sacrebleu draws (Koehn 2004, "Statistical Significance Tests for Machine
Translation Evaluation"). Standard library and numpy only.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import certainty
from tasks import corpus_scores

RESAMPLES, SEED = 1000, 12345  # sacrebleu's
CELLS = 4_000_000  # weights held at a time
TAIL = 40  # a 40th of the resamples lies on either side of the interval

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # weights [R, n], columns [n, k] -> [R]


def of_sums(score: Callable[[np.ndarray], np.ndarray]) -> Score:
    """A score of what the columns add up to."""

    def weighted(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
        # not BLAS, whose sums depend on how many threads it has
        return score(np.einsum("rn,nk->rk", weights, columns))

    return weighted


def _share(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


SCORES: dict[str, Score] = {
    "bleu": of_sums(corpus_scores.bleu),
    "chrf": of_sums(corpus_scores.chrf),
    "ter": of_sums(corpus_scores.ter),
    "share": of_sums(_share),  # of what the second column counts, what the first does
    "perplexity": of_sums(lambda sums: np.exp(_share(sums))),  # nats, tokens
    "bits_per_byte": of_sums(lambda sums: _share(sums) / math.log(2)),  # nats, bytes
    "ece": certainty.ece,
    "ece_mass": certainty.ece_mass,
    "auroc": certainty.auroc,
    "aurc": certainty.aurc,
    "selective_accuracy": certainty.selective_accuracy,
}
SEGMENTS = {  # of single examples, where that means something
    "bleu": lambda columns: corpus_scores.bleu(columns, effective_order=True),
    "chrf": corpus_scores.chrf,
    "ter": corpus_scores.ter,
}


def score_of(name: str, columns: np.ndarray) -> float:
    """Of all examples, each once; NaN where the score is not defined."""
    return float(SCORES[name](np.ones((1, len(columns))), columns)[0])


def drawn(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights [some, n] of the resamples: how often each of n examples was drawn."""
    rng, step = np.random.default_rng(seed), max(1, CELLS // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        index = rng.choice(n, size=(rows, n), replace=True)
        index += np.arange(rows)[:, None] * n
        yield np.bincount(index.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def spread(
    name: str, columns: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, float]:
    """{stderr, low, high} of a score of columns [n, k]: the standard deviation and the 95%
    percentile interval over resamples. NaN for fewer than two examples."""
    return spreads((name,), columns, resamples, seed)[name]


def spreads(
    names: Sequence[str], columns: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, dict[str, float]]:
    """`spread` of each score, side by side, of one drawing."""
    if len(columns) < 2:
        return {name: dict.fromkeys(("stderr", "low", "high"), math.nan) for name in names}
    parts: list[list[np.ndarray]] = []
    with ThreadPoolExecutor(len(names)) as pool:  # numpy lets others work meanwhile
        for weights in drawn(len(columns), resamples, seed):
            score = functools.partial(_scored, weights, columns)
            parts.append(list(pool.map(score, names)))
    return {name: _described(np.concatenate(own)) for name, own in zip(names, zip(*parts))}


def _scored(weights: np.ndarray, columns: np.ndarray, name: str) -> np.ndarray:
    return SCORES[name](weights, columns)


def paired(
    name: str, a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, float]:
    """How far b's score lies from a's on the same examples, both [n, k]: {difference, stderr, low,
    high, sd, n, p}. p: two-sided, the share of resamples whose difference strays from their mean
    difference by more than the one that was seen, as sacrebleu counts (Riezler & Maxwell 2005); 1
    where there is no difference, for which sacrebleu has the smallest p. sd is per example, for
    stats.examples_to_resolve."""
    assert a.shape == b.shape, f"a {a.shape} and b {b.shape} are not the same examples"
    n, difference = len(a), score_of(name, b) - score_of(name, a)
    out = {"difference": difference, "n": n}
    if n < 2 or math.isnan(difference):
        return out | dict.fromkeys(("stderr", "low", "high", "sd", "p"), math.nan)
    score, parts = SCORES[name], [np.zeros((0, 2))]
    for weights in drawn(n, resamples, seed):
        parts.append(np.column_stack([score(weights, a), score(weights, b)]))
    before, after = np.concatenate(parts).T
    out |= _described(after - before)
    out["sd"] = out["stderr"] * math.sqrt(n)
    apart = np.abs(after - before)
    strays = apart - np.nanmean(apart) > abs(difference)
    out["p"] = (int(strays.sum()) + 1) / (resamples + 1) if difference else 1.0
    return out


def _described(scores: np.ndarray) -> dict[str, float]:
    """Of those that are defined: an area under a curve is not, where all were right."""
    scores = np.sort(scores[np.isfinite(scores)])
    if len(scores) < 2:
        return dict.fromkeys(("stderr", "low", "high"), math.nan)
    cut = len(scores) // TAIL
    low, high = float(scores[cut]), float(scores[-1 - cut])
    return {"stderr": float(scores.std(ddof=1)), "low": low, "high": high}

"""Does it know what it knows? Confidence beside correctness: errors, areas, temperature.

    measure(confidence, correct)                # {"ece": 0.04, "auroc": 0.71, ...}
    reliability(confidence, correct)            # bins, for a diagram
    risk_coverage(confidence, correct)          # points of the curve
    fit_temperature(logits, gold)               # on questions other than those it is applied to

confidence [n] in 0..1 is of the answer given, correct [n] whether it was right. The functions of
`weights` [R, n] and `columns` [n, 2], which are those two, give a score for each of R resamples
(resampling.py): how often each example counts. Examples that are equally confident have no order:
curves and areas are the mean over all of theirs. Every function names its source; numpy only.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 10
SHARE = 0.1  # of the examples, in `selective_accuracy`


def columns_of(confidence: ArrayLike, correct: ArrayLike) -> np.ndarray:
    """[n, 2]. ValueError for what is no probability."""
    p, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    assert p.shape == right.shape, f"confidence {p.shape}, correct {right.shape}"
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"calibration: probabilities must lie in 0..1, not {p.min()}..{p.max()}")
    return np.column_stack([p, right])


def measure(confidence: ArrayLike, correct: ArrayLike) -> dict[str, float]:
    """Every figure of all examples, NaN where it is not defined: ece, ece_mass, brier, auroc, aurc,
    selective_accuracy."""
    columns = columns_of(confidence, correct)
    names = ("ece", "ece_mass", "brier", "auroc", "aurc", "selective_accuracy")
    if not len(columns):
        return dict.fromkeys(names, math.nan)
    once = np.ones((1, len(columns)))
    found = {"ece": ece, "ece_mass": ece_mass, "auroc": auroc, "aurc": aurc}
    found["selective_accuracy"] = selective_accuracy
    out = {name: float(score(once, columns)[0]) for name, score in found.items()}
    return {name: out.get(name, float(brier(*columns.T).mean())) for name in names}


# ---------------------------------------------------------------------------------------------
# Calibration errors


def brier(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """(p - correct)^2 [n], 0..1, of the answer given alone. Source: Brier (1950), two classes."""
    return (confidence - correct) ** 2


def brier_classes(probabilities: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Sum over classes of (p - 1 for the gold one)^2 [n], 0..2, of probabilities [n, classes]: not
    the number that `brier` is. Source: Brier (1950); lm-evaluation-harness's brier_score."""
    wanted = np.zeros(probabilities.shape)
    wanted[np.arange(len(gold)), gold] = 1
    return ((probabilities - wanted) ** 2).sum(axis=1)


def width_bins(confidence: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """(bin of each [n], upper edges): bins (low, high] of equal width, 0 in the first."""
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return index, np.arange(1, bins + 1) / bins


def mass_bins(confidence: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """(bin of each [n], upper edges): bins (low, high] with about as many examples each, their
    edges halfway between neighbours; those whose edges coincide, since many examples are equally
    confident, are one. Source: Kumar et al., "Verified Uncertainty Calibration" (2019), the package
    uncertainty-calibration's get_equal_bins, which is HELM's ece_10_bin."""
    ordered = np.sort(confidence)
    sizes = [len(part) for part in np.array_split(ordered, min(bins, len(ordered)))]
    cuts = np.cumsum(sizes)[:-1]
    edges = np.unique(np.append((ordered[cuts - 1] + ordered[cuts]) / 2, 1.0))
    return np.searchsorted(edges, confidence), edges


def ece(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Expected calibration error [R]: |accuracy - mean confidence| of bins of equal width, weighted
    by their counts. Source: Naeini et al. (2015), 10 bins; Guo et al. (2017) have 15."""
    return _error(weights, columns, width_bins(columns[:, 0])[0])


def ece_mass(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The same over bins of equal mass, which are the whole sample's in every resample."""
    return _error(weights, columns, mass_bins(columns[:, 0])[0])


def _error(weights: np.ndarray, columns: np.ndarray, index: np.ndarray) -> np.ndarray:
    gaps = np.zeros((len(index), index.max() + 1))
    gaps[np.arange(len(index)), index] = columns[:, 1] - columns[:, 0]
    return np.abs(np.einsum("rn,nb->rb", weights, gaps)).sum(axis=1) / weights.sum(axis=1)


def reliability(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, equal_mass: bool = False
) -> list[dict[str, Any]]:
    """Every bin that holds examples, as {low, high, n, confidence, accuracy}: what a reliability
    diagram draws and what the calibration errors are made of."""
    p, right = columns_of(confidence, correct).T
    if not p.size:
        return []
    index, edges = (mass_bins if equal_mass else width_bins)(p, bins)
    n = np.bincount(index, minlength=len(edges))
    said = np.bincount(index, p, len(edges)) / np.maximum(n, 1)
    was = np.bincount(index, right, len(edges)) / np.maximum(n, 1)
    lows = np.concatenate([[0.0], edges[:-1]])
    return [
        {
            "low": float(lows[i]),
            "high": float(edges[i]),
            "n": int(n[i]),
            "confidence": float(said[i]),
            "accuracy": float(was[i]),
        }
        for i in np.flatnonzero(n).tolist()
    ]


# ---------------------------------------------------------------------------------------------
# Telling right from wrong: answering only when sure


def _by_confidence(
    weights: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Groups [R, G] of equally confident examples, the most confident first: how many, how many of
    them right, and how many and how many right come before them."""
    order = np.argsort(-columns[:, 0], kind="stable")
    p, right = columns[order].T
    starts = np.flatnonzero(np.append(True, p[1:] != p[:-1]))
    n = np.take(weights, order, axis=1)  # rows lie whole, whose sums go in their order
    hits = n * right
    if len(starts) < len(p):
        n, hits = (np.add.reduceat(each, starts, axis=1) for each in (n, hits))
    return n, hits, np.cumsum(n, axis=1) - n, np.cumsum(hits, axis=1) - hits


def auroc(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The chance [R] that a right answer is given with more confidence than a wrong one, ties
    counting half; NaN where all are right or all wrong. Source: Hanley & McNeil (1982)."""
    n, hits, before, hits_before = _by_confidence(weights, columns)
    wrong, right = (n - hits).sum(axis=1), hits.sum(axis=1)
    wrong_below = wrong[:, None] - (before - hits_before) - (n - hits)
    won = (hits * (wrong_below + (n - hits) / 2)).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return won / (right * wrong)


def aurc(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Area under the risk-coverage curve [R]: the mean over k of the share of errors among the k
    most confident; lower is better. HELM's selective_cov_acc_area is 1 less this. Source: Geifman
    et al. (2019).

    Of m examples that are equally confident and e of them wrong, after K with E wrong, the j-th has
    a mean risk of (E + j e/m) / (K + j) over their orders; over j that adds up to
    e + (E - K e/m) (H(K + m) - H(K)), with the harmonic numbers H."""
    n, hits, before, hits_before = _by_confidence(weights, columns)
    total = int(weights[0].sum())
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total + 1))])
    errors, errors_before = n - hits, before - hits_before
    rate = errors / np.maximum(n, 1)
    tail = harmonic[(before + n).astype(int)] - harmonic[before.astype(int)]
    return (errors + (errors_before - before * rate) * tail).sum(axis=1) / total


def selective_accuracy(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Accuracy [R] of the most confident tenth, int(n / 10) + 1 examples as in HELM's
    selective_acc@10; of equally confident ones the mean share counts."""
    n, hits, before, _ = _by_confidence(weights, columns)
    k = int(SHARE * weights[0].sum()) + 1
    taken = np.clip(k - before, 0, n)  # of each group
    return (hits * (taken / np.maximum(n, 1))).sum(axis=1) / k


def risk_coverage(
    confidence: ArrayLike, correct: ArrayLike, points: int = 100
) -> list[dict[str, float]]:
    """The curve, at so many shares of the examples as {coverage, risk, threshold}: the share of
    errors among the most confident ones, the least confidence among which is the threshold."""
    columns = columns_of(confidence, correct)
    total = len(columns)
    if not total:
        return []
    n, hits, before, hits_before = (
        part[0] for part in _by_confidence(np.ones((1, total)), columns)
    )
    levels = np.unique(columns[:, 0])[::-1]
    curve = []
    for k in np.unique(-(-np.arange(1, points + 1) * total // points)).tolist():
        at = int(np.searchsorted(before, k)) - 1  # the group of the k-th
        right = hits_before[at] + hits[at] * (k - before[at]) / n[at]
        point = {"coverage": k / total, "risk": float(1 - right / k)}
        curve.append(point | {"threshold": float(levels[at])})
    return curve


# ---------------------------------------------------------------------------------------------
# Temperature

HOTTEST = 1000.0  # and the coldest is its inverse


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities [n, classes] of logits / temperature; impossible classes may be -inf."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def log_loss(logits: np.ndarray, gold: np.ndarray, temperature: float = 1.0) -> float:
    """Mean nats of the gold class [n] among logits [n, classes] / temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    chosen = scaled[np.arange(len(gold)), gold]
    return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - chosen))


def fit_temperature(logits: np.ndarray, gold: np.ndarray) -> float:
    """The temperature T that minimises the log loss of softmax(logits / T). To be fitted on
    examples other than those that it is applied to. The log loss is convex in 1/T: its derivative
    there, mean logit less the gold class's, is halved in on. At an end of 1/HOTTEST..HOTTEST where
    no T is best: all answers right, or worse than chance. Source: Guo et al., "On Calibration of
    Modern Neural Networks" (2017), section 4.2."""
    logits = np.asarray(logits, np.float64)
    if not len(logits):
        raise ValueError("a temperature cannot be fitted without examples")
    possible = np.isfinite(logits)
    values = np.where(possible, logits, 0.0)
    chosen = logits[np.arange(len(gold)), gold]
    if not np.isfinite(chosen).all():
        raise ValueError("a temperature cannot be fitted: a right answer has no probability at all")

    if (np.where(possible, logits, chosen[:, None]) == chosen[:, None]).all():
        return 1.0  # nothing is likelier than anything else, at any temperature

    def slope(log_beta: float) -> float:
        p = softmax(logits * math.exp(log_beta))
        return float(np.mean((p * values).sum(axis=1) - chosen))

    low, high = -math.log(HOTTEST), math.log(HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return math.exp(-(low + high) / 2)

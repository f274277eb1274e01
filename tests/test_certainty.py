"""Calibration beside scikit-learn, uncertainty-calibration and brute force, on drawn scores and on
those that break implementations: ties, one bin, one class, exact 0 and 1, one example."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
from calibration import utils as uncertainty_calibration
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

import certainty


def cases():
    """(confidence, correct) drawn, and of the kinds that rules are made for."""
    rng = np.random.default_rng(0)
    for n in (5, 23, 200):
        p = rng.random(n)
        yield p, rng.random(n) < p**2
        p = rng.choice([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0], n)  # ties, and edges of bins
        yield p, rng.random(n) < p
    yield np.full(12, 0.55), np.arange(12) % 3 == 0  # all in one bin, all tied
    yield np.linspace(0, 1, 11), np.ones(11, bool)  # all right
    yield np.linspace(0, 1, 11), np.zeros(11, bool)  # all wrong
    yield np.array([0.0, 1.0, 0.0, 1.0]), np.array([False, True, True, False])
    for p, right in itertools.product((0.0, 0.5, 1.0), (False, True)):
        yield np.array([p]), np.array([right])


def equal_width(p, right):
    """By the words: bins (low, high], 0 in the first."""
    total = 0.0
    for i in range(10):
        inside = [j for j in range(len(p)) if i / 10 < p[j] <= (i + 1) / 10 or (i == 0 == p[j])]
        if inside:
            total += len(inside) / len(p) * abs(np.mean(right[inside]) - np.mean(p[inside]))
    return total


def every_order_of_ties(p, right):
    """The mean over orders of (area under the risk-coverage curve, accuracy of the first tenth)."""
    found = []
    for order in itertools.permutations(range(len(p))):
        if all(p[a] >= p[b] for a, b in itertools.pairwise(order)):
            share = np.cumsum(right[list(order)]) / np.arange(1, len(p) + 1)
            found.append((1 - share.mean(), share[int(0.1 * len(p))]))
    return np.mean(found, axis=0)


def test_figures_are_those_of_independent_implementations():
    for p, right in cases():
        found = certainty.measure(p, right)
        assert found["brier"] == pytest.approx(np.mean((p - right) ** 2))
        assert found["ece"] == pytest.approx(equal_width(p, right), abs=1e-12)
        theirs = uncertainty_calibration.get_ece_em(p, right.astype(int), num_bins=10)
        assert found["ece_mass"] == pytest.approx(theirs, abs=1e-12)
        if 0 < right.sum() < len(p):
            assert found["auroc"] == pytest.approx(roc_auc_score(right, p))
            assert found["brier"] == pytest.approx(brier_score_loss(right, p))
        else:
            assert math.isnan(found["auroc"])
        if len(set(p)) == len(p):
            area, first = uncertainty_calibration.get_selective_stats(p, right)  # HELM's
            assert found["aurc"] == pytest.approx(1 - area)
            assert found["selective_accuracy"] == pytest.approx(first)


def test_ties_have_the_mean_of_their_orders():
    rng = np.random.default_rng(1)
    for n in (1, 2, 4, 6, 7):
        p, right = rng.choice([0.2, 0.5, 0.9], n), rng.random(n) < 0.5
        area, first = every_order_of_ties(p, right)
        found = certainty.measure(p, right)
        assert found["aurc"] == pytest.approx(area, abs=1e-12)
        assert found["selective_accuracy"] == pytest.approx(first, abs=1e-12)


def test_weights_are_examples_that_stand_there_so_often():
    rng = np.random.default_rng(2)
    p, right = rng.choice([0.0, 0.3, 0.5, 0.8, 1.0], 30), rng.random(30) < 0.6
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)
    columns = certainty.columns_of(p, right)
    for name in ("ece", "auroc", "aurc", "selective_accuracy"):
        together = getattr(certainty, name)(weights, columns)
        for row, score in zip(weights.astype(int), together):
            alone = certainty.measure(np.repeat(p, row), np.repeat(right, row))[name]
            assert score == pytest.approx(alone, abs=1e-12), name


def test_bins_and_curves_hold_every_example_once():
    for p, right in cases():
        for equal_mass in (False, True):
            bins = certainty.reliability(p, right, equal_mass=equal_mass)
            assert sum(b["n"] for b in bins) == len(p)
            error = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(p)
            name = "ece_mass" if equal_mass else "ece"
            assert error == pytest.approx(certainty.measure(p, right)[name], abs=1e-12)
            for b in bins:
                inside = (p > b["low"]) & (p <= b["high"])
                inside |= (p == 0) & (b is bins[0]) & (b["low"] == 0)
                assert b["n"] == inside.sum()
                assert b["confidence"] == pytest.approx(p[inside].mean())
        curve = certainty.risk_coverage(p, right, points=len(p))
        assert [point["coverage"] for point in curve] == pytest.approx(
            np.arange(1, len(p) + 1) / len(p)
        )
        risks = [point["risk"] for point in curve]
        assert np.mean(risks) == pytest.approx(certainty.measure(p, right)["aurc"], abs=1e-12)
        assert risks[-1] == pytest.approx(1 - right.mean())
        assert [point["threshold"] for point in curve] == sorted(p.tolist(), reverse=True)
    assert certainty.risk_coverage([], []) == certainty.reliability([], []) == []
    assert len(certainty.risk_coverage(np.linspace(0, 1, 1000), np.ones(1000), 50)) == 50


def test_two_brier_scores_are_two_numbers():
    rng = np.random.default_rng(3)
    p, gold = rng.dirichlet(np.ones(4), 60), rng.integers(0, 4, 60)
    ours = certainty.brier_classes(p, gold).mean()
    theirs = brier_score_loss(gold, p, labels=range(4), scale_by_half=False)
    assert ours == pytest.approx(theirs)
    top = p.max(axis=1), p.argmax(axis=1) == gold
    assert certainty.measure(*top)["brier"] != pytest.approx(ours, rel=0.05)


def test_a_temperature_is_what_an_optimiser_finds():
    rng = np.random.default_rng(4)
    for scale, n, k in ((0.3, 300, 4), (1.0, 50, 3), (7.0, 300, 5)):
        truth = rng.normal(size=(n, k)) * 2
        gold = np.array([rng.choice(k, p=row) for row in certainty.softmax(truth)])
        logits = truth * scale
        found = certainty.fit_temperature(logits, gold)

        def loss(log_t, logits=logits, gold=gold, k=k):
            p = certainty.softmax(logits, math.exp(log_t))
            return log_loss(gold, p, labels=range(k))

        best = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded")
        assert found == pytest.approx(math.exp(best.x), rel=1e-3)
        assert certainty.log_loss(logits, gold, found) == pytest.approx(best.fun, abs=1e-9)
        assert certainty.log_loss(logits, gold) >= best.fun - 1e-12
    wide = np.hstack([logits, np.full((n, 1), -np.inf)])  # a choice that some do not have
    assert certainty.fit_temperature(wide, gold) == pytest.approx(found)


def test_temperatures_without_an_optimum_stay_within_bounds():
    logits, right = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    assert certainty.fit_temperature(logits, right) == pytest.approx(1 / certainty.HOTTEST)
    assert certainty.fit_temperature(logits, 1 - right) == pytest.approx(certainty.HOTTEST)
    assert certainty.fit_temperature(np.zeros((3, 4)), np.arange(3)) == 1
    with pytest.raises(ValueError, match="without examples"):
        certainty.fit_temperature(np.zeros((0, 4)), np.zeros(0, int))
    with pytest.raises(ValueError, match="no probability at all"):
        certainty.fit_temperature(np.array([[0.0, -np.inf]]), np.array([1]))


def test_what_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        certainty.measure([1.5], [True])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        certainty.reliability([math.nan], [True])
    assert all(math.isnan(value) for value in certainty.measure([], []).values())

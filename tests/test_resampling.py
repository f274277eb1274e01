"""Bootstraps beside sacrebleu's, and beside resamples that are drawn one by one."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest
from sklearn.metrics import roc_auc_score

import resampling
from tasks.corpus_scores import METRICS, counted

WORDS = [f"{a}{b}" for a in "bdkmst" for b in ("a", "e", "ilo", "un")]
PEERS = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}


def systems(n=60, noise=(0.3, 0.25), seed=0):
    """References, and what two systems that err so often make of them."""
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, rng.integers(4, 15))) for _ in range(n)]

    def spoilt(words, share):
        return " ".join(w if rng.random() > share else rng.choice(WORDS) for w in words)

    return [" ".join(r) for r in references], *([spoilt(r, s) for r in references] for s in noise)


def counts_of(metric, hypotheses, references):
    return np.array([counted(metric, h, [r]) for h, r in zip(hypotheses, references)])


@pytest.mark.parametrize("seed", ["12345", "7"])
def test_a_pair_is_tested_as_sacrebleu_does(seed, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", seed)
    references, one, two = systems()
    named = [("A", one), ("B", two)]
    _, theirs = PairedTest(named, PEERS, [references], test_type="bs", n_samples=1000)()
    for (name, metric), peer in zip(PEERS.items(), [k for k in theirs if k != "System"]):
        a, b = counts_of(metric, one, references), counts_of(metric, two, references)
        before, after = theirs[peer]
        ours = resampling.paired(METRICS[name], a, b, seed=int(seed))
        assert ours["difference"] == pytest.approx(after.score - before.score, abs=1e-9)
        assert ours["p"] == after.p_value
        own = resampling.spread(METRICS[name], b, seed=int(seed))
        assert (own["high"] - own["low"]) / 2 == pytest.approx(after.ci, abs=1e-4)  # in float32
        assert ours["low"] < ours["difference"] < ours["high"]
    assert resampling.paired("bleu", a, a)["p"] == 1, "no difference at all is no significant one"


def test_resamples_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    columns = np.random.default_rng(0).random((57, 2))
    whole = np.concatenate(list(resampling.drawn(57, 100, 3)))
    assert whole.shape == (100, 57) and (whole.sum(axis=1) == 57).all()
    found = resampling.spread("ter", columns, 100, 3)
    monkeypatch.setattr(resampling, "CELLS", 57 * 7)
    assert np.array_equal(np.concatenate(list(resampling.drawn(57, 100, 3))), whole)
    assert resampling.spread("ter", columns, 100, 3) == found


def test_an_area_is_resampled_as_one_would_by_hand():
    rng = np.random.default_rng(0)
    p = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], 40)
    right = (rng.random(40) < p).astype(float)
    columns, draws = np.column_stack([p, right]), np.random.default_rng(5)
    index = draws.choice(40, size=(300, 40), replace=True)
    by_hand = [roc_auc_score(right[i], p[i]) for i in index]
    found = resampling.spread("auroc", columns, 300, 5)
    assert found["stderr"] == pytest.approx(np.std(by_hand, ddof=1))
    assert (found["low"], found["high"]) == pytest.approx(
        (np.sort(by_hand)[7], np.sort(by_hand)[-8])
    )


def test_scores_side_by_side_are_those_of_each_alone(monkeypatch):
    rng = np.random.default_rng(1)
    columns = np.column_stack([rng.random(90), rng.random(90) < 0.5])
    names = ("ece", "auroc", "aurc", "selective_accuracy")
    monkeypatch.setattr(resampling, "CELLS", 90 * 7)  # several drawings
    found = resampling.spreads(names, columns, 40, 3)
    assert list(found) == list(names)
    assert found == {name: resampling.spread(name, columns, 40, 3) for name in names}
    assert len({values["stderr"] for values in found.values()}) == 4


def test_what_is_not_defined_is_not_a_number():
    one = np.array([[0.5, 1.0]])
    assert all(math.isnan(value) for value in resampling.spread("ece", one).values())
    all_right = np.column_stack([np.linspace(0, 1, 9), np.ones(9)])
    assert math.isnan(resampling.score_of("auroc", all_right))
    found = resampling.paired("auroc", all_right, all_right)
    assert math.isnan(found["difference"]) and math.isnan(found["p"])
    nearly = all_right.copy()
    nearly[0, 1] = 0  # a resample without it has no area
    found = resampling.spread("auroc", nearly)
    assert math.isfinite(found["stderr"]) and found["high"] == 1

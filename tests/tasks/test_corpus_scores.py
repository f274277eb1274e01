"""Scores of a corpus from counts, beside sacrebleu's own; and which tokenizer a language gets."""

import importlib.util
import sys

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER

from tasks import corpus_scores
from tasks.corpus_scores import FORMULAS, METRICS, counted, metrics_of, signature, tokenizer_for

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ",", ".", "Ein", "Hund", "!", "(so)", "x"]
NAMES = tuple(METRICS)
PEERS = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}


def corpora():
    """(hypotheses, references of each): drawn, and of the kinds that rules are made for."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 12):
        drawn = [
            [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(rng.integers(1, 4))]
            for _ in range(n)
        ]
        near = [own[0] if rng.random() < 0.3 else own[0][rng.integers(3) :] for own in drawn]
        yield near, drawn
        yield [" ".join(rng.permutation(text.split())) for text in near], drawn
    yield ["", "a b"], [["a b c"], ["a b"]]  # an empty hypothesis
    yield [""], [["a"]]
    yield ["x y z w"], [["a b c d"]]  # nothing in common
    yield ["a b"], [["a b"]]  # no trigram at all
    yield ["a", "b c d e f"], [["a"], ["b c d x f"]]  # no 4-gram found
    yield ["a b c d e f g h"], [["a b", "a b c d e f g h"]]  # the closest length
    yield ["猫が座る", "犬"], [["猫は座る"], ["犬だ"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_scores_as_sacrebleu_says(name):
    metric, formula = metrics_of([name], "13a")[name], FORMULAS[METRICS[name]]
    found = set()
    for hypotheses, references in corpora():
        counts = np.array([counted(metric, h, own) for h, own in zip(hypotheses, references)])
        most = max(map(len, references))
        streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
        score = PEERS[name].corpus_score(hypotheses, streams)
        assert formula(counts.sum(axis=0)) == pytest.approx(score.score, abs=1e-9), hypotheses
        assert signature(metric, references) == str(PEERS[name].get_signature())
        found.add(round(score.score))
        assert formula(counts).shape == (len(hypotheses),)
    assert len(found) > 8


def test_a_segment_alone_scores_as_sacrebleu_says():
    metric, alone = metrics_of(["bleu"], "13a")["bleu"], BLEU(effective_order=True)
    for hypotheses, references in corpora():
        for hypothesis, own in zip(hypotheses, references):
            ours = corpus_scores.bleu(counted(metric, hypothesis, own), effective_order=True)
            assert ours == pytest.approx(alone.sentence_score(hypothesis, own).score, abs=1e-9)


def test_scores_of_many_corpora_at_once():
    rng = np.random.default_rng(1)
    for name, width in (("bleu", 10), ("chrf", 18), ("ter", 2)):
        counts = rng.integers(0, 9, (5, 40, width)).astype(float)
        if name == "bleu":
            counts[..., 6:] += counts[..., 2:6]  # no more found than there are
        together = FORMULAS[name](counts)
        for i, j in np.ndindex(5, 40):
            assert together[i, j] == FORMULAS[name](counts[i, j])


def test_a_tokenizer_that_finds_words(monkeypatch):
    there = {"MeCab", "ipadic"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    for code in ("zh", "zh-cn", "zho-hans", "yue"):
        assert tokenizer_for(code) == ("zh", "")
    for code in ("de", "en-gb", "ru", "sw"):
        assert tokenizer_for(code) == ("13a", "")
    assert tokenizer_for("ja") == ("ja-mecab", "")
    tokenizer, why = tokenizer_for("ko-kr")
    assert tokenizer == "char" and "ko-mecab is not installed (pip install 'sacrebleu[ko]')" in why
    for code in ("th", "lao", "km-kh", "my"):
        tokenizer, why = tokenizer_for(code)
        assert tokenizer == "char" and "without spaces" in why
    with pytest.raises(ValueError, match=r"--tokenize ko-mecab: not installed: pip install"):
        metrics_of(NAMES, "ko-mecab")


@pytest.mark.parametrize(
    ("language", "hypothesis", "reference"),
    [
        ("zh", "猫坐在垫子上看着门外的雨。", "猫坐在垫子上看着窗外的雨。"),
        ("ja", "猫がマットの上に座って雨を見る。", "猫がマットの上に座って窓を見る。"),
        ("th", "แมวนั่งอยู่บนเสื่อมองดูฝน", "แมวนั่งอยู่บนเสื่อมองดูฟ้า"),
    ],
)
def test_languages_without_spaces_have_a_score(language, hypothesis, reference):
    usual = BLEU().corpus_score([hypothesis], [[reference]]).score
    tokenizer, _ = tokenizer_for(language)
    metrics = metrics_of(NAMES, tokenizer, language)
    ours = corpus_scores.bleu(counted(metrics["bleu"], hypothesis, [reference]))
    assert usual == 0 and ours > 50
    edits = corpus_scores.ter(counted(metrics["ter"], hypothesis, [reference]))
    if language != "th":  # sacrebleu's TER cuts these two into characters
        assert 0 < edits < 20


def test_without_sacrebleu_one_line_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"pip install 'sacrebleu>=2\.5'"):
        metrics_of(NAMES, "13a")


def test_a_sacrebleu_that_counts_otherwise_is_refused(monkeypatch):
    """Its own scores are right, but its counts have another order."""
    counts, score = CHRF._extract_corpus_statistics, CHRF._compute_score_from_stats
    monkeypatch.setattr(
        CHRF, "_extract_corpus_statistics", lambda *args: [own[::-1] for own in counts(*args)]
    )
    monkeypatch.setattr(
        CHRF, "_compute_score_from_stats", lambda self, stats: score(self, stats[::-1])
    )
    with pytest.raises(ValueError, match=r"counts chrf otherwise than 2\.5 and 2\.6 do"):
        metrics_of(("bleu", "chrf"), "13a")

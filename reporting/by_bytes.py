"""Two tokenizers over one text: what may be compared is bits per byte, and nothing per token.

    if differ(a, b):
        before, after, n_bytes = segments(a, b)      # bits, bits and bytes of pieces of the text

A loss is nats per token, and tokens are other pieces of the text under each tokenizer: one that
cuts it into fewer has a higher loss for the same probability of the whole. Bytes are the same.
"""

import math
from typing import Any

import numpy as np

from reporting.groups import Record
from results import load_arrays

WHY = (
    "their tokenizers differ: losses per token do not compare, since a token is another piece of "
    "the text for each; bits per byte do"
)
NEEDED = ("entry_window", "entry_nll", "entry_bytes", "entry_special")
SLACK = 64, 1e-3  # bytes and share by which texts differ whose first token is not scored


def differ(a: Record, b: Record) -> bool:
    """Whether two records are of one evaluation of texts under two tokenizers."""
    names = [_tokenizer(record) for record in (a, b)]
    both = all("bits_per_byte" in record["metrics"] for record in (a, b))
    return (
        a["evaluation"] == b["evaluation"] and both and None not in names and names[0] != names[1]
    )


def match(a: Record, b: Record) -> bool:
    """Whether all else of the protocol is the same, and of text the files."""
    said = [
        {name: value for name, value in record["protocol"].items() if "tokenizer" not in name}
        for record in (a, b)
    ]
    texts = a["protocol"].get("data_mode") == "text"
    same_files = a["data"].get("files") == b["data"].get("files") or not texts
    return differ(a, b) and said[0] == said[1] and same_files


def segments(a: Record, b: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bits of a, bits of b, bytes) of the pieces that the record with fewer windows cuts the text
    into; a window of the other that reaches over a cut is shared out by its bytes. Ordinary tokens
    alone: special ones have no bytes. ValueError where the texts are not one."""
    first, second = _by_window(a), _by_window(b)
    sizes = first[1].sum(), second[1].sum()
    if abs(sizes[0] - sizes[1]) > SLACK[0] + SLACK[1] * max(sizes):
        raise ValueError(
            f"{a['evaluation']}: {WHY}, but A scored {sizes[0]:,.0f} bytes of text and B "
            f"{sizes[1]:,.0f}: give both the same whole text (no --max-tokens)"
        )
    cuts = min(first, second, key=lambda side: len(side[1]))[1].cumsum()
    cuts, size = np.concatenate(([0.0], cuts / cuts[-1])), sum(sizes) / 2  # the ends fall together
    bits = [
        np.diff(np.interp(cuts, *_course(nats, n_bytes))) / math.log(2) * size / n_bytes.sum()
        for nats, n_bytes in (first, second)
    ]
    return bits[0], bits[1], np.diff(cuts) * size


def _course(nats: np.ndarray, n_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of the text, nats up to there) at the ends of windows."""
    ends, totals = n_bytes.cumsum(), nats.cumsum()
    return np.concatenate(([0.0], ends / ends[-1])), np.concatenate(([0.0], totals))


def _by_window(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(nats, bytes) of the ordinary tokens of each window that has any."""
    arrays = load_arrays(record)
    lacking = [name for name in NEEDED if name not in arrays]
    if lacking:
        raise ValueError(f"{record['_path']}: {WHY}, but its arrays lack {', '.join(lacking)}")
    window, nats, n_bytes, special = (arrays[name] for name in NEEDED)
    ordinary = ~special.astype(bool)
    sums = [np.bincount(window[ordinary], values[ordinary]) for values in (nats, n_bytes)]
    kept = sums[1] > 0
    if not kept.any():
        raise ValueError(f"{record['_path']}: {WHY}, but it has no bytes")
    return sums[0][kept], sums[1][kept]


def _tokenizer(record: Record) -> Any:
    return record["protocol"].get("tokenizer_fingerprint")

"""Which documents are alike, and orders of documents that put those side by side.

    vectors = tfidf(texts)                                  # or given ones, [D, C]
    order = by_cluster(vectors, seed=42)                    # groups of alike documents
    order = greedy_path(*nearest(vectors))                  # each beside its nearest

References: Shi et al. 2023, In-Context Pretraining (arXiv 2310.10638), for the path; Zhao et al.
2024 (arXiv 2402.13991) for what related documents in one window do.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NEIGHBOURS = 20  # of a document, that its path may go on to
CLUSTER_SIZE = 64  # documents of a cluster, as a mean
FEATURES = 2**16  # words that TF-IDF knows: the most frequent
ROWS = 256  # of similarities held at a time


def require_sklearn() -> str:
    """Its version. ValueError where the package is not installed."""
    try:
        import sklearn
    except ImportError:
        raise ValueError(
            "documents are compared by scikit-learn: pip install scikit-learn, or give vectors of "
            "your own to --packing in-context (--packing-vectors FILE.npy)"
        ) from None
    return sklearn.__version__


def tfidf(texts: Sequence[str]) -> Any:
    """Sparse rows [D, C] float32 of length 1; 0 where a text has no word."""
    require_sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(
        token_pattern=r"\w+", max_features=FEATURES, sublinear_tf=True, dtype=np.float32
    )
    try:
        return words.fit_transform(texts)
    except ValueError:  # no text has a word: all are equally far apart
        from scipy.sparse import csr_matrix

        return csr_matrix((len(texts), 1), dtype=np.float32)


def read_vectors(path: str | Path, n_documents: int) -> np.ndarray:
    """[D, C] float32 of length 1 from a .npy file. ValueError for what does not fit."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--packing-vectors {path}: no .npy array ({error})") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise ValueError(f"--packing-vectors {path}: needs floats [documents, channels]")
    if len(vectors) != n_documents:
        raise ValueError(
            f"--packing-vectors {path}: has {len(vectors):,} rows, and the data {n_documents:,} "
            "documents: it is of other data, or made with another tokenizer"
        )
    vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"--packing-vectors {path}: holds NaN or infinities")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def by_cluster(vectors: Any, seed: int) -> np.ndarray:
    """An order [D] of documents, cluster by cluster of KMeans; that of the clusters, and of the
    documents in them, is drawn from the seed."""
    require_sklearn()
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    n_documents, dice = vectors.shape[0], np.random.RandomState(seed)
    n_clusters = min(max(2, n_documents // CLUSTER_SIZE), n_documents)
    with threadpool_limits(1), warnings.catch_warnings():  # several threads add up in any order
        warnings.simplefilter("ignore")  # that there are fewer different documents than clusters
        labels = KMeans(n_clusters, n_init=1, max_iter=50, random_state=seed).fit_predict(vectors)
    rank = dice.permutation(n_clusters)[labels]
    return np.lexsort((dice.permutation(n_documents), rank))


def nearest(vectors: Any, k: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """(documents, similarities) [D, k] of the k others most alike each of vectors [D, C], whose
    length is 1, by their products; of equals the first. Every pair is compared."""
    n = vectors.shape[0]
    k = min(k, n - 1)
    ids, near = np.zeros((n, k), dtype=np.int64), np.zeros((n, k), dtype=np.float32)
    for start in range(0, n, ROWS) if k else ():
        block = vectors[start : start + ROWS] @ vectors.T
        block = block.toarray() if hasattr(block, "toarray") else block
        for row, similar in enumerate(block, start):
            similar[row] = -np.inf
            least = np.partition(similar, n - k)[n - k]
            some = np.flatnonzero(similar >= least)
            ids[row] = some[np.argsort(-similar[some], kind="stable")[:k]]
            near[row] = similar[ids[row]]
    return ids, near


def greedy_path(ids: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """An order [D] that goes on from each document to the most similar one not yet seen among its
    neighbours, and from where there is none to the document that has the fewest neighbours.

    ids, similarities [D, k]: neighbours; who is one's neighbour has it for a neighbour too. Of
    equals the first.
    """
    n, k = ids.shape
    a, b = np.repeat(np.arange(n), k), ids.ravel()
    edges = np.concatenate((np.stack((a, b), 1), np.stack((b, a), 1)))
    edges, places = np.unique(edges, axis=0, return_index=True)
    weights = np.concatenate((similarities.ravel(),) * 2)[places]
    by_weight = np.lexsort((edges[:, 1], -weights, edges[:, 0]))  # from the nearest
    first = np.searchsorted(edges[:, 0], np.arange(n + 1))
    others = edges[by_weight, 1].tolist()
    fewest = iter(np.argsort(np.diff(first), kind="stable").tolist())
    seen, path = [False] * n, []
    here = next(fewest)
    while True:
        seen[here] = True
        path.append(here)
        if len(path) == n:
            return np.array(path)
        beside = (other for other in others[first[here] : first[here + 1]] if not seen[other])
        following = next(beside, None)
        if following is None:
            following = next(start for start in fewest if not seen[start])
        here = following

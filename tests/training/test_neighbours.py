"""Neighbours and their path against naive loops over all pairs; clusters on planted topics."""

import builtins
import sys

import numpy as np
import pytest

from training import neighbours
from training.neighbours import by_cluster, greedy_path, nearest, read_vectors, tfidf


def whole_vectors(n, channels, seed):
    """Of small whole numbers: products are exact, and many of them equal."""
    return np.random.RandomState(seed).randint(-2, 3, (n, channels)).astype(np.float32)


def naive_neighbours(vectors, k):
    return [
        sorted((d for d in range(len(vectors)) if d != i), key=lambda d: (-(v @ vectors[d]), d))[:k]
        for i, v in enumerate(vectors)
    ]


def naive_path(ids, similarities):
    """The path of Shi et al. in plain words, over sets and dictionaries."""
    near = [dict(zip(a, s)) for a, s in zip(ids.tolist(), similarities.tolist())]
    beside = {
        i: {j for j in range(len(near)) if j != i and (j in near[i] or i in near[j])}
        for i in range(len(near))
    }
    left, path = set(range(len(near))), []
    here = None
    while left:
        options = beside[here] & left if path else set()
        if options:
            weight = {j: near[here].get(j, near[j].get(here)) for j in options}
            here = min(options, key=lambda j: (-weight[j], j))
        else:
            here = min(left, key=lambda j: (len(beside[j]), j))
        left.remove(here)
        path.append(here)
    return path


@pytest.mark.parametrize("n, k", [(1, 3), (2, 3), (30, 3), (60, 5), (300, 20)])
@pytest.mark.parametrize("channels", [2, 6])
def test_the_path_equals_a_naive_one(n, k, channels, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    vectors = whole_vectors(n, channels, n + channels)
    ids, similarities = nearest(vectors, k)
    assert ids.shape == (n, min(k, n - 1))
    if n <= 60:
        assert ids.tolist() == naive_neighbours(vectors, k)
    path = greedy_path(ids, similarities)
    assert sorted(path.tolist()) == list(range(n))
    assert path.tolist() == naive_path(ids, similarities)


TOPICS = [
    "torch tensor gradient kernel batch layer token weight norm head mask block",
    "flour butter oven dough yeast sugar salt crust rise knead bake whisk",
    "goal referee penalty team pitch keeper corner league striker coach whistle offside",
]


def planted(n=60):
    """(texts, topic of each): words of its topic, and one of its own."""
    dice = np.random.RandomState(0)
    topics = dice.randint(3, size=n)
    return [
        f"{' '.join(dice.choice(TOPICS[t].split(), 9))} w{i}" for i, t in enumerate(topics)
    ], topics


def changes(topics):
    return int((np.diff(topics) != 0).sum())


def test_documents_of_a_topic_lie_side_by_side(monkeypatch):
    texts, topics = planted()
    vectors = tfidf(texts)
    monkeypatch.setattr(neighbours, "CLUSTER_SIZE", 20)
    order = by_cluster(vectors, seed=3)
    assert sorted(order.tolist()) == list(range(60)) and changes(topics[order]) == 2
    assert order.tolist() == by_cluster(vectors, seed=3).tolist()
    assert order.tolist() != by_cluster(vectors, seed=4).tolist()
    assert changes(topics) > 30 and changes(topics[greedy_path(*nearest(vectors))]) < 8


@pytest.mark.parametrize(
    "texts", [["", ""], ["", "…", "?"], ["a b", "", "a b", "数据 naïve 🙂"], ["x"]]
)
def test_ugly_texts(texts):
    vectors = tfidf(texts)
    for order in (by_cluster(vectors, 0), greedy_path(*nearest(vectors))):
        assert sorted(order.tolist()) == list(range(len(texts)))


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    def error(array, n=3):
        path = tmp_path / "v.npy"
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError) as caught:
            read_vectors(path, n)
        assert "\n" not in str(caught.value) and "--packing-vectors" in str(caught.value)
        return str(caught.value)

    assert "has 2 rows, and the data 3 documents" in error(np.ones((2, 4)))
    assert "needs floats" in error(np.ones(3)) and "needs floats" in error(np.ones((3, 2), int))
    assert "NaN" in error(np.full((3, 2), np.nan))
    assert "no .npy array" in error(np.array([{}, {}, {}]))
    np.save(tmp_path / "good.npy", np.array([[3.0, 4], [0, 0], [0, 2]]))
    good = read_vectors(tmp_path / "good.npy", 3)
    np.testing.assert_allclose(good, [[0.6, 0.8], [0, 0], [0, 1]], rtol=1e-6)


def test_without_scikit_learn_it_says_so(monkeypatch):
    def refuse(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args)

    real = builtins.__import__
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        tfidf(["a", "b"])

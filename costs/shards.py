"""A model's layers over the GPUs that hold it between them (`--shard K`): which of them has what.

    cut(config, 2)                                  # [range(0, 40), range(40, 80)]
    for config, setup in shares(config, Setup(training=False, shard=2)): ...    # of each GPU

The first has the embeddings too, the last the final norm and the head. Cut so that the largest
share of the weights' bytes is the least possible.
"""

import itertools
from dataclasses import replace
from functools import cache

from config import LAYER_LISTS, GPTConfig
from costs.symbols import Setup, tables

ONE = Setup(training=False)


def cut(config: GPTConfig, n: int, setup: Setup = ONE) -> list[range]:
    """The layers of each of n GPUs. ValueError where there are fewer layers than GPUs."""
    if n > config.n_layers:
        raise ValueError(
            f"--shard {n} is more than the model's {config.n_layers} layers, of which each rank "
            "holds one at least"
        )
    every, setup = range(config.n_layers), replace(setup, shard=1)

    @cache  # layers are of few kinds
    def size(kind: GPTConfig) -> float:
        return weight_bytes(kind, replace(setup, first=False, last=False))

    sizes = [size(part(config, every[i : i + 1])) for i in every]
    block = part(config, every[:1])
    first = weight_bytes(block, replace(setup, last=False)) - sizes[0]
    last = weight_bytes(block, replace(setup, first=False)) - sizes[0]
    return _cut(sizes, n, first, last)


def _cut(sizes: list[float], n: int, first: float, last: float) -> list[range]:
    """sizes [L] in n runs. first, last: what the ends have besides."""
    before = [0.0, *itertools.accumulate(sizes)]
    # of the first j layers on k GPUs: (largest share, sum of squares, where the last share starts)
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for k in range(n):
        ends = first * (k == 0) + last * (k == n - 1)
        row = {}
        for j in range(k + 1, len(sizes) + 1):
            options = []
            for i, (largest, squares, _) in best[k].items():
                if i < j:
                    share = before[j] - before[i] + ends
                    options.append((max(largest, share), squares + share**2, i))
            row[j] = min(options)
        best.append(row)
    runs, stop = [], len(sizes)
    for k in range(n, 0, -1):
        start = best[k][stop][2]
        runs.append(range(start, stop))
        stop = start
    return runs[::-1]


def part(config: GPTConfig, layers: range) -> GPTConfig:
    """The config of a model of these layers alone."""
    lists = {
        name: tuple(i - layers.start for i in getattr(config, name) if i in layers)
        for name in LAYER_LISTS
    }
    return config.replace(n_layers=len(layers), **lists)


def shares(config: GPTConfig, setup: Setup) -> list[tuple[GPTConfig, Setup]]:
    """(config, setup) of what each of setup.shard GPUs has."""
    n = setup.shard
    if n == 1:
        return [(config, setup)]
    return [
        (part(config, layers), replace(setup, shard=1, first=k == 0, last=k == n - 1))
        for k, layers in enumerate(cut(config, n, setup))
    ]


def weight_bytes(config: GPTConfig, setup: Setup) -> float:
    """Of one share, as `shares` gives them."""
    return tables(config, 1, 1, setup)[-1][2]["M_weights"]

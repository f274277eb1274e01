"""Pictures for papers: how sure answers were and how often they were right; what few bits cost.
Needs matplotlib.

    paths = draw(groups_of(records), "results")     # calibration-mmlu-1a2b3c4d.png, ...
    paths = draw_families(families_of(records), "results")      # bytes-perplexity-….png

The page has the same ones, to be looked into (page.html).
"""

import io
import re
from pathlib import Path
from typing import Any

import cli
from durable import write_atomic
from reporting.groups import Group, metric_names, real, value_of, words_of
from reporting.page import lists_of
from reporting.quantised import Family, pareto

MOST = 8  # checkpoints of a picture: the last ones
PANELS = 4  # metrics of a picture: the first ones


def draw(groups: list[Group], folder: str | Path) -> list[Path]:
    """A picture for each group that has bins or curves: reliability diagrams beside risk-coverage
    curves, its last checkpoints in each. ValueError without matplotlib."""
    plt, written = _pyplot(), []
    for group in groups:
        shown = group[-MOST:]
        bins, curves = lists_of(shown, curves=False), lists_of(shown, curves=True)
        panels = [*((name, lists, _bins) for name, lists in bins.items())]
        panels += [(name, lists, _curve) for name, lists in curves.items()]
        if not panels:
            continue
        size = 4.2 * len(panels), 4.6
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        for axis, (name, lists, drawn) in zip(axes[0], panels):
            drawn(axis, [(_name(r), points) for r, points in zip(shown, lists) if points])
            axis.set_title(_plain(name.replace("_", " ")))
            axis.set_xlim(0, 1)
        figure.suptitle(_plain(" · ".join([group[0]["evaluation"], *words_of(group)])), fontsize=8)
        name = _file_name(group[0]["evaluation"])
        path = Path(folder, f"calibration-{name}-{str(group[0].get('config_hash'))[:8]}.png")
        written.append(_save(plt, figure, path))
    return written


def draw_families(families: list[Family], folder: str | Path) -> list[Path]:
    """A picture for each family: its first metrics over the bytes of the weights, and the line of
    those that no other beats. ValueError without matplotlib."""
    plt, written = _pyplot(), []
    for number, family in enumerate(families):
        names = metric_names(family.records)[:PANELS]
        size = 4.2 * len(names), 3.8
        figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False)
        for axis, name in zip(axes[0], names):
            _over_bytes(axis, family, name)
        about = family.base["evaluation"], family.base["checkpoint"].get("name")
        figure.suptitle(_plain(" · ".join(map(str, about))), fontsize=8)
        path = Path(folder, f"bytes-{_file_name(about[0])}-{number}.png")
        written.append(_save(plt, figure, path))
    return written


def _over_bytes(axis: Any, family: Family, name: str) -> None:
    values = [value_of(record, name) for record in family.records]
    for value, weights in zip(values, family.weights):
        if value is not None:
            at = weights.bytes / 1e6, value
            axis.scatter(*at, color="tab:blue", s=18)
            axis.annotate(_plain(weights.rule), at, (4, 3), textcoords="offset points", fontsize=6)
    front = pareto(family, name)
    axis.plot([family.weights[i].bytes / 1e6 for i in front], [values[i] for i in front], lw=1)
    axis.set(xlabel="weights, MB", ylabel=_plain(name.replace("_", " ")), xscale="log")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--charts needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomic(path, picture.getvalue())
    plt.close(figure)
    return path


def _file_name(evaluation: Any) -> str:
    return re.sub(r"[^\w-]", "_", str(evaluation))


def _bins(axis: Any, series: list[tuple[str, list[dict]]]) -> None:
    axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    for name, bins in series:
        x, y, n = _columns(bins, "confidence", "accuracy", "n")
        line = axis.plot(x, y, linewidth=1, label=name)[0]
        total = sum(n) or 1
        axis.scatter(x, y, s=[10 + 200 * v / total for v in n], color=line.get_color())
    axis.set(xlabel="confidence", ylabel="share right", ylim=(0, 1))
    _legend(axis, series)


def _curve(axis: Any, series: list[tuple[str, list[dict]]]) -> None:
    for name, points in series:
        axis.plot(*_columns(points, "coverage", "risk"), linewidth=1, label=name)
    axis.set(xlabel="share answered, the surest first", ylabel="share wrong")
    axis.set_ylim(bottom=0)
    _legend(axis, series)


def _legend(axis: Any, series: list) -> None:
    if series:
        axis.legend(fontsize=7)


def _columns(points: list[dict], *names: str) -> list[list[float]]:
    """Of points that have all of them as numbers."""
    rows = [[real(point.get(name)) for name in names] for point in points]
    kept = [[value for value in row if value is not None] for row in rows]
    return [list(column) for column in zip(*(row for row in kept if len(row) == len(names)))] or [
        [] for _ in names
    ]


def _name(record: dict) -> str:
    return _plain(f"{record['run']}/{record['checkpoint'].get('name')}")


def _plain(text: str) -> str:
    """Text of others, in which matplotlib is to find no formula."""
    return cli.printable(text).replace("$", r"\$").lstrip("_")

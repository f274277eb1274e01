"""The runs of a results directory: where their files lie, and which is which.

    for directory, names in walk("results"): ...
    told_apart(records)     # the same records, under names that no two experiments share
    called(records)         # a name for each checkpoint of a table

A run is called like the directory of its checkpoints unless somebody names it, so expA/checkpoints
and expB/checkpoints are both `checkpoints`. And one name may be several checkpoints: a ckpt.pt that
its trainer writes again and again, a run that was trained anew. Standard library only.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from cli import printable
from quantisation.names import rule_of

Record = dict[str, Any]
Place = tuple[str, ...]  # a directory, as the parts of its path


def walk(root: str | Path, unread: list | None = None) -> Iterator[tuple[str, list[str]]]:
    """(directory, names of its files) of a tree, in the order of their paths, behind links too. A
    directory that several links lead to comes once, and by its own path if that is in the tree.
    Hidden ones are not looked at; (path, reason) of what cannot be read goes to `unread`."""

    def note(error: OSError) -> None:
        if unread is not None:
            unread.append((str(error.filename), f"{error.filename}: {error.strerror}"))

    waiting, seen, found = [str(root)], set(), []
    while waiting:
        for directory, folders, names in os.walk(waiting.pop(0), onerror=note):
            paths = [os.path.join(directory, f) for f in folders if not f.startswith(".")]
            folders.clear()
            try:
                place = os.stat(directory)
            except OSError as error:  # gone meanwhile
                note(error)
                continue
            if (place.st_dev, place.st_ino) not in seen:
                seen.add((place.st_dev, place.st_ino))
                found.append((directory, sorted(names)))
                links = set(filter(os.path.islink, paths))
                waiting += sorted(links)  # after all that lie here themselves
                folders += [os.path.basename(path) for path in paths if path not in links]
    yield from sorted(found, key=lambda each: Path(each[0]).parts)


def place_of(record: Record) -> Place:
    """The directory of a record's checkpoint, as far as the record says it."""
    path = os.path.normpath(record["checkpoint"].get("path") or "")
    return tuple(part for part in PurePath(path).parent.parts if part not in ("..", os.sep))


def told_apart(records: Iterable[Record]) -> list[Record]:
    """The records in their order, run and checkpoint renamed where two of them would be taken for
    one: `expA/checkpoints` by directory; `out (earlier)` for the older of two checkpoints of one
    name and step; `ckpt-3f2a91bc` by content where no step is known either."""
    records = list(records)
    by_run: dict[str, list[Record]] = {}
    for record in records:
        by_run.setdefault(record["run"], []).append(record)
    labels = {run: _labels(run, mine) for run, mine in by_run.items()}
    placed = [r | {"run": labels[r["run"]][place_of(r)]} for r in records]
    contents = _contents(placed)
    return [_by_content(r, contents.get(_looks(r), [])) for r in placed]


def called(records: list[Record]) -> list[str]:
    """What a terminal's table calls their checkpoints: by name, or by path where two share one; and
    the rule that their weights are rounded by."""
    kept = [record["checkpoint"] for record in records]
    names = Counter(name for name, _ in {(c["name"], c.get("path")) for c in kept})
    known = (c["path"] if names[c["name"]] > 1 else c["name"] for c in kept)
    rules = (rule_of(record) for record in records)
    return [printable(f"{name} {rule}" if rule else name) for name, rule in zip(known, rules)]


# ---------------------------------------------------------------------------------------------
# By directory


def _labels(run: str, records: list[Record]) -> dict[Place, str]:
    """{directory: what to call this run there}. Where somebody named the run, it may lie in several
    directories, unless these hold different checkpoints of the same name and step."""
    places = {place_of(record) for record in records}
    under = _fullest(places)
    several = {place for found in under.values() for place in found}
    by_hand = any(place[-1:] != (run,) for place in several)
    if len(several) == 1 or (by_hand and not any(len(c) > 1 for c in _contents(records).values())):
        return dict.fromkeys(places, run)
    return {place: _label(run, place, under) for place in places}


def _fullest(places: set[Place]) -> dict[Place, list[Place]]:
    """{end of a path: the directories that end so}, of those that are not the end of another one:
    a directory may have been named from here and from its root."""
    ends = Counter(end for place in places for end in _ends(place))
    under: dict[Place, list[Place]] = {}
    for place in places:
        if ends[place] == 1:
            for end in _ends(place):
                under.setdefault(end, []).append(place)
    return under


def _ends(place: Place) -> list[Place]:
    """The ends of a path, from none of it to all."""
    return [place[n:] for n in range(len(place), -1, -1)]


def _label(run: str, place: Place, under: dict[Place, list[Place]]) -> str:
    """The shortest end of the path that is no other directory's."""
    place = under[place][0] if len(under[place]) == 1 else place
    end = next((end for end in _ends(place)[1:] if len(under[end]) == 1), place)
    text = "/".join(end)
    return text if end[-1:] == (run,) else f"{run} ({text})" if text else run


# ---------------------------------------------------------------------------------------------
# By content


def _looks(record: Record) -> tuple:
    """What a reader sees of a checkpoint: run, name, step."""
    step = record["checkpoint"].get("step")
    step = step if isinstance(step, int) and not isinstance(step, bool) else None
    return record["run"], record["checkpoint"].get("name"), step


def _contents(records: list[Record]) -> dict[tuple, list[str]]:
    """{looks: the fingerprints of all checkpoints that look so, those evaluated last first}"""
    last: dict[tuple, dict[str, str]] = {}
    for record in records:
        if record["status"] == "ok":  # a failed one may have no fingerprint of its own
            times = last.setdefault(_looks(record), {})
            content, time = _content(record), str(record["environment"].get("time"))
            times[content] = max(time, times.get(content, ""))
    return {
        looks: sorted(times, key=lambda content: (times[content], content), reverse=True)
        for looks, times in last.items()
    }


def _content(record: Record) -> str:
    return str(record["checkpoint"].get("fingerprint"))


def _by_content(record: Record, contents: list[str]) -> Record:
    found = _content(record)
    if len(contents) < 2 or found not in contents:
        return record
    run, name, step = _looks(record)
    if step is None:
        return record | {"checkpoint": record["checkpoint"] | {"name": f"{name}-{found[:8]}"}}
    older = contents.index(found)
    marks = ["", " (earlier)", *(f" (earlier {n})" for n in range(2, len(contents)))]
    return record | {"run": run + marks[older]}

"""What rows ask of a server, each sequence of tokens once, and where its answers belong.

wanted = Wanted(rows, by_letters=True)
wanted.tell(ids, tops, bounded=False)         # for each of wanted.letters
wanted.fill_in({ids: scores})                 # for all of wanted.places
wanted.by_row(greedy=False)                   # continuations.RowScores
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from backends import continuations
from endpoints import Scores, Tops

Ids = tuple[int, ...]


class Wanted:
    """places: {a sequence of token ids: [(a choice or not, slot in the result, the token's place in
    the sequence)]}. letters: {a prompt: rows whose choices follow it}, where one generated token
    tells their values. n_bounded: choices of which only a bound is known."""

    def __init__(self, rows: continuations.Continuations, by_letters: bool = False):
        self.rows, self.choice_ids = rows, [int(i) for i in rows.choice_ids or ()]
        self.by_letters = by_letters and bool(self.choice_ids)
        self.places: dict[Ids, list[tuple[bool, int, int]]] = {}
        self.letters: dict[Ids, list[int]] = {}
        offsets = rows.target_offsets.tolist()
        n_targets = int(offsets[-1])
        self.choices = np.zeros((len(rows.ids), len(self.choice_ids)))
        self.bounded = np.zeros(self.choices.shape, dtype=bool)
        self.tokens, self.likeliest = np.zeros(n_targets), np.zeros(n_targets)
        for r, own in enumerate(rows.ids):
            read = (*map(int, rows.prefixes[rows.prefix[r]]), *map(int, own))
            if self.by_letters:
                self.letters.setdefault(read, []).append(r)
            else:
                self._add_choices(read, r, range(len(self.choice_ids)))
            targets = list(map(int, rows.targets[r]))
            spare = 0 if rows.alternatives is None else int(rows.alternatives[r]) - 1
            last = len(read) - 1
            whole = (*read, targets[-1]) if targets else read
            for j, token in enumerate(targets):
                at = min(last - len(targets) + 1 + j + spare, last) + 1  # the target's own place
                known = at < len(read) and read[at] == token
                self._add(whole if known else (*read[:at], token), False, offsets[r] + j, at)

    @property
    def n_bounded(self) -> int:
        return int(self.bounded.sum())

    def tell(self, ids: Ids, tops: Tops, bounded: bool) -> None:
        """What was told of the tokens after a prompt. bounded: whether those that are not told stay
        so, instead of being scored."""
        under = np.nextafter(tops.bound, -np.inf)  # so that none wins against one that is told
        missing = [k for k, token in enumerate(self.choice_ids) if token not in tops.known]
        for r in self.letters[ids]:
            for k, token in enumerate(self.choice_ids):
                self.choices[r, k] = tops.known.get(token, under)
            if bounded:
                self.bounded[r, missing] = True
            else:
                self._add_choices(ids, r, missing)

    def starts(self) -> dict[Ids, int]:
        """The first place that is asked for in each sequence."""
        return {
            ids: min(at % len(ids) for _, _, at in places) for ids, places in self.places.items()
        }

    def fill_in(self, found: Mapping[Ids, Scores]) -> None:
        """The scores of every sequence."""
        for ids, places in self.places.items():
            scores = found[ids]
            for of_choices, slot, at in places:
                (self.choices.reshape(-1) if of_choices else self.tokens)[slot] = scores.values[at]
                if not of_choices and scores.likeliest is not None:
                    self.likeliest[slot] = scores.likeliest[at]

    def by_row(self, greedy: bool) -> continuations.RowScores:
        parts = self.choices.reshape(-1), self.tokens, self.likeliest
        found = continuations.by_row(self.rows, parts, greedy)
        return replace(found, bounded=self.bounded) if self.bounded.any() else found

    def _add_choices(self, read: Ids, row: int, which) -> None:
        for k in which:
            self._add((*read, self.choice_ids[k]), True, row * len(self.choice_ids) + k)

    def _add(self, ids: Ids, of_choices: bool, slot: int, at: int = -1) -> None:
        self.places.setdefault(ids, []).append((of_choices, slot, at))

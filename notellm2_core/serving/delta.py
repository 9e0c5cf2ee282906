"""What was written after the release: vectors of new and changed notes, and which older ones are gone.

One thread writes; any number of threads read, without a lock. A reader takes the `View` of the moment. Nothing that a
view shows is changed afterwards: vectors are appended behind its end, and a note that goes is marked with the version
of the first view without it.

n: notes in the view, N: notes of the release, d: width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_LIVES = np.iinfo(np.int64).max  # gone from no view on
_CAPACITY = 1024  # of a new delta; doubled when it is full


@dataclass(frozen=True)
class View:
    """The delta at one moment. Numbers of notes: below N those of the release, from N on those of the delta."""

    version: int
    seq: int  # the last entry of the log that it holds
    num_base: int
    vectors: np.ndarray  # [n, d]
    note_ids: list[str]  # at least n; those from n on are of later views
    gone_from_base: np.ndarray  # [N] version of the first view without this note of the release
    gone_from_delta: np.ndarray  # [>= n]
    num_gone: int  # notes of the release that are gone

    def lives(self, numbers: np.ndarray) -> np.ndarray:
        """Whether each of the notes `numbers` is there: a mask of the same shape. -1 is nobody."""
        in_base = numbers < self.num_base
        if in_base.all() and self.num_base:
            return (numbers >= 0) & (self.gone_from_base[numbers] > self.version)
        base = self.gone_from_base[np.where(in_base, numbers, 0)] if self.num_base else np.zeros(numbers.shape, int)
        own = np.where(in_base, 0, numbers - self.num_base)
        is_later = ~in_base & (own >= len(self.vectors))  # of a view after this one
        delta = self.gone_from_delta[np.where(is_later, 0, own)]
        return (numbers >= 0) & ~is_later & (np.where(in_base, base, delta) > self.version)

    @property
    def living(self) -> np.ndarray:
        """[n] whether each note of the delta is there."""
        return self.gone_from_delta[: len(self.vectors)] > self.version


class Delta:
    """The writer's side. `view` is what readers take."""

    def __init__(self, base_rows: Mapping[str, int], dim: int, seq: int) -> None:
        """base_rows: the notes of the release. seq: the last entry of the log that the release holds."""
        self._base_rows = base_rows
        self._vectors = np.empty((_CAPACITY, dim), np.float32)
        self._gone_from_base = np.full(len(base_rows), _LIVES)
        self._gone_from_delta = np.full(_CAPACITY, _LIVES)
        self._note_ids: list[str] = []
        self._places: dict[str, int] = {}  # note_id -> its place in the delta
        self._num_gone = 0
        self.view = self._view(0, seq)

    def apply(self, changes: Mapping[str, np.ndarray | None], seq: int) -> None:
        """Show the notes with these unit vectors [d] from now on, or without one, no longer. seq: of the last change.

        Called by one thread. The changes are seen together, or not yet. Raises ValueError for a vector of another
        width; nothing is changed then.
        """
        if wrong := [i for i, v in changes.items() if v is not None and v.shape != self._vectors.shape[1:]]:
            raise ValueError(f"the vector of note {wrong[0]!r} is not of width {self._vectors.shape[1]}")
        version = self.view.version + 1
        added: dict[str, int] = {}
        for note_id, vector in changes.items():
            if (place := self._places.get(note_id)) is not None:
                self._gone_from_delta[place] = version
            elif (row := self._base_rows.get(note_id)) is not None and self._gone_from_base[row] == _LIVES:
                self._gone_from_base[row] = version
                self._num_gone += 1
            if vector is not None:
                added[note_id] = self._append(note_id, vector)
        # Places come before the view and go after it: a reader never finds less than its view has, and looks again
        # where it finds more.
        self._places.update(added)
        self.view = self._view(version, seq)
        for note_id in changes.keys() - added.keys():
            self._places.pop(note_id, None)

    def number(self, note_id: str) -> int | None:
        """The number of a note that is there, or was a moment ago; take the view after it. None: there is none."""
        if (place := self._places.get(note_id)) is not None:
            return len(self._base_rows) + place
        row = self._base_rows.get(note_id)
        return None if row is None or self._gone_from_base[row] <= self.view.version else row

    def _append(self, note_id: str, vector: np.ndarray) -> int:
        place = len(self._note_ids)
        if place == len(self._vectors):  # views keep the old arrays, which are not written any more
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
            self._gone_from_delta = np.concatenate([self._gone_from_delta, np.full(place, _LIVES)])
        self._vectors[place] = vector
        self._note_ids.append(note_id)
        return place

    def _view(self, version: int, seq: int) -> View:
        vectors = self._vectors[: len(self._note_ids)]
        return View(
            version, seq, len(self._base_rows), vectors, self._note_ids, self._gone_from_base, self._gone_from_delta,
            self._num_gone,
        )  # fmt: skip

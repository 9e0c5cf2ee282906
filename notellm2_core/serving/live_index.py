"""The live index: a release, the notes written after it, and no note that is gone.

The neighbours of a note of the release are looked up in its table; the index is searched for other queries: a text, a
picture, a note that was written after the release. Every query is compared with all notes of the delta. Answers are
exact over the living notes, up to the recall of the table and of the index.

H: queries, k: hits, N: notes of the release, W: width of the table.
"""

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from notellm2_core.embeddings.unit_vectors import require_unit_vectors
from notellm2_core.retrieval.neighbour_table import NeighbourTable
from notellm2_core.serving.delta import Delta, View
from notellm2_core.serving.engine import BaseIndex, EngineDown
from notellm2_core.serving.merge import Merge, merge

_SPARE = 3.0  # standard deviations of the number of gone notes among the nearest, that a search allows for
_SEARCHED_AT_ONCE = 4  # queries between two looks at the clock


class Hit(NamedTuple):
    note_id: str
    score: float
    because: tuple[str, ...] = ()  # the history notes that found it


@dataclass(frozen=True)
class Answer:
    """Hits, the best first; equal scores in the order of their ids. `seq`: the log was known up to there."""

    hits: tuple[Hit, ...]
    seq: int
    unknown: tuple[str, ...] = ()  # history notes that are not there
    is_partial: bool = False  # some history notes were not searched for before the deadline


class LiveIndex:
    """Any number of threads search; one applies changes."""

    def __init__(self, index: BaseIndex, table: NeighbourTable, seq: int = 0) -> None:
        """seq: the last entry of the log that the release holds."""
        self.index, self.table = index, table
        self.delta = Delta(index.rows, index.dim, seq)

    def apply(self, changes: Mapping[str, np.ndarray | None], seq: int) -> None:
        """`Delta.apply`."""
        self.delta.apply(changes, seq)

    def vector(self, note_id: str) -> np.ndarray | None:
        """The unit vector [d] of a living note; None: there is none."""
        number = self.delta.number(note_id)
        return None if number is None else self._vectors(self.delta.view, np.array([number]))[0]

    def similar(self, vector: np.ndarray, k: int, exclude: Set[str] = frozenset()) -> Answer:
        """The k nearest living notes of a unit vector [d], without `exclude`. Raises ValueError, and EngineDown."""
        require_unit_vectors(vector[None], source="queries: ")
        view, numbers = self._snapshot(exclude)
        question = _Question(view, vector[None], k, np.array([*numbers.values()], dtype=np.int64))
        found = self._search(question, np.zeros(1, np.int64))
        return self._answer(question, [found], np.ones(1))

    def similar_to(self, note_id: str, k: int) -> Answer:
        """The k nearest living notes of a note, without itself. Raises KeyError if there is none, and EngineDown."""
        answer = self.recall({note_id: 1.0}, k)
        if answer.unknown:
            raise KeyError(note_id)
        return answer

    def recall(
        self,
        history: Mapping[str, float],
        k: int,
        how: Merge = "max",
        exclude: Set[str] = frozenset(),
        deadline: float | None = None,
    ) -> Answer:
        """The neighbours of history notes, by their weights, merged; without the history and `exclude`.

        deadline: of `time.monotonic`. History notes whose search would begin after it are left out, as are those that
        need one while the engine is down. Raises EngineDown where these are all of them.
        """
        view, numbers = self._snapshot({*history, *exclude})
        names = tuple(note_id for note_id in history if note_id in numbers)
        queries = np.array([numbers[name] for name in names], dtype=np.int64)
        without = np.array([*numbers.values()], dtype=np.int64)
        question = _Question(view, self._vectors(view, queries), k, without)
        known, rest = self._look_up(question, queries)
        searched, is_partial = self._search_rest(question, rest, deadline)
        weights = np.array([history[name] for name in names], dtype=np.float64)
        answer = self._answer(question, [known, *searched], weights, how, names)
        return replace(answer, unknown=tuple(i for i in history if i not in numbers), is_partial=is_partial)

    def _snapshot(self, note_ids: Set[str]) -> tuple[View, dict[str, int]]:
        """A view, and the numbers that those of these notes that are there have in it."""
        while True:
            numbers = {i: number for i in note_ids if (number := self.delta.number(i)) is not None}
            view = self.delta.view
            if view.lives(np.fromiter(numbers.values(), np.int64, len(numbers))).all():
                return view, numbers
            time.sleep(0)  # a note was changed in between

    def _vectors(self, view: View, numbers: np.ndarray) -> np.ndarray:
        """[H, d] of the notes `numbers`."""
        vectors = np.empty((len(numbers), self.index.dim), np.float32)
        in_base = numbers < view.num_base
        vectors[in_base] = self.table.vectors[numbers[in_base]]
        vectors[~in_base] = view.vectors[numbers[~in_base] - view.num_base]
        return vectors

    def _look_up(self, question: "_Question", queries: np.ndarray) -> tuple["_Found", np.ndarray]:
        """What the table knows of the notes `queries` [H], and the places [R] of those that need a search."""
        view, k = question.view, question.k
        in_table = np.flatnonzero(queries < view.num_base)
        numbers, scores = self.table.rows[queries[in_table]], self.table.scores[queries[in_table]]
        usable = question.usable(numbers)
        # A row that holds all other notes is enough. Any other row needs k notes that can be used.
        is_enough = (usable.sum(axis=1) >= k) | (numbers.shape[1] >= view.num_base - 1)
        rest = np.setdiff1d(np.arange(len(queries)), in_table[is_enough])
        if not is_enough.all():
            in_table, numbers, scores, usable = (part[is_enough] for part in (in_table, numbers, scores, usable))
        return _first(in_table, numbers, scores, usable, k), rest

    def _search_rest(
        self, question: "_Question", rest: np.ndarray, deadline: float | None
    ) -> tuple[list["_Found"], bool]:
        """What the index finds for the queries at the places `rest` [R], and whether some of them were left out."""
        found: list[_Found] = []
        for start in range(0, len(rest), _SEARCHED_AT_ONCE):
            if deadline is not None and time.monotonic() > deadline:
                return found, True
            try:
                found.append(self._search(question, rest[start : start + _SEARCHED_AT_ONCE]))
            except EngineDown:
                if len(rest) == len(question.vectors) and not found:
                    raise
                return found, True
        return found, False

    def _search(self, question: "_Question", places: np.ndarray) -> "_Found":
        """The k nearest usable notes of the release for the queries at these places, by the index.

        The index also finds notes that are gone or left out, so more than k are asked for, and more again if needed.
        """
        view, without = question.view, question.without
        k = min(question.k, view.num_base - view.num_gone - int(np.count_nonzero(without < view.num_base)))
        if not k:
            nothing = np.empty((len(places), 0))
            return _first(places, nothing.astype(np.int64), nothing, nothing.astype(bool), question.k)
        share = view.num_gone / view.num_base
        num = int(np.ceil(k / (1 - share) + _SPARE * np.sqrt(k * share) / (1 - share))) + min(len(without), k)
        while True:
            num = min(num, view.num_base)
            numbers, scores = self.index.search_rows(question.vectors[places], num)
            usable = question.usable(numbers)
            if num >= view.num_base or usable.sum(axis=1).min() >= k:
                break
            num *= 2
        return _first(places, numbers, scores, usable, question.k)

    def _answer(
        self,
        question: "_Question",
        searched: Sequence["_Found"],
        weights: np.ndarray,
        how: Merge = "max",
        history: tuple[str, ...] = (),
    ) -> Answer:
        """Merge what was found in the release with the new notes, for the queries that were searched."""
        view, k = question.view, question.k
        found = [*searched, _new_notes(question, searched)]
        by, numbers, scores = (np.concatenate(column) for column in zip(*(f[:3] for f in found), strict=True))
        merged = merge(by, numbers, scores, weights, k, how)
        found_by = merged.history if history else [()] * len(merged.candidates)
        hits = [
            Hit(note_id, score, tuple([history[h] for h in because]))
            for note_id, score, because in zip(
                self._note_ids(view, merged.candidates), merged.scores.tolist(), found_by, strict=True
            )
        ]
        hits.sort(key=lambda hit: (-hit.score, hit.note_id))
        return Answer(tuple(hits[:k]), view.seq)

    def _note_ids(self, view: View, numbers: np.ndarray) -> list[str]:
        in_base = numbers < view.num_base
        ids = np.empty(len(numbers), dtype=object)
        ids[in_base] = self.index.note_ids[numbers[in_base]]
        ids[~in_base] = [view.note_ids[number - view.num_base] for number in numbers[~in_base].tolist()]
        names: list[str] = ids.tolist()
        return names


class _Found(NamedTuple):
    """Who found what: places of queries, numbers and scores of notes [M]; of the queries at `places` [P] the scores of
    their k-th notes, -inf where there are fewer.
    """

    queries: np.ndarray
    numbers: np.ndarray
    scores: np.ndarray
    places: np.ndarray
    floors: np.ndarray


@dataclass(frozen=True)
class _Question:
    """Queries [H, d]: the k nearest notes of a view, without the notes of some numbers."""

    view: View
    vectors: np.ndarray
    k: int
    without: np.ndarray

    def usable(self, numbers: np.ndarray) -> np.ndarray:
        """Whether each note is there and may be an answer."""
        places = np.searchsorted(self._sorted_without, numbers)
        return self.view.lives(numbers) & (self._sorted_without[places] != numbers)

    @cached_property
    def _sorted_without(self) -> np.ndarray:
        """`without`, and a number that no note has."""
        return np.append(np.sort(self.without), np.iinfo(np.int64).max)


def _first(places: np.ndarray, numbers: np.ndarray, scores: np.ndarray, usable: np.ndarray, k: int) -> _Found:
    """The first k usable notes of each row [P, W], the best of which comes first, for the queries at `places` [P]."""
    rank = usable.cumsum(axis=1, dtype=np.int32)
    taken = usable & (rank <= k)
    counts = taken.sum(axis=1)
    floors = np.full(len(places), -np.inf, np.float32)
    if (full := np.flatnonzero(counts == k)).size:
        floors[full] = scores[full, (rank[full] == k).argmax(axis=1)]
    return _Found(np.repeat(places, counts), numbers[taken].astype(np.int64), scores[taken], places, floors)


def _new_notes(question: _Question, searched: Sequence[_Found]) -> _Found:
    """The usable notes of the delta that are not behind the k-th note found for the same query.

    Queries that were not searched have no new notes either.
    """
    view = question.view
    floors = np.full((len(question.vectors), 1), np.inf, np.float32)
    for found in searched:
        floors[found.places, 0] = found.floors
    scores = question.vectors @ view.vectors.T
    queries, places = np.divmod(np.flatnonzero(scores >= floors), max(1, len(view.vectors)))
    usable = view.living
    usable[question.without[question.without >= view.num_base] - view.num_base] = False
    keep = usable[places]
    queries, places = queries[keep], places[keep]
    return _Found(queries, view.num_base + places, scores[queries, places], queries, floors)

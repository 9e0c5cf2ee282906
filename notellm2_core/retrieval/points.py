"""Equal vectors are one point of the index. After a search, the points are expanded to the notes that lie there.

A graph of nearest neighbours in which many are equal falls apart, because the links of each lead to the others. As one
point they cost nothing.

N: notes, P: points, Q: queries, K: points that were found, d: width.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

_BLOCK_POINTS = 1 << 13  # that are expanded together: their arrays stay in the processor's cache


@dataclass(frozen=True)
class Points:
    """Which note is at which point. A row is a note's place in the table of embeddings."""

    of_row: np.ndarray  # [N] int64: the point of each note

    @cached_property
    def rows(self) -> np.ndarray:
        """[N] all rows, those of a point together, in order."""
        return np.argsort(self.of_row, kind="stable")

    @cached_property
    def sizes(self) -> np.ndarray:
        """[P] the number of notes at each point."""
        return np.bincount(self.of_row)

    @cached_property
    def starts(self) -> np.ndarray:
        """[P] where the notes of each point begin in `rows`."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def first_rows(self) -> np.ndarray:
        """[P] the first note at each point."""
        return self.rows[self.starts]

    def counts(self, points: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        """The number of notes at `points` [Q, K] (-1: none), without the rows `own` [Q] (-1: none) -> [Q, K]."""
        counts: np.ndarray = np.where(points >= 0, self.sizes[points], 0)
        if own is not None:
            counts -= points == np.where(own >= 0, self.of_row[own], -2)[:, None]
        return counts

    def expand(
        self, points: np.ndarray, scores: np.ndarray, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best notes at `points` [Q, K], which are sorted by `scores` [Q, K]: rows and scores, both [Q, k].

        Equal scores are in the order of the rows. `own` [Q]: rows that are left out (-1: none). Where there are fewer,
        the row is -1 and the score -inf.
        """
        if points.size <= _BLOCK_POINTS:
            return self._expand(points, scores, k, own)
        num_queries = max(1, _BLOCK_POINTS // points.shape[1])
        blocks = [slice(i, i + num_queries) for i in range(0, len(points), num_queries)]
        parts = [self._expand(points[b], scores[b], k, None if own is None else own[b]) for b in blocks]
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([best for _, best in parts])

    def _expand(
        self, points: np.ndarray, scores: np.ndarray, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        num_wanted = k + (own is not None)
        if points.shape[1] == num_wanted and self._are_single(points):
            rows = _ties_by_row(self.rows[self.starts[points]], scores)
            return (rows, scores) if own is None else _without(own, rows, scores)
        counts = np.where(points >= 0, np.minimum(self.sizes[points], num_wanted), 0)  # [Q, K]
        is_needed = np.cumsum(counts, axis=1) - counts < num_wanted
        last = np.where(is_needed, scores, np.inf).min(axis=1, initial=np.inf)
        is_taken = (scores >= last[:, None]) & (counts > 0)  # the points that are needed, and ties with the last
        counts, score, start = counts[is_taken], scores[is_taken], self.starts[points[is_taken]]
        query = np.repeat(np.nonzero(is_taken)[0], counts)
        within = np.arange(len(query)) + np.repeat(start - np.cumsum(counts) + counts, counts)
        score = np.repeat(score, counts)
        row = _ties_by_row(self.rows[within], score, query)
        if own is not None:
            others = row != own[query]
            row, query, score = row[others], query[others], score[others]
        found = np.bincount(query, minlength=len(points))  # [Q]
        best = np.arange(len(query)) - np.repeat(np.cumsum(found) - found, found) < k
        rows = np.full((len(points), k), -1, dtype=np.int64)
        best_scores = np.full((len(points), k), -np.inf, dtype=np.float32)
        is_filled = np.arange(k) < found[:, None]
        rows[is_filled], best_scores[is_filled] = row[best], score[best]
        return rows, best_scores

    def _are_single(self, points: np.ndarray) -> bool:
        """Whether each of `points` has exactly one note; a missing point, -1, has no note."""
        if points.min(initial=0) < 0:
            return False
        return len(self.sizes) == len(self.of_row) or bool((self.sizes[points] == 1).all())


def _without(own: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rows` and `scores` [Q, k + 1] without the row `own` [Q], or where it is not among them, without the last."""
    is_left_out = rows == own[:, None]
    is_left_out[~is_left_out.any(axis=1), -1] = True
    shape = len(rows), rows.shape[1] - 1
    return rows[~is_left_out].reshape(shape), scores[~is_left_out].reshape(shape)


def _ties_by_row(rows: np.ndarray, scores: np.ndarray, query: np.ndarray | None = None) -> np.ndarray:
    """`rows`, sorted where neighbouring scores of a query are equal: [Q, K], or flat, each with its `query`."""
    ties = scores[..., 1:] == scores[..., :-1]
    if query is not None:
        ties &= query[1:] == query[:-1]
    if not (ties & (rows[..., 1:] < rows[..., :-1])).any():
        return rows
    is_tie = np.zeros(scores.shape, dtype=bool)
    is_tie[..., 1:] = ties
    flat = rows.ravel()
    order = np.argsort(np.cumsum(~is_tie) * (flat.max() + 1) + flat, kind="stable")  # fast, because nearly sorted
    return flat[order].reshape(rows.shape)


def distinct_points(vectors: np.ndarray) -> tuple[np.ndarray, Points]:
    """The distinct vectors of `vectors` [N, d], as they first occur [P, d] in fp32, and where each note is."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32) + np.float32(0)  # -0.0 becomes 0.0
    num_notes, dim = vectors.shape
    width = pa.binary(dim * vectors.itemsize)
    encoded = pa.FixedSizeBinaryArray.from_buffers(width, num_notes, [None, pa.py_buffer(vectors)]).dictionary_encode()
    points = Points(encoded.indices.to_numpy().astype(np.int64))
    if len(encoded.dictionary) == num_notes:
        return vectors, points
    return vectors[points.first_rows], points


def moved_to_the_end(vectors: np.ndarray, points: Points, moved: np.ndarray) -> Points:
    """The points, where `moved` [M] change places with the last M ones; so do their `vectors` [P, d], in place."""
    last = np.arange(len(vectors) - len(moved), len(vectors))
    here, there = np.setdiff1d(moved, last), np.setdiff1d(last, moved)
    vectors[here], vectors[there] = vectors[there], vectors[here]
    number = np.arange(len(vectors))
    number[here], number[there] = there, here
    return Points(number[points.of_row])

"""Points are expanded to notes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.retrieval import points as module
from notellm2_core.retrieval.points import Points, distinct_points, moved_to_the_end


def slow_expand(points: Points, found: list[int], scores: list[float], k: int, own: int) -> list[tuple[int, float]]:
    """Rows and scores of all notes at the points, sorted by score and row."""
    notes = [
        (row, score)
        for point, score in zip(found, scores, strict=True)
        for row in np.flatnonzero(points.of_row == point)
        if point >= 0 and row != own
    ]
    return sorted(notes, key=lambda note: (-note[1], note[0]))[:k]


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans(), st.booleans())
def test_expansion_equals_a_sort(seed: int, k: int, leaves_out: bool, has_equal: bool) -> None:
    """Random points with groups, ties, missing points and rows that are left out, with few points per block."""
    rng = np.random.default_rng(seed)
    names = rng.integers(0, 8, 30) if has_equal else rng.permutation(30)
    _, first, of_row = np.unique(names, return_index=True, return_inverse=True)
    points = Points(np.argsort(np.argsort(first))[of_row])  # numbered as they first occur
    num_points, num_found = len(first), min(k + leaves_out, len(first))
    found = np.array([rng.permutation(num_points)[:num_found] for _ in range(7)])
    scores = np.sort(rng.integers(0, 4, found.shape) / 4, axis=1)[:, ::-1].astype(np.float32)
    if rng.random() < 0.3:
        found[3, -1], scores[3, -1] = -1, np.finfo(np.float32).min
    own = rng.integers(-1, 30, 7) if leaves_out else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_POINTS", 2 * num_found)
        rows, best = points.expand(found, scores, k, own)
    for query in range(7):
        left_out = -1 if own is None else int(own[query])
        expected = slow_expand(points, found[query].tolist(), scores[query].tolist(), k, left_out)
        assert list(zip(rows[query], best[query], strict=True))[: len(expected)] == expected
        assert (rows[query, len(expected) :] == -1).all() and np.isneginf(best[query, len(expected) :]).all()


def test_distinct_vectors() -> None:
    """0.0 and -0.0 are equal; points are numbered as they first occur."""
    vectors = np.array([[1, 0], [0, 1], [1, -0.0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    distinct, points = distinct_points(vectors)
    np.testing.assert_array_equal(distinct, vectors[[0, 1, 3]])
    assert points.of_row.tolist() == [0, 1, 0, 2, 1]
    assert points.sizes.tolist() == [2, 2, 1] and points.rows.tolist() == [0, 2, 1, 4, 3]


@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_points_that_are_moved_to_the_end(seed: int, num_moved: int) -> None:
    """Every note keeps its vector; the last points are those that were moved."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(0, 3, (30, 2)).astype(np.float32)
    distinct, points = distinct_points(vectors)
    moved = rng.permutation(len(distinct))[: min(num_moved, len(distinct))]
    before = {*map(bytes, distinct[moved])}
    points = moved_to_the_end(distinct, points, moved)
    np.testing.assert_array_equal(distinct[points.of_row], vectors)
    assert {*map(bytes, distinct[len(distinct) - len(moved) :])} == before

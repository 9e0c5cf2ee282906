"""Merging beside a plain loop: equal scores, both zeros, weights, and note numbers too large for the fast order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.serving.merge import Merge, merge

SCORES = [-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 0.5, np.float32(0.5000001), 1.0]
Found = list[tuple[int, int, float]]  # history note, candidate, score


def plain(found: Found, weights: list[float], k: int, how: Merge) -> list[tuple[int, float, list[int]]]:
    """Every candidate with its score and who found it, the best first."""
    gains: dict[int, list[float]] = {}
    by: dict[int, list[int]] = {}
    for h, weight in enumerate(weights):
        own = sorted(((-score, candidate) for who, candidate, score in found if who == h))[:k]
        for rank, (negative, candidate) in enumerate(own):
            gains.setdefault(candidate, []).append(weight / (61 + rank) if how == "rrf" else -weight * negative)
            by.setdefault(candidate, []).append(h)
    total = max if how == "max" else sum
    scored = [(candidate, float(np.float32(total(values))), by[candidate]) for candidate, values in gains.items()]
    return sorted(scored, key=lambda row: (-row[1], row[0]))


@given(
    data=st.data(),
    how=st.sampled_from(["max", "sum", "rrf"]),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=4),
    k=st.integers(1, 6),
    scale=st.sampled_from([1, 10**7, 2**56]),
)
def test_merging_is_that_of_a_plain_loop(
    data: st.DataObject, how: Merge, weights: list[float], k: int, scale: int
) -> None:
    pair = st.tuples(st.integers(0, len(weights) - 1), st.integers(0, 9).map(lambda c: c * scale))
    pairs = data.draw(st.lists(pair, unique=True, max_size=30))
    found = [(h, c, float(np.float32(data.draw(st.sampled_from(SCORES))))) for h, c in pairs]
    history, candidates, scores = (np.array([row[i] for row in found]) for i in range(3))
    merged = merge(
        history.astype(np.int64), candidates.astype(np.int64), scores.astype(np.float32), np.array(weights), k, how
    )
    expected = plain(found, weights, k, how)
    best = [row for row in expected if row[1] >= expected[min(k, len(expected)) - 1][1]]
    assert merged.scores.tolist() == pytest.approx([score for _, score, _ in best], abs=1e-6)
    assert {*zip(merged.candidates.tolist(), map(tuple, merged.history), strict=True)} == {
        (candidate, tuple(by)) for candidate, _, by in best
    }

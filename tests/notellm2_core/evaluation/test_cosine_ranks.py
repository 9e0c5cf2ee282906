"""Screened counting beside comparing all scores in fp64: ties, near ties, blocks of every size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.evaluation import cosine_ranks
from notellm2_core.evaluation.cosine_ranks import count_by_cosine


@given(
    seed=st.integers(0, 10_000),
    num_notes=st.integers(1, 400),
    dim=st.sampled_from([1, 3, 8, 64]),
    spread=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    block=st.sampled_from([(1, 7), (5, 64), (64, 8192)]),
    few=st.sampled_from([1, 64]),
)
def test_counts_are_those_of_comparing_all(
    seed: int, num_notes: int, dim: int, spread: float, block: tuple[int, int], few: int
) -> None:
    """spread: how far the notes are from one point. With a small one, nearly all are settled in fp64."""
    rng = np.random.default_rng(seed)
    pool = 1 + spread * rng.normal(size=(num_notes, dim)).astype(np.float32)[rng.integers(0, num_notes, num_notes)]
    pool = (pool / np.linalg.norm(pool, axis=1, keepdims=True)).astype(np.float32)
    queries = np.concatenate([pool[:3], -pool[:1], rng.normal(size=(5, dim)).astype(np.float32)])
    rows, targets = (rng.integers(0, size, 40) for size in (len(queries), num_notes))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_QUERIES": block[0], "_NOTES": block[1], "_FEW": few}.items():
            patch.setattr(cosine_ranks, name, value)
        higher, equal = count_by_cosine(queries, pool, rows, targets)
    scores = (queries[rows].astype(np.float64) @ pool.astype(np.float64).T).astype(np.float32)
    own = scores[np.arange(len(rows)), targets][:, None]
    np.testing.assert_array_equal(higher, (scores > own).sum(axis=1))
    np.testing.assert_array_equal(equal, (scores == own).sum(axis=1))


def test_no_pairs_and_no_numbers() -> None:
    nothing, some = np.empty(0, dtype=np.int64), np.eye(3, dtype=np.float32)
    assert [len(part) for part in count_by_cosine(some, some, nothing, nothing)] == [0, 0]
    with pytest.raises(ValueError, match="not all finite"):
        count_by_cosine(np.full((1, 3), np.nan, dtype=np.float32), some, np.array([0]), np.array([0]))

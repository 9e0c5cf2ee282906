"""The sum of two methods' scores, as hybrid search adds words and embeddings."""

from collections.abc import Callable, Sequence

import numpy as np

ScoreRows = Callable[[Sequence[str]], np.ndarray]  # query ids -> scores [Q, M]


def summed_rows(*methods: ScoreRows) -> ScoreRows:
    """Scores [Q, M] in fp32: for every query, the sum of the methods' standard scores over the pool.

    A standard score is (score - mean) / standard deviation, so methods of different scales count the same. A method
    that gives all notes one score adds nothing.
    """

    def rows(query_ids: Sequence[str]) -> np.ndarray:
        return np.sum([_standard(method(query_ids)) for method in methods], axis=0).astype(np.float32)

    return rows


def _standard(scores: np.ndarray) -> np.ndarray:
    """[Q, M] -> fp64 of mean 0 and standard deviation 1 in each row; 0 where all scores of a row are equal."""
    centred = scores.astype(np.float64) - scores.mean(axis=1, keepdims=True, dtype=np.float64)
    deviation = centred.std(axis=1, keepdims=True)
    is_constant = (scores == scores[:, :1]).all(axis=1, keepdims=True)
    return np.where(is_constant, 0, centred / np.where(is_constant, 1, deviation))

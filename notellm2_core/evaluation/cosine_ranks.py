"""Ranks by cosine, as `count_ranks` of `cosine_rows` counts them: screened in fp32, settled in fp64.

A product of fp32 matrices is several times as fast as one in fp64, and almost always enough: its error has a bound, and
a candidate whose score is farther than that from the target's is above it or below it for certain. Only the others are
compared by their exact scores (summed in fp64, rounded to fp32 once). Blocks stay in the processor's cache while they
are counted.

P: pairs, Q: queries of a block, M: notes of the pool, d: width.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

_QUERIES, _NOTES = 64, 8192  # of a block: 2 MB of scores
_FEW = 64  # near notes of a pair in a block that are settled alone; of more, its row is computed once more
_UNIT_ROUNDOFF = 2.0**-24  # of fp32


def count_by_cosine(
    queries: np.ndarray, pool: np.ndarray, rows: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair [P]: notes of the pool with a higher score than the target, and with the same one, itself included.

    queries: [N, d] fp32, of which `rows` [P] are those of the pairs. pool: [M, d] fp32, of which `targets` [P] are.
    Raises ValueError for a vector that is not finite.
    """
    pairs = _Pairs.of(queries, pool, rows, targets)
    higher, equal = np.zeros((2, len(rows)), dtype=np.int64)

    def count(block: np.ndarray) -> None:
        higher[block], equal[block] = _count(pairs, block)

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(count, pairs.blocks()))
    return higher, equal


def exact_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Scores [P] of rows [P, d] with rows [P, d]: summed in fp64, rounded to fp32 once."""
    return np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64)).astype(np.float32)


def _exact_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Such scores [q, m] of all rows [q, d] with all rows [m, d]."""
    return (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class _Pairs:
    queries: np.ndarray
    pool: np.ndarray
    rows: np.ndarray  # [P]
    scores: np.ndarray  # [P] fp32: of the targets
    error: float  # of a score in fp32, at most

    @classmethod
    def of(cls, queries: np.ndarray, pool: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> "_Pairs":
        largest = [float(np.linalg.norm(part, axis=1).max(initial=0)) for part in (queries, pool)]
        if not np.isfinite(largest).all():
            raise ValueError("the scores are not all finite numbers.")
        # Higham (2002), 3.5: of a sum of d products in any order; and of the rounding of the exact score.
        error = (queries.shape[1] + 2) * _UNIT_ROUNDOFF * largest[0] * largest[1] * 1.01
        scores = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), _NOTES):
            part = slice(start, start + _NOTES)
            scores[part] = exact_scores(queries[rows[part]], pool[targets[part]])
        return cls(queries, pool, rows, scores, error)

    def blocks(self) -> list[np.ndarray]:
        """Pairs of up to _QUERIES queries."""
        order = np.argsort(self.rows, kind="stable")
        _, number = np.unique(self.rows[order], return_inverse=True)
        ends = np.searchsorted(number, np.arange(_QUERIES, number.max(initial=-1) + 1, _QUERIES))
        return np.split(order, ends)


def _count(pairs: _Pairs, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Higher and equal notes of the pairs `block` [p]."""
    used, place = np.unique(pairs.rows[block], return_inverse=True)
    left, scores = pairs.queries[used], pairs.scores[block]
    low, high = (_outwards(scores, sign * pairs.error) for sign in (-1, 1))
    higher, equal = np.zeros((2, len(block)), dtype=np.int64)
    all_used = len(used) == len(block)  # one pair for each query
    products = np.empty((len(used), _NOTES), dtype=np.float32)
    for start in range(0, len(pairs.pool), _NOTES):
        right = pairs.pool[start : start + _NOTES]
        found = np.matmul(left, right.T, out=products[:, : len(right)])
        rows = found if all_used else found[place]
        above = _row_counts(rows > high[:, None])
        near = _row_counts(rows >= low[:, None]) - above
        higher += above
        for pair in np.flatnonzero((near > 0) & (near <= _FEW)):
            columns = np.flatnonzero((rows[pair] >= low[pair]) & (rows[pair] <= high[pair]))
            exact = _exact_products(left[place[pair]][None], right[columns])[0]
            higher[pair] += np.count_nonzero(exact > scores[pair])
            equal[pair] += np.count_nonzero(exact == scores[pair])
        if (many := np.flatnonzero(near > _FEW)).size:  # of a model that has collapsed, say
            exact = _exact_products(left[place[many]], right)
            higher[many] += _row_counts(exact > scores[many, None]) - above[many]
            equal[many] += _row_counts(exact == scores[many, None])
    return higher, equal


def _outwards(scores: np.ndarray, error: float) -> np.ndarray:
    """Scores moved by an error, in fp32: by at least that."""
    moved = (scores.astype(np.float64) + error).astype(np.float32)
    return np.nextafter(moved, np.float32(np.copysign(np.inf, error)))


def _row_counts(mask: np.ndarray) -> np.ndarray:
    """The true ones of each row of a mask [p, m]: [p]."""
    bits = np.packbits(mask, axis=1)
    if padding := -bits.shape[1] % 8:
        bits = np.pad(bits, ((0, 0), (0, padding)))
    return np.bitwise_count(bits.view(np.uint64)).sum(axis=1, dtype=np.int64)

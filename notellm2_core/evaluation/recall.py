"""Exact Recall@k by counting: a pair's rank is 1 + the number of pool notes, without the query, that score higher.

numpy only. No sort and no top-k search: every pool note is compared, in chunks of queries.

Ties. A target that ties with t other notes has, under a random order of the ties, each of the ranks h+1 .. h+t+1 with
the same probability (h: notes strictly higher). *The* recall is the expectation under that random order: it neither
flatters nor punishes a method that gives many notes one score (BM25 gives 0, an image without text a constant). The
worst and the best order are reported as bounds beside it.

P: pairs, Q: queries of a chunk, M: notes of the pool, d: embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from notellm2_core.embeddings.table import Embeddings

# Scores [Q, M] of queries against the whole pool, in the pool's order.
ScoreRows = Callable[[Sequence[str]], np.ndarray]

CHUNK_SCORES = 1 << 24  # scores held at a time: 64 MB in fp32
CHUNK_POOL = 1 << 16  # pool rows converted to fp64 at a time


@dataclass(frozen=True)
class Pairs:
    """Related pairs (query -> target), in the order of every per-pair array [P]."""

    query_ids: tuple[str, ...]
    target_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.query_ids)


@dataclass(frozen=True)
class Ranks:
    """Where each pair's target stands among its candidates: the pool without the query. All arrays are [P] int64."""

    higher: np.ndarray  # candidates that score strictly higher than the target
    ties: np.ndarray  # other candidates with exactly the target's score
    candidates: np.ndarray  # how many there are, the target included

    def select(self, mask: np.ndarray) -> "Ranks":
        """The pairs where `mask` [P] is true."""
        return Ranks(self.higher[mask], self.ties[mask], self.candidates[mask])


@dataclass(frozen=True)
class Recall:
    """Recall@k in percent over `num_pairs` pairs; None where there is no pair."""

    k: int
    num_pairs: int
    expected: float | None  # under a random order of ties: the figure to quote
    pessimistic: float | None  # the target comes last among its ties
    optimistic: float | None  # the target comes first


def count_ranks(score_rows: ScoreRows, pool_ids: Sequence[str], pairs: Pairs, chunk: int | None = None) -> Ranks:
    """Ranks of all pairs from any score function: `score_rows(queries)` gives [Q, M] scores in the order of `pool_ids`.

    `chunk` is the number of queries scored at a time (default: what fits CHUNK_SCORES).
    Raises ValueError where a target is not in the pool, a pair is a note with itself, or a score is not finite.
    """
    column = {note_id: c for c, note_id in enumerate(pool_ids)}
    if len(column) != len(pool_ids):
        raise ValueError(f"{len(pool_ids) - len(column)} notes come twice in the pool; it must name each note once.")
    absent = [t for t in pairs.target_ids if t not in column]
    if absent:
        raise ValueError(f"the targets of {len(absent)} pairs are not in the pool (the first is {absent[0]!r}).")
    selves = sum(q == t for q, t in zip(pairs.query_ids, pairs.target_ids, strict=True))
    if selves:
        raise ValueError(f"{selves} pairs relate a note to itself; remove them.")

    pairs_of: dict[str, list[int]] = {}
    for n, query in enumerate(pairs.query_ids):
        pairs_of.setdefault(query, []).append(n)
    queries = list(pairs_of)
    chunk = chunk or max(1, CHUNK_SCORES // max(1, len(pool_ids)))
    higher = np.zeros(len(pairs), dtype=np.int64)
    ties = np.zeros(len(pairs), dtype=np.int64)
    candidates = np.zeros(len(pairs), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        block = queries[start : start + chunk]
        scores = score_rows(block)  # [Q, M]
        assert scores.shape == (len(block), len(pool_ids)), scores.shape
        if not np.isfinite(scores).all():
            bad = block[int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])]
            raise ValueError(f"the scores of query {bad!r} are not all finite numbers.")
        for query, row in zip(block, scores, strict=True):
            index = pairs_of[query]
            target = row[[column[pairs.target_ids[i]] for i in index]][:, None]  # [pairs of the query, 1]
            higher[index] = (row > target).sum(axis=1)
            ties[index] = (row == target).sum(axis=1) - 1  # without the target itself
            candidates[index] = len(pool_ids)
            if query in column:  # the query is no candidate: take it out of the counts again
                own = row[column[query]]
                higher[index] -= (own > target)[:, 0]
                ties[index] -= (own == target)[:, 0]
                candidates[index] -= 1
    return Ranks(higher, ties, candidates)


def cosine_rows(queries: Embeddings, pool: Embeddings) -> ScoreRows:
    """Inner products of unit vectors as fp32 scores.

    They are summed in fp64 and rounded to fp32 once: the products of two fp32 numbers are exact in fp64, so the
    score is the correctly rounded one whatever the chunk, the BLAS or the number of threads. Two notes with the
    same vector then tie exactly, which a matrix product in fp32 does not promise.
    """

    def rows(query_ids: Sequence[str]) -> np.ndarray:
        left = queries.vectors[queries.rows(query_ids)].astype(np.float64)  # [Q, d]
        scores = np.empty((len(query_ids), len(pool.note_ids)), dtype=np.float32)  # [Q, M]
        for start in range(0, len(pool.note_ids), CHUNK_POOL):
            right = pool.vectors[start : start + CHUNK_POOL].astype(np.float64)
            scores[:, start : start + CHUNK_POOL] = left @ right.T
        return scores

    return rows


def target_ranks(queries: Embeddings, pool: Embeddings, pairs: Pairs, chunk: int | None = None) -> Ranks:
    """Ranks of the targets by cosine. Raises ValueError with the number of pairs that have a note without embedding."""
    missing = sum(
        q not in queries.positions or t not in pool.positions
        for q, t in zip(pairs.query_ids, pairs.target_ids, strict=True)
    )
    if missing:
        raise ValueError(
            f"{missing} of {len(pairs)} pairs have a note without embedding: export the embeddings of all their notes."
        )
    return count_ranks(cosine_rows(queries, pool), pool.note_ids, pairs, chunk)


def recall_at(ranks: Ranks, ks: Sequence[int]) -> list[Recall]:
    """Recall@k for each k: with h notes higher and t ties, a target is found with probability (k - h) / (t + 1).

    The probability is clipped to [0, 1]; the mean over the pairs is given in percent.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"evaluation.ks = {list(ks)}: every k must be 1 or more.")
    num_pairs = len(ranks.higher)
    if num_pairs == 0:
        return [Recall(k, 0, None, None, None) for k in ks]

    def percent(found: np.ndarray) -> float:
        return 100 * float(found.mean())

    return [
        Recall(
            k,
            num_pairs,
            expected=percent(np.clip((k - ranks.higher) / (ranks.ties + 1), 0, 1)),
            pessimistic=percent(ranks.higher + ranks.ties < k),
            optimistic=percent(ranks.higher < k),
        )
        for k in ks
    ]

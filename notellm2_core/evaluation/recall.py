"""Exact Recall@k by counting: a pair's rank is 1 + the number of candidates that score higher than its target.

The candidates are the notes of the pool without the query. No sort and no top-k search: a target is compared with every
candidate, in chunks of queries.

Ties. In a random order of the ties, a target that ties with t other notes has each of the ranks h+1 .. h+t+1 with the
same probability (h: notes that score strictly higher). The recall is the expectation over that order: it neither
favours nor punishes a method that gives many notes one score (BM25 gives 0, an image without text a constant). The
worst and the best order are reported as bounds.

P: pairs, Q: queries of a chunk, M: notes of the pool, d: embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from notellm2_core.embeddings.table import Embeddings
from notellm2_core.evaluation.cosine_ranks import count_by_cosine, exact_scores
from notellm2_core.evaluation.pairs import Pairs

# Scores [Q, M] of queries against the whole pool, in the pool's order.
ScoreRows = Callable[[Sequence[str]], np.ndarray]

CHUNK_SCORES = 1 << 24  # scores in memory at a time: 64 MB in fp32
CHUNK_POOL = 1 << 16  # pool rows converted to fp64 at a time


@dataclass(frozen=True)
class Ranks:
    """The rank of each pair's target among its candidates, the pool without the query. All arrays are [P]."""

    higher: np.ndarray  # int64: candidates that score strictly higher than the target
    ties: np.ndarray  # int64: other candidates with exactly the target's score
    candidates: np.ndarray  # int64: number of candidates, the target included
    queries: np.ndarray  # int64: a number for each query
    relevance: np.ndarray  # float64: of the target, above 0

    def select(self, mask: np.ndarray) -> "Ranks":
        """The pairs where `mask` [P] is true."""
        return Ranks(*(getattr(self, field.name)[mask] for field in fields(self)))


@dataclass(frozen=True)
class Recall:
    """Recall@k in percent over `num_pairs` pairs; None without pairs."""

    k: int
    num_pairs: int
    expected: float | None  # under a random order of ties: the value to quote
    pessimistic: float | None  # the target comes last among its ties
    optimistic: float | None  # the target comes first


def count_ranks(
    score_rows: ScoreRows,
    pool_ids: Sequence[str],
    pairs: Pairs,
    chunk: int | None = None,
    queries_are_notes: bool = True,
) -> Ranks:
    """The ranks of all pairs by any score function: `score_rows(queries)` returns [Q, M] in the order of `pool_ids`.

    chunk: queries scored at a time (default: as CHUNK_SCORES allows). queries_are_notes: a query's id names a note, so
    the query is no candidate. Raises ValueError if the pool repeats a note, a target is not in it, a pair relates a
    note to itself or comes twice, or a score is not finite.
    """
    column = _columns(pool_ids, pairs, queries_are_notes)
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
            ties[index] = (row == target).sum(axis=1) - 1  # except the target itself
            candidates[index] = len(pool_ids)
            if queries_are_notes and query in column:  # the query is no candidate: subtract it
                own = row[column[query]]
                higher[index] -= (own > target)[:, 0]
                ties[index] -= (own == target)[:, 0]
                candidates[index] -= 1
    query_of = np.zeros(len(pairs), dtype=np.int64)
    for number, index in enumerate(pairs_of.values()):
        query_of[index] = number
    return Ranks(higher, ties, candidates, query_of, np.array(pairs.relevance or [1.0] * len(pairs)))


def _columns(pool_ids: Sequence[str], pairs: Pairs, queries_are_notes: bool) -> dict[str, int]:
    """note_id -> its column in the pool. Raises ValueError for a pool and pairs that `count_ranks` cannot rank."""
    column = {note_id: c for c, note_id in enumerate(pool_ids)}
    if len(column) != len(pool_ids):
        twice = next(note_id for c, note_id in enumerate(pool_ids) if column[note_id] != c)
        raise ValueError(
            f"{len(pool_ids) - len(column)} notes come twice in the pool (the first is {twice!r}); it must name each "
            "note once."
        )
    missing = [t for t in pairs.target_ids if t not in column]
    if missing:
        raise ValueError(f"the targets of {len(missing)} pairs are not in the pool (the first is {missing[0]!r}).")
    selves = [q for q, t in zip(pairs.query_ids, pairs.target_ids, strict=True) if q == t]
    if selves and queries_are_notes:
        raise ValueError(
            f"{len(selves)} pairs relate a note to itself (the first is {selves[0]!r}), and no query is a candidate. "
            "--queries names the embeddings of queries that are no notes."
        )
    if repeated := len(pairs) - len(set(zip(pairs.query_ids, pairs.target_ids, strict=True))):
        raise ValueError(f"{repeated} pairs are repetitions; name each pair once.")
    return column


def cosine_rows(queries: Embeddings, pool: Embeddings) -> ScoreRows:
    """Cosines of unit vectors, as fp32 scores.

    Products of two fp32 numbers are exact in fp64; they are summed in fp64 and rounded to fp32 once. A score is
    therefore correctly rounded for every chunk size, BLAS and number of threads, and two notes with the same vector tie
    exactly, which a matrix product in fp32 does not guarantee.
    """

    def rows(query_ids: Sequence[str]) -> np.ndarray:
        left = queries.vectors[queries.rows(query_ids)].astype(np.float64)  # [Q, d]
        scores = np.empty((len(query_ids), len(pool.note_ids)), dtype=np.float32)  # [Q, M]
        for start in range(0, len(pool.note_ids), CHUNK_POOL):
            right = pool.vectors[start : start + CHUNK_POOL].astype(np.float64)
            scores[:, start : start + CHUNK_POOL] = left @ right.T
        return scores

    return rows


def target_ranks(queries: Embeddings, pool: Embeddings, pairs: Pairs, queries_are_notes: bool = True) -> Ranks:
    """The ranks of the targets by cosine: those of `count_ranks` by `cosine_rows`, several times as fast.

    Raises ValueError with the number of pairs whose notes lack an embedding, and as `count_ranks`.
    """
    missing = [
        t if q in queries.positions else q
        for q, t in zip(pairs.query_ids, pairs.target_ids, strict=True)
        if q not in queries.positions or t not in pool.positions
    ]
    if missing:
        raise ValueError(
            f"{queries.prefix}{len(missing)} of {len(pairs)} pairs have a note without embedding (the first is "
            f"{missing[0]!r}): export the embeddings of all their notes."
        )
    column = _columns(pool.note_ids, pairs, queries_are_notes)
    rows, targets = queries.rows(pairs.query_ids), pool.rows(pairs.target_ids)
    higher, ties = count_by_cosine(queries.vectors, pool.vectors, rows, targets)
    ties -= 1  # the target itself
    candidates = np.full(len(pairs), len(pool.note_ids))
    own = np.array([column.get(query, -1) if queries_are_notes else -1 for query in pairs.query_ids], dtype=np.int64)
    in_pool = np.flatnonzero(own >= 0)  # the query is no candidate: subtract it
    left = queries.vectors[rows[in_pool]]
    scores, target_scores = (exact_scores(left, pool.vectors[of[in_pool]]) for of in (own, targets))
    higher[in_pool] -= scores > target_scores
    ties[in_pool] -= scores == target_scores
    candidates[in_pool] -= 1
    numbers = {query: number for number, query in enumerate(dict.fromkeys(pairs.query_ids))}
    query_of = np.array([numbers[query] for query in pairs.query_ids], dtype=np.int64)
    return Ranks(higher, ties, candidates, query_of, np.array(pairs.relevance or [1.0] * len(pairs)))


def recall_at(ranks: Ranks, ks: Sequence[int]) -> list[Recall]:
    """Recall@k for each k, in percent: the mean over the pairs of the probability that the target is in the top k.

    With h notes higher and t ties, that is (k - h) / (t + 1), clipped to [0, 1]. Raises ValueError for a k below 1.
    """
    require_ks(ks)
    num_pairs = len(ranks.higher)
    if num_pairs == 0:
        return [Recall(k, 0, None, None, None) for k in ks]

    def percent(hits: np.ndarray) -> float:
        return 100 * float(hits.mean())

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


def require_ks(ks: Sequence[int]) -> None:
    """Raises ValueError for a k below 1."""
    if any(k < 1 for k in ks):
        raise ValueError(f"evaluation.ks = {list(ks)}: every k must be 1 or more.")

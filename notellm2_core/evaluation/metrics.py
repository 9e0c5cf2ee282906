"""Metrics of a ranking with ties, per query: Recall@k, hit rate@k, MRR, nDCG@k, MAP@k. numpy only.

The definitions are those of trec_eval (https://github.com/usnistgov/trec_eval) and ranx (Bassani, ECIR 2022). Both need
one order of the candidates; where scores tie, each metric here is its expectation over all orders of the ties, which
are equally probable (McSherry and Najork, ECIR 2008). With r(t) the rank of target t, R the number of targets of the
query, g(t) the relevance of t, and the mean taken over the queries:

    recall@k    the share of the targets with r(t) <= k
    hit_rate@k  1 if any target has r(t) <= k: trec_eval's success, sentence-transformers' accuracy
    mrr, mrr@k  1 / r(t) of the first target, over the whole pool, or 0 beyond rank k: recip_rank
    ndcg@k      the sum of g(t) / log2(r(t) + 1) over r(t) <= k, divided by that of the best order: ndcg_cut, which has
                linear gains (Järvelin and Kekäläinen, TOIS 2002)
    map@k       the sum over r(t) <= k of precision at r(t), divided by R: map_cut

The metrics per pair, as the paper's Recall@k, take each pair as a query of its own (`each_pair`). For a query with one
target, hit rate@k is Recall@k and MAP@k is MRR@k.

Letters, one value per group of tied targets (targets of one query with one score): h candidates of higher score, n
candidates with this score, of which m are targets, and c = min(max(k - h, 0), n), those of the n within rank k.
P: pairs, Q: queries, G: groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from notellm2_core.evaluation.recall import Ranks, require_ks


@dataclass(frozen=True)
class _Groups:
    """The groups of tied targets, by query, and in each query from the highest score: arrays [G], the last two [Q]."""

    query: np.ndarray  # 0 .. Q-1
    higher: np.ndarray  # h
    size: np.ndarray  # n
    targets: np.ndarray  # m
    found_before: np.ndarray  # targets of the query with higher scores
    gain: np.ndarray  # the sum of the targets' relevance
    first: np.ndarray  # [Q] the first group of each query
    num_targets: np.ndarray  # [Q] R

    def within(self, k: int) -> np.ndarray:
        """c [G]."""
        return np.clip(k - self.higher, 0, self.size)

    def per_query(self, values: np.ndarray) -> np.ndarray:
        """The sums [Q] of `values` [G]."""
        return np.bincount(self.query, weights=values)


def each_pair(ranks: Ranks) -> Ranks:
    """`ranks` with each pair as a query of its own, for the metrics per pair."""
    return replace(ranks, queries=np.arange(len(ranks.queries)))


def ranking_metrics(ranks: Ranks, ks: Sequence[int]) -> dict[str, float | None]:
    """The means over the queries in percent, by name: "mrr", and "recall@10" etc. for each k. None without pairs.

    Only the targets among `ranks` are relevant. Raises ValueError for a k below 1.
    """
    require_ks(ks)
    if not len(ranks.higher):
        names = [f"{name}@{k}" for k in ks for name in ("recall", "hit_rate", "mrr", "ndcg", "map")]
        return dict.fromkeys(["mrr", *names])
    groups = _tied_groups(ranks)
    last = int((groups.higher + groups.size).max())
    reciprocals = np.cumsum(np.append(0, 1 / np.arange(1, last + 1)))  # [last + 1] sums of 1 / rank
    values = {"mrr": _mrr(groups, last, reciprocals)}
    for k in ks:
        values |= {
            f"recall@{k}": _recall(groups, k),
            f"hit_rate@{k}": _hit_rate(groups, k),
            f"mrr@{k}": _mrr(groups, k, reciprocals),
            f"ndcg@{k}": _dcg(groups, k, last) / _best_dcg(ranks, k),
            f"map@{k}": _average_precision(groups, k, reciprocals),
        }
    return {name: 100 * float(value.mean()) for name, value in values.items()}


def _tied_groups(ranks: Ranks) -> _Groups:
    """Targets of one query tie where as many candidates are higher, because the same candidates then are."""
    order = np.lexsort((ranks.higher, ranks.queries))
    query = np.unique(ranks.queries[order], return_inverse=True)[1]  # [P] numbers without gaps
    higher = ranks.higher[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (query[1:] != query[:-1]) | (higher[1:] != higher[:-1])
    start = np.flatnonzero(is_first)  # [G] the first pair of each group
    targets = np.diff(start, append=len(order))
    size = ranks.ties[order][start] + 1
    assert (targets <= size).all(), "a pair comes twice"
    first = np.searchsorted(query[start], np.arange(query[-1] + 1))
    return _Groups(
        query=query[start],
        higher=higher[start],
        size=size,
        targets=targets,
        found_before=start - start[first][query[start]],
        gain=np.add.reduceat(ranks.relevance[order], start),
        first=first,
        num_targets=np.bincount(query),
    )


def _recall(groups: _Groups, k: int) -> np.ndarray:
    """[Q]. Each of the n has probability c / n to be within rank k."""
    return groups.per_query(groups.targets * groups.within(k) / groups.size) / groups.num_targets


def _hit_rate(groups: _Groups, k: int) -> np.ndarray:
    """[Q]. Of the first group, none of m targets is within rank k with probability prod_{i<m} (n - c - i) / (n - i)."""
    size, targets, outside = (x[groups.first] for x in (groups.size, groups.targets, groups.size - groups.within(k)))
    missed = np.ones(len(size))
    for i in range(int(targets.max())):
        missed *= np.where(i < targets, (outside - i).clip(min=0) / (size - i).clip(min=1), 1)
    return 1 - missed


def _mrr(groups: _Groups, k: int, reciprocals: np.ndarray) -> np.ndarray:
    """[Q]. 1 / r of the first target if r <= k. One tied target has each of the ranks h + 1 .. h + n alike."""
    higher, size, targets, within = (
        x[groups.first] for x in (groups.higher, groups.size, groups.targets, groups.within(k))
    )
    expected = (reciprocals[higher + within] - reciprocals[higher]) / size
    for q in np.flatnonzero((targets > 1) & (within > 0)):
        expected[q] = _reciprocal_of_first(int(higher[q]), int(size[q]), int(targets[q]), int(within[q]))
    return expected


@lru_cache(maxsize=1 << 16)
def _reciprocal_of_first(higher: int, size: int, targets: int, within: int) -> float:
    """E[1 / (h + i); i <= c] for i, the place among the n of the first of m targets.

    If the first i - 1 places have no target, the next has one with probability m / (n - i + 1).
    """
    remaining = size - np.arange(min(within, size - targets + 1))  # n - i + 1
    none_before = np.cumprod(np.append(1, 1 - targets / remaining[:-1]))
    return float((none_before * targets / remaining / (higher + size + 1 - remaining)).sum())


def _dcg(groups: _Groups, k: int, last: int) -> np.ndarray:
    """[Q]. A tied target has the mean discount of the n ranks, 0 for those beyond k."""
    discounts = np.cumsum(np.append(0, 1 / np.log2(np.arange(2, last + 2))))  # [last + 1] sums over the ranks
    mean = (discounts[groups.higher + groups.within(k)] - discounts[groups.higher]) / groups.size
    return groups.per_query(groups.gain * mean)


def _best_dcg(ranks: Ranks, k: int) -> np.ndarray:
    """[Q]. The DCG@k of the targets in the order of their relevance."""
    order = np.lexsort((-ranks.relevance, ranks.queries))
    query, counts = np.unique(ranks.queries[order], return_inverse=True, return_counts=True)[1:]
    rank = np.arange(1, len(order) + 1) - (np.cumsum(counts) - counts)[query]  # [P]
    return np.bincount(query, weights=np.where(rank <= k, ranks.relevance[order] / np.log2(rank + 1), 0))


def _average_precision(groups: _Groups, k: int, reciprocals: np.ndarray) -> np.ndarray:
    """[Q]. With a targets in higher groups, a target at place i of its group has at its rank the expected precision

        (a + 1 + (m - 1) (i - 1) / (n - 1)) / (h + i),

    because each of the other m - 1 comes before it with probability (i - 1) / (n - 1). The sum over i <= c uses
    (i - 1) / (h + i) = 1 - (h + 1) / (h + i).
    """
    within = groups.within(k)
    harmonic = reciprocals[groups.higher + within] - reciprocals[groups.higher]  # sum of 1 / (h + i)
    others = (groups.targets - 1) / np.maximum(groups.size - 1, 1)
    total = (groups.found_before + 1) * harmonic + others * (within - (groups.higher + 1) * harmonic)
    return groups.per_query(groups.targets * total / groups.size) / groups.num_targets

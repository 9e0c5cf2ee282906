"""Merges the neighbours of several history notes into one list.

H: history notes, M: found neighbours of all of them together, k: hits.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Merge = Literal["max", "sum", "rrf"]
_RRF = 60  # Cormack, Clarke and Buettcher (2009): the score of rank r, from 1, is 1 / (60 + r)


@dataclass(frozen=True)
class Merged:
    """Distinct candidates, the best first; equal scores in the order of their numbers."""

    candidates: np.ndarray  # [C] numbers of notes
    scores: np.ndarray  # [C] float32
    history: tuple[list[int], ...]  # of each candidate: the history notes that found it, ascending


def merge(
    history: np.ndarray, candidates: np.ndarray, scores: np.ndarray, weights: np.ndarray, k: int, how: Merge = "max"
) -> Merged:
    """The best k candidates, and those that equal the k-th.

    history, candidates, scores [M]: who found what, with which inner product; nobody finds the same twice. Of each
    history note only its k best count. weights [H] of the history notes. The score of a candidate is the largest
    weighted inner product (max), the sum of the weighted inner products (sum), or the weighted sum of reciprocal ranks
    (rrf).
    """
    order = np.lexsort((candidates, -scores, history))  # by history note, the best first
    history, candidates, scores = history[order], candidates[order], scores[order]
    starts = np.searchsorted(history, history, side="left")
    ranks = np.arange(len(history)) - starts
    history, candidates, scores, ranks = (part[ranks < k] for part in (history, candidates, scores, ranks))
    gains = weights[history] / (_RRF + 1 + ranks) if how == "rrf" else weights[history] * scores
    order = np.argsort(candidates, kind="stable")
    distinct, first = np.unique(candidates[order], return_index=True)
    reduce = np.maximum if how == "max" else np.add
    merged = reduce.reduceat(gains[order], first) if len(first) else np.empty(0)
    best = np.lexsort((distinct, -merged))
    if len(best) > k:
        best = best[: np.searchsorted(-merged[best], -merged[best[k - 1]], side="right")]
    ends = np.append(first[1:], len(order))
    by = history[order].tolist()  # of each candidate ascending, as they were sorted by history note
    spans = zip(first[best].tolist(), ends[best].tolist(), strict=True)
    return Merged(distinct[best], merged[best].astype(np.float32), tuple(by[a:b] for a, b in spans))

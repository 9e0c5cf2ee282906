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
    order = _argsort(candidates * len(weights) + history)  # by candidate, and of each by history note
    history, candidates, scores = history[order], candidates[order], scores[order]
    ranks = _ranks(history, scores, len(weights))
    if not (is_best := ranks < k).all():
        history, candidates, scores, ranks = (part[is_best] for part in (history, candidates, scores, ranks))
    gains = weights[history] / (_RRF + 1 + ranks) if how == "rrf" else weights[history] * scores
    is_first = np.ones(len(candidates), dtype=bool)
    is_first[1:] = candidates[1:] != candidates[:-1]
    starts = np.flatnonzero(is_first)  # of the candidates
    distinct = candidates[starts]
    merged = (np.maximum if how == "max" else np.add).reduceat(gains, starts) if len(starts) else np.empty(0)
    merged = merged.astype(np.float32)  # before the cut, so that candidates of equal scores stay together
    kth = np.partition(merged, -k)[-k] if len(merged) > k else -np.inf
    best = np.flatnonzero(merged >= kth)
    best = best[np.argsort(-merged[best], kind="stable")]  # the candidates ascend
    by, ends = history.tolist(), np.append(starts[1:], len(history))
    spans = zip(starts[best].tolist(), ends[best].tolist(), strict=True)
    return Merged(distinct[best], merged[best], tuple(by[a:b] for a, b in spans))


def _ranks(history: np.ndarray, scores: np.ndarray, num_history: int) -> np.ndarray:
    """Of each found note [M], its rank among those of the same history note, from 0."""
    order = _argsort(history << 32 | _descending(scores))
    ordered = history[order]
    ranks = np.empty(len(history), np.int64)
    ranks[order] = np.arange(len(history)) - np.searchsorted(ordered, np.arange(num_history))[ordered]
    return ranks


def _descending(scores: np.ndarray) -> np.ndarray:
    """Whole numbers of 32 bits that are in the reverse order of float32 numbers [M]."""
    bits = (scores.astype(np.float32) + 0).view(np.int32).astype(np.int64)  # + 0 turns -0.0 into 0.0
    return 0x7FFFFFFF - np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _argsort(keys: np.ndarray) -> np.ndarray:
    """The stable order of whole numbers from 0 on [M].

    numpy sorts numbers in half the time that it takes to order them, so the place of each is put behind it.
    """
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)) >> (63 - bits):
        return np.argsort(keys, kind="stable")
    return np.sort(keys << bits | np.arange(len(keys))) & ((1 << bits) - 1)

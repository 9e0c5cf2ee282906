"""Chooses the search parameters of an index for a target recall, and measures recall and latency.

Recall is measured against exact search over the vectors themselves, with two kinds of queries, half each: notes of the
index, which are left out of their own neighbours, and held-out vectors, a note's moved in a random direction by the
distance to its nearest neighbour. The lower of the two counts.

The parameters are doubled until the target is reached, then each is lowered as far as recall allows. The choice depends
on counts alone, not on measured time, so it is the same on every machine.

N: notes, Q: queries of each kind, K: points of the exact search, k: neighbours, d: width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from notellm2_core.retrieval.index import Index, TunedSearch
from notellm2_core.retrieval.parameters import Parameters, parameter_ranges

TUNED_KS = (10, 100, 1000, 10_000)  # between two of them, the parameters of the larger one hold
EXHAUSTIVE_SHARE = 32  # above 1/32 of the points as neighbours, comparing all is as fast
_NUM_QUERIES = ((100, 250), (1000, 50), (10_000, 10))  # largest k, Q: with more neighbours, queries differ less
_STANDARD_ERRORS = 1.64  # by which recall has to lie above the target: then 95 % of samples would have reached it
_TIE = 2e-6  # scores that are equal up to the rounding of fp32
_LOWERING_STEPS = 3


@dataclass(frozen=True)
class Sample:
    """Queries with their exact neighbours among the notes of an index."""

    index: Index
    vectors: np.ndarray  # [N, d] of the index's notes
    queries: np.ndarray  # [2Q, d]: notes of the index, then held-out vectors
    own: np.ndarray  # [2Q] row of the note itself; -1: held out
    scores: np.ndarray  # [2Q, K] of the nearest points
    counts: np.ndarray  # [2Q, K] notes at these points and the nearer ones

    @staticmethod
    def draw(index: Index, vectors: np.ndarray, max_k: int, num_queries: int, seed: int = 0) -> "Sample":
        """Queries for recall@k up to `max_k`. Each distinct one of the `vectors` [N, d] is drawn with equal chance."""
        points = index.points
        first_rows = points.rows[points.starts]
        num_points = len(first_rows)
        database = vectors if num_points == len(vectors) else vectors[first_rows]
        rng = np.random.default_rng(seed)
        rows = first_rows[rng.permutation(num_points)[:num_queries]]
        num_nearest = min(max_k + 1, num_points)
        scores, found = faiss.knn(vectors[rows], database, num_nearest, metric=faiss.METRIC_INNER_PRODUCT)
        moves = rng.standard_normal((len(rows), vectors.shape[1]))
        distances = np.sqrt(np.maximum(0, 2 - 2 * scores[:, [min(1, num_nearest - 1)]]))  # to the nearest other point
        moved = vectors[rows] + distances * moves / np.linalg.norm(moves, axis=1, keepdims=True)
        moved = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
        its_scores, its_found = faiss.knn(moved, database, num_nearest, metric=faiss.METRIC_INNER_PRODUCT)
        own = np.concatenate([rows, np.full(len(rows), -1)])
        counts = np.cumsum(points.counts(np.concatenate([found, its_found]), own), axis=1)
        return Sample(
            index, vectors, np.concatenate([vectors[rows], moved]), own, np.concatenate([scores, its_scores]), counts
        )

    def recalls(self, k: int, parameters: Parameters | None) -> np.ndarray:
        """[2, Q]: the share of each query's exact k nearest notes that are found. A tie with the k-th counts."""
        kth = np.take_along_axis(self.scores, (self.counts >= k).argmax(axis=1)[:, None], axis=1)
        rows, _ = self.index.search_with(self.queries, k, self.own, parameters)
        hits = [
            np.count_nonzero(self.vectors[found[found >= 0]] @ query >= score - _TIE)
            for found, query, score in zip(rows, self.queries, kth, strict=True)
        ]
        return np.minimum(1, np.array(hits) / k).reshape(2, -1)

    def recall(self, k: int, parameters: Parameters | None) -> float:
        """Recall@k of the kind of queries that has the lower one."""
        return float(self.recalls(k, parameters).mean(axis=1).min())

    def latency_ms(self, k: int, parameters: Parameters | None) -> float:
        """Milliseconds of one search with one query, on average."""
        queries = [(self.queries[i : i + 1], self.own[i : i + 1]) for i in range(min(20, len(self.queries)))]
        start = time.perf_counter()
        for query, own in queries:
            self.index.search_with(query, k, own, parameters)
        return 1000 * (time.perf_counter() - start) / len(queries)


def tune(index: Index, vectors: np.ndarray, search_k: int, target_recall: float) -> tuple[TunedSearch, ...]:
    """Search parameters for those of TUNED_KS and `search_k` that are few beside the notes [N, d].

    Where no parameters reach the target, all vectors are compared; where that does not reach it either, because the
    index holds compressed vectors, the parameters give up 1 % of the recall that the index can have.
    """
    limit = len(index.points.sizes) // EXHAUSTIVE_SHARE
    ks = sorted({k for k in (*TUNED_KS, search_k) if k <= limit})
    tuned: list[TunedSearch] = []
    sample: Sample | None = None
    for k in ks:
        if sample is None or k > sample.counts.shape[1] - 1:
            largest, num_queries = next(((n, q) for n, q in _NUM_QUERIES if k <= n), (k, _NUM_QUERIES[-1][1]))
            max_k = max(other for other in ks if other <= largest)
            sample = Sample.draw(index, vectors, max_k, num_queries)
        start = tuned[-1].parameters if tuned else {}
        parameters = None if start is None else _cheapest(sample, k, target_recall, start)
        tuned.append(TunedSearch(k, parameters, round(100 * sample.recall(k, parameters), 3)))
    return tuple(tuned)


def measure(index: Index, vectors: np.ndarray, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall in percent and milliseconds of a search by k: {"recall": {"10": ...}, "latency_ms": {"10": ...}}.

    Raises ValueError where the index has too few notes for the largest of `ks`, without the query.
    """
    if not ks:
        return {"recall": {}, "latency_ms": {}}
    if max(ks) >= len(vectors):
        raise ValueError(f"recall@{max(ks)} needs more than {len(vectors)} notes.")
    sample = Sample.draw(index, vectors, max(ks), _NUM_QUERIES[0][1])
    return {
        "recall": {str(k): round(100 * sample.recall(k, index.parameters(k)), 3) for k in ks},
        "latency_ms": {str(k): round(sample.latency_ms(k, index.parameters(k)), 3) for k in ks},
    }


def ann_recall(index: Index, vectors: np.ndarray, k: int, num_queries: int = 1000, seed: int = 0) -> float:
    """ANN recall: the share, in percent, of the exact k nearest notes that notes of the index find, without themselves.

    Raises ValueError for fewer than two notes.
    """
    k = min(k, len(vectors) - 1)
    if k < 1:
        raise ValueError(f"the index recall needs at least two notes, got {len(vectors)}.")
    sample = Sample.draw(index, vectors, k, num_queries, seed)
    return 100 * float(sample.recalls(k, index.parameters(k))[0].mean())


def _cheapest(sample: Sample, k: int, target: float, start: Parameters) -> Parameters | None:
    """The cheapest parameters from `start` on whose recall is surely above `target`; None: compare with all."""
    ranges = parameter_ranges(sample.index.faiss_index, k)
    highest = {name: largest for name, (_, largest) in ranges.items()}
    if (parameters := _lowest(ranges, start, _reaches(sample, k, target))) is not None:
        return parameters
    best, exhaustive = sample.recall(k, highest), sample.recall(k, None)
    if exhaustive >= target or exhaustive > 1.01 * best:
        return None
    return _lowest(ranges, start, lambda parameters: sample.recall(k, parameters) >= 0.99 * best)


def _reaches(sample: Sample, k: int, target: float) -> Callable[[Parameters], bool]:
    def reaches(parameters: Parameters) -> bool:
        recalls = sample.recalls(k, parameters)
        errors = recalls.std(axis=1) / math.sqrt(recalls.shape[1])
        return bool((recalls.mean(axis=1) - _STANDARD_ERRORS * errors >= target).all())

    return reaches


def _lowest(
    ranges: Mapping[str, tuple[int, int]], start: Parameters, reaches: Callable[[Parameters], bool]
) -> Parameters | None:
    """The least parameters in `ranges`, from `start` on, that `reaches` is true for; None: there are none."""
    values = {name: min(max(start.get(name, 0), least), largest) for name, (least, largest) in ranges.items()}
    lower = dict(values)
    while not reaches(values):
        doubled = {name: min(2 * value, ranges[name][1]) for name, value in values.items()}
        if doubled == values:
            return None
        lower = values if len(values) == 1 else lower
        values = doubled
    for name in values:
        low, high = lower[name], values[name]
        for _ in range(_LOWERING_STEPS):
            middle = round(math.sqrt(low * high))
            if not low < middle < high:
                break
            low, high = (low, middle) if reaches(values | {name: middle}) else (middle, high)
        values[name] = high
    return values

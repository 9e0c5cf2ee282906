"""Chooses the search parameters of an index for a target recall, and measures recall and latency.

Recall is measured against exact search over the vectors themselves, with two kinds of queries: notes of the index,
which are left out of their own neighbours, and held-out vectors, which the index does not have yet (its clusters and
codes were trained with them). The kind with the lower recall counts. (A note's vector, moved at random, is no such
query: it leaves the manifold on which the vectors lie, and is found more easily than theirs.)

The parameters are raised until the target is reached, then each is lowered as far as recall allows. Both steps expect
that the missed share falls with a power of the parameter. The choice depends on counts alone, not on measured time, so
it is the same on every machine.

N: notes, P: points of the index, Q: queries, H: held-out vectors, K: points of the exact search, k: neighbours,
d: width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import faiss
import numpy as np

from notellm2_core.retrieval.index import Index, TunedSearch
from notellm2_core.retrieval.parameters import (
    Parameters,
    format_parameters,
    parameter_ranges,
    scaled_parameters,
    searcher,
)

TUNED_KS = (10, 100, 1000, 10_000)  # between two of them, the parameters of the larger one hold
EXHAUSTIVE_SHARE = 32  # above 1/32 of the points as neighbours, comparing all is as fast
_NUM_QUERIES = ((100, 250), (1000, 50), (10_000, 10))  # largest k, queries of a kind: with more k, they differ less
MAX_HELD_OUT = _NUM_QUERIES[0][1]  # more would not be drawn
_STANDARD_ERRORS = 1.64  # by which recall has to lie above the target: then 95 % of samples would have reached it
_TIE = 2e-6  # scores that are equal up to the rounding of fp32
_STEPS = (1.05, 2.0)  # factors of the shortest and the longest step upwards
_LOWERING_STEPS = 3
_LEAST_GAIN = 1.1  # factor by which a parameter is lowered, or left
_NEGLIGIBLE = 0.05  # shortfall: recall is so near 1 that its distance says nothing of the parameters


@dataclass(frozen=True)
class Sample:
    """Queries with their exact neighbours among the notes of an index."""

    index: Index
    vectors: np.ndarray  # [P, d] at the points of the index
    queries: np.ndarray  # [Q, d]: notes of the index, then held-out vectors
    own: np.ndarray  # [Q] row of the note itself; -1: held out
    scores: np.ndarray  # [Q, K] of the nearest points
    counts: np.ndarray  # [Q, K] notes at these points and the nearer ones
    known: dict[tuple[int, str], list[np.ndarray]] = field(default_factory=dict)  # the recalls that were measured

    @staticmethod
    def draw(
        index: Index,
        vectors: np.ndarray,
        max_k: int,
        num_queries: int,
        held_out: np.ndarray | None = None,
        seed: int = 0,
    ) -> "Sample":
        """Queries for recall@k up to `max_k`, at most `num_queries` of each kind, each drawn with equal chance.

        vectors [P, d]: those at the points of the index. held_out [H, d]: vectors that it does not have; None: none.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.permutation(len(vectors))[:num_queries]
        queries, own = vectors[drawn], index.points.first_rows[drawn]
        if held_out is not None:
            new = held_out[rng.permutation(len(held_out))[:num_queries]]
            queries, own = np.concatenate([queries, new]), np.concatenate([own, np.full(len(new), -1)])
        num_nearest = min(max_k + 1, len(vectors))
        scores, found = faiss.knn(queries, vectors, num_nearest, metric=faiss.METRIC_INNER_PRODUCT)
        return Sample(index, vectors, queries, own, scores, np.cumsum(index.points.counts(found, own), axis=1))

    def recalls(self, k: int, parameters: Parameters | None) -> list[np.ndarray]:
        """For each kind of query, the share of each one's exact k nearest notes that are found: notes, then held out.

        A tie with the k-th counts. The parameters alone are measured, without the comparison with all where they find
        fewer than k notes. Of an index that has fewer than k notes for a query as yet, all of them.
        """
        key = k, format_parameters(parameters)
        if key not in self.known:
            self.known[key] = self._recalls(k, parameters)
        return self.known[key]

    def _recalls(self, k: int, parameters: Parameters | None) -> list[np.ndarray]:
        k = min(k, int(self.counts[:, -1].min()))
        kth = np.take_along_axis(self.scores, (self.counts >= k).argmax(axis=1)[:, None], axis=1)
        num_points = min(k + 1, self.index.faiss_index.ntotal)
        scores, points = searcher(self.index.faiss_index, parameters)(self.queries, num_points)
        rows, _ = self.index.points.expand(points, scores, k, self.own)
        hits = [
            np.count_nonzero(self.vectors[self.index.points.of_row[found[found >= 0]]] @ query >= score - _TIE)
            for found, query, score in zip(rows, self.queries, kth, strict=True)
        ]
        recalls, is_held_out = np.minimum(1, np.array(hits) / k), self.own < 0
        return [kind for kind in (recalls[~is_held_out], recalls[is_held_out]) if len(kind)]

    def recall(self, k: int, parameters: Parameters | None) -> float:
        """Recall@k of the kind of queries that has the lower one."""
        return min(float(recalls.mean()) for recalls in self.recalls(k, parameters))


class Samples:
    """The samples of an index, each drawn once, when it is needed. `vectors` [P, d], `held_out` as in `Sample.draw`."""

    def __init__(self, index: Index, vectors: np.ndarray, held_out: np.ndarray | None = None) -> None:
        self.index = index
        self._vectors, self._held_out = vectors, held_out
        self._drawn: dict[int, Sample] = {}

    def at(self, k: int) -> Sample:
        """The sample for recall@k."""
        largest, num_queries = next(((n, q) for n, q in _NUM_QUERIES if k <= n), (k, _NUM_QUERIES[-1][1]))
        if largest not in self._drawn:
            self._drawn[largest] = Sample.draw(self.index, self._vectors, largest, num_queries, self._held_out)
        return self._drawn[largest]


def tune(samples: Samples, search_k: int, target_recall: float) -> tuple[TunedSearch, ...]:
    """Search parameters for those of TUNED_KS and `search_k` that are few beside the notes.

    Where no parameters reach the target, all vectors are compared; where that does not reach it either, because the
    index holds compressed vectors, the parameters give up 1 % of the recall that the index can have.
    """
    limit = len(samples.index.points.sizes) // EXHAUSTIVE_SHARE
    tuned: list[TunedSearch] = []
    for k in sorted({k for k in (*TUNED_KS, search_k) if k <= limit}):
        sample = samples.at(k)
        last = tuned[-1] if tuned else TunedSearch(k, {}, 0)
        parameters = None
        if last.parameters is not None:  # more notes need at least as many candidates
            start = scaled_parameters(last.parameters, last.k, k)
            parameters = _cheapest(sample, k, target_recall, start)
        tuned.append(TunedSearch(k, parameters, round(100 * sample.recall(k, parameters), 3)))
    return tuple(tuned)


def measure(index: Index, samples: Samples, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall in percent and milliseconds of a search by k: {"recall": {"10": ...}, "latency_ms": {"10": ...}}.

    index: that of the samples, tuned. Raises ValueError where it has too few notes for the largest of `ks`, without the
    query.
    """
    if max(ks, default=0) >= len(index.note_ids):
        raise ValueError(f"recall@{max(ks)} needs more than {len(index.note_ids)} notes.")
    return {
        "recall": {str(k): round(100 * samples.at(k).recall(k, index.parameters(k)), 3) for k in ks},
        "latency_ms": {str(k): round(_latency_ms(index, samples.at(k), k), 3) for k in ks},
    }


def _latency_ms(index: Index, sample: Sample, k: int) -> float:
    """Milliseconds of one search with one query, on average."""
    queries = [(sample.queries[i : i + 1], sample.own[i : i + 1]) for i in range(min(20, len(sample.queries)))]
    start = time.perf_counter()
    for query, own in queries:
        index.search_rows(query, k, own)
    return 1000 * (time.perf_counter() - start) / len(queries)


def ann_recall(index: Index, vectors: np.ndarray, k: int, num_queries: int = 1000, seed: int = 0) -> float:
    """ANN recall: the share, in percent, of the exact k nearest notes that notes of the index find, without themselves.

    vectors [N, d]: of all notes. Raises ValueError for fewer than two notes.
    """
    k = min(k, len(vectors) - 1)
    if k < 1:
        raise ValueError(f"the index recall needs at least two notes, got {len(vectors)}.")
    sample = Sample.draw(index, vectors[index.points.first_rows], k, num_queries, seed=seed)
    return 100 * float(sample.recalls(k, index.parameters(k))[0].mean())


def _cheapest(sample: Sample, k: int, target: float, start: Parameters) -> Parameters | None:
    """The cheapest parameters from `start` on whose recall is surely above `target`; None: compare with all."""
    ranges = parameter_ranges(sample.index.faiss_index, k)
    if (parameters := _lowest(ranges, start, _shortfall(sample, k, target, _STANDARD_ERRORS))) is not None:
        return parameters
    highest = {name: largest for name, (_, largest) in ranges.items()}
    best, exhaustive = sample.recall(k, highest), sample.recall(k, None)
    if exhaustive >= target or exhaustive > 1.01 * best:
        return None
    return _lowest(ranges, start, _shortfall(sample, k, 0.99 * best, 0))


def _shortfall(sample: Sample, k: int, target: float, standard_errors: float) -> Callable[[Parameters], float]:
    """parameters -> the missed share of neighbours, as a multiple of what `target` allows: at most 1 reaches it."""

    def shortfall(parameters: Parameters) -> float:
        lowest = min(
            float(recalls.mean() - standard_errors * recalls.std() / math.sqrt(len(recalls)))
            for recalls in sample.recalls(k, parameters)
        )
        return (1 - lowest) / max(1 - target, 1e-9)

    return shortfall


def _lowest(
    ranges: Mapping[str, tuple[int, int]], start: Parameters, shortfall: Callable[[Parameters], float]
) -> Parameters | None:
    """The least parameters in `ranges`, from `start` on, with a shortfall of at most 1; None: there are none."""
    values = {name: min(max(start.get(name, 0), least), largest) for name, (least, largest) in ranges.items()}
    lower = dict(values)
    while (missing := shortfall(values)) > 1:
        factor = min(max(missing, _STEPS[0]), _STEPS[1])
        raised = {name: min(math.ceil(factor * value), ranges[name][1]) for name, value in values.items()}
        if raised == values:
            return None
        lower = values if len(values) == 1 else lower  # of several, each may be needed at its start only
        values = raised
    for name in values:
        values = _lowered(values, name, lower[name], shortfall)
    return values


def _lowered(values: dict[str, int], name: str, low: int, shortfall: Callable[[Parameters], float]) -> dict[str, int]:
    """`values`, which reach the target, with the least value of `name` from `low` on, by interpolated logarithms."""
    for _ in range(_LOWERING_STEPS):
        high, lowest = values[name], {**values, name: low}
        at_low, at_high = shortfall(lowest), max(shortfall(values), _NEGLIGIBLE)
        if at_low <= 1:
            return lowest
        way = math.log(at_low) / math.log(at_low / at_high)  # from low to high, to a shortfall of 1
        middle = max(low + 1, math.ceil(low * (high / low) ** way))
        if middle * _LEAST_GAIN > high:
            break
        if shortfall({**values, name: middle}) <= 1:
            values = {**values, name: middle}
        else:
            low = middle
    return values

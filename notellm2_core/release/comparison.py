"""Two models on the same pairs: the difference of their recalls, how sure it is, and the least loss that would show.

The pairs of a query are not independent, so whole queries are resampled (cluster bootstrap): each of NUM_SAMPLES
samples draws Q of the Q queries with replacement, and has the recall over all pairs of the drawn ones (Efron and
Tibshirani, 1993). Both models are measured on the same draws, so what the week makes hard or easy for both cancels out.

Nor are the pairs of a target: a model that places a much-clicked note elsewhere wins or loses all of them together. So
the scatter of the samples is widened to that of clusters in both ways (Cameron, Gelbach and Miller, 2011): the variance
by query, plus that by target, less that of the single pairs.

All differences are in percentage points of Recall@k, challenger minus rival: below 0 the challenger is worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from notellm2_core.evaluation.recall import Ranks

NUM_SAMPLES = 4000
CONFIDENCE = 0.975  # one-sided
_LEVEL = 1 - CONFIDENCE
_Z_LEVEL, _Z_POWER = 1.96, 0.84  # of the normal distribution: one-sided 2.5 %, and a power of 80 %
_CHUNK = 1 << 24  # draws in memory at a time


@dataclass(frozen=True)
class Difference:
    """The recall of a challenger and of a rival on one slice of the pairs. Recalls in percent, the rest in points."""

    slice: str
    num_pairs: int
    num_queries: int
    challenger: float
    rival: float
    lower: float  # the true difference is above it with a confidence of 97.5 %
    upper: float
    p_loss: float  # one-sided p-value of the loss, by the bootstrap; 1 where nothing was lost
    least_loss: float  # minimum detectable effect: the least true loss that shows in 80 % of such weeks

    @property
    def points(self) -> float:
        """Challenger minus rival."""
        return self.challenger - self.rival


def hits(ranks: Ranks, k: int) -> np.ndarray:
    """The probability [P] that the target of each pair is among the k nearest; ties in a random order."""
    return np.clip((k - ranks.higher) / (ranks.ties + 1), 0.0, 1.0)


def compare(
    challenger: np.ndarray,
    rival: np.ndarray,
    queries: np.ndarray,
    slice: str = "all",
    seed: int = 0,
    targets: np.ndarray | None = None,
) -> Difference:
    """The difference of two models' `hits` [P] on the same pairs. `queries`, `targets` [P]: a number for each note.

    Without `targets`, each pair has one of its own. Raises ValueError without pairs.
    """
    if not len(challenger):
        raise ValueError(f"slice {slice} has no pairs to compare.")
    _, cluster = np.unique(queries, return_inverse=True)
    num_pairs = np.bincount(cluster).astype(float)  # [Q]
    gains = np.bincount(cluster, weights=challenger - rival)  # [Q]
    samples = 100 * _resampled(gains, num_pairs, seed)
    points = 100 * float(gains.sum() / num_pairs.sum())
    if targets is not None:
        samples = points + _widening(challenger - rival, cluster, targets) * (samples - points)
    return Difference(
        slice=slice,
        num_pairs=len(challenger),
        num_queries=len(num_pairs),
        challenger=100 * float(challenger.mean()),
        rival=100 * float(rival.mean()),
        lower=float(np.quantile(samples, _LEVEL)),
        upper=float(np.quantile(samples, CONFIDENCE)),
        # The samples scatter around the measured difference as it does around the true one.
        p_loss=float((1 + np.count_nonzero(samples - points <= points)) / (1 + len(samples))) if points < 0 else 1.0,
        least_loss=(_Z_LEVEL + _Z_POWER) * float(samples.std()),
    )


def _widening(gains: np.ndarray, queries: np.ndarray, targets: np.ndarray) -> float:
    """The standard error by clusters of queries and of targets, as a multiple of that by queries alone; at least 1."""
    residuals = gains - gains.mean()
    by_query, by_target = (
        float((np.bincount(np.unique(notes, return_inverse=True)[1], weights=residuals) ** 2).sum())
        for notes in (queries, targets)
    )
    both = by_query + by_target - float((residuals**2).sum())
    return math.sqrt(max(1.0, both / by_query)) if by_query else 1.0


def _resampled(gains: np.ndarray, num_pairs: np.ndarray, seed: int) -> np.ndarray:
    """The mean gain per pair in each sample [NUM_SAMPLES], from the sums of each query [Q]."""
    generator, num_queries = np.random.default_rng(seed), len(gains)
    means = []
    size = max(1, min(NUM_SAMPLES, _CHUNK // num_queries))
    for start in range(0, NUM_SAMPLES, size):
        drawn = generator.integers(0, num_queries, (min(size, NUM_SAMPLES - start), num_queries))
        means.append(gains[drawn].sum(axis=1) / num_pairs[drawn].sum(axis=1))
    return np.concatenate(means)


def significant(p_values: Mapping[str, float]) -> set[str]:
    """The names whose p-values are significant together (step-down procedure of Holm, 1979, at 2.5 % in all)."""
    names: Sequence[str] = sorted(p_values, key=lambda name: p_values[name])
    found: set[str] = set()
    for number, name in enumerate(names):
        if p_values[name] > _LEVEL / (len(names) - number):
            break
        found.add(name)
    return found

"""Exact quantiles of numbers that no one task can hold, in two passes over the parts that they lie in.

First every part counts its numbers by bin; then it counts the distinct numbers of those few bins that the wanted ranks
lie in. (Spark's `percentile` holds every distinct number in one task.)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spark_jobs.scoring.arrays import Floats, Ints

SHARES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}  # what is told of scores
_BIN_BITS = 45  # the numbers of a bin differ in these last bits of their 64: 128 bins to an octave
_ALL_BUT_SIGN = np.int64((1 << 63) - 1)


def bins(numbers: Floats) -> Ints:
    """The bin of each number; bins keep the order of their numbers."""
    bits = (numbers + 0.0).view(np.int64)  # one zero: -0.0 + 0.0 is 0.0
    return np.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits) >> _BIN_BITS


def lower_ends(of: Ints) -> Floats:
    """The smallest number of each of these bins of positive numbers."""
    return (of << _BIN_BITS).view(np.float64)


def bin_counts(numbers: Floats) -> dict[int, int]:
    """How many of the numbers lie in each bin."""
    if not len(numbers):
        return {}
    found = bins(numbers)
    first = int(found.min())
    counts = np.bincount(found - first)
    return {first + int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def value_counts(numbers: Floats, wanted: Ints) -> tuple[Floats, Ints]:
    """The distinct numbers that lie in one of the bins `wanted`, and how often each occurs."""
    values, counts = np.unique(numbers[np.isin(bins(numbers), wanted)], return_counts=True)
    return values, counts


def quantiles(
    shares: Sequence[float], counted: Mapping[int, int], count_values: Callable[[Ints], tuple[Floats, Ints]]
) -> list[float]:
    """The quantile of each of `shares`, interpolated between two ranks as numpy does. None of the numbers is NaN.

    `counted` (not empty) is `bin_counts` of all parts together, `count_values` their `value_counts`, in any order and
    each value once: these few bins' distinct numbers are all that has to fit into memory.
    """
    places = [share * (sum(counted.values()) - 1) for share in shares]
    ranks = sorted({rank for place in places for rank in (math.floor(place), math.ceil(place))})
    number = np.array(sorted(counted), np.int64)
    size = np.array([counted[b] for b in number.tolist()])
    begin = np.cumsum(size) - size  # of each bin, the first rank
    wanted = np.unique(np.searchsorted(begin, ranks, side="right") - 1)
    values, counts = count_values(number[wanted])
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    left_out = begin[wanted] - (np.cumsum(size[wanted]) - size[wanted])  # the numbers below each that are not wanted
    end = np.cumsum(counts) + left_out[np.searchsorted(number[wanted], bins(values))]
    at = dict(zip(ranks, values[np.searchsorted(end, ranks, side="right")].tolist(), strict=True))
    return [_between(at[math.floor(p)], at[math.ceil(p)], p - math.floor(p)) for p in places]


def _between(low: float, high: float, share: float) -> float:
    return low if low == high else (1 - share) * low + share * high

"""Exact quantiles of distributed numbers in two passes.

The first pass counts the numbers by bin. The second counts the distinct numbers in the few bins that hold the needed
ranks. (Spark's `percentile` holds every distinct number in one task.)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spark_jobs.scoring.arrays import Floats, Ints

SHARES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}  # the quantiles that are reported
_BIN_BITS = 45  # low bits of the 64 that a bin ignores: 128 bins per octave
_ALL_BUT_SIGN = np.int64((1 << 63) - 1)


def bins(numbers: Floats) -> Ints:
    """The bin of each number. Bins are ordered as their numbers are."""
    bits = (numbers + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0: both zeros have one bin
    return np.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits) >> _BIN_BITS


def lower_ends(bin_numbers: Ints) -> Floats:
    """The smallest number of each bin; for bins of positive numbers."""
    return (bin_numbers << _BIN_BITS).view(np.float64)


def bin_counts(numbers: Floats) -> dict[int, int]:
    """The count of numbers by bin; empty bins are absent."""
    if not len(numbers):
        return {}
    bin_numbers = bins(numbers)
    first = int(bin_numbers.min())
    counts = np.bincount(bin_numbers - first)
    return {first + int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def value_counts(numbers: Floats, bin_numbers: Ints) -> tuple[Floats, Ints]:
    """The distinct numbers in the bins `bin_numbers`, and the count of each."""
    values, counts = np.unique(numbers[np.isin(bins(numbers), bin_numbers)], return_counts=True)
    return values, counts


def quantiles(
    shares: Sequence[float], counted: Mapping[int, int], count_values: Callable[[Ints], tuple[Floats, Ints]]
) -> list[float]:
    """The quantile at each of `shares`, in [0, 1], interpolated between ranks as numpy does.

    `counted`: the `bin_counts` of all numbers, at least one; no number may be NaN. `count_values`: given bins, the
    `value_counts` of all numbers, each value once, in any order. Only these bins' distinct numbers must fit in memory.
    """
    positions = [share * (sum(counted.values()) - 1) for share in shares]  # fractional ranks
    ranks = sorted({rank for position in positions for rank in (math.floor(position), math.ceil(position))})
    all_bins = np.array(sorted(counted), np.int64)
    size = np.array([counted[b] for b in all_bins.tolist()])
    begin = np.cumsum(size) - size  # the first rank in each bin
    needed = np.unique(np.searchsorted(begin, ranks, side="right") - 1)  # the bins with these ranks
    values, counts = count_values(all_bins[needed])
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    skipped = begin[needed] - (np.cumsum(size[needed]) - size[needed])  # numbers in other bins below each needed one
    end = np.cumsum(counts) + skipped[np.searchsorted(all_bins[needed], bins(values))]
    at = dict(zip(ranks, values[np.searchsorted(end, ranks, side="right")].tolist(), strict=True))
    return [_between(at[math.floor(p)], at[math.ceil(p)], p - math.floor(p)) for p in positions]


def _between(low: float, high: float, share: float) -> float:
    return low if low == high else (1 - share) * low + share * high

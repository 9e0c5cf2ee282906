"""Array helpers: runs of equal numbers, and ragged slices."""

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def run_starts(ordered: npt.NDArray[np.integer[Any]]) -> Ints:
    """The index at which each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))[: len(ordered)]


def ragged(begin: Ints, length: Ints) -> Ints:
    """The ranges begin[i] .. begin[i] + length[i] - 1, concatenated."""
    before = np.cumsum(length) - length
    return np.repeat(begin - before, length) + np.arange(int(length.sum()))

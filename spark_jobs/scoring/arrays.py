"""What numpy lacks for runs of equal numbers and for slices of different lengths."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def run_starts(ordered: Ints) -> Ints:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))[: len(ordered)]


def ragged(begin: Ints, length: Ints) -> Ints:
    """begin[0], begin[0] + 1, ... (length[0] of them), begin[1], ..."""
    before = np.cumsum(length) - length
    return np.repeat(begin - before, length) + np.arange(int(length.sum()))

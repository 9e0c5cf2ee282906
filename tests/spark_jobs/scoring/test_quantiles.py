from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_jobs.scoring.arrays import Floats, Ints
from spark_jobs.scoring.quantiles import bin_counts, bins, lower_ends, quantiles, value_counts

numbers = st.floats(-1e300, 1e300) | st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5000001, 1.0])
parts = st.lists(st.lists(numbers, max_size=20), min_size=1, max_size=4).filter(any)


@given(parts=parts, shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_quantiles_are_those_of_numpy(parts: list[list[float]], shares: list[float]) -> None:
    arrays = [np.array(part) for part in parts]
    counts, num_bins = Counter[int](), 0
    for part in arrays:
        counts.update(bin_counts(part))

    def count_values(bin_numbers: Ints) -> tuple[Floats, Ints]:
        nonlocal num_bins
        by_value = Counter[float]()
        for part in arrays:
            by_value.update(dict(zip(*value_counts(part, bin_numbers), strict=True)))
        num_bins = len(bin_numbers)
        return np.array(list(by_value)), np.array(list(by_value.values()))

    actual = quantiles(shares, counts, count_values)
    assert actual == pytest.approx(np.quantile(np.concatenate(arrays), shares).tolist(), rel=1e-12, abs=1e-300)
    assert num_bins <= 2 * len(shares)  # so the second pass sees few numbers


@given(st.lists(numbers, min_size=1))
def test_bins_keep_the_order(values: list[float]) -> None:
    ordered = np.sort(np.array(values))
    assert (np.diff(bins(ordered)) >= 0).all()


def test_a_bin_is_a_128th_of_an_octave() -> None:
    assert lower_ends(bins(np.array([1.0, 1.0078, 1.00782, 2.0]))).tolist() == [1.0, 1.0, 1.0078125, 2.0]

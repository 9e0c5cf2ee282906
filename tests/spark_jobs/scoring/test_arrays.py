import numpy as np

from spark_jobs.scoring.arrays import ragged, run_starts


def test_run_starts() -> None:
    assert run_starts(np.array([3, 3, 5, 7, 7])).tolist() == [0, 2, 3]
    assert not len(run_starts(np.array([], np.int64)))


def test_ragged() -> None:
    assert ragged(np.array([4, 0, 9]), np.array([2, 0, 3])).tolist() == [4, 5, 9, 10, 11]

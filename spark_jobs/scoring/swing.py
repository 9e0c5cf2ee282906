"""Swing: an item-to-item score of production systems (Yang et al. 2020), from the same histories as Eq. 2.

Two users who clicked the same two notes support the pair, and the more so the fewer other clicks they share:

    s(A, B) = sum over pairs of users {u, v} who both clicked A and B of w_u w_v / (alpha + |I_u & I_v|),
    w_u = 1 / sqrt(|I_u|), I_u: the notes that u clicked.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from spark_jobs.scoring.arrays import Ints, ragged, run_starts
from spark_jobs.scoring.eq2 import Pairs

_CELLS_AT_A_TIME = 1 << 24  # of a matrix of users and targets: 128 MB


def swing_scores(histories: pa.Table, alpha: float, max_users: int) -> Iterator[Pairs]:
    """HISTORIES of a block (`follows` = "any": views are clicks, followed by all clicks) -> its pairs, by query.

    Only the `max_users` users of a query that clicked the fewest notes count: they have the largest weights. Scores do
    not depend on the order of users in `histories`, to the last digit.
    """
    if not histories.num_rows:
        return
    table = _sorted_users(histories.combine_chunks())
    views, clicks = table["views"].chunk(0), table["clicks"].chunk(0)
    weight = 1.0 / np.sqrt(table["num_clicked"].to_numpy())
    offsets, click = clicks.offsets.to_numpy().astype(np.int64), clicks.values.to_numpy()
    num_views = np.diff(views.offsets.to_numpy())
    query, user = views.flatten().to_numpy(), np.repeat(np.arange(len(num_views)), num_views)
    order = np.argsort(query, kind="stable")  # users stay in order
    query, user = query[order], user[order]
    first = run_starts(query)
    for note, users in zip(query[first], np.split(user, first[1:]), strict=True):
        yield _query_pairs(int(note), users[:max_users], offsets, click, weight, alpha)


def _query_pairs(
    note: int, users: Ints, offsets: Ints, click: Ints, weight: npt.NDArray[np.float64], alpha: float
) -> Pairs:
    length = offsets[users + 1] - offsets[users]
    targets, column = np.unique(click[ragged(offsets[users], length)], return_inverse=True)
    bounds = np.append(0, np.cumsum(length))
    clicked = sparse.csr_array((np.ones(len(column)), column, bounds), shape=(len(users), len(targets)))
    in_common = (clicked @ clicked.T).toarray()
    swing = np.outer(weight[users], weight[users]) / (alpha + in_common)
    np.fill_diagonal(swing, 0.0)
    score = np.zeros(len(targets))
    step = max(1, _CELLS_AT_A_TIME // len(targets))
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        score += np.asarray(clicked[rows].multiply(swing[rows] @ clicked).sum(axis=0)) / 2
    num_users = np.bincount(column, minlength=len(targets))
    is_pair = (num_users > 1) & (targets != note)
    targets = targets[is_pair].astype(np.int64)
    return Pairs(np.full(len(targets), note), targets, score[is_pair], num_users[is_pair])


def _sorted_users(histories: pa.Table) -> pa.Table:
    """`histories` sorted by the number of clicked notes, then by the notes; users that tie have equal histories."""
    clicks = histories["clicks"].chunk(0)
    offsets, values = clicks.offsets.to_numpy(), clicks.values.to_numpy()
    sizes = histories["num_clicked"].to_numpy()
    keys = [(size, values[a:b].tobytes()) for size, a, b in zip(sizes, offsets[:-1], offsets[1:], strict=True)]
    return histories.take(pa.array(sorted(range(len(keys)), key=keys.__getitem__), pa.int64())).combine_chunks()

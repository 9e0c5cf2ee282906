"""Swing: the item-to-item score of production systems (Yang et al. 2020), from the lists that Eq. 2 is made of.

Two users who clicked the same two notes vouch for the pair, and the more so the less else they have in common:

    s(A, B) = sum over pairs of users {u, v} who both clicked A and B of w_u w_v / (alpha + |I_u & I_v|),
    w_u = 1 / sqrt(|I_u|), I_u: the notes that u clicked.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from spark_jobs.scoring.arrays import Ints, ragged, run_starts
from spark_jobs.scoring.eq2 import PAIRS_AT_A_TIME, Pairs

_CELLS_AT_A_TIME = 1 << 24  # of a table of users and targets: 128 MB


def swing_scores(lists: pa.Table, alpha: float, max_users: int) -> Iterator[Pairs]:
    """HISTORIES of a block whose views are clicks and followed by all clicks -> its pairs in pieces.

    Of a query's users the `max_users` that clicked the fewest notes count: their weights are the largest. The order of
    users in `lists` does not matter, to the last digit.
    """
    if not lists.num_rows:
        return
    table = _in_order(lists.combine_chunks())
    views, clicks = table["views"].chunk(0), table["clicks"].chunk(0)
    weight = 1.0 / np.sqrt(table["num_clicked"].to_numpy())
    offsets, click = clicks.offsets.to_numpy().astype(np.int64), clicks.values.to_numpy()
    num_views = np.diff(views.offsets.to_numpy())
    query, user = views.flatten().to_numpy(), np.repeat(np.arange(len(num_views)), num_views)
    order = np.argsort(query, kind="stable")  # users stay in order
    query, user = query[order], user[order]
    first = run_starts(query)
    waiting, num_pairs = [], 0
    for note, users in zip(query[first], np.split(user, first[1:]), strict=True):
        waiting.append(_of_query(int(note), users[:max_users], offsets, click, weight, alpha))
        num_pairs += len(waiting[-1].query)
        if num_pairs >= PAIRS_AT_A_TIME:
            yield from _together(waiting)
            waiting, num_pairs = [], 0
    yield from _together(waiting)


def _together(pairs: list[Pairs]) -> Iterator[Pairs]:
    if any(len(of.query) for of in pairs):
        yield Pairs(*map(np.concatenate, zip(*pairs, strict=True)))


def _of_query(
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
    slice_of = max(1, _CELLS_AT_A_TIME // len(targets))
    for start in range(0, len(users), slice_of):
        some = slice(start, start + slice_of)
        score += np.asarray(clicked[some].multiply(swing[some] @ clicked).sum(axis=0)) / 2
    num_users = np.bincount(column, minlength=len(targets))
    kept = (num_users > 1) & (targets != note)
    targets = targets[kept].astype(np.int64)
    return Pairs(np.full(len(targets), note), targets, score[kept], num_users[kept])


def _in_order(lists: pa.Table) -> pa.Table:
    """Users by how many notes they clicked, then by which: those that tie are alike."""
    clicks = lists["clicks"].chunk(0)
    offsets, values = clicks.offsets.to_numpy(), clicks.values.to_numpy()
    sizes = lists["num_clicked"].to_numpy()
    keys = [(size, values[a:b].tobytes()) for size, a, b in zip(sizes, offsets[:-1], offsets[1:], strict=True)]
    return lists.take(pa.array(sorted(range(len(keys)), key=keys.__getitem__), pa.int64())).combine_chunks()

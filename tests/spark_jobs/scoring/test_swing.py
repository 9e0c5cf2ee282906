"""Swing in numpy, without Spark, against its definition."""

import itertools
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jobs.scoring.eq2 import gathered
from spark_jobs.scoring.histories import HISTORIES, histories
from spark_jobs.scoring.swing import swing_scores

Clicks = list[tuple[int, int]]  # user, note
Scores = dict[tuple[int, int], tuple[float, int]]


def scored(clicks: Clicks, alpha: float, max_users: int = 1000, num_blocks: int = 1) -> Scores:
    user, note = (np.array(column, np.int64) for column in zip(*clicks, strict=True))
    time = np.zeros(len(user), np.int64)
    built, _ = histories(user, note, time, time, "any", None)
    scores: Scores = {}
    chunks = list(built.chunks(num_blocks))
    for block in range(num_blocks):
        table = pa.Table.from_batches([chunk for b, chunk in chunks if b == block], HISTORIES)
        for pairs in swing_scores(table, alpha, max_users):
            for query, target, score, users in zip(*(c.tolist() for c in pairs), strict=True):
                assert query % num_blocks == block and (query, target) not in scores
                scores[query, target] = score, users
    return scores


def by_definition(clicks: Clicks, alpha: float) -> Scores:
    notes = {user: {n for u, n in clicks if u == user} for user, _ in clicks}
    sums: Counter[tuple[int, int]] = Counter()
    for (_, a), (_, b) in itertools.combinations(notes.items(), 2):
        both = a & b
        for pair in itertools.permutations(both, 2):
            sums[pair] += 1 / math.sqrt(len(a) * len(b)) / (alpha + len(both))
    return {(i, j): (s, sum({i, j} <= clicked for clicked in notes.values())) for (i, j), s in sums.items()}


def test_worked_example() -> None:
    """u clicked 1, 2, 3; v clicked 1, 2; x clicked 1, 3; alpha = 1.

    u and v clicked 1 and 2, and share these two: 1/sqrt(3 * 2) / (1 + 2). u and x clicked 1 and 3, with the same score.
    u alone clicked 2 and 3, which makes no pair of users.
    """
    clicks = [("u", 1), ("u", 2), ("u", 3), ("v", 1), ("v", 2), ("x", 1), ("x", 3)]
    value = pytest.approx(1 / math.sqrt(6) / 3), 2
    scores = scored([("uvx".index(u), n) for u, n in clicks], alpha=1.0)
    assert scores == {(1, 2): value, (2, 1): value, (1, 3): value, (3, 1): value}


@settings(max_examples=100)
@given(
    clicks=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40),
    alpha=st.floats(0.1, 10),
    num_blocks=st.integers(1, 3),
)
def test_equals_the_definition(clicks: Clicks, alpha: float, num_blocks: int) -> None:
    scores, expected = scored(clicks, alpha, num_blocks=num_blocks), by_definition(clicks, alpha)
    assert scores.keys() == expected.keys()
    for pair, (score, users) in expected.items():
        assert scores[pair] == (pytest.approx(score, rel=1e-12), users)


def test_the_last_digit_does_not_depend_on_the_order_of_users() -> None:
    rng = np.random.default_rng(0)
    clicks = rng.integers(0, [30, 8], (150, 2))
    names = rng.permutation(30)
    other = rng.permutation(np.stack([names[clicks[:, 0]], clicks[:, 1]], axis=1))
    one, two = (scored([(int(u), int(n)) for u, n in c], 1.0, max_users=5) for c in (clicks, other))
    assert one == two


def test_a_cap_keeps_the_notes_clicked_last_before_and_after_merging() -> None:
    """The clicks are A@1, B@2, C@3 and A@10. A cap of two keeps C and A, whether a row is a note or an event."""
    rows = [(user, note, time, time) for user in (0, 1) for note, time in ((0, 1), (1, 2), (2, 3), (0, 10))]
    merged = [(user, note, first, last) for user in (0, 1) for note, first, last in ((0, 1, 10), (1, 2, 2), (2, 3, 3))]
    results = []
    for table in (rows, merged):
        columns = [np.array(column, np.int64) for column in zip(*table, strict=True)]
        built, _ = histories(*columns, "any", 2)
        table_of_block = pa.Table.from_batches([chunk for _, chunk in built.chunks(1)], HISTORIES)
        [pairs] = gathered(swing_scores(table_of_block, 1.0, 10))
        results.append(list(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True)))
    assert results == [[(0, 2), (2, 0)]] * 2


def test_only_the_users_with_the_fewest_clicks_count() -> None:
    """Users with 2, 2 and 5 clicked notes click note 0 and note 1. With `max_users` = 2, the third adds nothing."""
    clicks = [(u, n) for u in (0, 1, 2) for n in (0, 1)] + [(2, n) for n in (2, 3, 4)]
    assert scored(clicks, 1.0, max_users=2)[0, 1] == (pytest.approx(1 / 2 / 3), 2)
    assert scored(clicks, 1.0)[0, 1] == (pytest.approx((1 / 2 + 2 / math.sqrt(10)) / 3), 3)

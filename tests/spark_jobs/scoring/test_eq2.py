"""Eq. 2 in numpy, without Spark: from interactions to histories, from histories to scores."""

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_jobs.scoring.eq2 import Pairs, _chunks, gathered, pair_scores
from spark_jobs.scoring.histories import HISTORIES, NEVER, Capped, histories
from tests.support.scores import scores_of

Rows = list[tuple[int, int, int, int | None]]  # user, note, a view, a click
Scores = dict[tuple[int, int], tuple[Fraction, int]]


def scored(
    rows: Rows, simultaneous: bool = False, max_notes: int | None = None, num_blocks: int = 1, at_a_time: int = 1 << 22
) -> tuple[dict[tuple[int, int], tuple[float, int]], Capped]:
    columns = [np.array([NEVER if v is None else v for v in column], np.int64) for column in zip(*rows, strict=True)]
    built, capped = histories(*columns, "not earlier" if simultaneous else "later", max_notes)
    scores = scores_of(built.chunks(num_blocks), HISTORIES, num_blocks, lambda table: pair_scores(table, at_a_time))
    return scores, capped


def by_definition(rows: Rows, simultaneous: bool, max_notes: int | None = None) -> Scores:
    """User by user and note by note; a cap keeps the last notes by (time, note)."""
    views: dict[int, dict[int, int]] = defaultdict(dict)
    clicks: dict[int, dict[int, int]] = defaultdict(dict)
    for user, note, view, click in rows:
        views[user][note] = min(view, views[user].get(note, view))
        if click is not None:
            clicks[user][note] = max(click, clicks[user].get(note, click))
    sums: dict[tuple[int, int], list[Fraction]] = defaultdict(list)
    for user in views:
        viewed, clicked = (
            sorted((t, n) for n, t in times[user].items())[-(max_notes or 1 << 30) :] for times in (views, clicks)
        )
        for a_at, a in viewed:
            for b_at, b in clicked:
                if a != b and (a_at <= b_at if simultaneous else a_at < b_at):
                    sums[a, b].append(Fraction(1, len(clicks[user])))
    return {pair: (sum(shares, Fraction()), len(shares)) for pair, shares in sums.items()}


row = st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 5), st.none() | st.integers(0, 5))


@settings(max_examples=300)
@given(
    rows=st.lists(row, min_size=1, max_size=60),
    simultaneous=st.booleans(),
    max_notes=st.none() | st.integers(1, 4),
    num_blocks=st.integers(1, 4),
    at_a_time=st.integers(1, 20),
)
def test_equals_the_definition(
    rows: Rows, simultaneous: bool, max_notes: int | None, num_blocks: int, at_a_time: int
) -> None:
    """The rows, ties, cap, number of blocks and size of the chunks are arbitrary; a query may span several chunks."""
    scores, _ = scored(rows, simultaneous, max_notes, num_blocks, at_a_time)
    expected = by_definition(rows, simultaneous, max_notes)
    assert scores.keys() == expected.keys()
    for pair, (score, users) in expected.items():
        assert scores[pair][1] == users
        assert scores[pair][0] == float(score)  # rounded once


@settings(max_examples=100)
@given(rows=st.lists(row, min_size=1, max_size=60), max_notes=st.integers(1, 3))
def test_no_score_loses_more_than_the_bound(rows: Rows, max_notes: int) -> None:
    scores, capped = scored(rows, max_notes=max_notes)
    whole = by_definition(rows, simultaneous=False)
    losses = [float(score) - scores.get(pair, (0.0, 0))[0] for pair, (score, _) in whole.items()]
    by_note = sum(float(capped.note_loss[capped.clicked == c].max(initial=0.0)) for c in (False, True))
    assert max(losses, default=0.0) <= min(capped.loss, by_note) + 1e-12
    assert (capped.users == 0) == (capped.loss == 0.0) == (len(capped.note) == 0)


def test_worked_example_of_a_cap() -> None:
    """One user views 0, 1, 2 at times 0, 1, 2 and clicks 3, 4, 5 at 3, 4, 5. N_u is 3, and it has viewed six notes.

    With `max_notes` = 2, the views of 4 and 5 are left, and the clicks on 4 and 5. One of the twelve pairs is left,
    4 -> 5, with 1/3. Every other pair loses 1/3, which is the bound. The views of 0 to 3 are cut, and the click on 3.
    """
    rows: Rows = [(0, n, n, None) for n in range(3)] + [(0, n, n, n) for n in range(3, 6)]
    assert len(scored(rows)[0]) == 12
    scores, capped = scored(rows, max_notes=2)
    assert scores == {(4, 5): (pytest.approx(1 / 3), 1)} and (capped.users, capped.loss) == (1, pytest.approx(1 / 3))
    assert list(zip(capped.note, capped.clicked, strict=True)) == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)]
    assert capped.note_loss == pytest.approx([1 / 3] * 5)


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_a_score_is_the_exact_sum_rounded_once(sizes: list[int]) -> None:
    """There is a user for each size N_u. It views note 0, and then clicks N_u notes, the first of which is note 1."""
    rows: Rows = [(user, 0, 0, None) for user in range(len(sizes))]
    rows += [(user, 1 + n, 1, 1) for user, size in enumerate(sizes) for n in range(size)]
    exact = sum((Fraction(1, size) for size in sizes), Fraction())
    assert scored(rows)[0][0, 1] == (float(exact), len(sizes))


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_the_last_digit_does_not_depend_on_order_or_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows: Rows = [
        (int(u), int(n), int(v), int(c))
        for u, n, v, c in zip(*(rng.integers(0, m, 400) for m in (40, 12, 50, 50)), strict=True)
    ]
    names = rng.permutation(40).tolist()  # another machine numbers the users in another order
    shuffled = [(names[u], n, v, c) for u, n, v, c in rng.permutation(np.array(rows)).tolist()]
    assert scored(rows)[0] == scored(shuffled, num_blocks=3, at_a_time=7)[0]


def test_chunks_hold_whole_queries_or_part_of_a_long_one() -> None:
    """Views with 2, 1 | 3, 3, 3, 3, 1 | 1 | 2 terms, six at a time: the second query, with thirteen, has three parts.

    Its last part has one term, and is not joined with the next query.
    """
    query = np.array([0, 0, 1, 1, 1, 1, 1, 2, 3], np.int32)
    chunks = [(c.start, c.stop) for c in _chunks(query, np.cumsum([2, 1, 3, 3, 3, 3, 1, 1, 2]), 6)]
    assert chunks == [(0, 2), (2, 4), (4, 6), (6, 7), (7, 9)]


@settings(max_examples=300)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6),
    at_a_time=st.integers(1, 20),
)
def test_no_chunk_joins_a_part_with_another_query(lengths: list[list[int]], at_a_time: int) -> None:
    """`lengths`: the terms of each view, by query. The chunks cover all views in order, each within its limit."""
    query = np.repeat(np.arange(len(lengths), dtype=np.int32), [len(views) for views in lengths])
    length = np.concatenate(lengths)
    chunks = list(_chunks(query, np.cumsum(length), at_a_time))
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(len(query)))
    for chunk in chunks:
        inside = query[chunk]
        is_whole = np.isin(inside, np.append(query[: chunk.start], query[chunk.stop :]), invert=True).all()
        assert is_whole or len(set(inside.tolist())) == 1
        assert length[chunk].sum() <= at_a_time or len(inside) == 1


def test_gathered_concatenates_and_keeps_the_order() -> None:
    """Chunks of 2, 3, 0 and 1 pairs, at least four at a time: 2 + 3, then 0 + 1."""
    numbers = np.arange(6)
    chunks = [Pairs(part, part, part.astype(float), part) for part in np.split(numbers, [2, 5, 5])]
    assert [pairs.query.tolist() for pairs in gathered(chunks, 4)] == [[0, 1, 2, 3, 4], [5]]
    assert list(gathered([chunks[2]], 4)) == []

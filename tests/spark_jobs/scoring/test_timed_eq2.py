"""Eq. 2 with times in numpy, without Spark: from all views and clicks to histories, from histories to scores."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.config.data import ScoringSettings
from spark_jobs.scoring.histories import NEVER, Capped
from spark_jobs.scoring.timed_eq2 import timed_scores
from spark_jobs.scoring.timed_histories import TIMED_HISTORIES, TimedHistories, TimedRows, Timing, timed_histories
from tests.support.scores import Scores, scores_of

Row = tuple[int, int, int, int | None, float]  # user, note, a view, a click, the click's weight


def histories_of(rows: Iterable[Row], timing: Timing) -> tuple[TimedHistories, Capped]:
    user, note, view, click, weight = zip(*rows, strict=True)
    times = (np.array([NEVER if t is None else t for t in column], np.int64) for column in (user, note, view, click))
    return timed_histories(TimedRows(*times, np.array(weight, float)), timing)


def scored(rows: Iterable[Row], timing: Timing, num_blocks: int = 1, at_a_time: int = 1 << 21) -> tuple[Scores, Capped]:
    built, capped = histories_of(rows, timing)
    scores = scores_of(
        built.chunks(num_blocks), TIMED_HISTORIES, num_blocks, lambda table: timed_scores(table, at_a_time)
    )
    return scores, capped


def by_definition(rows: Iterable[Row], timing: Timing) -> Scores:
    """User by user, every view with every click. A cap keeps the last notes by (time, note)."""
    views: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    clicks: dict[int, dict[int, set[tuple[int, float]]]] = defaultdict(lambda: defaultdict(set))
    for user, note, view, click, weight in rows:
        views[user][note].add(view)
        if click is not None:
            clicks[user][note].add((click, weight))
    shares = defaultdict(list)
    first = -(timing.max_notes or 1 << 30)  # of the notes that are left
    for user, viewed in views.items():
        clicked = clicks[user]
        for _, a in sorted((min(at), note) for note, at in viewed.items())[first:]:
            for _, b in sorted((max(at)[0], note) for note, at in clicked.items())[first:]:
                following = [
                    weight * (1.0 if timing.half_life is None else 2 ** ((click - timing.end) / timing.half_life))
                    for view in viewed[a]
                    for click, weight in clicked[b]
                    if (view <= click if timing.simultaneous else view < click)
                    and (timing.max_gap is None or click - view <= timing.max_gap)
                ]
                if a != b and following:
                    shares[a, b].append(Fraction(max(following)) / len(clicked))
    return {pair: (float(sum(parts)), len(parts)) for pair, parts in shares.items()}


rows = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 6),
        st.integers(0, 9),
        st.none() | st.integers(0, 9),
        st.sampled_from([1, 2, 5]),
    ),
    min_size=1,
    max_size=60,
)
timings = st.builds(
    Timing,
    max_gap=st.none() | st.integers(1, 4),
    half_life=st.none() | st.sampled_from([0.7, 3.0]),
    end=st.just(10),
    simultaneous=st.booleans(),
    max_notes=st.none() | st.integers(1, 4),
)


@settings(max_examples=300)
@given(rows=rows, timing=timings, num_blocks=st.integers(1, 4), at_a_time=st.integers(1, 20))
def test_equals_the_definition(rows: list[Row], timing: Timing, num_blocks: int, at_a_time: int) -> None:
    """The rows, ties, cap, number of blocks and size of the chunks are arbitrary; a query may span several chunks."""
    scores, _ = scored(rows, timing, num_blocks, at_a_time)
    expected = by_definition(rows, timing)
    assert {pair: users for pair, (_, users) in scores.items()} == {p: users for p, (_, users) in expected.items()}
    assert [scores[pair][0] for pair in expected] == pytest.approx([score for score, _ in expected.values()], rel=1e-14)


@settings(max_examples=100)
@given(rows=rows, timing=timings, max_notes=st.integers(1, 3))
def test_no_score_loses_more_than_the_bound(rows: list[Row], timing: Timing, max_notes: int) -> None:
    limits = timing.max_gap, timing.half_life, timing.end, timing.simultaneous
    scores, capped = scored(rows, Timing(*limits, max_notes))
    losses = [
        score - scores.get(pair, (0.0, 0))[0] for pair, (score, _) in by_definition(rows, Timing(*limits)).items()
    ]
    by_note = sum(float(capped.note_loss[capped.clicked == c].max(initial=0.0)) for c in (False, True))
    assert max(losses, default=0.0) <= min(capped.loss, by_note) + 1e-12
    assert (capped.users == 0) == (capped.loss == 0.0) == (len(capped.note) == 0)


def test_visits_of_one_user() -> None:
    """Note 5 is viewed at 0, 2 and 3, and at 9. With a gap of 2, that is two visits, whose clicks are those in (0, 5]
    and (9, 11]. The clicks by time are on 6 at 1, on 7 at 5, on 6 at 10 (weight 3). N is 2.
    """
    rows: list[Row] = [(0, 5, view, None, np.nan) for view in (3, 0, 9, 2)]
    rows += [(0, 6, 1, 1, 1.0), (0, 7, 5, 5, 1.0), (0, 6, 10, 10, 3.0)]
    [(_, chunk)] = histories_of(rows, Timing(2, None, 0))[0].chunks(1)
    assert chunk.to_pylist() == [
        {"views": [5, 5], "skips": [0, 2], "follow": [2, 1], "clicks": [6, 7, 6], "shares": [0.5, 0.5, 1.5]}
    ]
    assert scored(rows, Timing(2, None, 0))[0] == {(5, 6): (1.5, 1), (5, 7): (0.5, 1)}


def test_without_a_limit_a_click_that_a_later_one_outweighs_is_left_out() -> None:
    """Clicks on note 1: weight 2 at 1, 3 at 2, 1 at 3 and at 4. Those at 1 and 3 never count: at 2 and 4 follow."""
    rows: list[Row] = [(0, 0, 0, None, 1.0), (0, 2, 2, None, 1.0)]
    rows += [(0, 1, t, t, float(weight)) for t, weight in enumerate((2, 3, 1, 1), start=1)]
    built, _ = histories_of(rows, Timing(None, None, 0))
    assert built.share.tolist() == [3.0, 1.0]
    assert scored(rows, Timing(None, None, 0))[0] == {(0, 1): (3.0, 1), (2, 1): (1.0, 1)}


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), max_gap=st.none() | st.just(9), largest=st.sampled_from([2, 1e9]))
def test_the_last_digit_does_not_depend_on_order_or_blocks(seed: int, max_gap: int | None, largest: float) -> None:
    rng = np.random.default_rng(seed)
    columns = (rng.integers(0, m, 400).tolist() for m in (40, 12, 50, 50))
    rows: list[Row] = [
        (*row, weight) for *row, weight in zip(*columns, rng.uniform(1, largest, 400).tolist(), strict=True)
    ]
    names = rng.permutation(40).tolist()  # another machine numbers the users in another order
    shuffled = [(names[user], *rest) for user, *rest in (rows[i] for i in rng.permutation(400))]
    timing = Timing(max_gap, 7.3, 60)
    scores, _ = scored(rows, timing)
    assert scores == scored(shuffled, timing, num_blocks=3, at_a_time=7)[0]


def test_a_share_below_the_smallest_place_is_no_pair() -> None:
    rows: list[Row] = [(0, 0, 0, None, 1.0), (0, 1, 1, 1, 1.0), (1, 0, 0, None, 1.0), (1, 2, 70, 70, 1.0)]
    assert scored(rows, Timing(None, 1.0, 100))[0] == {(0, 2): (2.0**-30, 1)}


def test_timing_of_the_settings() -> None:
    assert Timing.of(ScoringSettings(), None, weighted=False) is None
    assert Timing.of(ScoringSettings(score="swing", max_minutes=1), None, weighted=True) is None
    scoring = ScoringSettings(max_minutes=1.5, half_life_days=2, simultaneous=True, max_user_notes=7)
    day = 86_400_000_000
    expected = Timing(max_gap=90_000_000, half_life=2 * day, end=3 * day, simultaneous=True, max_notes=7)
    assert Timing.of(scoring, date(1970, 1, 4), weighted=False) == expected
    assert Timing.of(ScoringSettings(), None, weighted=True) == Timing(None, None, 0, max_notes=2000)

"""Eq. 2 with times, first half: clicks that follow a view within a limit, weighed by their kind and their age.

    s(A -> B) = sum over u in U(A -> B) of w_u(A, B) / N_u

U(A -> B) holds the users with a view of A at t and a click on B at t' > t (`simultaneous`: t' >= t), at most `max_gap`
later. All of a user's views and clicks count, not only the first and the last. w_u(A, B) is the largest weight of these
clicks on B: the weight of the click, times 2 ** -((end - t') / half_life). N_u is that of Eq. 2, unweighed. Without a
limit, weights and a half-life it is Eq. 2, which `histories.py` and `eq2.py` compute from less. `timed_eq2.py` is the
second half.

The views of a note by one user make visits: a view at most `max_gap` after the one before is of the same visit. The
clicks that follow one of a visit's views are then those between its first view and `max_gap` after its last, so they
are a slice of the user's clicks in order of time. No click is in two visits of a note by a user. So a user costs at
most (notes viewed) x (clicks), as in Eq. 2, and with a limit only the clicks inside it.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from notellm2_core.config.data import ScoringSettings
from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts
from spark_jobs.scoring.histories import (
    HISTORIES,
    NEVER,
    NOTHING_CAPPED,
    Capped,
    Histories,
    capped_loss,
    earliest,
    lists,
    ranks,
)

TIMED_HISTORIES = pa.schema(
    [
        HISTORIES.field("views"),  # notes, one per visit
        HISTORIES.field("skips"),  # for each visit: the number of clicks before those that follow it
        pa.field("follow", pa.list_(pa.int32())),  # for each visit: the number of clicks that follow it
        pa.field("clicks", pa.list_(pa.int32())),  # notes, by time
        pa.field("shares", pa.list_(pa.float64())),  # for each click: its weight / N_u
    ]
)
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Timing:
    """When a click follows a view, and what it weighs by its age. Times are microseconds since 1970."""

    max_gap: int | None  # None: no limit
    half_life: float | None  # None: all ages weigh the same
    end: int  # of the window: a click there has age 0
    simultaneous: bool = False
    max_notes: int | None = None  # `ScoringSettings.max_user_notes`

    @classmethod
    def of(cls, scoring: ScoringSettings, end: date | None, weighted: bool) -> "Timing | None":
        """None where Eq. 2 or Swing is asked for. `end`: the day after the window's last, which a half-life needs.

        `weighted`: whether clicks have weights.
        """
        is_timed = weighted or scoring.max_minutes is not None or scoring.half_life_days is not None
        if scoring.score == "swing" or not is_timed:
            return None
        assert end is not None or scoring.half_life_days is None
        midnight = datetime.combine(end or date(1970, 1, 1), datetime.min.time(), UTC)
        return cls(
            max_gap=None if scoring.max_minutes is None else int(min(scoring.max_minutes * 6e7, 2.0**61)),
            half_life=None if scoring.half_life_days is None else scoring.half_life_days * 8.64e10,
            end=int(midnight.timestamp()) * 1_000_000,
            simultaneous=scoring.simultaneous,
            max_notes=scoring.max_user_notes,
        )

    def weight(self, weight: Floats, click: Ints) -> Floats:
        """The weight of clicks at their age. [n]"""
        if self.half_life is None:
            return weight
        return weight * np.exp2((click - self.end) / self.half_life)


class TimedRows(NamedTuple):
    """Rows of users, each a view and maybe a click. Each array [n], n >= 1."""

    user: Ints
    note: Ints
    view: Ints  # time
    click: Ints  # time; NEVER: none
    weight: Floats  # of the click; anything where there is none


@dataclass(frozen=True)
class TimedHistories(Histories):
    """Histories whose views (visits) are followed by a slice of the clicks. V: visits, K: clicks."""

    stop: Ints  # [V] index after the last click that follows the visit
    share: Floats  # [K] weight / N_u

    def _rows(self, views: Ints) -> pa.RecordBatch:
        """TIMED_HISTORIES of the visits with these indices, sorted by user."""
        user, start, stop = self.user[views], self.start[views], self.stop[views]
        first = run_starts(user)
        num_views = np.diff(np.append(first, len(user)))
        begin = np.minimum.reduceat(start, first)
        num_clicks = np.maximum.reduceat(stop, first) - begin
        clicks = ragged(begin, num_clicks)
        columns = [
            lists(self.view[views], num_views),
            lists(start - np.repeat(begin, num_views), num_views),
            lists(stop - start, num_views),
            lists(self.click[clicks], num_clicks),
            lists(self.share[clicks], num_clicks, pa.float64()),
        ]
        return pa.record_batch(columns, schema=TIMED_HISTORIES)


class _Clicks(NamedTuple):
    """Clicks. Each array [K]."""

    key: Ints  # user << 32 | note
    time: Ints
    weight: Floats  # at its age

    def chosen(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "_Clicks":
        return _Clicks(self.key[index], self.time[index], self.weight[index])


def timed_histories(rows: TimedRows, timing: Timing) -> tuple[TimedHistories, Capped]:
    """Views and clicks -> histories, and what the cap has cut.

    `rows.user` and `rows.note`: numbers below 2**31. Each user keeps the visits to the `timing.max_notes` notes with
    the latest first views, and the clicks on the `max_notes` notes with the latest last clicks, ties by note number, as
    in `histories`. N_u counts all clicked notes.
    """
    key, first, last = _visits(rows, timing.max_gap)
    clicks = _useful_clicks(rows, timing)
    until = last + timing.max_gap if timing.max_gap is not None else np.full(len(last), _LAST)
    time = ranks(np.concatenate([first, until, clicks.time]))
    first, until, clicked = np.split(time, [len(key), 2 * len(key)])

    user, num_users = key >> 32, int(key[-1] >> 32) + 1
    num_clicked = np.bincount(clicks.key[run_starts(clicks.key)] >> 32, minlength=num_users)
    clicks = clicks._replace(weight=clicks.weight / num_clicked[clicks.key >> 32])
    viewed, clickable, capped = np.ones(len(key), bool), np.ones(len(clicks.key), bool), NOTHING_CAPPED
    if timing.max_notes is not None:
        most = np.zeros(num_users)  # the most that a user adds to a score
        np.maximum.at(most, clicks.key >> 32, clicks.weight)
        viewed, clickable, capped = _cap(key, first, clicks.key, clicked, most, timing.max_notes)

    at = clicks.key >> 32 << 32 | clicked
    order = np.flatnonzero(clickable)
    order = order[np.argsort(at[order], kind="stable")]  # notes ascend within a user, so ties are ordered by number
    clicks, at = clicks.chosen(order), at[order]
    clicker = clicks.key >> 32
    start = np.searchsorted(at, user << 32 | first, side="left" if timing.simultaneous else "right")
    stop = np.searchsorted(at, user << 32 | until, side="right")
    kept = viewed & (start < stop)
    return TimedHistories(
        user=user[kept], view=(key & 0xFFFFFFFF)[kept], start=start[kept], click=clicks.key & 0xFFFFFFFF,
        end=np.cumsum(np.bincount(clicker, minlength=num_users)), num_clicked=num_clicked, stop=stop[kept],
        share=clicks.weight,
    ), capped  # fmt: skip


def _visits(rows: TimedRows, max_gap: int | None) -> tuple[Ints, Ints, Ints]:
    """user << 32 | note, first and last view of each visit, sorted by these."""
    key = rows.user << 32 | rows.note
    order = np.lexsort((rows.view, key))
    key, view = key[order], rows.view[order]
    is_first = np.append(True, key[1:] != key[:-1])
    if max_gap is not None:
        is_first[1:] |= view[1:] - view[:-1] > max_gap
    first = np.flatnonzero(is_first)
    return key[first], view[first], view[np.append(first[1:], len(key)) - 1]


def _useful_clicks(rows: TimedRows, timing: Timing) -> _Clicks:
    """The clicks, sorted by user, note and time. Without a limit, those that a later one outweighs are left out."""
    row = np.flatnonzero(rows.click > NEVER)
    weight = timing.weight(rows.weight[row], rows.click[row])
    clicks = _Clicks(rows.user[row] << 32 | rows.note[row], rows.click[row], weight)
    clicks = clicks.chosen(np.lexsort((clicks.weight, clicks.time, clicks.key)))
    if timing.max_gap is not None or not len(row):
        return clicks
    # From the last click backwards: the largest rank of a weight so far, above that of all clicks on later notes.
    later_notes = np.cumsum(np.append(False, clicks.key[:0:-1] != clicks.key[-2::-1]))
    height = later_notes << 32 | ranks(clicks.weight)[::-1]
    is_useful = np.append(True, height[1:] > np.maximum.accumulate(height)[:-1])
    return clicks.chosen(is_useful[::-1])


def _cap(
    key: Ints, viewed_at: Ints, click_key: Ints, clicked_at: Ints, most: Floats, max_notes: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Capped]:
    """Which visits [V] and which clicks [K] are left, and what was cut.

    `key`, `viewed_at`: of visits, sorted; `click_key`, `clicked_at`: of clicks, sorted. `most` [U]: the most that a
    user adds to a score; 0 for a user without clicks.
    """
    first = run_starts(key)  # a note's first visit, and its last click
    last = np.append(run_starts(click_key)[1:], len(click_key))[: len(run_starts(click_key))] - 1
    cut_view, cut_click = (
        earliest(k >> 32 << 32 | at, k >> 32, np.bincount(k >> 32, minlength=len(most)), max_notes)
        for k, at in ((key[first], viewed_at[first]), (click_key[last], clicked_at[last]))
    )
    view, click = np.sort(key[first][cut_view]), np.sort(click_key[last][cut_click])
    cut = np.zeros(len(most), bool)
    cut[view >> 32] = True
    viewer, clicker = (view >> 32, view & 0xFFFFFFFF), (click >> 32, click & 0xFFFFFFFF)
    capped = capped_loss(most, cut & (most > 0), viewer, clicker)
    return ~np.isin(key, view), ~np.isin(click_key, click), capped

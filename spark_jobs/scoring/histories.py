"""Eq. 2, first half: from interactions to user histories, in numpy.

A user's clicked notes are sorted by their last clicks. The targets of a viewed note are then a suffix of that list: no
times are stored, and every (view, click) of the suffix is a pair that counts. Histories are cut into blocks by the
viewed note. A block holds all views of its notes, each with the clicks that follow, and is scored by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.scoring.arrays import Floats, Ints, ragged, run_starts

Follows = Literal["later", "not earlier", "any"]

_INT32 = pa.int32()
NEVER = np.iinfo(np.int64).min  # last_click of a note that was not clicked
HISTORIES = pa.schema(
    [
        pa.field("num_clicked", pa.int32()),  # N_u: the distinct notes that the user clicked, before any cap
        pa.field("views", pa.list_(pa.int32())),  # notes
        pa.field("skips", pa.list_(pa.int32())),  # for each view: the number of clicks before its suffix
        pa.field("clicks", pa.list_(pa.int32())),  # notes, sorted by their last click
    ]
)
_CLICKS_AT_A_TIME = 1 << 22  # in one chunk, so that it is a small row for Spark


@dataclass(frozen=True)
class Capped:
    """The views and clicks that the cap `max_notes` has cut.

    Cutting a user takes at most its share from any score: 1 / N_u, times the largest weight of its clicks.
    """

    users: int  # users with a cut view or click
    loss: float  # the sum of these users' shares
    note: Ints  # [C] notes that were cut from a user's views or clicks
    clicked: npt.NDArray[np.bool_]  # [C] whether the note was cut from the clicks
    note_loss: Floats  # [C] the sum of the shares of the users from whom the note was cut


NOTHING_CAPPED = Capped(0, 0.0, np.empty(0, np.int64), np.empty(0, bool), np.empty(0))


@dataclass(frozen=True)
class Histories:
    """The histories of all users, concatenated; users are numbered from 0. V: views, K: clicks, U: users."""

    user: Ints  # [V] ascending
    view: Ints  # [V] notes
    start: Ints  # [V] index of the first click that follows the view
    click: Ints  # [K] notes, by user and last click
    end: Ints  # [U] index after the user's last click
    num_clicked: Ints  # [U] N_u

    def chunks(self, num_blocks: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(block, HISTORIES), by block: note mod `num_blocks`. A user has a row in each block that has a view of it."""
        block = self.view % num_blocks
        size = np.diff(self.end, prepend=0)
        group = block + num_blocks * (np.cumsum(size) // _CLICKS_AT_A_TIME)[self.user]
        order = np.argsort(group, kind="stable")
        borders = np.append(run_starts(group[order]), len(order))
        for low, high in pairwise(borders):
            views = order[low:high]
            yield int(block[views[0]]), self._rows(views)

    def _rows(self, views: Ints) -> pa.RecordBatch:
        """HISTORIES of the views with these indices, sorted by user."""
        user, start = self.user[views], self.start[views]
        first = run_starts(user)
        users, num_views = user[first], np.diff(np.append(first, len(user)))
        begin = np.minimum.reduceat(start, first)
        num_clicks = self.end[users] - begin
        columns = [
            pa.array(self.num_clicked[users], pa.int32()),
            lists(self.view[views], num_views),
            lists(start - np.repeat(begin, num_views), num_views),
            lists(self.click[ragged(begin, num_clicks)], num_clicks),
        ]
        return pa.record_batch(columns, schema=HISTORIES)


def histories(
    user: Ints, note: Ints, first_view: Ints, last_click: Ints, follows: Follows, max_notes: int | None
) -> tuple[Histories, Capped]:
    """Interactions -> histories, and what the cap has cut. Arrays [n], n >= 1; rows of one user and note are merged.

    `user` and `note`: numbers below 2**31. `first_view`, `last_click`: times in any unit; `last_click` may be NEVER.
    `follows`: which of a user's clicks follow a view; "any" requires that all notes were clicked, and uses the last
    click as the view. `max_notes`: each user keeps this many latest first views and this many latest last clicks, ties
    by note number (None: all). N_u counts all clicked notes.
    """
    user, note, first_view, last_click = _merged(user, note, first_view, last_click)
    if follows == "any":
        first_view = last_click
    clicked = last_click > NEVER
    time = ranks(np.concatenate([first_view, last_click[clicked]]))
    viewed_at, clicked_at = user << 32 | time[: len(user)], user[clicked] << 32 | time[len(user) :]
    order = np.argsort(clicked_at, kind="stable")  # notes ascend within a user, so ties are ordered by number
    clicked_at, click = clicked_at[order], note[clicked][order]
    num_users = int(user[-1]) + 1
    num_clicked, num_viewed = np.bincount(user[clicked], minlength=num_users), np.bincount(user, minlength=num_users)
    end = np.cumsum(num_clicked)
    if follows == "any":
        start = (end - num_clicked)[user]
    else:
        start = np.searchsorted(clicked_at, viewed_at, side="right" if follows == "later" else "left")
    is_kept = np.ones(len(user), bool)
    capped = NOTHING_CAPPED
    if max_notes is not None:
        start = np.maximum(start, end[user] - max_notes)
        is_kept[earliest(viewed_at, user, num_viewed, max_notes)] = False
        clicker = np.repeat(np.arange(num_users), num_clicked)
        lost = np.arange(len(click)) < (end - max_notes)[clicker]
        cut = (num_clicked > 0) & (num_viewed > max_notes)
        most = np.where(num_clicked > 0, 1.0 / np.maximum(num_clicked, 1), 0.0)
        capped = capped_loss(most, cut, (user[~is_kept], note[~is_kept]), (clicker[lost], click[lost]))
    is_kept &= start < end[user]
    return Histories(user[is_kept], note[is_kept], start[is_kept], click, end, num_clicked), capped


def capped_loss(
    most: Floats, cut: npt.NDArray[np.bool_], views: tuple[Ints, Ints], clicks: tuple[Ints, Ints]
) -> Capped:
    """`Capped` from the views and clicks that were cut, as users and notes. `cut` [U]: the capped users.

    `most` [U]: the most that a user adds to a score; 0 for a user without clicks.
    """
    (viewer, view), (clicker, click) = views, clicks
    counts = most[viewer] > 0
    user, note = np.append(viewer[counts], clicker), np.append(view[counts], click)
    clicked = np.arange(len(user)) >= counts.sum()
    key, loss = summed(note << 1 | clicked, most[user])
    return Capped(int(cut.sum()), float(-np.sort(-most[cut]).sum()), key >> 1, key % 2 == 1, loss)


def _merged(user: Ints, note: Ints, first_view: Ints, last_click: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """One row per user and note, sorted by both."""
    key = user << 32 | note
    order = np.argsort(key)
    key = key[order]
    first = run_starts(key)
    return (
        key[first] >> 32,
        key[first] & 0xFFFFFFFF,
        np.minimum.reduceat(first_view[order], first),
        np.maximum.reduceat(last_click[order], first),
    )


def earliest(viewed_at: Ints, user: Ints, num_viewed: Ints, max_notes: int) -> Ints:
    """The indices of each user's views before its latest `max_notes`."""
    order = np.argsort(viewed_at, kind="stable")  # by user, time, note
    from_end = np.cumsum(num_viewed)[user] - np.arange(len(user))  # sorting moves views within their user only
    return order[from_end > max_notes]


def ranks(values: Ints | Floats) -> Ints:
    """The rank of each value among the distinct values."""
    order = np.argsort(values)
    ordered = values[order]
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.cumsum(np.append(False, ordered[1:] != ordered[:-1]))
    return ranks


def summed(key: Ints, value: Floats) -> tuple[Ints, Floats]:
    """The distinct keys, and the sum of the values of each, identical to the last digit for every order of the rows."""
    order = np.lexsort((value, key))
    first = run_starts(key[order])
    return key[order][first], np.add.reduceat(value[order], first) if len(first) else value


def lists(values: Ints | Floats, lengths: Ints, kind: pa.DataType = _INT32) -> pa.ListArray:
    """Lists of these lengths, which hold `values` in their order."""
    offsets = np.append(0, np.cumsum(lengths))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

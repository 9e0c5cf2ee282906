"""Eq. 2, first half: from interactions to the lists that the pairs are made of. Whole users, in numpy.

A user's clicked notes lie in the order of their last clicks. So the targets of a viewed note are the rest of that list
from one place on: no times are kept, and every pair that is made counts. The lists are cut into blocks by the viewed
note: a block holds all views of its notes, each with the clicks that follow, and is scored by itself.
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

NEVER = np.iinfo(np.int64).min  # the last click on a note that was not clicked
HISTORIES = pa.schema(
    [
        pa.field("num_clicked", pa.int32()),  # N_u: the distinct notes that the user clicked, before any cap
        pa.field("views", pa.list_(pa.int32())),  # notes
        pa.field("skips", pa.list_(pa.int32())),  # for each view: how many clicks do not follow it
        pa.field("clicks", pa.list_(pa.int32())),  # notes, by their last click
    ]
)
_CLICKS_AT_A_TIME = 1 << 22  # of one piece, so that it stays a small row for Spark


@dataclass(frozen=True)
class Capped:
    """What a cap has cut. A user adds at most 1 / N_u to any one score, and so has cut at most that from it."""

    users: int
    loss: float  # the sum of 1 / N_u over these users
    note: Ints  # notes that some of them have viewed, or clicked, and lost
    clicked: npt.NDArray[np.bool_]  # of each such note: whether it was lost from the clicks, or from the views
    note_loss: Floats  # the sum of 1 / N_u over the users that have lost it


NOTHING_CAPPED = Capped(0, 0.0, np.empty(0, np.int64), np.empty(0, bool), np.empty(0))


@dataclass(frozen=True)
class Histories:
    """All users' lists, one after the other; users are numbered from 0."""

    user: Ints  # of each view, ascending
    view: Ints
    start: Ints  # of each view: the first place in `click` that follows it
    click: Ints
    end: Ints  # of each user: the end of its clicks
    num_clicked: Ints  # of each user: N_u

    def pieces(self, num_blocks: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(block, HISTORIES), by block: note mod `num_blocks`. A user has a row in every block with a note it
        viewed."""
        block = self.view % num_blocks
        size = np.diff(self.end, prepend=0)
        group = block + num_blocks * (np.cumsum(size) // _CLICKS_AT_A_TIME)[self.user]
        order = np.argsort(group, kind="stable")
        borders = np.append(run_starts(group[order]), len(order))
        for low, high in pairwise(borders):
            views = order[low:high]
            yield int(block[views[0]]), self._rows(views)

    def _rows(self, views: Ints) -> pa.RecordBatch:
        """HISTORIES of some views, whose users ascend."""
        user, start = self.user[views], self.start[views]
        first = run_starts(user)
        users, num_views = user[first], np.diff(np.append(first, len(user)))
        begin = np.minimum.reduceat(start, first)
        num_clicks = self.end[users] - begin
        columns = [
            pa.array(self.num_clicked[users], pa.int32()),
            _ragged(self.view[views], num_views),
            _ragged(start - np.repeat(begin, num_views), num_views),
            _ragged(self.click[ragged(begin, num_clicks)], num_clicks),
        ]
        return pa.record_batch(columns, schema=HISTORIES)


def histories(
    user: Ints, note: Ints, first_view: Ints, last_click: Ints, follows: Follows, max_notes: int | None
) -> tuple[Histories, Capped]:
    """Interactions (at least one; several of one user and note add up) -> lists, and what the cap has cut.

    `user` and `note` are numbers below 2**31, times have any unit, `last_click` may be NEVER. `follows` says which
    clicks of a user follow a view; "any" is for notes that were all clicked, and takes the last click for the view. Of
    each user the `max_notes` notes first viewed latest and the `max_notes` notes last clicked latest stay, ties by
    number (None: all). N_u is counted before.
    """
    user, note, first_view, last_click = _merged(user, note, first_view, last_click)
    if follows == "any":
        first_view = last_click
    clicked = last_click > NEVER
    time = _ranks(np.concatenate([first_view, last_click[clicked]]))
    viewed_at, clicked_at = user << 32 | time[: len(user)], user[clicked] << 32 | time[len(user) :]
    order = np.argsort(clicked_at, kind="stable")  # notes ascend within a user, so ties stand by number
    clicked_at, click = clicked_at[order], note[clicked][order]
    num_users = int(user[-1]) + 1
    num_clicked, num_viewed = np.bincount(user[clicked], minlength=num_users), np.bincount(user, minlength=num_users)
    end = np.cumsum(num_clicked)
    if follows == "any":
        start = (end - num_clicked)[user]
    else:
        start = np.searchsorted(clicked_at, viewed_at, side="right" if follows == "later" else "left")
    kept = np.ones(len(user), bool)
    capped = NOTHING_CAPPED
    if max_notes is not None:
        start = np.maximum(start, end[user] - max_notes)
        kept[_earliest(viewed_at, user, num_viewed, max_notes)] = False
        clicker = np.repeat(np.arange(num_users), num_clicked)
        lost = np.arange(len(click)) < (end - max_notes)[clicker]
        cut = (num_clicked > 0) & (num_viewed > max_notes)
        capped = _capped(num_clicked, cut, user[~kept], note[~kept], clicker[lost], click[lost])
    kept &= start < end[user]
    return Histories(user[kept], note[kept], start[kept], click, end, num_clicked), capped


def _capped(
    num_clicked: Ints, cut: npt.NDArray[np.bool_], viewer: Ints, view: Ints, clicker: Ints, click: Ints
) -> Capped:
    """From the views and the clicks that were lost: their users, and their notes."""
    some = num_clicked[viewer] > 0  # who clicks nothing adds to no score
    user, note = np.append(viewer[some], clicker), np.append(view[some], click)
    clicked = np.arange(len(user)) >= some.sum()
    key, loss = summed(note << 1 | clicked, 1.0 / num_clicked[user])
    return Capped(int(cut.sum()), float((1.0 / np.sort(num_clicked[cut])).sum()), key >> 1, key % 2 == 1, loss)


def _merged(user: Ints, note: Ints, first_view: Ints, last_click: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """One row per user and note, by user and note."""
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


def _earliest(viewed_at: Ints, user: Ints, num_viewed: Ints, max_notes: int) -> Ints:
    """The views that a user has beyond the latest `max_notes`."""
    order = np.argsort(viewed_at, kind="stable")  # by user, time, note
    from_end = np.cumsum(num_viewed)[user] - np.arange(len(user))  # users stay where they are
    return order[from_end > max_notes]


def _ranks(values: Ints) -> Ints:
    """The place of each value among the distinct ones."""
    order = np.argsort(values)
    ordered = values[order]
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.cumsum(np.append(False, ordered[1:] != ordered[:-1]))
    return ranks


def summed(key: Ints, value: Floats) -> tuple[Ints, Floats]:
    """The distinct keys, and the sums of their values: the same, to the last digit, in whatever order they came."""
    order = np.lexsort((value, key))
    first = run_starts(key[order])
    return key[order][first], np.add.reduceat(value[order], first) if len(first) else value


def _ragged(values: Ints, lengths: Ints) -> pa.ListArray:
    offsets = np.append(0, np.cumsum(lengths))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))

"""The held-out clicks of a week, each with what its user has clicked before it.

C: clicks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import INTERACTIONS, TEST, TRAIN

_CLICK = ["user_id", "note_id", "last_click"]
_NO_CLICKS = pa.schema([INTERACTIONS.field(name).with_nullable(True) for name in _CLICK]).empty_table()


@dataclass(frozen=True)
class HeldOut:
    """Clicks, those of a user one after the other, in their order."""

    users: np.ndarray  # [C] int: which user, from 0 on
    notes: tuple[str, ...]  # [C] the clicked ones
    histories: tuple[tuple[str, ...], ...]  # [C] what the user has clicked before, the newest first

    def where(self, chosen: np.ndarray) -> "HeldOut":
        """The chosen clicks, by a mask [C]."""
        users = np.unique(self.users[chosen], return_inverse=True)[1]
        return HeldOut(users, tuple(compress(self.notes, chosen)), tuple(compress(self.histories, chosen)))


def held_out_clicks(interactions: Path, num_clicks: int, history: int, seed: int = 0) -> HeldOut:
    """About `num_clicks` clicks of the test days in the dataset `interactions`: of random users, all of each one's.

    A click on a note that its user has clicked before does not count: no service would show that note again. Of equal
    times none comes before the other. history: the most notes of one.
    """
    users = _some_users(_clicks(interactions / TEST)["user_id"], num_clicks, seed)
    tables = [_clicks(interactions / name, users) for name in (TRAIN, TEST)]
    is_test = pa.array(np.repeat([0, 1], [table.num_rows for table in tables]))
    table = pa.concat_tables(tables).append_column("is_test", is_test)
    table = table.group_by(_CLICK[:2]).aggregate([("last_click", "min"), ("is_test", "min")])  # the first of each note
    table = table.sort_by([("user_id", "ascending"), ("last_click_min", "ascending"), ("note_id", "ascending")])
    columns = (table[name].to_pylist() for name in ("user_id", "note_id", "last_click_min", "is_test_min"))
    of_user: dict[str, list[tuple[datetime, str]]] = {}
    clicks: list[tuple[str, str, tuple[str, ...]]] = []
    for user, note, time, held_out in zip(*columns, strict=True):
        before = of_user.setdefault(user, [])
        if held_out:
            clicks.append((user, note, tuple(n for t, n in reversed(before) if t < time)[:history]))
        before.append((time, note))
    numbers = {user: number for number, user in enumerate(dict.fromkeys(user for user, _, _ in clicks))}
    return HeldOut(
        np.array([numbers[user] for user, _, _ in clicks], dtype=np.int64),
        tuple(note for _, note, _ in clicks),
        tuple(before for _, _, before in clicks),
    )


def _clicks(folder: Path, users: Sequence[str] | None = None) -> pa.Table:
    """The rows of INTERACTIONS with a click, of these users."""
    is_click = pc.field("last_click").is_valid()
    if users is not None:
        is_click = is_click & pc.field("user_id").isin(pa.array(users, pa.string()))
    tables = [pq.read_table(file, columns=_CLICK, filters=is_click) for file in parquet_files(folder)]
    return pa.concat_tables([_NO_CLICKS, *(table.cast(_NO_CLICKS.schema) for table in tables)])


def _some_users(clicks: pa.ChunkedArray, num_clicks: int, seed: int) -> list[str]:
    """Random users who have `num_clicks` clicks together, or a few more; all users if there are fewer."""
    users, counts = np.unique(clicks.to_numpy().astype(str), return_counts=True)
    order = np.random.default_rng(seed).permutation(len(users))
    before = np.cumsum(counts[order]) - counts[order]
    return [str(user) for user in users[order[before < num_clicks]]]

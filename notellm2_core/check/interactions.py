"""What becomes of each event of the windows, by the rules of `spark_jobs.clean`, `interactions` and `window`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.check.log import DAY, EPOCH, DatedRows, Log, ignored_names
from notellm2_core.config.source import MAX_WEIGHT, EventSettings
from notellm2_core.lake.window import Days, ResolvedWindow
from notellm2_core.tables.log import IGNORED

REASONS = (
    "",
    IGNORED,
    "null_user",
    "null_note",
    "unknown_event",
    "bad_weight",
    "duplicate_event",
    "robot",
    "unknown_note",
)
_JOINED = ("robot", "unknown_note")  # reasons that a single partition cannot know


@dataclass(frozen=True)
class Labelled:
    """The events of the windows with the reason to drop them."""

    window: ResolvedWindow
    rows: DatedRows
    reasons: np.ndarray  # [n] places in REASONS; -1: outside of the windows
    undated: Counter[str]  # rows without a plausible time, by reason
    robots: int  # users
    most_events: int  # of a robot on a day

    @property
    def counts(self) -> Counter[str]:
        """The events of the windows by reason; "": usable."""
        return _by_reason(self.reasons)

    def inside(self, days: Days) -> np.ndarray:
        """Which rows are in `days`. [n]"""
        return _inside(self.rows, days)

    def dropped_in(self, days: Days) -> Counter[str]:
        """The events in `days` by the reason that drops them when partitions are joined; without any, when reduced."""
        counts = _by_reason(self.reasons[self.inside(days)])
        dropped = Counter({reason: rows for reason, rows in counts.items() if reason not in ("", IGNORED)})
        joined = Counter({reason: dropped[reason] for reason in _JOINED if dropped[reason]})
        return joined or dropped

    def example_ids(self, days: Days, note_ids: pa.Array) -> tuple[str, str]:
        """The first note_id of the events in `days` of which there is no note, and the first of the notes."""
        is_unknown = self.inside(days) & (self.reasons == REASONS.index("unknown_note"))
        of_log = self.rows.note_ids.take(pa.array(np.unique(self.rows.notes[is_unknown])))
        return pc.min(of_log).as_py(), pc.min(note_ids).as_py()

    def names_in(self, days: Days) -> list[str]:
        """The event names that occur in `days`, the most frequent first."""
        counts = np.bincount(self.rows.events[self.inside(days)], minlength=len(self.rows.names))
        return [self.rows.names[i] for i in np.argsort(-counts, kind="stable") if counts[i]]

    @property
    def num_new_notes(self) -> int:
        """The notes with usable events in the test days and none in the training days."""
        notes = {name: self.rows.notes[self._usable(getattr(self.window, name))] for name in ("train", "test")}
        return len(np.setdiff1d(notes["test"], notes["train"]))

    def _usable(self, days: Days) -> np.ndarray:
        return self.inside(days) & (self.reasons == 0)

    def metrics(self, settings: EventSettings) -> dict[str, Any]:
        """The counts that `spark_jobs.window.join_partitions` returns, without first_day and last_day."""
        all_reasons = self.undated + self.counts
        dropped = {reason: n for reason, n in all_reasons.most_common() if n and reason not in ("", IGNORED)}
        spans = {"train": self.window.train, "test": self.window.test}
        return {
            "rows": all_reasons.total(),
            IGNORED: all_reasons[IGNORED],
            "dropped": dropped,
            "robots": self.robots,
            **{name: self._window_metrics(days, settings) for name, days in spans.items()},
        }

    def _window_metrics(self, days: Days, settings: EventSettings) -> dict[str, int]:
        usable = self._usable(days)
        is_click = _are_in(self.rows.names, settings.click_events)[self.rows.events[usable]]
        if self.rows.weights is not None:  # a click of weight 0 is a view
            is_click &= self.rows.weights[usable] > 0
        events, clicks = int(usable.sum()), int(is_click.sum())
        users, notes = (_num_distinct(codes[usable]) for codes in (self.rows.users, self.rows.notes))
        return {"events": events, "clicks": clicks, "views": events - clicks, "users": users, "notes": notes}


def _are_in(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Which of `names` are `wanted`. (NumPy's own texts lose zero bytes at their ends.)"""
    return np.array([name in wanted for name in names], dtype=bool)


def _by_reason(reasons: np.ndarray) -> Counter[str]:
    rows = np.bincount(reasons[reasons >= 0], minlength=len(REASONS)).tolist()
    return +Counter(dict(zip(REASONS, rows, strict=True)))


def label(log: Log, window: ResolvedWindow, note_ids: pa.Array | None, settings: EventSettings) -> Labelled:
    """The events of the windows, each with the first reason to drop it.

    `note_ids`: of the usable notes; None: they are not known, and no note is unknown.
    """
    rows = log.rows
    reasons = np.where(_inside(rows, window.train) | _inside(rows, window.test), 0, -1).astype(np.int8)
    used = _are_in(rows.names, (*settings.view_events, *settings.click_events))
    rest = np.flatnonzero(reasons == 0)

    def drop(reason: str, is_dropped: np.ndarray) -> np.ndarray:
        reasons[rest[is_dropped]] = REASONS.index(reason)
        return rest[~is_dropped]

    rest = drop(IGNORED, _are_in(rows.names, ignored_names(rows.names, settings))[rows.events[rest]])
    rest = drop("null_user", rows.users[rest] < 0)
    rest = drop("null_note", rows.notes[rest] < 0)
    rest = drop("unknown_event", ~used[rows.events[rest]])
    if rows.weights is not None:
        is_click = _are_in(rows.names, settings.click_events)[rows.events[rest]]
        is_usable = (rows.weights[rest] >= 0) & (rows.weights[rest] <= MAX_WEIGHT)
        rest = drop("bad_weight", is_click & ~is_usable)
    is_robot, most_events = _robots(rows, rest, settings.max_events_per_day)
    rest = drop("duplicate_event", _repeated(rows, rest))
    rest = drop("robot", is_robot[rows.users[rest]])
    if note_ids is not None:
        is_known = pc.is_in(rows.note_ids, note_ids).to_numpy(zero_copy_only=False)
        rest = drop("unknown_note", ~is_known[rows.notes[rest]])
    return Labelled(window, rows, reasons, log.undated, int(is_robot.sum()), most_events)


def _inside(rows: DatedRows, days: Days) -> np.ndarray:
    start, end = ((day - EPOCH).days * DAY for day in (days.start, days.end))
    return (rows.times >= start) & (rows.times < end)


def _robots(rows: DatedRows, counted: np.ndarray, limit: int | None) -> tuple[np.ndarray, int]:
    """Which users have more than `limit` of the rows `counted` on a day, and the most that any of them has on a day."""
    is_robot = np.zeros(len(rows.user_ids), dtype=bool)
    users = rows.users[counted]
    if limit is None or not np.any(busy := np.bincount(users, minlength=len(is_robot)) > limit):
        return is_robot, 0
    of_busy = busy[users]
    users, days = users[of_busy].astype(np.int64), rows.times[counted[of_busy]] // DAY
    first, num_days = days.min(), int(np.ptp(days)) + 1
    users_on_days, num_rows = np.unique(users * num_days + (days - first), return_counts=True)
    is_robot[users_on_days[num_rows > limit] // num_days] = True
    return is_robot, int(num_rows.max())


def _repeated(rows: DatedRows, counted: np.ndarray) -> np.ndarray:
    """Which of the rows `counted` repeat another one: user, note, time, event and weight are equal."""
    pairs = rows.users[counted].astype(np.int64) << 32 | rows.notes[counted]
    weights = [] if rows.weight_keys is None else [rows.weight_keys[counted]]
    # lexsort sorts by time before it sorts by the others: quickly, because most logs are in that order.
    keys = (*weights, rows.times[counted], rows.events[counted], pairs)
    order = np.lexsort(keys)
    is_equal = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        ordered = key[order]
        is_equal &= ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:][is_equal]] = True
    return repeated


def _num_distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes))) if len(codes) else 0

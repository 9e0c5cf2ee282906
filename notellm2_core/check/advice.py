"""Which settings would fit the log better: events, window, times, robots and ids."""

import json
from collections.abc import Mapping
from datetime import date, timedelta
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.check import guesses
from notellm2_core.check.findings import Findings, percent
from notellm2_core.check.interactions import REASONS, Labelled
from notellm2_core.check.log import DAY, DatedRows, Log, Place
from notellm2_core.config.data import HoldOutSettings, PairSettings, WindowSettings
from notellm2_core.config.source import EventSettings, EventTableSettings, SourceSettings
from notellm2_core.lake.window import ResolvedWindow
from notellm2_core.tables.origins import Stored
from notellm2_core.tables.table import MALFORMED, ROW, Table

_EXAMPLES = 3
_FORMAT_EXAMPLES = 200  # enough to tell days from months
_BATCHES = 20  # of a file that are read again for an example
_DAY_SHARE = 0.99  # of rows at one time of day, or at two (summer and winter), from which on times are days
_TIMES, _FEW_TIMES = 1_000_000, 100  # that are looked at; too few to tell
_COMMON_SHARE = 0.01  # of the rows, below which a reason needs no advice
_FEW_EVENTS = 10_000  # of the windows, below which more days are worth a remark
_FEW_NOTES = 50  # held out, below which a recall says nothing
_IDS = 1000  # that are compared in other forms


def advise_events(log: Log, settings: SourceSettings, findings: Findings) -> None:
    """Event names that no list has, and lists of which no name occurs."""
    events = log.events
    names = {name: rows for name, rows in events.most_common() if name}
    unlisted = {name: rows for name, rows in names.items() if name not in settings.event_names}
    has_clicks = any(name in names for name in settings.click_events)
    has_views = any(name in names for name in settings.view_events)
    share = f"{percent(sum(unlisted.values()), events.total())} of the rows"
    least = guesses.rating_of_a_click(unlisted)
    if not names or (not unlisted and has_clicks):
        return
    if least is not None and len(log.tables) == 1 and not has_clicks:
        (table,) = settings.events or (EventTableSettings(),)
        condition = {_stored_name(log.tables[0], "event"): f">= {least:g}"}
        liked = table.model_copy(update={"event": "liked", "where": {**(table.where or {}), **condition}})
        tables = [table.model_copy(update={"event": "rated"}), liked]
        values = [table.model_dump(mode="json", exclude_defaults=True) for table in tables]
        findings.change("source.events", values, "the event names are numbers, such as ratings: a high one is a click")
        findings.change("source.view_events", ["rated"], "")
        findings.change("source.click_events", ["liked"], "")
    elif not has_clicks:
        clicks = guesses.click_names(unlisted or names)
        why = f"the log has no {' or '.join(settings.click_events)}, but {_listed(names)}; which of them are clicks?"
        findings.change("source.click_events", clicks, why)
        if not has_views:
            findings.change("source.view_events", list(names), "a click counts as a view, too")
        elif others := [name for name in unlisted if name not in clicks]:
            findings.change("source.ignored_events", [*(settings.ignored_events or ()), *others], "in neither list")
    elif settings.ignored_events is not None:
        why = f"{share} have these events, which are in no list; or are they views or clicks?"
        findings.change("source.ignored_events", [*settings.ignored_events, *unlisted], why)


def advise_window(log: Mapping[str, Any], window: WindowSettings, findings: Findings) -> None:
    """A window at the end of the log, into which the window of the settings does not reach. `log`: its metrics."""
    first, last = date.fromisoformat(log["first_day"]), date.fromisoformat(log["covered_until"])
    end = last + timedelta(days=1)
    findings.change("window.end", end, f"the log reaches from {first} to {last}")
    _fit_days(first, end, window, findings)


def advise_span(log: Mapping[str, Any], window: ResolvedWindow, num_events: int, findings: Findings) -> None:
    """Training days without a log, and windows that hold little of it."""
    first = date.fromisoformat(log["first_day"])
    train_days = (window.train.end - window.train.start).days
    test_days = None if window.test == window.train else (window.test.end - window.test.start).days
    if (missing := (first - window.train.start).days) > 0:
        findings.remarks.append(f"The log begins on {first}: {missing} of the {train_days} training days have none.")
        if missing > train_days / 2:
            settings = WindowSettings(train_days=train_days, test_days=test_days)
            _fit_days(first, window.test.end, settings, findings)
    dated = log["rows"] - log["undated"]
    if num_events < _FEW_EVENTS and num_events < dated / 2 and missing < 0:
        why = f"the windows hold {num_events:,} of the log's {dated:,} events; {-missing} earlier days have the others"
        findings.change("window.train_days", train_days - missing, why)


def advise_split(labelled: Labelled, window: WindowSettings, split: HoldOutSettings, findings: Findings) -> None:
    """Test days whose notes nearly all have events in the training days, so that hardly any can be held out."""
    if split.by != "time" or window.test_days is None or (new := labelled.num_new_notes) >= _FEW_NOTES:
        return
    if not new:
        findings.stops.append(
            "No note of the test days is new: each also has events in the training days, so none can be held out. Set "
            "split.by to hash."
        )
    why = f"only {new} notes have events in the test days and none in the training days: hold out a share of all notes"
    findings.change("split.by", "hash", why)
    findings.change("window.train_days", window.train_days + window.test_days, "for training and test pairs alike")
    findings.change("window.test_days", None, "")


def _fit_days(first: date, end: date, window: WindowSettings, findings: Findings) -> None:
    """Two thirds of the days of a log for training, where it is shorter than the window."""
    num_days = (end - first).days
    if num_days >= window.train_days + (window.test_days or 0):
        return
    test_days = None if window.test_days is None else max(1, num_days // 3)
    findings.change("window.train_days", max(1, num_days - (test_days or 0)), f"of the {num_days} days of the log")
    if test_days is not None:
        findings.change("window.test_days", test_days, "")


def advise_times(rows: DatedRows, pairs: PairSettings, findings: Findings) -> None:
    """Times of day resolution, in which no click is later on the day of the view."""
    times = rows.times[:: max(1, len(rows.times) // _TIMES)] % DAY
    if pairs.simultaneous or len(times) < _FEW_TIMES:
        return
    _, counts = np.unique(times, return_counts=True)
    if np.sort(counts)[-2:].sum() >= _DAY_SHARE * len(times):
        findings.change("pairs.simultaneous", True, "the timestamps are days: a click on the day of the view counts")


def advise_robots(labelled: Labelled, settings: EventSettings, findings: Findings) -> None:
    """The busiest user's events, where robots have many of the events."""
    counts = labelled.counts
    if counts["robot"] > _COMMON_SHARE * counts.total():
        why = (
            f"{labelled.robots:,} users with more than {settings.max_events_per_day:,} events on a day have "
            f"{percent(counts['robot'], counts.total())} of the events; the busiest has {labelled.most_events:,}. "
            "If they are people:"
        )
        findings.change("source.max_events_per_day", labelled.most_events, why)


def advise_ids(labelled: Labelled, note_ids: pa.Array, findings: Findings) -> None:
    """Ids of events that match no note, with examples of both sides."""
    rows = labelled.rows
    is_unknown = labelled.reasons == REASONS.index("unknown_note")
    num_rows, num_valid = int(is_unknown.sum()), int((labelled.reasons == 0).sum())
    if num_rows <= _COMMON_SHARE * (num_rows + num_valid):
        return
    unknown = sorted(rows.note_ids.take(pa.array(np.unique(rows.notes[is_unknown]))).to_pylist())
    known = note_ids.to_pylist()
    sentence = (
        f"{percent(num_rows, num_rows + num_valid)} of the otherwise usable events are of {len(unknown):,} notes that "
        f"are not among the notes: {_examples(unknown)} in the events, {_examples(sorted(known)[:_EXAMPLES])} in the "
        "notes"
    )
    if same := guesses.same_ids(unknown[:_IDS], known):
        sentence += f"; {same[0]} they are the same ({same[1]!r} and {same[2]!r}): write both alike"
    findings.remarks.append(sentence + ".")


def advise_undated(log: Log, num_rows: int, findings: Findings) -> None:
    """Rows without a plausible time, with examples, and the format of their times if it is recognised."""
    for reason, what in (
        ("malformed_row", "are malformed"),
        ("bad_timestamp", "have no readable time"),
        ("absurd_timestamp", "have a time before 1970-01-02 or after 2099"),
    ):
        if not (rows := log.undated[reason]):
            continue
        faulty = _faulty_rows(log.places[reason], reason)
        if reason == "malformed_row":
            texts = [row.get("line") or json.dumps(row) for row in faulty]
        else:
            name = _stored_name(log.places[reason].table, "timestamp")
            texts = [str(row[name]) for row in faulty if row.get(name) is not None]
        examples = f", such as {_examples(texts)}" if texts else ""
        findings.remarks.append(f"{rows:,} rows ({percent(rows, num_rows)}) {what}{examples}.")
        if reason == "bad_timestamp" and texts and (pattern := guesses.time_format(texts)):
            findings.change("source.timestamp_format", pattern, f"reads {_examples(texts[:1])}")


def _faulty_rows(place: Place, reason: str) -> list[dict[str, Any]]:
    """The unchanged rows of the batch that have this reason; [] for a batch late in its file, which takes too long."""
    if place.batch >= _BATCHES:
        return []
    batch = next(islice(place.table.read(place.split), place.batch, None))
    is_faulty = batch.column(MALFORMED)
    if reason == "bad_timestamp":
        is_faulty = pc.and_not(batch.column("timestamp").is_null(), is_faulty)
    elif reason == "absurd_timestamp":
        years = pc.year(batch.column("timestamp"))
        is_faulty = pc.fill_null(pc.or_(pc.less(years, 1971), pc.greater(years, 2099)), False)
    rows = batch.column(ROW).filter(is_faulty).slice(0, _FORMAT_EXAMPLES).to_pylist()
    return [json.loads(row) for row in rows]


def _stored_name(table: Table, column: str) -> str:
    """The file's name of `column`."""
    return next((o.name for o in table.origins if o.column.name == column and isinstance(o, Stored)), column)


def _listed(names: Mapping[str, int], most: int = 8) -> str:
    shown = [f"{name} ({rows:,})" for name, rows in list(names.items())[:most]]
    return ", ".join([*shown, f"{len(names) - most} others"] if len(names) > most else shown)


def _examples(values: list[Any]) -> str:
    return ", ".join(repr(value[:60]) for value in values[:_EXAMPLES])

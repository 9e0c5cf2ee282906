"""Sentences on a window of the log that a run cannot use: it has no usable events, or no clicks."""

from collections import Counter
from collections.abc import Callable, Sequence

from notellm2_core.config.source import EventSettings
from notellm2_core.tables.log import Span


def no_events(
    name: str,
    days: Span,
    settings: EventSettings,
    dropped: Counter[str],
    event_names: Sequence[str],
    example_ids: Callable[[], tuple[str, str]],
) -> str:
    """Why the window `name` has no usable events, and which setting to change.

    `dropped`: its events by the reason that dropped them. `event_names`: those that occur in it.
    `example_ids`: a note_id of its events, and one of the notes.
    """
    problem = f"no usable events in the {name} window, {_written(days)}:"
    reason = next(iter(dict(dropped.most_common())), "")
    if reason == "unknown_event":
        return (
            f"{problem} the log's event names are {', '.join(event_names)}, the settings know "
            f"{', '.join(settings.event_names)}; set source.view_events and source.click_events."
        )
    if reason == "robot":
        return (
            f"{problem} most are of robots ({dropped['robot']} of {dropped.total()} valid rows); raise "
            "source.max_events_per_day."
        )
    if reason == "unknown_note":
        of_log, of_notes = example_ids()
        return (
            f"{problem} the log's notes are not among the notes; a note_id of the log is {of_log!r}, one of the notes "
            f"{of_notes!r}."
        )
    reasons = ", ".join(f"{rows} {key}" for key, rows in dropped.most_common()) or "nothing"
    return f"{problem} dropped: {reasons}; set window.end (or WEEK) and window.{name}_days."


def no_clicks(name: str, days: Span, settings: EventSettings, event_names: Sequence[str], has_weights: bool) -> str:
    """That the window `name` has no clicks, and which setting to change."""
    by_weight = " Clicks of weight 0 are views." if has_weights else ""
    return (
        f"no clicks in the {name} window, {_written(days)}: set source.click_events, now "
        f"{list(settings.click_events)}, to names that occur ({', '.join(event_names)}), or window.end.{by_weight}"
    )


def _written(days: Span) -> str:
    return f"{days[0]} to {days[1]} (exclusive)"

"""Days and weeks: which of them a configuration reads."""

from dataclasses import dataclass
from datetime import date, timedelta


@dataclass(frozen=True)
class Days:
    """A half-open range of days [start, end), UTC."""

    start: date
    end: date

    def iso(self) -> tuple[str, str]:
        return self.start.isoformat(), self.end.isoformat()


@dataclass(frozen=True)
class ResolvedWindow:
    train: Days
    test: Days


def first_day_of_week(day: date) -> date:
    """Weeks run from Sunday to Saturday, so that the Sunday 03:00 retrain reads the week that has just ended."""
    return day - timedelta(days=(day.weekday() + 1) % 7)


def last_complete_week_end(last_day: date) -> date:
    """The exclusive end of the last week that a log covers whose last event is of `last_day`.

    A log whose last event falls on a Saturday covers that week; one that stops on a Friday does not.
    """
    return first_day_of_week(last_day + timedelta(days=1))

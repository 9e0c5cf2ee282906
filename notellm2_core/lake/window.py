"""The days that a configuration reads, and where weeks end."""

from dataclasses import dataclass
from datetime import date, timedelta

from notellm2_core.config.data import WindowSettings


@dataclass(frozen=True)
class Days:
    """A half-open range of days [start, end), UTC."""

    start: date
    end: date

    def __contains__(self, day: date) -> bool:
        return self.start <= day < self.end

    def days(self) -> list[date]:
        return [self.start + timedelta(days=n) for n in range((self.end - self.start).days)]

    def iso(self) -> tuple[str, str]:
        return self.start.isoformat(), self.end.isoformat()


@dataclass(frozen=True)
class ResolvedWindow:
    """The days of the training pairs and of the test pairs."""

    train: Days
    test: Days

    @property
    def last_week(self) -> date:
        """The first day of the week that holds the last test day."""
        return first_day_of_week(self.test.end - timedelta(days=1))


def first_day_of_week(day: date) -> date:
    """The Sunday on or before `day`: weeks end on Saturday, so the Sunday 03:00 retrain reads a week that has ended."""
    return day - timedelta(days=(day.weekday() + 1) % 7)


def last_complete_week_end(last_day: date) -> date:
    """The exclusive end of the last complete week of a log that ends on `last_day`.

    A log that ends on a Saturday covers that week; one that ends on a Friday does not.
    """
    return first_day_of_week(last_day + timedelta(days=1))


def weeks_of(days: Days) -> list[date]:
    """The first days of the weeks that hold any of `days`."""
    first, last = first_day_of_week(days.start), first_day_of_week(days.end - timedelta(days=1))
    return [first + timedelta(weeks=n) for n in range((last - first).days // 7 + 1)]


def weeks_before(end: date, num: int) -> list[Days]:
    """The last `num` weeks of seven days that end on `end` (exclusive), the oldest first."""
    starts = [end - timedelta(weeks=n) for n in range(num, 0, -1)]
    return [Days(start, start + timedelta(days=7)) for start in starts]


def resolved_window(settings: WindowSettings, end: date) -> ResolvedWindow:
    """The training and the test days of a window that ends before the day `end`."""
    if settings.test_days is None:
        days = Days(end - timedelta(days=settings.train_days), end)
        return ResolvedWindow(days, days)
    middle = end - timedelta(days=settings.test_days)
    return ResolvedWindow(Days(middle - timedelta(days=settings.train_days), middle), Days(middle, end))

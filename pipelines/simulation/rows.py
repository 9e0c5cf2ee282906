"""What became of the weeks of a simulated year, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

_QUARTER = 6  # weeks; a shorter simulation says nothing about the growth of Dagster's database


@dataclass(frozen=True)
class Row:
    """What became of a week."""

    week: str
    logs: str
    decision: str
    why: str
    recall: float | None
    live: str  # the champion after it
    releases: int  # on the disk
    lake_mb: float  # without the log
    release_mb: float  # of the newest release and what it was made from, without the log; it grows with the catalogue
    history_mb: float  # of Dagster's database
    seconds: float


def to_line(number: int, row: Row) -> str:
    """A row of the table."""
    recall = "" if row.recall is None else f"{row.recall:.1f}"
    cells = (number, row.week, row.logs, row.decision, recall, row.live, row.releases, f"{row.lake_mb:.0f}",
             f"{row.release_mb:.0f}", f"{row.history_mb:.0f}", f"{row.seconds:.0f}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def disk_faults(rows: Sequence[Row], keep: int) -> list[str]:
    """What took more of the disk than it may, in sentences. keep: releases that retention keeps.

    Allowed are three more (the champion, the one before it, and the newest), and a lake of 1.2 (keep + 3) times what
    the newest release takes.
    """
    faults = []
    if (most := max(row.releases for row in rows)) > keep + 3:
        faults.append(f"{most} releases lay on the disk")
    for row in rows:
        if row.lake_mb > 1.2 * (keep + 3) * row.release_mb:
            faults.append(f"after {row.week} the lake had {row.lake_mb:.0f} MB, and a release {row.release_mb:.0f} MB")
    quarter = len(rows) // 4
    second, last = (max((row.history_mb for row in rows[quarter * n : quarter * (n + 1)]), default=0.0) for n in (1, 3))
    if quarter >= _QUARTER and last > 1.5 * second:
        faults.append(f"Dagster's database has grown from {second:.0f} MB in the second quarter to {last:.0f} MB")
    return faults

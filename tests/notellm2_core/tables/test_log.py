"""A log as a whole: its last day, its worst file, and the partitions of a window."""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from notellm2_core.tables.log import (
    UNDATED,
    covered_until,
    ingested_together,
    ingestion_metrics,
    missing_days,
    partitions_between,
)


def test_a_broken_file_does_not_hide_behind_good_ones() -> None:
    """In b, one row of two is undated; in the whole log, one of six. c is too small to count."""

    def ingestion(file: str, placed: int, undated: int) -> dict[str, Any]:
        rows = {"2024-01-07": placed, UNDATED: undated}
        return {"files": [file], "rows": rows, "days": {"2024-01-07": placed}, "events": {"view": placed + undated}}

    ingestions = [ingestion("a", 400, 0), ingestion("b", 100, 100), ingestion("c", 0, 1)]
    assert ingestion_metrics(Path(), ingestions)["most_undated"] == {"file": "b", "share": 0.5}


def test_a_few_wrong_clocks_do_not_move_the_end_of_the_log() -> None:
    """A usual day has 500 rows, so a day with fewer than 5 does not count, however many such days there are. In a thin
    log of one row a day, every day counts.
    """
    days = {"2025-01-20": 500, "2025-01-21": 480, "2025-01-22": 510, "2025-01-25": 4, "2031-01-01": 1}
    assert covered_until(days) == "2025-01-22"
    assert covered_until(days | {"2025-01-25": 5}) == "2025-01-25"
    assert covered_until(days | {f"20{year}-01-01": 1 for year in range(32, 99)}) == "2025-01-22"
    assert covered_until({"2025-01-20": 1, "2025-02-20": 1}) == "2025-02-20"


def test_partitions_of_a_window() -> None:
    """The partitions that overlap the window, with the days of the overlap.

    The error for a window outside the log names the days of both.
    """
    names = ["2025-01-05", "2025-01-12", "2025-01-26", UNDATED]  # the week of the 19th has no event
    ingested = {
        "partitions": [{"partition": n, "rows": 1} for n in names],
        "first_day": "2025-01-06",
        "last_day": "2025-01-30",
    }

    def chosen(start: int, end: int) -> list[tuple[str, int, int]]:
        overlaps = partitions_between(date(2025, 1, start), date(2025, 1, end), "week", **ingested, rows=4)  # type: ignore[arg-type]
        return [(partition[-2:], *(day.day for day in days)) for partition, days in overlaps]

    assert chosen(12, 26) == [("12", 12, 19)]
    assert chosen(11, 27) == [("05", 11, 12), ("12", 12, 19), ("26", 26, 27)]
    assert chosen(20, 21) == []
    whole = {**ingested, "partitions": [{"partition": "2025-01-01", "rows": 1}]}
    assert partitions_between(date(2024, 6, 1), date(2026, 1, 1), "year", **whole) == [  # type: ignore[arg-type]
        ("2025-01-01", (date(2025, 1, 1), date(2026, 1, 1)))
    ]
    for start, end in ((1, 5), (31, 32)):
        days = date(2025, 1, start), date(2025, 1, 1) + timedelta(days=end - 1)
        with pytest.raises(ValueError, match=f"from 2025-01-06 to 2025-01-30, not into the window from {days[0]} to"):
            partitions_between(*days, "week", **ingested)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_files", "sizes"), [(0, []), (3, [1, 1, 1]), (64, [1] * 64), (65, [2] * 32 + [1])])
def test_files_are_ingested_together(num_files: int, sizes: list[int]) -> None:
    """Each file is an ingestion by itself, unless that makes more than 64."""
    files = [f"events/{i:02d}.parquet" for i in range(num_files)]
    groups = ingested_together(files)
    assert [len(g) for g in groups] == sizes and [f for g in groups for f in g] == files


def test_days_of_a_week_that_have_not_arrived() -> None:
    """A tenth of what is usual on that day of the week; days that are usually nearly empty may be empty."""
    first = date(2025, 1, 5)
    usual = {str(first + timedelta(days=n)): 0 if n % 7 == 6 else 100 for n in range(28)}  # nothing on Saturdays
    week = (date(2025, 2, 2), date(2025, 2, 9))
    arrived = {str(week[0] + timedelta(days=n)): rows for n, rows in enumerate((60, 10, 9, 0, 300, 100, 0))}
    assert missing_days(usual | arrived, week) == ["2025-02-04", "2025-02-05"]
    assert missing_days(usual, week)[:2] == ["2025-02-02", "2025-02-03"]
    assert missing_days(arrived, week) == []  # nothing is usual yet

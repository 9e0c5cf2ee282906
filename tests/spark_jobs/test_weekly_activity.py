"""The activity of each week, beside a plain reckoning of the same figures."""

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from notellm2_core.schema import INTERACTIONS
from spark_jobs.weekly_activity import BUSY, weekly_activity

END = date(2024, 2, 4)
START = END - timedelta(days=28)
Row = tuple[str, str, int, int | None, int, int]  # user, note, hours of first view and last click, events, clicks


def _time(hour: int | None) -> datetime | None:
    """A time, in hours since START."""
    return None if hour is None else datetime(START.year, START.month, START.day, tzinfo=UTC) + timedelta(hours=hour)


def _write(folder: Path, rows: list[Row]) -> Path:
    records = [
        dict(zip(INTERACTIONS.names, (user, note, _time(first), _time(last), events, clicks), strict=True))
        for user, note, first, last, events, clicks in rows
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records, schema=INTERACTIONS), folder / "part.parquet")
    return folder


def _plain(rows: list[Row], num_weeks: int) -> list[dict[str, Any]]:
    """The same figures, in the order of the definitions."""
    weeks: list[dict[str, Any]] = []
    clicked_before: list[set[tuple[str, str]]] = []
    for number in range(4 - num_weeks, 4):
        own = [row for row in rows if number * 168 <= row[2] < (number + 1) * 168]
        if not own:
            continue
        total = sum(row[4] for row in own)
        by_note, by_user, first, last, events = (Counter[Any](), Counter[Any](), {}, {}, Counter[Any]())
        for user, note, view, click, num, _ in own:
            by_note[note] += num
            by_user[user] += num
            events[user, note] += num
            first[user, note] = min(view, first.get((user, note), view))
            if click is not None:
                last[user, note] = max(click, last.get((user, note), click))
        hours = Counter[int]()
        for pair, view in first.items():
            hours[view % 24] += events[pair]
        busy = [num for num in by_user.values() if num > BUSY * mean(by_user.values())]
        clicked = {*last}
        overlaps = [len(clicked & earlier) for earlier in clicked_before]
        weeks.append(
            {
                "first_day": str(START + timedelta(weeks=number)),
                "events": total,
                "clicks": sum(row[5] for row in own),
                "users": len(by_user),
                "clicked": len(clicked),
                "viewed_before": sum(first[pair] < last[pair] for pair in clicked),
                "hours": [hours[hour] / total for hour in range(24)],
                "top_note": max(by_note.values()) / total,
                "busy_users": sum(busy) / total,
                "repeated": max(overlaps) / len(clicked) if weeks and clicked else None,
            }
        )
        clicked_before.append(clicked)
    return weeks


_ROW = st.builds(
    lambda user, note, hour, wait, views: (user, note, hour, None if wait is None else hour + wait,
                                           views + (wait is not None), int(wait is not None)),
    st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.integers(0, 4 * 168 - 1),
    st.none() | st.integers(0, 3), st.integers(1, 5),
)  # fmt: skip


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROW, min_size=1, max_size=40), cut=st.integers(0, 40), num_weeks=st.integers(2, 6))
def test_figures_equal_plain_ones(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, rows: list[Row], cut: int, num_weeks: int
) -> None:
    folder = tmp_path_factory.mktemp("weeks")
    tables = [_write(folder / "train", rows[:cut]), _write(folder / "test", rows[cut:])]
    found = weekly_activity(spark, tables, START, END, num_weeks)
    wanted = _plain(rows, min(num_weeks, 4))
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.pop("hours") == pytest.approx(theirs.pop("hours"))
        assert mine == pytest.approx(theirs)


def test_busy_users_have_more_than_ten_times_the_mean(spark: SparkSession, tmp_path: Path) -> None:
    """41 users have 410 events, so one with 101 events is busy, and one with 100 is not."""
    rows: list[Row] = [(f"u{n}", "x", 600, None, {0: 101, 1: 100, 2: 14}.get(n, 5), 0) for n in range(41)]
    assert sum(row[4] for row in rows) == 405
    rows[3] = ("u3", "x", 600, None, 10, 0)
    (week,) = weekly_activity(spark, [_write(tmp_path / "test", rows)], START, END, 9)
    assert week["busy_users"] == pytest.approx(101 / 410) and week["top_note"] == 1.0

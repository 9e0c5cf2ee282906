"""Ingested partitions -> interactions -> windows: every row is used or counted, and an empty window is explained."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from notellm2_core.config.source import EventReadingSettings, EventSettings
from notellm2_core.tables.log import UNDATED, Span, ingestion_metrics, partitions_between
from spark_jobs.ingest import ingest
from spark_jobs.interactions import interactions, reduce_partitions, reduced
from spark_jobs.window import Window, join_partitions
from tests.spark_jobs.conftest import EVENTS, WEIGHED_EVENTS, Frame
from tests.spark_jobs.test_source import write_csv

NAMES = {"view_events": ["view"], "click_events": ["click"], "ignored_events": ["share"], "max_events_per_day": None}
TRAIN, TEST = (date(2024, 1, 1), date(2024, 1, 8)), (date(2024, 1, 8), date(2024, 1, 15))


def ingested(spark: SparkSession, folder: Path, lines: list[str]) -> dict[str, Any]:
    """Ingest `lines` into `folder`/raw. Returns the metrics of the log."""
    write_csv(folder / "events.csv", lines)
    return ingestion_metrics(folder, [ingest(spark, folder, folder / "raw", "week")])


def joined(
    spark: SparkSession,
    raw: Path,
    log: Mapping[str, Any],
    out: Path,
    train: Span = TRAIN,
    test: Span = TEST,
    note_ids: Sequence[str] = ("n1", "n2"),
    every_time: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Reduce the partitions `raw` of a log with the metrics `log`, and join them to windows in the new folder `out`."""
    settings = EventSettings(**NAMES | changes)
    (out / "notes").mkdir(parents=True)
    pq.write_table(pa.table({"note_id": list(note_ids)}), out / "notes" / "part.parquet")
    overlaps = {span: partitions_between(*span, "week", **log) for span in (train, test)}
    undated: list[tuple[str, Span | None]] = [(UNDATED, None)] if (raw / UNDATED).exists() else []
    days = {f"{partition} {span}": span for partition, span in [*overlaps[train], *overlaps[test], *undated]}
    paths = {name: raw / name.split(" ")[0] for name in days}
    metrics = reduce_partitions(spark, paths, days, out / "partitions", settings, every_time)

    def metrics_of(partitions: Sequence[tuple[str, Span | None]]) -> dict[Path, dict[str, Any]]:
        names = [f"{partition} {span}" for partition, span in partitions]
        return {out / "partitions" / name: metrics[name] for name in names}

    train_window, test_window = (Window(*span, metrics_of(overlaps[span])) for span in (train, test))
    return join_partitions(spark, train_window, test_window, metrics_of(undated), out / "notes", out, settings)


def prepared(spark: SparkSession, folder: Path, lines: list[str], **options: Any) -> dict[str, Any]:
    """Ingest `lines`, and join them to windows in `folder`/out."""
    return joined(spark, folder / "raw", ingested(spark, folder, lines), folder / "out", **options)


LINES = [
    "u1,n1,2024-01-01,view",
    "u1,n1,2024-01-01,view",  # the same again
    " u1 , n1 ,1704067200, view ",  # and again, in another form
    "u1,n1,2024-01-01,click",  # another event of the same time
    "u2,n2,2024-01-07T23:59:59.999999Z,click",  # the last moment of the training window
    "u2,n2,2024-01-08,click",  # the first of the test window
    "u2,n2,2024-01-15,click",  # the end is exclusive
    "u2,n2,2023-12-31,click",
    "u1,n1,whenever,view",
    ",n1,2024-01-02,view",
    "u1, ,2024-01-02,view",
    "u1,n1,2024-01-02,purchase",
    "u1,n1,2024-01-02,",
    "u1,n9,2024-01-02,view",
    "u1,n1,2024-01-02,share",
]


def test_every_row_is_used_or_counted(spark: SparkSession, tmp_path: Path) -> None:
    counts = prepared(spark, tmp_path, LINES)
    dropped = {
        "bad_timestamp": 1, "null_user": 1, "null_note": 1, "unknown_event": 2, "unknown_note": 1, "duplicate_event": 2,
    }  # fmt: skip
    assert counts["dropped"] == dropped
    assert (counts["rows"], counts["ignored_event"]) == (13, 1)  # two are outside the windows
    assert counts["train"] == {
        "events": 3, "clicks": 2, "views": 1, "users": 2, "notes": 2,
        "first_day": "2024-01-01", "last_day": "2024-01-07",
    }  # fmt: skip
    assert counts["test"]["events"] == 1
    assert counts["rows"] == 1 + sum(dropped.values()) + 3 + 1
    train = pq.read_table(tmp_path / "out" / "train")
    assert [(f.name, f.type) for f in train.schema] == [(f.name, f.type) for f in schema.INTERACTIONS]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert Counter(q["reason"] for q in quarantine) == dropped
    rows = [json.loads(q["row"]) for q in quarantine]
    assert {"user_id": "u1", "note_id": "n1", "timestamp": "whenever", "event": "view"} in rows


def test_robots_and_absurd_times(spark: SparkSession, tmp_path: Path) -> None:
    """A user with three events on a day, of any kind and note, is a robot where the limit is two. Its other days are
    dropped too.

    Repeated rows count; ignored and unknown events do not. Times on the first day of 1970 (a clock that was never set)
    and in the future count for no user.
    """
    lines = [
        "robot,n1,2024-01-01T00:00,view",
        "robot,n1,2024-01-01T00:00,view",
        "robot,n9,2024-01-01T23:59,click",
        "robot,n2,2024-01-09,click",
        "busy,n1,2024-01-01,view",
        "busy,n2,2024-01-01,click",
        "busy,n2,2024-01-01,share",
        "busy,n2,2024-01-01,purchase",
        "busy,n1,2024-01-02,view",
        "busy,n1,2024-01-09,click",
        "busy,n1,0,view",
        "busy,n1,86399,view",
        "busy,n1,2999-01-01,view",
        ",n1,2024-01-03,view",
        ",n1,2024-01-03T01:00,view",
        ",n1,2024-01-03T02:00,view",
    ]
    counts = prepared(spark, tmp_path, lines, max_events_per_day=2)
    assert counts["dropped"] == {
        "robot": 3, "absurd_timestamp": 3, "null_user": 3, "unknown_event": 1, "duplicate_event": 1,
    }  # fmt: skip
    assert (counts["robots"], counts["train"]["events"], counts["test"]["events"]) == (1, 3, 1)


def test_equal_windows_and_other_names(spark: SparkSession, tmp_path: Path) -> None:
    """The log has one type of event, which is a view and a click."""
    counts = prepared(spark, tmp_path, ["u1,n1,2024-01-01,bought"], test=TRAIN, view_events=[], click_events=["bought"])
    assert counts["test"] == counts["train"] and counts["train"]["clicks"] == 1
    for name in ("train", "test"):
        assert pq.read_table(tmp_path / "out" / name).num_rows == 1


def test_rows_by_time_and_by_weight(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    """What a limit between view and click needs, and what weights need. A purchase weighs 5, a like 1.

    The events of a user and a note, by day of January: 1 view, 2 like, 2 buy, 3 like, 4 view, 9 buy (the next week).
    """
    log = [(1, "view"), (2, "like"), (2, "buy"), (3, "like"), (4, "view"), (9, "buy")]
    names = {"click_events": ["like", "buy"], "event_weights": {"buy": 5}}
    events = frame(EVENTS, [("u1", "n1", datetime(2024, 1, day, tzinfo=UTC), event) for day, event in log])

    def days(table: pa.Table) -> list[tuple[int | float | None, ...]]:
        columns = [
            c for c in ("first_view", "last_click", "events", "clicks", "click_weight") if c in table.column_names
        ]
        rows = table.select(columns).to_pylist()
        return sorted((tuple(getattr(v, "day", v) for v in row.values()) for row in rows), key=str)

    def rows(every_time: bool, **changes: Any) -> list[tuple[int | float | None, ...]]:
        return days(reduced(interactions(events, EventSettings(**NAMES | names | changes)), every_time).toArrow())

    assert rows(False, event_weights=None) == [(1, 9, 6, 4)]
    assert rows(True, event_weights=None) == [
        (1, None, 1, 0), (2, 2, 2, 2), (3, 3, 1, 1), (4, None, 1, 0), (9, 9, 1, 1)
    ]  # fmt: skip
    assert rows(False) == [(1, 9, 6, 4, 5.0)]  # the purchase on the 9th outweighs all clicks before it
    assert rows(False, event_weights={"like": 7}) == [(1, 3, 5, 3, 7.0), (9, 9, 1, 1, 1.0)]
    by_time = [(1, None, 1, 0, None), (2, 2, 2, 2, 5.0), (3, 3, 1, 1, 1.0), (4, None, 1, 0, None), (9, 9, 1, 1, 5.0)]
    assert rows(True) == by_time
    lines, both = [f"u1,n1,2024-01-0{day},{event}" for day, event in log], (TRAIN[0], TEST[1])
    counts = prepared(spark, tmp_path, lines, train=both, test=both, every_time=True, **names)
    assert (counts["train"]["events"], counts["train"]["clicks"]) == (6, 4)
    assert days(pq.read_table(tmp_path / "out" / "test")) == by_time


def test_weights_of_rows(frame: Frame) -> None:
    """A click of weight 0 is a view; weights of views do not count. Clicks by day and weight: 1: 4, 2: 0, 3: 2.5, 5: 3.

    The click on the 5th outweighs that on the 3rd, and that on the 1st outweighs both; the views join it.
    """
    log = [(1, "click", 4.0), (2, "click", 0.0), (3, "click", 2.5), (4, "view", None), (5, "click", 3.0)]
    events = frame(WEIGHED_EVENTS, [("u", "n", datetime(2024, 1, d, tzinfo=UTC), name, w) for d, name, w in log])
    for event_weights, factor in ((None, 1), ({"click": 2}, 2)):
        rows = reduced(interactions(events, EventSettings(**NAMES, event_weights=event_weights)), False).collect()
        assert sorted((r.first_view.day, r.last_click.day, r.events, r.clicks, r.click_weight) for r in rows) == [
            (1, 1, 3, 1, factor * 4.0), (3, 5, 2, 2, factor * 3.0),
        ]  # fmt: skip


def test_clicks_without_a_usable_weight_are_quarantined(spark: SparkSession, tmp_path: Path) -> None:
    """Weights of ignored events and of views are not looked at. Rows that differ in their weight are two events."""
    bad = ["", "many", "nan", "inf", "-1", "1e9999", "1000000001"]
    lines = [*(f"u1,n1,2024-01-02,click,{weight}" for weight in bad),
             "u1,n1,2024-01-01,view,", "u1,n1,2024-01-02,share,x",
             *(f"u1,n2,2024-01-03,click,{weight}" for weight in ("2", "2.0", "1e9", "0"))]  # fmt: skip
    write_csv(tmp_path / "events.csv", lines, header="user_id,note_id,timestamp,event,value")
    reading = EventReadingSettings(columns={"weight": "value"})
    log = ingestion_metrics(tmp_path, [ingest(spark, tmp_path, tmp_path / "raw", "week", None, reading)])
    counts = joined(spark, tmp_path / "raw", log, tmp_path / "out", test=TRAIN)
    assert counts["dropped"] == {"bad_weight": len(bad), "duplicate_event": 1} and counts["ignored_event"] == 1
    assert (counts["train"]["events"], counts["train"]["clicks"]) == (4, 2)
    rows = pq.read_table(tmp_path / "out" / "train").to_pylist()
    assert [(r["note_id"], r["events"], r["clicks"], r["click_weight"]) for r in rows] == [
        ("n1", 1, 0, None), ("n2", 3, 2, 1e9),
    ]  # fmt: skip
    quarantine = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert {"user_id": "u1", "note_id": "n1", "timestamp": "2024-01-02", "event": "click", "value": "many"} in [
        json.loads(q["row"]) for q in quarantine
    ]


def test_an_empty_window_names_the_setting_and_the_days_of_the_data(spark: SparkSession, tmp_path: Path) -> None:
    """All cases use one ingested log. If the limit is one event on a day, u1 and u2 are robots. The train window up to
    January 7th then has three valid rows: two of u1, and one of u3 with an unknown note.
    """
    log = ingested(spark, tmp_path, [*LINES[:7], "u3,n9,2024-01-02,view", "u2,n1,2024-01-08,view"])
    numbers = count()

    def fails(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            joined(spark, tmp_path / "raw", log, tmp_path / f"out{next(numbers)}", **options)

    without_rows, before_7th = (date(2024, 1, 10), date(2024, 1, 12)), (date(2024, 1, 1), date(2024, 1, 7))
    fails(r"no usable events in the test window, 2024-01-10 to .*window.end \(or WEEK\)", test=without_rows)
    fails(
        r"train window, 2024-01-01 to .* most are of robots \(2 of 3 valid rows\); raise source.max_events",
        train=before_7th,
        max_events_per_day=1,
    )
    fails(
        r"no clicks in the train window.*source.click_events, now \['buy'\].*click",
        view_events=["view", "click"],
        click_events=["buy"],
    )
    fails(
        r"the log's event names are view, click, the settings know buy, seen; set",
        view_events=["seen"],
        click_events=["buy"],
        ignored_events=[],
    )
    fails(r"notes are not among the notes; a note_id of the log is 'n1', one of .* 'N1'", note_ids=["N1", "N2"])

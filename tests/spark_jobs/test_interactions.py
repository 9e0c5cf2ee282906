"""Ingested partitions -> interactions -> windows: every row kept or counted, and parts reused without a difference."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from notellm2_core.config.data import EventSettings
from spark_jobs.ingest import UNDATED, Span, ingest, ingestion_metrics, partitions_between
from spark_jobs.interactions import Window, join_partitions, reduce_partitions
from tests.spark_jobs.test_source import write_csv

NAMES = {"view_events": ["view"], "click_events": ["click"], "ignored_events": ["share"], "max_events_per_day": None}
TRAIN, TEST = (date(2024, 1, 1), date(2024, 1, 8)), (date(2024, 1, 8), date(2024, 1, 15))


def prepared(
    spark: SparkSession,
    folder: Path,
    lines: list[str],
    train: Span = TRAIN,
    test: Span = TEST,
    **changes: Any,
) -> dict[str, Any]:
    """Land `lines`, reduce their partitions and join them to windows, with the notes n1 and n2, in `folder`/out."""
    settings = EventSettings(**NAMES | changes)
    folder.mkdir(exist_ok=True)
    write_csv(folder / "events.csv", lines)
    ingested = ingestion_metrics(folder, [ingest(spark, folder, folder / "raw", "week")])
    (folder / "notes").mkdir()
    pq.write_table(pa.table({"note_id": ["n1", "n2"]}), folder / "notes" / "part.parquet")

    def reduced(parts: Sequence[tuple[str, Span | None]]) -> dict[Path, dict[str, Any]]:
        days = {f"{partition} {of}": of for partition, of in parts}
        paths = {f"{partition} {of}": folder / "raw" / partition for partition, of in parts}
        metrics = reduce_partitions(spark, paths, days, folder / "partitions", settings) if parts else {}
        return {folder / "partitions" / name: counts for name, counts in metrics.items()}

    windows = [
        Window(*days, reduced(partitions_between(*days, "week", **ingested))) for days in dict.fromkeys((train, test))
    ]
    undated = reduced([(UNDATED, None)]) if (folder / "raw" / UNDATED).exists() else {}
    return join_partitions(spark, windows[0], windows[-1], undated, folder / "notes", folder / "out", settings)


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


def test_every_row_is_kept_or_counted(spark: SparkSession, tmp_path: Path) -> None:
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
    """Three events on a day, of any kind and note, are a robot's where two are the most; its other days fall with them.

    Repeated rows count, ignored and unknown events do not. Times of the first day of 1970, as of a clock that was never
    set, and of the future are no user's at all.
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
    """A log with one type of event only, which is a view and a click."""
    counts = prepared(
        spark, tmp_path, ["u1,n1,2024-01-01,bought"], TRAIN, TRAIN, view_events=[], click_events=["bought"]
    )
    assert counts["test"] == counts["train"] and counts["train"]["clicks"] == 1
    for name in ("train", "test"):
        assert pq.read_table(tmp_path / "out" / name).num_rows == 1


def test_an_empty_window_names_the_setting_and_the_days_of_the_data(spark: SparkSession, tmp_path: Path) -> None:
    gap = date(2024, 1, 10), date(2024, 1, 12)
    with pytest.raises(
        ValueError, match=r"no usable events in the test window, 2024-01-10 to .*window.end \(or WEEK\)"
    ):
        prepared(spark, tmp_path / "b", LINES, test=gap)
    with pytest.raises(ValueError, match=r"train window, 2024-01-01 to .* all are of robots; raise source.max_events"):
        lines = ["u1,n1,2024-01-01,view", "u1,n2,2024-01-01,click", "u2,n2,2024-01-08,click"]
        prepared(spark, tmp_path / "f", lines, max_events_per_day=1)
    with pytest.raises(ValueError, match=r"no clicks in the train window.*source.click_events, now \['buy'\].*click"):
        prepared(spark, tmp_path / "c", LINES, view_events=["view", "click"], click_events=["buy"])
    with pytest.raises(ValueError, match=r"the log's event names are view, click, the settings know buy, seen; set"):
        prepared(spark, tmp_path / "d", LINES[:7], view_events=["seen"], click_events=["buy"], ignored_events=[])
    with pytest.raises(
        ValueError, match=r"notes are not in notes.parquet; a note_id of the log is 'N1', one of .* 'n1'"
    ):
        prepared(spark, tmp_path / "e", [line.replace("n", "N") for line in LINES[:7]])

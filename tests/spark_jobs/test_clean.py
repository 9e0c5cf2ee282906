import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from spark_jobs.clean import prepare_events, prepare_notes
from spark_jobs.source import land
from tests.spark_jobs.test_source import write_csv

NAMES = {"view_events": ["view"], "click_events": ["click"], "ignored_events": ["share"]}
WINDOWS = {
    "train_start": date(2024, 1, 1),
    "train_end": date(2024, 1, 8),
    "test_start": date(2024, 1, 8),
    "test_end": date(2024, 1, 15),
}


def written_notes(spark: SparkSession, folder: Path, **columns: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
    pq.write_table(pa.table(columns), folder / "notes.parquet", row_group_size=2)
    counts = prepare_notes(spark, folder, folder / "out")
    return counts, *(pq.read_table(folder / "out" / name).to_pylist() for name in ("notes", "quarantine"))


def test_notes_are_validated_and_the_rest_is_quarantined(spark: SparkSession, tmp_path: Path) -> None:
    """Row by row: kept; replaced by a later row; null id; blank id; the last of its id; nothing; picture only."""
    counts, notes, quarantine = written_notes(
        spark, tmp_path,
        note_id=[" a ", "b", None, " ", "b", "empty", "picture", "topic"],
        title=["A", "old", "x", "x", "new", None, None, None],
        topics=["x| y ||z", "q", "q", "q", None, " | ", None, "only"],
        content=[None, "", "", "", "B", " \n", "", None],
        image_path=[" ", None, None, None, "b.png", "", "../../etc/passwd", None],
        image=[None, b"1", None, None, b"", b"", None, None],
        extra=range(8),
    )  # fmt: skip
    assert counts["dropped"] == {"null_note_id": 2, "duplicate_note_id": 1, "empty_note": 1}
    assert {k: v for k, v in counts.items() if k != "dropped"} == {
        "rows": 8, "notes": 4, "with_text": 3, "with_image": 2,
    }  # fmt: skip
    assert notes == [
        {"note_id": "a", "title": "A", "topics": ["x", "y", "z"], "content": "", "image_path": None, "image": None},
        {"note_id": "b", "title": "new", "topics": [], "content": "B", "image_path": "b.png", "image": None},
        {
            "note_id": "picture",
            "title": "",
            "topics": [],
            "content": "",
            "image_path": "../../etc/passwd",
            "image": None,
        },
        {"note_id": "topic", "title": "", "topics": ["only"], "content": "", "image_path": None, "image": None},
    ]
    [replaced] = [json.loads(q["row"]) for q in quarantine if q["reason"] == "duplicate_note_id"]
    assert (replaced["title"], replaced["extra"]) == ("old", 1)  # as it came, without the bytes
    assert set(replaced) == {"note_id", "title", "topics", "content", "image_path", "extra"}
    files = {name: pq.read_schema(tmp_path / "out" / name / "part-00000.parquet") for name in ("notes", "quarantine")}
    assert [(f.name, f.type) for f in files["notes"]] == [(f.name, f.type) for f in schema.NOTES]
    assert files["quarantine"].names == schema.QUARANTINE.names


def test_notes_with_whole_number_ids_lists_and_null_columns(spark: SparkSession, tmp_path: Path) -> None:
    counts, notes, _ = written_notes(
        spark, tmp_path, note_id=[7, 8], title=pa.nulls(2), topics=[["a ", None, ""], []], content=["c", "d"]
    )  # fmt: skip
    assert counts["notes"] == 2 and counts["with_image"] == 0
    assert [(n["note_id"], n["title"], n["topics"]) for n in notes] == [("7", "", ["a"]), ("8", "", [])]
    with pytest.raises(ValueError, match=r"notes\.parquet holds no usable note \(1 rows\)"):
        written_notes(spark, _new(tmp_path), note_id=[None], title=["t"], topics=["a"], content=["c"])


def _new(folder: Path) -> Path:
    (folder / "new").mkdir()
    return folder / "new"


def prepared(spark: SparkSession, folder: Path, lines: list[str], **settings: Any) -> dict[str, Any]:
    """Land `lines` and clean them against the notes n1 and n2."""
    folder.mkdir(exist_ok=True)
    write_csv(folder / "events.csv", lines)
    periods = [p["period"] for p in land(spark, folder, folder / "raw", "week")["periods"]]
    (folder / "notes").mkdir()
    pq.write_table(pa.table({"note_id": ["n1", "n2"]}), folder / "notes" / "part.parquet")
    raw = [folder / "raw" / p for p in periods]
    settings = {"max_events_per_day": None, **NAMES, **WINDOWS, **settings}
    return prepare_events(spark, raw, folder / "notes", folder / "out", **settings)


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
    assert (counts["rows"], counts["outside_window"], counts["ignored_event"]) == (15, 2, 1)
    assert counts["train"] == {
        "events": 3, "clicks": 2, "views": 1, "users": 2, "notes": 2,
        "first_day": "2024-01-01", "last_day": "2024-01-07",
    }  # fmt: skip
    assert counts["test"]["events"] == 1
    assert counts["rows"] == 2 + 1 + sum(dropped.values()) + 3 + 1
    train = pq.read_table(tmp_path / "out" / "train")
    assert [(f.name, f.type) for f in train.schema] == [(f.name, f.type) for f in schema.EVENTS]
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
    assert counts["dropped"] == {"robot": 4, "absurd_timestamp": 3, "null_user": 3, "unknown_event": 1}
    assert (counts["robots"], counts["train"]["events"], counts["test"]["events"]) == (1, 3, 1)
    assert prepared(spark, tmp_path / "b", lines, max_events_per_day=3)["robots"] == 0


def test_equal_windows_and_other_names(spark: SparkSession, tmp_path: Path) -> None:
    """A log with one type of event only, which is a view and a click."""
    same = {**WINDOWS, "test_start": WINDOWS["train_start"], "test_end": WINDOWS["train_end"]}
    names = {"view_events": [], "click_events": ["bought"], "ignored_events": []}
    counts = prepared(spark, tmp_path, ["u1,n1,2024-01-01,bought"], **same, **names)
    assert counts["test"] == counts["train"] and counts["train"]["clicks"] == 1
    for name in ("train", "test"):
        assert pq.read_table(tmp_path / "out" / name).num_rows == 1


def test_an_empty_window_names_the_setting_and_the_days_of_the_data(spark: SparkSession, tmp_path: Path) -> None:
    later = {**WINDOWS, "test_start": date(2025, 1, 1), "test_end": date(2025, 1, 8)}
    message = (
        r"no usable events in the test window, 2025-01-01 to 2025-01-08.* from 2023-12-31 to 2024-01-15.*window.end"
    )
    with pytest.raises(ValueError, match=message):
        prepared(spark, tmp_path / "a", LINES, **later)
    with pytest.raises(ValueError, match=r"no clicks in the train window.*source.click_events, now \['buy'\].*click"):
        prepared(spark, tmp_path / "b", LINES, view_events=["view", "click"], click_events=["buy"])

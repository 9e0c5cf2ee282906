"""Spark reads a user's tables through `notellm2_core.tables`, whose tests prove the values."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core.config.source import NoteReadingSettings, SourceSettings
from notellm2_core.notes.note import Note
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.tables.log import ingestion_metrics
from spark_jobs.clean import prepare_notes
from spark_jobs.common.tables import readable
from spark_jobs.ingest import ingest
from spark_jobs.source import event_files, read_source_events, read_source_notes


def write_csv(path: Path, lines: list[str], header: str = "user_id,note_id,timestamp,event") -> Path:
    text = "\n".join([header, *lines]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_events_of_several_formats_and_types(spark: SparkSession, tmp_path: Path) -> None:
    """Base log B of the field reports, in parts: whole-number ids, nanoseconds, another order of the columns."""
    folder = tmp_path / "events"
    folder.mkdir()
    write_csv(folder / "a.csv", ["1,n1,1736150400,view"])
    write_csv(folder / "b.csv.gz", ["click,1736150460,1,n2"], header="event,timestamp,user_id,note_id")
    columns = {"user_id": pa.array([1], pa.uint64()), "note_id": ["n3"], "event": ["click"],
               "timestamp": pa.array([1736150520 * 10**9 + 1], pa.timestamp("ns"))}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "c.parquet")
    (folder / "d.jsonl").write_text(
        '{"user_id": 2, "note_id": "n1", "timestamp": "2025-01-07T08:00:00Z", "event": null}\nno row\n'
    )
    assert event_files(tmp_path) == ["events/a.csv", "events/b.csv.gz", "events/c.parquet", "events/d.jsonl"]
    read = read_source_events(spark, tmp_path).selectExpr("user_id", "note_id", "unix_seconds(timestamp)", "event",
                                                          "malformed")  # fmt: skip
    assert sorted(map(tuple, read.collect()), key=str) == [
        ("1", "n1", 1736150400, "view", False),
        ("1", "n2", 1736150460, "click", False),
        ("1", "n3", 1736150520, "click", False),
        ("2", "n1", 1736236800, None, False),
        (None, None, None, None, True),
    ]
    some = read_source_events(spark, tmp_path, ["events/c.parquet"])
    assert [row.note_id for row in some.collect()] == ["n3"]


def test_the_position_orders_notes_as_in_their_files(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    columns: dict[str, Any] = {name: ["x"] * 5 for name in ("title", "topics", "content")}
    pq.write_table(pa.table({"note_id": [3, 1, 4, 1, 5], **columns}), folder / "a.parquet", row_group_size=2)
    (folder / "b.csv").write_text("note_id,title,topics,content\n9,x,x,x\n2,x,x,x\n")
    notes = read_source_notes(spark, tmp_path).orderBy("position").collect()
    assert [row.note_id for row in notes] == ["3", "1", "4", "1", "5", "9", "2"]


def test_events_that_cannot_be_used_are_named(spark: SparkSession, tmp_path: Path) -> None:
    def raises(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            ingestion_metrics(tmp_path, [ingest(spark, tmp_path, tmp_path / "out", "week")])
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match="does not exist; set source.path"):
        ingest(spark, tmp_path / "nowhere", tmp_path / "out", "week")
    raises("holds no events: a file or folder events of Parquet, CSV")
    path = tmp_path / "events.csv"
    path.touch()
    raises("events.csv is empty")
    write_csv(path, [])
    raises("the events of .* have no rows")
    write_csv(path, ["u,n,view"], header="user_id,note_id,event")
    raises("events.csv lacks the column timestamp; it has user_id, note_id, event")
    write_csv(path, ["u,n,never,view"])
    raises(r"no timestamp of the events of .* is readable")
    path.unlink()
    zipped = write_csv(tmp_path / "events.csv.gz", [f"u{i},n{i % 97},{i * i},view" for i in range(5000)])
    zipped.write_bytes(zipped.read_bytes()[:2000])  # found out by the task that reads it
    raises("events.csv.gz is damaged, or not of the format its name says")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_id": [[1]]}, "the column user_id has type list<.*: int64>, not text or whole numbers"),
        ({"user_id": [1.5]}, "the column user_id has type double"),
        ({"note_id": [True]}, "the column note_id has type bool"),
        ({"timestamp": [True]}, "the column timestamp has type bool, not text, numbers or timestamps"),
        ({"timestamp": pa.array([1.0], pa.float32())}, "the column timestamp has type float, not"),
    ],
)
def test_types_that_an_event_cannot_have(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    columns = {"user_id": [1], "note_id": ["a"], "timestamp": [1], "event": ["view"], **changes}
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    with pytest.raises(ValueError, match=r"events\.parquet: " + message):
        event_files(tmp_path)


def test_notes_that_cannot_be_used_are_named(spark: SparkSession, tmp_path: Path) -> None:
    good: dict[str, Any] = {"note_id": ["a"], "title": ["t"], "topics": ["x|y"], "content": ["c"]}

    def raises(message: str, **columns: Any) -> None:
        table = {k: v for k, v in {**good, **columns}.items() if v is not None}
        pq.write_table(pa.table(table), tmp_path / "notes.parquet")
        with pytest.raises(ValueError, match=r"notes\.parquet" + message):
            read_source_notes(spark, tmp_path)

    with pytest.raises(ValueError, match=r"holds no notes: a file or folder notes of Parquet, CSV"):
        read_source_notes(spark, tmp_path)
    raises(" lacks the column topics", topics=None)
    raises(": the column note_id has type double", note_id=[1.0])
    raises(": the column title has type int64, not text", title=[1])
    raises(": the column topics has type int64", topics=[1])
    raises(": the column topics has type list<.*: double>, not text or a list of texts", topics=[[0.5]])
    raises(": the column image has type string, not bytes", image=["a.png"])
    raises(": the column image_path has type binary, not text", image_path=[b"a.png"])
    (tmp_path / "notes.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="is damaged"):
        read_source_notes(spark, tmp_path)


def test_a_value_that_only_a_task_meets_is_named(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"user_id": 1, "note_id": 1, "timestamp": 1, "event": "view"}\n' * 2
                                           + '{"user_id": 1.5}\n')  # fmt: skip
    with pytest.raises(ValueError, match=r"events\.jsonl: the column user_id has 1\.5 in line 3"), readable(tmp_path):
        read_source_events(spark, tmp_path).collect()


def test_spark_reads_as_the_settings_say(spark: SparkSession, tmp_path: Path) -> None:
    """Two tables of events, of which one shares its file with the notes. Each file is read once for each table."""
    write_csv(tmp_path / "items.csv", ["a,5,first,x", "b,6,second,"], header="item,t,name,tag")
    write_csv(tmp_path / "log.csv", ["u1,a,7,4.5", "u1,b,8,2"], header="user,item,t,stars")
    reading = SourceSettings(
        columns={"note_id": "item", "timestamp": "t", "title": "name", "content": None, "topics": "tag"},
        notes={"files": "items.csv"},
        events=[
            {"files": "log.csv", "columns": {"user_id": "user"}, "event": "rated"},
            {"files": "log.csv", "columns": {"user_id": "user"}, "event": "liked", "where": {"stars": ">= 4"}},
            {"files": "items.csv", "columns": {"user_id": "name"}, "event": "made"},
        ],
    )
    assert event_files(tmp_path, reading) == ["log.csv", "items.csv"]
    read = read_source_events(spark, tmp_path, ["log.csv"], reading).collect()
    assert sorted((r.user_id, r.note_id, r.event) for r in read) == [
        ("u1", "a", "liked"), ("u1", "a", "rated"), ("u1", "b", "rated"),
    ]  # fmt: skip
    assert read_source_events(spark, tmp_path, None, reading).count() == 5
    notes = read_source_notes(spark, tmp_path, reading).orderBy("position").collect()
    assert [(n.note_id, n.title, n.topics, n.content) for n in notes] == [
        ("a", "first", ["x"], None), ("b", "second", None, None),
    ]  # fmt: skip


def test_rows_of_one_note_are_joined_alike_with_and_without_spark(spark: SparkSession, tmp_path: Path) -> None:
    """Each distinct text once, in file order; the image of the last row. A row without an id stays one by itself."""
    lines = ["1,Kite,toys|red,It flies.,1.jpg", "2,Boat,toys,,", "1,Kite,red|sky,High.,", "1,Red kite,,It flies.,2.jpg",
             ",no id,,,", "short"]  # fmt: skip
    write_csv(tmp_path / "notes.csv", lines, header="note_id,title,topics,content,image_path")
    reading = NoteReadingSettings(notes={"repeated": "join"})
    metrics = prepare_notes(spark, tmp_path, tmp_path / "out", reading)
    assert metrics["dropped"] == {"malformed_row": 1, "null_note_id": 1}
    stored = {r.note_id: r for r in spark.read.parquet(str(tmp_path / "out" / "notes")).collect()}
    kite, boat = ("Kite Red kite", ["toys", "red", "sky"], "It flies. High.", "2.jpg"), ("Boat", ["toys"], "", None)
    expected = {"1": kite, "2": boat}
    assert {i: (n.title, n.topics, n.content, n.image_path) for i, n in stored.items()} == expected
    table = read_note_table(tmp_path, reading=reading)
    read = {n.note.note_id: n for n in table.notes(table.note_ids)}
    assert {i: (n.note.title, [*n.note.topics], n.note.content, n.image) for i, n in read.items()} == expected
    assert dict(table.dropped) == {"malformed_row": 1, "null_note_id": 1}


def test_html_is_cleaned_alike_with_and_without_spark_and_counted(spark: SparkSession, tmp_path: Path) -> None:
    """Row b is empty without its tags. The quarantine holds it as it was."""
    lines = ["a,Tom &amp; Jerry,x &gt; y|<b>z</b>,<p>1 < 2</p><p>你好</p>", "b,<br>,,", "c,x<y,,R&D"]
    write_csv(tmp_path / "notes.csv", lines, header="note_id,title,topics,content")
    reading = NoteReadingSettings(notes={"repeated": "join"})
    metrics = prepare_notes(spark, tmp_path, tmp_path / "out", reading)
    assert (metrics["rows"], metrics["html_rows"], metrics["notes"], metrics["dropped"]) == (3, 2, 2, {"empty_note": 1})
    stored = spark.read.parquet(str(tmp_path / "out" / "notes")).orderBy("note_id").collect()
    table = read_note_table(tmp_path, reading=reading)
    read = [n.note for n in table.notes(sorted(table.note_ids))]
    assert [(n.title, n.topics, n.content) for n in stored] == [(n.title, [*n.topics], n.content) for n in read]
    assert read[0] == Note("a", "Tom & Jerry", ("x > y", "z"), "1 < 2\n你好")
    (dropped,) = spark.read.parquet(str(tmp_path / "out" / "quarantine")).collect()
    assert "<br>" in dropped.row
    metrics = prepare_notes(spark, tmp_path, tmp_path / "plain", NoteReadingSettings(clean_html=False))
    assert (metrics["html_rows"], metrics["notes"]) == (0, 3)

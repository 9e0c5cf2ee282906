import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from spark_jobs.ingest import ingest, ingest_events, ingestion_metrics
from spark_jobs.source import event_files, files_by_types, find_events, read_source_events, read_source_notes
from tests.spark_jobs.conftest import Frame

TEXT = "user_id string, note_id string, timestamp string, event string"


def write_csv(path: Path, lines: list[str], header: str = "user_id,note_id,timestamp,event") -> Path:
    text = "\n".join([header, *lines]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_times_in_every_form(frame: Frame) -> None:
    """2024-01-03 is a Wednesday, so its week starts on Sunday 2023-12-31; 1704240000 is its first second."""
    noon = "2024-01-03 12:00:00.000000"
    expected = {
        "1704283200": noon,
        " 1704283200.25 ": "2024-01-03 12:00:00.250000",
        "1.7042832e9": noon,
        "1704283200000": noon,
        "1704283200000001": "2024-01-03 12:00:00.000001",
        "1704283200000000000": noon,
        "2024-01-03": "2024-01-03 00:00:00.000000",
        "2024-01-03T12:00:00Z": noon,
        "2024-01-03T14:00:00+02:00": noon,
        "2024-01-03 12:00:00.5": "2024-01-03 12:00:00.500000",
        "0": "1970-01-01 00:00:00.000000",
        "-86400": "1969-12-31 00:00:00.000000",
        "20240103": "2024-01-03 00:00:00.000000",
        "20240103.0": "2024-01-03 00:00:00.000000",  # pandas' column of dates where one is missing
        "20241303": "1970-08-23 06:35:03.000000",  # no thirteenth month: seconds
        "2024": "1970-01-01 00:33:44.000000",  # a number, though it looks like a year
        **dict.fromkeys(
            ["", "soon", "2024-02-30", "12:00:00", "2024-01", "NaN", "Infinity", "1e300", "1d", "0x10",
             "20240-01-01", "2024-01-03T25:00:00", None]
        ),
    }  # fmt: skip
    ingested = ingest_events(frame(TEXT, [("u", "n", t, "view") for t in expected]))
    rows = ingested.select(F.get_json_object("row", "$.timestamp").alias("raw"), *_shown(), "partition").collect()
    assert {r.raw: r.shown for r in rows} == expected
    partitions = {r.raw: r.partition for r in rows}
    assert (partitions["1704283200"], partitions["0"], partitions["soon"]) == ("2023-12-31", "1969-12-28", "undated")


def _shown() -> list[Any]:
    return [F.date_format("timestamp", "yyyy-MM-dd HH:mm:ss.SSSSSS").alias("shown")]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1704283200, None], pa.int64()),
        pa.array([1704283200.0, float("nan")], pa.float64()),
        pa.array([1704283200000, 2**62], pa.uint64()),
        pa.array([datetime(2024, 1, 3, 12), None], pa.timestamp("ns")),  # as pandas writes it
        pa.array([datetime(2024, 1, 3, 12), None], pa.timestamp("us")),
        pa.array([datetime(2024, 1, 3, 12, tzinfo=UTC), None], pa.timestamp("ms", tz="Asia/Shanghai")),
    ],
    ids=["seconds", "float", "uint64", "nanoseconds", "naive", "zoned"],
)
def test_times_of_parquet(spark: SparkSession, tmp_path: Path, times: pa.Array) -> None:
    (tmp_path / "events").mkdir()
    columns = {"user_id": pa.array([1, 2]), "note_id": ["a", "b"], "timestamp": times, "event": ["view", "click"]}
    pq.write_table(pa.table(columns), tmp_path / "events" / "x.parquet")
    ingested = ingest_events(read_source_events(spark, tmp_path)).orderBy("user_id").select("user_id", *_shown())
    rows = [tuple(r) for r in ingested.collect()]
    assert rows[0] == ("1", "2024-01-03 12:00:00.000000")
    assert rows[1][1] is None or rows[1][1].startswith("2116")  # 2**62 is a time in nanoseconds


def test_nanoseconds_of_any_year_in_either_form(spark: SparkSession, tmp_path: Path) -> None:
    """pandas writes timestamps, other writers INT96. Bare numbers of these sizes would be read in other units."""
    (tmp_path / "events").mkdir()
    times = pa.array([datetime(1972, 5, 1, 0, 0, 0, 3), datetime(1969, 12, 31)], pa.timestamp("ns"))
    columns = {"user_id": [1, 2], "note_id": ["a", "b"], "timestamp": times, "event": ["view", "click"]}
    for name, old in (("a", True), ("b", False)):
        file = tmp_path / "events" / f"{name}.parquet"
        pq.write_table(pa.table(columns), file, use_deprecated_int96_timestamps=old)
    groups = files_by_types(tmp_path, event_files(tmp_path))
    assert groups == [["events/a.parquet"], ["events/b.parquet"]]
    for files in groups:
        ingested = ingest_events(read_source_events(spark, tmp_path, files)).orderBy("user_id").select(*_shown())
        assert [r.shown for r in ingested.collect()] == ["1972-05-01 00:00:00.000003", "1969-12-31 00:00:00.000000"]


def test_events_that_cannot_be_used_are_named(spark: SparkSession, tmp_path: Path) -> None:
    def raises(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            ingestion_metrics(tmp_path, [ingest(spark, tmp_path, tmp_path / "out", "week")])
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match="does not exist; set source.path"):
        ingest(spark, tmp_path / "nowhere", tmp_path / "out", "week")
    raises("holds no events.csv.gz, events.csv or events/")
    path = tmp_path / "events.csv"
    path.touch()
    raises("events.csv is empty")
    write_csv(path, [])
    raises("events.csv holds no rows")
    write_csv(path, ["u,n,view"], header="user_id,note_id,event")
    raises("events.csv lacks the column timestamp; it has user_id, note_id, event")
    zipped = write_csv(tmp_path / "events.csv.gz", [f"u{i},n{i % 97},{i * i},view" for i in range(5000)])
    raises("holds both events.csv.gz and events.csv")
    path.unlink()
    zipped.write_bytes(zipped.read_bytes()[:2000])
    raises("events.csv.gz is damaged")
    zipped.unlink()
    (tmp_path / "events").mkdir()
    raises("events holds no Parquet files")
    columns = {"user_id": [[1]], "note_id": ["a"], "timestamp": [1], "event": ["view"]}
    pq.write_table(pa.table(columns), tmp_path / "events" / "x.parquet")
    raises("the column user_id has type array<bigint>, not text or whole numbers")
    pq.write_table(pa.table({**columns, "user_id": [1.5]}), tmp_path / "events" / "x.parquet")
    raises("the column user_id has type double")
    pq.write_table(pa.table({**columns, "user_id": [1], "timestamp": [True]}), tmp_path / "events" / "x.parquet")
    raises("the column timestamp has type boolean, not text, numbers or timestamps")


def test_a_table_of_events_is_read_directly(spark: SparkSession, tmp_path: Path) -> None:
    """The name of a table is read literally, not as a pattern."""
    for name in ("log[1].csv", "log*.csv"):
        write_csv(tmp_path / name, ["u,n,1,view"])
        assert read_source_events(spark, tmp_path / name).count() == 1
    (tmp_path / "table" / "dt=2024-01-01").mkdir(parents=True)
    columns = {"user_id": ["u"], "note_id": ["n"], "timestamp": [1], "event": ["view"]}
    pq.write_table(pa.table(columns), tmp_path / "table" / "dt=2024-01-01" / "x.parquet")
    assert read_source_events(spark, tmp_path / "table").count() == 1
    assert find_events(write_csv(tmp_path / "events.csv", []).parent).name == "events.csv"


def test_files_with_columns_of_the_same_types_are_read_together(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    for name, columns in {
        "a": {"user_id": [1], "more": ["x"]},
        "b": {"user_id": ["u"]},
        "c": {"more": [1], "user_id": [2]},
        "d": {"event": ["view"], "user_id": [2]},
        "e": {"user_id": [2], "event": ["view"]},
    }.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    files = event_files(tmp_path)
    assert files_by_types(tmp_path, files) == [
        ["events/d.parquet", "events/e.parquet"], ["events/a.parquet", "events/c.parquet"], ["events/b.parquet"]
    ]  # fmt: skip
    assert files_by_types(folder, ["b.parquet"]) == [["b.parquet"]]
    csv = write_csv(tmp_path / "log.csv.gz", [])
    assert files_by_types(csv, event_files(csv)) == [["."]]
    (folder / "b.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.parquet is damaged"):
        files_by_types(tmp_path, files)
    with pytest.raises(ValueError, match=r"typo\.parquet does not exist"):
        event_files(tmp_path / "typo.parquet")
    (tmp_path / "none" / "events").mkdir(parents=True)
    (tmp_path / "none" / "events" / ".draft.parquet").touch()
    with pytest.raises(ValueError, match="events holds no Parquet files"):
        event_files(tmp_path / "none")


def test_an_extra_column_is_ignored_unless_spark_cannot_read_it(spark: SparkSession, tmp_path: Path) -> None:
    columns = {"user_id": ["u"], "note_id": ["n"], "timestamp": [1], "event": ["view"]}
    pq.write_table(pa.table({**columns, "Event": ["x"]}), tmp_path / "x.parquet")
    assert read_source_events(spark, tmp_path).select("event").head() == ("view",)
    pq.write_table(pa.table({**columns, "clock": pa.array([1], pa.time64("us"))}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"has a column that Spark cannot read \(.*TIME.*\); leave it out"):
        read_source_events(spark, tmp_path)


def test_notes_that_cannot_be_used_are_named(spark: SparkSession, tmp_path: Path) -> None:
    good: dict[str, Any] = {"note_id": ["a"], "title": ["t"], "topics": ["x|y"], "content": ["c"]}

    def raises(message: str, **columns: Any) -> None:
        table = {k: v for k, v in {**good, **columns}.items() if v is not None}
        pq.write_table(pa.table(table), tmp_path / "notes.parquet")
        with pytest.raises(ValueError, match=r"notes\.parquet" + message):
            read_source_notes(spark, tmp_path)

    with pytest.raises(ValueError, match=r"holds no notes\.parquet"):
        read_source_notes(spark, tmp_path)
    raises(" lacks the column topics", topics=None)
    raises(": the column note_id has type double", note_id=[1.0])
    raises(": the column title has type bigint, not text", title=[1])
    raises(": the column topics has type bigint", topics=[1])
    raises(": the column topics has type array<double>, not a list of texts", topics=[[0.5]])
    raises(": the column image has type string, not bytes", image=["a.png"])
    raises(": the column image_path has type binary, not text", image_path=[b"a.png"])
    (tmp_path / "notes.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="is damaged"):
        read_source_notes(spark, tmp_path)

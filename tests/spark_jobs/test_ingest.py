import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from notellm2_core.config.source import EventSettings
from notellm2_core.tables.log import UNDATED, ingestion_metrics
from spark_jobs.clean import label_events
from spark_jobs.ingest import ingest
from spark_jobs.source import event_files
from tests.spark_jobs.test_source import write_csv


def test_ingest_makes_one_folder_per_partition(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        "u,n1,2024-01-06T23:59,view",
        "u, n1 ,2024-01-07,click",
        '"u ""x""",n2,1704067200,view',
        "u,n3,never,view",
        "u",
    ]
    write_csv(tmp_path / "events.csv.gz", lines)
    out = tmp_path / "raw"
    ingestion = ingest(spark, tmp_path, out, "week")
    assert ingestion_metrics(tmp_path, [ingestion]) == {
        "rows": 5, "undated": 2, "most_undated": {"file": "events.csv.gz", "share": 0.4},
        "first_day": "2024-01-01", "last_day": "2024-01-07", "covered_until": "2024-01-07",
        "events": {"view": 3, "": 1, "click": 1},
        "partitions": [
            {"partition": "2023-12-31", "rows": 2}, {"partition": "2024-01-07", "rows": 1},
            {"partition": "undated", "rows": 2},
        ],
    }  # fmt: skip
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.parquet")) == [
        f"{p}/part-00000.parquet" for p in ("2023-12-31", "2024-01-07", "undated")
    ]
    week = pq.read_table(out / "2023-12-31")
    assert week.column_names == ["user_id", "note_id", "event", "timestamp", "malformed", "row"]
    assert week.schema.field("timestamp").type == pa.timestamp("us", tz="UTC")
    assert week["user_id"].to_pylist() == ['u "x"', "u"]
    assert ingest(spark, tmp_path, tmp_path / "years", "year")["rows"] == {"2024-01-01": 3, UNDATED: 2}


def test_files_ingested_separately_add_up(spark: SparkSession, tmp_path: Path) -> None:
    """The log has two files, and a third in a folder of its day. Files that Parquet readers skip are not part of it."""
    days = {"a.parquet": "2024-01-01", "b.parquet": "2024-01-07", "day=3/c.parquet": "2024-01-08"}
    for name, day in days.items():
        (tmp_path / "events" / name).parent.mkdir(parents=True, exist_ok=True)
        columns = {"user_id": ["u", "v"], "note_id": ["n", "n"], "timestamp": [day, "never"], "event": ["view"] * 2}
        pq.write_table(pa.table(columns), tmp_path / "events" / name)
    (tmp_path / "events" / "_SUCCESS").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "events" / "b.parquet").rename(tmp_path / "elsewhere" / "week[1].parquet")
    (tmp_path / "events" / "b").symlink_to(tmp_path / "elsewhere")
    files = event_files(tmp_path)
    assert files == ["events/a.parquet", "events/b/week[1].parquet", "events/day=3/c.parquet"]
    whole = ingest(spark, tmp_path, tmp_path / "whole", "week")
    ingestions = [
        ingest(spark, tmp_path, tmp_path / f"raw{n}", "week", group) for n, group in enumerate((files[:2], files[2:]))
    ]
    worst = {"file": "events/a.parquet", "share": 0.5}
    assert ingestion_metrics(tmp_path, ingestions) == ingestion_metrics(tmp_path, [whole]) | {"most_undated": worst}
    assert [ingestion["rows"] for ingestion in ingestions] == [
        {UNDATED: 2, "2023-12-31": 1, "2024-01-07": 1},
        {UNDATED: 1, "2024-01-07": 1},
    ]


def test_folders_name_columns_that_files_lack(spark: SparkSession, tmp_path: Path) -> None:
    """The column is text: 007 is no number."""
    (tmp_path / "events" / "note_id=007").mkdir(parents=True)
    columns = {"user_id": ["u"], "timestamp": ["2024-01-01"], "event": ["view"]}
    pq.write_table(pa.table(columns), tmp_path / "events" / "note_id=007" / "a.parquet")
    ingest(spark, tmp_path, tmp_path / "raw", "week")
    assert pq.read_table(tmp_path / "raw" / "2023-12-31")["note_id"].to_pylist() == ["007"]


def test_a_line_with_other_fields_than_the_header_is_malformed(spark: SparkSession, tmp_path: Path) -> None:
    """No value is guessed from the line; it goes to the quarantine whole. Extra columns are no part of `row`."""
    lines = ["u,n,2024-01-01,view,phone", "Doe, J,n,2024-01-01,view,phone", "u,n,2024-01-01", "u,n,,view,tv"]
    log = write_csv(tmp_path / "events.csv", lines, header="user_id,note_id,timestamp,event,device")
    log.write_bytes(log.read_bytes() + "u,café,2024-01-01,view,tv\n".encode("latin-1"))
    assert ingest(spark, tmp_path, tmp_path / "raw", "week")["rows"] == {UNDATED: 4, "2023-12-31": 1}
    settings = EventSettings(view_events=["view"], click_events=[])
    labelled = label_events(spark.read.parquet(str(tmp_path / "raw" / UNDATED)), settings, False)
    quarantine = {(r.reason, tuple(json.loads(r.row).items())) for r in labelled.collect()}
    assert quarantine == {
        ("malformed_row", (("line", lines[1]),)),
        ("malformed_row", (("line", lines[2]),)),
        ("malformed_row", (("user_id", "u"), ("note_id", "caf\ufffd"), ("timestamp", "2024-01-01"), ("event", "view"))),
        ("bad_timestamp", (("user_id", "u"), ("note_id", "n"), ("timestamp", None), ("event", "view"))),
    }


def test_absurd_times_are_undated(spark: SparkSession, tmp_path: Path) -> None:
    """The rows come from a clock that was never set, and from one far ahead."""
    write_csv(tmp_path / "events.csv", [f"u,n,{time},view" for time in (0, 86399, 86400, "2099-12-31", "2100-01-01")])
    assert ingest(spark, tmp_path, tmp_path / "raw", "year")["rows"] == {UNDATED: 3, "1970-01-01": 1, "2099-01-01": 1}

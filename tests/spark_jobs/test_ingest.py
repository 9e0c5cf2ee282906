import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core.config.source import EventSettings
from spark_jobs.clean import label_events
from spark_jobs.ingest import UNDATED, covered_until, ingest, ingestion_metrics, partitions_between
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


def test_a_broken_file_does_not_hide_behind_good_ones() -> None:
    """In b, one row of two is undated; in the whole log, one of six. c is too small to count."""

    def ingestion(file: str, placed: int, undated: int) -> dict[str, Any]:
        rows = {"2024-01-07": placed, UNDATED: undated}
        return {"files": [file], "rows": rows, "days": {"2024-01-07": placed}, "events": {"view": placed + undated}}

    ingestions = [ingestion("a", 400, 0), ingestion("b", 100, 100), ingestion("c", 0, 1)]
    assert ingestion_metrics(Path(), ingestions)["most_undated"] == {"file": "b", "share": 0.5}


def test_absurd_times_are_undated(spark: SparkSession, tmp_path: Path) -> None:
    """The rows come from a clock that was never set, and from one far ahead."""
    write_csv(tmp_path / "events.csv", [f"u,n,{time},view" for time in (0, 86399, 86400, "2099-12-31", "2100-01-01")])
    assert ingest(spark, tmp_path, tmp_path / "raw", "year")["rows"] == {UNDATED: 3, "1970-01-01": 1, "2099-01-01": 1}


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

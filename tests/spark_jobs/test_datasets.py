"""A public data set through Spark, from its own files to interactions; `tables/test_datasets.py` proves the values."""

from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from notellm2_core.tables.log import ingestion_metrics
from spark_jobs.clean import prepare_notes
from spark_jobs.ingest import ingest
from tests.notellm2_core.tables.test_datasets import NOTES, write_dataset
from tests.spark_jobs.test_interactions import joined


def test_from_the_files_of_mind_to_interactions(spark: SparkSession, tmp_path: Path) -> None:
    """Of three impressions two are clicks, one of them on the test day. News of both files are one note."""
    source, notes = tmp_path / "source", NOTES["mind"]
    source.mkdir()
    reading = write_dataset("mind", source)
    metrics = prepare_notes(spark, source, tmp_path / "notes", reading)
    assert (metrics["rows"], metrics["notes"], metrics["dropped"]) == (4, 3, {})
    rows = pq.read_table(tmp_path / "notes" / "notes").to_pylist()
    assert {r["note_id"]: (r["title"], tuple(r["topics"]), r["content"], r["image_path"]) for r in rows} == notes

    log = ingestion_metrics(source, [ingest(spark, source, tmp_path / "raw", "week", reading=reading)])
    names = {key: getattr(reading, key) for key in ("view_events", "click_events", "ignored_events")}
    spans = {"train": (date(2019, 11, 9), date(2019, 11, 15)), "test": (date(2019, 11, 15), date(2019, 11, 16))}
    counts = joined(spark, tmp_path / "raw", log, tmp_path / "out", **spans, note_ids=[*notes], **names)
    assert (counts["rows"], counts["ignored_event"], counts["dropped"]) == (3, 1, {})
    for name, day in (("train", "2019-11-11"), ("test", "2019-11-15")):
        assert counts[name] == {
            "events": 1, "clicks": 1, "views": 0, "users": 1, "notes": 1, "first_day": day, "last_day": day
        }  # fmt: skip
